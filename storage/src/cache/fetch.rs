//! The leader's work: claim chunks among processes, fetch their units, decode, verify.
//!
//! ```text
//!  leads ─claim─▶ held by another process: look again, backing off
//!            └──▶ plan ─▶ one task a merged range: open, cut the stream into units
//!                                  │ a unit is complete
//!                                  ▼
//!                          CPU pool: decode, verify ─▶ publish
//!                                  │ corrupt, once
//!                                  ▼
//!                          fetch that unit again
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt as _;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use super::Inner;
use super::chunk_map::{ChunkLock, Record};
use super::inflight::{Lead, Outcome};
use super::plan::plan;
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext, Supplier};
use crate::budget::Permit;
use crate::engine;
use crate::extent::{Cipher, FetchUnit};
use crate::ids::ByteRange;
use crate::metrics::{CacheMetrics, cpu_timed};
use crate::observe::Fetched;
use crate::{Error, ErrorKind, Result, codec};

/// First and longest pause between looks at a chunk that another process fetches: short
/// beside a fetch, long beside the two system calls of a look.
const CLAIM_PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// How long a reader without a deadline waits for another process to fetch; one with a
/// deadline waits half its time. A process that is stopped keeps its locks: then the chunk
/// is fetched here as well, past the cache.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);

/// First and longest pause between attempts while a source is out and the policy is to
/// wait: soon enough for a blip, and no burden on a source that comes back.
const OUTAGE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How often a corrupt unit is fetched again: a proxy may have lied once.
const CORRUPT_RETRIES: u32 = 1;

/// A chunk that this process alone fetches.
pub(super) struct Claimed {
    pub(super) lead: Lead,
    /// `None`: it will not be cached.
    pub(super) lock: Option<ChunkLock>,
}

/// A unit to fetch and the chunks wanted of it.
struct Work {
    unit: FetchUnit,
    chunks: Vec<Claimed>,
    /// Times its bytes were corrupt.
    corrupt: u32,
    timing: Timing,
}

/// When the last request for a unit got where, and who answered it.
#[derive(Clone, Copy)]
struct Timing {
    requested: Instant,
    answered: Instant,
    received: Instant,
    supplier: Option<Supplier>,
}

impl Timing {
    fn begin() -> Self {
        let now = Instant::now();
        Self { requested: now, answered: now, received: now, supplier: None }
    }
}

/// A unit whose chunks are not all published, and why.
type Failure = (Work, Error);

/// Sees to it that all of `leads` are answered.
pub(super) async fn lead(inner: Arc<Inner>, mut leads: Vec<Lead>, context: ReadContext) {
    let mut pause = CLAIM_PAUSE.0;
    let begun = Instant::now();
    let patience = context.deadline.map_or(CLAIM_PATIENCE, |at| at.saturating_duration_since(begun) / 2);
    loop {
        let (mut claimed, mut contended) = claim(&inner, leads);
        if !contended.is_empty() && begun.elapsed() >= patience {
            debug!(blob = %inner.id, chunks = contended.len(), "another process is slow; fetching past the cache");
            claimed.extend(contended.drain(..).map(|lead| Claimed { lead, lock: None }));
        }
        for group in group(claimed) {
            let task = fetch(Arc::clone(&inner), group, context.clone());
            inner.engine.spawn(task);
        }
        if contended.is_empty() {
            return;
        }
        leads = contended;
        let paused = within(&context, "wait for another process to fetch", async {
            tokio::time::sleep(pause).await;
            Ok::<_, Error>(())
        });
        if let Err(e) = paused.await {
            let e = e.context(format!("blob {}", inner.id));
            leads.iter().for_each(|lead| lead.answer(Outcome::Failed(e.clone())));
            return;
        }
        pause = (pause * 2).min(CLAIM_PAUSE.1);
    }
}

/// Takes the locks that are free. Answers what is ours to fetch and what another process
/// is at; answers the waiters of what turned out ready.
fn claim(inner: &Inner, leads: Vec<Lead>) -> (Vec<Claimed>, Vec<Lead>) {
    let (mut claimed, mut contended) = (Vec::new(), Vec::new());
    for lead in leads {
        if inner.is_ready(lead.extent()) {
            lead.answer(Outcome::Stored);
            continue;
        }
        let Some(files) = inner.files() else {
            claimed.push(Claimed { lead, lock: None });
            continue;
        };
        let lock = match files.map.try_lock(lead.extent().index, &Record::of(lead.extent())) {
            Ok(Some(lock)) => Some(lock),
            Ok(None) => {
                contended.push(lead);
                continue;
            }
            Err(error) => {
                debug!(blob = %inner.id, %error, "no lock for a chunk; it is not cached");
                None
            }
        };
        // The last holder may have finished between our look and the lock.
        if inner.is_ready(lead.extent()) {
            lead.answer(Outcome::Stored);
        } else {
            claimed.push(Claimed { lead, lock });
        }
    }
    (claimed, contended)
}

