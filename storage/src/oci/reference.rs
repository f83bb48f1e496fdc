//! Names of images: `HOST/REPOSITORY[:TAG][@DIGEST]`, as docker and podman write them.

use std::fmt;
use std::str::FromStr;

use crate::digest::TaggedDigest;
use crate::{Error, ErrorKind, Result};

/// The host meant when a name has none, and the only one with a default namespace.
pub const DEFAULT_HOST: &str = "docker.io";
/// Where docker.io's registry API is served.
const DOCKER_API_HOST: &str = "registry-1.docker.io";
/// Namespace of docker.io's official images.
const DEFAULT_NAMESPACE: &str = "library";
/// The tag meant when a name has neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";
/// Longest repository name (distribution specification, "Pulling manifests").
const MAX_REPOSITORY_LEN: usize = 255;
/// Longest tag (distribution specification, "Pulling manifests").
const MAX_TAG_LEN: usize = 128;

/// An image's name, checked and with docker.io's defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<TaggedDigest>,
}

impl Reference {
    /// The registry as named by the user: the key of login files.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The registry's API host, `HOST[:PORT]`; differs from [`Reference::host`] for docker.io.
    pub fn api_host(&self) -> &str {
        api_host(&self.host)
    }

    /// The repository, for example `library/debian`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given. It decides; a tag beside it is only shown.
    pub fn digest(&self) -> Option<TaggedDigest> {
        self.digest
    }

    /// What stands in a manifest URL: the digest, else the tag, else `latest`.
    pub fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    /// The same repository at `digest`, without a tag.
    #[must_use]
    pub fn at_digest(&self, digest: TaggedDigest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The same repository at `tag`, without a digest.
    ///
    /// # Errors
    /// `Invalid`: not a tag.
    pub fn at_tag(&self, tag: &str) -> Result<Self> {
        check_tag(tag)?;
        Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }
}

/// The API host behind a registry's name.
pub fn api_host(host: &str) -> &str {
    match host {
        DEFAULT_HOST | "index.docker.io" => DOCKER_API_HOST,
        other => other,
    }
}

/// True if `host` (`HOST[:PORT]`) is this machine, where plain http is the default.
pub fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Checks a registry's name, `HOST[:PORT]`.
///
/// # Errors
/// `Invalid`: not a host name or address with an optional port.
pub fn check_host(host: &str) -> Result<()> {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, rest)) if ip.parse::<std::net::Ipv6Addr>().is_ok() => (None, rest.strip_prefix(':')),
        Some(_) => (Some(""), None),
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    let name_ok = name.is_none_or(|name| {
        !name.is_empty()
            && name.split('.').all(|label| {
                !label.is_empty()
                    && !label.starts_with('-')
                    && !label.ends_with('-')
                    && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            })
    });
    let port_ok = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0));
    if name_ok && port_ok {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Invalid, format!("registry host {host:?}: want HOST or HOST:PORT")))
}

/// Checks a repository's name: lower-case path components (distribution specification,
/// "Pulling manifests").
///
/// # Errors
/// `Invalid`: empty, longer than 255 bytes, or a character out of place.
pub fn check_repository(repository: &str) -> Result<()> {
    let component_ok = |component: &str| {
        let bytes = component.as_bytes();
        let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        bytes.first().is_some_and(alnum)
            && bytes.last().is_some_and(alnum)
            && bytes.iter().all(|b| alnum(b) || matches!(b, b'.' | b'_' | b'-'))
            && !component.contains("..")
            && !component.contains("___")
            && !component.contains("._")
            && !component.contains("_.")
    };
    if repository.len() <= MAX_REPOSITORY_LEN && repository.split('/').all(component_ok) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!("repository {repository:?}: want lower-case words joined by '/', '.', '_' or '-'"),
    ))
}

/// Checks a tag: 1 to 128 of `[A-Za-z0-9_.-]`, not starting with `.` or `-`.
///
/// # Errors
/// `Invalid`.
pub fn check_tag(tag: &str) -> Result<()> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = tag.len() <= MAX_TAG_LEN
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    if ok {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!("tag {tag:?}: want 1 to {MAX_TAG_LEN} characters of [A-Za-z0-9_.-]"),
    ))
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parse = || -> Result<Self> {
            let (name, digest) = match s.split_once('@') {
                Some((name, digest)) => (name, Some(digest.parse::<TaggedDigest>()?)),
                None => (s, None),
            };
            // A colon after the last slash starts a tag; one before it, a port.
            let (name, tag) = match name.rsplit_once(':') {
                Some((before, tag)) if !tag.contains('/') => (before, Some(tag)),
                _ => (name, None),
            };
            let (host, path) = match name.split_once('/') {
                Some((first, rest))
                    if first.contains(['.', ':']) || first == "localhost" || first.starts_with('[') =>
                {
                    (first, rest)
                }
                _ => (DEFAULT_HOST, name),
            };
            check_host(host)?;
            let repository = if host == DEFAULT_HOST && !path.contains('/') {
                format!("{DEFAULT_NAMESPACE}/{path}")
            } else {
                path.to_owned()
            };
            check_repository(&repository)?;
            if let Some(tag) = tag {
                check_tag(tag)?;
            }
            Ok(Self { host: host.to_owned(), repository, tag: tag.map(str::to_owned), digest })
        };
        parse().map_err(|e| e.context(format_args!("image reference {s:?}")))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_docker_reads_them() {
        let digest = format!("sha256:{}", "0f".repeat(32));
        let pinned = format!("quay.io/a/b@{digest}");
        let both = format!("quay.io/a/b:v1@{digest}");
        let table = [
            ("debian", "docker.io", "library/debian", None, "latest"),
            ("user/app:1", "docker.io", "user/app", Some("1"), "1"),
            ("localhost/app", "localhost", "app", None, "latest"),
            ("localhost:5000/app:x", "localhost:5000", "app", Some("x"), "x"),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000", "a/b", None, "latest"),
            ("[::1]:5000/a/b:t", "[::1]:5000", "a/b", Some("t"), "t"),
            ("r.example.com/a/b-c/d__e:T_1.2", "r.example.com", "a/b-c/d__e", Some("T_1.2"), "T_1.2"),
            (pinned.as_str(), "quay.io", "a/b", None, digest.as_str()),
            (both.as_str(), "quay.io", "a/b", Some("v1"), digest.as_str()),
        ];
        for (text, host, repository, tag, manifest) in table {
            let r: Reference = text.parse().unwrap();
            assert_eq!(
                (r.host(), r.repository(), r.tag(), r.manifest_name().as_str()),
                (host, repository, tag, manifest),
                "{text}"
            );
            assert_eq!(r.to_string().parse::<Reference>().unwrap(), r);
        }
        assert_eq!("debian".parse::<Reference>().unwrap().api_host(), "registry-1.docker.io");
    }

    #[test]
    fn malformed_names_are_refused() {
        for bad in [
            "",
            "/",
            "a//b",
            "A/b",
            "a/b:",
            "a/b:-x",
            "host.x:99999/a",
            "host.x:0/a",
            "a/../b",
            "a/b@sha256:00",
            "a/b@md5:x",
            "-x.y/a",
            "a b",
            "x.y/",
            "[::1/a",
            "a/b?c",
            "a/b#c",
            "x.y@z/a",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn loopback_is_told_from_the_world() {
        for yes in ["localhost", "localhost:1", "127.0.0.1:5000", "[::1]:5000", "a.localhost:3"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["localhost.example.com", "10.0.0.1:5000", "[fe80::1]:5000", "registry"] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
