//! The node's way to its sources: what it can carry, and who may use it next.
//!
//! ```text
//!  readers ───────────────────────────────▶ at once
//!  orders: trace ▶ predicted ▶ preheat ▶ background
//!              └── one behind the other, when no more than the window is under way
//! ```
//!
//! Reading ahead must keep the link busy and must not stand in a reader's way. Both follow
//! from one number, the *window*: more is asked for ahead when no more than this is under
//! way. With twice what the link holds (bandwidth times round trip) the next answer begins as
//! the last one ends, also over a new connection; more would only be a queue in front of the
//! next reader. While a reader's bytes come in, streams that nobody waits for stop taking
//! theirs ([`Link::give_way`]).
//!
//! Both factors are measured on the traffic there is: the round trip as the time to the
//! first byte of an answer, the bandwidth over spans in which bytes were owed all the time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use crate::prefetch::Class;

/// The least that is under way before more is asked for: a slow link takes a second for this
/// at 4 Mbit/s.
const MIN_WINDOW: u64 = 512 << 10;

/// The most: enough for 10 Gbit/s over 10 ms.
const MAX_WINDOW: u64 = 16 << 20;

/// Without readers, requests under way at once whatever was measured: one stream alone does
/// not fill every link.
const IDLE_REQUESTS: usize = 4;

/// The same before the link's rate is known: a start needs it filled, and what comes first must
/// not wait for much that comes later.
const FIRST_REQUESTS: usize = 2;

/// Least span that a bandwidth is measured over: shorter ones measure bursts. The first one is
/// shorter: a burst tells more than nothing.
const SPAN: Duration = Duration::from_millis(40);
const FIRST_SPAN: Duration = Duration::from_millis(10);

/// Readers count as waiting this long after the last one was served.
const READERS_LINGER: Duration = Duration::from_millis(200);

/// Longest a stream that nobody waits for is held back by readers, so that its source does
/// not give up on it.
const PATIENCE: Duration = Duration::from_millis(50);

/// Least and longest wait of a reader for a fetch that began without one: its answer may be
/// under way, and asking twice costs bytes.
const OVERTAKE: (Duration, Duration) = (Duration::from_millis(750), Duration::from_secs(3));

/// Orders, by [`Class`].
const CLASSES: usize = 4;

/// Admission and measurement, shared by all blobs of an engine.
#[derive(Debug)]
pub(crate) struct Link {
    /// Nothing blocks under it.
    state: Mutex<State>,
    /// Demanded streams that are receiving now.
    receiving: watch::Sender<usize>,
}

#[derive(Debug)]
struct State {
    /// Readers that wait.
    demands: usize,
    last_demand: Option<Instant>,
    /// Bytes asked for ahead that have not come yet.
    ahead: u64,
    /// Requests that ask ahead.
    ahead_requests: usize,
    waiting: [VecDeque<Waiter>; CLASSES],
    gauge: Gauge,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    grant: oneshot::Sender<Slot>,
}

/// What was measured.
#[derive(Debug)]
struct Gauge {
    /// Smoothed towards the smallest.
    round_trip: Option<Duration>,
    /// Bytes a second, smoothed.
    rate: Option<f64>,
    /// Streams that are receiving.
    streams: usize,
    /// Bytes and time of the span so far; time counts while streams receive.
    bytes: u64,
    busy: Duration,
    since: Instant,
}

/// The right to ask for some bytes ahead; shrinks as they come, ends when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    link: Arc<Link>,
    bytes: AtomicU64,
}

/// A reader that waits.
#[derive(Debug)]
pub(crate) struct Demand {
    link: Arc<Link>,
}

/// A stream that is receiving.
#[derive(Debug)]
pub(crate) struct Receiving {
    link: Arc<Link>,
    demanded: bool,
}

impl Link {
    pub(crate) fn new() -> Arc<Self> {
        let gauge = Gauge {
            round_trip: None,
            rate: None,
            streams: 0,
            bytes: 0,
            busy: Duration::ZERO,
            since: Instant::now(),
        };
        let state = State {
            demands: 0,
            last_demand: None,
            ahead: 0,
            ahead_requests: 0,
            waiting: Default::default(),
            gauge,
        };
        Arc::new(Self { state: Mutex::new(state), receiving: watch::Sender::new(0) })
    }

    /// Notes a reader that waits, until the answer is dropped.
    pub(crate) fn demand(self: &Arc<Self>) -> Demand {
        let mut state = self.lock();
        state.demands += 1;
        state.last_demand = Some(Instant::now());
        Demand { link: Arc::clone(self) }
    }

