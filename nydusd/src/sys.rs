//! The only unsafe code of this crate.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

/// A `statvfs64` of zeros, which has no constructor of its own.
pub(crate) fn zeroed_statvfs() -> libc::statvfs64 {
    // SAFETY: `zeroed` wants a type for which all-zero bytes are a valid value: statvfs64 is a
    // C struct of integers and integer arrays only.
    unsafe { std::mem::zeroed() }
}

/// Heaps. Small pieces come from a thread's own cache and rarely need the heap's lock.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 1;
/// Free bytes at the end of a heap that are kept.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 1 << 20;
/// Larger pieces are mapped one by one and given back when freed: a heap that held a chunk
/// between small pieces would stay that large.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 128 << 10;

/// Keeps what the C library's allocator holds close to what is in use.
///
/// By default each of our many threads may get a heap of its own, and what one has freed is
/// not given to another: a read of a whole image left 50 MB behind where 10 were in use.
#[cfg(target_env = "gnu")]
pub(crate) fn keep_heap_small() {
    for (parameter, value) in
        [(libc::M_ARENA_MAX, HEAPS), (libc::M_TRIM_THRESHOLD, KEPT), (libc::M_MMAP_THRESHOLD, MAPPED)]
    {
        // SAFETY: `mallopt` takes two integers and only changes the allocator's own settings.
        // An unknown setting is refused, which costs nothing but memory.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives the free pages of the heap back to the system.
#[cfg(target_env = "gnu")]
pub(crate) fn trim_heap() {
    // SAFETY: takes an integer, and only gives back pages that hold nothing in use.
    unsafe { libc::malloc_trim(KEPT as libc::size_t) };
}

/// Other C libraries have no such settings.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn keep_heap_small() {}
#[cfg(not(target_env = "gnu"))]
pub(crate) fn trim_heap() {}

/// Most descriptors that the kernel lets one message carry (SCM_MAX_FD): none is ever cut off.
const MAX_FDS: usize = 253;

/// Receives one message: its bytes into `buffer`, and the descriptors that came with them.
///
/// # Errors
/// The system's.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        let ControlMessageOwned::ScmRights(fds) = part else { continue };
        for fd in fds {
            // SAFETY: `from_raw_fd` wants an open descriptor that nobody else owns. The kernel has
            // just put it into this process for this message, and no other code has seen it.
            descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Ok((message.bytes, descriptors))
}
