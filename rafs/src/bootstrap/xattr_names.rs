//! The xattrs of one inode are there once each.

use super::Xattr;
use crate::{Error, Result};

/// Looks at the xattrs of inode after inode.
#[derive(Default)]
pub struct XattrNames<'a> {
    /// Names of the inode at hand; kept, because most inodes have few and there are many.
    names: Vec<(&'static [u8], &'a [u8])>,
    /// Some inode has xattrs.
    pub any: bool,
}

impl<'a> XattrNames<'a> {
    /// Reads the xattrs of one inode.
    ///
    /// # Errors
    /// `Corrupt`: a name is there twice. Those of `xattrs`.
    pub fn check(&mut self, xattrs: impl Iterator<Item = Result<Xattr<'a>>>) -> Result<()> {
        self.names.clear();
        for xattr in xattrs {
            let xattr = xattr?;
            self.names.push((xattr.prefix, xattr.suffix));
        }
        self.any |= !self.names.is_empty();
        self.names.sort_unstable();
        match self.names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::corrupt(format!(
                "xattr {}{} is there twice",
                pair[0].0.escape_ascii(),
                pair[0].1.escape_ascii()
            ))),
            None => Ok(()),
        }
    }
}
