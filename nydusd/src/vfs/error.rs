//! Why something was not mounted, remounted or unmounted.

use std::fmt;

/// What kind of reason it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountErrorKind {
    /// The mountpoint is taken.
    AlreadyExists,
    /// Nothing is mounted there.
    NotFound,
    /// The command says what can not be: a relative path, an unknown type.
    InvalidArgument,
    /// Bootstrap, configuration or source are missing, malformed or not the ones demanded.
    Image,
    /// Another command works on the mountpoint; ask again.
    Busy,
    /// The daemon does not serve yet, or no longer.
    NotReady,
    /// This build can not do it.
    Unsupported,
}

/// Why a command failed. It left everything as it was.
#[derive(Debug)]
pub struct MountError {
    kind: MountErrorKind,
    message: String,
}

impl MountError {
    /// An error of `kind`; `message` says what, where, and what to do, with its causes.
    pub fn new(kind: MountErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What kind it is.
    pub fn kind(&self) -> MountErrorKind {
        self.kind
    }

    /// An image that can not be mounted.
    pub(super) fn image(error: &anyhow::Error) -> Self {
        Self::new(MountErrorKind::Image, format!("{error:#}"))
    }
}

impl fmt::Display for MountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MountError {}
