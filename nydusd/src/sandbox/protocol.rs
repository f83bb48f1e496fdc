//! What the daemon asks of the host, and what it is told.
//!
//! One message of JSON each way, with at most a few descriptors beside it. A request brings the socket for its answer
//! along, so that requests of many threads need neither numbers nor an order. Paths that the daemon was started with
//! are not in requests: the other side knows them, and serves no others.

use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::socket::Socket;
use crate::passthrough::xattr::XattrCall;
use crate::sys::{self, Received};
use crate::transport::seat::ConnectionFile;

/// Longest message. The value of an extended attribute has up to 64 KiB, which base64 makes a third longer.
pub(super) const MAX_MESSAGE: usize = 128 << 10;
/// Most descriptors beside one: the socket for the answer, and the jail's two.
pub(super) const MAX_DESCRIPTORS: usize = 3;
/// Longest wait for what others can not hold up. Taking an overlay away may write back what was changed through it.
const LIMIT: Duration = Duration::from_secs(60);

/// What the daemon wants. Which rights it has to that is decided where it is done, in [`super::host`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Is a live daemon's socket, or no socket, in the place of this one? [`Reply::Yes`] if anything is.
    SocketCheck(Socket),
    /// A socket that is bound there.
    SocketBind(Socket),
    /// Remove that socket.
    SocketRemove(Socket),
    /// A connection to the supervisor, or with `holder` to `nydusd supervise`.
    Keeper { holder: bool },
    /// Can the mountpoint be mounted on?
    Usable,
    /// Is one of our mounts on the mountpoint?
    IsListed,
    /// Mount there.
    Mount { writable: bool },
    /// Go on with the mount of this connection.
    Inherit { number: u64 },
    /// The directory that holds changes. Both are made with this owner and mode, if there is one.
    Upper { upper: OsString, work: OsString, make: Option<((u32, u32), u32)> },
    /// An overlay over the mount.
    Cover { upper: OsString, work: OsString },
    /// Unmount.
    Unmount { ended: bool },
    /// End the connection of the mount.
    Abort,
    /// A file that the kernel has of the connection.
    ConnectionFile(ConnectionFile),
    /// Is the mount gone within this time?
    IsGone(Duration),
    /// A file to be read.
    Open { path: OsString, device: bool },
    /// A directory to keep things in, made if need be, its mode 0700 then.
    Directory { path: OsString },
    /// A connection to a unix socket.
    Connect { path: OsString },
    /// A directory of the host, where the daemon sees it under the same path; with `shown` what is mounted below it
    /// later, too.
    Admit { path: OsString, writable: bool, shown: bool },
    /// Addresses of a host.
    Resolve { host: String },
    /// What a credential helper knows of a server.
    Login { helper: String, server: String },
    /// A thread's process and name.
    Thread { tid: u32 },
    /// Extended attributes of the file whose descriptor comes with it.
    Xattr(XattrCall),
    /// The mount namespace to admit things into, and its root, writable: two descriptors.
    Jail,
}

/// Who works on a request, so that none waits for what has nothing to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The daemon's own mount and its end. Nothing that others name is touched.
    Urgent,
    /// Its start: what its command line and its configuration name, which the daemon waits for.
    Own,
    /// Extended attributes: of files, which may be on a server that does not answer.
    Attributes,
    /// What is named by others, and may be as slow as they please.
    Named,
}

impl Request {
    /// Who works on it.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::SocketRemove(_)
            | Self::Keeper { .. }
            | Self::Unmount { .. }
            | Self::Abort
            | Self::ConnectionFile(_)
            | Self::IsGone(_)
            | Self::Thread { .. } => Kind::Urgent,
            Self::SocketCheck(_)
            | Self::SocketBind(_)
            | Self::Usable
            | Self::IsListed
            | Self::Mount { .. }
            | Self::Inherit { .. }
            | Self::Cover { .. }
            | Self::Jail => Kind::Own,
            Self::Xattr(_) => Kind::Attributes,
            Self::Upper { .. }
            | Self::Open { .. }
            | Self::Connect { .. }
            | Self::Directory { .. }
            | Self::Admit { .. }
            | Self::Resolve { .. }
            | Self::Login { .. } => Kind::Named,
        }
    }

    /// How long the daemon waits for the answer, if not for as long as it takes.
    pub(super) fn limit(&self) -> Option<Duration> {
        match self {
            Self::IsGone(limit) => Some(LIMIT.saturating_add(*limit)),
            // Mounting asks the file systems below, which may take their time.
            Self::Cover { .. } => None,
            other => matches!(other.kind(), Kind::Urgent | Kind::Own).then_some(LIMIT),
        }
    }
}

