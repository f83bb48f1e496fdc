//! Chunks that another cache file of the node has: copied from there, not fetched.
//!
//! ```text
//!  groups of units ─find─▶ dedup database ─▶ taken ─▶ read, verify, answer, write
//!                 └──────▶ the rest: requests          │ not there, or other bytes
//!                                                      ▼
//!                                                   requests
//! ```
//!
//! # What is taken
//!
//! A group is what one request would bring. Units at its ends that are here make the request
//! shorter, and a group that is here as a whole makes none; both are always taken. Units in the
//! middle would make two requests of one: they are taken if they are at least what the link
//! carries in a round trip. A unit is here if all chunks wanted of it are.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::Inner;
use super::dedup::{self, Place};
use super::fetch::{self, Claimed, Work};
use super::inflight::Outcome;
use super::opener::{BLOCK, publish};
use super::plan::{MAX_GAP, MAX_RANGE};
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::budget::Permit;
use crate::link::Slot;
use crate::metrics::{CacheMetrics, cpu_timed};
use crate::{Error, Result};

/// What two requests instead of one must save while the link's rate is not known, in stored bytes.
const WORTH: u64 = 256 << 10;

/// Decoded bytes that are read and verified together. What comes first is answered first.
const TOGETHER: u64 = 1 << 20;

/// A chunk and where it may be.
pub(super) struct Located {
    claimed: Claimed,
    place: Place,
    /// A reader waited for it when it was found; more may by now.
    demanded: bool,
}

impl Located {
    fn new(claimed: Claimed, place: Place) -> Self {
        let demanded = claimed.lead.is_demanded();
        Self { claimed, place, demanded }
    }
}

/// Takes out of `groups`, each of which is one request, what other files have.
pub(super) async fn part(inner: &Arc<Inner>, groups: Vec<Vec<Work>>) -> (Vec<Vec<Work>>, Vec<Located>) {
    let mut located = Vec::new();
    if inner.dedup.is_none() || groups.is_empty() {
        return (groups, located);
    }
    let mut found = find(inner, &groups).await.into_iter();
    let worth = inner.engine.link().held().unwrap_or(WORTH).clamp(MAX_GAP, MAX_RANGE);
    let mut requests = Vec::new();
    for group in groups {
        // For each unit the places of all its chunks, or none.
        let places: Vec<Option<Vec<Place>>> = group
            .iter()
            .map(|work| found.by_ref().take(work.chunks.len()).collect::<Vec<_>>().into_iter().collect())
            .collect();
        let sizes = group.iter().map(|work| work.unit.compressed.len());
        let units: Vec<_> = sizes.zip(places.iter().map(Option::is_some)).collect();
        let mut request = Vec::new();
        for ((work, places), taken) in group.into_iter().zip(places).zip(taken(&units, worth)) {
            match places {
                Some(places) if taken => {
                    let chunks = work.chunks.into_iter().zip(places);
                    located.extend(chunks.map(|(claimed, place)| Located::new(claimed, place)));
                    requests.push(std::mem::take(&mut request));
                }
                _ => request.push(work),
            }
        }
        requests.push(request);
    }
    requests.retain(|request| !request.is_empty());
    (requests, located)
}

/// For each chunk of all groups, in order, where it may be.
async fn find(inner: &Arc<Inner>, groups: &[Vec<Work>]) -> Vec<Option<Place>> {
    let chunks: Vec<_> =
        groups.iter().flatten().flat_map(|work| &work.chunks).map(|claimed| &claimed.lead).collect();
    let mut places = vec![None; chunks.len()];
    let Some(dedup) = &inner.dedup else { return places };
    let keys = chunks.iter().enumerate();
    let mut wanted: Vec<_> =
        keys.filter_map(|(at, lead)| Some((!lead.is_demanded(), at, dedup::key(lead.extent())?))).collect();
    // What a reader waits for is looked for first: there may be no time for all.
    wanted.sort_by_key(|(ahead, at, _)| (*ahead, *at));
    let Some((ahead, ..)) = wanted.first() else { return places };
    let demanded = !ahead;
    let (order, digests): (Vec<_>, Vec<_>) = wanted.into_iter().map(|(_, at, digest)| (at, digest)).unzip();
    let own = dedup.file.clone();
    if let Some(found) = dedup.database.find(&inner.engine, digests, own, demanded).await {
        order.into_iter().zip(found).for_each(|(at, place)| places[at] = place);
    }
    places
}

