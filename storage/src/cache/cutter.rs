//! One request: its bytes come in, whole units go to the CPU pool.
//!
//! A unit that a reader waits for goes at once, and so does what has gathered when the stream
//! has no more at the moment; otherwise small units go together, for a trip to the pool costs
//! as much as the work on a small chunk. What nobody waits for gives way to streams with a
//! reader behind them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::task::JoinHandle;

use super::Inner;
use super::fetch::{Failure, Work};
use super::opener::{Received, open_units};
use crate::backend::retry::within;
use crate::backend::{ByteStream, Priority, ReadContext, Sender};
use crate::budget::Permit;
use crate::ids::ByteRange;
use crate::link::{Receiving, Slot};
use crate::metrics::CacheMetrics;
use crate::{ErrorKind, Result, engine};

/// Decoded bytes that go to the CPU pool together: some 100 µs of hashing.
const TOGETHER: u64 = 256 << 10;

/// How long what a reader waits for waits for memory. Who holds that may be waiting for a source that is out, which
/// is no reason to keep readers of others waiting.
const MEMORY_PATIENCE: Duration = Duration::from_secs(1);

/// When the last request for a unit got where, and who answered it.
#[derive(Clone, Copy)]
pub(super) struct Timing {
    pub(super) requested: Instant,
    pub(super) answered: Instant,
    pub(super) received: Instant,
    pub(super) sender: Option<Sender>,
}

impl Timing {
    pub(super) fn begin() -> Self {
        let now = Instant::now();
        Self { requested: now, answered: now, received: now, sender: None }
    }
}

/// A request for one or more ranges of a blob.
pub(super) struct Request {
    inner: Arc<Inner>,
    context: ReadContext,
    /// Right to bytes that nobody waits for.
    slot: Option<Arc<Slot>>,
    begun: Instant,
}

impl Request {
    pub(super) fn new(inner: &Arc<Inner>, context: &ReadContext, slot: Option<Arc<Slot>>) -> Self {
        Self { inner: Arc::clone(inner), context: context.clone(), slot, begun: Instant::now() }
    }

    /// True if it was made for a reader.
    fn is_demanded(&self) -> bool {
        self.context.priority == Priority::OnDemand
    }

    /// Asks for one range.
    pub(super) async fn open(&self, range: ByteRange) -> Result<ByteStream> {
        within(&self.context, "read", self.inner.backend.open(range, &self.context)).await
    }

    /// Asks for several ranges; `None` if the source has no such request.
    pub(super) async fn open_many(&self, ranges: &[ByteRange]) -> Result<Option<ByteStream>> {
        within(&self.context, "read", self.inner.backend.open_many(ranges, &self.context)).await
    }

    /// Takes the bytes of `ranges`, which hold `works` in order. Answers the units that
    /// failed.
    pub(super) async fn receive(
        self,
        works: Vec<Work>,
        ranges: &[ByteRange],
        stream: Result<ByteStream>,
    ) -> Vec<Failure> {
        let inner = &self.inner;
        let is_single = matches!(&works[..], [work] if work.chunks.len() == 1);
        let mut cutter = Cutter {
            request: &self,
            pending: works.into(),
            gathered: Vec::new(),
            gathered_len: 0,
            jobs: Vec::new(),
            received: 0,
        };
        let streamed = match stream {
            Ok(stream) => within(&self.context, "read", cutter.take(stream, ranges)).await,
            Err(error) => Err(error),
        };
        cutter.dispatch();
        let Cutter { pending, jobs, received, .. } = cutter;
        let failed = streamed.as_ref().is_err_and(|e| e.kind() != ErrorKind::Cancelled);
        inner.backend_metrics.record(received, self.begun.elapsed(), failed);
        inner.metrics.fetched_bytes.fetch_add(received, Ordering::Relaxed);
        if !self.is_demanded() {
            CacheMetrics::tick(&inner.metrics.prefetch_requests);
            inner.metrics.prefetch_bytes.fetch_add(received, Ordering::Relaxed);
            inner.metrics.prefetch_unmerged.fetch_add(u64::from(is_single), Ordering::Relaxed);
        }

        let mut failed = Vec::new();
        for job in jobs {
            // A job that panicked dropped its leads, which woke their waiters.
            if let Ok(Ok(failures)) = job.await {
                failed.extend(failures);
            }
        }
        if let Err(error) = streamed {
            let range = ranges.first().map_or_else(String::new, ToString::to_string);
            let error = error.context(format!("blob {}: fetch bytes {range}", inner.id));
            failed.extend(pending.into_iter().map(|work| (work, error.clone())));
        }
        failed
    }
}

