//! Host FUSE: a mount on this host, served from `/dev/fuse`.
//!
//! N threads each block in read(2) on the connection's descriptor and answer what they get, see
//! [`super::worker`].

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::FuseSession;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::init::Negotiated;
use super::mounted::{self, MountIdentity};
use super::notify::Notices;
use super::uring::{Plan, Rings};
use super::worker::{Connection, Worker};
use crate::adapter::Adapter;
use crate::passthrough::Device;

/// Source in the mount table (contract 1.8).
pub(crate) const SOURCE: &str = "rafs";

/// Stack of a serving thread: frames here are small, buffers are on the heap.
pub(super) const STACK_SIZE: usize = 256 << 10;

/// What `umount -f` takes at most from the end of the connection to the end of the mount.
const FORCED_UNMOUNT: Duration = Duration::from_millis(200);

/// Where the kernel has a directory of files for each connection.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// Device number of `/dev/fuse`.
const FUSE_DEVICE: u64 = nix::sys::stat::makedev(10, 229);

/// What becomes of requests that a predecessor took and did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// They are answered.
    Answer,
    /// They fail with EIO.
    Refuse,
}

/// A mounted connection to the kernel.
pub struct FuseMount {
    mountpoint: PathBuf,
    /// Unknown without a proc file system.
    identity: Mutex<Option<MountIdentity>>,
    /// Taken to unmount.
    session: Mutex<Option<Session>>,
    connection: Arc<Connection>,
    pub(super) notices: Notices,
}

/// Who mounted.
enum Session {
    /// We did.
    Ours(FuseSession),
    /// A predecessor.
    Inherited,
}

impl FuseMount {
    /// Mounts on the directory `mountpoint`, read-only unless `writable`.
    ///
    /// # Errors
    /// Not a usable directory, a dead mount in its place, or the kernel refuses.
    pub fn new(mountpoint: &Path, writable: bool) -> anyhow::Result<Self> {
        let mountpoint = usable_mountpoint(mountpoint)?;
        let mut session = FuseSession::new(&mountpoint, SOURCE, "", !writable)?;
        session.mount().with_context(|| format!("mount on {}", mountpoint.display()))?;
        let identity = MountIdentity::at(&mountpoint)
            .inspect_err(|e| tracing::warn!("the mount on {} has no identity: {e}", mountpoint.display()))
            .ok();
        let file = session.get_fuse_file().context("the FUSE session has no descriptor")?;
        let fd = OwnedFd::from(file.try_clone().context("duplicate the FUSE descriptor")?);
        let connection = Arc::new(Connection::new(fd, None).context("set up the FUSE descriptor")?);
        let session = Mutex::new(Some(Session::Ours(session)));
        let identity = Mutex::new(identity);
        Ok(Self { mountpoint, identity, session, connection, notices: Notices::default() })
    }

    /// Goes on with a mount on `mountpoint`: a predecessor mounted it and agreed with the kernel on
    /// `negotiated`; `descriptor` is (a duplicate of) its connection, whose number is `number`. Asks
    /// nothing of the mount, which nobody may be serving yet.
    ///
    /// # Errors
    /// The descriptor is no connection, or another connection's mount is there.
    pub fn inherit(
        mountpoint: &Path,
        descriptor: OwnedFd,
        number: u64,
        negotiated: Negotiated,
    ) -> anyhow::Result<Self> {
        let context = || format!("take over the mount on {}", mountpoint.display());
        if nix::sys::stat::fstat(&descriptor).with_context(context)?.st_rdev != FUSE_DEVICE {
            bail!("the supervisor's descriptor is no FUSE connection");
        }
        if negotiated.rings() {
            bail!("the mount was served through io_uring, which nobody can go on with; mount it anew");
        }
        let mountpoint = mounted::resolve(mountpoint).with_context(context)?;
        let identity = MountIdentity::at(&mountpoint).with_context(context)?;
        if identity.connection() != Some(number) {
            bail!(
                "the saved state is of FUSE connection {number}, but {} is not its mount; give the \
                 --mountpoint of the daemon that saved it",
                mountpoint.display()
            );
        }
        let connection =
            Connection::new(descriptor, Some(negotiated)).context("set up the FUSE descriptor")?;
        let session = Mutex::new(Some(Session::Inherited));
        let (identity, connection) = (Mutex::new(Some(identity)), Arc::new(connection));
        Ok(Self { mountpoint, identity, session, connection, notices: Notices::default() })
    }