/// Which units of a request are taken, by their stored bytes and whether they are here.
fn taken(units: &[(u64, bool)], worth: u64) -> Vec<bool> {
    let mut taken = Vec::with_capacity(units.len());
    for run in units.chunk_by(|a, b| a.1 == b.1) {
        let is_end = taken.is_empty() || taken.len() + run.len() == units.len();
        let saved: u64 = run.iter().map(|(bytes, _)| bytes).sum();
        let take = run[0].1 && (is_end || saved >= worth);
        taken.extend(run.iter().map(|_| take));
    }
    taken
}

/// Starts taking `located` from their files, and fetching what is not right there.
pub(super) fn start(
    inner: &Arc<Inner>,
    mut located: Vec<Located>,
    context: &ReadContext,
    slot: Option<&Arc<Slot>>,
) {
    if located.is_empty() {
        return;
    }
    located.sort_by_key(|one| (!one.demanded, Arc::as_ptr(&one.place.source), one.place.offset));
    let (inner, context, slot) = (Arc::clone(inner), context.clone(), slot.cloned());
    inner.engine.clone().spawn(async move {
        let mut rest = located.into_iter().peekable();
        while rest.peek().is_some() {
            let mut batch = Vec::new();
            let mut len = 0;
            while let Some(one) = rest.next_if(|one| len == 0 || len + one.weight() <= TOGETHER) {
                len += one.weight();
                batch.push(one);
            }
            let stored = batch.iter().map(|one| one.claimed.lead.extent().stored_share()).sum();
            if let Err(error) = take(&inner, batch, len, &context).await {
                // The rest, too.
                rest.for_each(|one| one.claimed.lead.answer(Outcome::Failed(error.clone())));
                return;
            }
            // Others are asked for only now: what is on disk must not pile up either.
            slot.iter().for_each(|slot| slot.came(stored));
        }
    });
}

/// Takes chunks that need `len` bytes of memory, and starts fetching those that are not right.
async fn take(inner: &Arc<Inner>, batch: Vec<Located>, len: u64, context: &ReadContext) -> Result<()> {
    let Some(dedup) = &inner.dedup else { return Ok(()) };
    let demanded = batch.iter().any(|one| one.claimed.lead.is_demanded());
    let priority = if demanded { Priority::OnDemand } else { Priority::Prefetch };
    let turns = within(context, "read the cache file of another blob", async {
        // In this order: nobody waits for a disk with the memory of others.
        let reading = dedup.database.reading(demanded).await;
        Ok::<_, Error>((reading, inner.engine.budget().reserve(len, priority).await))
    });
    let (reading, permit) = match turns.await {
        Ok(turns) => turns,
        Err(error) => {
            let error = error.context(format!("blob {}", inner.id));
            batch.iter().for_each(|one| one.claimed.lead.answer(Outcome::Failed(error.clone())));
            return Err(error);
        }
    };
    let began = Instant::now();
    // Beside the CPU pool, which others need while a disk is waited for.
    let read = inner.engine.blocking(move || {
        let mut pieces = Vec::with_capacity(batch.len());
        batch.chunk_by(Located::is_before).for_each(|run| read(run, &mut pieces));
        (batch, pieces)
    });
    // A job that panicked dropped its leads, which woke their waiters.
    let Ok((batch, pieces)) = read.await else { return Ok(()) };
    drop(reading);
    let copier = Arc::clone(inner);
    let copied = inner.engine.compute(priority, move || copy(&copier, batch, pieces, began, permit)).await;
    let wrong = copied.unwrap_or_default();
    if !wrong.is_empty() {
        let (inner, context) = (Arc::clone(inner), context.clone());
        // Beside what follows: somebody may wait for them.
        inner.engine.clone().spawn(async move {
            fetch::start(&inner, fetch::group(&inner, wrong), &context, None).await;
        });
    }
    Ok(())
}

