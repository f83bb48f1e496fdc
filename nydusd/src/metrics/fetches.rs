//! Fetched chunks of one mount: who supplied them, and where their time went.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use storage::backend::Supplier;
use storage::observe::{Fetched, Observer};

use super::Durations;

/// Whoever may supply bytes, in the order of the counters.
pub(super) const SUPPLIERS: [Supplier; 5] =
    [Supplier::Local, Supplier::Origin, Supplier::Mirror, Supplier::Proxy, Supplier::Peer];

/// The word of a supplier.
pub(crate) fn supplier_name(supplier: Supplier) -> &'static str {
    match supplier {
        Supplier::Local => "local",
        Supplier::Origin => "origin",
        Supplier::Mirror => "mirror",
        Supplier::Proxy => "proxy",
        Supplier::Peer => "peer",
    }
}

/// Where the time of a fetch goes, in order.
pub(super) const PHASES: [&str; 3] = ["queue", "network", "decode"];

/// Chunks and their stored bytes.
#[derive(Debug, Default)]
struct Amount {
    chunks: AtomicU64,
    bytes: AtomicU64,
}

/// Counters of fetched chunks.
#[derive(Debug, Default)]
pub struct FetchMetrics {
    /// By supplier, then: fetched ahead, demanded.
    amounts: [[Amount; 2]; SUPPLIERS.len()],
    failures: AtomicU64,
    /// Time by phase.
    pub(super) phases: [Durations; PHASES.len()],
    /// Taken once a chunk that was fetched ahead.
    ahead: Mutex<Ahead>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    span: Option<(Instant, Instant)>,
    /// Until when `busy` has been counted.
    busy_until: Option<Instant>,
    busy: Duration,
}

/// Chunks of one supplier for one purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Supplied {
    /// Who.
    pub source: &'static str,
    /// `demand`, or `prefetch` if nobody had asked when it came.
    pub purpose: &'static str,
    /// Chunks.
    pub chunks: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

/// [`FetchMetrics`] at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct FetchSnapshot {
    /// By supplier and purpose, those that are not zero.
    pub supplied: Vec<Supplied>,
    /// Chunks that could not be had.
    pub failures: u64,
    /// Seconds that chunks waited for their request to go out, summed.
    pub queue_seconds: f64,
    /// Seconds from request to last byte, summed.
    pub network_seconds: f64,
    /// Seconds of waiting for a core, decoding and verifying, summed.
    pub decode_seconds: f64,
}

/// When chunks were fetched ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AheadTimes {
    /// First wish, since the epoch.
    pub began: Duration,
    /// Last chunk that was ready, since the epoch.
    pub ended: Duration,
    /// Time in which at least one of its requests was under way.
    pub busy: Duration,
}

impl FetchMetrics {
    /// All counters now.
    pub fn snapshot(&self) -> FetchSnapshot {
        let mut supplied = Vec::new();
        for (supplier, purposes) in SUPPLIERS.iter().zip(&self.amounts) {
            for (purpose, amount) in ["prefetch", "demand"].into_iter().zip(purposes) {
                let (chunks, bytes) = (amount.chunks.load(Relaxed), amount.bytes.load(Relaxed));
                if chunks > 0 {
                    supplied.push(Supplied { source: supplier_name(*supplier), purpose, chunks, bytes });
                }
            }
        }
        let [queue_seconds, network_seconds, decode_seconds] =
            std::array::from_fn(|phase| self.phases[phase].sum());
        FetchSnapshot {
            supplied,
            failures: self.failures.load(Relaxed),
            queue_seconds,
            network_seconds,
            decode_seconds,
        }
    }

    /// When chunks were fetched ahead; zero if none was.
    pub fn ahead(&self) -> AheadTimes {
        let ahead = *self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((began, ended)) = ahead.span else { return AheadTimes::default() };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since_epoch = |at: Instant| now.saturating_sub(at.elapsed());
        AheadTimes { began: since_epoch(began), ended: since_epoch(ended), busy: ahead.busy }
    }
}

/// Bytes received for one byte that readers asked for, both as stored; 0 while nobody has
/// asked.
pub fn amplification(received: u64, asked: u64) -> f64 {
    if asked == 0 { 0.0 } else { received as f64 / asked as f64 }
}

impl Observer for FetchMetrics {
    fn fetched(&self, event: &Fetched<'_>) {
        if event.error.is_some() {
            self.failures.fetch_add(1, Relaxed);
            return;
        }
        let moments = [event.wanted, event.requested, event.received, event.verified];
        for (phase, span) in self.phases.iter().zip(moments.windows(2)) {
            phase.record(span[1].saturating_duration_since(span[0]));
        }
        if let Some(place) = SUPPLIERS.iter().position(|supplier| event.supplier == Some(*supplier)) {
            let amount = &self.amounts[place][usize::from(event.demanded)];
            amount.chunks.fetch_add(1, Relaxed);
            amount.bytes.fetch_add(event.stored, Relaxed);
        }
        if !event.demanded {
            let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            let (began, ended) = ahead.span.unwrap_or((event.wanted, event.verified));
            ahead.span = Some((began.min(event.wanted), ended.max(event.verified)));
            // Chunks of one request share its moments, and requests overlap.
            let from = ahead.busy_until.map_or(event.requested, |until| until.max(event.requested));
            ahead.busy += event.received.saturating_duration_since(from);
            ahead.busy_until = Some(from.max(event.received));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::ids::{BlobId, ChunkIndex};

    #[test]
    fn chunks_are_told_apart_by_supplier_and_purpose() {
        let blob = BlobId::new("b").unwrap();
        let metrics = FetchMetrics::default();
        let wanted = Instant::now();
        let after = |ms| wanted + Duration::from_millis(ms);
        let event = Fetched {
            blob: &blob,
            chunk: ChunkIndex(1),
            stored: 100,
            demanded: true,
            supplier: Some(Supplier::Origin),
            wanted,
            requested: after(10),
            answered: after(30),
            received: after(60),
            verified: after(64),
            error: None,
        };
        metrics.fetched(&event);
        metrics.fetched(&Fetched { demanded: false, supplier: Some(Supplier::Peer), ..event });
        let error = storage::Error::new(storage::ErrorKind::Unavailable, "x");
        metrics.fetched(&Fetched { error: Some(&error), ..event });
        let shot = metrics.snapshot();
        assert_eq!((shot.supplied.len(), shot.failures), (2, 1));
        assert_eq!((shot.supplied[1].source, shot.supplied[1].purpose), ("peer", "prefetch"));
        assert!((shot.network_seconds - 0.1).abs() < 1e-9 && (shot.queue_seconds - 0.02).abs() < 1e-9);
        assert!((shot.decode_seconds - 0.008).abs() < 1e-9);
        metrics.fetched(&Fetched { demanded: false, received: after(70), ..event });
        assert_eq!(metrics.ahead().busy, Duration::from_millis(60));
        assert!(metrics.ahead().began < metrics.ahead().ended);
        assert!((amplification(300, 200) - 1.5).abs() < 1e-9 && amplification(300, 0) == 0.0);
    }
}
