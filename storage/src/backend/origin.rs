//! What is known about each server that was spoken to, and how it is spared: one [`Origin`]
//! a scheme, host and port.
//!
//! ```text
//!   request ─▶ asked to wait? ─▶ a place among its requests ─▶ breaker ─▶ sent
//!                Retry-After      prefetch leaves some free     open: one probe at a time,
//!                                                               prefetch fails at once
//! ```
//!
//! Every wait ends at the deadline of its request and on cancellation.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use super::breaker::{Breaker, BreakerPolicy};
use super::hedge::Hedge;
use super::retry::{Failure, within};
use super::{Priority, ReadContext};
use crate::metrics::OriginSnapshot;
use crate::{Error, ErrorKind, Result};

/// Servers remembered at once. Redirects name them, so hostile registries could name many.
const MAX_ORIGINS: usize = 256;

/// How a server is spared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests at once, answers being read included; at least 4. Prefetch takes at most three
    /// quarters of them.
    pub requests: usize,
    /// When a server that fails is left in peace.
    pub breaker: BreakerPolicy,
    /// A longer `Retry-After` is cut to this, lest one answer stalls all readers for hours.
    pub retry_after_cap: Duration,
    /// Send a request for a reader twice if the first is late.
    pub hedge: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests: 32,
            breaker: BreakerPolicy::default(),
            retry_after_cap: Duration::from_secs(30),
            hedge: true,
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    failures: AtomicU64,
    retries: AtomicU64,
    hedges: AtomicU64,
    hedge_wins: AtomicU64,
    breaker_opens: AtomicU64,
    bytes: AtomicU64,
}

/// One server.
#[derive(Debug)]
pub struct Origin {
    name: String,
    limits: Limits,
    /// It does not answer several ranges with one body. Relaxed, as it guards nothing: a late
    /// look costs one request.
    single: AtomicBool,
    /// It sends whole objects whatever the range. Relaxed, as `single`.
    whole: AtomicBool,
    places: Arc<Semaphore>,
    /// Taken before `places`.
    prefetch_places: Arc<Semaphore>,
    /// Held by the one request that is sent while the breaker is open; taken after `places`.
    probe: Arc<tokio::sync::Mutex<()>>,
    /// Short, never held across an await.
    state: Mutex<State>,
    counters: Counters,
}

#[derive(Debug)]
struct State {
    breaker: Breaker,
    hedge: Hedge,
    /// The server asked to be left alone until then.
    paused: Option<Instant>,
}

/// A request's place among those of its server, kept until its answer is read.
#[derive(Debug)]
pub(super) struct Ticket {
    origin: Arc<Origin>,
    _places: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
    /// The breaker is open, and this request tells whether it stays so.
    probe: Option<OwnedMutexGuard<()>>,
    body: Body,
}

/// What an answer's body says of its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    /// There is none that matters, or it is known how it ended.
    Over,
    /// It has been promised.
    Promised,
    /// Some of it came.
    Coming,
}