/// What became of it. A descriptor travels beside it where one was asked for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Done.
    Done,
    /// A yes or no.
    Yes(bool),
    /// A path: where it really is.
    Path(OsString),
    /// The mount, and the number of its connection if it is known.
    Mounted { mountpoint: OsString, number: Option<u64> },
    /// The addresses.
    Addresses(Vec<IpAddr>),
    /// What the helper said; `None` if it failed with nothing to say but that it knows no login.
    Login(Option<String>),
    /// Values of extended attributes, or their names.
    Xattr(#[serde(with = "packed")] Vec<u8>),
    /// A process.
    Thread { pid: Option<u32>, name: Vec<u8> },
    /// It failed.
    Failed(Refusal),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// For people, with all its causes.
    pub message: String,
    /// The system's number for it, if there is one: `EACCES` for what the daemon does not get.
    pub errno: Option<i32>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self { message: format!("{error:#}"), errno: error.chain().find_map(errno_of) }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { message: error.to_string(), errno: errno_of(&error) }
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        let Some(system) = refusal.errno.map(io::Error::from_raw_os_error) else {
            return io::Error::other(refusal);
        };
        // The number alone, for whoever answers with it, unless the words say more.
        if system.to_string() == refusal.message { system } else { io::Error::new(system.kind(), refusal) }
    }
}

/// The number of an error that is the system's, or of a kind that has one.
fn errno_of(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    if let Some(errno) = error.downcast_ref::<Errno>() {
        return Some(*errno as i32);
    }
    if let Some(errno) = error.downcast_ref::<rustix::io::Errno>() {
        return Some(errno.raw_os_error());
    }
    let error = error.downcast_ref::<io::Error>()?;
    error.raw_os_error().or(match error.kind() {
        io::ErrorKind::NotFound => Some(libc::ENOENT),
        io::ErrorKind::NotADirectory => Some(libc::ENOTDIR),
        io::ErrorKind::PermissionDenied => Some(libc::EACCES),
        io::ErrorKind::InvalidInput => Some(libc::EINVAL),
        io::ErrorKind::TimedOut => Some(libc::ETIMEDOUT),
        _ => None,
    })
}

/// Bytes as base64: JSON's own lists of numbers are three times as long.
pub(crate) mod packed {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        STANDARD.decode(&*text).map_err(serde::de::Error::custom)
    }
}

/// Sends one message, as soon as there is room for it, and until `deadline` if there is one.
///
/// # Errors
/// It is too long, `TimedOut`, or the system's: nobody listens.
pub(super) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[RawFd],
    deadline: Option<Instant>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(io::Error::other(format!("a message of more than {MAX_MESSAGE} bytes")));
    }
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control = if descriptors.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        let parts = [io::IoSlice::new(&bytes)];
        match sendmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &parts, control, flags, None) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(socket.as_fd(), PollFlags::POLLOUT, deadline)?,
            result => return Ok(result.map(|_| ())?),
        }
    }
}

/// Receives one message and its descriptors, until `deadline` if there is one; `None` at the end of the connection.
///
/// # Errors
/// `TimedOut`, or the system's.
pub(super) fn receive(
    socket: impl AsFd,
    deadline: Option<Instant>,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    if deadline.is_some() {
        wait(socket.as_fd(), PollFlags::POLLIN, deadline)?;
    }
    // One byte more than any message, so that a longer one shows.
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    loop {
        match sys::receive(socket.as_fd(), &mut buffer) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
            Ok((0, _)) => return Ok(None),
            Ok((len, descriptors)) => {
                buffer.truncate(len);
                return Ok(Some((buffer, descriptors)));
            }
        }
    }
}

/// Waits for a message and answers it with its descriptors, but leaves it where it is; `None` at the end of the
/// connection.
///
/// # Errors
/// The system's.
pub(super) fn peek(socket: impl AsFd) -> io::Result<Option<(Vec<u8>, Received)>> {
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    loop {
        match sys::peek(socket.as_fd(), &mut buffer) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
            Ok(Received { len: 0, .. }) => return Ok(None),
            Ok(received) => {
                buffer.truncate(received.len);
                return Ok(Some((buffer, received)));
            }
        }
    }
}

/// Does away with the message that [`peek`] answered.
///
/// # Errors
/// The system's.
pub(super) fn discard(socket: impl AsFd) -> io::Result<()> {
    loop {
        match recv(socket.as_fd().as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            result => return Ok(result.map(|_| ())?),
        }
    }
}

