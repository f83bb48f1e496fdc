//! What is known about each server that was spoken to, and how it is spared: one [`Origin`]
//! a scheme, host and port, with what all clients of this process know together behind it.
//!
//! ```text
//!   request ─▶ asked to wait? ─▶ a place among its requests ─▶ breaker ─▶ sent
//!                Retry-After      prefetch leaves some free     open: one probe at a time,
//!                                                               prefetch fails at once
//! ```
//!
//! Many mounts of one registry are one client to it: they share its budget, its breaker and its
//! `Retry-After`. Clients with other limits, or that go another way, are told apart.
//!
//! Every wait ends at the deadline of its request and on cancellation.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use reqwest::Url;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use super::breaker::{Breaker, BreakerPolicy};
use super::hedge::Hedge;
use super::retry::{Failure, within};
use super::{Priority, ReadContext};
use crate::metrics::OriginSnapshot;
use crate::oci::auth::Secret;
use crate::{Error, ErrorKind, Result};

/// Servers that one client remembers at once. Redirects name them, so hostile registries could name many.
const MAX_ORIGINS: usize = 256;

/// How a server is spared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// How a client reaches its servers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Route {
    /// Through this proxy.
    pub proxy: Option<Secret>,
    /// Through those that the environment names.
    pub proxy_from_environment: bool,
    /// Through this socket.
    pub unix_socket: Option<PathBuf>,
}

/// One server, as one client of this process sees it.
#[derive(Debug)]
pub struct Origin {
    name: String,
    limits: Limits,
    server: Arc<Server>,
    counters: Counters,
}

/// What all clients know of a server.
#[derive(Debug)]
struct Server {
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
}

/// What tells servers apart.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    name: String,
    route: Route,
    limits: Limits,
}

/// The servers that some client of this process remembers. Short, never held across an await; taken with the lock
/// of one client's servers held.
static SERVERS: LazyLock<Mutex<HashMap<Key, Weak<Server>>>> = LazyLock::new(Mutex::default);

impl Server {
    fn new(limits: Limits) -> Self {
        let places = limits.requests.max(4);
        let state = State { breaker: Breaker::new(limits.breaker), hedge: Hedge::default(), paused: None };
        Self {
            single: AtomicBool::new(false),
            whole: AtomicBool::new(false),
            places: Arc::new(Semaphore::new(places)),
            prefetch_places: Arc::new(Semaphore::new(places - places / 4)),
            probe: Arc::default(),
            state: Mutex::new(state),
        }
    }

    /// The one that other clients know by `key`, or a new one.
    fn shared(key: Key) -> Arc<Self> {
        // No code panics while holding it; were it so, the map is still valid.
        let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(&key).and_then(Weak::upgrade) {
            return server;
        }
        servers.retain(|_, server| server.strong_count() > 0);
        let server = Arc::new(Self::new(key.limits));
        servers.insert(key, Arc::downgrade(&server));
        server
    }
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
    fn new(name: &str, limits: Limits, route: &Route) -> Self {
        let server = Server::shared(Key { name: name.to_owned(), route: route.clone(), limits });
        Self { name: name.to_owned(), limits, server, counters: Counters::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while holding it; were it so, every field is still valid.
        self.server.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// May several ranges be asked for at once?
    pub fn takes_many(&self) -> bool {
        !self.server.single.load(Relaxed)
    }

    /// It was asked for several ranges and answered something else.
    pub fn refuses_many(&self, why: &str) {
        if !self.server.single.swap(true, Relaxed) {
            let server = &self.name;
            tracing::debug!(server, why, "no multi-range requests; ranges are asked for one by one");
        }
    }

    /// Does it send whole objects whatever the range?
    pub fn ignores_range(&self) -> bool {
        self.server.whole.load(Relaxed)
    }

    /// It was asked for a part of an object and sent that, or all of it.
    pub(super) fn set_ignores_range(&self, ignores: bool) {
        if self.server.whole.swap(ignores, Relaxed) != ignores && ignores {
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
                    Priority::Prefetch => Some(place(&self.server.prefetch_places).await?),
                    Priority::OnDemand => None,
                };
                Ok::<_, Failure>((place(&self.server.places).await?, prefetch))
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
        let probe = within(context, &what, async {
            Ok::<_, Failure>(Arc::clone(&self.server.probe).lock_owned().await)
        })
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
        let place = Arc::clone(&self.server.places).try_acquire_owned().ok()?;
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
    route: Route,
    known: Arc<Mutex<HashMap<String, Known>>>,
}

#[derive(Debug)]
struct Known {
    origin: Arc<Origin>,
    used: Instant,
}

impl Origins {
    /// None yet; each is spared as `limits` say.
    pub fn new(limits: Limits, route: Route) -> Self {
        Self { limits, route, known: Arc::default() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        // No code panics while holding it; were it so, the map is still valid.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server that `url` is asked of.
    pub fn of(&self, url: &Url) -> Arc<Origin> {
        let name = url.origin().ascii_serialization();
        let mut known = self.known();
        if known.len() >= MAX_ORIGINS && !known.contains_key(&name) {
            // The one that was not used for longest, of those that nobody uses now if there are any.
            let in_use = |known: &Known| Arc::strong_count(&known.origin) > 1;
            let oldest = known.iter().min_by_key(|(_, known)| (in_use(known), known.used));
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                known.remove(&oldest);
            }
        }
        let used = Instant::now();
        let known = known.entry(name).or_insert_with_key(|name| {
            let origin = Arc::new(Origin::new(name, self.limits, &self.route));
            Known { origin, used }
        });
        known.used = used;
        Arc::clone(&known.origin)
    }

    /// All servers, by name.
    pub fn snapshot(&self) -> Vec<OriginSnapshot> {
        let mut all: Vec<_> = self.known().values().map(|known| known.origin.snapshot()).collect();
        all.sort_by(|a, b| a.origin.cmp(&b.origin));
        all
    }
}

#[cfg(test)]
mod tests;
