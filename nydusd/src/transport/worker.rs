//! Requests from `/dev/fuse` and their answers.
//!
//! INIT is answered by [`super::init`], a READ by [`super::reads`], all else by fuse-backend-rs's server
//! from memory. [`super::uring`] does the same for requests that come through rings.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Context as _;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use zerocopy::IntoBytes as _;

use super::init::{self, Answer, Kernel, Negotiated};
use super::message::{self, InHeader, OUT_HEADER_LEN, OutHeader};
use super::reads::{Outcome, Reads, Way};
use super::streams::Streams;
use super::uring::Rings;
use crate::adapter::Adapter;
use crate::node::NodeId;
use crate::passthrough::repeat;

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
    pub streams: Arc<Streams>,
    /// Rings that wait for FUSE_INIT.
    pub rings: Mutex<Option<Rings>>,
    /// Requests that take long.
    aside: Mutex<Aside>,
}

/// Requests that wait for a thread that others do not wait for. There are no more of them than the kernel has under way.
#[derive(Debug, Default)]
struct Aside {
    requests: VecDeque<Vec<u8>>,
    /// There is such a thread. It ends when there are no more.
    busy: bool,
}

impl Connection {
    /// Requests come from `fd`, which is made to block. `negotiated` if that has happened before.
    pub fn new(fd: OwnedFd, negotiated: Option<Negotiated>) -> io::Result<Self> {
        // Whoever had it before may not have wanted to wait in read(2).
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_RDWR))?;
        let negotiated = negotiated.map_or_else(OnceLock::new, OnceLock::from);
        Ok(Self {
            fd,
            negotiated,
            flush: false.into(),
            left: false.into(),
            streams: Arc::default(),
            rings: Mutex::default(),
            aside: Mutex::default(),
        })
    }

    /// Asks the kernel for every request again that was taken and not answered.
    pub fn resend(&self) -> io::Result<()> {
        nix::unistd::write(&self.fd, OutHeader::resend().as_bytes())?;
        Ok(())
    }

    fn aside(&self) -> MutexGuard<'_, Aside> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a reply with a body that is shorter than 4 GiB.
    fn reply_data(&self, unique: u64, body: &[u8]) {
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

impl Way for Arc<Connection> {
    fn answer(&self, header: OutHeader, data: Vec<u8>) {
        self.reply(header, &data);
    }
}

/// One serving thread.
pub(super) struct Worker {
    adapter: Arc<Adapter>,
    server: Arc<Server<Arc<Adapter>>>,
    connection: Arc<Connection>,
    reads: Reads,
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
        let reads = Reads::new(Arc::clone(&adapter), Arc::clone(&connection.streams));
        Self { adapter, server, connection, reads, initialized }
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
                Ok(len) if self.takes_long(&request[..len]) && self.set_aside(&request[..len]) => {}
                Ok(len) => self.answer(&mut request[..len], &mut reply),
                // ENOENT: the request was interrupted before we took it.
                Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => {}
                Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
                Err(e) => return Err(e).context("read from /dev/fuse"),
            }
        }
    }

    /// True if a request is for a file that has to be searched for.
    fn takes_long(&self, request: &[u8]) -> bool {
        let parsed = message::parse(request).filter(|_| self.adapter.table().inherits());
        parsed.is_some_and(|(header, body)| {
            let nodes = message::nodes(&header, body);
            nodes.into_iter().flatten().any(|node| self.adapter.must_search(NodeId(node)))
        })
    }

    /// Leaves a request to a thread of its own; false if there can be none.
    fn set_aside(&self, request: &[u8]) -> bool {
        let mut aside = self.connection.aside();
        if !aside.busy {
            let Self { adapter, server, connection, initialized, .. } = self;
            let worker = Self::new(
                Arc::clone(adapter),
                Arc::clone(server),
                Arc::clone(connection),
                initialized.clone(),
            );
            let thread = std::thread::Builder::new().name("fuse-aside".to_owned());
            if thread.spawn(move || worker.answer_aside()).is_err() {
                return false;
            }
            aside.busy = true;
        }
        aside.requests.push_back(request.to_vec());
        true
    }

    /// Answers what was set aside.
    fn answer_aside(mut self) {
        let mut reply = vec![0; BUFFER_SIZE];
        loop {
            let mut aside = self.connection.aside();
            let Some(mut request) = aside.requests.pop_front() else {
                aside.busy = false;
                return;
            };
            drop(aside);
            self.answer(&mut request, &mut reply);
        }
    }

    /// Answers one request. A panic fails this request and no other.
    fn answer(&mut self, request: &mut [u8], reply: &mut [u8]) {
        let Some((header, _)) = message::parse(request) else {
            tracing::warn!("a FUSE request of {} bytes is too short", request.len());
            return;
        };
        let repeated = header.unique & message::RESENT != 0;
        let flushed = repeated && self.connection.flush.load(Ordering::Relaxed);
        if header.opcode == message::OP_WRITE && repeated {
            message::place_write(request);
        }
        let extended = self.connection.negotiated.get().is_some_and(Negotiated::extends_setxattr);
        let request = if extended { message::fold_setxattr(request) } else { request };
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
            _ => repeat::answering(repeated, || self.delegate(request, reply)),
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
        let rings = || self.connection.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = Kernel::Host { rings: rings().is_some() };
        match init::answer(&self.adapter, body, kernel) {
            Ok(Answer::Retry(out)) => self.connection.reply_data(header.unique, out.as_bytes()),
            Ok(Answer::Agreed(negotiated, out)) => {
                tracing::info!("FUSE 7.{}, flags {:#x}", negotiated.minor, negotiated.flags);
                // The kernel asks once in a connection's life.
                let _ = self.connection.negotiated.set(negotiated);
                self.connection.reply_data(header.unique, out.as_bytes());
                match rings().take() {
                    Some(rings) if negotiated.rings() => rings.start(&self.connection),
                    Some(_) => super::uring::not_offered(),
                    None => {}
                }
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
        let reply = &mut reply[..BUFFER_SIZE - OUT_HEADER_LEN];
        let way = || Box::new(Arc::clone(&self.connection)) as Box<dyn Way>;
        match self.reads.read(header, body, reply, way) {
            Outcome::Data(len) => {
                self.connection.reply_data(header.unique, &reply[..len as usize]);
                self.reads.read_ahead();
            }
            Outcome::Refused(errno) => self.connection.reply(OutHeader::refusal(header.unique, errno), &[]),
            Outcome::Later => {}
        }
    }
}

fn io_error(error: fuse_backend_rs::Error) -> io::Error {
    io::Error::other(error.to_string())
}