/// Waits for one of `events` on `socket`, or for its end.
///
/// # Errors
/// `TimedOut`: `deadline` has passed.
pub(super) fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> io::Result<()> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| left.try_into().unwrap_or(PollTimeout::MAX));
        match poll(&mut [PollFd::new(socket, events)], timeout) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            result => return Ok(result.map(|_| ())?),
        }
    }
}

/// The message in `bytes`.
///
/// # Errors
/// It is none, or too long.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    if bytes.len() > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
    }
    serde_json::from_slice(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn messages_arrive_whole_with_their_descriptors() {
        let (ours, theirs) = pair();
        let path = OsString::from_vec(b"/a\xff\n\"".to_vec());
        let request = Request::Open { path, device: false };
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&ours, &request, &[null.as_raw_fd()], None).unwrap();
        let (bytes, descriptors) = receive(&theirs, None).unwrap().unwrap();
        assert_eq!(parse::<Request>(&bytes).unwrap(), request);
        assert_eq!(descriptors.len(), 1);
        // The longest paths there are fit.
        let long = OsString::from_vec(vec![0xff; 4096]);
        let request = Request::Upper { upper: long.clone(), work: long, make: Some(((1, 2), 0o755)) };
        send(&ours, &request, &[], None).unwrap();
        let (bytes, descriptors) = receive(&theirs, None).unwrap().unwrap();
        assert_eq!(parse::<Request>(&bytes).unwrap(), request);
        assert!(descriptors.is_empty());
        let past = Some(Instant::now());
        assert_eq!(receive(&theirs, past).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let full = loop {
            if let Err(e) = send(&ours, &request, &[], past) {
                break e;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::TimedOut);
        while receive(&theirs, past).is_ok() {}
        drop(ours);
        assert!(receive(&theirs, None).unwrap().is_none());
        assert!(send(&theirs, &Request::Abort, &[], None).is_err());
    }

    #[test]
    fn a_failure_is_no_refusal() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let slow = io::Error::new(io::ErrorKind::TimedOut, "slow");
        let refused = || io::Error::new(io::ErrorKind::PermissionDenied, "not yours");
        let cases: [(Refusal, io::ErrorKind, Option<i32>, &str); 7] = [
            (full().into(), io::ErrorKind::StorageFull, Some(libc::ENOSPC), ""),
            (
                anyhow::Error::from(full()).context("make d").into(),
                io::ErrorKind::StorageFull,
                None,
                "make d: ",
            ),
            (
                anyhow::Error::from(Errno::ENOSPC).context("make d").into(),
                io::ErrorKind::StorageFull,
                None,
                "make d: ",
            ),
            (slow.into(), io::ErrorKind::TimedOut, None, "slow"),
            (refused().into(), io::ErrorKind::PermissionDenied, None, "not yours"),
            (
                anyhow::Error::from(refused()).context("use d").into(),
                io::ErrorKind::PermissionDenied,
                None,
                "use d: not yours",
            ),
            (
                anyhow::anyhow!("the broker has too much to do").into(),
                io::ErrorKind::Other,
                None,
                "the broker has",
            ),
        ];
        for (refusal, kind, errno, text) in cases {
            let told = refusal.message.clone();
            let error = io::Error::from(refusal);
            assert_eq!((error.kind(), error.raw_os_error()), (kind, errno), "{told}");
            assert!(error.to_string() == told && told.starts_with(text), "{error}");
        }
    }

    #[test]
    fn what_is_too_long_is_neither_sent_nor_taken() {
        let (ours, theirs) = pair();
        let request = Request::Resolve { host: "x".repeat(MAX_MESSAGE) };
        assert!(send(&ours, &request, &[], None).is_err());
        nix::unistd::write(&ours, &vec![b' '; MAX_MESSAGE + 100]).unwrap();
        let (bytes, _) = receive(&theirs, None).unwrap().unwrap();
        assert_eq!(parse::<Request>(&bytes).unwrap_err().to_string(), "a message that is too long");
    }

    proptest! {
        #[test]
        fn no_bytes_are_more_than_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256), cut in 0usize..200) {
            let _ = parse::<Request>(&bytes);
            let whole = serde_json::to_vec(&Request::Open { path: "/p".into(), device: true }).unwrap();
            let part = &whole[..cut.min(whole.len() - 1)];
            prop_assert!(parse::<Request>(part).is_err());
        }
    }
}
