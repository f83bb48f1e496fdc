//! The kernel's files of FUSE connections, by which they can be ended whatever covers their mounts.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, fstatfs, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::seat::ConnectionFile;

/// Where most hosts have a directory of files for each connection.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// What is mounted there (`FUSE_CTL_SUPER_MAGIC` of linux/magic.h).
const MAGIC: u64 = 0x6573_5543;

/// Opens a file of connection `number` to be written.
///
/// # Errors
/// There is no such connection, or this process may not.
pub(super) fn open(number: u64, file: ConnectionFile) -> io::Result<File> {
    let path = format!("{number}/{}", file.name());
    Ok(openat(directory()?, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// The directory of all connections: the host's, or one of our own that nobody else sees, as containers and small hosts
/// have none.
fn directory() -> io::Result<OwnedFd> {
    let there = openat(CWD, CONNECTIONS, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    if let Ok(there) = there
        && fstatfs(&there).is_ok_and(|found| u64::try_from(found.f_type) == Ok(MAGIC))
    {
        return Ok(there);
    }
    let settings = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&settings)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&settings, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
