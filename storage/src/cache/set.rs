//! The reader of one image: requests over the chunks of several blobs.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use super::duty::{Duty, HeldDuty};
use super::inflight::{Outcome, Waiter};
use super::speculate::Speculator;
use super::{BlobCache, ahead};
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::engine::{Engine, Handle};
use crate::extent::ChunkExtent;
use crate::ids::ChunkIndex;
use crate::link::Slot;
use crate::metrics::CacheMetrics;
use crate::prefetch::{Order, Prefer, Prefetch, PrefetchOptions, ReadAhead};
use crate::read::{Completion, OutagePolicy, ReadSlice, Reader};
use crate::{Error, ErrorKind, Result};

/// The blobs of one image, in the order of its blob table.
#[derive(Debug)]
pub struct BlobSet {
    shared: Arc<Shared>,
    engine: Handle,
    /// Ends the orders that are being worked off.
    cancel: CancellationToken,
    /// Ends the reads that wait.
    abandon: Mutex<CancellationToken>,
}

impl Drop for BlobSet {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    blobs: Vec<Arc<BlobCache>>,
    policy: OutagePolicy,
    pub(super) engine: Handle,
    pub(super) speculator: Speculator,
}

impl BlobSet {
    /// A reader over `blobs`, which `ReadSlice::blob` indexes, that reads nothing ahead.
    pub fn new(engine: &Engine, blobs: Vec<Arc<BlobCache>>, policy: OutagePolicy) -> Self {
        Self::reading_ahead(engine, blobs, policy, ReadAhead { amplify: 0, prefer: Prefer::Bytes })
    }

    /// A reader over `blobs` that reads ahead as `read_ahead` allows.
    pub fn reading_ahead(
        engine: &Engine,
        blobs: Vec<Arc<BlobCache>>,
        policy: OutagePolicy,
        read_ahead: ReadAhead,
    ) -> Self {
        let engine = engine.handle().clone();
        let shared = Arc::new(Shared {
            blobs,
            policy,
            engine: engine.clone(),
            speculator: Speculator::new(read_ahead),
        });
        Self { shared, engine, cancel: CancellationToken::new(), abandon: Mutex::default() }
    }

    /// Starts fetching `order` ahead of readers. It ends with the order, when it is
    /// cancelled, and with the blobs.
    pub fn prefetch(&self, order: Order, options: PrefetchOptions) -> Prefetch {
        let handle = Prefetch::new(self.cancel.child_token());
        let work = ahead::work_off(Arc::clone(&self.shared), order, options, handle.clone());
        self.engine.spawn(work);
        handle
    }

    /// Says that what readers will want is being found out, and will be ordered: for `time` from now little is
    /// guessed.
    pub fn guide(&self, time: Duration) {
        self.shared.speculator.guide(time);
    }

    /// Bytes that units in flight hold now, of all images of the engine.
    pub fn buffered(&self) -> u64 {
        self.engine.budget().held()
    }

    /// Ends the reads that wait: nobody wants their answers any more. What nobody else waits for is not asked for
    /// again. Reads that come later are served.
    pub fn abandon(&self) {
        std::mem::take(&mut *self.waiting()).cancel();
    }

    /// What ends reads that begin now.
    fn waiting(&self) -> MutexGuard<'_, CancellationToken> {
        // Nothing panics under the lock.
        self.abandon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `dst` as [`Reader::try_read`] does, for whoever looks ahead of readers: no access to learn from.
    ///
    /// # Errors
    /// Those of [`Reader::try_read`].
    pub fn peek(&self, slices: &[ReadSlice], dst: &mut [u8]) -> Result<bool> {
        self.shared.try_copy(slices, dst)
    }

    /// The blobs.
    pub fn blobs(&self) -> &[Arc<BlobCache>] {
        &self.shared.blobs
    }
}

