//! Counters of a cache and of the backend behind it.
//!
//! Plain atomics, shared by all blobs of one configured instance. The snapshots carry the
//! field names of the daemon's metrics API (backend and blobcache families).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

/// Upper bounds of the latency classes in milliseconds; the eighth is larger.
const LATENCY_MS: [u64; 7] = [1, 20, 50, 100, 500, 1000, 2000];

/// Exclusive upper bounds of the size classes in bytes; the eighth is larger.
const SIZE: [u64; 7] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];

type Classes = [AtomicU64; 8];

fn count(classes: &Classes) -> [u64; 8] {
    std::array::from_fn(|i| classes[i].load(Relaxed))
}

/// Requests to one backend.
#[derive(Debug, Default)]
pub struct BackendMetrics {
    reads: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    /// Requests sent again after a failure; shared with those who send them.
    pub(crate) retries: Arc<AtomicU64>,
    latency_ms: AtomicU64,
    latency_classes: Classes,
    size_classes: Classes,
    latency_sizes: [Classes; 8],
}

/// [`BackendMetrics`] at one moment, as the API shows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendSnapshot {
    /// Word of the backend in configuration.
    pub backend_type: String,
    /// Requests.
    pub read_count: u64,
    /// Requests that failed.
    pub read_errors: u64,
    /// Requests sent again after a failure.
    pub read_retries: u64,
    /// Bytes received.
    pub read_amount_total: u64,
    /// Milliseconds from request to last byte, summed.
    pub read_cumulative_latency_millis_total: u64,
    /// Milliseconds by latency class.
    pub read_cumulative_latency_millis_dist: [u64; 8],
    /// Requests by size class.
    pub read_count_block_size_dist: [u64; 8],
    /// Requests by size class, then latency class.
    pub read_latency_sizes_dist: [[u64; 8]; 8],
}

impl BackendMetrics {
    /// Notes one request that received `bytes`.
    pub fn record(&self, bytes: u64, elapsed: Duration, failed: bool) {
        let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let latency = LATENCY_MS.iter().position(|bound| ms <= *bound).unwrap_or(7);
        let size = SIZE.iter().position(|bound| bytes < *bound).unwrap_or(7);
        self.reads.fetch_add(1, Relaxed);
        self.errors.fetch_add(u64::from(failed), Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
        self.latency_ms.fetch_add(ms, Relaxed);
        self.latency_classes[latency].fetch_add(ms, Relaxed);
        self.size_classes[size].fetch_add(1, Relaxed);
        self.latency_sizes[size][latency].fetch_add(1, Relaxed);
    }

    /// All counters now.
    pub fn snapshot(&self, backend_type: &str) -> BackendSnapshot {
        BackendSnapshot {
            backend_type: backend_type.to_owned(),
            read_count: self.reads.load(Relaxed),
            read_errors: self.errors.load(Relaxed),
            read_retries: self.retries.load(Relaxed),
            read_amount_total: self.bytes.load(Relaxed),
            read_cumulative_latency_millis_total: self.latency_ms.load(Relaxed),
            read_cumulative_latency_millis_dist: count(&self.latency_classes),
            read_count_block_size_dist: count(&self.size_classes),
            read_latency_sizes_dist: std::array::from_fn(|i| count(&self.latency_sizes[i])),
        }
    }
}

/// One server of a remote source at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OriginSnapshot {
    /// Scheme, host and port.
    pub origin: String,
    /// Requests sent, hedges included.
    pub requests: u64,
    /// Requests without an answer, or with one that says the server is broken.
    pub failures: u64,
    /// Requests made again after a failure.
    pub retries: u64,
    /// Second requests sent because the first was late.
    pub hedges: u64,
    /// Second requests that were answered first.
    pub hedge_wins: u64,
    /// Times that it failed so often that prefetch was held back.
    pub breaker_opens: u64,
    /// It is held back now.
    pub breaker_open: bool,
    /// It asked to be left alone (`Retry-After`), and the time is not over.
    pub paused: bool,
    /// Bytes of bodies received.
    pub bytes: u64,
}

