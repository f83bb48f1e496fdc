//! What is done for the daemon, and what is refused: by the broker, or by the daemon itself if it is not sandboxed.
//!
//! The daemon parses what strangers send, so its requests are not believed: it mounts, listens and connects only where
//! its command line says, unmounts nothing but the mount that was made for it, and has files opened only to be read.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::{IpAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, getsockopt, socket, sockopt};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::Pid;

use super::admit::{self, Jail};
use super::protocol::{Refusal, Reply, Request};
use crate::failover::supervisor;
use crate::process;
use crate::transport::mounted;
use crate::transport::seat::{SOURCE, Seat, usable_mountpoint};
use crate::writable::{self, OverlayConfig};

/// Longest wait for the end of the mount.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Most addresses of a host that are told.
const MAX_ADDRESSES: usize = 64;

/// The answer, and the descriptor that goes with it.
pub(super) type Answer = (Reply, Option<OwnedFd>);

/// What the command line names, as it names it.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Directory to mount on.
    pub mountpoint: PathBuf,
    /// Where the API listens.
    pub apisock: Option<PathBuf>,
    /// The supervisor's socket.
    pub supervisor: Option<PathBuf>,
    /// The socket of `nydusd supervise`.
    pub holder: Option<PathBuf>,
    /// Directory of the host that is to be shown.
    pub shared_dir: Option<PathBuf>,
}

/// Does what is asked for.
#[derive(Debug)]
pub struct Host {
    places: Places,
    /// The mount that was made or inherited.
    seat: Mutex<Option<Arc<Seat>>>,
    /// Device and inode of the API's socket file: a successor's at the same path is not ours to remove.
    api: Mutex<Option<(u64, u64)>>,
    /// Where the daemon sees the host's files, if not where they are.
    jail: OnceLock<Jail>,
}

impl Host {
    pub(super) fn new(places: Places) -> Self {
        Self { places, seat: Mutex::default(), api: Mutex::default(), jail: OnceLock::new() }
    }

    /// Does what `request` says, with the descriptors that came with it.
    pub(super) fn answer(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let done = |()| (Reply::Done, None);
        let yes = |yes| (Reply::Yes(yes), None);
        let path = |path: PathBuf| (Reply::Path(path.into()), None);
        let descriptor = |fd: OwnedFd| (Reply::Done, Some(fd));
        Ok(match request {
            Request::ApiCheck => yes(self.check_api()?),
            Request::ApiBind => descriptor(self.bind_api()?),
            Request::ApiRemove => done(self.remove_api()?),
            Request::Keeper { holder } => descriptor(self.keeper(holder)?),
            Request::Usable => path(usable_mountpoint(&self.places.mountpoint)?),
            Request::IsListed => yes(mounted::is_listed(&self.places.mountpoint, SOURCE)?),
            Request::Mount { writable } => self.mount(writable)?,
            Request::Inherit { number } => path(self.inherit(number)?),
            Request::Upper { upper, work, make } => {
                let overlay = OverlayConfig { upper_dir: upper.into(), work_dir: work.into() };
                self.check_to_be_made(&overlay.upper_dir)?;
                self.check_to_be_made(&overlay.work_dir)?;
                make.map_or(Ok(()), |(owner, mode)| overlay.make(owner, mode))?;
                descriptor(self.shielded(&overlay.upper_dir)?.into())
            }
            Request::Cover { upper, work } => {
                let overlay = OverlayConfig { upper_dir: upper.into(), work_dir: work.into() };
                self.check_to_be_made(&overlay.upper_dir)?;
                self.check_to_be_made(&overlay.work_dir)?;
                let cover = |at: &Path, source: &str| writable::cover(&overlay, at, source);
                done(self.seat()?.cover(cover)?)
            }
            Request::Unmount { ended } => done(self.seat()?.unmount(ended)?),
            Request::Abort => {
                self.seat()?.abort();
                done(())
            }
            Request::ConnectionFile(file) => descriptor(self.seat()?.connection_file(file)?.into()),
            Request::IsGone(limit) => yes(self.seat()?.is_gone_within(limit.min(LONGEST_WAIT))),
            Request::Open { path, device } => descriptor(self.open(Path::new(&path), device)?.into()),
            Request::Connect { path } => descriptor(self.connect(Path::new(&path))?),
            Request::Directory { path } => {
                let named = Path::new(&path);
                self.check_to_be_made(named)?;
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(named)?;
                self.admit(named, true)?;
                done(())
            }
            Request::Admit { path: named, writable } => path(self.admit(Path::new(&named), writable)?),
            Request::Resolve { host } => (Reply::Addresses(resolve(&host)?), None),
            Request::Login { helper, server } => {
                let answer = storage::oci::auth::run_credential_helper(&helper, &server);
                (Reply::Login(answer.map_err(|e| anyhow::anyhow!(crate::logging::chain(&e)))?), None)
            }
            Request::Thread { tid } => thread(tid),
            Request::Xattr(call) => {
                let file = descriptors.first().context("want the descriptor of a file")?;
                (Reply::Xattr(call.run_for(file.as_fd())?), None)
            }
            Request::Jail => done(self.enter(descriptors)?),
        })
    }

