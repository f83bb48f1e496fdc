//! What one ring thread does.
//!
//! A queue always has [`DEPTH`] entries that no read waits in. It may still happen that more reads come at once, all
//! have to wait, and others stand in line in the kernel: the kernel gives those to an entry only when one comes
//! back with an answer, not when a new one is added. So when reads begin to wait and nothing is answered beside
//! them, the thread has the kernel send it a message (the answer to FUSE_NOTIFY_RETRIEVE): it goes to a new
//! entry, comes back, and brings the line on. The kernel puts it into the queue of the CPU that the thread runs on.
//! So a CPU that comes online later has no such help: what stands in line there does until a read is answered.

use std::io::{self, IoSlice};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sched::sched_getcpu;
use zerocopy::{Immutable, IntoBytes};

use super::layout::{self, ANSWER_OFFSET, DATA_SIZE, HEAD_SIZE, Request};
use super::mailbox::{Mailbox, ToEntry};
use super::sys::{Event, Ring};
use super::{KEPT, Means, Shared};
use crate::node::NodeId;
use crate::transport::composer::Composer;
use crate::transport::message::{self, InHeader, OUT_HEADER_LEN, OutHeader};
use crate::transport::reads::{Outcome, Reads, Way};
use crate::transport::worker::Connection;

/// Entries of a queue that no read waits in. More requests at once stand in line.
pub(super) const DEPTH: usize = 8;

/// Entries of a queue at most: reads that wait beyond that stand in line, and others with them.
const MOST: usize = 16 << 10;

/// Pages are the unit in which memory is used.
const PAGE: usize = 4096;

/// FUSE_NOTIFY_RETRIEVE, in the place of an errno.
const NOTIFY_RETRIEVE: i32 = 5;
/// The number of the message that it is answered with: no request's, since those are counted from 0, and even,
/// as the kernel wants it.
const NUDGE: u64 = 1 << 62;

/// `fuse_notify_retrieve_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Retrieve {
    unique: u64,
    nodeid: u64,
    offset: u64,
    /// 0: no data, only the message.
    size: u32,
    padding: u32,
}
const _: () = assert!(size_of::<Retrieve>() == 32);

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The connection has.
    Over,
    /// The kernel does not take our entries.
    Withdrawn,
}

/// A kernel's queue.
struct Queue {
    number: u16,
    /// Entries that the kernel has.
    free: usize,
    /// Entries with reads that wait.
    waiting: usize,
    /// The kernel takes no more.
    full: bool,
    /// Reads have begun to wait, the last of them in this entry, and others may stand in line since no entry was left.
    dry: Option<usize>,
    /// Something was answered since the last events.
    answered: bool,
}

/// What an entry is used for.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    /// It came with a request before.
    served: bool,
    /// The read that waits in it, and of which file.
    waiting: Option<(u64, NodeId)>,
    /// Bytes of its data that take memory.
    filled: usize,
}

/// One ring thread.
pub(super) struct RingWorker {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    ring: Ring,
    /// The first is this CPU's own.
    queues: Vec<Queue>,
    /// By entry.
    uses: Vec<Use>,
    mailbox: Arc<Mailbox>,
    answers: Answers,
    events: Vec<Event>,
    /// Bytes of all entries' data that take memory, and what may be kept of them.
    filled: usize,
    kept: usize,
    /// Entries whose memory goes.
    trims: Vec<usize>,
    /// Messages that the kernel was made to send: each has a number of its own.
    nudges: u32,
    over: bool,
}

