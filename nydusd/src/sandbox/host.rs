//! What is done for the daemon, and what is refused: by the broker, or by the daemon itself if it is not sandboxed.
//!
//! The daemon parses what strangers send, so its requests are not believed: it mounts, listens and connects only where
//! its command line says, unmounts nothing but the mount that was made for it, and has files opened only to be read.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::{IpAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::admit::{self, Access, Jail};
use super::place::{self, Place};
use super::protocol::{Refusal, Reply, Request};
use super::refuse::Rules;
use super::socket::Sockets;
use crate::failover::supervisor;
use crate::passthrough::OWN_MOUNT;
use crate::transport::mounted;
use crate::transport::seat::{SOURCE, Seat, usable_mountpoint};
use crate::writable::{self, OverlayConfig};

/// Longest wait for the end of the mount.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Most addresses of a host that are told.
const MAX_ADDRESSES: usize = 64;

/// How often a device must turn out to be in use.
const PROBES: usize = 4;
const PROBE_PAUSE: Duration = Duration::from_millis(5);

/// The answer, and the descriptor that goes with it.
pub(super) type Answer = (Reply, Option<OwnedFd>);

/// What the command line names.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Directory to mount on.
    pub mountpoint: Option<PathBuf>,
    /// Where the API listens.
    pub apisock: Option<PathBuf>,
    /// Where virtual machine monitors find the device.
    pub device: Option<PathBuf>,
    /// The supervisor's socket.
    pub supervisor: Option<PathBuf>,
    /// The socket of `nydusd supervise`.
    pub holder: Option<PathBuf>,
    /// Directory of the host that is to be shown.
    pub shared_dir: Option<PathBuf>,
    /// It is to be written to, too.
    pub writable: bool,
    /// What is admitted whatever it is.
    pub admit: Vec<PathBuf>,
}

impl Places {
    /// The same by the absolute paths that these have now. Nobody who changes links later changes what is meant; what
    /// can not be told is left to whoever wants to use it.
    fn settled(self) -> Self {
        let settled = |path: PathBuf| place::settle(&path).unwrap_or(path);
        let socket = |path: PathBuf| place::settle_parent(&path).unwrap_or(path);
        Self {
            // It may be the mount of a daemon that is gone.
            mountpoint: self.mountpoint.map(|path| mounted::resolve(&path).unwrap_or_else(|_| settled(path))),
            apisock: self.apisock.map(socket),
            device: self.device.map(socket),
            supervisor: self.supervisor.map(settled),
            holder: self.holder.map(settled),
            shared_dir: self.shared_dir.map(settled),
            writable: self.writable,
            admit: self.admit.into_iter().map(settled).collect(),
        }
    }
}

/// Does what is asked for.
#[derive(Debug)]
pub struct Host {
    places: Places,
    rules: Rules,
    /// The mount that was made or inherited.
    seat: Mutex<Option<Arc<Seat>>>,
    sockets: Sockets,
    /// Where the daemon sees the host's files, if not where they are.
    jail: OnceLock<Jail>,
}

impl Host {
    pub(super) fn new(places: Places) -> Self {
        let places = places.settled();
        let rules = Rules::new(&places);
        let sockets = Sockets::new(places.apisock.clone(), places.device.clone());
        Self { places, rules, seat: Mutex::default(), sockets, jail: OnceLock::new() }
    }

