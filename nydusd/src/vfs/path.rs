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
    /// `InvalidArgument`: it is not absolute, too long, or has `.`, `..` or control characters in it.
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
        // Paths are logged, and shown on terminals.
        if names.iter().any(|name| name == "." || name == ".." || name.chars().any(char::is_control)) {
            return refuse("want a path without `.`, `..` and control characters");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_checked_and_made_canonical() {
        for (text, shown) in [("/", "/"), ("//", "/"), ("/a", "/a"), ("//a///b/", "/a/b"), ("/…/ü", "/…/ü")]
        {
            assert_eq!(VfsPath::parse(text).unwrap().to_string(), shown);
        }
        let long_name = format!("/{}", "x".repeat(MAX_NAME + 1));
        let long_path = "/x".repeat(MAX_PATH / 2 + 1);
        for text in
            ["", "a", "./a", "/a/..", "/./a", "/a\0", "/a\nERROR b", "/\u{1b}[2J", &long_name, &long_path]
        {
            let error = VfsPath::parse(text).unwrap_err();
            assert_eq!(error.kind(), MountErrorKind::InvalidArgument, "{text:?}");
            assert!(!error.to_string().contains(['\n', '\u{1b}']), "{text:?}");
        }
    }
}
