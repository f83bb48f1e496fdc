//! Ways to the kernel: this host's, or a virtual machine's.

use std::fs::File;

use crate::cli::{Front, ServeArgs};

pub mod blk;
mod composer;
mod control;
pub mod fusedev;
mod init;
mod message;
pub(crate) mod mounted;
mod notify;
mod reads;
pub(crate) mod seat;
mod streams;
pub mod uring;
mod vhost;
pub mod virtiofs;
mod worker;

pub use init::Negotiated;

#[cfg(test)]
mod tests;

/// What a way to the kernel needs and a process in a jail can not get.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Rings, where they are wanted and possible.
    pub rings: Option<uring::Plan>,
    /// Swallows what is written to it; see [`composer::Composer`].
    pub null: Option<File>,
}

impl Prepared {
    /// What `front` needs. To be called before the process gives up what it may open; what is missing is logged.
    pub fn new(front: &Front, args: &ServeArgs) -> Self {
        match front {
            Front::Fuse(fuse) if fuse.fuse_io_uring => {
                Self { rings: uring::Plan::new(fuse, args), null: None }
            }
            Front::Fuse(_) | Front::Blk(_) => Self::default(),
            Front::Virtiofs(_) => {
                let null = File::options().write(true).open("/dev/null");
                Self { rings: None, null: null.inspect_err(|e| tracing::error!("/dev/null: {e}")).ok() }
            }
        }
    }
}
