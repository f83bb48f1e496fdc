//! The only unsafe code of this crate.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::unistd::{ForkResult, Pid};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// A `statvfs64` of zeros, which has no constructor of its own.
pub(crate) fn zeroed_statvfs() -> libc::statvfs64 {
    // SAFETY: `zeroed` wants a type for which all-zero bytes are a valid value: statvfs64 is a
    // C struct of integers and integer arrays only.
    unsafe { std::mem::zeroed() }
}

/// Most descriptors that the kernel lets one message carry (SCM_MAX_FD).
const MAX_FDS: usize = 253;

/// What a message has brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// How many bytes it has; 0 at the end of the connection.
    pub len: usize,
    /// Its descriptors, as many of them as this process may still have open.
    pub descriptors: Vec<OwnedFd>,
    /// True if that was not all.
    pub is_cut: bool,
}

/// Receives one message: its bytes into `buffer`, and the descriptors that came with them, as many of them as this process
/// may still have open.
///
/// # Errors
/// The system's.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let received = receive_with(socket, buffer, RecvFlags::empty())?;
    Ok((received.len, received.descriptors))
}

/// The same, but leaves the message where it is.
///
/// # Errors
/// The system's.
pub(crate) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<Received> {
    receive_with(socket, buffer, RecvFlags::PEEK)
}

fn receive_with(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: RecvFlags) -> nix::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg(socket, &mut parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC)
        .map_err(|e| Errno::from_raw(e.raw_os_error()))?;
    let rights = control.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let descriptors = rights.flatten().collect();
    Ok(Received { len: message.bytes, descriptors, is_cut: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// Forks a process that has one thread: its child's id, and none in the child.
///
/// # Errors
/// The system's, or `EBUSY`: there are other threads.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: `fork` wants no other thread, which could hold a lock that the child then waits for: there is none, as
    // was just seen, and only this thread could start one.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Closes every descriptor but the three standard ones. For a process that owns none by a value: one that has just been
/// started, or forked.
///
/// # Errors
/// The system's.
pub(crate) fn close_all() -> io::Result<()> {
    close_from(FIRST_FD)
}

/// Closes every descriptor but the three standard ones and `kept`, which is another number afterwards. For a process
/// that has just been forked and owns no other descriptor by a value.
///
/// # Errors
/// The system's.
pub(crate) fn keep_only(kept: OwnedFd) -> io::Result<OwnedFd> {
    if kept.as_raw_fd() != FIRST_FD {
        // SAFETY: `dup3` takes three integers. What number 3 was is nobody's here, as the caller promises.
        Errno::result(unsafe { libc::dup3(kept.as_raw_fd(), FIRST_FD, libc::O_CLOEXEC) })?;
    }
    // The number goes with the others below, or is the one that stays.
    std::mem::forget(kept);
    close_from(FIRST_FD + 1)?;
    // SAFETY: `from_raw_fd` wants an open descriptor that nobody else owns: number 3 is, as of the lines above.
    Ok(unsafe { OwnedFd::from_raw_fd(FIRST_FD) })
}

/// The first descriptor behind the standard ones.
const FIRST_FD: RawFd = 3;

/// Closes the descriptors from `first` on. None of them is owned by a value of this process.
fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: `close_range` takes three integers. No value of this process owns one of these numbers: both callers have
    // their own callers promise so.
    match Errno::result(unsafe { libc::close_range(first.cast_unsigned(), u32::MAX, 0) }) {
        // Linux before 5.9, and filters that have not heard of it.
        Err(Errno::ENOSYS | Errno::EPERM) => close_listed(first),
        result => Ok(result.map(|_| ())?),
    }
}

fn close_listed(first: RawFd) -> io::Result<()> {
    let listed = std::fs::read_dir("/proc/self/fd")?;
    let numbers: Vec<RawFd> =
        listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number >= first) {
        // SAFETY: `close` takes an integer, which no value owns: see above. That of the list itself is closed already,
        // and closing it again is refused.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// What a signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disposition {
    /// What it does by default.
    Default,
    /// Nothing, here and in programs that are started. An ignored SIGCHLD has the kernel forget children.
    Ignored,
    /// Nothing here; what it does by default in programs that are started.
    Unheeded,
}

/// Has `signal` do that.
///
/// # Errors
/// The system's.
pub(crate) fn handle(signal: Signal, disposition: Disposition) -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler = match disposition {
        Disposition::Default => SigHandler::SigDfl,
        Disposition::Ignored => SigHandler::SigIgn,
        Disposition::Unheeded => SigHandler::Handler(nothing),
    };
    // SAFETY: `signal` wants a handler that is safe to run at any time: the one there is does nothing.
    unsafe { nix::sys::signal::signal(signal, handler) }?;
    Ok(())
}

/// Has `file` signal nobody.
#[cfg(test)]
pub(crate) fn disown(file: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: `fcntl` takes three integers with this command.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETOWN, 0) })?;
    Ok(())
}

/// Lets nothing be executed, no device be used, and unless `writable` nothing be written, through a mount and all below
/// it. What is mounted there by others later shows if it `follows`, with the flags that it has there; never the other
/// way round.
///
/// # Errors
/// The system's.
pub(crate) fn confine_mount(mount: BorrowedFd<'_>, writable: bool, follows: bool) -> io::Result<()> {
    let set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let read_only = if writable { 0 } else { libc::MOUNT_ATTR_RDONLY };
    let propagation = if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    set_mount_attributes(mount, set | read_only, propagation, libc::AT_RECURSIVE)
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
    Errno::result(result)?;
    Ok(())
}
