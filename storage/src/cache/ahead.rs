//! Works off orders of chunks that nobody waits for yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use super::inflight::{Outcome, Waiter};
use super::set::Shared;
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::extent::ChunkExtent;
use crate::prefetch::{Order, Prefetch, PrefetchOptions};
use crate::{Error, ErrorKind};

/// Stored bytes asked for at once.
const BATCH: u64 = 2 << 20;

/// Batches under way at once.
const DEPTH: usize = 4;

/// Longest an abandoned source is waited for; what does not come is left to readers.
const PATIENCE: Duration = Duration::from_secs(60);

/// Works off `order` to its end.
pub(super) async fn work_off(
    shared: Arc<Shared>,
    mut order: Order,
    options: PrefetchOptions,
    handle: Prefetch,
) {
    let started = Instant::now();
    let mut running = FuturesUnordered::new();
    let mut asked = 0u64;
    let mut left_over = None;
    while !handle.is_cancelled() {
        let batch = next_batch(&shared, &mut order, &mut left_over, &handle);
        if batch.chunks.is_empty() {
            break;
        }
        asked += batch.bytes;
        running.push(obtain(Arc::clone(&shared), batch, handle.clone()));
        if running.len() >= DEPTH {
            running.next().await;
        }
        if let Some(rate) = options.bandwidth {
            let due = Duration::try_from_secs_f64(asked as f64 / rate.get() as f64).unwrap_or(Duration::MAX);
            let context = context(&handle);
            // Ends early only when cancelled, which the loop looks at.
            let _ = within(&ReadContext { deadline: None, ..context }, "bandwidth limit", async {
                tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
                Ok::<_, Error>(())
            })
            .await;
        }
    }
    while running.next().await.is_some() {}
    handle.finish();
}

/// Chunks of one blob that are asked for together.
struct Batch {
    blob: u32,
    chunks: Vec<ChunkExtent>,
    bytes: u64,
}

/// Takes chunks that are missing from the order: of one blob, up to [`BATCH`] bytes.
fn next_batch(
    shared: &Shared,
    order: &mut Order,
    left_over: &mut Option<(u32, ChunkExtent)>,
    handle: &Prefetch,
) -> Batch {
    let mut batch = Batch { blob: 0, chunks: Vec::new(), bytes: 0 };
    let mut last_unit = None;
    while let Some((blob, extent)) = left_over.take().or_else(|| order.next()) {
        if !shared.is_wanted(blob, &extent) {
            handle.looked_at(1, 1);
            continue;
        }
        if !batch.chunks.is_empty() && (batch.blob != blob || batch.bytes >= BATCH) {
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

fn context(handle: &Prefetch) -> ReadContext {
    ReadContext {
        priority: Priority::Prefetch,
        deadline: Instant::now().checked_add(PATIENCE),
        cancel: handle.token().clone(),
    }
}

async fn obtain(shared: Arc<Shared>, batch: Batch, handle: Prefetch) {
    let context = context(&handle);
    let waiters = shared.obtain(batch.blob, &batch.chunks, &context);
    let waiting: FuturesUnordered<_> =
        waiters.into_iter().map(|(waiter, led)| answer(waiter, led, &context)).collect();
    let outcomes: Vec<(Outcome, bool)> = waiting.collect().await;
    for (outcome, _) in &outcomes {
        match outcome {
            Outcome::Failed(e) if e.kind() == ErrorKind::Cancelled => {}
            Outcome::Failed(e) => handle.failed(e),
            Outcome::Bytes(_) | Outcome::Stored => {}
        }
    }
    if outcomes.iter().any(|(outcome, led)| *led && !matches!(outcome, Outcome::Failed(_))) {
        handle.fetched(batch.bytes);
    }
}

async fn answer(waiter: Waiter, led: bool, context: &ReadContext) -> (Outcome, bool) {
    let waited = within(context, "prefetch", async { Ok::<_, Error>(waiter.wait().await) });
    (waited.await.unwrap_or_else(Outcome::Failed), led)
}
