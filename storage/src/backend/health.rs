//! Whether a mirror or proxy is worth asking: it is left out after some failures in a row,
//! until it answers a ping, or, without one, a later try.
//!
//! Nothing ticks while nobody reads: pings are sent only for a while after the last read that
//! would have used it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::{Method, Request, Url};

use super::ReadContext;
use super::http::Http;

/// How a way around the origin is watched.
#[derive(Clone, Debug)]
pub struct HealthPolicy {
    /// Failures in a row after which it is left out; at least 1.
    pub failures: u32,
    /// Time between pings, or between tries where there is no ping.
    pub interval: Duration,
    /// Pings end when nobody wanted it for so long.
    pub pause: Duration,
    /// What is asked to find out whether it is back; any answer below 500 says so.
    pub ping: Option<Url>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// Left out; the time of the next try where there is no ping.
    down: Option<Instant>,
    /// A task sends pings.
    pinging: bool,
    wanted: Option<Instant>,
}

/// The health of one mirror or proxy.
#[derive(Debug)]
pub(super) struct Health {
    name: String,
    policy: HealthPolicy,
    http: Http,
    /// Short, never held across an await.
    state: Mutex<State>,
}

impl Health {
    /// Of what goes by `name`, well until it fails. Pings go over `http`.
    pub(super) fn new(name: String, policy: HealthPolicy, http: Http) -> Self {
        Self { name, policy, http, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while holding it; were it so, every field is still valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time between looks whether it is back.
    pub(super) fn interval(&self) -> Duration {
        self.policy.interval
    }

    /// May it be asked now?
    pub(super) fn is_usable(self: &Arc<Self>) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        state.wanted = Some(now);
        let Some(next) = state.down else { return true };
        match &self.policy.ping {
            Some(url) if !state.pinging => {
                state.pinging = true;
                tokio::spawn(ping(Arc::downgrade(self), url.clone(), self.policy.interval));
                false
            }
            Some(_) => false,
            // One of those who come asks.
            None if next <= now => {
                state.down = Some(now + self.policy.interval);
                true
            }
            None => false,
        }
    }

    /// It did what was asked.
    pub(super) fn succeeded(&self) {
        let mut state = self.state();
        state.failures = 0;
        if state.down.take().is_some() {
            tracing::info!(name = self.name, "it is used again");
        }
    }

    /// It did not.
    pub(super) fn failed(&self, why: &str) {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        if state.failures >= self.policy.failures.max(1) && state.down.is_none() {
            state.down = Some(Instant::now() + self.policy.interval);
            tracing::warn!(name = self.name, why, "it fails; left out until it is back");
        }
    }
}

/// Asks until it is back, nobody wants it any more, or it is gone.
async fn ping(health: std::sync::Weak<Health>, url: Url, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(health) = health.upgrade() else { return };
        let context = ReadContext::on_demand(Some(Instant::now() + interval.max(Duration::from_secs(1))));
        let answer = health.http.send(Request::new(Method::GET, url.clone()), &context).await;
        if answer.is_ok_and(|answer| !answer.status().is_server_error()) {
            health.succeeded();
        }
        let mut state = health.state();
        let idle = state.wanted.is_none_or(|wanted| wanted.elapsed() > health.policy.pause);
        if state.down.is_none() || idle {
            state.pinging = false;
            return;
        }
    }
}
