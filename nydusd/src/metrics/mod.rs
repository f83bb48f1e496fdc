//! What is counted: one table of file system operations per mount, and requests in flight.
//!
//! ```text
//!  mod.rs         operations of a mount; requests in flight
//!  files.rs       the same by file, if configured; first accesses; files read lately
//!  events.rs      the last errors
//!  durations.rs   how long things took, by class
//!  fetches.rs     fetched chunks: who supplied them, where their time went
//!  prometheus.rs  all of it as text for a scraper
//! ```
//!
//! Names, order and classes of the JSON are the API's (contract 3.8): clients compare exact
//! numbers.

mod durations;
pub mod events;
mod fetches;
mod files;
mod prometheus;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rafs::bootstrap::Nid;
use serde::Serialize;

use durations::Durations;
pub use fetches::{FetchMetrics, FetchSnapshot};
pub(crate) use fetches::{amplification, supplier_name};
pub use files::{FileOptions, Files};
pub use prometheus::{CONTENT_TYPE, expose, resident_memory};

/// Exclusive upper bounds of the read size classes in bytes; the eighth is larger.
const READ_SIZE: [u64; 7] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];

/// Inclusive upper bounds of the read latency classes in microseconds; the eighth is larger.
const READ_LATENCY_US: [u64; 7] = [200, 1_000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000];

/// Operations in the order of the API's arrays. Those that this file system never answers
/// (open, release, opendir: the kernel does not send them) stay zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are FUSE's")]
pub enum Fop {
    Getattr = 0,
    Readlink = 1,
    Open = 2,
    Release = 3,
    Read = 4,
    Statfs = 5,
    Getxattr = 6,
    Listxattr = 7,
    Opendir = 8,
    Lookup = 9,
    Readdir = 10,
    Readdirplus = 11,
    Access = 12,
    Forget = 13,
    BatchForget = 14,
}

/// Operations in the API's arrays.
const FOPS: usize = 15;

/// Place of a read of `bytes` among the size classes.
fn size_class(bytes: u64) -> usize {
    READ_SIZE.iter().position(|bound| bytes < *bound).unwrap_or(7)
}

type Fops = [AtomicU64; FOPS];

/// Names of the operations in the order of the API's arrays.
pub const FOP_NAMES: [&str; FOPS] = [
    "getattr",
    "readlink",
    "open",
    "release",
    "read",
    "statfs",
    "getxattr",
    "listxattr",
    "opendir",
    "lookup",
    "readdir",
    "readdirplus",
    "access",
    "forget",
    "batch_forget",
];

/// Counters of one mount.
#[derive(Debug)]
pub struct FsMetrics {
    data_read: AtomicU64,
    /// Bytes of `data_read` whose reader had to wait for them.
    waited_bytes: AtomicU64,
    /// Reads that were not answered from the cache at once.
    waits: Durations,
    files: Files,
    read_sizes: [AtomicU64; 8],
    read_latencies: [AtomicU64; 8],
    hits: Fops,
    errors: Fops,
    /// Most operations take less than a microsecond: whole ones would sum up to nothing.
    latency_ns: Fops,
}

/// [`FsMetrics`] at one moment, as the API shows them.
#[derive(Clone, Debug, Serialize)]
pub struct FsSnapshot {
    /// Operations are counted by file, too.
    pub files_account_enabled: bool,
    /// First accesses are kept.
    pub access_pattern_enabled: bool,
    /// Files read lately are kept.
    pub record_latest_read_files_enabled: bool,
    /// Latency is always measured.
    pub measure_latency: bool,
    /// Mountpoint inside the daemon.
    pub id: String,
    /// Opens: none, the kernel needs no handle.
    pub nr_opens: u64,
    /// Bytes given to readers.
    pub data_read: u64,
    /// Reads by size class.
    pub block_count_read: [u64; 8],
    /// Operations that succeeded.
    pub fop_hits: [u64; FOPS],
    /// Operations that failed.
    pub fop_errors: [u64; FOPS],
    /// Microseconds spent, by operation.
    pub fop_cumulative_latency_total: [u64; FOPS],
    /// Reads by latency class.
    pub read_latency_dist: [u64; 8],
}

fn load<const N: usize>(counters: &[AtomicU64; N]) -> [u64; N] {
    std::array::from_fn(|i| counters[i].load(Relaxed))
}

impl Default for FsMetrics {
    fn default() -> Self {
        Self::new(FileOptions::default())
    }
}

impl FsMetrics {
    /// Nothing has happened yet.
    pub fn new(options: FileOptions) -> Self {
        Self {
            data_read: AtomicU64::default(),
            waited_bytes: AtomicU64::default(),
            waits: Durations::default(),
            files: Files::new(options),
            read_sizes: Default::default(),
            read_latencies: Default::default(),
            hits: Default::default(),
            errors: Default::default(),
            latency_ns: Default::default(),
        }
    }

