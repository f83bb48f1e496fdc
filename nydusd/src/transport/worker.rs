//! Requests and their answers.
//!
//! All requests but INIT and READ go through fuse-backend-rs's server, which answers inline from
//! memory. A READ is answered inline when its data is in the cache; otherwise it is handed to
//! storage with a completion that writes the reply, from whatever thread it runs on. So no thread
//! here ever waits for a source, and any number of stalled reads leave metadata and cached data
//! prompt.
//!
//! A read that waits for its source can not be interrupted: the pages it fills belong to the
//! page cache, and whoever waits for a page may be killed without an answer from us.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::Context as _;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use storage::backend::Priority;
use storage::read::ReadSlice;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::init::{self, Answer, Negotiated};
use super::message::{self, InHeader, OUT_HEADER_LEN, OutHeader, ReadIn};
use super::streams::Streams;
use crate::adapter::{Adapter, Planned, ReadPlan};
use crate::failures::{Failure, Failures};
use crate::metrics::InflightGuard;
use crate::pending::{Abandon, PendingGuard};
use crate::why::Wait;

/// A whole request or reply: 1 MiB of data and a page for its head. The kernel demands that
/// the receive buffer hold the largest write it was allowed. Pages are touched as used.
pub(super) const BUFFER_SIZE: usize = (1 << 20) + 4096;

/// Most bytes of a request that carries no data: a header and two names.
const REQUEST_SIZE: usize = 8 << 10;

/// The descriptor that requests come from and replies go to.
///
/// There is one for all threads, and no clone of it: a request that was read on a clone is lost with
/// its reader, one that was read here waits for whoever holds the descriptor next.
pub(super) struct Connection {
    pub fd: OwnedFd,
    /// Known once the kernel's FUSE_INIT was answered.
    pub negotiated: OnceLock<Negotiated>,
    /// Requests that a predecessor took are refused instead of answered.
    pub flush: AtomicBool,
    /// A successor answers what can not be answered any more.
    pub left: AtomicBool,
    /// What is read from front to back.
    streams: Streams,
}

