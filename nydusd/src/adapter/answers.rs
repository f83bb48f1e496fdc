//! What the kernel is answered about an image's files.

use std::io;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::Entry;
use rafs::bootstrap::{Attr, Nid};

use super::{FOR_EVER, PREFERRED_IO_SIZE, os_error, refuse};
use crate::mount::Mount;
use crate::node::NodeId;

/// Unit of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// Attributes as the kernel wants them.
pub(super) fn stat(mount: &Mount, attr: &Attr) -> stat64 {
    // The one constructor of a zeroed stat64 that needs no unsafe code of ours.
    let mut st = Entry::default().attr;
    let shown = |id: u32| mount.config().id_mapping.map_or(id, |mapping| mapping.shown(id));
    st.st_ino = mount.ino(attr.nid);
    st.st_mode = attr.mode;
    st.st_nlink = attr.nlink.into();
    st.st_uid = shown(attr.uid);
    st.st_gid = shown(attr.gid);
    // Already in the 32-bit encoding that FUSE carries.
    st.st_rdev = attr.rdev.into();
    st.st_size = attr.size.cast_signed();
    st.st_blksize = PREFERRED_IO_SIZE;
    st.st_blocks = attr.size.div_ceil(STAT_BLOCK).cast_signed();
    for (seconds, nanoseconds) in [
        (&mut st.st_atime, &mut st.st_atime_nsec),
        (&mut st.st_mtime, &mut st.st_mtime_nsec),
        (&mut st.st_ctime, &mut st.st_ctime_nsec),
    ] {
        *seconds = attr.mtime;
        *nanoseconds = attr.mtime_nsec.into();
    }
    st
}

/// The answer to a lookup of `nid`.
pub(super) fn entry(mount: &Mount, nid: Nid) -> io::Result<Entry> {
    let attr = mount.rafs().bootstrap().attr(nid).map_err(refuse)?;
    let node = mount.node(nid).ok_or_else(|| os_error(libc::EOVERFLOW))?;
    // The root is no mount's, and never another inode.
    let generation = if node == NodeId::ROOT { 0 } else { mount.place().generation };
    Ok(Entry {
        inode: node.0,
        generation,
        attr: stat(mount, &attr),
        attr_flags: 0,
        attr_timeout: FOR_EVER,
        entry_timeout: FOR_EVER,
    })
}

/// "No such name", to be remembered for ever.
pub(super) fn negative_entry() -> Entry {
    Entry { entry_timeout: FOR_EVER, ..Entry::default() }
}

/// An xattr answer of `len` bytes into a buffer of `size`: 0 asks for the length.
pub(super) fn fits(len: usize, size: u32) -> io::Result<Option<u32>> {
    let count = u32::try_from(len).map_err(|_| os_error(libc::E2BIG))?;
    match size {
        0 => Ok(Some(count)),
        size if count > size => Err(os_error(libc::ERANGE)),
        _ => Ok(None),
    }
}
