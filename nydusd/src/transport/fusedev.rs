//! Host FUSE: a mount on this host, served from `/dev/fuse`.
//!
//! N threads each block in read(2) on the connection's descriptor. All requests but READ go
//! through fuse-backend-rs's server, which answers inline from memory. A READ is answered
//! inline when its data is in the cache; otherwise it is handed to storage with a completion
//! that writes the reply, from whatever thread it runs on. So no thread here ever waits for a
//! source, and any number of stalled reads leave metadata and cached data prompt.
//!
//! A read that waits for its source can not be interrupted: the pages it fills belong to the
//! page cache, and whoever waits for a page may be killed without an answer from us.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, FuseSession, Reader, Writer};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MntFlags, umount2};
use storage::backend::Priority;
use storage::read::ReadSlice;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::message::{self, InHeader, OUT_HEADER_LEN, OutHeader, ReadIn};
use super::mounted::MountIdentity;
use crate::adapter::{Adapter, ReadPlan};
use crate::failures::Failure;
use crate::metrics::InflightGuard;
use crate::why::Wait;

/// Source in the mount table (contract 1.8).
const SOURCE: &str = "rafs";

/// A whole request or reply: 1 MiB of data and a page for its head. The kernel demands that
/// the receive buffer hold the largest write it was allowed. Pages are touched as used.
const BUFFER_SIZE: usize = (1 << 20) + 4096;

/// Stack of a serving thread: frames here are small, buffers are on the heap.
const STACK_SIZE: usize = 256 << 10;

/// What `umount -f` takes at most from the end of the connection to the end of the mount.
const FORCED_UNMOUNT: Duration = Duration::from_millis(200);

/// A mounted connection to the kernel.
pub struct FuseMount {
    mountpoint: PathBuf,
    /// Unknown without a proc file system.
    identity: Option<MountIdentity>,
    /// Taken to unmount.
    session: Mutex<Option<FuseSession>>,
    connection: Arc<Connection>,
}

/// The descriptor that requests come from and replies go to.
struct Connection {
    fd: OwnedFd,
}

impl FuseMount {
    /// Mounts on the directory `mountpoint`, read-only.
    ///
    /// # Errors
    /// Not a usable directory, a dead mount in its place, or the kernel refuses.
    pub fn new(mountpoint: &Path) -> anyhow::Result<Self> {
        let mountpoint = usable_mountpoint(mountpoint)?;
        let mut session = FuseSession::new(&mountpoint, SOURCE, "", true)?;
        session.mount().with_context(|| format!("mount on {}", mountpoint.display()))?;
        let identity = MountIdentity::at(&mountpoint)
            .inspect_err(|e| tracing::warn!("the mount on {} has no identity: {e}", mountpoint.display()))
            .ok();
        let file = session.get_fuse_file().context("the FUSE session has no descriptor")?;
        let fd = OwnedFd::from(file.try_clone().context("duplicate the FUSE descriptor")?);
        // The crate asks for non-blocking reads; our threads wait in read(2).
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_RDWR)).context("make the FUSE descriptor blocking")?;
        let connection = Arc::new(Connection { fd });
        Ok(Self { mountpoint, identity, session: Mutex::new(Some(session)), connection })
    }

    /// The canonical mountpoint.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Starts `count` threads that serve `adapter` until the kernel ends the connection. Each
    /// calls `ended` when it stops, also after a panic. The receiver gets a message when the
    /// kernel's FUSE_INIT was answered: from then on the mount answers whoever asks.
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
        ended: impl Fn(anyhow::Result<()>) + Clone + Send + 'static,
    ) -> anyhow::Result<(Vec<JoinHandle<()>>, Receiver<()>)> {
        let (initialized, answers) = channel();
        let server = Arc::new(Server::new(Arc::clone(&adapter)));
        let threads = (0..count)
            .map(|number| {
                let mut worker = Worker {
                    adapter: Arc::clone(&adapter),
                    server: Arc::clone(&server),
                    connection: Arc::clone(&self.connection),
                    slices: Vec::new(),
                    initialized: initialized.clone(),
                };
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
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok((threads, answers))
    }

    /// Takes the mount out of the tree at once, whoever still uses it. Repeated calls and a
    /// mount that is gone already are fine.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unmount(&self) -> anyhow::Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut session) = session else { return Ok(()) };
        let context = || format!("unmount {}", self.mountpoint.display());
        session.umount().with_context(context)?;
        // The crate takes a connection that has ended for a mount that is gone.
        self.unmount_dead().with_context(context)
    }

    /// For an ended connection: true if its mount is still there, so that somebody aborted it.
    pub fn is_aborted(&self) -> bool {
        let gone = |identity: &MountIdentity| identity.wait_gone(FORCED_UNMOUNT).unwrap_or(true);
        self.identity.as_ref().is_some_and(|identity| !gone(identity))
    }

    /// Removes the mount of an ended connection, and no other.
    fn unmount_dead(&self) -> anyhow::Result<()> {
        let path = &self.mountpoint;
        let Some(ours) = &self.identity else { return Ok(()) };
        if ours.wait_gone(Duration::ZERO)? {
            return Ok(());
        }
        if MountIdentity::at(path)? != *ours {
            bail!("another mount covers the dead one; unmount both by hand");
        }
        // The numbers of a mount that is gone may be a successor's: that one answers.
        if nix::sys::statvfs::statvfs(path) != Err(Errno::ENOTCONN) {
            return Ok(());
        }
        Ok(umount2(path, MntFlags::MNT_DETACH)?)
    }

    /// Leaves the mount in place when this value is dropped.
    pub fn abandon(&self) {
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
        Ok((true, real)) if MountIdentity::is_fuse_of(&real, SOURCE).unwrap_or(false) => bail!(
            "the mountpoint {0} is served by another nydusd; unmount it first with `umount {0}`, or take another directory",
            path.display()
        ),
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

impl Connection {
    /// Writes one reply. A request that is gone (interrupted, connection ended) needs none.
    fn reply(&self, header: OutHeader, data: &[u8]) {
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(data)];
        match nix::sys::uio::writev(&self.fd, &parts) {
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTCONN) => {}
            Err(e) => {
                tracing::warn!("reply to FUSE request {}: {e}", header.unique);
                if header.error == 0 {
                    self.reply(OutHeader::refusal(header.unique, libc::EIO), &[]);
                }
            }
        }
    }
}

