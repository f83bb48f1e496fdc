//! Works off orders of chunks that nobody waits for yet.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::inflight::Outcome;
use super::pace::Pace;
use super::set::{Look, Shared};
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::extent::ChunkExtent;
use crate::ids::ByteRange;
use crate::link::Slot;
use crate::prefetch::{Class, Order, Prefetch, PrefetchOptions};
use crate::{Error, ErrorKind};

/// Stored bytes asked for at once: at first, so that what a start wants first comes first,
/// and later, so that requests are few. What comes within a request keeps its order.
const FIRST_PART: u64 = 512 << 10;
const MAX_PART: u64 = 16 << 20;

/// Each part is this many times the one before.
const GROWTH: u64 = 2;

/// A part takes a quarter of a second at most, where the link's rate is known: a reader may
/// want what comes last in it.
const PARTS_A_SECOND: u64 = 4;

/// What a chunk takes of memory while it is on its way, beside its bytes: its waiters, lock and place. A window of
/// small files would be thousands of them.
const CHUNK_COST: u64 = 1 << 10;

/// What `chunks` of `bytes` stored bytes take of the link's window.
pub(super) fn cost(chunks: usize, bytes: u64) -> u64 {
    bytes + chunks as u64 * CHUNK_COST
}

/// Chunks of other blobs that are looked past for more of the one that is wanted next.
const IN_SIGHT: usize = 8192;

/// Chunks looked at before others get the thread: an order may be long, and all of it there.
const AT_A_STRETCH: u32 = 1024;

/// Longest an abandoned source is waited for; what does not come is left to readers.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at what others are fetching.
const AGAIN: Duration = Duration::from_millis(200);

/// A chunk of one of the blobs.
type Chunk = (u32, ChunkExtent);

/// What reading ahead knows of its request.
pub(super) fn context(cancel: &CancellationToken) -> ReadContext {
    ReadContext {
        priority: Priority::Prefetch,
        deadline: Instant::now().checked_add(PATIENCE),
        cancel: cancel.clone(),
        ..ReadContext::on_demand(None)
    }
}

/// Works off `order` to its end.
pub(super) async fn work_off(shared: Arc<Shared>, order: Order, options: PrefetchOptions, handle: Prefetch) {
    // Cancelled, what runs ends by itself; nobody waits for it here.
    let cancelled = handle.token().clone();
    let _end = End(&handle);
    let _telling = tells(&options).then(|| shared.speculator.telling());
    tokio::select! {
        biased;
        () = cancelled.cancelled() => {}
        () = see_to(&shared, order, options, &handle) => {}
    }
}

/// True for an order that says what is wanted next: what comes slowly on purpose, or is to be looked into first, and
/// what somebody wants to have some time, does not.
fn tells(options: &PrefetchOptions) -> bool {
    options.class <= Class::Predicted && options.bandwidth.is_none() && !options.until_stored
}

/// Tells whoever waits for an order that it has ended, however it ends.
struct End<'a>(&'a Prefetch);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// Works off `order`, and for one that somebody asked for, or waits for, again what others were fetching
/// meanwhile: they may have failed, and an order that ends well has all of it.
async fn see_to(shared: &Arc<Shared>, order: Order, options: PrefetchOptions, handle: &Prefetch) {
    let mut others = each_part(shared, order, options, handle, true).await;
    let (mut before, mut since) = (others.len(), Instant::now());
    let all = options.class == Class::Preheat || options.until_stored;
    while all && !others.is_empty() {
        if others.len() < before {
            (before, since) = (others.len(), Instant::now());
        } else if since.elapsed() >= PATIENCE {
            let what = "somebody else is fetching it, and does not get on";
            others.iter().for_each(|(blob, extent)| {
                let name = format!("blob {}, chunk {}", shared.blob_name(*blob), extent.index);
                handle.failed(&Error::new(ErrorKind::TimedOut, what).context(name));
            });
            return;
        }
        tokio::time::sleep(AGAIN).await;
        let again = Box::new(others.into_iter());
        others = each_part(shared, again, options, handle, false).await;
    }
}

/// Works off `order` once; `first` if it was never looked at before. Answers what others are fetching.
async fn each_part(
    shared: &Arc<Shared>,
    order: Order,
    options: PrefetchOptions,
    handle: &Prefetch,
    first: bool,
) -> Vec<Chunk> {
    let link = shared.engine.link();
    // Begun at once, and ended with this order.
    let mut running = JoinSet::new();
    let mut others = Vec::new();
    let mut rest = Rest { order, next: VecDeque::new(), others: Vec::new(), first };
    let mut size = FIRST_PART;
    let mut pace = options.bandwidth.map(|rate| Pace::new(rate, Instant::now()));
    loop {
        if let Some(pace) = &pace {
            tokio::time::sleep(pace.due(Instant::now())).await;
        }
        // One behind the other as the link takes them: what is wanted first does not share it with
        // what is wanted later.
        let slot = link.admit(options.class, size).await;
        while let Some(ended) = running.try_join_next() {
            others.extend(ended.into_iter().flatten());
        }
        // Chosen only now: what has come meanwhile is not asked for again.
        let Some(Part { blob, chunks, bytes }) = rest.part(shared, size, options.until_stored, handle).await
        else {
            break;
        };
        let taken = cost(chunks.len(), bytes);
        slot.shrink(taken);
        if tells(&options) {
            shared.speculator.told(bytes);
        }
        let soon = link.rate().map_or(FIRST_PART * GROWTH, |rate| rate / PARTS_A_SECOND);
        // What a seldom blob gave little of says nothing about the order.
        let grown = if taken >= size / GROWTH { size * GROWTH } else { size };
        size = grown.min(soon.clamp(FIRST_PART, MAX_PART));
        if let Some(pace) = &mut pace {
            pace.charge(bytes, Instant::now());
            size = size.min(pace.rate());
        }
        let part = Part { blob, chunks, bytes };
        let fetch = fetch(Arc::clone(shared), part, Arc::new(slot), options.until_stored, handle.clone());
        shared.engine.spawn_in(&mut running, fetch);
    }
    while let Some(ended) = running.join_next().await {
        others.extend(ended.into_iter().flatten());
    }
    others.append(&mut rest.others);
    others
}

