//! A ring, and the requests that were taken from it.
//!
//! Requests are given back when they are answered, in any order; with [`Policy::in_order`] in the order in which they
//! were taken. Then the index up to which a ring was used says which requests were answered, and whoever goes on with
//! the ring after a crash loses none and answers none twice.
//!
//! A monitor that stops a ring may use the guest's memory for other things as soon as it is told that the ring has
//! stopped, or save the guest. So the ring stops when nothing is under way: it takes nothing more, waits for what was
//! taken, and gives up what takes too long. Nothing is written to the guest's memory afterwards.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueOwnedT as _, QueueT as _};
use vm_memory::{GuestAddressSpace as _, GuestMemoryMmap};

use super::Memory;
use super::request::{Request, Segment};

/// How long a ring that stops waits for requests under way, and once more after they were told to end.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// How requests of a ring are taken and given back.
pub(super) struct Policy {
    /// See the module.
    pub in_order: bool,
    /// Room for answers, in bytes, of all requests that may be under way at once.
    pub most: u64,
    /// Has requests that wait for a source end.
    pub abandon: Box<dyn Fn() + Send + Sync>,
    /// Has requests be taken again from a ring that was full.
    pub resume: Box<dyn Fn() + Send + Sync>,
}

/// A ring of the crate's, which stops only when nothing is under way.
#[derive(Clone)]
pub(crate) struct Ring {
    inner: VringMutex<Memory>,
    memory: Memory,
    flights: Arc<Flights>,
}

/// The requests under way.
pub(super) struct Flights {
    inner: VringMutex<Memory>,
    state: Mutex<State>,
    changed: Condvar,
    policy: OnceLock<Policy>,
}

#[derive(Default)]
struct State {
    /// It takes nothing any more: it stops, or makes no sense, or its monitor is gone.
    closed: bool,
    /// Life of the ring: what was taken in an earlier one is not given back.
    life: u64,
    /// Requests under way, and their room.
    count: usize,
    bytes: u64,
    /// Threads that write to the guest's memory.
    writing: usize,
    /// There was no room for more.
    full: bool,
    /// In the order of being taken: those that wait for others before them are there with what they were given back
    /// with. Empty unless that matters.
    order: VecDeque<Option<(u16, u32)>>,
    /// Number of the first of them.
    first: u64,
}

/// Says which request it was.
#[derive(Debug)]
pub(super) struct Ticket {
    life: u64,
    number: u64,
    head: u16,
    bytes: u64,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_order(&self) -> bool {
        self.policy.get().is_some_and(|policy| policy.in_order)
    }

    /// Gives a request back: `write` writes its answer to `memory`, and says how much that is. If the ring has another
    /// life by now, nothing is written.
    pub fn complete(&self, ticket: Ticket, memory: &GuestMemoryMmap, write: impl FnOnce() -> u32) {
        let mut state = self.lock();
        if state.life != ticket.life {
            return;
        }
        state.writing += 1;
        drop(state);
        let len = write();
        let mut state = self.lock();
        state.writing -= 1;
        if state.life == ticket.life {
            state.count -= 1;
            state.bytes -= ticket.bytes;
            if let Err(e) = self.publish(&mut state, &ticket, len, memory) {
                tracing::warn!("a guest's ring is left alone: {e}");
                state.closed = true;
            }
        }
        let policy = self.policy.get();
        let resumes = state.full && policy.is_some_and(|policy| state.bytes <= policy.most / 2);
        if resumes {
            state.full = false;
        }
        drop(state);
        self.changed.notify_all();
        if let Some(policy) = policy.filter(|_| resumes) {
            (policy.resume)();
        }
    }

    /// Has the guest see what was given back.
    fn publish(
        &self,
        state: &mut State,
        ticket: &Ticket,
        len: u32,
        memory: &GuestMemoryMmap,
    ) -> io::Result<()> {
        let mut inner = self.inner.get_mut();
        let queue = inner.get_queue_mut();
        if !queue.ready() {
            return Ok(());
        }
        match self.in_order() {
            false => queue.add_used(memory, ticket.head, len).map_err(io::Error::other)?,
            true => {
                let place = usize::try_from(ticket.number - state.first).map_err(io::Error::other)?;
                if let Some(slot) = state.order.get_mut(place) {
                    *slot = Some((ticket.head, len));
                }
                while let Some(Some((head, len))) = state.order.front().copied() {
                    queue.add_used(memory, head, len).map_err(io::Error::other)?;
                    state.order.pop_front();
                    state.first += 1;
                }
            }
        }
        if queue.needs_notification(memory).map_err(io::Error::other)? {
            inner.signal_used_queue()?;
        }
        Ok(())
    }

