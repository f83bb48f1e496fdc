//! The states of a daemon.

/// Where the daemon is in its life. The names are the API's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not mounted.
    Init = 0,
    /// Mounted, not served.
    Ready = 1,
    /// Mounted and served.
    Running = 2,
    /// Going away.
    Stopped = 3,
}

impl State {
    /// The API's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Init => "INIT",
            Self::Ready => "READY",
            Self::Running => "RUNNING",
            Self::Stopped => "STOPPED",
        }
    }

    pub(super) fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Init,
            1 => Self::Ready,
            2 => Self::Running,
            _ => Self::Stopped,
        }
    }
}