/// A READ on its way. Answers EIO if it is dropped unanswered, so that no reader waits for
/// an answer that nobody will give.
struct PendingRead {
    connection: Arc<Connection>,
    unique: u64,
    plan: ReadPlan,
    offset: u64,
    slices: Vec<ReadSlice>,
    started: Instant,
    answered: bool,
    /// Recorded, if that is wanted.
    wait: Option<Wait>,
    /// Ends with the answer.
    inflight: Option<InflightGuard>,
}

impl PendingRead {
    fn finish(mut self, result: storage::Result<Vec<u8>>) {
        // Who has the answer must not find the request waiting.
        drop(self.inflight.take());
        let len = self.plan.len;
        let result = result.and_then(|data| match data.len() == len as usize {
            true => Ok(data),
            false => Err(storage::Error::new(
                storage::ErrorKind::Io,
                format!("storage answered {} bytes instead of {len}", data.len()),
            )),
        });
        let metrics = self.plan.mount.metrics();
        match result {
            Ok(data) => {
                metrics.record_wait(self.plan.nid, Some(len), self.started.elapsed());
                // Its reader may ask at once why it waited.
                if let Some(mut wait) = self.wait.take() {
                    wait.succeed();
                }
                self.connection.reply(OutHeader::data(self.unique, len), &data);
                self.answered = true;
            }
            Err(error) => {
                metrics.record_wait(self.plan.nid, None, self.started.elapsed());
                drop(self.wait.take());
                if error.kind() == storage::ErrorKind::TimedOut {
                    self.plan.mount.echoes().timed_out(self.plan.nid, self.offset, len, self.started);
                }
                self.connection.reply(OutHeader::refusal(self.unique, libc::EIO), &[]);
                self.answered = true;
                let slices = std::mem::take(&mut self.slices);
                report(&self.plan, self.offset, slices, &error);
            }
        }
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.reply(OutHeader::refusal(self.unique, libc::EIO), &[]);
        }
    }
}

fn report(plan: &ReadPlan, offset: u64, slices: Vec<ReadSlice>, error: &storage::Error) {
    let cause = crate::logging::chain(error);
    plan.mount.failures().report(Failure { nid: plan.nid, offset, len: plan.len, slices, cause });
}

/// One serving thread.
struct Worker {
    adapter: Arc<Adapter>,
    server: Arc<Server<Arc<Adapter>>>,
    connection: Arc<Connection>,
    /// Chunks of the current READ; kept for its capacity.
    slices: Vec<ReadSlice>,
    /// Told when FUSE_INIT was answered.
    initialized: Sender<()>,
}

impl Worker {
    /// Serves until the kernel ends the connection.
    fn run(&mut self) -> anyhow::Result<()> {
        let mut request = vec![0; BUFFER_SIZE];
        let mut reply = vec![0; BUFFER_SIZE];
        loop {
            match nix::unistd::read(&self.connection.fd, &mut request) {
                Ok(len) => self.answer(&mut request[..len], &mut reply),
                // ENOENT: the request was interrupted before we took it.
                Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => {}
                Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
                Err(e) => return Err(e).context("read from /dev/fuse"),
            }
        }
    }

