//! Open file description locks on ranges of bytes: who works on what, across processes.
//!
//! The kernel drops a lock with the last descriptor of its description, so a dead
//! process frees what it held. Two opens of one file exclude each other even within a
//! process. The locked bytes need not exist.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::ids::ByteRange;

/// What a lock allows others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// More shared locks.
    Shared,
    /// Nothing.
    Exclusive,
}

/// Between two attempts at a lock that somebody has for a moment.
const PAUSE: Duration = Duration::from_millis(1);

/// Locks `range` unless another description holds some of it; true if held now.
///
/// A file system without such locks answers true: each process then works alone, and
/// must not share the directory with others.
pub(super) fn try_lock(file: &File, kind: Kind, range: ByteRange) -> io::Result<bool> {
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(kind.code(), range)?)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// As [`try_lock`] for an exclusive lock, but `None` where the file system has no such locks: for
/// those who must know.
pub(super) fn try_lock_strictly(file: &File, range: ByteRange) -> io::Result<Option<bool>> {
    known(fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_WRLCK, range)?)).map(|_| true))
}

/// True if another description holds some of `range`; `None` where the file system has no such
/// locks.
pub(super) fn is_locked(file: &File, range: ByteRange) -> io::Result<Option<bool>> {
    let mut asked = flock(libc::F_WRLCK, range)?;
    let answer = fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut asked));
    known(answer.map(|_| i32::from(asked.l_type) != libc::F_UNLCK))
}

fn known(answer: nix::Result<bool>) -> io::Result<Option<bool>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(Some(false)),
        Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks `range` exclusively, waiting for other descriptions, which hold it for moments only. A process that is stopped meanwhile
/// holds it for longer.
///
/// # Errors
/// `TimedOut`: not within `limit`. Else the system's.
pub(super) fn lock_within(file: &File, range: ByteRange, limit: Duration) -> io::Result<()> {
    let begun = Instant::now();
    while !try_lock(file, Kind::Exclusive, range)? {
        if begun.elapsed() >= limit {
            let what = "another process keeps its lock on the cache; is it stopped?";
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Gives back `range`.
pub(super) fn unlock(file: &File, range: ByteRange) -> io::Result<()> {
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_UNLCK, range)?))?;
    Ok(())
}

impl Kind {
    fn code(self) -> libc::c_int {
        match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
        }
    }
}

fn flock(kind: libc::c_int, range: ByteRange) -> io::Result<libc::flock> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok(libc::flock {
        l_type: kind.try_into().map_err(invalid)?,
        l_whence: libc::SEEK_SET.try_into().map_err(invalid)?,
        l_start: range.start().try_into().map_err(invalid)?,
        l_len: range.len().try_into().map_err(invalid)?,
        l_pid: 0,
    })
}
