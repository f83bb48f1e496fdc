//! The supervisor's socket: where descriptor and state stay while a daemon is gone.
//!
//! The supervisor listens, the daemon connects, for both directions. There is neither framing nor
//! an acknowledgement: the bytes end where the connection does, and the descriptor travels beside
//! the first of them (contract 4.1).

use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::state::MAX_STATE;
use crate::sys;

/// Longest exchange; supervisors wait as long.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes that travel with the descriptor: readers have room for so much at once.
const FIRST_PART: usize = 32 << 10;
/// Bytes read at once.
const PIECE: usize = 64 << 10;

/// Gives the supervisor descriptor and bytes, and ends the connection.
///
/// # Errors
/// It does not take them within 10 seconds.
pub(super) fn send(mut stream: UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    // A descriptor without a byte is lost.
    ensure!(!bytes.is_empty(), "there is no state to send");
    let deadline = Instant::now() + LIMIT;
    stream.set_write_timeout(Some(LIMIT))?;
    let first = &bytes[..bytes.len().min(FIRST_PART)];
    let fds = [fd.as_raw_fd()];
    let sent = loop {
        let rights = [ControlMessage::ScmRights(&fds)];
        let part = [IoSlice::new(first)];
        match sendmsg::<UnixAddr>(stream.as_raw_fd(), &part, &rights, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    let mut rest = &bytes[sent..];
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(deadline)?))?;
        let part = &rest[..rest.len().min(PIECE)];
        match stream.write(part) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            written => rest = &rest[written?..],
        }
    }
    Ok(())
}

/// Takes what the supervisor holds, the bytes and the first descriptor: receives until it ends the connection.
///
/// # Errors
/// It sends no descriptor or more than [`MAX_STATE`] bytes, or takes longer than 10 seconds.
pub(super) fn receive(mut stream: UnixStream) -> anyhow::Result<(Vec<u8>, OwnedFd)> {
    let deadline = Instant::now() + LIMIT;
    let mut bytes = Vec::new();
    let mut piece = vec![0; PIECE];
    let mut descriptor = None;
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let len = if descriptor.is_none() {
            match sys::receive(stream.as_fd(), &mut piece) {
                Err(Errno::EINTR) => continue,
                // Descriptors beyond the first are closed here.
                received => received.map(|(len, fds)| {
                    descriptor = fds.into_iter().next();
                    len
                })?,
            }
        } else {
            match stream.read(&mut piece) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            }
        };
        if len == 0 {
            break;
        }
        bytes.extend_from_slice(&piece[..len]);
        ensure!(bytes.len() <= MAX_STATE, "more than {MAX_STATE} bytes of state");
    }
    let descriptor =
        descriptor.with_context(|| format!("{} bytes came without a descriptor", bytes.len()))?;
    Ok((bytes, descriptor))
}

/// Connects to the supervisor that listens at `path`, without waiting for ever where nobody accepts.
///
/// # Errors
/// It does not listen.
pub(crate) fn dial(path: &Path) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(LIMIT.as_secs().cast_signed(), 0))?;
    let address = UnixAddr::new(path)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    }
    Ok(UnixStream::from(socket))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn exchange(serve: impl FnOnce(UnixStream) + Send + 'static) -> anyhow::Result<(Vec<u8>, OwnedFd)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("supervisor.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let result = dial(&path).map_err(anyhow::Error::from).and_then(receive);
        server.join().unwrap();
        result
    }

    #[test]
    fn bytes_and_descriptor_arrive() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "held").unwrap();
        // Larger than any socket buffer.
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        for bytes in [bytes, b"x".to_vec()] {
            let (sent, fd) = (bytes.clone(), File::open(&file).unwrap());
            let (found, fd) = exchange(move |stream| send(stream, &sent, fd.as_fd()).unwrap()).unwrap();
            assert!(found == bytes);
            assert_eq!(std::io::read_to_string(File::from(fd)).unwrap(), "held");
        }
    }

    #[test]
    fn what_is_no_state_of_a_supervisor_is_refused() {
        let error = exchange(|mut stream| stream.write_all(b"bytes alone").unwrap()).unwrap_err();
        assert!(format!("{error:#}").contains("11 bytes came without a descriptor"), "{error:#}");
        let error = exchange(drop).unwrap_err();
        assert!(format!("{error:#}").contains("0 bytes came without a descriptor"), "{error:#}");
        assert!(dial(Path::new("/nonexistent/socket")).is_err());
        let (a, _b) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        assert!(send(a, &[], null.as_fd()).is_err());
    }
}
