//! Works off orders of chunks that nobody waits for yet.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use super::inflight::{Outcome, Waiter};
use super::pace::Pace;
use super::set::Shared;
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::extent::ChunkExtent;
use crate::ids::ByteRange;
use crate::link::Slot;
use crate::prefetch::{Order, Prefetch, PrefetchOptions};
use crate::{Error, ErrorKind};

/// Stored bytes asked for at once: at first, so that what a start wants first comes first,
/// and later, so that requests are few.
const FIRST_BATCH: u64 = 512 << 10;
const MAX_BATCH: u64 = 8 << 20;

/// Chunks of one batch.
const MAX_BATCH_CHUNKS: usize = 4096;

/// Chunks passed over before others get the thread: an order may be long, and all of it there.
const AT_A_STRETCH: u32 = 1024;

/// Longest an abandoned source is waited for; what does not come is left to readers.
const PATIENCE: Duration = Duration::from_secs(60);

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
    tokio::select! {
        biased;
        () = cancelled.cancelled() => {}
        () = each_batch(&shared, order, options, &handle) => {}
    }
    handle.finish();
}

async fn each_batch(shared: &Arc<Shared>, mut order: Order, options: PrefetchOptions, handle: &Prefetch) {
    let link = shared.engine.link();
    let mut running = FuturesUnordered::new();
    let mut left_over = None;
    let mut size = FIRST_BATCH;
    let mut pace = options.bandwidth.map(|rate| Pace::new(rate, Instant::now()));
    loop {
        if let Some(pace) = &pace {
            tokio::time::sleep(pace.due(Instant::now())).await;
        }
        let mut admitted = pin!(link.admit(options.class, size));
        let slot = loop {
            tokio::select! {
                biased;
                slot = &mut admitted => break slot,
                Some(()) = running.next(), if !running.is_empty() => {}
            }
        };
        // Chosen only now: what has come meanwhile is not asked for again.
        let batch = next_batch(shared, &mut order, &mut left_over, size, handle).await;
        if batch.chunks.is_empty() {
            break;
        }
        slot.shrink(batch.bytes);
        size = (size * 2).min(MAX_BATCH);
        if let Some(pace) = &mut pace {
            pace.charge(batch.bytes, Instant::now());
            size = size.min(pace.rate());
        }
        running.push(fetch(Arc::clone(shared), batch, slot, handle.clone()));
    }
    while running.next().await.is_some() {}
}

/// Chunks of one blob that are asked for together.
struct Batch {
    blob: u32,
    chunks: Vec<ChunkExtent>,
    bytes: u64,
}

/// Takes chunks that are missing from the order: of one blob, about `size` bytes.
async fn next_batch(
    shared: &Shared,
    order: &mut Order,
    left_over: &mut Option<(u32, ChunkExtent)>,
    size: u64,
    handle: &Prefetch,
) -> Batch {
    let mut batch = Batch { blob: 0, chunks: Vec::new(), bytes: 0 };
    let mut last_unit = None;
    let mut passed = 0;
    while let Some((blob, extent)) = left_over.take().or_else(|| order.next()) {
        if !shared.is_wanted(blob, &extent) {
            handle.looked_at(1, 1);
            passed = (passed + 1) % AT_A_STRETCH;
            if passed == 0 {
                tokio::task::yield_now().await;
            }
            continue;
        }
        let full = batch.bytes >= size || batch.chunks.len() >= MAX_BATCH_CHUNKS;
        if !batch.chunks.is_empty() && (batch.blob != blob || full) {
            *left_over = Some((blob, extent));
            break;
        }
        handle.looked_at(1, 0);
        batch.blob = blob;
        batch.chunks.push(extent);
        if last_unit.replace(extent.unit) != Some(extent.unit) {
            batch.bytes += extent.unit.compressed.len();
        }
    }
    batch
}

async fn fetch(shared: Arc<Shared>, batch: Batch, slot: Slot, handle: Prefetch) {
    let context = context(handle.token());
    let waiters = shared.obtain_ahead(batch.blob, &batch.chunks, &context, slot);
    let mut waiting: FuturesUnordered<_> = waiters
        .into_iter()
        .zip(&batch.chunks)
        .map(|((waiter, led), extent)| answer(waiter, led.then_some(extent.unit.compressed), &context))
        .collect();
    let mut units: HashSet<ByteRange> = HashSet::new();
    // One by one: an outcome holds the bytes of its chunk.
    while let Some((outcome, unit)) = waiting.next().await {
        match outcome {
            Outcome::Failed(e) if e.kind() == ErrorKind::Cancelled => {}
            Outcome::Failed(e) => handle.failed(&e),
            Outcome::Bytes(_) | Outcome::Stored => units.extend(unit),
        }
    }
    handle.fetched(units.iter().map(|unit| unit.len()).sum());
}

async fn answer(
    waiter: Waiter,
    unit: Option<ByteRange>,
    context: &ReadContext,
) -> (Outcome, Option<ByteRange>) {
    let waited = within(context, "prefetch", async { Ok::<_, Error>(waiter.wait().await) });
    (waited.await.unwrap_or_else(Outcome::Failed), unit)
}