    /// Does what `request` says, with the descriptors that came with it.
    pub(super) fn answer(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let done = |()| (Reply::Done, None);
        let yes = |yes| (Reply::Yes(yes), None);
        let path = |path: PathBuf| (Reply::Path(path.into()), None);
        let descriptor = |fd: OwnedFd| (Reply::Done, Some(fd));
        Ok(match request {
            Request::SocketCheck(socket) => yes(self.sockets.get(socket).check()?),
            Request::SocketBind(socket) => descriptor(self.sockets.get(socket).bind()?),
            Request::SocketRemove(socket) => done(self.sockets.get(socket).remove()?),
            Request::Keeper { holder } => descriptor(self.keeper(holder)?),
            Request::Usable => path(usable_mountpoint(self.mountpoint()?)?.real().to_owned()),
            Request::IsListed => yes(mounted::is_listed(self.mountpoint()?, SOURCE)?),
            Request::Mount { writable } => self.mount(writable)?,
            Request::Inherit { number } => path(self.inherit(number)?),
            Request::Upper { upper, work, make } => {
                let overlay = OverlayConfig { upper_dir: upper.into(), work_dir: work.into() };
                let upper = match make {
                    Some((owner, mode)) => {
                        overlay.make(owner, mode, |place, real| self.check_place(place, real, true))?
                    }
                    None => self.find_to_be_written(&overlay.upper_dir)?,
                };
                descriptor(self.shielded(&upper, libc::O_DIRECTORY)?.into())
            }
            Request::Cover { upper, work } => {
                let upper = self.find_to_be_written(Path::new(&upper))?;
                let work = self.find_to_be_written(Path::new(&work))?;
                let cover = |at: &Path, source: &str| writable::cover(&upper, &work, at, source);
                let seat = self.seat()?;
                seat.cover(cover)?;
                self.keep_out(&seat);
                done(())
            }
            Request::Unmount { ended } => done(self.seat()?.unmount(ended)?),
            Request::Abort => done(self.seat()?.abort()?),
            Request::ConnectionFile(file) => descriptor(self.seat()?.connection_file(file)?.into()),
            Request::IsGone(limit) => {
                // What nobody can tell of is nothing to wait for.
                yes(self.seat()?.wait_gone(limit.min(LONGEST_WAIT)).unwrap_or(true))
            }
            Request::Open { path, device } => descriptor(self.open(Path::new(&path), device)?.into()),
            Request::Connect { path } => descriptor(self.connect(Path::new(&path))?),
            Request::Directory { path } => {
                let named = Path::new(&path);
                let place = Place::make(named, 0o700, |place, real| self.check_place(place, real, true))?;
                self.put_into_jail(named, &place, Access { writable: true, shown: false })?;
                done(())
            }
            Request::Admit { path: named, writable, shown } => {
                path(self.admit(Path::new(&named), Access { writable, shown })?)
            }
            Request::Resolve { host } => (Reply::Addresses(resolve(&host)?), None),
            Request::Login { helper, server } => (Reply::Login(login(&helper, &server)?), None),
            Request::Thread { tid } => thread(tid),
            Request::Xattr(call) => {
                let file = descriptors.first().context("want the descriptor of a file")?;
                (Reply::Xattr(call.run_for(file.as_fd())?), None)
            }
            Request::Jail => done(self.enter(descriptors)?),
        })
    }

