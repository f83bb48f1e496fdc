//! `OS/ARCH[/VARIANT]`: choosing one image of an index.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// A platform in the words of the OCI image specification (Go's `GOOS`/`GOARCH`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v7`, `v8`, …
    pub variant: Option<String>,
}

impl Platform {
    /// The machine this runs on.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: std::env::consts::OS.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// How well an image for `found` serves this platform: `None` not at all, else higher is better.
    ///
    /// An image without a variant serves every variant of its architecture; `arm64` and
    /// `arm64/v8` are one.
    pub fn rank(&self, found: &Self) -> Option<u8> {
        if self.os != found.os || self.architecture != found.architecture {
            return None;
        }
        let canonical = |p: &Self| match (p.architecture.as_str(), p.variant.as_deref()) {
            ("arm64", Some("v8")) => None,
            (_, variant) => variant.map(str::to_owned),
        };
        match (canonical(self), canonical(found)) {
            (a, b) if a == b => Some(2),
            (_, None) => Some(1),
            // Nothing was asked about the variant: any will do, but the plain one is better.
            (None, Some(_)) => Some(0),
            _ => None,
        }
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parts: Vec<&str> = s.split('/').collect();
        let plain =
            |p: &&str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !(2..=3).contains(&parts.len()) || !parts.iter().all(plain) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("platform {s:?}: want OS/ARCH or OS/ARCH/VARIANT, such as linux/arm64"),
            ));
        }
        Ok(Self {
            os: parts[0].to_owned(),
            architecture: parts[1].to_owned(),
            variant: parts.get(2).map(|&v| v.to_owned()),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |v| write!(f, "/{v}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_fitting_platform_wins() {
        let rank = |want: &str, found: &str| {
            want.parse::<Platform>().unwrap().rank(&found.parse::<Platform>().unwrap())
        };
        for (want, found, expected) in [
            ("linux/amd64", "linux/amd64", Some(2)),
            ("linux/amd64", "linux/arm64", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/arm64", "linux/arm64/v8", Some(2)),
            ("linux/arm64/v8", "linux/arm64", Some(2)),
            ("linux/arm/v7", "linux/arm", Some(1)),
            ("linux/arm", "linux/arm/v7", Some(0)),
            ("linux/arm/v7", "linux/arm/v6", None),
        ] {
            assert_eq!(rank(want, found), expected, "{want} {found}");
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/amd 64"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
        assert_eq!(Platform::host().os, "linux");
    }
}
