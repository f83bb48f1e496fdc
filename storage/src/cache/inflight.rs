//! One leader fetches, followers wait, whatever becomes of the leader.
//!
//! A [`Lead`] is the duty to answer for one chunk. It travels with the work (through the
//! plan, the stream, the CPU pool) and answers when dropped, so a failure, a panic or a
//! shutdown anywhere on the way wakes all waiters.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::watch;

use super::chunk_map::Record;
use crate::extent::ChunkExtent;
use crate::ids::ChunkIndex;
use crate::{Error, ErrorKind};

/// What became of a fetch.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// The verified bytes of the chunk.
    Bytes(Bytes),
    /// The chunk is in the data file.
    Stored,
    /// Neither.
    Failed(Error),
}

type Key = (ChunkIndex, Record);

/// The chunks of one blob that this process is fetching.
#[derive(Default)]
pub(super) struct Inflight {
    /// One entry a chunk from the first asker until its [`Lead`] is dropped or fails: who
    /// asks after a failure was told starts afresh. Nothing blocks under the lock.
    table: Mutex<HashMap<Key, Entry>>,
}

#[derive(Clone)]
struct Entry {
    answer: watch::Receiver<Option<Outcome>>,
    /// A reader waits for it.
    demanded: Arc<AtomicBool>,
    /// Nobody waited when it was led first: its source is asked without hurry.
    ahead: bool,
}

/// The duty to answer for one chunk.
pub(super) struct Lead {
    table: Arc<Inflight>,
    extent: ChunkExtent,
    answer: watch::Sender<Option<Outcome>>,
    demanded: Arc<AtomicBool>,
    wanted: Instant,
}

/// A claim to the answer for one chunk.
#[derive(Clone)]
pub(super) struct Waiter(watch::Receiver<Option<Outcome>>);

impl Inflight {
    /// Asks for a chunk: everybody waits, and the first one leads. `demanded` says that a
    /// reader asks.
    pub(super) fn join(self: &Arc<Self>, extent: &ChunkExtent, demanded: bool) -> (Waiter, Option<Lead>) {
        let key = (extent.index, Record::of(extent));
        let mut table = self.lock();
        if let Some(entry) = table.get(&key) {
            entry.demanded.fetch_or(demanded, Relaxed);
            return (Waiter(entry.answer.clone()), None);
        }
        let (answer, receiver) = watch::channel(None);
        let shared = Arc::new(AtomicBool::new(demanded));
        table
            .insert(key, Entry { answer: receiver.clone(), demanded: Arc::clone(&shared), ahead: !demanded });
        let lead = Lead {
            table: Arc::clone(self),
            extent: extent.clone(),
            answer,
            demanded: shared,
            wanted: Instant::now(),
        };
        (Waiter(receiver), Some(lead))
    }

    /// Lets the next one who asks for a chunk lead, if its present leader began without a
    /// reader; whoever waits for that one still gets its answer.
    pub(super) fn overtake(&self, extent: &ChunkExtent) -> bool {
        let key = (extent.index, Record::of(extent));
        let mut table = self.lock();
        let overtaken = table.get(&key).is_some_and(|entry| entry.ahead);
        if overtaken {
            table.remove(&key);
        }
        overtaken
    }

    /// True if a chunk is on its way.
    pub(super) fn contains(&self, extent: &ChunkExtent) -> bool {
        self.lock().contains_key(&(extent.index, Record::of(extent)))
    }

    /// True if nothing is being fetched or written.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        // A panic under the lock can only come from the allocator; the map stays whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lead {
    /// The chunk.
    pub(super) fn extent(&self) -> &ChunkExtent {
        &self.extent
    }

    /// True once a reader waits for it.
    pub(super) fn is_demanded(&self) -> bool {
        self.demanded.load(Relaxed)
    }

    /// True while anybody waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        // The table listens, too, unless the lead was overtaken.
        self.answer.receiver_count() > usize::from(self.is_listed(&self.table.lock()))
    }

    fn is_listed(&self, table: &HashMap<Key, Entry>) -> bool {
        let entry = table.get(&(self.extent.index, Record::of(&self.extent)));
        entry.is_some_and(|entry| Arc::ptr_eq(&entry.demanded, &self.demanded))
    }

    /// When it was first asked for.
    pub(super) fn wanted(&self) -> Instant {
        self.wanted
    }

    /// Answers the waiters now; the chunk stays led until the drop. The first answer counts.
    pub(super) fn answer(&self, outcome: Outcome) {
        if matches!(outcome, Outcome::Failed(_)) {
            self.leave();
        }
        self.answer.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(outcome);
            }
            first
        });
    }

    /// Removes this lead from the table, unless another has taken its place.
    fn leave(&self) {
        let mut table = self.table.lock();
        if self.is_listed(&table) {
            table.remove(&(self.extent.index, Record::of(&self.extent)));
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if self.answer.borrow().is_none() {
            let what = format!("chunk {}: its fetch was abandoned", self.extent.index);
            self.answer(Outcome::Failed(Error::new(ErrorKind::Cancelled, what)));
        }
        self.leave();
    }
}

impl Waiter {
    /// Waits for the answer. The caller bounds the wait.
    pub(super) async fn wait(mut self) -> Outcome {
        let answered = self.0.wait_for(Option::is_some).await.map(|slot| slot.clone());
        match answered {
            Ok(Some(outcome)) => outcome,
            // A lead answers before its sender goes.
            _ => Outcome::Failed(Error::new(ErrorKind::Cancelled, "the fetch was abandoned")),
        }
    }

    /// The same, when the lead is gone: the chunk is in the data file then, if it could be written.
    pub(super) async fn wait_for_end(self) -> Outcome {
        let mut news = self.0.clone();
        let outcome = self.wait().await;
        while news.changed().await.is_ok() {}
        outcome
    }
}
