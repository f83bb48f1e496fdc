//! Where an image is read from or written to, in the names people know from skopeo.
//!
//! | text | means | source | target |
//! |---|---|---|---|
//! | `oci:PATH[:TAG]` | an OCI layout directory | yes | yes |
//! | `oci-archive:PATH[:TAG]` | an OCI layout in one tar file | yes | yes |
//! | `docker://HOST/REPO[:TAG\|@DIGEST]` | a registry | yes | yes |
//! | `docker-archive:PATH[:REF\|:@N]` | what `docker save` writes | yes | no |
//!
//! As in skopeo a path ends at the first colon, so it cannot contain one.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// One place that holds images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// An OCI layout directory and the name of an image in it.
    Layout {
        /// The directory.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name` of the image.
        tag: Option<String>,
    },
    /// An OCI layout in a tar file and the name of an image in it.
    LayoutArchive {
        /// The file.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name` of the image.
        tag: Option<String>,
    },
    /// A repository of a registry: `HOST/REPO[:TAG|@DIGEST]`, not yet interpreted.
    Registry(String),
    /// The output of `docker save`.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images.
        image: DockerArchiveImage,
    },
}

/// Selects one image of a `docker save` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DockerArchiveImage {
    /// The only one.
    Only,
    /// The one tagged so.
    Tag(String),
    /// The one at this place of `manifest.json`, from 0.
    Index(usize),
}

impl Transport {
    /// True if `text` begins like the name of an image rather than like a path.
    pub fn is_named(text: &str) -> bool {
        ["oci:", "oci-archive:", "docker:", "docker-archive:"].iter().any(|scheme| text.starts_with(scheme))
    }
}

const FORMS: &str = "want oci:PATH[:TAG], oci-archive:PATH[:TAG], docker://HOST/REPO[:TAG|@DIGEST] or \
                     docker-archive:PATH";

impl FromStr for Transport {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = |why: &str| Error::new(ErrorKind::Invalid, format!("image {s:?}: {why}"));
        let (scheme, rest) = s.split_once(':').ok_or_else(|| bad(FORMS))?;
        let split = || -> Result<(PathBuf, Option<&str>)> {
            let (path, tag) = match rest.split_once(':') {
                Some((path, tag)) => (path, Some(tag)),
                None => (rest, None),
            };
            if path.is_empty() {
                return Err(bad("the path is empty"));
            }
            if let Some(tag) = tag
                && (tag.is_empty() || tag.chars().any(|c| c.is_control() || c.is_whitespace()))
            {
                return Err(bad(
                    "the tag behind the path is empty or has blanks (a path cannot contain a colon)",
                ));
            }
            Ok((PathBuf::from(path), tag))
        };
        match scheme {
            "oci" => {
                let (path, tag) = split()?;
                Ok(Self::Layout { path, tag: tag.map(str::to_owned) })
            }
            "oci-archive" => {
                let (path, tag) = split()?;
                Ok(Self::LayoutArchive { path, tag: tag.map(str::to_owned) })
            }
            "docker-archive" => {
                let (path, tag) = split()?;
                let image = match tag {
                    None => DockerArchiveImage::Only,
                    Some(tag) => match tag.strip_prefix('@') {
                        Some(n) => DockerArchiveImage::Index(
                            n.parse()
                                .map_err(|_| bad("want a number behind @, the place in manifest.json"))?,
                        ),
                        None => DockerArchiveImage::Tag(tag.to_owned()),
                    },
                };
                Ok(Self::DockerArchive { path, image })
            }
            "docker" => match rest.strip_prefix("//") {
                Some(reference) if !reference.is_empty() => Ok(Self::Registry(reference.to_owned())),
                _ => Err(bad("a registry is written docker://HOST/REPO[:TAG|@DIGEST]")),
            },
            "dir" | "docker-daemon" | "containers-storage" | "ostree" | "sif" => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "image {s:?}: transport {scheme} is not supported; copy it with skopeo to oci:PATH first"
                ),
            )),
            _ => Err(bad(FORMS)),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |f: &mut fmt::Formatter<'_>, scheme: &str, path: &PathBuf, tag: &Option<String>| {
            write!(f, "{scheme}:{}", path.display())?;
            tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
        };
        match self {
            Self::Layout { path, tag } => named(f, "oci", path, tag),
            Self::LayoutArchive { path, tag } => named(f, "oci-archive", path, tag),
            Self::Registry(reference) => write!(f, "docker://{reference}"),
            Self::DockerArchive { path, image } => {
                write!(f, "docker-archive:{}", path.display())?;
                match image {
                    DockerArchiveImage::Only => Ok(()),
                    DockerArchiveImage::Tag(tag) => write!(f, ":{tag}"),
                    DockerArchiveImage::Index(n) => write!(f, ":@{n}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_parse_and_print_as_skopeo_writes_them() {
        let layout =
            |path: &str, tag: Option<&str>| Transport::Layout { path: path.into(), tag: tag.map(Into::into) };
        let archive = |path: &str, tag: Option<&str>| Transport::LayoutArchive {
            path: path.into(),
            tag: tag.map(Into::into),
        };
        let docker = |path: &str, image| Transport::DockerArchive { path: path.into(), image };
        for (text, want) in [
            ("oci:/a/b", layout("/a/b", None)),
            ("oci:a:v1", layout("a", Some("v1"))),
            ("oci:a:docker.io/library/x:1", layout("a", Some("docker.io/library/x:1"))),
            ("oci-archive:x.tar", archive("x.tar", None)),
            ("oci-archive:x.tar:t", archive("x.tar", Some("t"))),
            ("docker://h:5000/r:t", Transport::Registry("h:5000/r:t".into())),
            ("docker-archive:s.tar", docker("s.tar", DockerArchiveImage::Only)),
            ("docker-archive:s.tar:r:t", docker("s.tar", DockerArchiveImage::Tag("r:t".into()))),
            ("docker-archive:s.tar:@2", docker("s.tar", DockerArchiveImage::Index(2))),
        ] {
            let parsed: Transport = text.parse().unwrap();
            assert_eq!(parsed, want);
            assert_eq!(parsed.to_string(), text);
        }
        for bad in [
            "",
            "x",
            "/a/b",
            "oci",
            "oci:",
            "oci::t",
            "oci:a:",
            "oci:a:b c",
            "docker:h/r",
            "docker://",
            "dir:/a",
            "docker-daemon:x",
            "docker-archive:s:@x",
            "OCI:a",
            "http://h/r",
        ] {
            let err = bad.parse::<Transport>().unwrap_err();
            assert!(err.to_string().contains(&format!("{bad:?}")), "{err}");
        }
    }
}