    /// Where the command line has it mounted.
    fn mountpoint(&self) -> anyhow::Result<&Path> {
        self.places.mountpoint.as_deref().context("this daemon has no mountpoint")
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
            let (seat, descriptor) = Seat::mount(self.mountpoint()?, writable)?;
            connection = Some(descriptor);
            Ok(seat)
        })?;
        self.keep_out(&seat);
        let mountpoint = OsString::from(seat.mountpoint());
        Ok((Reply::Mounted { mountpoint, number: seat.number() }, connection))
    }

    fn inherit(&self, number: u64) -> anyhow::Result<PathBuf> {
        let seat = self.take_seat(|| Seat::inherit(self.mountpoint()?, number))?;
        self.keep_out(&seat);
        Ok(seat.mountpoint().to_owned())
    }

    /// Keeps the daemon's own mount out of its jail. What was admitted before may hold it, or shows what is mounted there
    /// later.
    fn keep_out(&self, seat: &Seat) {
        let Some((jail, number)) = self.jail.get().zip(seat.number()) else { return };
        if let Err(e) = jail.take_own(number) {
            tracing::warn!(
                "the sandbox keeps {} mounted while the daemon runs: {e:#}",
                seat.mountpoint().display()
            );
        }
    }

    fn keeper(&self, holder: bool) -> anyhow::Result<OwnedFd> {
        let path = if holder { &self.places.holder } else { &self.places.supervisor };
        let path = path.as_deref().context("this daemon has no supervisor")?;
        // Connecting follows links, so by what was opened without any.
        Ok(supervisor::dial(&Place::fixed(path)?.link())?.into())
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
    fn admit(&self, path: &Path, access: Access) -> Result<PathBuf, Refusal> {
        if self.jail.get().is_none() {
            return Ok(path.canonicalize()?);
        }
        let place = Place::find(path)?;
        self.check_place(&place, place.real(), access.writable).with_context(|| unusable(path))?;
        if access.shown && !place.metadata()?.is_dir() {
            // Nobody would take away again what is not served.
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR).into());
        }
        self.put_into_jail(path, &place, access)?;
        Ok(place.real().to_owned())
    }

    /// Has the daemon, if it is in a jail, see a place.
    fn put_into_jail(&self, path: &Path, place: &Place, access: Access) -> anyhow::Result<()> {
        let Some(jail) = self.jail.get() else { return Ok(()) };
        jail.admit(path, place, access).with_context(|| unusable(path))
    }

    /// Refuses what the daemon serves itself: it would wait for its own answers. Asks it nothing.
    fn check_own(&self, place: &Place) -> anyhow::Result<()> {
        match self.seat() {
            Ok(seat) if seat.serves(place)? => Err(denied(OWN_MOUNT).into()),
            _ => Ok(()),
        }
    }

    /// Refuses both: `place` is what there is of `real`.
    fn check_place(&self, place: &Place, real: &Path, writable: bool) -> anyhow::Result<()> {
        self.check_own(place)?;
        self.check(real, writable)
    }

    /// Refuses what a daemon in a jail has no business with. `real` is a canonical path.
    fn check(&self, real: &Path, writable: bool) -> anyhow::Result<()> {
        match self.jail.get().and_then(|_| self.rules.refusal(real, writable)) {
            Some(what) => Err(denied(format!(
                "{} is {what}, which a sandboxed daemon does not get; see --admit and --no-jail",
                real.display()
            ))
            .into()),
            None => Ok(()),
        }
    }

    /// Something that is there and may be written to.
    fn find_to_be_written(&self, path: &Path) -> anyhow::Result<Place> {
        let place = Place::find(path).with_context(|| path.display().to_string())?;
        self.check_place(&place, place.real(), true)?;
        Ok(place)
    }

    /// Opens a place to be read. A daemon in a jail gets the descriptor through a mount of its own: no way leads out of
    /// that, and nothing can be written through it.
    fn shielded(&self, place: &Place, flags: i32) -> io::Result<File> {
        match self.jail.get() {
            Some(_) => admit::clone_of(place)?.open(flags),
            None => place.open(flags),
        }
    }

    /// Connects to a unix socket.
    fn connect(&self, path: &Path) -> Result<OwnedFd, Refusal> {
        let place = Place::find(path)?;
        if !place.metadata()?.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a socket").into());
        }
        // Who speaks to a service of root's may have it do as much as who writes to its directory.
        self.check(place.real(), true)?;
        let stream = supervisor::dial(&place.link())?;
        tracing::info!("connected to {}", path.display());
        Ok(stream.into())
    }

    /// Opens a regular file, or with `device` a block device, to be read.
    fn open(&self, path: &Path, device: bool) -> Result<File, Refusal> {
        let place = Place::find(path)?;
        self.check_own(&place)?;
        let kind = place.metadata()?.file_type();
        if !(kind.is_file() || device && kind.is_block_device()) {
            let why = if device { "neither a block device nor a regular file" } else { "not a regular file" };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why).into());
        }
        // What it is, and not what it is called.
        self.check(place.real(), false)?;
        if kind.is_block_device() {
            if self.jail.get().is_some() && !self.rules.admit(place.real()) && is_in_use(&place) {
                let real = place.real().display();
                let why = format!("{real} is a disk that the host itself uses; see --admit and --no-jail");
                return Err(denied(why).into());
            }
            // Through a mount of that kind no device can be opened.
            return Ok(place.open(libc::O_NONBLOCK)?);
        }
        tracing::debug!("opened {}", path.display());
        Ok(self.shielded(&place, libc::O_NONBLOCK | libc::O_NOCTTY)?)
    }
}

/// True for a block device that is mounted, a part of a volume or the like, or has a partition that is.
fn is_in_use(device: &Place) -> bool {
    // Another daemon that looks at the same moment is none of these, and done at once.
    (0..PROBES).all(|_| {
        let probe = device.open(libc::O_EXCL | libc::O_NONBLOCK);
        let is_busy = probe.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY));
        if is_busy {
            std::thread::sleep(PROBE_PAUSE);
        }
        is_busy
    })
}

/// What the daemon does not get, whatever the system would say.
fn denied(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why.into())
}

fn unusable(path: &Path) -> String {
    format!("{} can not be used", path.display())
}

/// What a credential helper knows; its failure is of the same kind where it is read.
fn login(helper: &str, server: &str) -> io::Result<Option<String>> {
    storage::oci::auth::run_credential_helper(helper, server).map_err(|e| {
        let kind = match e.kind() {
            storage::ErrorKind::Denied => io::ErrorKind::PermissionDenied,
            storage::ErrorKind::NotFound => io::ErrorKind::NotFound,
            storage::ErrorKind::TimedOut => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, crate::logging::chain(&e))
    })
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