impl Origin {
    fn new(name: String, limits: Limits) -> Self {
        let places = limits.requests.max(4);
        let state = State { breaker: Breaker::new(limits.breaker), hedge: Hedge::default(), paused: None };
        Self {
            name,
            limits,
            single: AtomicBool::new(false),
            whole: AtomicBool::new(false),
            places: Arc::new(Semaphore::new(places)),
            prefetch_places: Arc::new(Semaphore::new(places - places / 4)),
            probe: Arc::default(),
            state: Mutex::new(state),
            counters: Counters::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while holding it; were it so, every field is still valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// May several ranges be asked for at once?
    pub fn takes_many(&self) -> bool {
        !self.single.load(Relaxed)
    }

    /// It was asked for several ranges and answered something else.
    pub fn refuses_many(&self, why: &str) {
        if !self.single.swap(true, Relaxed) {
            let server = &self.name;
            tracing::debug!(server, why, "no multi-range requests; ranges are asked for one by one");
        }
    }

    /// Does it send whole objects whatever the range?
    pub fn ignores_range(&self) -> bool {
        self.whole.load(Relaxed)
    }

    /// It was asked for a part of an object and sent that, or all of it.
    pub(super) fn set_ignores_range(&self, ignores: bool) {
        if self.whole.swap(ignores, Relaxed) != ignores && ignores {
            let server = &self.name;
            tracing::warn!(server, "it ignores Range; its blobs are read whole, once, from front to end");
        }
    }

    /// A request to it is made again.
    pub(super) fn retried(&self) {
        self.counters.retries.fetch_add(1, Relaxed);
    }

    /// Waits until a request may be sent.
    ///
    /// # Errors
    /// `Unavailable`: it fails all the time, and this is prefetch, or another reader has just
    /// asked in vain. `TimedOut`: it asked to wait beyond the deadline. `Cancelled`.
    pub(super) async fn admit(
        self: &Arc<Self>,
        context: &ReadContext,
    ) -> std::result::Result<Ticket, Failure> {
        let places = loop {
            self.pause(context).await?;
            let what = format!("a place among the requests to {}", self.name);
            let places = within(context, &what, async {
                let prefetch = match context.priority {
                    Priority::Prefetch => Some(place(&self.prefetch_places).await?),
                    Priority::OnDemand => None,
                };
                Ok::<_, Failure>((place(&self.places).await?, prefetch))
            })
            .await?;
            if self.paused().is_none() {
                break places;
            }
        };
        let probe = self.pass_breaker(context).await?;
        self.counters.requests.fetch_add(1, Relaxed);
        Ok(Ticket { origin: Arc::clone(self), _places: places, probe, body: Body::Over })
    }

    /// Until when the server wants to be left alone.
    fn paused(&self) -> Option<Instant> {
        self.state().paused.filter(|until| *until > Instant::now())
    }

    async fn pause(&self, context: &ReadContext) -> Result<()> {
        while let Some(until) = self.paused() {
            let wait = until.saturating_duration_since(Instant::now()).as_millis();
            let what = format!("server {} asked to wait {wait} ms more (Retry-After)", self.name);
            if context.deadline.is_some_and(|deadline| until >= deadline) {
                let why = format!("{what}, beyond the read's deadline");
                return Err(Error::new(ErrorKind::TimedOut, why));
            }
            within(context, &what, async {
                tokio::time::sleep_until(until.into()).await;
                Ok::<_, Error>(())
            })
            .await?;
        }
        Ok(())
    }

    async fn pass_breaker(
        &self,
        context: &ReadContext,
    ) -> std::result::Result<Option<OwnedMutexGuard<()>>, Failure> {
        let streak = {
            let state = self.state();
            if !state.breaker.is_open() {
                return Ok(None);
            }
            let rest = state.breaker.rest(Instant::now());
            if let (Priority::Prefetch, Some(rest)) = (context.priority, rest) {
                let hint = format!("prefetch waits {} ms for it", rest.as_millis());
                return Err(Failure { passing: false, ..self.out(&state.breaker, &hint) });
            }
            state.breaker.streak()
        };
        let what = format!("server {} fails all the time; wait for another reader's attempt", self.name);
        let probe =
            within(context, &what, async { Ok::<_, Failure>(Arc::clone(&self.probe).lock_owned().await) })
                .await?;
        let state = self.state();
        if !state.breaker.is_open() {
            return Ok(None);
        }
        if state.breaker.streak() != streak {
            return Err(self.out(&state.breaker, "another reader has just tried in vain"));
        }
        Ok(Some(probe))
    }

    fn out(&self, breaker: &Breaker, hint: &str) -> Failure {
        let why = format!(
            "server {}: {} requests in a row failed, the last with: {}; {hint}",
            self.name,
            breaker.streak(),
            breaker.last()
        );
        Failure::passing(Error::new(ErrorKind::Unavailable, why))
    }

    /// Counts a request of a reader; answers after what time its answer is late.
    pub(super) fn late_after(&self) -> Option<Duration> {
        if self.limits.hedge { self.state().hedge.late_after() } else { None }
    }

    /// A place for a second request, if it can be afforded.
    pub(super) fn second(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        if !self.state().hedge.spend() {
            return None;
        }
        self.counters.requests.fetch_add(1, Relaxed);
        self.counters.hedges.fetch_add(1, Relaxed);
        Some(place)
    }

    /// The second request was sooner.
    pub(super) fn second_won(&self) {
        self.counters.hedge_wins.fetch_add(1, Relaxed);
    }

    /// Its counters and state now.
    pub fn snapshot(&self) -> OriginSnapshot {
        let paused = self.paused();
        let breaker_open = self.state().breaker.is_open();
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        let counters = &self.counters;
        OriginSnapshot {
            origin: self.name.clone(),
            requests: count(&counters.requests),
            failures: count(&counters.failures),
            retries: count(&counters.retries),
            hedges: count(&counters.hedges),
            hedge_wins: count(&counters.hedge_wins),
            breaker_opens: count(&counters.breaker_opens),
            breaker_open,
            paused: paused.is_some(),
            bytes: count(&counters.bytes),
        }
    }
}

async fn place(places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit> {
    // Nobody closes them.
    let closed = |e| Error::new(ErrorKind::Cancelled, "no more requests").with_source(e);
    Arc::clone(places).acquire_owned().await.map_err(closed)
}

impl Ticket {
    /// The server answered, in `time` if that tells something of later requests for blobs, and
    /// perhaps with a wish to be left alone for a while.
    pub(super) fn answered(&mut self, time: Option<Duration>, retry_after: Option<Duration>) {
        self.begun(time);
        if let Some(wait) = retry_after {
            let until = Instant::now() + wait.min(self.origin.limits.retry_after_cap);
            let mut state = self.origin.state();
            state.paused = state.paused.max(Some(until));
        }
        self.ended();
    }

    /// The server began to answer, in `time` as above. Its body tells whether it is well: one that breaks every body
    /// is not.
    pub(super) fn begun(&mut self, time: Option<Duration>) {
        self.body = Body::Promised;
        if let Some(time) = time {
            self.origin.state().hedge.record(time);
        }
    }

    /// The answer is complete, or its reader has enough of it.
    pub(super) fn ended(&mut self) {
        if std::mem::replace(&mut self.body, Body::Over) == Body::Over {
            return;
        }
        if self.origin.state().breaker.succeeded() {
            tracing::info!(server = self.origin.name, "it answers again");
        }
        self.probe = None;
    }

    /// Nobody wants the rest, or has time for it: that says nothing of the server.
    pub(super) fn left(&mut self) {
        self.body = Body::Over;
    }

    /// The body broke.
    pub(super) fn broke(&mut self, why: String) {
        if std::mem::replace(&mut self.body, Body::Over) != Body::Over {
            self.failed(why, None);
        }
    }

    /// The server did not answer, or only that it is broken.
    pub(super) fn failed(&mut self, why: String, retry_after: Option<Duration>) {
        let origin = &self.origin;
        origin.counters.failures.fetch_add(1, Relaxed);
        {
            let mut state = origin.state();
            let now = Instant::now();
            if let Some(wait) = retry_after {
                state.paused = state.paused.max(Some(now + wait.min(origin.limits.retry_after_cap)));
            }
            if state.breaker.failed(now, why) {
                origin.counters.breaker_opens.fetch_add(1, Relaxed);
                let (server, last) = (&origin.name, state.breaker.last());
                tracing::warn!(
                    server,
                    last,
                    "the server fails all the time; only readers ask it until it answers again"
                );
            }
        }
        // Only now may the next one look whether it has to try.
        self.probe = None;
    }

    /// Bytes of the answer came.
    pub(super) fn received(&mut self, bytes: usize) {
        self.origin.counters.bytes.fetch_add(bytes as u64, Relaxed);
        if self.body == Body::Promised {
            self.body = Body::Coming;
            // Other readers need not wait for all of it.
            self.probe = None;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.body == Body::Coming {
            self.ended();
        }
    }
}

/// The servers of one pool of connections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    limits: Limits,
    known: Arc<Mutex<HashMap<String, Arc<Origin>>>>,
}

impl Origins {
    /// None yet; each is spared as `limits` say.
    pub fn new(limits: Limits) -> Self {
        Self { limits, known: Arc::default() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Arc<Origin>>> {
        // No code panics while holding it; were it so, the map is still valid.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server that `url` is asked of.
    pub fn of(&self, url: &Url) -> Arc<Origin> {
        let name = url.origin().ascii_serialization();
        let mut known = self.known();
        if known.len() >= MAX_ORIGINS && !known.contains_key(&name) {
            known.retain(|_, origin| Arc::strong_count(origin) > 1);
        }
        let new = || Arc::new(Origin::new(name.clone(), self.limits));
        Arc::clone(known.entry(name.clone()).or_insert_with(new))
    }

    /// All servers, by name.
    pub fn snapshot(&self) -> Vec<OriginSnapshot> {
        let mut all: Vec<_> = self.known().values().map(|origin| origin.snapshot()).collect();
        all.sort_by(|a, b| a.origin.cmp(&b.origin));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(limits: Limits) -> Arc<Origin> {
        Origins::new(limits).of(&Url::parse("https://a.io/").unwrap())
    }

    fn prefetch() -> ReadContext {
        ReadContext { priority: Priority::Prefetch, ..ReadContext::on_demand(None) }
    }

    #[test]
    fn servers_are_told_apart_and_bounded() {
        let origins = Origins::default();
        let of = |url: &str| origins.of(&Url::parse(url).unwrap());
        let first = of("https://a.io/x");
        first.refuses_many("test");
        assert!(!of("https://a.io:443/y?z").takes_many());
        assert!(of("http://a.io/").takes_many() && of("https://a.io:444/").takes_many());
        for i in 0..MAX_ORIGINS * 2 {
            of(&format!("https://h{i}.io/"));
        }
        assert!(origins.known().len() <= MAX_ORIGINS);
        assert!(!of("https://a.io/").takes_many(), "what is in use was forgotten");
    }

    #[tokio::test]
    async fn places_are_bounded_and_prefetch_leaves_some() {
        let origin = origin(Limits { requests: 8, ..Limits::default() });
        let now = ReadContext::on_demand(Some(Instant::now()));
        let late = ReadContext { deadline: now.deadline, ..prefetch() };
        let mut held = Vec::new();
        for _ in 0..6 {
            held.push(origin.admit(&late).await.unwrap());
        }
        assert_eq!(origin.admit(&late).await.unwrap_err().error.kind(), ErrorKind::TimedOut);
        for _ in 0..2 {
            held.push(origin.admit(&now).await.unwrap());
        }
        let err = origin.admit(&now).await.unwrap_err().error;
        assert!(err.kind() == ErrorKind::TimedOut && err.to_string().contains("https://a.io"), "{err}");
        held.pop();
        assert!(origin.admit(&now).await.is_ok());
    }

    #[tokio::test]
    async fn retry_after_holds_all_back_to_their_deadline() {
        let origin = origin(Limits { retry_after_cap: Duration::from_secs(3600), ..Limits::default() });
        let mut ticket = origin.admit(&ReadContext::on_demand(None)).await.unwrap();
        ticket.answered(None, Some(Duration::from_secs(7200)));
        drop(ticket);
        assert!(origin.snapshot().paused);
        let soon = ReadContext::on_demand(Some(Instant::now() + Duration::from_secs(60)));
        let err = origin.admit(&soon).await.unwrap_err().error;
        assert!(err.kind() == ErrorKind::TimedOut && err.to_string().contains("Retry-After"), "{err}");
        let context = prefetch();
        context.cancel.cancel();
        assert_eq!(origin.admit(&context).await.unwrap_err().error.kind(), ErrorKind::Cancelled);
    }

    #[tokio::test]
    async fn an_open_breaker_lets_one_reader_try_for_all() {
        let origin = origin(Limits::default());
        let context = ReadContext::on_demand(None);
        for _ in 0..5 {
            origin.admit(&context).await.unwrap().failed("GET x: 503".to_owned(), None);
        }
        let failure = origin.admit(&prefetch()).await.unwrap_err();
        assert!(!failure.passing && failure.error.to_string().contains("GET x: 503"), "{failure:?}");

        let mut probe = origin.admit(&context).await.unwrap();
        let waiting = tokio::spawn({
            let origin = Arc::clone(&origin);
            async move { origin.admit(&ReadContext::on_demand(None)).await }
        });
        // The other reader queues before the probe ends.
        tokio::task::yield_now().await;
        probe.failed("GET x: 502".to_owned(), None);
        let failure = waiting.await.unwrap().unwrap_err();
        assert!(failure.passing && failure.error.to_string().contains("GET x: 502"), "{failure:?}");

        origin.admit(&context).await.unwrap().answered(None, None);
        assert!(origin.admit(&prefetch()).await.is_ok());
        let snapshot = origin.snapshot();
        assert_eq!((snapshot.failures, snapshot.breaker_opens, snapshot.breaker_open), (6, 1, false));
    }
}