/// Cuts a stream into units.
struct Cutter<'a> {
    request: &'a Request,
    /// Units whose bytes are not complete, in order.
    pending: VecDeque<Work>,
    /// Complete units that have not gone to the pool.
    gathered: Vec<Received>,
    /// Their decoded bytes.
    gathered_len: u64,
    /// Batches on the CPU pool.
    jobs: Vec<JoinHandle<Result<Vec<Failure>>>>,
    received: u64,
}

impl Cutter<'_> {
    async fn take(&mut self, mut stream: ByteStream, ranges: &[ByteRange]) -> Result<()> {
        let Request { inner, slot, begun, .. } = self.request;
        let link = inner.engine.link();
        let timing = Timing { sender: Some(stream.sender()), requested: *begun, ..Timing::begin() };
        self.pending.iter_mut().for_each(|work| work.timing = timing);
        let mut receiving = link.answered(begun.elapsed(), self.request.is_demanded());

        let total: u64 = ranges.iter().map(|range| range.len()).sum();
        let Some(mut place) = Place::new(ranges) else { return Ok(()) };
        let mut begun_unit: Option<(Vec<u8>, Permit)> = None;
        while let Some(piece) = self.next_piece(&mut stream, &receiving, begun_unit.is_none()).await {
            let mut piece = piece?;
            let len = piece.len() as u64;
            self.received += len;
            receiving.received(len);
            slot.iter().for_each(|slot| slot.came(len));
            if self.received > total {
                return Err(engine::overlong(place.range));
            }
            while !piece.is_empty() {
                let Some(work) = self.pending.front() else { break };
                let stored = work.unit.compressed;
                if let Some(gap) = place.gap_before(stored) {
                    let gap = clamp(gap, piece.len());
                    piece.advance(gap);
                    place.advance(gap);
                    continue;
                }
                let (mut bytes, permit) = match begun_unit.take() {
                    Some(begun) => begun,
                    None => {
                        let need = stored.len() + u64::from(work.unit.decoded_len);
                        let priority =
                            if work.is_demanded() { Priority::OnDemand } else { Priority::Prefetch };
                        (Vec::new(), self.reserve(need, priority).await)
                    }
                };
                let part = piece.split_to(clamp(stored.end() - place.position, piece.len()));
                place.advance(part.len());
                if place.position < stored.end() {
                    if bytes.is_empty() {
                        bytes.reserve_exact(clamp(stored.len(), usize::MAX));
                    }
                    bytes.extend_from_slice(&part);
                    begun_unit = Some((bytes, permit));
                } else if bytes.is_empty() {
                    self.gather(part, permit, stream.sender(), &mut receiving);
                } else {
                    bytes.extend_from_slice(&part);
                    self.gather(bytes.into(), permit, stream.sender(), &mut receiving);
                }
            }
        }
        if self.received < total {
            return Err(engine::truncated(place.range, self.received));
        }
        Ok(())
    }

    /// The next bytes. Before it waits for them, what has gathered goes to the pool.
    async fn next_piece(
        &mut self,
        stream: &mut ByteStream,
        receiving: &Receiving,
        holds_nothing: bool,
    ) -> Option<Result<Bytes>> {
        // Who gives way must not hold memory that a reader may be waiting for.
        if holds_nothing && !receiving.is_demanded() {
            let link = self.request.inner.engine.link();
            if link.has_readers() && !self.pending.iter().any(Work::is_demanded) {
                self.dispatch();
                link.give_way().await;
            }
        }
        match stream.next().now_or_never() {
            Some(piece) => piece,
            None => {
                self.dispatch();
                stream.next().await
            }
        }
    }

    /// Waits until a unit may be held in memory; for a reader not for long. Who waits holds nothing: what has
    /// gathered goes to the pool first.
    async fn reserve(&mut self, need: u64, priority: Priority) -> Permit {
        let budget = self.request.inner.engine.budget();
        if let Some(permit) = budget.reserve(need, priority).now_or_never() {
            return permit;
        }
        self.dispatch();
        let granted = budget.reserve(need, priority);
        match priority {
            Priority::Prefetch => granted.await,
            Priority::OnDemand => match tokio::time::timeout(MEMORY_PATIENCE, granted).await {
                Ok(permit) => permit,
                Err(_) => budget.overdraw(priority),
            },
        }
    }

    /// Takes the first pending unit, whose last bytes `sender` sent.
    fn gather(&mut self, stored: Bytes, permit: Permit, sender: Sender, receiving: &mut Receiving) {
        let Some(mut work) = self.pending.pop_front() else { return };
        (work.timing.received, work.timing.sender) = (Instant::now(), Some(sender));
        let demanded = work.is_demanded();
        self.gathered_len += u64::from(work.unit.decoded_len);
        self.gathered.push(Received { work, stored, _permit: permit });
        if demanded || self.gathered_len >= TOGETHER {
            self.dispatch();
        }
        if receiving.is_demanded() && !self.pending.iter().any(Work::is_demanded) {
            receiving.is_ahead_now();
        }
    }

    /// Sends what has gathered to the CPU pool.
    fn dispatch(&mut self) {
        if self.gathered.is_empty() {
            return;
        }
        self.gathered_len = 0;
        let units = std::mem::take(&mut self.gathered);
        let inner = Arc::clone(&self.request.inner);
        let engine = inner.engine.clone();
        let demanded = units.iter().any(|unit| unit.work.is_demanded());
        let priority = if demanded { Priority::OnDemand } else { Priority::Prefetch };
        self.jobs.push(
            self.request
                .inner
                .engine
                .spawn(async move { engine.compute(priority, move || open_units(&inner, units)).await }),
        );
    }
}