impl Connection {
    /// Requests come from `fd`, which is made to block. `negotiated` if that has happened before.
    pub fn new(fd: OwnedFd, negotiated: Option<Negotiated>) -> io::Result<Self> {
        // Whoever had it before may not have wanted to wait in read(2).
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_RDWR))?;
        let negotiated = negotiated.map_or_else(OnceLock::new, OnceLock::from);
        Ok(Self { fd, negotiated, flush: false.into(), left: false.into(), streams: Streams::default() })
    }

    /// Asks the kernel for every request again that was taken and not answered.
    pub fn resend(&self) -> io::Result<()> {
        nix::unistd::write(&self.fd, OutHeader::resend().as_bytes())?;
        Ok(())
    }

    /// Writes a reply with a body that is shorter than 4 GiB.
    fn answer(&self, unique: u64, body: &[u8]) {
        self.reply(OutHeader::data(unique, body.len() as u32), body);
    }

    /// Writes one reply. A request that is gone (interrupted, connection ended) needs none.
    pub fn reply(&self, header: OutHeader, data: &[u8]) {
        if header.error != 0 && self.left.load(Ordering::Acquire) {
            return;
        }
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

/// The answer to a READ: given once, by who comes first.
struct Reply {
    connection: Arc<Connection>,
    unique: u64,
    answered: AtomicBool,
    /// Ends with the answer. Held to take it.
    inflight: Mutex<Option<InflightGuard>>,
}

impl Reply {
    /// Answers, unless that is done.
    fn give(&self, header: OutHeader, data: &[u8]) {
        if self.answered.swap(true, Ordering::Relaxed) {
            return;
        }
        // Who has the answer must not find the request waiting.
        drop(self.inflight.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.connection.reply(header, data);
    }
}

impl Abandon for Reply {
    fn abandon(&self) {
        self.give(OutHeader::refusal(self.unique, libc::EIO), &[]);
    }
}

/// A READ on its way. Answers EIO if it is dropped unanswered, so that no reader waits for
/// an answer that nobody will give.
struct PendingRead {
    reply: Arc<Reply>,
    plan: ReadPlan,
    offset: u64,
    slices: Vec<ReadSlice>,
    started: Instant,
    /// Where its failure would be reported.
    failures: Arc<Failures>,
    /// Recorded, if that is wanted.
    wait: Option<Wait>,
    /// Goes behind the answer.
    _pending: PendingGuard,
}

impl PendingRead {
    fn finish(mut self, result: storage::Result<Vec<u8>>) {
        let len = self.plan.len;
        let result = result.and_then(|data| match data.len() == len as usize {
            true => Ok(data),
            false => Err(storage::Error::new(
                storage::ErrorKind::Io,
                format!("storage answered {} bytes instead of {len}", data.len()),
            )),
        });
        let metrics = self.plan.mount.metrics();
        let unique = self.reply.unique;
        match result {
            // Its reader has an error, and nobody waits.
            _ if self.reply.answered.load(Ordering::Relaxed) => {
                metrics.record_wait(self.plan.nid, None, self.started.elapsed());
            }
            Ok(data) => {
                metrics.record_wait(self.plan.nid, Some(len), self.started.elapsed());
                // Its reader may ask at once why it waited.
                if let Some(mut wait) = self.wait.take() {
                    wait.succeed();
                }
                self.reply.give(OutHeader::data(unique, len), &data);
            }
            Err(error) => {
                metrics.record_wait(self.plan.nid, None, self.started.elapsed());
                drop(self.wait.take());
                if error.kind() == storage::ErrorKind::TimedOut {
                    self.plan.mount.echoes().timed_out(self.plan.nid, self.offset, len, self.started);
                }
                self.reply.abandon();
                let slices = std::mem::take(&mut self.slices);
                report(&self.failures, &self.plan, self.offset, slices, &error);
            }
        }
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        self.reply.abandon();
    }
}

fn report(failures: &Failures, plan: &ReadPlan, offset: u64, slices: Vec<ReadSlice>, error: &storage::Error) {
    failures.report(Failure {
        rafs: Arc::clone(plan.mount.rafs_shared()),
        mountpoint: plan.mount.mountpoint().to_owned(),
        nid: plan.nid,
        offset,
        len: plan.len,
        slices,
        cause: crate::logging::chain(error),
    });
}

/// One serving thread.
pub(super) struct Worker {
    adapter: Arc<Adapter>,
    server: Arc<Server<Arc<Adapter>>>,
    connection: Arc<Connection>,
    /// Chunks of the current READ; kept for its capacity.
    slices: Vec<ReadSlice>,
    /// Told when FUSE_INIT was answered.
    initialized: Sender<()>,
}

impl Worker {
    pub fn new(
        adapter: Arc<Adapter>,
        server: Arc<Server<Arc<Adapter>>>,
        connection: Arc<Connection>,
        initialized: Sender<()>,
    ) -> Self {
        Self { adapter, server, connection, slices: Vec::new(), initialized }
    }

    /// Serves until the kernel ends the connection.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let mut request = vec![0; BUFFER_SIZE];
        // A page that is not there can not be brought in for a thread that is being killed: the kernel
        // would fail the request that it was about to give us.
        request[..REQUEST_SIZE].fill(1);
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
        let flushed = header.unique & message::RESENT != 0 && self.connection.flush.load(Ordering::Relaxed);
        if header.opcode == message::OP_WRITE && header.unique & message::RESENT != 0 {
            message::place_write(request);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| match header.opcode {
            _ if flushed => false,
            message::OP_READ => {
                self.read(&header, &request[size_of::<InHeader>()..], reply);
                true
            }
            message::OP_INIT => {
                self.init(&header, &request[size_of::<InHeader>()..]);
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
    }

    fn init(&self, header: &InHeader, body: &[u8]) {
        match init::answer(&self.adapter, body) {
            Ok(Answer::Retry(out)) => self.connection.answer(header.unique, out.as_bytes()),
            Ok(Answer::Agreed(negotiated, out)) => {
                tracing::info!("FUSE 7.{}, flags {:#x}", negotiated.minor, negotiated.flags);
                // The kernel asks once in a connection's life.
                let _ = self.connection.negotiated.set(negotiated);
                self.connection.answer(header.unique, out.as_bytes());
                // Whoever started us may have stopped waiting.
                let _ = self.initialized.send(());
            }
            Err(e) => {
                tracing::error!("the mount can not be served: {e}");
                self.connection.reply(OutHeader::refusal(header.unique, libc::EPROTO), &[]);
            }
        }
    }

    /// Everything else: fuse-backend-rs decodes, calls the adapter and replies. False if
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
            Ok(Planned::Chunks(plan)) => plan,
            Ok(Planned::Host(host, nid)) => {
                match host.read(nid, read.offset, &mut reply[..size as usize]) {
                    Ok(len) => self.connection.answer(header.unique, &reply[..len]),
                    Err(e) => refuse(e.raw_os_error().unwrap_or(libc::EIO)),
                }
                return;
            }
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
                if let Some(ahead) = self.connection.streams.follow(node, read.offset, plan.len) {
                    self.read_ahead(&plan, ahead);
                }
            }
            Ok(false) if plan.mount.echoes().is_echo(plan.nid, read.offset, plan.len) => {
                plan.mount.metrics().record_read(plan.nid, None, started.elapsed());
                refuse(libc::EIO);
            }
            Ok(false) => self.submit(header, plan, read.offset, started),
            Err(error) => {
                plan.mount.metrics().record_read(plan.nid, None, started.elapsed());
                refuse(libc::EIO);
                report(self.adapter.failures(), &plan, read.offset, self.slices.clone(), &error);
            }
        }
    }

    /// Has what is local of these bytes of a file read into the page cache.
    fn read_ahead(&mut self, plan: &ReadPlan, ahead: Range<u64>) {
        self.slices.clear();
        let len = u32::try_from(ahead.end - ahead.start).unwrap_or(u32::MAX);
        // Who reads there meets the error.
        if plan.mount.rafs().read(plan.nid, ahead.start, len, &mut self.slices).is_ok() {
            plan.mount.reader().will_need(&self.slices);
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
        let reply = Arc::new(Reply {
            connection: Arc::clone(&self.connection),
            unique: header.unique,
            answered: AtomicBool::new(false),
            inflight: Mutex::new(Some(inflight)),
        });
        let pending = PendingRead {
            _pending: plan.mount.pending().enter(Arc::<Reply>::clone(&reply)),
            reply,
            plan,
            offset,
            slices: self.slices.clone(),
            started,
            failures: Arc::clone(self.adapter.failures()),
            wait,
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