impl Reader for BlobSet {
    fn try_read(&self, slices: &[ReadSlice], dst: &mut [u8]) -> Result<bool> {
        if !self.shared.try_copy(slices, dst)? {
            return Ok(false);
        }
        for slice in slices {
            touch(&self.shared, slice.blob, &slice.extent);
        }
        if let Some(first) = slices.first() {
            CacheMetrics::tick(&self.shared.blobs[first.blob as usize].inner.metrics.whole_hits);
        }
        Ok(true)
    }

    fn will_need(&self, slices: &[ReadSlice]) {
        let local = |slice: &ReadSlice| self.shared.check(slice).is_ok() && self.shared.is_ready(slice);
        let ready = slices.iter().take_while(|slice| local(slice)).count();
        for run in runs(&slices[..ready]) {
            if let Some(files) = self.shared.blobs[run[0].blob as usize].inner.files() {
                files.data.will_need(place(&run[0]), run.iter().map(|slice| u64::from(slice.len)).sum());
            }
        }
    }

    fn submit(&self, slices: Vec<ReadSlice>, priority: Priority, completion: Completion) {
        let answer = Answer(Some(completion));
        let context = ReadContext {
            priority,
            deadline: self.shared.policy.deadline(),
            cancel: self.waiting().clone(),
            ..ReadContext::on_demand(None)
        };
        let shared = Arc::clone(&self.shared);
        self.engine.spawn(async move {
            let served =
                within(&context, "read", async { Ok(serve(&shared, &slices, &context).await) }).await;
            // Who serves names the object in its errors; who ends the wait does not know it.
            let result = served.unwrap_or_else(|e: Error| Err(e.context(shared.name(&slices))));
            if result.is_err()
                && let Some(blob) = slices.first().and_then(|s| shared.blobs.get(s.blob as usize))
            {
                CacheMetrics::tick(&blob.inner.metrics.read_errors);
            }
            answer.give(result);
        });
    }
}

/// The completion of a request, called in any case.
struct Answer(Option<Completion>);

impl Answer {
    fn give(mut self, result: Result<Vec<u8>>) {
        if let Some(completion) = self.0.take() {
            completion(result);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(completion) = self.0.take() {
            completion(Err(Error::new(ErrorKind::Cancelled, "read: the engine dropped the request")));
        }
    }
}

/// What there is to do for a chunk that is wanted ahead of readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing.
    There,
    /// Somebody fetches it.
    Coming,
    /// To fetch it.
    Wanted,
    /// Nothing: the cache would not keep it.
    NotKept,
}