    /// The mount.
    fn seat(&self) -> anyhow::Result<Arc<Seat>> {
        let seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        seat.clone().context("nothing was mounted")
    }

    fn take_seat(&self, make: impl FnOnce() -> anyhow::Result<Seat>) -> anyhow::Result<Arc<Seat>> {
        let mut seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever tries again after a failure gets what is there now.
        let made = Arc::new(make()?);
        *seat = Some(Arc::clone(&made));
        Ok(made)
    }

    fn mount(&self, writable: bool) -> anyhow::Result<Answer> {
        let mut connection = None;
        let seat = self.take_seat(|| {
            let (seat, descriptor) = Seat::mount(&self.places.mountpoint, writable)?;
            connection = Some(descriptor);
            Ok(seat)
        })?;
        let mountpoint = OsString::from(seat.mountpoint());
        Ok((Reply::Mounted { mountpoint, number: seat.number() }, connection))
    }

    fn inherit(&self, number: u64) -> anyhow::Result<PathBuf> {
        let seat = self.take_seat(|| Seat::inherit(&self.places.mountpoint, number))?;
        Ok(seat.mountpoint().to_owned())
    }

    fn keeper(&self, holder: bool) -> anyhow::Result<OwnedFd> {
        let path = if holder { &self.places.holder } else { &self.places.supervisor };
        let path = path.as_deref().context("this daemon has no supervisor")?;
        Ok(supervisor::dial(path)?.into())
    }

    /// A live daemon's socket is not ours to take, nor is a file that is no socket. True if there is one.
    fn check_api(&self) -> anyhow::Result<bool> {
        let Some(path) = &self.places.apisock else { return Ok(false) };
        match path.symlink_metadata() {
            Ok(meta) if !meta.file_type().is_socket() => {
                bail!("the API socket {} exists and is no socket; name another path", path.display())
            }
            _ if is_answered(path) => {
                bail!("another daemon answers on the API socket {}; stop it first", path.display())
            }
            found => Ok(found.is_ok()),
        }
    }

