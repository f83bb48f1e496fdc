//! Answers to requests of a guest.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backend_rs::api::server::Server;
use zerocopy::IntoBytes as _;

use crate::adapter::Adapter;
use crate::transport::composer::Composer;
use crate::transport::init::{self, Answer, Kernel};
use crate::transport::message::{self, InHeader, OUT_HEADER_LEN, OutHeader};
use crate::transport::reads::{Outcome, Reads, Way};
use crate::transport::streams::Streams;
use crate::transport::vhost::Request;

/// A whole request or answer: 1 MiB of data and a page for its head.
const BUFFER_SIZE: usize = (1 << 20) + 4096;

/// Bytes of a buffer that are kept between requests; larger ones are given back.
const KEPT: usize = 256 << 10;

/// A request that was copied out of the guest's memory: nobody changes it any more.
pub(super) struct Asked {
    pub header: InHeader,
    message: Vec<u8>,
    request: Request,
}

impl Asked {
    /// Copies `request`.
    ///
    /// # Errors
    /// It is no FUSE request. It is given back empty.
    pub fn new(request: Request) -> io::Result<Self> {
        let mut message = Vec::new();
        request.copy_to(&mut message, BUFFER_SIZE)?;
        let Some((header, _)) = message::parse(&message) else {
            return Err(io::Error::other(format!("{} bytes are too few", message.len())));
        };
        if header.len as usize != message.len() {
            let why = format!("its length is {}, and there are {} bytes", header.len, message.len());
            return Err(io::Error::other(why));
        }
        Ok(Self { header, message, request })
    }

    /// What is behind the header.
    pub fn body(&self) -> &[u8] {
        &self.message[size_of::<InHeader>()..]
    }

    /// True if the guest waits for an answer.
    fn is_answered(&self) -> bool {
        let silent = [message::OP_FORGET, message::OP_BATCH_FORGET, message::OP_INTERRUPT];
        !silent.contains(&self.header.opcode)
    }

    /// Answers with an errno, where there is to be an answer.
    pub fn refuse(self, errno: i32) {
        if self.is_answered() {
            give(self.request, OutHeader::refusal(self.header.unique, errno), &[]);
        }
    }
}

/// Writes an answer. A guest that left no room for it gets none.
fn give(request: Request, header: OutHeader, data: &[u8]) {
    if let Err(e) = request.answer(&[header.as_bytes(), data]) {
        tracing::warn!("the answer to a FUSE request of the guest is lost: {e}");
    }
}

/// The answer to a READ, which may have to wait.
#[derive(Clone)]
struct ToGuest(Arc<Mutex<Option<Request>>>);

impl ToGuest {
    fn new(request: Request) -> Self {
        Self(Arc::new(Mutex::new(Some(request))))
    }

    fn give(&self, header: OutHeader, data: &[u8]) {
        if let Some(request) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            give(request, header, data);
        }
    }
}

impl Way for ToGuest {
    fn answer(&self, header: OutHeader, data: Vec<u8>) {
        self.give(header, &data);
    }
}

/// What all threads of a device have together.
pub(super) struct Shared {
    server: Arc<Server<Arc<Adapter>>>,
    /// What is read from front to back.
    streams: Arc<Streams>,
    /// The guest sends the longer FUSE_SETXATTR.
    extends_setxattr: AtomicBool,
}

impl Shared {
    pub fn new(server: Server<Arc<Adapter>>) -> Self {
        Self { server: Arc::new(server), streams: Arc::default(), extends_setxattr: AtomicBool::new(false) }
    }
}

/// What one thread needs to answer requests.
pub(super) struct Answers {
    adapter: Arc<Adapter>,
    shared: Arc<Shared>,
    composer: Composer,
    reads: Reads,
    /// Kept for its capacity.
    answer: Vec<u8>,
}

impl Answers {
    /// `null` swallows what is written to it.
    pub fn new(adapter: &Arc<Adapter>, shared: &Arc<Shared>, null: File) -> Self {
        Self {
            adapter: Arc::clone(adapter),
            shared: Arc::clone(shared),
            composer: Composer::new(Arc::clone(&shared.server), null),
            reads: Reads::new(Arc::clone(adapter), Arc::clone(&shared.streams)),
            answer: Vec::new(),
        }
    }

    /// Answers a request, or leaves a READ to storage.
    pub fn answer(&mut self, asked: Asked) {
        // What the guest left room for, and no more than there is to say.
        let room = usize::try_from(asked.request.writable()).unwrap_or(usize::MAX).min(BUFFER_SIZE);
        let opcode = asked.header.opcode;
        if asked.is_answered() && room < OUT_HEADER_LEN {
            tracing::warn!("FUSE request {opcode} of the guest leaves {room} bytes for its answer");
            return;
        }
        let room = room.max(OUT_HEADER_LEN);
        if self.answer.len() < room {
            self.answer.resize(room, 0);
        }
        match opcode {
            message::OP_READ => self.read(asked, room),
            message::OP_INIT => self.init(asked),
            message::OP_NOTIFY_REPLY => {}
            opcode if opcode > message::OP_MAX => asked.refuse(libc::ENOSYS),
            _ => self.compose(asked, room),
        }
        if self.answer.len() > KEPT {
            self.answer = Vec::new();
        }
    }

    fn read(&mut self, asked: Asked, room: usize) {
        let Asked { header, message, request } = asked;
        let guest = ToGuest::new(request);
        let way = || Box::new(guest.clone()) as Box<dyn Way>;
        let data = &mut self.answer[OUT_HEADER_LEN..room];
        match self.reads.read(&header, &message[size_of::<InHeader>()..], data, way) {
            Outcome::Data(len) => {
                guest.give(OutHeader::data(header.unique, len), &data[..len as usize]);
                self.reads.read_ahead();
            }
            Outcome::Refused(errno) => guest.give(OutHeader::refusal(header.unique, errno), &[]),
            Outcome::Later => {}
        }
    }

    fn init(&self, asked: Asked) {
        // Whoever was there before is gone, and what it held with it.
        self.adapter.table().forget_all();
        let out = match init::answer(&self.adapter, asked.body(), Kernel::Guest) {
            Ok(Answer::Retry(out)) => out,
            Ok(Answer::Agreed(agreed, out)) => {
                tracing::info!("the guest speaks FUSE 7.{}, flags {:#x}", agreed.minor, agreed.flags);
                self.shared.extends_setxattr.store(agreed.extends_setxattr(), Ordering::Relaxed);
                out
            }
            Err(e) => {
                tracing::error!("the guest can not be served: {e}");
                return asked.refuse(libc::EPROTO);
            }
        };
        let header = OutHeader::data(asked.header.unique, size_of_val(&out) as u32);
        give(asked.request, header, out.as_bytes());
    }

    /// Everything else: fuse-backend-rs decodes, and calls the adapter.
    fn compose(&mut self, mut asked: Asked, room: usize) {
        let message = match self.shared.extends_setxattr.load(Ordering::Relaxed) {
            true => message::fold_setxattr(&mut asked.message),
            false => &mut asked.message,
        };
        let composed = self.composer.compose(message, asked.header.unique, &mut self.answer[..room]);
        match composed {
            _ if !asked.is_answered() => {}
            Some(header) => {
                give(asked.request, header, &self.answer[OUT_HEADER_LEN..header.len as usize]);
            }
            None => asked.refuse(libc::EIO),
        }
    }
}
