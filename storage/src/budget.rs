//! A bound on the bytes that units in flight hold, with on-demand served first.
//!
//! A fetch reserves for one unit at a time, when that unit's first byte has arrived: a
//! source that does not answer holds nothing, so a stalled one does not starve others.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::backend::Priority;

/// The bound, shared by all blobs of an engine.
#[derive(Debug)]
pub(crate) struct Budget {
    total: u64,
    /// No I/O and no wake-up happens under this lock.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: u64,
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
}

impl Budget {
    pub(crate) fn new(total: u64) -> Arc<Self> {
        let total = total.max(1);
        let state = State { free: total, on_demand: VecDeque::new(), prefetch: VecDeque::new() };
        Arc::new(Self { total, state: Mutex::new(state) })
    }

    /// Waits for `bytes`. More than the whole budget waits for the whole of it, so that a
    /// single large unit passes alone.
    pub(crate) async fn reserve(self: &Arc<Self>, bytes: u64, priority: Priority) -> Permit {
        let need = bytes.min(self.total);
        let (grant, granted) = oneshot::channel();
        {
            let mut state = self.lock();
            match priority {
                Priority::OnDemand => state.on_demand.push_back(Waiter { need, grant }),
                Priority::Prefetch => state.prefetch.push_back(Waiter { need, grant }),
            }
        }
        self.hand_out();
        match granted.await {
            Ok(permit) => permit,
            // The queue lives as long as `self`, and a waiter leaves it only by its grant.
            Err(_) => Permit { budget: Arc::clone(self), bytes: 0 },
        }
    }

    /// Grants what fits, on-demand first. A waiter that has gone returns its grant.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let waiter = {
                let mut state = self.lock();
                let State { free, on_demand, prefetch } = &mut *state;
                let queue = if on_demand.is_empty() { prefetch } else { on_demand };
                match queue.front() {
                    Some(waiter) if waiter.grant.is_closed() => {
                        queue.pop_front();
                        continue;
                    }
                    Some(waiter) if waiter.need <= *free => {
                        *free -= waiter.need;
                        queue.pop_front()
                    }
                    _ => None,
                }
            };
            let Some(waiter) = waiter else { return };
            // A refused grant comes back and is dropped, which hands out again.
            let permit = Permit { budget: Arc::clone(self), bytes: waiter.need };
            drop(waiter.grant.send(permit));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; a poisoned state would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.lock().free += self.bytes;
        self.budget.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn on_demand_passes_prefetch_and_gone_waiters_return_their_share() {
        let budget = Budget::new(10);
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
}