    /// What is known of single files.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Notes one operation on `nid`.
    pub fn record_on(&self, nid: Nid, fop: Fop, ok: bool, elapsed: Duration) {
        self.record(fop, ok, elapsed);
        self.files.record(nid, fop, ok);
    }

    /// Notes one operation.
    pub fn record(&self, fop: Fop, ok: bool, elapsed: Duration) {
        let counters = if ok { &self.hits } else { &self.errors };
        counters[fop as usize].fetch_add(1, Relaxed);
        let ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        self.latency_ns[fop as usize].fetch_add(ns, Relaxed);
    }

    /// Notes one read of `nid` that was answered at once: the bytes its reader got, or a failure.
    pub fn record_read(&self, nid: Nid, bytes: Option<u32>, elapsed: Duration) {
        self.record(Fop::Read, bytes.is_some(), elapsed);
        let us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let class = READ_LATENCY_US.iter().position(|bound| us <= *bound).unwrap_or(7);
        self.read_latencies[class].fetch_add(1, Relaxed);
        if let Some(bytes) = bytes.map(u64::from) {
            self.read_sizes[size_class(bytes)].fetch_add(1, Relaxed);
            self.data_read.fetch_add(bytes, Relaxed);
        }
        self.files.record_read(nid, bytes);
    }

    /// Notes one read that waited for its source.
    pub fn record_wait(&self, nid: Nid, bytes: Option<u32>, elapsed: Duration) {
        self.waited_bytes.fetch_add(bytes.unwrap_or(0).into(), Relaxed);
        self.waits.record(elapsed);
        self.record_read(nid, bytes, elapsed);
    }

    /// All counters now; `id` is the mountpoint.
    pub fn snapshot(&self, id: &str) -> FsSnapshot {
        FsSnapshot {
            files_account_enabled: self.files.options().counters,
            access_pattern_enabled: self.files.options().pattern,
            record_latest_read_files_enabled: self.files.options().latest,
            measure_latency: true,
            id: id.to_owned(),
            nr_opens: 0,
            data_read: self.data_read.load(Relaxed),
            block_count_read: load(&self.read_sizes),
            fop_hits: load(&self.hits),
            fop_errors: load(&self.errors),
            fop_cumulative_latency_total: load(&self.latency_ns).map(|ns| ns / 1000),
            read_latency_dist: load(&self.read_latencies),
        }
    }
}

/// One request that has no answer yet.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct InflightEntry {
    /// Inode number.
    pub inode: u64,
    /// FUSE opcode.
    pub opcode: u32,
    /// The kernel's number for the request.
    pub unique: u64,
    /// When it arrived, seconds since the epoch.
    pub timestamp_secs: u64,
}

/// Reads that wait for a source. Everything else is answered at once from memory and never
/// in flight long enough to be seen.
#[derive(Debug, Default)]
pub struct Inflight {
    /// By the request's number. Held for one insertion, removal or copy.
    entries: Mutex<HashMap<u64, InflightEntry>>,
}

/// Removes its entry when the request is answered.
#[derive(Debug)]
pub struct InflightGuard {
    table: Arc<Inflight>,
    unique: u64,
}

impl Inflight {
    /// Notes a request until the guard goes.
    pub fn enter(self: &Arc<Self>, inode: u64, opcode: u32, unique: u64, started: Instant) -> InflightGuard {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp_secs = now.saturating_sub(started.elapsed()).as_secs();
        let entry = InflightEntry { inode, opcode, unique, timestamp_secs };
        self.lock().insert(unique, entry);
        InflightGuard { table: Arc::clone(self), unique }
    }

    /// All requests in flight, oldest number first.
    pub fn entries(&self) -> Vec<InflightEntry> {
        let mut entries: Vec<_> = self.lock().values().copied().collect();
        entries.sort_by_key(|entry| entry.unique);
        entries
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, InflightEntry>> {
        // Insertions and removals leave the map whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        self.table.lock().remove(&self.unique);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_read_counts_once_in_the_first_class() {
        let metrics = FsMetrics::default();
        metrics.record_read(Nid(1), Some(6), Duration::from_micros(200));
        metrics.record_read(Nid(1), None, Duration::from_secs(3));
        metrics.record_wait(Nid(1), Some(1 << 20), Duration::from_micros(201));
        let shot = metrics.snapshot("/");
        assert_eq!(shot.data_read, 6 + (1 << 20));
        assert_eq!(shot.block_count_read, [1, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!((shot.fop_hits[4], shot.fop_errors[4]), (2, 1));
        assert_eq!(shot.read_latency_dist, [1, 1, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn requests_leave_the_table_with_their_guard() {
        let table = Arc::new(Inflight::default());
        let guard = table.enter(7, 15, 42, Instant::now());
        assert_eq!(table.entries()[0].unique, 42);
        drop(guard);
        assert!(table.entries().is_empty());
    }
}
