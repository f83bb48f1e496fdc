//! Reads of one mount that wait for its source.
//!
//! The pages that they fill stay locked until they are answered, whoever has asked for them, and what
//! the kernel drops of a mount waits for its pages. So whoever has the kernel drop something waits for
//! the reads first, and ends those whose source does not come back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A read that can be ended by others than its source.
pub trait Abandon: Send + Sync {
    /// Answers it with EIO, unless it has an answer.
    fn abandon(&self);
}

/// The reads of one mount.
#[derive(Default)]
pub struct Pending {
    /// Held for a few moves.
    reads: Mutex<Reads>,
    /// Told whenever a read has its answer.
    answered: Notify,
}

#[derive(Default)]
struct Reads {
    last: u64,
    waiting: HashMap<u64, Arc<dyn Abandon>>,
}

/// Takes its read off the list when it is answered.
pub struct PendingGuard {
    list: Arc<Pending>,
    number: u64,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Reads> {
        // Insertions and removals leave the map whole.
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a read to the list until the guard goes.
    pub fn enter(self: &Arc<Self>, read: Arc<dyn Abandon>) -> PendingGuard {
        let mut reads = self.lock();
        reads.last += 1;
        let number = reads.last;
        reads.waiting.insert(number, read);
        PendingGuard { list: Arc::clone(self), number }
    }

    /// True if no read waits.
    pub fn is_empty(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    /// Waits until all reads that wait now have their answers; not for those that come meanwhile.
    pub async fn settle(&self) {
        let last = self.lock().last;
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            // From here on no answer is missed.
            answered.as_mut().enable();
            if self.lock().waiting.keys().all(|number| *number > last) {
                return;
            }
            answered.await;
        }
    }

    /// Ends all reads that wait now.
    pub fn abandon(&self) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        waiting.values().for_each(|read| read.abandon());
        self.answered.notify_waiters();
    }
}

impl Drop for PendingGuard {
    fn drop(&mut self) {
        self.list.lock().waiting.remove(&self.number);
        self.list.answered.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Read(AtomicU32);

    impl Abandon for Read {
        fn abandon(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn who_waits_for_reads_does_not_wait_for_later_ones() {
        let list = Arc::new(Pending::default());
        list.settle().await;
        let (first, second) = (Arc::new(Read::default()), Arc::new(Read::default()));
        let guard = list.enter(first.clone());
        let settled = {
            let list = Arc::clone(&list);
            tokio::spawn(async move { list.settle().await })
        };
        // The runtime has one thread: now the task waits.
        tokio::task::yield_now().await;
        let later = list.enter(second.clone());
        assert!(!settled.is_finished() && !list.is_empty());
        list.abandon();
        assert_eq!((first.0.load(Ordering::Relaxed), second.0.load(Ordering::Relaxed)), (1, 1));
        settled.await.unwrap();
        assert!(list.is_empty());
        let last = list.enter(second);
        drop((guard, later));
        assert!(!list.is_empty(), "guards of reads that were ended take others off the list");
        drop(last);
        assert!(list.is_empty());
    }
}
