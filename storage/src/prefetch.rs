//! Fetching ahead of readers: orders of chunks that are worked off in the background.
//!
//! An order is an iterator, pulled only as fast as the link takes it, so that an order of a
//! whole image takes memory for a window of it. Chunks that are ready, or on their way already, cost
//! nothing.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::extent::ChunkExtent;

/// Chunks in the order they are wanted: place of the blob in the image's blob table, chunk.
pub type Order = Box<dyn Iterator<Item = (u32, ChunkExtent)> + Send>;

/// Which order goes first when the link is busy. Readers always go before all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// What an earlier start of the same image read, in its order.
    Trace,
    /// What the image itself, or the accesses so far, suggest.
    Predicted,
    /// What somebody asked for ahead of time: a list of files, an image.
    Preheat,
    /// The rest of the image.
    Background,
}

/// What reading ahead may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// Readers wait as little as possible: bytes are fetched on suspicion while the link has
    /// room.
    Time,
    /// Hardly more is fetched than is read: at most about twice as much.
    Bytes,
}

/// How far to fetch beyond what readers ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadAhead {
    /// Stored bytes that one missing read is widened to at most; 0: no reading ahead at all.
    pub amplify: u32,
    /// Time or bytes.
    pub prefer: Prefer,
}

impl Default for ReadAhead {
    /// Widens to at most 1 MiB (`amplify_io` of the configuration) and prefers time.
    fn default() -> Self {
        Self { amplify: 1 << 20, prefer: Prefer::Time }
    }
}

/// How an order is worked off.
#[derive(Clone, Copy, Debug)]
pub struct PrefetchOptions {
    /// Its place among other orders.
    pub class: Class,
    /// Bytes a second at most, as stored; `None`: what the link gives.
    pub bandwidth: Option<NonZeroU64>,
    /// It ends only when its chunks are in the cache, or can not be had: also those that were on their way
    /// already.
    pub until_stored: bool,
}

impl PrefetchOptions {
    /// As fast as the link takes it; it ends when all has been asked for and has come.
    pub fn of(class: Class) -> Self {
        Self { class, bandwidth: None, until_stored: false }
    }
}

/// How far an order has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PrefetchProgress {
    /// Chunks looked at so far.
    pub chunks: u64,
    /// Of these, chunks that were there already or on their way.
    pub present_chunks: u64,
    /// Of these, chunks that could not be had.
    pub failed_chunks: u64,
    /// Stored bytes fetched for it.
    pub bytes: u64,
    /// Nothing is left to do, or it was cancelled.
    pub finished: bool,
    /// The first failure.
    pub error: Option<String>,
}

/// An order that is being worked off. Dropping it does not end it.
#[derive(Clone, Debug)]
pub struct Prefetch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    chunks: AtomicU64,
    present: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    error: Mutex<Option<String>>,
    finished: watch::Sender<bool>,
    cancel: CancellationToken,
}

impl Prefetch {
    pub(crate) fn new(cancel: CancellationToken) -> Self {
        let shared = Shared {
            chunks: AtomicU64::new(0),
            present: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            error: Mutex::default(),
            finished: watch::Sender::new(false),
            cancel,
        };
        Self { shared: Arc::new(shared) }
    }

    /// How far it is.
    pub fn progress(&self) -> PrefetchProgress {
        let Shared { chunks, present, failed, bytes, error, finished, .. } = &*self.shared;
        PrefetchProgress {
            finished: *finished.borrow(),
            chunks: chunks.load(Relaxed),
            present_chunks: present.load(Relaxed),
            failed_chunks: failed.load(Relaxed),
            bytes: bytes.load(Relaxed),
            error: error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Ends it early. What has arrived stays.
    pub fn cancel(&self) {
        self.shared.cancel.cancel();
    }

    /// True if it was ended early.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancel.is_cancelled()
    }

    /// Waits for its end.
    pub async fn wait(&self) {
        // The sender lives in `self`.
        let _ = self.shared.finished.subscribe().wait_for(|finished| *finished).await;
    }

    pub(crate) fn token(&self) -> &CancellationToken {
        &self.shared.cancel
    }

    pub(crate) fn looked_at(&self, chunks: u64, present: u64) {
        self.shared.chunks.fetch_add(chunks, Relaxed);
        self.shared.present.fetch_add(present, Relaxed);
    }

    pub(crate) fn fetched(&self, bytes: u64) {
        self.shared.bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn failed(&self, error: &Error) {
        self.shared.failed.fetch_add(1, Relaxed);
        let mut first = self.shared.error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| error.to_string());
    }

    pub(crate) fn finish(&self) {
        self.shared.finished.send_replace(true);
    }
}
