//! The calls that need unsafe code.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use nix::errno::Errno;

/// `struct fuse_backing_map`.
#[repr(C)]
pub struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

mod ioctl {
    nix::ioctl_read!(clone, 229, 0, u32);
    nix::ioctl_write_ptr!(backing_open, 229, 1, super::BackingMap);
}

/// A further descriptor of the connection with requests of its own.
pub fn clone(device: &OwnedFd) -> tests::Result<OwnedFd> {
    let clone = OwnedFd::from(std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse")?);
    let mut number = device.as_raw_fd().cast_unsigned();
    // SAFETY: FUSE_DEV_IOC_CLONE reads one u32, which outlives the call; both descriptors are open.
    unsafe { ioctl::clone(clone.as_raw_fd(), &raw mut number) }?;
    Ok(clone)
}

/// Makes a file known as a source for passthrough.
pub fn register(device: &OwnedFd, file: &File) -> Result<i32, Errno> {
    let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: FUSE_DEV_IOC_BACKING_OPEN reads one fuse_backing_map, which outlives the call.
    unsafe { ioctl::backing_open(device.as_raw_fd(), &raw const map) }
}

/// Moves up to `len` bytes between a pipe and something else, read at `offset` if that is a file.
pub fn splice(
    from: impl AsFd,
    offset: Option<&mut i64>,
    to: impl AsFd,
    len: usize,
    flags: u32,
) -> Result<usize, Errno> {
    let offset = offset.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: splice(2) wants open descriptors, which are borrowed here, and offsets that are null or point to
    // an integer that nobody else uses meanwhile: the one is null, the other a mutable reference or null.
    let done = unsafe { libc::splice(from, offset, to, std::ptr::null_mut(), len, flags) };
    Errno::result(done).map(isize::cast_unsigned)
}
