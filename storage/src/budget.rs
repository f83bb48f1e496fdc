//! A bound on what work in flight holds, with on-demand served first: bytes of units, or
//! places on the CPU pool.
//!
//! Of bytes, a fetch reserves for one unit at a time, when that unit's first byte has arrived: a
//! source that does not answer holds nothing. One that stalls in the middle of a unit does, for as long as it is
//! waited for, so what readers wait for goes on without memory of its own after a while ([`Budget::overdraw`]):
//! one unit a stream. Prefetch holds at most a share.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::backend::Priority;

/// The bound, shared by all blobs of an engine.
#[derive(Debug)]
pub(crate) struct Budget {
    /// No I/O and no wake-up happens under this lock.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    total: u64,
    /// What prefetch holds at most, but for a single larger need.
    share: u64,
    free: u64,
    /// Bytes that prefetch holds.
    prefetched: u64,
    on_demand: VecDeque<Waiter>,
    prefetch: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    need: u64,
    grant: oneshot::Sender<Permit>,
}

/// Reserved bytes, returned on drop.
#[derive(Debug)]
pub(crate) struct Permit {
    budget: Arc<Budget>,
    bytes: u64,
    priority: Priority,
}

/// Who waits may leave the head of the queue: then those behind it may fit.
struct Leaving<'a>(&'a Arc<Budget>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.hand_out();
    }
}

