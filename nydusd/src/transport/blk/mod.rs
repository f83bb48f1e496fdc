//! vhost-user-blk: an image as a disk that does not exist. A guest's kernel mounts the bootstrap itself, as the EROFS file
//! system that it is: metadata costs no request once it is in the guest's memory, and data is fetched, verified and
//! answered as it is read.
//!
//! What is where on the disk says [`rafs::disk`].

mod device;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::Context as _;
use rafs::disk::{Disks, Part};

use self::device::BlkDevice;
use super::vhost;
use crate::cli::BlkFront;
use crate::mount::Mount;

/// The disks of an image: one, or with `--split` one for its metadata and one for each blob.
///
/// # Errors
/// No kernel mounts such an image.
pub fn disks(mount: &Arc<Mount>, front: &BlkFront) -> anyhow::Result<Vec<BlkDevice>> {
    let disks = Disks::new(mount.rafs_shared()).context("the image can not be a disk")?;
    let disks = Arc::new(disks);
    let parts: Vec<Part> = if front.split { disks.parts().collect() } else { vec![Part::Flat] };
    Ok(parts.into_iter().map(|part| BlkDevice::new(mount, &disks, part, front)).collect())
}

/// Serves `disk` to virtual machine monitors that connect to `socket`, which is bound. Returns at once.
///
/// # Errors
/// The system refuses to listen, or threads.
pub fn listen(socket: OwnedFd, disk: BlkDevice) -> anyhow::Result<()> {
    vhost::listen(socket, Arc::new(disk))
}