impl OriginSnapshot {
    /// One for each server, by name: several clients may speak to one.
    pub fn merge(mut all: Vec<Self>) -> Vec<Self> {
        all.sort_by(|a, b| a.origin.cmp(&b.origin));
        all.dedup_by(|next, kept| {
            let is_same = next.origin == kept.origin;
            if is_same {
                kept.add(next);
            }
            is_same
        });
        all
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failures += other.failures;
        self.retries += other.retries;
        self.hedges += other.hedges;
        self.hedge_wins += other.hedge_wins;
        self.breaker_opens += other.breaker_opens;
        self.breaker_open |= other.breaker_open;
        self.paused |= other.paused;
        self.bytes += other.bytes;
    }
}

/// What became of reads through one cache.
#[derive(Debug, Default)]
pub struct CacheMetrics {
    /// Reads answered from local data alone.
    pub whole_hits: AtomicU64,
    /// Reads that found some of their chunks.
    pub partial_hits: AtomicU64,
    /// Reads that found none.
    pub misses: AtomicU64,
    /// Reads that failed.
    pub read_errors: AtomicU64,
    /// Chunks fetched and verified.
    pub fetched_chunks: AtomicU64,
    /// Stored bytes received from the backend.
    pub fetched_bytes: AtomicU64,
    /// Chunks taken from the cache file of another blob and verified.
    pub deduplicated_chunks: AtomicU64,
    /// Their stored bytes, which were not fetched.
    pub deduplicated_bytes: AtomicU64,
    /// Stored bytes of chunks that readers asked for, each chunk counted once: when a reader
    /// has it fetched, or is the first to get what was fetched ahead.
    pub asked_bytes: AtomicU64,
    /// Units whose bytes were wrong or incomplete, counted each time.
    pub verification_failures: AtomicU64,
    /// Chunks that could not be written to the cache.
    pub write_errors: AtomicU64,
    /// Requests at prefetch priority.
    pub prefetch_requests: AtomicU64,
    /// Stored bytes received at prefetch priority.
    pub prefetch_bytes: AtomicU64,
    /// Chunks that had a request at prefetch priority to themselves.
    pub prefetch_unmerged: AtomicU64,
    /// CPU time of comparing chunks with their digests, in nanoseconds.
    pub verify_cpu_ns: AtomicU64,
    /// CPU time of decompression, in nanoseconds.
    pub decode_cpu_ns: AtomicU64,
}

/// [`CacheMetrics`] at one moment. The names of the first six are the API's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheSnapshot {
    /// Reads, however answered.
    pub total: u64,
    /// Reads answered from local data alone.
    pub whole_hits: u64,
    /// Reads that found some of their chunks.
    pub partial_hits: u64,
    /// Stored bytes received at prefetch priority.
    pub prefetch_data_amount: u64,
    /// Requests at prefetch priority.
    pub prefetch_requests_count: u64,
    /// Chunks that had a request at prefetch priority to themselves.
    pub prefetch_unmerged_chunks: u64,
    /// Reads that found none of their chunks.
    pub misses: u64,
    /// Reads that failed.
    pub read_errors: u64,
    /// Chunks fetched and verified.
    pub fetched_chunks: u64,
    /// Stored bytes received from the backend.
    pub fetched_bytes: u64,
    /// Chunks taken from the cache file of another blob and verified.
    pub deduplicated_chunks: u64,
    /// Their stored bytes, which were not fetched.
    pub deduplicated_bytes: u64,
    /// Stored bytes of fetched chunks that readers asked for.
    pub asked_bytes: u64,
    /// Units whose bytes were wrong or incomplete, counted each time.
    pub verification_failures: u64,
    /// Chunks that could not be written to the cache.
    pub write_errors: u64,
    /// CPU time of comparing chunks with their digests, in nanoseconds.
    pub verify_cpu_ns: u64,
    /// CPU time of decompression, in nanoseconds.
    pub decode_cpu_ns: u64,
}