    /// Waits until nothing is under way, `limit` at most; false if something still is.
    fn settle<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> (MutexGuard<'a, State>, bool) {
        let waited = self.changed.wait_timeout_while(state, limit, |state| state.count > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let settled = state.count == 0;
        (state, settled)
    }

    /// Ends this life: nothing is written to the guest's memory from now on.
    fn end<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        state.life += 1;
        let state = self.changed.wait_while(state, |state| state.writing > 0);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        *state = State { closed: true, life: state.life, ..State::default() };
    }
}

impl Ring {
    /// Sets the policy, unless there is one.
    pub fn govern(&self, policy: impl FnOnce() -> Policy) {
        self.flights.policy.get_or_init(policy);
    }

    /// Takes the next request; `None` if there is none now.
    ///
    /// # Errors
    /// The ring makes no sense. It is left alone from now on.
    pub fn take(&self) -> Result<Option<Request>, QueueError> {
        let mut state = self.flights.lock();
        let Some(policy) = self.flights.policy.get().filter(|_| !state.closed) else { return Ok(None) };
        if state.bytes >= policy.most {
            state.full = true;
            return Ok(None);
        }
        let mut inner = self.inner.get_mut();
        if !inner.is_enabled() || !inner.get_queue().ready() {
            return Ok(None);
        }
        let memory = self.memory.memory().into_inner();
        let next =
            |inner: &mut VringState<Memory>| Ok(inner.get_queue_mut().iter(Arc::clone(&memory))?.next());
        let chain = match next(&mut inner) {
            Ok(Some(chain)) => chain,
            Ok(None) => return Ok(None),
            Err(e) => {
                state.closed = true;
                return Err(e);
            }
        };
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for descriptor in chain {
            let segments = if descriptor.is_write_only() { &mut writable } else { &mut readable };
            segments.push(Segment { address: descriptor.addr(), len: descriptor.len() });
        }
        // At least as much as the thing itself.
        let bytes = writable.iter().chain(&readable).map(|one| u64::from(one.len)).sum::<u64>().max(4096);
        let number = state.first + state.order.len() as u64;
        if policy.in_order {
            state.order.push_back(None);
        }
        state.count += 1;
        state.bytes = state.bytes.saturating_add(bytes);
        let ticket = Ticket { life: state.life, number, head, bytes };
        Ok(Some(Request::new(Arc::clone(&self.flights), ticket, memory, readable, writable)))
    }

    /// False if nothing is taken until somebody makes room, or ever.
    pub fn may_take(&self) -> bool {
        let state = self.flights.lock();
        !state.closed && !state.full
    }

    /// The monitor is gone: nothing is taken any more, and nothing is written.
    pub fn close(&self) {
        self.flights.end(self.flights.lock());
    }

    fn stop(&self) {
        let began = Instant::now();
        let mut state = self.flights.lock();
        if state.closed && state.count == 0 {
            return self.flights.end(state);
        }
        state.closed = true;
        let (state, settled) = self.flights.settle(state, STOP_LIMIT);
        if settled {
            return self.flights.end(state);
        }
        let count = state.count;
        drop(state);
        tracing::warn!(
            "a guest's ring stops with {count} requests under way after {:?}; they end now",
            began.elapsed()
        );
        if let Some(policy) = self.flights.policy.get() {
            (policy.abandon)();
        }
        let (state, settled) = self.flights.settle(self.flights.lock(), STOP_LIMIT);
        if !settled {
            tracing::error!("{} requests of a guest are lost with their ring", state.count);
        }
        self.flights.end(state);
    }
}

impl<'a> VringStateGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Ring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        let inner = VringMutex::new(memory.clone(), max_queue_size)?;
        let flights = Flights {
            inner: inner.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            policy: OnceLock::new(),
        };
        Ok(Self { inner, memory, flights: Arc::new(flights) })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), QueueError> {
        self.inner.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.inner.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.inner.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    /// A ring that stops is done with all that was taken from it; one that starts has a new life.
    fn set_queue_ready(&self, ready: bool) {
        if !ready {
            self.stop();
        }
        self.inner.set_queue_ready(ready);
        if ready {
            self.flights.lock().closed = false;
        }
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

#[cfg(test)]
mod tests;
