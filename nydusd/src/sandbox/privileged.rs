//! The daemon's way to the host: through the broker, or by itself where there is none.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};

use super::host::{Answer, Host, Places};
use super::protocol::{self, Refusal, Reply, Request};
use super::socket::Socket;
use crate::passthrough::xattr::XattrCall;
use crate::transport::seat::ConnectionFile;
use crate::writable::OverlayConfig;

/// Longest wait for the end of the broker, at the daemon's own.
const LAST_WAIT: Duration = Duration::from_millis(500);

/// Who does what this process may not.
#[derive(Debug)]
pub enum Privileged {
    /// This process: it is not sandboxed.
    Direct(Box<Host>),
    /// The broker at the other end of this socket.
    Broker(Broker),
}

/// The connection to the broker.
#[derive(Debug)]
pub struct Broker {
    pub(super) socket: OwnedFd,
    /// Readable when its process has ended; `None` if the kernel has no such thing.
    pub(super) process: Option<OwnedFd>,
    /// The daemon's working directory, by its name: what it admits may cover the directory itself.
    pub(super) directory: PathBuf,
}

impl Privileged {
    /// This process itself, which mounts and listens at `places`.
    pub fn direct(places: Places) -> Self {
        Self::Direct(Box::new(Host::new(places)))
    }

    /// Ends what works for this process, which ends itself.
    pub fn dismiss(&self) {
        if let Self::Broker(broker) = self {
            broker.dismiss();
        }
    }

