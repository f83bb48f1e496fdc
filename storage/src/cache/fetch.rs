//! The leader's work: claim chunks among processes, fetch their units, decode, verify.
//!
//! ```text
//!  leads ─claim─▶ held by another process: look again, backing off
//!            └──▶ plan ─▶ local: what other cache files have ─▶ opener
//!                  └────▶ one request a merged range ─▶ cutter ─▶ opener
//!                                                                   │ corrupt, once
//!                                                                   ▼
//!                                                          fetch that unit again
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use tracing::{debug, warn};

use super::Inner;
use super::chunk_map::{ChunkLock, Record, Wanted, runs};
use super::cutter::{Request, Timing};
use super::dedup::Row;
use super::inflight::{Lead, Outcome};
use super::local;
use super::plan::{MAX_BETWEEN, plan};
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::extent::FetchUnit;
use crate::ids::{ByteRange, ChunkIndex};
use crate::link::Slot;
use crate::metrics::CacheMetrics;
use crate::observe::Fetched;
use crate::{Error, ErrorKind};

/// First and longest pause between looks at a chunk that another process fetches: short
/// beside a fetch, long beside the two system calls of a look.
const CLAIM_PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// How long a reader waits for another process, or for another mount of this one, to fetch; half its time if that is
/// less. Who is stopped, or waits for a source that has stalled, keeps its locks: then the chunk is fetched here as well,
/// past the cache.
const CLAIM_PATIENCE: Duration = Duration::from_secs(5);

/// First and longest pause between attempts while a source is out and the policy is to
/// wait: soon enough for a blip, and no burden on a source that comes back.
const OUTAGE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Requests at once for an order whose ranges the source can not send together.
const AHEAD_REQUESTS: usize = 6;

/// How often a corrupt unit is fetched again: a proxy may have lied once.
const CORRUPT_RETRIES: u32 = 1;

/// A chunk that this process alone fetches.
pub(super) struct Claimed {
    pub(super) lead: Lead,
    /// `None`: it will not be cached. Shared with the rest of its run.
    pub(super) lock: Option<Arc<ChunkLock>>,
    /// Where the dedup database says it is, and it is not: if what comes from the source is right,
    /// that row is wrong.
    pub(super) suspect: Option<Row>,
}

impl Claimed {
    fn new(lead: Lead, lock: Option<Arc<ChunkLock>>) -> Self {
        Self { lead, lock, suspect: None }
    }
}

/// A unit to fetch and the chunks wanted of it.
pub(super) struct Work {
    pub(super) unit: FetchUnit,
    pub(super) chunks: Vec<Claimed>,
    /// Times its bytes were corrupt and there was nobody else to ask.
    pub(super) corrupt: u32,
    pub(super) timing: Timing,
}

impl Work {
    /// True if a reader waits for some of it.
    pub(super) fn is_demanded(&self) -> bool {
        self.chunks.iter().any(|claimed| claimed.lead.is_demanded())
    }
}

/// A unit whose chunks are not all published, and why.
pub(super) type Failure = (Work, Error);