impl Shared {
    fn check(&self, slice: &ReadSlice) -> Result<()> {
        let Some(blob) = self.blobs.get(slice.blob as usize) else {
            let what = format!("read: blob {} of {}", slice.blob, self.blobs.len());
            return Err(Error::new(ErrorKind::OutOfRange, what));
        };
        blob.inner.check(&slice.extent)?;
        if slice.offset.checked_add(slice.len).is_none_or(|end| end > slice.extent.len) {
            let what = format!("blob {}, chunk {}: read behind its end", blob.id(), slice.extent.index);
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        Ok(())
    }

    /// What a read is about, for messages.
    fn name(&self, slices: &[ReadSlice]) -> String {
        let first = slices.first().and_then(|s| Some((self.blobs.get(s.blob as usize)?, s.extent.index)));
        first.map_or_else(|| "read".to_owned(), |(blob, index)| format!("blob {}, chunk {index}", blob.id()))
    }

    /// What an order has to do with a chunk.
    pub(super) fn look(&self, blob: u32, extent: &ChunkExtent) -> Look {
        // An image may name what is not possible; nobody can read it either.
        let Some(inner) = self.blobs.get(blob as usize).map(|blob| &blob.inner) else { return Look::There };
        if inner.check(extent).is_err() || inner.is_ready(extent) {
            Look::There
        } else if !inner.keeps() {
            Look::NotKept
        } else if inner.inflight.contains(extent) {
            Look::Coming
        } else {
            Look::Wanted
        }
    }

    /// The name of a blob, for messages.
    pub(super) fn blob_name(&self, blob: u32) -> String {
        self.blobs.get(blob as usize).map_or_else(String::new, |blob| blob.id().to_string())
    }

    /// Chunks of a blob; 0 if there is no such blob.
    pub(super) fn chunk_count(&self, blob: u32) -> u32 {
        self.blobs.get(blob as usize).map_or(0, |blob| blob.chunk_count())
    }

    /// Where a chunk lies, if that is known.
    pub(super) fn chunk(&self, blob: u32, index: ChunkIndex) -> Option<ChunkExtent> {
        self.blobs.get(blob as usize)?.inner.chunks.as_ref()?(index)
    }

    /// Joins or starts the fetch of chunks that [`Look::Wanted`].
    pub(super) fn obtain_ahead(
        &self,
        blob: u32,
        chunks: &[ChunkExtent],
        context: &ReadContext,
        slot: Arc<Slot>,
    ) -> Vec<(Waiter, bool)> {
        self.blobs[blob as usize].inner.obtain(chunks, context, Some(slot), 0).waiters
    }

    /// Starts the fetch of chunks that nobody waits for.
    pub(super) fn fetch_ahead(&self, blob: u32, chunks: &[ChunkExtent], slot: Slot) {
        let context = ahead::context(&self.blobs[blob as usize].inner.cancel);
        drop(self.obtain_ahead(blob, chunks, &context, Arc::new(slot)));
    }

    /// The duty to guess what readers will want. Where several processes serve an image from one
    /// cache, one of them guesses at a time: what all need is fetched once anyway, guesses would
    /// add up. Twenty starts whose misses were widened by 128 KiB took 1.3 times the bytes of one.
    pub(super) fn duty_to_guess(&self) -> Option<HeldDuty> {
        let top = self.blobs.iter().rev().find_map(|blob| blob.inner.files())?;
        if self.speculator.guesses() { top.map.duties.try_take(Duty::Guess).ok()? } else { None }
    }

    fn is_ready(&self, slice: &ReadSlice) -> bool {
        self.blobs[slice.blob as usize].is_ready(&slice.extent)
    }

    /// Checks the slices and copies them if all are ready; true if so.
    fn try_copy(&self, slices: &[ReadSlice], dst: &mut [u8]) -> Result<bool> {
        let mut total = 0;
        for slice in slices {
            self.check(slice)?;
            total += slice.len as usize;
        }
        if total != dst.len() {
            let what = format!("read: {total} bytes into a buffer of {}", dst.len());
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        Ok(self.copy_ready(slices, dst))
    }

    /// Copies the slices, which fill `dst`, if all are ready; true if so. A chunk that is
    /// forgotten meanwhile may be overwritten, hence the second look.
    fn copy_ready(&self, slices: &[ReadSlice], dst: &mut [u8]) -> bool {
        slices.iter().all(|slice| self.is_ready(slice))
            && self.copy_stored(slices, dst)
            && slices.iter().all(|slice| self.is_ready(slice))
    }

    /// Copies each slice to its place in `out`. Answers `out` and the chunks that are no
    /// longer ready.
    fn copy_parts(&self, mut out: Vec<u8>, parts: &[(ReadSlice, usize)]) -> (Vec<u8>, Vec<Chunk>) {
        let mut forgotten: Vec<Chunk> = Vec::new();
        for (slice, at) in parts {
            let part = &mut out[*at..*at + slice.len as usize];
            let chunk = (slice.blob, slice.extent.clone());
            if !self.copy_ready(std::slice::from_ref(slice), part) && !forgotten.contains(&chunk) {
                forgotten.push(chunk);
            }
        }
        (out, forgotten)
    }

    /// Copies ready slices, which fill `dst`, with one read for each run of bytes that lie
    /// together in a data file. False if a file can not be read.
    fn copy_stored(&self, slices: &[ReadSlice], dst: &mut [u8]) -> bool {
        let mut rest = dst;
        runs(slices).all(|run| {
            let len = run.iter().map(|slice| slice.len as usize).sum();
            let (part, others) = std::mem::take(&mut rest).split_at_mut(len);
            rest = others;
            let blob = &self.blobs[run[0].blob as usize];
            blob.inner.read_stored(&run[0].extent, run[0].offset, part)
        })
    }
}

/// Slices that lie together in a data file.
fn runs(slices: &[ReadSlice]) -> impl Iterator<Item = &[ReadSlice]> {
    slices.chunk_by(|a, b| (a.blob, place(a) + u64::from(a.len)) == (b.blob, place(b)))
}

/// First byte of a slice in the data file.
fn place(slice: &ReadSlice) -> u64 {
    slice.extent.decoded_offset + u64::from(slice.offset)
}

/// Notes that a reader has a chunk: reading ahead may have been right.
fn touch(shared: &Arc<Shared>, blob: u32, extent: &ChunkExtent) {
    let inner = &shared.blobs[blob as usize].inner;
    if inner.untouched.touch(extent.index) {
        inner.metrics.asked_bytes.fetch_add(extent.stored_share(), Relaxed);
        Speculator::hit(shared, blob, extent.index, extent.stored_share());
    }
}

/// A chunk of one of the blobs: same key, same bytes.
type Chunk = (u32, ChunkExtent);

/// Fetches what is missing and answers the bytes of all slices.
async fn serve(shared: &Arc<Shared>, slices: &[ReadSlice], context: &ReadContext) -> Result<Vec<u8>> {
    let mut total = 0usize;
    // Where each chunk's slices go: (place in `slices`, first byte in the answer).
    let mut places: HashMap<(u32, u32), Vec<(usize, usize)>> = HashMap::new();
    let mut wanted: Vec<Chunk> = Vec::new();
    for (place, slice) in slices.iter().enumerate() {
        shared.check(slice)?;
        let key = (slice.blob, slice.extent.index.0);
        let entry = places.entry(key).or_default();
        if entry.is_empty() {
            wanted.push((slice.blob, slice.extent.clone()));
        } else if slices[entry[0].0].extent != slice.extent {
            let what = format!("read: chunk {} with two extents", slice.extent.index);
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        entry.push((place, total));
        total += slice.len as usize;
    }

    let all = wanted.len();
    let mut stored = Vec::new();
    wanted.retain(|chunk| {
        let ready = shared.blobs[chunk.0 as usize].is_ready(&chunk.1);
        if ready {
            touch(shared, chunk.0, &chunk.1);
            stored.push(chunk.clone());
        }
        !ready
    });
    count(shared, slices, all, wanted.len());

    let mut out = vec![0; total];
    // Whatever else uses the link knows that a reader waits.
    let reads = context.priority == Priority::OnDemand && !wanted.is_empty();
    let _waiting = reads.then(|| shared.engine.link().demand());
    let mut asked_before = false;
    loop {
        while !wanted.is_empty() {
            let mut waiting = start(shared, &wanted, context);
            wanted.clear();
            while let Some((chunk, led, outcome)) = waiting.next().await {
                match outcome {
                    Outcome::Bytes(bytes) => {
                        copy_chunk(&bytes, &places[&(chunk.0, chunk.1.index.0)], slices, &mut out)?;
                    }
                    Outcome::Stored => stored.push(chunk),
                    // Our leader gave up before we did: ask again, as leader if need be.
                    // For lack of time always; if the source was out, once: the leader may
                    // have been prefetch, which repeats little.
                    Outcome::Failed(e)
                        if !led
                            && (matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::Cancelled)
                                || (e.kind() == ErrorKind::Unavailable && !asked_before))
                            && context.deadline.is_none_or(|deadline| Instant::now() < deadline) =>
                    {
                        wanted.push(chunk);
                    }
                    Outcome::Failed(e) => return Err(e),
                }
            }
            asked_before = true;
        }
        if stored.is_empty() {
            return Ok(out);
        }
        let reader = Arc::clone(shared);
        let (first, began) = (stored[0].clone(), Instant::now());
        let parts: Vec<_> = stored
            .drain(..)
            .flat_map(|chunk: Chunk| places[&(chunk.0, chunk.1.index.0)].iter())
            .map(|(place, at)| (slices[*place].clone(), *at))
            .collect();
        // The disk may be slow; a chunk that was forgotten since is fetched again.
        let (filled, forgotten) = shared.engine.blocking(move || reader.copy_parts(out, &parts)).await?;
        out = filled;
        wanted = forgotten;
        let blob = &shared.blobs[first.0 as usize].inner;
        if let Some(observer) = &blob.observer {
            observer.copied(&blob.id, first.1.index, began, Instant::now());
        }
    }
}

/// What a reader is told of a fetch that it overtakes.
fn late() -> Outcome {
    Outcome::Failed(Error::new(ErrorKind::TimedOut, "a fetch ahead of readers takes too long"))
}

/// Starts or joins the fetch of every wanted chunk. A leader that began without a reader, and
/// does not get on, is overtaken.
fn start(
    shared: &Arc<Shared>,
    wanted: &[Chunk],
    context: &ReadContext,
) -> FuturesUnordered<impl Future<Output = (Chunk, bool, Outcome)> + use<>> {
    let mut by_blob: HashMap<u32, Vec<ChunkExtent>> = HashMap::new();
    for (blob, extent) in wanted {
        by_blob.entry(*blob).or_default().push(extent.clone());
    }
    let waiting = FuturesUnordered::new();
    for (blob, extents) in by_blob {
        let inner = &shared.blobs[blob as usize].inner;
        // What another process is at says nothing about what nobody thought of.
        let duty = shared.duty_to_guess().filter(|_| inner.keeps() && !inner.are_led_elsewhere(&extents));
        let ahead = duty.as_ref().map_or(0, |_| shared.speculator.widening(shared.engine.link()));
        let obtained = inner.obtain(&extents, context, None, ahead);
        if let (Some(span), Some(duty)) = (obtained.span, duty) {
            Speculator::missed(shared, duty, blob, span, obtained.needed, obtained.widened);
        }
        for hit in obtained.hits {
            Speculator::hit(shared, blob, hit.index, hit.stored_share());
        }
        for (extent, (waiter, led)) in extents.into_iter().zip(obtained.waiters) {
            let (shared, patience) = (Arc::clone(shared), shared.engine.link().patience());
            waiting.push(async move {
                if led {
                    return ((blob, extent), led, waiter.wait().await);
                }
                let waited = tokio::time::timeout(patience, waiter.clone().wait()).await;
                let outcome = match waited {
                    Ok(outcome) => outcome,
                    Err(_) if shared.blobs[blob as usize].inner.inflight.overtake(&extent) => late(),
                    Err(_) => waiter.wait().await,
                };
                ((blob, extent), led, outcome)
            });
        }
    }
    waiting
}

fn copy_chunk(bytes: &Bytes, places: &[(usize, usize)], slices: &[ReadSlice], out: &mut [u8]) -> Result<()> {
    for (place, at) in places {
        let slice = &slices[*place];
        let (start, len) = (slice.offset as usize, slice.len as usize);
        let Some(part) = bytes.get(start..start + len) else {
            return Err(Error::new(ErrorKind::OutOfRange, "read: behind the end of a chunk"));
        };
        out[*at..*at + len].copy_from_slice(part);
    }
    Ok(())
}

fn count(shared: &Shared, slices: &[ReadSlice], all: usize, missing: usize) {
    let Some(blob) = slices.first().and_then(|s| shared.blobs.get(s.blob as usize)) else { return };
    let metrics = &blob.inner.metrics;
    CacheMetrics::tick(match missing {
        0 => &metrics.whole_hits,
        n if n == all => &metrics.misses,
        _ => &metrics.partial_hits,
    });
}