impl Budget {
    /// A bound of `total`, of which prefetch may hold `share`.
    pub(crate) fn new(total: u64, share: u64) -> Arc<Self> {
        let total = total.max(1);
        let (on_demand, prefetch) = (VecDeque::new(), VecDeque::new());
        let state = State { total, share, free: total, prefetched: 0, on_demand, prefetch };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Makes the bound at least `total`, of which prefetch may hold half.
    pub(crate) fn at_least(self: &Arc<Self>, total: u64) {
        {
            let mut state = self.lock();
            let more = total.saturating_sub(state.total);
            state.total += more;
            state.free += more;
            state.share = state.share.max(state.total / 2);
        }
        self.hand_out();
    }

    /// Bytes that are reserved now.
    pub(crate) fn held(&self) -> u64 {
        let state = self.lock();
        state.total.saturating_sub(state.free)
    }

    /// Waits for `bytes`. More than the whole budget waits for the whole of it, so that a
    /// single large unit passes alone.
    pub(crate) async fn reserve(self: &Arc<Self>, bytes: u64, priority: Priority) -> Permit {
        // Dropped after `granted`, which must look closed by then.
        let _leaving = Leaving(self);
        let (grant, granted) = oneshot::channel();
        {
            let mut state = self.lock();
            let need = bytes.min(state.total);
            match priority {
                Priority::OnDemand => state.on_demand.push_back(Waiter { need, grant }),
                Priority::Prefetch => state.prefetch.push_back(Waiter { need, grant }),
            }
        }
        self.hand_out();
        match granted.await {
            Ok(permit) => permit,
            // The queue lives as long as `self`, and a waiter leaves it only by its grant.
            Err(_) => self.overdraw(priority),
        }
    }

    /// A permit for nothing: what it stands for is held beside the bound.
    pub(crate) fn overdraw(self: &Arc<Self>, priority: Priority) -> Permit {
        Permit { budget: Arc::clone(self), bytes: 0, priority }
    }

    /// Grants what fits, on-demand first. A waiter that has gone returns its grant.
    fn hand_out(self: &Arc<Self>) {
        while let Some((waiter, priority)) = self.next_grant() {
            // A refused grant comes back and is dropped, which hands out again.
            let permit = Permit { budget: Arc::clone(self), bytes: waiter.need, priority };
            drop(waiter.grant.send(permit));
        }
    }

    /// The waiter whose turn it is, if there is room for it, which is taken.
    fn next_grant(&self) -> Option<(Waiter, Priority)> {
        let mut state = self.lock();
        let State { share, free, prefetched, on_demand, prefetch, .. } = &mut *state;
        for queue in [&mut *on_demand, &mut *prefetch] {
            while queue.front().is_some_and(|waiter| waiter.grant.is_closed()) {
                queue.pop_front();
            }
        }
        let (queue, priority) = match on_demand.is_empty() {
            true => (prefetch, Priority::Prefetch),
            false => (on_demand, Priority::OnDemand),
        };
        let need = queue.front()?.need;
        // A unit larger than prefetch's share passes alone.
        let shared = priority == Priority::OnDemand || *prefetched == 0 || *prefetched + need <= *share;
        if need > *free || !shared {
            return None;
        }
        *free -= need;
        if priority == Priority::Prefetch {
            *prefetched += need;
        }
        Some((queue.pop_front()?, priority))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; a poisoned state would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.budget.lock();
            state.free += self.bytes;
            if self.priority == Priority::Prefetch {
                state.prefetched -= self.bytes;
            }
        }
        self.budget.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn on_demand_passes_prefetch_and_gone_waiters_return_their_share() {
        let budget = Budget::new(10, 5);
        let held = budget.reserve(1000, Priority::Prefetch).await;
        let mut prefetch = Box::pin(budget.reserve(6, Priority::Prefetch));
        let mut gone = Box::pin(budget.reserve(6, Priority::OnDemand));
        let mut wanted = Box::pin(budget.reserve(6, Priority::OnDemand));
        assert!(prefetch.as_mut().now_or_never().is_none());
        assert!(gone.as_mut().now_or_never().is_none());
        assert!(wanted.as_mut().now_or_never().is_none());
        drop(gone);
        drop(held);
        let permit = wanted.await;
        assert!(prefetch.as_mut().now_or_never().is_none());
        drop(permit);
        drop(prefetch.await);
        assert_eq!(budget.lock().free, 10);
    }

    #[tokio::test]
    async fn who_leaves_the_head_of_the_queue_lets_others_pass() {
        let budget = Budget::new(10, 5);
        let held = budget.reserve(5, Priority::OnDemand).await;
        let mut large = Box::pin(budget.reserve(8, Priority::OnDemand));
        let mut small = Box::pin(budget.reserve(3, Priority::OnDemand));
        assert!(large.as_mut().now_or_never().is_none());
        assert!(small.as_mut().now_or_never().is_none());
        drop(large);
        drop(small.now_or_never().unwrap());
        drop(held);
        assert_eq!(budget.lock().free, 10);
    }

    #[tokio::test]
    async fn a_bound_that_grows_lets_waiters_pass() {
        let budget = Budget::new(10, 5);
        let held = budget.reserve(8, Priority::OnDemand).await;
        let mut large = Box::pin(budget.reserve(10, Priority::OnDemand));
        assert!(large.as_mut().now_or_never().is_none());
        budget.at_least(9);
        assert!(large.as_mut().now_or_never().is_none());
        budget.at_least(18);
        let large = large.now_or_never().unwrap();
        assert_eq!(budget.held(), 18);
        drop((held, large));
        assert_eq!((budget.held(), budget.lock().share), (0, 9));
    }

    #[tokio::test]
    async fn prefetch_leaves_room_for_readers() {
        let budget = Budget::new(10, 5);
        let held = budget.reserve(3, Priority::Prefetch).await;
        let mut second = Box::pin(budget.reserve(3, Priority::Prefetch));
        assert!(second.as_mut().now_or_never().is_none());
        drop(budget.reserve(7, Priority::OnDemand).now_or_never().unwrap());
        drop(held);
        drop(second.now_or_never().unwrap());
        // A unit that is larger than prefetch's share passes while no other is held.
        drop(budget.reserve(9, Priority::Prefetch).now_or_never().unwrap());
        assert_eq!(budget.lock().free, 10);
    }
}