/// Sorts chunks into units, and units into merged ranges.
fn group(mut chunks: Vec<Claimed>) -> Vec<Vec<Work>> {
    let place = |unit: &FetchUnit| (unit.compressed.start(), unit.compressed.end(), unit.decoded_len);
    chunks.sort_by_key(|c| place(&c.lead.extent().unit));
    let mut works: Vec<Work> = Vec::new();
    for chunk in chunks {
        let unit = chunk.lead.extent().unit;
        match works.last_mut() {
            Some(work) if work.unit == unit => work.chunks.push(chunk),
            _ => works.push(Work { unit, chunks: vec![chunk], corrupt: 0, timing: Timing::begin() }),
        }
    }
    split(works)
}

/// Cuts sorted works where [`plan`] says.
fn split(works: Vec<Work>) -> Vec<Vec<Work>> {
    let units: Vec<FetchUnit> = works.iter().map(|work| work.unit).collect();
    let mut works = works.into_iter();
    plan(&units).into_iter().map(|range| works.by_ref().take(range.len()).collect()).collect()
}

/// Fetches one merged range, and again what may succeed when fetched again.
async fn fetch(inner: Arc<Inner>, works: Vec<Work>, context: ReadContext) {
    let mut groups = vec![works];
    let mut pause = OUTAGE_PAUSE.0;
    while !groups.is_empty() {
        let (mut again, mut outage) = (Vec::new(), None);
        for group in groups {
            for (mut work, error) in fetch_once(&inner, group, &context).await {
                let kind = error.kind();
                if kind == ErrorKind::Corrupt {
                    CacheMetrics::tick(&inner.metrics.verification_failures);
                    work.corrupt += 1;
                    if work.corrupt <= CORRUPT_RETRIES {
                        warn!(blob = %inner.id, %error, "corrupt bytes; fetching them again");
                        again.push(work);
                        continue;
                    }
                } else if context.deadline.is_none()
                    && matches!(kind, ErrorKind::Unavailable | ErrorKind::TimedOut)
                {
                    outage = Some(error);
                    again.push(work);
                    continue;
                }
                for claimed in &work.chunks {
                    inner.observe(&claimed.lead, &work, Some(&error));
                    claimed.lead.answer(Outcome::Failed(error.clone()));
                }
            }
        }
        groups = split(again);
        if let Some(error) = outage {
            debug!(blob = %inner.id, %error, "source out; waiting for it as configured");
            let slept = within(&context, "wait for the source", async {
                tokio::time::sleep(pause).await;
                Ok::<_, Error>(())
            });
            if slept.await.is_err() {
                return;
            }
            pause = (pause * 2).min(OUTAGE_PAUSE.1);
        }
    }
}

/// Fetches one merged range. Answers the units that failed, in order.
async fn fetch_once(inner: &Arc<Inner>, works: Vec<Work>, context: &ReadContext) -> Vec<Failure> {
    let (Some(first), Some(last)) = (works.first(), works.last()) else { return Vec::new() };
    let (start, end) = (first.unit.compressed.start(), last.unit.compressed.end());
    let Ok(range) = ByteRange::new(start, end - start) else { return Vec::new() };

    let started = Instant::now();
    let mut cutter = Cutter { inner, context, pending: works.into(), jobs: Vec::new(), received: 0 };
    let streamed = within(context, "read", cutter.stream(range)).await;
    let Cutter { pending, jobs, received, .. } = cutter;
    inner.backend_metrics.record(received, started.elapsed(), streamed.is_err());
    inner.metrics.fetched_bytes.fetch_add(received, Ordering::Relaxed);
    if context.priority == Priority::Prefetch {
        CacheMetrics::tick(&inner.metrics.prefetch_requests);
        inner.metrics.prefetch_bytes.fetch_add(received, Ordering::Relaxed);
    }

    let mut failed = Vec::new();
    for job in jobs {
        // A job that panicked dropped its leads, which woke their waiters.
        if let Ok(Ok(Some(failure))) = job.await {
            failed.push(failure);
        }
    }
    if let Err(error) = streamed {
        let error = error.context(format!("blob {}: fetch bytes {range}", inner.id));
        failed.extend(pending.into_iter().map(|work| (work, error.clone())));
    }
    failed
}

/// Cuts a stream into units.
struct Cutter<'a> {
    inner: &'a Arc<Inner>,
    context: &'a ReadContext,
    /// Units whose bytes are not complete, in order.
    pending: VecDeque<Work>,
    /// Units on the CPU pool.
    jobs: Vec<JoinHandle<Result<Option<Failure>>>>,
    received: u64,
}

