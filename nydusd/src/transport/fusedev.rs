//! Host FUSE: a mount on this host, served from `/dev/fuse`.
//!
//! N threads each block in read(2) on the connection's descriptor and answer what they get, see
//! [`super::worker`].

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use fuse_backend_rs::api::server::Server;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::init::Negotiated;
use super::notify::Notices;
use super::seat::ConnectionFile;
use super::uring::{Plan, Rings};
use super::worker::{Connection, Worker};
use crate::adapter::Adapter;
use crate::passthrough::Device;
use crate::sandbox::Privileged;

/// Stack of a serving thread: frames here are small, buffers are on the heap.
pub(super) const STACK_SIZE: usize = 256 << 10;

/// What `umount -f` takes at most from the end of the connection to the end of the mount.
const FORCED_UNMOUNT: Duration = Duration::from_millis(200);

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
    host: Arc<Privileged>,
    mountpoint: PathBuf,
    /// Unknown without a proc file system.
    number: Option<u64>,
    /// Unmounted, or left to a successor.
    released: AtomicBool,
    connection: Arc<Connection>,
    pub(super) notices: Notices,
}

impl Drop for FuseMount {
    /// What was neither unmounted nor left to a successor is unmounted.
    fn drop(&mut self) {
        if let Err(e) = self.unmount() {
            tracing::warn!("{e:#}");
        }
    }
}

impl FuseMount {
    /// Mounts on the mountpoint of `host`, read-only unless `writable`.
    ///
    /// # Errors
    /// Not a usable directory, a dead mount in its place, or the kernel refuses.
    pub fn new(host: &Arc<Privileged>, writable: bool) -> anyhow::Result<Self> {
        let (mountpoint, number, descriptor) = host.mount(writable)?;
        Self::on(host, mountpoint, number, descriptor, None)
    }

    /// Goes on with a mount on the mountpoint of `host`: a predecessor mounted it and agreed with the kernel on
    /// `negotiated`; `descriptor` is (a duplicate of) its connection, whose number is `number`. Asks
    /// nothing of the mount, which nobody may be serving yet.
    ///
    /// # Errors
    /// The descriptor is no connection, or another connection's mount is there.
    pub fn inherit(
        host: &Arc<Privileged>,
        descriptor: OwnedFd,
        number: u64,
        negotiated: Negotiated,
    ) -> anyhow::Result<Self> {
        if nix::sys::stat::fstat(&descriptor).context("look at the connection")?.st_rdev != FUSE_DEVICE {
            bail!("the supervisor's descriptor is no FUSE connection");
        }
        if negotiated.rings() {
            bail!("the mount was served through io_uring, which nobody can go on with; mount it anew");
        }
        let mountpoint = host.inherit(number)?;
        Self::on(host, mountpoint, Some(number), descriptor, Some(negotiated))
    }

    fn on(
        host: &Arc<Privileged>,
        mountpoint: PathBuf,
        number: Option<u64>,
        descriptor: OwnedFd,
        negotiated: Option<Negotiated>,
    ) -> anyhow::Result<Self> {
        let connection = Connection::new(descriptor, negotiated).context("set up the FUSE descriptor")?;
        Ok(Self {
            host: Arc::clone(host),
            mountpoint,
            number,
            released: AtomicBool::new(false),
            connection: Arc::new(connection),
            notices: Notices::default(),
        })
    }

    /// The kernel's number of the connection.
    ///
    /// # Errors
    /// Unknown without a proc file system.
    pub fn number(&self) -> anyhow::Result<u64> {
        self.number.with_context(|| format!("the mount on {} has no identity", self.mountpoint.display()))
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
        if self.released.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        if !self.end_notices() {
            self.abort();
        }
        self.host.unmount(self.has_ended()).with_context(|| format!("unmount {}", self.mountpoint.display()))
    }

    /// The same for a mount whose connection others hold: whoever still uses it would wait for ever, and
    /// no signal would end that. So the connection is ended as it is when its last holder is gone.
    ///
    /// # Errors
    /// The kernel refuses to unmount.
    pub fn unmount_held(&self) -> anyhow::Result<()> {
        let end = self.connection_file(ConnectionFile::Abort);
        let unmounted = self.unmount();
        // What stays mounted, below another mount perhaps, has nobody to serve it either.
        if let Err(e) = end.and_then(|mut file| file.write_all(b"1")) {
            tracing::warn!("the connection of {} goes on: {e}", self.mountpoint.display());
        }
        unmounted
    }

    /// Opens one of the kernel's files of this connection to be written, while the mount is there.
    ///
    /// # Errors
    /// There is no such file, or no mount.
    pub fn connection_file(&self, file: ConnectionFile) -> io::Result<File> {
        self.host.connection_file(file)
    }

    /// True if the connection has ended, so that nobody can serve it.
    pub fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.descriptor(), PollFlags::empty())];
        poll(&mut ended, PollTimeout::ZERO).is_ok()
            && ended[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
    }

    /// Ends the connection, and with it whatever waits for its answers: this process could not end while
    /// a thread of its own does.
    fn abort(&self) {
        tracing::warn!("{}: the kernel waits for reads; they end now", self.mountpoint.display());
        if let Err(e) = self.host.abort() {
            tracing::warn!("{e:#}");
        }
    }

    /// For an ended connection: true if its mount is still there, so that somebody aborted it.
    pub fn is_aborted(&self) -> bool {
        !self.host.is_gone_within(FORCED_UNMOUNT).unwrap_or(true)
    }

    /// Leaves the mount to a successor: it stays in place when this value is dropped, and requests that
    /// fail from here on are left unanswered for it.
    pub fn abandon(&self) {
        if !self.end_notices() {
            tracing::warn!("the kernel is still being told of a change, and this process ends only then");
        }
        self.connection.left.store(true, Ordering::Release);
        self.released.store(true, Ordering::Release);
    }
}
