//! What the kernel is shown for directories of the daemon's own: those that lead to mounts and that no
//! image has.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::Entry;

use super::{FOR_EVER, PREFERRED_IO_SIZE, os_error};
use crate::node::NodeId;
use crate::vfs::Vfs;

/// Anybody may pass (contract 1.8); the file system is read-only.
const MODE: u32 = libc::S_IFDIR | 0o777;

/// Longest name.
const NAME_MAX: u64 = 255;

/// Attributes of directory `number`.
pub(super) fn stat(vfs: &Vfs, number: u64) -> io::Result<stat64> {
    let children = vfs.count(number).ok_or_else(|| os_error(libc::ESTALE))?;
    // The one constructor of a zeroed stat64 that needs no unsafe code of ours.
    let mut st = Entry::default().attr;
    st.st_ino = number;
    st.st_mode = MODE;
    // As most file systems count: its name, its `.`, and the `..` of each directory in it.
    st.st_nlink = children as u64 + 2;
    st.st_blksize = PREFERRED_IO_SIZE;
    let changed = vfs.changed();
    for (seconds, nanoseconds) in [
        (&mut st.st_atime, &mut st.st_atime_nsec),
        (&mut st.st_mtime, &mut st.st_mtime_nsec),
        (&mut st.st_ctime, &mut st.st_ctime_nsec),
    ] {
        *seconds = i64::try_from(changed.as_secs()).unwrap_or(i64::MAX);
        *nanoseconds = changed.subsec_nanos().into();
    }
    Ok(st)
}

/// The answer to a lookup of directory `number`.
pub(super) fn entry(vfs: &Vfs, number: u64) -> io::Result<Entry> {
    Ok(Entry {
        inode: NodeId(number).0,
        generation: 0,
        attr: stat(vfs, number)?,
        attr_flags: 0,
        attr_timeout: FOR_EVER,
        entry_timeout: FOR_EVER,
    })
}

/// Nothing is stored in them.
pub(super) fn statfs() -> statvfs64 {
    let mut st = crate::sys::zeroed_statvfs();
    st.f_bsize = PREFERRED_IO_SIZE.cast_unsigned();
    st.f_frsize = PREFERRED_IO_SIZE.cast_unsigned();
    st.f_namemax = NAME_MAX;
    st
}
