//! The only unsafe code of this crate.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::ForkResult;

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

/// Forks a process that has one thread: true in the child.
///
/// # Errors
/// The system's, or `EBUSY`: there are other threads.
pub(crate) fn fork() -> io::Result<bool> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: `fork` wants no other thread, which could hold a lock that the child then waits for: there is none, as
    // was just seen, and only this thread could start one.
    Ok(matches!(unsafe { nix::unistd::fork() }?, ForkResult::Child))
}

/// Closes every descriptor but the three standard ones and `kept`, which is another number afterwards. For a process
/// that has just been forked and owns no other descriptor by a value.
///
/// # Errors
/// The system's.
pub(crate) fn keep_only(kept: OwnedFd) -> io::Result<OwnedFd> {
    const FIRST: RawFd = 3;
    if kept.as_raw_fd() != FIRST {
        // SAFETY: `dup3` takes three integers. What number 3 was is nobody's here, as the caller promises.
        nix::errno::Errno::result(unsafe { libc::dup3(kept.as_raw_fd(), FIRST, libc::O_CLOEXEC) })?;
    }
    // The number goes with the range below, or is the one that stays.
    std::mem::forget(kept);
    // SAFETY: `close_range` takes three integers. No value of this process owns one of these numbers: the caller
    // promises so, and the one that did was just forgotten.
    nix::errno::Errno::result(unsafe { libc::close_range(FIRST as u32 + 1, u32::MAX, 0) })?;
    // SAFETY: `from_raw_fd` wants an open descriptor that nobody else owns: number 3 is, as of the lines above.
    Ok(unsafe { OwnedFd::from_raw_fd(FIRST) })
}

/// Has `signal` be ignored, or do what it does by default.
///
/// # Errors
/// The system's.
pub(crate) fn handle(signal: Signal, handler: SigHandler) -> io::Result<()> {
    if !matches!(handler, SigHandler::SigIgn | SigHandler::SigDfl) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `signal` wants a handler that is safe to run at any time: no code of ours is one here.
    unsafe { nix::sys::signal::signal(signal, handler) }?;
    Ok(())
}

/// Lets nothing be executed, no device be used, and unless `writable` nothing be written, through a mount and all below
/// it; what is mounted there by others shows, and not the other way round.
///
/// # Errors
/// The system's.
pub(crate) fn confine_mount(mount: BorrowedFd<'_>, writable: bool) -> io::Result<()> {
    let set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let read_only = if writable { 0 } else { libc::MOUNT_ATTR_RDONLY };
    set_mount_attributes(mount, set | read_only, libc::MS_SLAVE, libc::AT_RECURSIVE)
}

/// Lets nothing be written through a mount.
///
/// # Errors
/// The system's.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_mount_attributes(mount, libc::MOUNT_ATTR_RDONLY, 0, 0)
}

fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64, propagation: u64, flags: i32) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: `mount_setattr` reads a path that ends with NUL, which the literal does, and as many bytes of attributes
    // as it is told, which is the size of the value behind the reference. It keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags | libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}
