//! The directory of a supervisor's socket.
//!
//! Who is killed does not remove it, so the next supervisor does. Each one holds a lock in its own for as long as it
//! lives, which the system takes back however it ends: what can be locked belongs to nobody any more. Directories
//! without a lock are left alone, for those of early releases have none.

use std::ffi::OsStr;
use std::fs::{File, Permissions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};

use crate::sandbox::place::Place;

/// What the names begin with.
const PREFIX: &str = "nydusd-supervise-";
/// The file that is locked.
const LOCK: &str = "lock";
/// The socket.
pub(super) const SOCKET: &str = "holder.sock";

/// A directory that only this user may enter. It goes with this value.
#[derive(Debug)]
pub(super) struct Directory {
    directory: tempfile::TempDir,
    _lock: File,
}

impl Directory {
    /// Makes one in `parent`, and removes those there whose owners are gone.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn make(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        loop {
            let mode = Permissions::from_mode(0o700);
            let directory = tempfile::Builder::new().prefix(PREFIX).permissions(mode).tempdir_in(parent)?;
            let path = directory.path().join(LOCK);
            let lock = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
            lock.lock()?;
            // Whoever swept before it was locked took it for a dead one's.
            if path
                .symlink_metadata()
                .is_ok_and(|there| lock.metadata().is_ok_and(|own| own.ino() == there.ino()))
            {
                return Ok(Self { directory, _lock: lock });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Removes what supervisors of this user left behind in `parent`. What can not be removed stays.
fn sweep(parent: &Path) {
    let Ok(parent) = Place::find(parent) else { return };
    for entry in std::fs::read_dir(parent.link()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.as_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let path = parent.real().join(&name);
        match remove_if_left(&parent, &name) {
            Ok(true) => tracing::info!("removed {}, which a supervisor that was killed left", path.display()),
            Ok(false) => {}
            Err(e) => tracing::debug!("{} stays: {e}", path.display()),
        }
    }
}

/// Removes the directory `name` of this user if its owner is gone; false if that lives. Others may write to `parent`: what
/// was looked at is what is changed, and `name` itself goes only if it is empty.
fn remove_if_left(parent: &Place, name: &OsStr) -> io::Result<bool> {
    let directory = parent.enter(name)?;
    let found = directory.metadata()?;
    // Nobody else can put anything into it.
    if found.uid() != nix::unistd::geteuid().as_raw() || found.mode() & 0o077 != 0 {
        return Ok(false);
    }
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let lock = File::from(openat(&directory, LOCK, flags, Mode::empty())?);
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(e)) => return Err(e),
    }
    // The lock goes last: what is left without one is left for good.
    for file in [SOCKET, LOCK] {
        match directory.remove(OsStr::new(file)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::DirBuilderExt as _;

    use super::*;

    #[test]
    fn only_what_nobody_holds_goes() {
        let parent = tempfile::tempdir().unwrap();
        let make = || Directory::make(parent.path()).unwrap();
        let (alive, killed) = (make(), make());
        std::fs::write(killed.path().join("holder.sock"), "").unwrap();
        let left = killed.path().to_owned();
        // As if it were killed: its lock is gone, its directory is not.
        let Directory { directory, _lock } = killed;
        let _ = directory.keep();
        drop(_lock);
        let early = parent.path().join(format!("{PREFIX}early"));
        let others = parent.path().join("others-lock");
        // Not what a supervisor leaves, whatever it is called.
        let astray = parent.path().join(format!("{PREFIX}astray"));
        std::os::unix::fs::symlink("others-lock", &astray).unwrap();
        let fifo = parent.path().join(format!("{PREFIX}fifo"));
        let kept = parent.path().join(format!("{PREFIX}kept"));
        for path in [&early, &others, &fifo, &kept] {
            std::fs::DirBuilder::new().mode(0o700).create(path).unwrap();
        }
        nix::unistd::mkfifo(&fifo.join(LOCK), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&others, &kept] {
            std::fs::write(path.join(LOCK), "").unwrap();
        }
        std::fs::write(kept.join("of-another"), "").unwrap();
        let last = make();
        assert!(!left.exists(), "it stayed");
        let stay =
            [alive.path(), last.path(), &early, &others.join(LOCK), &astray, &fifo, &kept.join("of-another")];
        for path in stay {
            assert!(path.exists(), "{} went", path.display());
        }
        assert_eq!(last.path().metadata().unwrap().mode() & 0o777, 0o700);
        let path = last.path().to_owned();
        drop(last);
        assert!(!path.exists());
    }
}
