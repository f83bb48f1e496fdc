//! Paths inside the daemon's tree.

use std::fmt;

use super::error::{MountError, MountErrorKind};

/// Longest path in bytes, and longest name: the kernel's own limits.
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;

/// A checked absolute path: its names, none of them empty, `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VfsPath(Vec<String>);

impl VfsPath {
    /// Checks `text`; slashes in a row count as one, and one at the end as none.
    ///
    /// # Errors
    /// `InvalidArgument`: it is not absolute, too long, or has `.`, `..` or NUL in it.
    pub fn parse(text: &str) -> Result<Self, MountError> {
        let refuse = |why: &str| {
            Err(MountError::new(
                MountErrorKind::InvalidArgument,
                format!("invalid argument: mountpoint {text:?}: {why}"),
            ))
        };
        if !text.starts_with('/') {
            return refuse("want an absolute path");
        }
        let names: Vec<String> = text.split('/').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        if names.iter().any(|name| name == "." || name == ".." || name.contains('\0')) {
            return refuse("want a path without `.`, `..` and NUL");
        }
        if text.len() > MAX_PATH || names.iter().any(|name| name.len() > MAX_NAME) {
            return refuse("too long");
        }
        Ok(Self(names))
    }

    /// Its names; none for the root.
    pub fn names(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for VfsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("/");
        }
        self.0.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}