    /// Answers one request. A panic fails this request and no other.
    fn answer(&mut self, request: &mut [u8], reply: &mut [u8]) {
        let Some((header, _)) = message::parse(request) else {
            tracing::warn!("a FUSE request of {} bytes is too short", request.len());
            return;
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| match header.opcode {
            message::OP_READ => {
                self.read(&header, &request[size_of::<InHeader>()..], reply);
                true
            }
            opcode if opcode > message::OP_MAX => {
                self.connection.reply(OutHeader::refusal(header.unique, libc::ENOSYS), &[]);
                true
            }
            _ => self.delegate(request, reply),
        }));
        let silent = [message::OP_FORGET, message::OP_BATCH_FORGET, message::OP_INTERRUPT];
        // After an answer a second one is refused by the kernel and does no harm.
        if !matches!(outcome, Ok(true)) && !silent.contains(&header.opcode) {
            self.connection.reply(OutHeader::refusal(header.unique, libc::EIO), &[]);
        }
        if outcome.is_err() {
            tracing::error!("FUSE request {} of inode {:#x} panicked", header.opcode, header.nodeid);
        }
        if header.opcode == message::OP_INIT {
            // Whoever started us may have stopped waiting.
            let _ = self.initialized.send(());
        }
    }

    /// Everything but READ: fuse-backend-rs decodes, calls the adapter and replies. False if
    /// it may have failed to reply.
    fn delegate(&self, request: &mut [u8], reply: &mut [u8]) -> bool {
        let fd = self.connection.fd.as_raw_fd();
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request));
        let writer = FuseDevWriter::<()>::new(fd, reply);
        let result = match (reader, writer) {
            (Ok(reader), Ok(writer)) => {
                self.server.handle_message(reader, Writer::FuseDev(writer), None, None).map_err(io_error)
            }
            (Err(e), _) | (_, Err(e)) => Err(io::Error::other(e.to_string())),
        };
        if let Err(e) = result {
            // The usual reason is a request that was gone before its answer.
            tracing::debug!("FUSE request: {e}");
            return false;
        }
        true
    }

    fn read(&mut self, header: &InHeader, body: &[u8], reply: &mut [u8]) {
        let started = Instant::now();
        let refuse = |errno| self.connection.reply(OutHeader::refusal(header.unique, errno), &[]);
        let Ok((read, _)) = ReadIn::read_from_prefix(body) else { return refuse(libc::EINVAL) };
        let node = crate::node::NodeId(header.nodeid);
        // A reply fits the buffer, whatever the kernel asks for.
        let size = read.size.min((BUFFER_SIZE - OUT_HEADER_LEN) as u32);
        self.slices.clear();
        let plan = match self.adapter.plan_read(node, read.offset, size, &mut self.slices) {
            Ok(plan) => plan,
            Err(e) => return refuse(e.raw_os_error().unwrap_or(libc::EIO)),
        };
        let out = OutHeader::data(header.unique, plan.len);
        let data = &mut reply[..plan.len as usize];
        match plan.mount.reader().try_read(&self.slices, data) {
            Ok(true) => {
                let elapsed = started.elapsed();
                plan.mount.metrics().record_read(plan.nid, Some(plan.len), elapsed);
                if let Some(recorder) = plan.mount.recorder() {
                    recorder.hit(plan.nid, read.offset, plan.len, header.pid, elapsed);
                }
                self.connection.reply(out, data);
            }
            Ok(false) if plan.mount.echoes().is_echo(plan.nid, read.offset, plan.len) => {
                plan.mount.metrics().record_read(plan.nid, None, started.elapsed());
                refuse(libc::EIO);
            }
            Ok(false) => self.submit(header, plan, read.offset, started),
            Err(error) => {
                plan.mount.metrics().record_read(plan.nid, None, started.elapsed());
                refuse(libc::EIO);
                report(&plan, read.offset, self.slices.clone(), &error);
            }
        }
    }

    /// Leaves a READ to storage; its completion replies.
    fn submit(&self, header: &InHeader, plan: ReadPlan, offset: u64, started: Instant) {
        let inflight = self.adapter.inflight().enter(plan.nid.0, header.opcode, header.unique, started);
        let reader = Arc::clone(plan.mount.reader());
        let wait = plan
            .mount
            .recorder()
            .map(|recorder| recorder.wait(plan.nid, offset, plan.len, header.pid, started));
        let pending = PendingRead {
            connection: Arc::clone(&self.connection),
            unique: header.unique,
            plan,
            offset,
            slices: self.slices.clone(),
            started,
            answered: false,
            wait,
            inflight: Some(inflight),
        };
        reader.submit(
            self.slices.clone(),
            Priority::OnDemand,
            Box::new(move |result| pending.finish(result)),
        );
    }
}

fn io_error(error: fuse_backend_rs::Error) -> io::Error {
    io::Error::other(error.to_string())
}
