//! Makes written chunks durable in groups, and only then ready for others.
//!
//! While one `fdatasync` runs, finished chunks gather for the next: one sync serves as
//! many chunks as arrive during the previous one, and an idle blob costs nothing.
//!
//! The kernel tells of lost pages once: after a failed sync, a good one says nothing of
//! what was written before the failure was known. So each failure begins a new epoch, and
//! chunks written in an older one stay unready.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunk_map::{ChunkLock, ChunkMap, Record};
use super::data_file::Storage;
use crate::ids::ChunkIndex;

/// A chunk whose bytes are written, not yet durable.
pub(super) struct Written {
    pub(super) index: ChunkIndex,
    pub(super) record: Record,
    /// [`Syncer::epoch`] before the bytes were written.
    pub(super) epoch: u64,
    /// Held until other processes can see the record.
    pub(super) _lock: Arc<ChunkLock>,
}

/// The queue of one blob.
pub(super) struct Syncer {
    data: Arc<dyn Storage>,
    map: Arc<ChunkMap>,
    /// Chunks that wait, and whether somebody runs. Nothing blocks under the lock.
    queue: Mutex<(Vec<Written>, bool)>,
    /// Held by whoever syncs: `flush` must not overtake a running group.
    running: Mutex<()>,
    /// Failed syncs so far. Changed by whoever holds `running`.
    epoch: AtomicU64,
}

impl Syncer {
    pub(super) fn new(data: Arc<dyn Storage>, map: Arc<ChunkMap>) -> Self {
        Self { data, map, queue: Mutex::default(), running: Mutex::default(), epoch: AtomicU64::new(0) }
    }

    /// To be asked before a chunk is written.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Queues chunks. True: the caller starts [`Syncer::run`] on a thread that may block.
    pub(super) fn push(&self, written: impl IntoIterator<Item = Written>) -> bool {
        let mut queue = self.queue();
        queue.0.extend(written);
        !std::mem::replace(&mut queue.1, true)
    }

    /// Syncs until the queue is empty.
    ///
    /// # Errors
    /// The first failure; its chunks, and those written before it, stay unready.
    pub(super) fn run(&self) -> std::io::Result<()> {
        let mut result = Ok(());
        loop {
            let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            let group = {
                let mut queue = self.queue();
                if queue.0.is_empty() {
                    queue.1 = false;
                    return result;
                }
                std::mem::take(&mut queue.0)
            };
            let (group, lost): (Vec<_>, Vec<_>) =
                group.into_iter().partition(|written| written.epoch == self.epoch());
            let done = self.settle(&group);
            if done.is_err() {
                // The kernel may have dropped the pages: trust none of them.
                self.epoch.fetch_add(1, Ordering::SeqCst);
                group.iter().for_each(|written| self.map.unmark(written.index));
                result = result.and(done);
            }
            lost.iter().for_each(|written| self.map.unmark(written.index));
            // The locks go with the group, after the records are visible.
        }
    }

    fn settle(&self, group: &[Written]) -> std::io::Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        self.data.sync()?;
        let mut records: Vec<_> = group.iter().map(|w| (w.index, w.record)).collect();
        for refused in self.map.set(&mut records)? {
            self.map.unmark(refused);
        }
        Ok(())
    }

    fn queue(&self) -> MutexGuard<'_, (Vec<Written>, bool)> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