/// Sees to it that all of `leads` are answered. `slot` is the right to fetch what nobody
/// waits for.
pub(super) async fn lead(
    inner: Arc<Inner>,
    mut leads: Vec<Lead>,
    context: ReadContext,
    slot: Option<Arc<Slot>>,
) {
    let mut pause = CLAIM_PAUSE.0;
    let begun = Instant::now();
    let half = context.deadline.map(|at| at.saturating_duration_since(begun) / 2);
    let patience = half.map_or(CLAIM_PATIENCE, |half| half.min(CLAIM_PATIENCE));
    loop {
        let (mut claimed, mut contended) = claim(&inner, leads);
        // What another process is at and nobody waits for here is left to it.
        contended.retain(Lead::is_demanded);
        if !contended.is_empty() && begun.elapsed() >= patience {
            debug!(blob = %inner.id, chunks = contended.len(), "another process is slow; fetching past the cache");
            claimed.extend(contended.drain(..).map(|lead| Claimed::new(lead, None)));
        }
        let (groups, located) = local::part(&inner, group(&inner, claimed)).await;
        local::start(&inner, located, &context, slot.as_ref());
        start(&inner, groups, &context, slot.as_ref()).await;
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

/// Takes the locks that are free, of whole runs where that is possible. Answers what is ours
/// to fetch and what another process is at; answers the waiters of what turned out ready.
fn claim(inner: &Inner, mut leads: Vec<Lead>) -> (Vec<Claimed>, Vec<Lead>) {
    let Some(files) = inner.files() else {
        return (leads.into_iter().map(|lead| Claimed::new(lead, None)).collect(), Vec::new());
    };
    leads.sort_by_key(|lead| lead.extent().index);
    let wanted: Vec<Wanted> =
        leads.iter().map(|lead| (lead.extent().index, Record::of(lead.extent()))).collect();
    let mut leads = leads.into_iter();
    let (mut claimed, mut contended) = (Vec::new(), Vec::new());
    let mut take = |run: &[Wanted], lock: Option<ChunkLock>| {
        // The last holder may have finished before we got the lock.
        let ready = files.map.are_ready(run);
        let lock = lock.map(Arc::new);
        for (lead, ready) in leads.by_ref().take(run.len()).zip(ready) {
            match (ready, &lock) {
                (true, _) => lead.answer(Outcome::Stored),
                (false, Some(lock)) => claimed.push(Claimed::new(lead, Some(Arc::clone(lock)))),
                (false, None) => contended.push(lead),
            }
        }
    };
    let mut past_the_cache = Vec::new();
    for run in runs(&wanted) {
        if let Ok(Some(lock)) = files.map.try_lock(run) {
            take(run, Some(lock));
            continue;
        }
        for one in run.chunks(1) {
            match files.map.try_lock(one) {
                // Left by a leader that failed or was overtaken, while the rest of its run goes
                // on: nobody here is at it.
                Ok(None) if files.map.is_held_here(one[0].0) => {
                    past_the_cache.push(one[0].0);
                    take(one, None);
                }
                Ok(lock) => take(one, lock),
                Err(error) => {
                    debug!(blob = %inner.id, %error, "no lock for a chunk; it is not cached");
                    past_the_cache.push(one[0].0);
                    take(one, None);
                }
            }
        }
    }
    // Without a lock there is nobody to wait for.
    if !past_the_cache.is_empty() {
        let unlocked =
            contended.extract_if(.., |lead: &mut Lead| past_the_cache.contains(&lead.extent().index));
        claimed.extend(unlocked.map(|lead| Claimed::new(lead, None)));
    }
    (claimed, contended)
}

/// Sorts chunks into units, and units into merged ranges.
pub(super) fn group(inner: &Inner, mut chunks: Vec<Claimed>) -> Vec<Vec<Work>> {
    let place = |unit: &FetchUnit| (unit.compressed.start(), unit.compressed.end(), unit.decoded_len);
    chunks.sort_by_key(|c| place(&c.lead.extent().unit));
    let mut works: Vec<Work> = Vec::new();
    for chunk in chunks {
        let unit = chunk.lead.extent().unit.clone();
        match works.last_mut() {
            Some(work) if work.unit == unit => work.chunks.push(chunk),
            _ => works.push(Work { unit, chunks: vec![chunk], corrupt: 0, timing: Timing::begin() }),
        }
    }
    split(inner, works)
}

/// Cuts sorted works where [`plan`] says.
fn split(inner: &Inner, works: Vec<Work>) -> Vec<Vec<Work>> {
    let units: Vec<FetchUnit> = works.iter().map(|work| work.unit.clone()).collect();
    let groups = plan(&units, |place| inner.is_padding(&works[place - 1], &works[place]));
    let mut works = works.into_iter();
    groups.into_iter().map(|range| works.by_ref().take(range.len()).collect()).collect()
}

/// The bytes from the first to the last unit of a group.
fn span(group: &[Work]) -> Option<ByteRange> {
    let (start, end) = (group.first()?.unit.compressed.start(), group.last()?.unit.compressed.end());
    ByteRange::new(start, end.checked_sub(start)?).ok()
}

/// True if no range overlaps another.
fn are_apart(ranges: &[ByteRange]) -> bool {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start());
    sorted.windows(2).all(|pair| pair[0].end() <= pair[1].start())
}

/// Starts the fetch of merged ranges: several that nobody waits for with one request, if the
/// source can do that, else each with its own.
pub(super) async fn start(
    inner: &Arc<Inner>,
    mut groups: Vec<Vec<Work>>,
    context: &ReadContext,
    slot: Option<&Arc<Slot>>,
) {
    if slot.is_some() {
        // What was wanted first comes first.
        let wanted = |group: &Vec<Work>| {
            group.iter().flat_map(|work| &work.chunks).map(|claimed| claimed.lead.wanted()).min()
        };
        groups.sort_by_cached_key(wanted);
    }
    let ranges: Vec<ByteRange> = groups.iter().filter_map(|group| span(group)).collect();
    let whole = ranges.len() > 1 && ranges.len() == groups.len() && are_apart(&ranges);
    if context.priority == Priority::Prefetch && whole {
        let request = Request::new(inner, context, slot.cloned());
        // What went wrong shows again when the ranges are asked for one by one.
        if let Ok(Some(stream)) = request.open_many(&ranges).await {
            let (inner, context) = (Arc::clone(inner), context.clone());
            let works = groups.into_iter().flatten().collect();
            inner.engine.clone().spawn(async move {
                let failures = request.receive(works, &ranges, Ok(stream)).await;
                repeat(inner, failures, context).await;
            });
            return;
        }
    }
    if slot.is_none() {
        for group in groups {
            inner.engine.spawn(fetch(Arc::clone(inner), group, context.clone(), None));
        }
        return;
    }
    let (shared, context, slot) = (Arc::clone(inner), context.clone(), slot.cloned());
    inner.engine.spawn(async move {
        let one = |group| fetch(Arc::clone(&shared), group, context.clone(), slot.clone());
        stream::iter(groups).for_each_concurrent(AHEAD_REQUESTS, one).await;
    });
}

/// Fetches one merged range, and again what may succeed when fetched again.
async fn fetch(inner: Arc<Inner>, works: Vec<Work>, context: ReadContext, slot: Option<Arc<Slot>>) {
    let failures = fetch_once(&inner, works, &context, slot).await;
    repeat(inner, failures, context).await;
}

/// Fetches one merged range. Answers the units that failed, in order.
async fn fetch_once(
    inner: &Arc<Inner>,
    works: Vec<Work>,
    context: &ReadContext,
    slot: Option<Arc<Slot>>,
) -> Vec<Failure> {
    let Some(range) = span(&works) else { return Vec::new() };
    let request = Request::new(inner, context, slot);
    let stream = request.open(range).await;
    request.receive(works, &[range], stream).await
}

/// Deals with units that failed: again, or an answer.
async fn repeat(inner: Arc<Inner>, mut failures: Vec<Failure>, context: ReadContext) {
    let mut pause = OUTAGE_PAUSE.0;
    loop {
        let (mut again, mut outage) = (Vec::new(), None);
        for (mut work, error) in failures {
            let kind = error.kind();
            if kind == ErrorKind::Corrupt {
                CacheMetrics::tick(&inner.metrics.verification_failures);
                // Whoever else has the blob is asked before the source's own bytes count: each way lies once.
                let elsewhere = work.timing.sender.is_some_and(|sender| inner.backend.distrust(sender));
                work.corrupt += u32::from(!elsewhere);
                if elsewhere || work.corrupt <= CORRUPT_RETRIES {
                    warn!(blob = %inner.id, %error, "corrupt bytes; fetching them again");
                    again.push(work);
                    continue;
                }
            } else if context.deadline.is_none()
                && matches!(kind, ErrorKind::Unavailable | ErrorKind::TimedOut)
                && work.is_demanded()
                && work.chunks.iter().any(|claimed| claimed.lead.is_awaited())
            {
                outage = Some(error);
                again.push(work);
                continue;
            }
            for claimed in &work.chunks {
                inner.observe(&claimed.lead, &work, Some(&error));
                // What never came was no right guess, whoever asks next.
                inner.untouched.touch(claimed.lead.extent().index);
                claimed.lead.answer(Outcome::Failed(error.clone()));
            }
        }
        if again.is_empty() {
            return;
        }
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
        failures = Vec::new();
        for group in split(&inner, again) {
            failures.extend(fetch_once(&inner, group, &context, None).await);
        }
    }
}

impl Inner {
    /// True if no chunk lies between two units: one that does is there already, or somebody is
    /// at it.
    fn is_padding(&self, before: &Work, behind: &Work) -> bool {
        let index = |claimed: &Claimed| claimed.lead.extent().index.0;
        let (last, first) = (before.chunks.iter().map(index).max(), behind.chunks.iter().map(index).min());
        let (Some(last), Some(first)) = (last, first) else { return false };
        let mut between = last.saturating_add(1)..first;
        let Some(table) = &self.chunks else { return between.is_empty() };
        between.len() <= MAX_BETWEEN
            && between.all(|index| {
                let known = table(ChunkIndex(index));
                known.is_none_or(|chunk| chunk.unit == before.unit || chunk.unit == behind.unit)
            })
    }

    /// Tells the observer, if there is one, how the fetch of a chunk ended.
    pub(super) fn observe(&self, lead: &Lead, work: &Work, error: Option<&Error>) {
        let Some(observer) = &self.observer else { return };
        let Timing { requested, answered, received, sender } = work.timing;
        observer.fetched(&Fetched {
            blob: &self.id,
            chunk: lead.extent().index,
            stored: lead.extent().stored_share(),
            demanded: lead.is_demanded(),
            supplier: sender.map(|sender| sender.supplier),
            wanted: lead.wanted(),
            requested,
            answered,
            received,
            verified: Instant::now(),
            error,
        });
    }
}