impl RingWorker {
    /// The thread `number` of the plan.
    pub fn new(shared: &Arc<Shared>, number: usize, means: Means, connection: Arc<Connection>) -> Self {
        let place = &shared.plan.places[number];
        let queue =
            |&number: &u16| Queue { number, free: 0, waiting: 0, full: false, dry: None, answered: false };
        let reads = Reads::new(Arc::clone(&shared.adapter), Arc::clone(&connection.streams));
        Self {
            ring: Ring::new(means.ring, Arc::clone(&connection)),
            queues: place.queues.iter().map(queue).collect(),
            uses: Vec::new(),
            mailbox: Arc::new(means.mailbox),
            answers: Answers {
                composer: Composer::new(Arc::clone(&shared.server), means.null),
                reads,
                message: Vec::new(),
            },
            events: Vec::new(),
            filled: 0,
            kept: (KEPT / shared.plan.places.len()).max(DATA_SIZE),
            trims: Vec::new(),
            nudges: 0,
            over: false,
            shared: Arc::clone(shared),
            connection,
        }
    }

    /// Serves until the connection ends.
    ///
    /// # Errors
    /// The ring fails, or a queue can not have an entry.
    pub fn run(mut self) -> io::Result<End> {
        self.grow()?;
        // The kernel would have all requests wait for it.
        if self.queues.iter().any(|queue| queue.free == 0) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.ring.watch(self.mailbox.bell())?;
        self.ring.submit()?;
        self.ring.collect(&mut self.events);
        if !self.events.iter().any(|event| matches!(event, Event::Refused(..))) {
            self.shared.serving();
        }
        loop {
            if self.events.is_empty() {
                self.ring.wait()?;
                self.ring.collect(&mut self.events);
            }
            let mut events = std::mem::take(&mut self.events);
            self.note(&events);
            for event in events.drain(..) {
                match event {
                    Event::Request(entry) => self.serve(entry)?,
                    Event::Refused(entry, errno) => self.refused(entry, errno)?,
                    Event::Mail => self.deliver()?,
                }
            }
            if self.over && self.ring.is_idle() {
                return Ok(End::Over);
            }
            if self.queues.iter().all(|queue| queue.full && queue.free + queue.waiting == 0) {
                return Ok(End::Withdrawn);
            }
            self.events = events;
            self.grow()?;
            self.settle()?;
        }
    }

    fn queue_of(&mut self, entry: usize) -> &mut Queue {
        let number = self.ring.queue(entry);
        let place = self.queues.iter().position(|queue| queue.number == number);
        // An entry's queue is one of these: `grow` has added it.
        &mut self.queues[place.unwrap_or_default()]
    }

    /// Takes note of which entries have come.
    fn note(&mut self, events: &[Event]) {
        self.queues.iter_mut().for_each(|queue| queue.answered = false);
        for event in events {
            if let Event::Request(entry) | Event::Refused(entry, _) = event {
                let queue = self.queue_of(*entry);
                queue.free = queue.free.saturating_sub(1);
            }
        }
    }