/// Where in the ranges of a request its stream is.
struct Place<'a> {
    range: ByteRange,
    position: u64,
    following: &'a [ByteRange],
}

impl<'a> Place<'a> {
    fn new(ranges: &'a [ByteRange]) -> Option<Self> {
        let (first, following) = ranges.split_first()?;
        Some(Self { range: *first, position: first.start(), following })
    }

    /// Bytes of the stream before `unit`, which lies in one of the ranges, that are in the
    /// current one.
    fn gap_before(&mut self, unit: ByteRange) -> Option<u64> {
        while self.position == self.range.end()
            && let Some((next, following)) = self.following.split_first()
        {
            (self.range, self.position, self.following) = (*next, next.start(), following);
        }
        let end = self.range.end().min(unit.start());
        let inside = unit.start() >= self.range.start() && unit.end() <= self.range.end();
        match inside {
            true => end.checked_sub(self.position).filter(|gap| *gap > 0),
            false => Some(self.range.end() - self.position).filter(|gap| *gap > 0),
        }
    }

    fn advance(&mut self, bytes: usize) {
        self.position += bytes as u64;
    }
}

/// `bytes` as a length of at most `max`.
fn clamp(bytes: u64, max: usize) -> usize {
    usize::try_from(bytes).map_or(max, |bytes| bytes.min(max))
}