    /// True if nobody does it any more.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self, Self::Broker(broker) if broker.has_ended())
    }

    /// Waits for the end of whoever does it, for ever where that can not be seen. Call in a runtime.
    pub(crate) async fn ended(&self) {
        let Self::Broker(Broker { process: Some(process), .. }) = self else {
            return std::future::pending().await;
        };
        let watch = async || -> io::Result<()> {
            let process = process.try_clone()?;
            let wait = move || protocol::wait(process.as_fd(), PollFlags::POLLIN, None);
            tokio::task::spawn_blocking(wait).await?
        };
        if let Err(e) = watch().await {
            tracing::warn!("the end of the broker will not be noticed: {e}");
            std::future::pending().await
        }
    }

    /// Asks, and waits for the answer.
    fn ask(&self, request: Request) -> Result<Answer, Refusal> {
        self.ask_with(request, None)
    }

    fn ask_with(&self, request: Request, file: Option<BorrowedFd<'_>>) -> Result<Answer, Refusal> {
        let (reply, descriptor) = match self {
            Self::Direct(host) => {
                let file = file.map(|file| file.try_clone_to_owned()).transpose()?;
                host.answer(request, Vec::from_iter(file))?
            }
            Self::Broker(broker) => broker.ask(&request, file.as_slice())?,
        };
        match reply {
            Reply::Failed(refusal) => Err(refusal),
            reply => Ok((reply, descriptor)),
        }
    }

    fn ask_for_yes(&self, request: Request) -> anyhow::Result<bool> {
        match self.ask(request)?.0 {
            Reply::Yes(yes) => Ok(yes),
            _ => Err(unexpected()),
        }
    }

    fn ask_for_descriptor(&self, request: Request) -> Result<OwnedFd, Refusal> {
        let (_, descriptor) = self.ask(request)?;
        descriptor.ok_or_else(|| anyhow!("the broker sent no descriptor").into())
    }

    /// True if a file is in the place of a socket.
    ///
    /// # Errors
    /// A live daemon's, or no socket.
    pub fn check_socket(&self, socket: Socket) -> anyhow::Result<bool> {
        self.ask_for_yes(Request::SocketCheck(socket))
    }

    /// Replaces a stale socket by one that is this user's alone. Whoever listens on it is its owner for clients.
    ///
    /// # Errors
    /// It can not be made, or a file that is no socket is in its place.
    pub fn bind_socket(&self, socket: Socket) -> anyhow::Result<OwnedFd> {
        Ok(self.ask_for_descriptor(Request::SocketBind(socket))?)
    }

    /// Removes a socket, if it is still the one that was made.
    ///
    /// # Errors
    /// It can not be removed.
    pub fn remove_socket(&self, socket: Socket) -> anyhow::Result<()> {
        Ok(self.ask(Request::SocketRemove(socket)).map(|_| ())?)
    }

    /// Connects to the supervisor, or with `holder` to `nydusd supervise`.
    ///
    /// # Errors
    /// It does not listen.
    pub fn keeper(&self, holder: bool) -> anyhow::Result<UnixStream> {
        Ok(self.ask_for_descriptor(Request::Keeper { holder })?.into())
    }

    /// Looks whether the mountpoint can be mounted on.
    ///
    /// # Errors
    /// Why not.
    pub fn check_mountpoint(&self) -> anyhow::Result<()> {
        Ok(self.ask(Request::Usable).map(|_| ())?)
    }

    /// True if a mount of ours is on the mountpoint.
    ///
    /// # Errors
    /// No such directory, or no mount table.
    pub fn is_listed(&self) -> anyhow::Result<bool> {
        self.ask_for_yes(Request::IsListed)
    }

    /// Mounts: the canonical mountpoint, the connection's number and descriptor.
    pub(crate) fn mount(&self, writable: bool) -> anyhow::Result<(PathBuf, Option<u64>, OwnedFd)> {
        let (reply, descriptor) = self.ask(Request::Mount { writable })?;
        match (reply, descriptor) {
            (Reply::Mounted { mountpoint, number }, Some(descriptor)) => {
                Ok((mountpoint.into(), number, descriptor))
            }
            _ => Err(unexpected()),
        }
    }

    /// Goes on with the mount of connection `number`; the canonical mountpoint.
    pub(crate) fn inherit(&self, number: u64) -> anyhow::Result<PathBuf> {
        match self.ask(Request::Inherit { number })?.0 {
            Reply::Path(path) => Ok(path.into()),
            _ => Err(unexpected()),
        }
    }

    /// The upper directory of an overlay. Its directories are made with this owner and mode, if there is one.
    pub(crate) fn upper_directory(
        &self,
        overlay: &OverlayConfig,
        make: Option<((u32, u32), u32)>,
    ) -> anyhow::Result<File> {
        let (upper, work) = paths(overlay);
        Ok(self.ask_for_descriptor(Request::Upper { upper, work, make })?.into())
    }

    /// Covers the mount, which must be served, with an overlay.
    pub(crate) fn cover(&self, overlay: &OverlayConfig) -> anyhow::Result<()> {
        let (upper, work) = paths(overlay);
        Ok(self.ask(Request::Cover { upper, work }).map(|_| ())?)
    }

    /// Takes the mount out of the tree. `ended` says that its connection has.
    pub(crate) fn unmount(&self, ended: bool) -> anyhow::Result<()> {
        Ok(self.ask(Request::Unmount { ended }).map(|_| ())?)
    }

    /// Ends the connection of the mount.
    pub(crate) fn abort(&self) -> anyhow::Result<()> {
        Ok(self.ask(Request::Abort).map(|_| ())?)
    }

    /// Opens a file that the kernel has of the connection.
    pub(crate) fn connection_file(&self, file: ConnectionFile) -> io::Result<File> {
        Ok(self.ask_for_descriptor(Request::ConnectionFile(file))?.into())
    }

    /// True if the mount is gone within `limit`.
    pub(crate) fn is_gone_within(&self, limit: Duration) -> anyhow::Result<bool> {
        self.ask_for_yes(Request::IsGone(limit))
    }

    /// Has a directory of the host under its path here; its canonical path.
    ///
    /// # Errors
    /// There is none, or the broker does not admit it.
    pub fn admit(&self, path: &Path, writable: bool) -> anyhow::Result<PathBuf> {
        self.admit_as(path, writable, false)
    }

    /// The same for one that is shown to others, with what is mounted below it later.
    ///
    /// # Errors
    /// There is none, or the broker does not admit it.
    pub fn admit_shown(&self, path: &Path, writable: bool) -> anyhow::Result<PathBuf> {
        self.admit_as(path, writable, true)
    }

    fn admit_as(&self, path: &Path, writable: bool, shown: bool) -> anyhow::Result<PathBuf> {
        let admitted = self.ask(Request::Admit { path: path.into(), writable, shown })?.0;
        self.settle(path);
        match admitted {
            Reply::Path(path) => Ok(path.into()),
            _ => Err(unexpected()),
        }
    }

    /// What was admitted may cover the working directory.
    fn settle(&self, path: &Path) {
        if let Self::Broker(broker) = self
            && path.is_relative()
            && let Err(e) = std::env::set_current_dir(&broker.directory)
        {
            tracing::warn!("{}: {e}", broker.directory.display());
        }
    }

    /// Extended attributes of `file`.
    pub(crate) fn xattr(&self, call: XattrCall, file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        match self.ask_with(Request::Xattr(call), Some(file))?.0 {
            Reply::Xattr(found) => Ok(found),
            _ => Err(io::Error::other(unexpected())),
        }
    }

    /// A thread's process, and its name.
    pub(crate) fn thread(&self, tid: u32) -> Option<(Option<u32>, Vec<u8>)> {
        match self.ask(Request::Thread { tid }).ok()?.0 {
            Reply::Thread { pid, name } => Some((pid, name)),
            _ => None,
        }
    }
}