    /// The kernel's number of the connection.
    ///
    /// # Errors
    /// Unknown without a proc file system.
    pub fn number(&self) -> anyhow::Result<u64> {
        let number = self.identity().as_ref().and_then(MountIdentity::connection);
        number.with_context(|| format!("the mount on {} has no identity", self.mountpoint.display()))
    }

    /// The connection. The mount lives as long as anybody holds a duplicate of it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.connection.fd.as_fd()
    }

    /// What a successor must know of the connection; `None` before the kernel has asked.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.connection.negotiated.get().copied()
    }

    /// Has the kernel repeat all requests that a predecessor took and did not answer. To be called
    /// on an inherited mount before it is served; on any other it is harmless.
    ///
    /// # Errors
    /// The kernel can not ([`Negotiated::resends`] is false), or has ended the connection.
    pub fn recover(&self, recovery: Recovery) -> io::Result<()> {
        self.connection.flush.store(recovery == Recovery::Refuse, Ordering::Relaxed);
        self.connection.resend()
    }

    /// The device numbers of its files, if they are known.
    pub fn device(&self) -> Option<Device> {
        // The device of an overlay is another one.
        self.number().ok().map(Device::of)
    }

    fn identity(&self) -> Option<MountIdentity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What an overlay that covers this mount has to be called in the mount table, to be known for it.
    ///
    /// # Errors
    /// As [`FuseMount::number`].
    pub fn covered_source(&self) -> anyhow::Result<String> {
        Ok(mounted::covering(SOURCE, self.number()?))
    }

    /// Says that such an overlay is in its place.
    ///
    /// # Errors
    /// It is not.
    pub fn covered(&self) -> anyhow::Result<()> {
        let there = MountIdentity::at(&self.mountpoint).context("look for the overlay")?;
        if !there.is_cover() || there.connection() != Some(self.number()?) {
            bail!(
                "the overlay is not on {}; something else was mounted meanwhile",
                self.mountpoint.display()
            );
        }
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Some(there);
        Ok(())
    }

    /// The canonical mountpoint.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Starts `count` threads that serve `adapter` until the kernel ends the connection. Each
    /// calls `ended` when it stops, also after a panic. The receiver gets a message when the
    /// kernel's FUSE_INIT was answered, or at once if a predecessor did that: from then on the
    /// mount answers whoever asks.
    ///
    /// With `rings`, requests come through them if the kernel agrees, and the threads serve the rest.
    ///
    /// This process must not ask its own mount: if it ended with such a request under way, the
    /// asking thread would wait for an answer and keep open the descriptor whose closing ends
    /// the wait. Nothing kills a process in that state.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn serve(
        &self,
        adapter: Arc<Adapter>,
        count: u16,
        rings: Option<Plan>,
        ended: impl Fn(anyhow::Result<()>) + Clone + Send + 'static,
    ) -> anyhow::Result<(Vec<JoinHandle<()>>, Receiver<()>)> {
        let (initialized, answers) = channel();
        if self.negotiated().is_some() {
            // The receiver is still here.
            let _ = initialized.send(());
        }
        let server = Arc::new(Server::new(Arc::clone(&adapter)));
        let ring_threads = match rings.filter(|_| self.negotiated().is_none()) {
            Some(plan) => self.prepare_rings(plan, &adapter, &server, ended.clone()),
            None => Vec::new(),
        };
        let threads = (0..count)
            .map(|number| {
                let mut worker = Worker::new(
                    Arc::clone(&adapter),
                    Arc::clone(&server),
                    Arc::clone(&self.connection),
                    initialized.clone(),
                );
                let ended = ended.clone();
                std::thread::Builder::new()
                    .name(format!("fuse-{number}"))
                    .stack_size(STACK_SIZE)
                    .spawn(move || {
                        let result = catch_unwind(AssertUnwindSafe(|| worker.run()));
                        ended(result.unwrap_or_else(|_| Err(anyhow!("a FUSE thread panicked"))));
                    })
                    .context("start a FUSE thread")
            })
            .chain(ring_threads.into_iter().map(Ok))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok((threads, answers))
    }

    /// Makes rings that the kernel is told of when it asks; their threads. None with a warning.
    fn prepare_rings(
        &self,
        plan: Plan,
        adapter: &Arc<Adapter>,
        server: &Arc<Server<Arc<Adapter>>>,
        ended: impl Fn(anyhow::Result<()>) + Clone + Send + 'static,
    ) -> Vec<JoinHandle<()>> {
        match Rings::prepare(plan, Arc::clone(adapter), Arc::clone(server), ended) {
            Ok((rings, threads)) => {
                *self.connection.rings.lock().unwrap_or_else(PoisonError::into_inner) = Some(rings);
                threads
            }
            Err(e) => {
                tracing::warn!("no FUSE over io_uring: {e:#}; requests come through /dev/fuse");
                Vec::new()
            }
        }
    }

    /// Takes the mount out of the tree at once, whoever still uses it. Repeated calls and a
    /// mount that is gone already are fine.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unmount(&self) -> anyhow::Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let context = || format!("unmount {}", self.mountpoint.display());
        if session.is_some() && !self.end_notices() {
            self.abort();
        }
        match session {
            None => return Ok(()),
            Some(Session::Ours(mut session)) => session.umount().with_context(context)?,
            Some(Session::Inherited) => self.unmount_inherited().with_context(context)?,
        }
        // The crate takes a connection that has ended for a mount that is gone.
        self.unmount_dead().with_context(context)
    }

    /// The same for a mount whose connection others hold: whoever still uses it would wait for ever, and
    /// no signal would end that. So the connection is ended as it is when its last holder is gone.
    ///
    /// # Errors
    /// The kernel refuses to unmount.
    pub fn unmount_held(&self) -> anyhow::Result<()> {
        let end = self.connection_file("abort");
        self.unmount()?;
        if let Err(e) = end.and_then(|mut file| file.write_all(b"1")) {
            tracing::warn!("the connection of {} goes on: {e}", self.mountpoint.display());
        }
        Ok(())
    }

    /// Opens one of the kernel's files of this connection to be written, while the mount is there: the
    /// number of one that is gone may be another's. What is open stays ours.
    ///
    /// # Errors
    /// There is no such file, or no mount.
    pub fn connection_file(&self, name: &str) -> io::Result<File> {
        let number = self.number().map_err(io::Error::other)?;
        let file = File::options().write(true).open(format!("{CONNECTIONS}/{number}/{name}"))?;
        match self.identity() {
            Some(ours) if !ours.wait_gone(Duration::ZERO)? => Ok(file),
            _ => Err(io::Error::other("the mount is gone")),
        }
    }

    /// Ends the connection, and with it whatever waits for its answers: this process could not end while
    /// a thread of its own does.
    fn abort(&self) {
        tracing::warn!("{}: the kernel waits for reads; they end now", self.mountpoint.display());
        let ours = self.identity().zip(MountIdentity::at(&self.mountpoint).ok());
        if ours.is_some_and(|(ours, there)| ours == there) {
            // A mount that is gone already has no connection to end.
            let _ = umount2(&self.mountpoint, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
    }

    /// Removes our mount and no other, as long as it is served.
    fn unmount_inherited(&self) -> anyhow::Result<()> {
        let path = &self.mountpoint;
        match self.identity() {
            Some(ours) if ours.wait_gone(Duration::ZERO)? => return Ok(()),
            Some(ours) if MountIdentity::at(path)? != ours => {
                bail!("another mount covers it; unmount both by hand")
            }
            _ => {}
        }
        match umount2(path, MntFlags::MNT_DETACH) {
            // Somebody else was faster.
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// For an ended connection: true if its mount is still there, so that somebody aborted it.
    pub fn is_aborted(&self) -> bool {
        let gone = |identity: &MountIdentity| identity.wait_gone(FORCED_UNMOUNT).unwrap_or(true);
        self.identity().is_some_and(|identity| !gone(&identity))
    }

    /// Removes the mount of an ended connection, and no other.
    fn unmount_dead(&self) -> anyhow::Result<()> {
        let path = &self.mountpoint;
        let Some(ours) = self.identity() else { return Ok(()) };
        if ours.wait_gone(Duration::ZERO)? {
            return Ok(());
        }
        if MountIdentity::at(path)? != ours {
            bail!("another mount covers the dead one; unmount both by hand");
        }
        if ours.is_cover() {
            return Ok(umount2(path, MntFlags::MNT_DETACH)?);
        }
        // The numbers of a mount that is gone may be a successor's: that one answers.
        if nix::sys::statvfs::statvfs(path) != Err(Errno::ENOTCONN) {
            return Ok(());
        }
        Ok(umount2(path, MntFlags::MNT_DETACH)?)
    }

    /// Leaves the mount to a successor: it stays in place when this value is dropped, and requests that
    /// fail from here on are left unanswered for it.
    pub fn abandon(&self) {
        if !self.end_notices() {
            tracing::warn!("the kernel is still being told of a change, and this process ends only then");
        }
        self.connection.left.store(true, Ordering::Release);
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        std::mem::forget(session);
    }
}

/// Canonical path of a directory to mount on.
///
/// # Errors
/// Not a directory, the mount of another daemon, or the dead mount of one that is gone. The kernel
/// may answer a stat of a dead mount from its cache, but never a statfs.
pub fn usable_mountpoint(path: &Path) -> anyhow::Result<PathBuf> {
    let probe = || -> io::Result<(bool, PathBuf)> {
        let real = path.canonicalize()?;
        nix::sys::statvfs::statvfs(&real)?;
        Ok((std::fs::metadata(&real)?.is_dir(), real))
    };
    match probe() {
        Ok((true, real)) if MountIdentity::is_fuse_of(&real, SOURCE).unwrap_or(false) => match is_dead(&real)
        {
            true => bail!(
                "the mountpoint {0} holds the overlay of a daemon that is gone; remove it with `umount -l {0}`: what \
                 was changed is kept in `overlay.upper_dir`",
                path.display()
            ),
            false => bail!(
                "the mountpoint {0} is served by another nydusd; unmount it first with `umount {0}`, or take another directory",
                path.display()
            ),
        },
        Ok((true, real)) => Ok(real),
        Ok((false, real)) => bail!("the mountpoint {} is not a directory", real.display()),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => bail!(
            "the mountpoint {0} holds the dead mount of a daemon that is gone; remove it with `umount -l {0}`",
            path.display()
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            bail!("the mountpoint {0} does not exist; make it with `mkdir -p {0}`", path.display())
        }
        Err(e) => Err(e).with_context(|| format!("the mountpoint {} can not be used", path.display())),
    }
}

/// True if what is mounted on `path`, which is the root of a mount of ours, has nobody who serves it. An overlay
/// answers from what it covers no more than names that nobody has asked for.
fn is_dead(path: &Path) -> bool {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let name = format!(".nydusd-{}-{}", std::process::id(), now.as_nanos());
    path.join(name).symlink_metadata().is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
}
