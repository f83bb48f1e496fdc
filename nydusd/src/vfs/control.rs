//! Mount, remount and unmount while the daemon serves.

use super::command::MountCommand;
use super::error::{MountError, MountErrorKind};
use crate::daemon::Daemon;

impl Daemon {
    /// Mounts what `command` says; its tree is visible when this returns. Blocks; not for threads that
    /// serve anybody.
    ///
    /// # Errors
    /// Any [`MountErrorKind`] but `NotFound`; nothing is left behind.
    pub fn mount(&self, command: MountCommand) -> Result<(), MountError> {
        Err(MountError::new(MountErrorKind::Unsupported, format!("mounting {command:?} is not built yet")))
    }

    /// Puts what `command` says in the place of what is mounted there. Blocks likewise.
    ///
    /// # Errors
    /// Any [`MountErrorKind`] but `AlreadyExists`; the old mount serves on.
    pub fn remount(&self, command: MountCommand) -> Result<(), MountError> {
        Err(MountError::new(MountErrorKind::Unsupported, format!("remounting {command:?} is not built yet")))
    }

    /// Takes what is mounted at `mountpoint` out of the tree; what is open of it stays readable.
    /// Blocks likewise.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`, `Busy`, `NotReady`.
    pub fn umount(&self, mountpoint: &str) -> Result<(), MountError> {
        Err(MountError::new(MountErrorKind::Unsupported, format!("unmounting {mountpoint} is not built yet")))
    }
}
