//! The directory of a supervisor's socket.
//!
//! Who is killed does not remove it, so the next supervisor does. Each one holds a lock in its own for as long as it
//! lives, which the system takes back however it ends: what can be locked belongs to nobody any more. Directories
//! without a lock are left alone, for those of early releases have none.

use std::fs::{File, Permissions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// What the names begin with.
const PREFIX: &str = "nydusd-supervise-";
/// The file that is locked.
const LOCK: &str = "lock";

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
    let own = nix::unistd::geteuid().as_raw();
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        // Nobody else can put anything into it.
        let is_ours = |metadata: &std::fs::Metadata| {
            metadata.is_dir() && metadata.uid() == own && metadata.mode() & 0o077 == 0
        };
        if !entry.file_name().as_bytes().starts_with(PREFIX.as_bytes())
            || !path.symlink_metadata().is_ok_and(|metadata| is_ours(&metadata))
        {
            continue;
        }
        let opened = File::options().write(true).custom_flags(libc::O_NOFOLLOW).open(path.join(LOCK));
        let Ok(lock) = opened else { continue };
        match lock.try_lock() {
            Ok(()) => match std::fs::remove_dir_all(&path) {
                Ok(()) => {
                    tracing::info!("removed {}, which a supervisor that was killed left", path.display())
                }
                Err(e) => tracing::debug!("{} is left of a supervisor that was killed: {e}", path.display()),
            },
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(e)) => tracing::debug!("{}: {e}", path.display()),
        }
    }
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
        for path in [&early, &others] {
            std::fs::DirBuilder::new().mode(0o700).create(path).unwrap();
        }
        std::fs::write(others.join(LOCK), "").unwrap();
        let last = make();
        assert!(!left.exists(), "it stayed");
        for path in [alive.path(), last.path(), &early, &others] {
            assert!(path.exists(), "{} went", path.display());
        }
        assert_eq!(last.path().metadata().unwrap().mode() & 0o777, 0o700);
        let path = last.path().to_owned();
        drop(last);
        assert!(!path.exists());
    }
}