    /// Has every queue have its entries.
    fn grow(&mut self) -> io::Result<()> {
        if self.over {
            return Ok(());
        }
        for queue in &mut self.queues {
            while queue.free < DEPTH && !queue.full {
                if queue.waiting + queue.free == MOST {
                    tracing::warn!("{MOST} reads wait on one CPU; others wait for them");
                    queue.full = true;
                    break;
                }
                match self.ring.add(queue.number) {
                    Ok(_) => queue.free += 1,
                    Err(e) if e.kind() == io::ErrorKind::OutOfMemory => {
                        tracing::warn!("no memory for one more ring entry beside {}", self.ring.len());
                        queue.full = true;
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        self.uses.resize_with(self.ring.len(), Use::default);
        Ok(())
    }

    /// Answers a request, or leaves it to storage.
    fn serve(&mut self, entry: usize) -> io::Result<()> {
        let Some(memory) = self.ring.memory(entry) else { return Ok(()) };
        self.uses[entry].served = true;
        let Some(request) = Request::parse(memory) else {
            tracing::warn!("a FUSE request in a ring makes no sense");
            let unique = layout::unique(memory);
            return self.give(entry, &OutHeader::refusal(unique, libc::EIO));
        };
        let unique = request.header.unique;
        let way = || Box::new(ToEntry { mailbox: Arc::clone(&self.mailbox), entry }) as Box<dyn Way>;
        let answers = &mut self.answers;
        let answer = catch_unwind(AssertUnwindSafe(|| answers.answer(&request, memory, way)));
        let answer = answer.unwrap_or_else(|_| {
            let InHeader { opcode, nodeid, .. } = request.header;
            tracing::error!("FUSE request {opcode} of inode {nodeid:#x} panicked");
            Some(OutHeader::refusal(unique, libc::EIO))
        });
        self.fill(entry, request.data_len());
        match answer {
            Some(header) => self.give(entry, &header),
            None => {
                self.uses[entry].waiting = Some((unique, NodeId(request.header.nodeid)));
                let queue = self.queue_of(entry);
                queue.waiting += 1;
                queue.dry = Some(entry);
                Ok(())
            }
        }
    }

    /// Gives an entry back with an answer.
    fn give(&mut self, entry: usize, header: &OutHeader) -> io::Result<()> {
        let Some(memory) = self.ring.memory(entry) else { return Ok(()) };
        layout::answer(memory, header);
        let commit_id = layout::commit_id(memory);
        self.fill(entry, header.len as usize - OUT_HEADER_LEN);
        if self.filled > self.kept && self.uses[entry].filled > PAGE {
            self.trims.push(entry);
        }
        self.ring.commit(entry, commit_id)?;
        let queue = self.queue_of(entry);
        queue.free += 1;
        queue.answered = true;
        Ok(())
    }

    /// Notes that so many bytes of an entry's data take memory.
    fn fill(&mut self, entry: usize, len: usize) {
        let filled = &mut self.uses[entry].filled;
        let len = len.next_multiple_of(PAGE).max(*filled);
        self.filled += len - *filled;
        *filled = len;
    }

    /// Answers reads that have waited.
    fn deliver(&mut self) -> io::Result<()> {
        for mail in self.mailbox.take() {
            // One that panicked on its way has two answers, and had its first.
            if self.uses[mail.entry].waiting.map(|(unique, _)| unique) != Some(mail.header.unique) {
                continue;
            }
            self.uses[mail.entry].waiting = None;
            self.queue_of(mail.entry).waiting -= 1;
            let Some(memory) = self.ring.memory(mail.entry) else { continue };
            let header = match memory.get_mut(HEAD_SIZE..HEAD_SIZE + mail.data.len()) {
                Some(place) => {
                    place.copy_from_slice(&mail.data);
                    mail.header
                }
                None => OutHeader::refusal(mail.header.unique, libc::EIO),
            };
            self.give(mail.entry, &header)?;
        }
        self.ring.watch(self.mailbox.bell())
    }

    /// The kernel has no use for an entry any more.
    ///
    /// # Errors
    /// It refuses one that it had: whoever waits for the answer in it would do so until the connection ends.
    fn refused(&mut self, entry: usize, errno: Errno) -> io::Result<()> {
        match errno {
            // ENOENT: its request has ended with the connection.
            Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ENODEV | Errno::ECANCELED | Errno::ENOENT => {
                self.over = true;
            }
            _ if self.uses[entry].served => return Err(errno.into()),
            _ => {
                let queue = self.queue_of(entry);
                queue.full = true;
                tracing::warn!("the kernel takes no more ring entries for CPU {}: {errno}", queue.number);
            }
        }
        Ok(())
    }

    /// Submits where more is to be done than to wait for the next request.
    fn settle(&mut self) -> io::Result<()> {
        if !self.queues.iter().any(|queue| queue.dry.is_some())
            && self.trims.is_empty()
            && !self.answers.reads.wants_ahead()
        {
            return Ok(());
        }
        let overflows = self.ring.overflows();
        self.ring.submit()?;
        self.answers.reads.read_ahead();
        self.ring.collect(&mut self.events);
        // Otherwise in the next round.
        if !overflows && self.ring.is_settled() {
            for entry in self.trims.drain(..) {
                if self.ring.trim(entry) {
                    self.filled -= std::mem::take(&mut self.uses[entry].filled);
                }
            }
        }
        for place in 0..self.queues.len() {
            let queue = &self.queues[place];
            let came = |event: &Event| matches!(event, Event::Request(entry) if self.ring.queue(*entry) == queue.number);
            // Who stood in line has come now, and brings the line on or asks for another nudge.
            let Some(entry) = queue.dry.filter(|_| !self.events.iter().any(came)) else { continue };
            if queue.answered {
                self.queues[place].dry = None;
            } else if place == 0
                && queue.free > 0
                && sched_getcpu() == Ok(queue.number.into())
                && let Some((_, node)) = self.uses[entry].waiting
            {
                // Also if one is on its way: entries that seem free may be taken, and it stands in line itself.
                self.nudge(node);
            }
        }
        Ok(())
    }

    /// Has the kernel send a message, to the queue of the CPU that this thread runs on. It is about no bytes of a
    /// regular file (newer kernels refuse all else) that the kernel must have in memory, and must not be freeing: it
    /// would wait for the end of that, which waits for reads, and those for us. A read that waits in an entry of ours
    /// is one that somebody sits in with the file open, since the kernel reads nothing behind a reader's back
    /// (`FUSE_ASYNC_READ` is not agreed on with rings); and it ends when this thread answers.
    fn nudge(&mut self, node: NodeId) {
        self.nudges = self.nudges.wrapping_add(1);
        let body = Retrieve {
            unique: NUDGE | u64::from(self.nudges) << 1,
            nodeid: node.0,
            offset: 0,
            size: 0,
            padding: 0,
        };
        let len = (OUT_HEADER_LEN + size_of::<Retrieve>()) as u32;
        let header = OutHeader { len, error: NOTIFY_RETRIEVE, unique: 0 };
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(body.as_bytes())];
        if let Err(e) = nix::sys::uio::writev(&self.connection.fd, &parts) {
            tracing::debug!("nudge a FUSE queue: {e}");
        }
    }
}

/// Answers requests into the memory they came in.
struct Answers {
    composer: Composer,
    reads: Reads,
    /// A request in one piece; kept for its capacity.
    message: Vec<u8>,
}

impl Answers {
    /// The head of the answer, whose data is in its place; `None` if it comes by `way`.
    fn answer(
        &mut self,
        request: &Request,
        memory: &mut [u8],
        way: impl FnOnce() -> Box<dyn Way>,
    ) -> Option<OutHeader> {
        let unique = request.header.unique;
        match request.header.opcode {
            message::OP_READ => {
                let (head, data) = memory.split_at_mut(HEAD_SIZE);
                match self.reads.read(&request.header, request.body(head), data, way) {
                    Outcome::Data(len) => Some(OutHeader::data(unique, len)),
                    Outcome::Refused(errno) => Some(OutHeader::refusal(unique, errno)),
                    Outcome::Later => None,
                }
            }
            message::OP_NOTIFY_REPLY => Some(OutHeader::data(unique, 0)),
            opcode if opcode > message::OP_MAX => Some(OutHeader::refusal(unique, libc::ENOSYS)),
            _ => {
                request.compose(memory, &mut self.message);
                // Whatever kernel has rings has agreed on the longer FUSE_SETXATTR.
                let message = message::fold_setxattr(&mut self.message);
                // Its data comes to be where data belongs.
                let answer = &mut memory[ANSWER_OFFSET..ANSWER_OFFSET + OUT_HEADER_LEN + DATA_SIZE];
                let composed = self.composer.compose(message, unique, answer);
                // A large one was a write.
                self.message.shrink_to(PAGE);
                Some(composed.unwrap_or_else(|| OutHeader::refusal(unique, libc::EIO)))
            }
        }
    }
}