impl Cutter<'_> {
    async fn stream(&mut self, range: ByteRange) -> Result<()> {
        let requested = Timing::begin();
        self.pending.iter_mut().for_each(|work| work.timing = requested);
        let mut stream = self.inner.backend.open(range, self.context).await?;
        let answer = Timing { supplier: Some(stream.supplier()), ..Timing::begin() };
        let answer = Timing { requested: requested.requested, ..answer };
        self.pending.iter_mut().for_each(|work| work.timing = answer);
        let mut unit_bytes: Option<(Vec<u8>, Permit)> = None;
        let mut position = range.start();
        while let Some(piece) = stream.next().await {
            let mut piece = piece?;
            self.received += piece.len() as u64;
            if self.received > range.len() {
                return Err(engine::overlong(range));
            }
            while !piece.is_empty() {
                let Some(work) = self.pending.front() else { break };
                let stored = work.unit.compressed;
                if position < stored.start() {
                    let gap = clamp(stored.start() - position, piece.len());
                    piece.advance(gap);
                    position += gap as u64;
                    continue;
                }
                let (mut bytes, permit) = match unit_bytes.take() {
                    Some(begun) => begun,
                    None => {
                        let need = stored.len() + u64::from(work.unit.decoded_len);
                        let permit = self.inner.engine.budget().reserve(need, self.context.priority).await;
                        (Vec::new(), permit)
                    }
                };
                let part = piece.split_to(clamp(stored.end() - position, piece.len()));
                position += part.len() as u64;
                if position < stored.end() {
                    if bytes.is_empty() {
                        bytes.reserve_exact(clamp(stored.len(), usize::MAX));
                    }
                    bytes.extend_from_slice(&part);
                    unit_bytes = Some((bytes, permit));
                } else if bytes.is_empty() {
                    self.dispatch(part, permit);
                } else {
                    bytes.extend_from_slice(&part);
                    self.dispatch(bytes.into(), permit);
                }
            }
        }
        if self.received < range.len() {
            return Err(engine::truncated(range, self.received));
        }
        Ok(())
    }

    /// Sends the first pending unit, now complete, to the CPU pool.
    fn dispatch(&mut self, stored: Bytes, permit: Permit) {
        let Some(mut work) = self.pending.pop_front() else { return };
        work.timing.received = Instant::now();
        let (inner, engine) = (Arc::clone(self.inner), self.inner.engine.clone());
        self.jobs.push(self.inner.engine.spawn(async move {
            engine
                .compute(move || {
                    let failure = open_unit(&inner, work, stored);
                    drop(permit);
                    failure
                })
                .await
        }));
    }
}

/// `bytes` as a length of at most `max`.
fn clamp(bytes: u64, max: usize) -> usize {
    usize::try_from(bytes).map_or(max, |bytes| bytes.min(max))
}

/// Decodes a unit, verifies the chunks wanted of it and publishes those that are right.
fn open_unit(inner: &Arc<Inner>, mut work: Work, stored: Bytes) -> Option<Failure> {
    let name = |work: &Work| {
        let chunk = work.chunks.first().map_or(0, |c| c.lead.extent().index.0);
        format!("blob {}, chunk {chunk}, bytes {}", inner.id, work.unit.compressed)
    };
    let decoded = match cpu_timed(&inner.metrics.decode_cpu_ns, || decode(&work.unit, stored)) {
        Ok(decoded) => decoded,
        Err(e) => {
            let context = name(&work);
            return Some((work, e.context(context)));
        }
    };
    let mut wrong = Vec::new();
    let mut error = None;
    for claimed in std::mem::take(&mut work.chunks) {
        let extent = claimed.lead.extent();
        let start = extent.offset_in_unit as usize;
        let bytes = decoded.slice(start..start + extent.len as usize);
        let found = extent.digest.map(|expected| {
            let digest = || expected.algorithm.digest(&bytes);
            (expected, cpu_timed(&inner.metrics.verify_cpu_ns, digest))
        });
        match found {
            Some((expected, found)) if expected.digest != found => {
                let what = format!(
                    "blob {}, chunk {}, bytes {}: digest is {}:{found}, the image says {}",
                    inner.id, extent.index, work.unit.compressed, expected.algorithm, expected.digest
                );
                error.get_or_insert(Error::new(ErrorKind::Corrupt, what));
                wrong.push(claimed);
            }
            _ => {
                inner.observe(&claimed.lead, &work, None);
                inner.publish(claimed, &bytes);
            }
        }
    }
    work.chunks = wrong;
    error.map(|error| (work, error))
}

impl Inner {
    /// Tells the observer, if there is one, how the fetch of a chunk ended.
    fn observe(&self, lead: &Lead, work: &Work, error: Option<&Error>) {
        let Some(observer) = &self.observer else { return };
        let Timing { requested, answered, received, supplier } = work.timing;
        observer.fetched(&Fetched {
            blob: &self.id,
            chunk: lead.extent().index,
            stored: share(&work.unit, lead.extent().len),
            demanded: lead.is_demanded(),
            supplier,
            wanted: lead.wanted(),
            requested,
            answered,
            received,
            verified: Instant::now(),
            error,
        });
    }
}

/// The part that `len` decoded bytes have in the stored bytes of their unit.
fn share(unit: &FetchUnit, len: u32) -> u64 {
    // Both factors are below 2^25.
    unit.compressed.len() * u64::from(len) / u64::from(unit.decoded_len.max(1))
}

fn decode(unit: &FetchUnit, stored: Bytes) -> Result<Bytes> {
    let Cipher::None = unit.cipher;
    if unit.codec == codec::Codec::None && stored.len() == unit.decoded_len as usize {
        return Ok(stored);
    }
    let mut decoded = vec![0; unit.decoded_len as usize];
    codec::decompress(unit.codec, &stored, &mut decoded)?;
    Ok(decoded.into())
}
