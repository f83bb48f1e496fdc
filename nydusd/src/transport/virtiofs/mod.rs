//! vhost-user-fs: a virtual machine's kernel asks as this host's would, through rings in its memory instead of
//! `/dev/fuse`.
//!
//! Queue 0 is for what must not wait (FORGET), the others take requests. What an image answers takes no time, or is
//! answered later by whoever has its data, so the thread of a ring answers it. Requests for files of the host go to
//! threads of their own: a file that hangs holds up nobody who does not ask for the host.
//!
//! A guest can not be told of what changes: see [`Adapter::new`].

mod answers;
mod device;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use self::device::FsDevice;
use super::vhost;
use crate::adapter::Adapter;
use crate::cli::VirtiofsFront;

/// Serves `adapter` to virtual machine monitors that connect to `socket`, which is bound. Returns at once.
///
/// # Errors
/// The system refuses to listen, or threads.
pub fn listen(
    socket: OwnedFd,
    adapter: &Arc<Adapter>,
    front: &VirtiofsFront,
    null: File,
) -> anyhow::Result<()> {
    vhost::listen(socket, Arc::new(FsDevice::new(adapter, front, &null)?))
}
