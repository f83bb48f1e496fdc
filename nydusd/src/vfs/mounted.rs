//! What can be in the tree: an image, or a directory of the host.

use std::fmt;
use std::sync::{Arc, Weak};

use rafs::bootstrap::Nid;

use super::command::{MountCommand, SavedMount};
use super::place::Place;
use crate::mount::{self, Mount};
use crate::node::NodeId;
use crate::passthrough::{self, HostMount, OpenedHost};

/// One mount of the tree.
#[derive(Clone, Debug)]
pub enum Mounted {
    /// An image.
    Image(Arc<Mount>),
    /// A directory of the host.
    Host(Arc<HostMount>),
}

impl From<Mount> for Mounted {
    fn from(mount: Mount) -> Self {
        Self::Image(Arc::new(mount))
    }
}

impl From<HostMount> for Mounted {
    fn from(host: HostMount) -> Self {
        Self::Host(Arc::new(host))
    }
}

/// What is ready to be mounted. Its place is not known yet.
pub(crate) enum Opened {
    /// An image.
    Image(Box<mount::Opened>),
    /// A directory of the host.
    Host(Box<OpenedHost>),
}

impl Opened {
    /// The mount at its place.
    pub fn at(self, place: Place) -> Mounted {
        match self {
            Self::Image(opened) => opened.at(place).into(),
            Self::Host(opened) => opened.at(place).into(),
        }
    }
}

impl Mounted {
    /// The image, if it is one.
    pub fn image(&self) -> Option<&Arc<Mount>> {
        match self {
            Self::Image(mount) => Some(mount),
            Self::Host(_) => None,
        }
    }

    /// The directory of the host, if it is one.
    pub fn host(&self) -> Option<&Arc<HostMount>> {
        match self {
            Self::Image(_) => None,
            Self::Host(host) => Some(host),
        }
    }

    /// Where it appears inside the daemon.
    pub fn mountpoint(&self) -> &str {
        match self {
            Self::Image(mount) => mount.mountpoint(),
            Self::Host(host) => host.mountpoint(),
        }
    }

    /// Its index, generation and references.
    pub fn place(&self) -> &Place {
        match self {
            Self::Image(mount) => mount.place(),
            Self::Host(host) => host.place(),
        }
    }

    /// Its root directory.
    pub fn root(&self) -> Nid {
        match self {
            Self::Image(mount) => mount.rafs().bootstrap().root(),
            Self::Host(_) => passthrough::ROOT,
        }
    }

    /// The node id of `nid`.
    pub fn node(&self, nid: Nid) -> Option<NodeId> {
        match self {
            Self::Image(mount) => mount.node(nid),
            Self::Host(host) => host.node(nid),
        }
    }

    /// The API's command that made it; `None` for the command line's.
    pub fn command(&self) -> Option<&MountCommand> {
        match self {
            Self::Image(mount) => mount.command(),
            Self::Host(host) => host.command(),
        }
    }

    /// What a successor needs to make it again.
    pub fn saved(&self) -> SavedMount {
        match self {
            Self::Image(mount) => mount.saved(),
            Self::Host(host) => host.saved(),
        }
    }

    /// Says that it was made from saved state.
    pub fn set_restored(&self) {
        match self {
            Self::Image(mount) => mount.set_restored(),
            Self::Host(host) => host.set_restored(),
        }
    }

    /// True once if it was made from saved state by the same command.
    pub fn repeats(&self, command: &MountCommand) -> bool {
        match self {
            Self::Image(mount) => mount.repeats(command),
            Self::Host(host) => host.repeats(command),
        }
    }

    pub(super) fn downgrade(&self) -> WeakMounted {
        match self {
            Self::Image(mount) => WeakMounted::Image(Arc::downgrade(mount)),
            Self::Host(host) => WeakMounted::Host(Arc::downgrade(host)),
        }
    }
}

/// For logs: what it is.
impl fmt::Display for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(mount) => write!(f, "bootstrap sha256:{}", mount.bootstrap_digest()),
            Self::Host(host) => write!(f, "directory {}", host.source().display()),
        }
    }
}

/// Says whether anybody is still at work on one.
#[derive(Debug)]
pub(super) enum WeakMounted {
    Image(Weak<Mount>),
    Host(Weak<HostMount>),
}

impl WeakMounted {
    pub fn is_held(&self) -> bool {
        match self {
            Self::Image(mount) => mount.strong_count() > 0,
            Self::Host(host) => host.strong_count() > 0,
        }
    }
}
