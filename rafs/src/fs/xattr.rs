//! Extended attributes by their full names.

use std::ops::ControlFlow;

use super::Rafs;
use crate::Result;
use crate::bootstrap::Nid;

impl Rafs {
    /// The value of xattr `name` (with its prefix) of `nid`, `None` if it has none.
    ///
    /// # Errors
    /// `NotFound`: no such inode.
    pub fn getxattr(&self, nid: Nid, name: &[u8]) -> Result<Option<&[u8]>> {
        let mut found = None;
        self.bootstrap.xattrs(nid, &mut |xattr| {
            if name.strip_prefix(xattr.prefix) == Some(xattr.suffix) {
                found = Some(xattr.value);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    /// The names of all xattrs of `nid`, each with a NUL behind it, as `listxattr` wants them.
    ///
    /// # Errors
    /// `NotFound`: no such inode.
    pub fn listxattr(&self, nid: Nid) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        self.bootstrap.xattrs(nid, &mut |xattr| {
            names.extend_from_slice(xattr.prefix);
            names.extend_from_slice(xattr.suffix);
            names.push(0);
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }
}