impl storage::outside::Outside for Privileged {
    fn open(&self, path: &Path, device: bool) -> io::Result<File> {
        Ok(self.ask_for_descriptor(Request::Open { path: path.into(), device })?.into())
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        self.ask(Request::Directory { path: path.into() })?;
        self.settle(path);
        Ok(())
    }

    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        Ok(self.ask_for_descriptor(Request::Connect { path: path.into() })?.into())
    }

    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        match self.ask(Request::Resolve { host: host.to_owned() })?.0 {
            Reply::Addresses(addresses) => Ok(addresses),
            _ => Err(io::Error::other(unexpected())),
        }
    }

    fn login(&self, helper: &str, server: &str) -> io::Result<Option<String>> {
        let request = Request::Login { helper: helper.to_owned(), server: server.to_owned() };
        match self.ask(request)?.0 {
            Reply::Login(answer) => Ok(answer),
            _ => Err(io::Error::other(unexpected())),
        }
    }
}

impl Broker {
    /// Sends a request with `descriptors`, and waits for what comes back.
    pub(super) fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Answer, Refusal> {
        let limit = request.limit();
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let exchange = || -> io::Result<Option<Answer>> {
            let (ours, theirs) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
            let mut all = vec![theirs.as_raw_fd()];
            all.extend(descriptors.iter().map(|fd| fd.as_raw_fd()));
            protocol::send(&self.socket, request, &all, deadline)?;
            // Whoever has the last other end tells of its end.
            drop(theirs);
            let Some((bytes, descriptors)) = protocol::receive(&ours, deadline)? else { return Ok(None) };
            Ok(Some((protocol::parse(&bytes)?, descriptors.into_iter().next())))
        };
        let ended = "the broker has ended: mounting and unmounting is over, and so is opening files; what is mounted \
                     is served on";
        Err(match exchange() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) if self.has_ended() => anyhow!(ended).into(),
            Ok(None) => anyhow!("the broker gave no answer; its log may say why").into(),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => {
                anyhow!(ended).into()
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                let why = format!("the broker did not answer in {:?}", limit.unwrap_or_default());
                io::Error::new(e.kind(), why).into()
            }
            Err(e) => anyhow::Error::from(e).context("ask the broker").into(),
        })
    }

    /// True if nobody takes requests any more.
    fn has_ended(&self) -> bool {
        let mut socket = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        poll(&mut socket, PollTimeout::ZERO).is_ok()
            && socket[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }

    /// Has it end, and waits for that a little: whoever is left the children of a process that has ended may never
    /// wait for them.
    fn dismiss(&self) {
        // It may have ended.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        if let Some(process) = &self.process {
            // What keeps it is a file system that does not answer.
            let _ = protocol::wait(process.as_fd(), PollFlags::POLLIN, Some(Instant::now() + LAST_WAIT));
        }
    }
}

fn paths(overlay: &OverlayConfig) -> (OsString, OsString) {
    let text = |path: &Path| OsStr::to_owned(path.as_os_str());
    (text(&overlay.upper_dir), text(&overlay.work_dir))
}

fn unexpected() -> anyhow::Error {
    // What it answered may be a secret.
    anyhow!("the broker answered another question")
}