impl CacheMetrics {
    /// All counters now.
    pub fn snapshot(&self) -> CacheSnapshot {
        let (whole_hits, partial_hits) = (self.whole_hits.load(Relaxed), self.partial_hits.load(Relaxed));
        let misses = self.misses.load(Relaxed);
        CacheSnapshot {
            total: whole_hits + partial_hits + misses,
            whole_hits,
            partial_hits,
            prefetch_data_amount: self.prefetch_bytes.load(Relaxed),
            prefetch_requests_count: self.prefetch_requests.load(Relaxed),
            prefetch_unmerged_chunks: self.prefetch_unmerged.load(Relaxed),
            misses,
            read_errors: self.read_errors.load(Relaxed),
            fetched_chunks: self.fetched_chunks.load(Relaxed),
            fetched_bytes: self.fetched_bytes.load(Relaxed),
            deduplicated_chunks: self.deduplicated_chunks.load(Relaxed),
            deduplicated_bytes: self.deduplicated_bytes.load(Relaxed),
            asked_bytes: self.asked_bytes.load(Relaxed),
            verification_failures: self.verification_failures.load(Relaxed),
            write_errors: self.write_errors.load(Relaxed),
            verify_cpu_ns: self.verify_cpu_ns.load(Relaxed),
            decode_cpu_ns: self.decode_cpu_ns.load(Relaxed),
        }
    }

    /// Adds one to `counter`.
    pub(crate) fn tick(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }
}

/// Runs `work` and adds the CPU time it took on this thread to `counter`, in nanoseconds.
/// Threads that wait for a core meanwhile, or for a disk, add nothing.
pub(crate) fn cpu_timed<T>(counter: &AtomicU64, work: impl FnOnce() -> T) -> T {
    let began = thread_cpu();
    let result = work();
    let took = thread_cpu().saturating_sub(began);
    counter.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    result
}

/// CPU time of this thread so far.
fn thread_cpu() -> Duration {
    // Linux always has this clock.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_work_and_not_waiting() {
        let (busy, idle) = (AtomicU64::new(0), AtomicU64::new(0));
        let data = vec![7u8; 4 << 20];
        cpu_timed(&busy, || crate::digest::DigestAlgorithm::Sha256.digest(&data));
        cpu_timed(&idle, || {
            let other = std::thread::spawn(move || crate::digest::DigestAlgorithm::Sha256.digest(&data));
            other.join().unwrap()
        });
        assert!(busy.load(Relaxed) > 0);
        assert!(idle.load(Relaxed) < busy.load(Relaxed));
    }

    #[test]
    fn servers_that_several_clients_speak_to_are_one() {
        let one = |origin: &str, requests, paused| OriginSnapshot {
            origin: origin.to_owned(),
            requests,
            paused,
            ..OriginSnapshot::default()
        };
        let merged = OriginSnapshot::merge(vec![one("b", 1, false), one("a", 2, false), one("b", 4, true)]);
        assert_eq!(merged, [one("a", 2, false), one("b", 5, true)]);
    }

    #[test]
    fn requests_fall_into_classes() {
        let metrics = BackendMetrics::default();
        metrics.record(1023, Duration::from_millis(1), false);
        metrics.record(1024, Duration::from_millis(2), false);
        metrics.record(0, Duration::from_secs(9), true);
        metrics.record(1 << 20, Duration::ZERO, false);
        let snapshot = metrics.snapshot("registry");
        assert_eq!((snapshot.read_count, snapshot.read_errors), (4, 1));
        assert_eq!(snapshot.read_amount_total, 1023 + 1024 + (1 << 20));
        assert_eq!(snapshot.read_count_block_size_dist, [2, 1, 0, 0, 0, 0, 0, 1]);
        assert_eq!(snapshot.read_cumulative_latency_millis_dist, [1, 2, 0, 0, 0, 0, 0, 9000]);
        assert_eq!(snapshot.read_latency_sizes_dist[0], [1, 0, 0, 0, 0, 0, 0, 1]);
        let json = serde_json::to_value(snapshot).unwrap();
        assert_eq!(json["backend_type"], "registry");
    }
}