impl Located {
    fn len(&self) -> u64 {
        self.claimed.lead.extent().len.into()
    }

    /// What it takes in memory: with it comes what lies between it and the next one.
    fn weight(&self) -> u64 {
        self.len().next_multiple_of(BLOCK)
    }

    /// The byte behind its last one in the file.
    fn end(&self) -> u64 {
        self.place.offset.saturating_add(self.len())
    }

    /// True if `next` lies in the same file, behind this one.
    fn is_before(&self, next: &Self) -> bool {
        let gap = next.place.offset.checked_sub(self.end());
        Arc::ptr_eq(&self.place.source, &next.place.source) && gap.is_some_and(|gap| gap < BLOCK)
    }
}

/// Hands out the chunks that were read and are right, and writes them to the cache. Answers the others.
fn copy(
    inner: &Arc<Inner>,
    batch: Vec<Located>,
    pieces: Vec<Option<Bytes>>,
    began: Instant,
    permit: Permit,
) -> Vec<Claimed> {
    // Before the first answer: whoever flushes after it must find its bytes written.
    let _storing = inner.storing.read().unwrap_or_else(PoisonError::into_inner);
    let (mut fresh, mut failed) = (Vec::new(), Vec::new());
    for (Located { mut claimed, place, .. }, piece) in batch.into_iter().zip(pieces) {
        let extent = claimed.lead.extent();
        let found = piece.zip(extent.digest).filter(|(bytes, expected)| {
            let digest = || expected.algorithm.digest(bytes);
            cpu_timed(&inner.metrics.verify_cpu_ns, digest) == expected.digest
        });
        let Some((bytes, _)) = found else {
            claimed.suspect = dedup::key(extent).map(|digest| place.row(digest));
            failed.push(claimed);
            continue;
        };
        // First: whoever has the bytes must find them counted.
        CacheMetrics::tick(&inner.metrics.deduplicated_chunks);
        inner.metrics.deduplicated_bytes.fetch_add(extent.stored_share(), Relaxed);
        if let Some(observer) = inner.observer.as_ref().filter(|_| claimed.lead.is_demanded()) {
            observer.copied(&inner.id, extent.index, began, Instant::now());
        }
        fresh.extend(publish(claimed, bytes));
    }
    inner.keep(fresh);
    drop(permit);
    failed
}

/// Reads chunks that lie together, with one call if possible; `None` for those that are not there.
fn read(run: &[Located], pieces: &mut Vec<Option<Bytes>>) {
    let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
    let (file, start) = (&first.place.source.file, first.place.offset);
    let mut buffer = vec![0; usize::try_from(last.end().saturating_sub(start)).unwrap_or(0)];
    match file.read_exact_at(&mut buffer, start) {
        Ok(()) => {
            let bytes = Bytes::from(buffer);
            let part = |one: &Located| (one.place.offset - start) as usize..(one.end() - start) as usize;
            pieces.extend(run.iter().map(|one| Some(bytes.slice(part(one)))));
        }
        Err(_) if run.len() > 1 => run.chunks(1).for_each(|one| read(one, pieces)),
        Err(_) => pieces.push(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_made_shorter_and_seldom_two() {
        // Units as (stored bytes, here); which are taken when 100 bytes are worth a request.
        type Case = (&'static [(u64, bool)], &'static [bool]);
        let table: [Case; 8] = [
            (&[], &[]),
            (&[(1, true)], &[true]),
            (&[(1, false)], &[false]),
            (&[(1, true), (1, false), (1, true)], &[true, false, true]),
            (&[(1, false), (99, true), (1, false)], &[false, false, false]),
            (&[(1, false), (50, true), (50, true), (1, false)], &[false, true, true, false]),
            (
                &[(1, false), (100, true), (1, false), (99, true), (1, false)],
                &[false, true, false, false, false],
            ),
            (
                &[(1, true), (1, true), (1, false), (5, true), (1, false), (1, true)],
                &[true, true, false, false, false, true],
            ),
        ];
        for (units, want) in table {
            assert_eq!(taken(units, 100), want, "{units:?}");
        }
    }
}