    /// Binds the API's socket, for this user alone from the first moment on: the mode of the descriptor
    /// becomes that of the file. The process's umask is left alone, for other threads make files.
    fn bind_api(&self) -> anyhow::Result<OwnedFd> {
        let path = self.places.apisock.as_deref().context("this daemon has no API socket")?;
        let context = || format!("API socket {}", path.display());
        match path.symlink_metadata() {
            Ok(found) if !found.file_type().is_socket() => {
                bail!("the API socket {} exists and is no socket; name another path", path.display())
            }
            Ok(_) => std::fs::remove_file(path).with_context(context)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(context),
        }
        let bound = || -> io::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
            bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(socket)
        };
        let socket = bound().with_context(context)?;
        let made = path.symlink_metadata().with_context(context)?;
        *self.api.lock().unwrap_or_else(PoisonError::into_inner) = Some((made.dev(), made.ino()));
        Ok(socket)
    }

    fn remove_api(&self) -> anyhow::Result<()> {
        let ours = *self.api.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(path), Some(ours)) = (&self.places.apisock, ours) else { return Ok(()) };
        let is_ours = |found: &std::fs::Metadata| (found.dev(), found.ino()) == ours;
        match path.symlink_metadata() {
            Ok(found) if is_ours(&found) => Ok(std::fs::remove_file(path)?),
            Ok(_) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Admits things into the jail from now on.
    fn enter(&self, descriptors: Vec<OwnedFd>) -> anyhow::Result<()> {
        let Ok([namespace, root]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            bail!("want the descriptors of a namespace and its root")
        };
        if self.jail.set(Jail::new(namespace, root)?).is_err() {
            bail!("the daemon is in a jail already");
        }
        Ok(())
    }

    /// Has the daemon see `path`; where it really is.
    fn admit(&self, path: &Path, writable: bool) -> Result<PathBuf, Refusal> {
        let real = path.canonicalize()?;
        let Some(jail) = self.jail.get() else { return Ok(real) };
        let shared = self.places.shared_dir.as_ref().and_then(|path| path.canonicalize().ok());
        // What the command line names is its author's business.
        let admitted = match shared.is_some_and(|shared| shared == real) {
            true => Ok(()),
            false => self.check(&real, writable),
        };
        let admitted = admitted.and_then(|()| jail.admit(path, &real, writable));
        admitted.with_context(|| format!("{} can not be used", path.display()))?;
        Ok(real)
    }

    /// Refuses what a daemon in a jail has no business with. `real` is a canonical path.
    fn check(&self, real: &Path, writable: bool) -> anyhow::Result<()> {
        let what = self.jail.get().and_then(|_| admit::refusal(real, writable));
        match what {
            Some(what) => {
                bail!("{} is {what}, which a sandboxed daemon does not get; see --no-jail", real.display())
            }
            None => Ok(()),
        }
    }

    /// The same for a directory that may have to be made.
    fn check_to_be_made(&self, path: &Path) -> anyhow::Result<()> {
        let absolute = std::path::absolute(path)?;
        let there = absolute.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
        let (above, real) = there.context("there is no root directory")?;
        let rest = absolute.strip_prefix(above)?;
        if rest.components().any(|component| !matches!(component, std::path::Component::Normal(_))) {
            bail!("{}: `..` behind what does not exist", path.display());
        }
        self.check(&real.join(rest), true)
    }

    /// Opens a directory to be read. Who gets the descriptor of a jailed daemon gets no way out of the directory, nor
    /// to write to it.
    fn shielded(&self, path: &Path) -> io::Result<File> {
        let place = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path)?;
        self.open_place(place.into(), libc::O_DIRECTORY)
    }

    /// Opens what `place` names, through a mount of its own that is read-only, if the daemon is in a jail.
    fn open_place(&self, place: OwnedFd, flags: i32) -> io::Result<File> {
        let place = if self.jail.get().is_some() { admit::clone_of(&place)? } else { place };
        let link = format!("/proc/self/fd/{}", place.as_raw_fd());
        File::options().read(true).custom_flags(flags).open(link)
    }

    /// Connects to a unix socket.
    fn connect(&self, path: &Path) -> Result<OwnedFd, Refusal> {
        let place = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
        if !place.metadata()?.file_type().is_socket() {
            return Err(anyhow::anyhow!("not a socket").into());
        }
        let link = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
        self.check(&std::fs::read_link(&link)?, false)?;
        let stream = supervisor::dial(&link)?;
        tracing::info!("connected to {}", path.display());
        Ok(stream.into())
    }

    /// Opens a regular file, or with `device` a block device, to be read.
    fn open(&self, path: &Path, device: bool) -> Result<File, Refusal> {
        let place = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
        let kind = place.metadata()?.file_type();
        if !(kind.is_file() || device && kind.is_block_device()) {
            let why = if device { "neither a block device nor a regular file" } else { "not a regular file" };
            return Err(anyhow::anyhow!("{why}").into());
        }
        // What it is, and not what it is called.
        self.check(&std::fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd()))?, false)?;
        if kind.is_block_device() {
            // Through a mount of that kind no device can be opened.
            let link = format!("/proc/self/fd/{}", place.as_raw_fd());
            return Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(link)?);
        }
        tracing::debug!("opened {}", path.display());
        Ok(self.open_place(place.into(), libc::O_NONBLOCK | libc::O_NOCTTY)?)
    }
}

/// True if whoever listens on the socket at `path` may still answer. A daemon that was killed can be kept from going away by
/// a thread that waits in the kernel, and its socket with it.
fn is_answered(path: &Path) -> bool {
    let Ok(stream) = std::os::unix::net::UnixStream::connect(path) else { return false };
    let listener = getsockopt(&stream, sockopt::PeerCredentials).map(|peer| peer.pid());
    // Processes outside of our namespace have number 0.
    !listener.is_ok_and(|pid| pid > 0 && process::has_ended(Pid::from_raw(pid)))
}

fn resolve(host: &str) -> io::Result<Vec<IpAddr>> {
    let found = (host, 0).to_socket_addrs()?;
    Ok(found.map(|address| address.ip()).take(MAX_ADDRESSES).collect())
}

/// A thread's process and name, as far as they can be told.
fn thread(tid: u32) -> Answer {
    let pid = std::fs::read_to_string(format!("/proc/{tid}/status"))
        .ok()
        .and_then(|status| status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok());
    // A thread that ends meanwhile has no name.
    let name = std::fs::read(format!("/proc/{tid}/comm")).unwrap_or_default();
    (Reply::Thread { pid, name }, None)
}
