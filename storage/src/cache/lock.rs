//! Open file description locks on single bytes: who works on what, across processes.
//!
//! The kernel drops a lock with the last descriptor of its description, so a dead
//! process frees what it held. Two opens of one file exclude each other even within a
//! process. The locked byte need not exist.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// What a lock allows others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// More shared locks.
    Shared,
    /// Nothing.
    Exclusive,
}

/// Locks the byte at `offset` unless another description holds it; true if held now.
///
/// A file system without such locks answers true: each process then works alone, which
/// costs a second fetch and no correctness.
pub(super) fn try_lock(file: &File, kind: Kind, offset: u64) -> io::Result<bool> {
    let kind = match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
    };
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&byte(kind, offset)?)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives back the byte at `offset`.
pub(super) fn unlock(file: &File, offset: u64) -> io::Result<()> {
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&byte(libc::F_UNLCK, offset)?))?;
    Ok(())
}

fn byte(kind: libc::c_int, offset: u64) -> io::Result<libc::flock> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok(libc::flock {
        l_type: kind.try_into().map_err(invalid)?,
        l_whence: libc::SEEK_SET.try_into().map_err(invalid)?,
        l_start: offset.try_into().map_err(invalid)?,
        l_len: 1,
        l_pid: 0,
    })
}