    /// Waits until `bytes` may be asked for ahead.
    pub(crate) async fn admit(self: &Arc<Self>, class: Class, bytes: u64) -> Slot {
        let (grant, granted) = oneshot::channel();
        self.lock().waiting[class as usize].push_back(Waiter { bytes, grant });
        self.hand_out();
        match granted.await {
            Ok(slot) => slot,
            // The queue lives as long as `self`, and a waiter leaves it only by its grant.
            Err(_) => {
                self.lock().ahead_requests += 1;
                Slot { link: Arc::clone(self), bytes: AtomicU64::new(0) }
            }
        }
    }

    /// Notes that the answer to a request has begun, `waited` after it was asked.
    pub(crate) fn answered(self: &Arc<Self>, waited: Duration, demanded: bool) -> Receiving {
        {
            let mut state = self.lock();
            let gauge = &mut state.gauge;
            gauge.round_trip = Some(match gauge.round_trip {
                Some(known) if waited > known => known + (waited - known) / 16,
                _ => waited,
            });
            if gauge.streams == 0 {
                gauge.since = Instant::now();
            }
            gauge.streams += 1;
        }
        if demanded {
            self.receiving.send_modify(|count| *count += 1);
        }
        Receiving { link: Arc::clone(self), demanded }
    }

    /// True while some reader's bytes come in.
    pub(crate) fn has_readers(&self) -> bool {
        *self.receiving.borrow() > 0
    }

    /// Holds a stream that nobody waits for back while readers receive, within reason.
    pub(crate) async fn give_way(&self) {
        if self.has_readers() {
            let idle = async {
                // The sender lives in `self`.
                let _ = self.receiving.subscribe().wait_for(|count| *count == 0).await;
            };
            // Who has waited long enough goes on.
            let _ = tokio::time::timeout(PATIENCE, idle).await;
        }
    }

