//! What the kernel is told without having asked: that something it may have cached has changed.
//!
//! The kernel locks the directory for that, and waits for requests under way in it. So whoever tells it
//! must not hold up those who answer.

use std::io::IoSlice;

use nix::errno::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::fusedev::FuseMount;
use super::message::OutHeader;
use crate::vfs::stale::Stale;

/// FUSE_NOTIFY_INVAL_INODE.
const INVAL_INODE: i32 = 2;
/// FUSE_NOTIFY_INVAL_ENTRY.
const INVAL_ENTRY: i32 = 3;

/// `fuse_notify_inval_inode_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalInode {
    ino: u64,
    /// First byte of the pages to drop; a directory's are its listing.
    offset: i64,
    /// Bytes; 0: to the end.
    len: i64,
}
const _: () = assert!(size_of::<InvalInode>() == 24);

/// `fuse_notify_inval_entry_out`; the name follows, ended by a NUL that `namelen` does not count.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalEntry {
    parent: u64,
    namelen: u32,
    flags: u32,
}
const _: () = assert!(size_of::<InvalEntry>() == 16);

impl FuseMount {
    /// Tells the kernel to forget these. What it does not know is forgotten already. Waits for requests
    /// under way in these directories.
    pub fn invalidate(&self, stale: &[Stale]) {
        for one in stale {
            if let Err(e) = self.invalidate_one(one) {
                tracing::warn!("the kernel may go on with what it has cached of {one:?}: {e}");
            }
        }
    }

    fn invalidate_one(&self, stale: &Stale) -> nix::Result<()> {
        match stale {
            Stale::Node(node) => {
                self.notify(INVAL_INODE, &[InvalInode { ino: node.0, offset: 0, len: 0 }.as_bytes()])
            }
            Stale::Entry { parent, name } => {
                let namelen = u32::try_from(name.len()).map_err(|_| Errno::ENAMETOOLONG)?;
                let entry = InvalEntry { parent: parent.0, namelen, flags: 0 };
                self.notify(INVAL_ENTRY, &[entry.as_bytes(), name, b"\0"])
            }
        }
    }

    /// Writes one notification.
    fn notify(&self, code: i32, parts: &[&[u8]]) -> nix::Result<()> {
        let len = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(len).map_err(|_| Errno::EMSGSIZE)?;
        let header = OutHeader { len, error: code, unique: 0 };
        let mut all = vec![IoSlice::new(header.as_bytes())];
        all.extend(parts.iter().map(|part| IoSlice::new(part)));
        match nix::sys::uio::writev(self.descriptor(), &all) {
            // Not cached, or no connection any more.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTCONN | Errno::ENOTDIR) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
