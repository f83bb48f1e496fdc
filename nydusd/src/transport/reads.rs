//! READs, whichever way they came.
//!
//! A READ is answered inline when its data is in the cache; otherwise it is handed to storage with a
//! completion that answers, from whatever thread it runs on. So no thread here ever waits for a source,
//! and any number of stalled reads leave metadata and cached data prompt.
//!
//! A read that waits for its source can not be interrupted: the pages it fills belong to the
//! page cache, and whoever waits for a page may be killed without an answer from us.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use storage::backend::Priority;
use storage::read::ReadSlice;
use zerocopy::FromBytes as _;

use super::message::{InHeader, OutHeader, ReadIn};
use super::streams::Streams;
use crate::adapter::{Adapter, Planned, ReadPlan};
use crate::failures::{Failure, Failures};
use crate::metrics::InflightGuard;
use crate::node::NodeId;
use crate::pending::{Abandon, PendingGuard};
use crate::why::Wait;

/// Where the answer to one READ goes that had to wait.
pub(super) trait Way: Send + Sync {
    /// Hands the answer to the kernel. Called once.
    fn answer(&self, header: OutHeader, data: Vec<u8>);
}

/// What is to be answered at once.
#[derive(Debug)]
pub(super) enum Outcome {
    /// So many of the first bytes of the reply's buffer.
    Data(u32),
    /// An errno.
    Refused(i32),
    /// Nothing: the answer goes its [`Way`].
    Later,
}

/// The answer to a READ: given once, by who comes first.
struct Reply {
    way: Box<dyn Way>,
    unique: u64,
    answered: AtomicBool,
    /// Ends with the answer. Held to take it.
    inflight: Mutex<Option<InflightGuard>>,
}

impl Reply {
    /// Answers, unless that is done.
    fn give(&self, header: OutHeader, data: Vec<u8>) {
        if self.answered.swap(true, Ordering::Relaxed) {
            return;
        }
        // Who has the answer must not find the request waiting.
        drop(self.inflight.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.way.answer(header, data);
    }
}

impl Abandon for Reply {
    fn abandon(&self) {
        self.give(OutHeader::refusal(self.unique, libc::EIO), Vec::new());
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
                self.reply.give(OutHeader::data(unique, len), data);
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

/// What one serving thread needs for READs.
pub(super) struct Reads {
    adapter: Arc<Adapter>,
    streams: Arc<Streams>,
    /// Chunks of the current READ; kept for its capacity.
    slices: Vec<ReadSlice>,
    /// Bytes of files to read into the page cache.
    ahead: Vec<(ReadPlan, Range<u64>)>,
}

impl Reads {
    pub fn new(adapter: Arc<Adapter>, streams: Arc<Streams>) -> Self {
        Self { adapter, streams, slices: Vec::new(), ahead: Vec::new() }
    }

    /// Answers into `reply`, or later by `way`.
    pub fn read(
        &mut self,
        header: &InHeader,
        body: &[u8],
        reply: &mut [u8],
        way: impl FnOnce() -> Box<dyn Way>,
    ) -> Outcome {
        let started = Instant::now();
        let Ok((read, _)) = ReadIn::read_from_prefix(body) else { return Outcome::Refused(libc::EINVAL) };
        let errno = |error: std::io::Error| Outcome::Refused(error.raw_os_error().unwrap_or(libc::EIO));
        let node = NodeId(header.nodeid);
        // A reply fits the buffer, whatever the kernel asks for.
        let size = read.size.min(u32::try_from(reply.len()).unwrap_or(u32::MAX));
        self.slices.clear();
        let plan = match self.adapter.plan_read(node, read.offset, size, &mut self.slices) {
            Ok(Planned::Chunks(plan)) => plan,
            Ok(Planned::Host(host, nid)) => {
                return match host.read(nid, read.offset, &mut reply[..size as usize]) {
                    // At most `size`.
                    Ok(len) => Outcome::Data(len as u32),
                    Err(e) => errno(e),
                };
            }
            Err(e) => return errno(e),
        };
        match plan.mount.reader().try_read(&self.slices, &mut reply[..plan.len as usize]) {
            Ok(true) => {
                let elapsed = started.elapsed();
                plan.mount.metrics().record_read(plan.nid, Some(plan.len), elapsed);
                if let Some(recorder) = plan.mount.recorder() {
                    recorder.hit(plan.nid, read.offset, plan.len, header.pid, elapsed);
                }
                let len = plan.len;
                if let Some(ahead) = self.streams.follow(node, read.offset, len) {
                    self.ahead.push((plan, ahead));
                }
                Outcome::Data(len)
            }
            Ok(false) if plan.mount.echoes().is_echo(plan.nid, read.offset, plan.len) => {
                plan.mount.metrics().record_read(plan.nid, None, started.elapsed());
                Outcome::Refused(libc::EIO)
            }
            Ok(false) => {
                self.submit(header, plan, read.offset, started, way());
                Outcome::Later
            }
            Err(error) => {
                plan.mount.metrics().record_read(plan.nid, None, started.elapsed());
                report(self.adapter.failures(), &plan, read.offset, self.slices.clone(), &error);
                Outcome::Refused(libc::EIO)
            }
        }
    }

    /// True if something is to be read ahead.
    pub fn wants_ahead(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// To be called when answers have been given: has what is local behind them read into the page cache.
    pub fn read_ahead(&mut self) {
        for (plan, ahead) in self.ahead.drain(..) {
            self.slices.clear();
            let len = u32::try_from(ahead.end - ahead.start).unwrap_or(u32::MAX);
            // Who reads there meets the error.
            if plan.mount.rafs().read(plan.nid, ahead.start, len, &mut self.slices).is_ok() {
                plan.mount.reader().will_need(&self.slices);
            }
        }
    }

    /// Leaves a READ to storage; its completion replies.
    fn submit(&self, header: &InHeader, plan: ReadPlan, offset: u64, started: Instant, way: Box<dyn Way>) {
        let inflight = self.adapter.inflight().enter(plan.nid.0, header.opcode, header.unique, started);
        let reader = Arc::clone(plan.mount.reader());
        let wait = plan
            .mount
            .recorder()
            .map(|recorder| recorder.wait(plan.nid, offset, plan.len, header.pid, started));
        let reply = Arc::new(Reply {
            way,
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