    /// Time to the first byte of an answer, as far as is known.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.lock().gauge.round_trip
    }

    /// How long a reader waits for a fetch that began without one, before it asks itself.
    pub(crate) fn patience(&self) -> Duration {
        let state = self.lock();
        let trip = state.gauge.round_trip.unwrap_or_default();
        // It may come last of what was asked for. A rate of zero says nothing, or that nothing comes.
        let owed = state.gauge.rate.map_or(0.0, |rate| state.ahead as f64 / rate);
        let owed = Duration::try_from_secs_f64(owed).unwrap_or_default();
        (trip * 8).clamp(OVERTAKE.0, OVERTAKE.1) + owed.min(OVERTAKE.1)
    }

    /// Bytes that come in a second, as far as is known.
    pub(crate) fn rate(&self) -> Option<u64> {
        // Finite and not negative; `as` saturates.
        self.lock().gauge.rate.map(|rate| rate as u64)
    }

    /// Bytes that come in one round trip, as far as is known: what a miss costs.
    pub(crate) fn held(&self) -> Option<u64> {
        self.lock().gauge.held()
    }

    /// Returns once no reader has waited for `span`.
    pub(crate) async fn quiet(&self, span: Duration) {
        loop {
            let left = {
                let state = self.lock();
                match state.last_demand {
                    Some(at) if state.demands > 0 => span.max(span.saturating_sub(at.elapsed())),
                    Some(at) => span.saturating_sub(at.elapsed()),
                    None => Duration::ZERO,
                }
            };
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }

    fn hand_out(self: &Arc<Self>) {
        while let Some(waiter) = self.next_grant() {
            // A refused grant comes back and is dropped, which hands out again.
            let slot = Slot { link: Arc::clone(self), bytes: AtomicU64::new(waiter.bytes) };
            drop(waiter.grant.send(slot));
        }
    }

    fn next_grant(&self) -> Option<Waiter> {
        let mut state = self.lock();
        let (window, requests) = (state.window(), state.requests());
        for class in 0..CLASSES {
            while let Some(waiter) = state.waiting[class].front() {
                if waiter.grant.is_closed() {
                    state.waiting[class].pop_front();
                    continue;
                }
                if state.ahead > window && state.ahead_requests >= requests {
                    return None;
                }
                let waiter = state.waiting[class].pop_front()?;
                state.ahead += waiter.bytes;
                state.ahead_requests += 1;
                return Some(waiter);
            }
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; a poisoned state would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn window(&self) -> u64 {
        self.gauge.held().unwrap_or(0).saturating_mul(2).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// Requests that may be under way whatever they ask for.
    fn requests(&self) -> usize {
        let readers = self.demands > 0 || self.last_demand.is_some_and(|at| at.elapsed() < READERS_LINGER);
        match self.gauge.rate {
            None => FIRST_REQUESTS,
            Some(_) if readers => 1,
            Some(_) => IDLE_REQUESTS,
        }
    }
}

impl Gauge {
    fn held(&self) -> Option<u64> {
        // Both are finite and not negative; `as` saturates.
        Some((self.rate? * self.round_trip?.as_secs_f64()) as u64)
    }

    fn received(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.tick();
    }

    /// Adds the time since the last tick, and closes the span when it is long enough.
    fn tick(&mut self) {
        let now = Instant::now();
        self.busy += now.saturating_duration_since(self.since);
        self.since = now;
        // An answer that has begun and brings nothing tells nothing yet.
        let span = if self.rate.is_some() { SPAN } else { FIRST_SPAN };
        if self.busy >= span && (self.bytes > 0 || self.rate.is_some()) {
            let rate = self.bytes as f64 / self.busy.as_secs_f64();
            self.rate = Some(self.rate.map_or(rate, |known| known + (rate - known) / 4.0));
            (self.bytes, self.busy) = (0, Duration::ZERO);
        }
    }
}

impl Slot {
    /// Gives back what is not asked for after all.
    pub(crate) fn shrink(&self, bytes: u64) {
        self.give_back(self.bytes.load(Relaxed).saturating_sub(bytes));
    }

    /// Notes bytes that have come: others may be asked for.
    pub(crate) fn came(&self, bytes: u64) {
        self.give_back(bytes);
    }

    fn give_back(&self, bytes: u64) {
        let before = self.bytes.fetch_update(Relaxed, Relaxed, |held| Some(held.saturating_sub(bytes)));
        // The update always succeeds.
        let given = before.unwrap_or(0).min(bytes);
        if given > 0 {
            self.link.lock().ahead -= given;
            self.link.hand_out();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        {
            let mut state = self.link.lock();
            state.ahead -= self.bytes.load(Relaxed);
            state.ahead_requests -= 1;
        }
        self.link.hand_out();
    }
}

impl Drop for Demand {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        state.demands -= 1;
        state.last_demand = Some(Instant::now());
    }
}

impl Receiving {
    /// Notes bytes of the answer.
    pub(crate) fn received(&self, bytes: u64) {
        self.link.lock().gauge.received(bytes);
    }

    /// True if a reader waits for some of what is to come.
    pub(crate) fn is_demanded(&self) -> bool {
        self.demanded
    }

    /// From here on nobody waits for the rest.
    pub(crate) fn is_ahead_now(&mut self) {
        if std::mem::take(&mut self.demanded) {
            self.link.receiving.send_modify(|count| *count -= 1);
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.is_ahead_now();
        let mut state = self.link.lock();
        state.gauge.tick();
        state.gauge.streams -= 1;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn orders_go_by_class_within_the_window() {
        let link = Link::new();
        link.lock().gauge.rate = Some(1.0);
        drop(link.demand());
        let first = link.admit(Class::Background, MIN_WINDOW + 1).now_or_never().unwrap();
        let mut late = Box::pin(link.admit(Class::Background, MIN_WINDOW));
        let mut trace = Box::pin(link.admit(Class::Trace, MIN_WINDOW));
        let mut gone = Box::pin(link.admit(Class::Trace, 1));
        assert!(late.as_mut().now_or_never().is_none());
        assert!(trace.as_mut().now_or_never().is_none());
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        first.came(1);
        let held = trace.now_or_never().unwrap();
        assert!(late.as_mut().now_or_never().is_none());
        held.shrink(0);
        let late = late.now_or_never().unwrap();
        drop((first, held, late));
        let state = link.lock();
        assert_eq!((state.ahead, state.ahead_requests), (0, 0));
    }

    #[tokio::test]
    async fn without_readers_more_requests_go_at_once_the_more_is_known() {
        let link = Link::new();
        let big = MAX_WINDOW * 2;
        let admit = || link.admit(Class::Preheat, big).now_or_never();
        let first: Vec<_> = std::iter::from_fn(admit).take(IDLE_REQUESTS).collect();
        assert_eq!(first.len(), FIRST_REQUESTS);
        link.lock().gauge.rate = Some(1e6);
        let more: Vec<_> = std::iter::from_fn(admit).take(IDLE_REQUESTS).collect();
        assert_eq!(more.len(), IDLE_REQUESTS - FIRST_REQUESTS);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_gives_way() {
        let link = Link::new();
        link.give_way().now_or_never().unwrap();
        let _ahead = link.answered(Duration::from_millis(3), false);
        link.give_way().now_or_never().unwrap();
        let mut demanded = link.answered(Duration::from_millis(3), true);
        assert!(link.give_way().now_or_never().is_none());
        let waiting = Arc::clone(&link);
        let waiting = tokio::spawn(async move { waiting.give_way().await });
        demanded.is_ahead_now();
        waiting.await.unwrap();
    }

    #[test]
    fn the_round_trip_follows_the_shortest() {
        let link = Link::new();
        for ms in [80, 10, 12, 11] {
            drop(link.answered(Duration::from_millis(ms), false));
        }
        let known = link.lock().gauge.round_trip.unwrap();
        assert!(known >= Duration::from_millis(10) && known < Duration::from_millis(11), "{known:?}");
    }
}