/// What is left of an order.
struct Rest {
    order: Order,
    /// Chunks that the order has given and no part has taken.
    next: VecDeque<Chunk>,
    /// Chunks that somebody else fetches.
    others: Vec<Chunk>,
    /// They are counted: nobody has looked at them before.
    first: bool,
}

/// What is asked for at once, of one blob.
struct Part {
    blob: u32,
    chunks: Vec<ChunkExtent>,
    /// Stored bytes.
    bytes: u64,
}

impl Rest {
    /// Takes about `size` bytes of missing chunks of the blob that is wanted next, as far as they
    /// are in sight: a blob that an order seldom comes to is not asked often. `None` at the end.
    async fn part(
        &mut self,
        shared: &Shared,
        size: u64,
        until_stored: bool,
        handle: &Prefetch,
    ) -> Option<Part> {
        let mut part: Option<Part> = None;
        // The unit whose bytes were counted last.
        let mut charged = None;
        let mut looked = 0;
        let mut later = VecDeque::new();
        while let Some((blob, extent)) = self.next.pop_front().or_else(|| self.order.next()) {
            looked += 1;
            if looked % AT_A_STRETCH == 0 {
                tokio::task::yield_now().await;
            }
            if part.as_ref().is_some_and(|part| part.blob != blob) {
                later.push_back((blob, extent));
                if later.len() >= IN_SIGHT {
                    break;
                }
                continue;
            }
            let look = shared.look(blob, &extent);
            if self.first {
                handle.looked_at(1, u64::from(matches!(look, Look::There | Look::Coming)));
            }
            match look {
                Look::Wanted => {}
                Look::Coming if until_stored => {}
                Look::There => continue,
                Look::Coming => {
                    self.others.push((blob, extent));
                    continue;
                }
                Look::NotKept => {
                    let what = format!(
                        "blob {}: the cache keeps nothing now; is its disk full or read-only?",
                        shared.blob_name(blob)
                    );
                    handle.failed(&Error::new(ErrorKind::Io, what));
                    continue;
                }
            }
            let part = part.get_or_insert_with(|| Part { blob, chunks: Vec::new(), bytes: 0 });
            // What others fetch is waited for with it, and costs nothing more.
            if look == Look::Wanted && charged.as_ref() != Some(&extent.unit) {
                charged = Some(extent.unit.clone());
                part.bytes += extent.unit.compressed.len();
            }
            part.chunks.push(extent);
            if cost(part.chunks.len(), part.bytes) >= size {
                break;
            }
        }
        // Before what was not looked at.
        later.append(&mut self.next);
        self.next = later;
        part
    }
}

/// Fetches a part. Answers what others are fetching.
async fn fetch(
    shared: Arc<Shared>,
    Part { blob, chunks, .. }: Part,
    slot: Arc<Slot>,
    until_stored: bool,
    handle: Prefetch,
) -> Vec<Chunk> {
    let context = context(handle.token());
    let waiters = shared.obtain_ahead(blob, &chunks, &context, slot);
    let mut waiting: FuturesUnordered<_> = waiters
        .into_iter()
        .zip(&chunks)
        .map(|((waiter, led), extent)| async move {
            let outcome = if until_stored { waiter.wait_for_end().await } else { waiter.wait().await };
            (outcome, extent, led)
        })
        .collect();
    let mut units: HashSet<ByteRange> = HashSet::new();
    let mut others = Vec::new();
    let waited = within(&context, "prefetch", async {
        // One by one: an outcome holds the bytes of its chunk.
        while let Some((outcome, extent, led)) = waiting.next().await {
            match outcome {
                Outcome::Failed(e) if e.kind() == ErrorKind::Cancelled => others.push((blob, extent.clone())),
                Outcome::Failed(e) => handle.failed(&e),
                Outcome::Bytes(_) | Outcome::Stored if led => drop(units.insert(extent.unit.compressed)),
                Outcome::Bytes(_) | Outcome::Stored => {}
            }
        }
        Ok::<_, Error>(())
    });
    if let Err(e) = waited.await
        && e.kind() != ErrorKind::Cancelled
    {
        handle.failed(&e);
    }
    handle.fetched(units.iter().map(|unit| unit.len()).sum());
    others
}
