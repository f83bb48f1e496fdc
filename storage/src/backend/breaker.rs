//! When a server is left in peace: after many failures in a row, for a growing time.
//!
//! Pure: the time is given. While it is open, [`super::origin::Origin`] lets through one
//! request of a waiting reader at a time, so that a recovery is noticed, and no prefetch.

use std::time::{Duration, Instant};

/// When and for how long a breaker opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BreakerPolicy {
    /// Failures in a row that open it.
    pub failures: u32,
    /// How long at first; doubles each time it opens again without a success between.
    pub open: Duration,
    /// No time is longer.
    pub cap: Duration,
}

impl Default for BreakerPolicy {
    fn default() -> Self {
        Self { failures: 5, open: Duration::from_secs(1), cap: Duration::from_secs(30) }
    }
}

/// The failures of one server.
#[derive(Debug)]
pub(super) struct Breaker {
    policy: BreakerPolicy,
    /// Failures since the last success.
    streak: u32,
    /// Times it opened since then.
    opened: u32,
    until: Option<Instant>,
    /// What failed last.
    last: String,
}

impl Breaker {
    pub(super) fn new(policy: BreakerPolicy) -> Self {
        Self { policy, streak: 0, opened: 0, until: None, last: String::new() }
    }

    /// Failures since the last success: changes with each.
    pub(super) fn streak(&self) -> u32 {
        self.streak
    }

    /// What failed last.
    pub(super) fn last(&self) -> &str {
        &self.last
    }

    pub(super) fn is_open(&self) -> bool {
        self.until.is_some()
    }

    /// How long what nobody waits for is still held back.
    pub(super) fn rest(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now)).filter(|rest| !rest.is_zero())
    }

    /// Closes it; true if it was open.
    pub(super) fn succeeded(&mut self) -> bool {
        (self.streak, self.opened) = (0, 0);
        self.until.take().is_some()
    }

    /// Counts a failure; true if it opens now, or again after its time.
    pub(super) fn failed(&mut self, now: Instant, why: String) -> bool {
        self.streak = self.streak.saturating_add(1);
        self.last = why;
        if self.streak < self.policy.failures || self.until.is_some_and(|until| until > now) {
            return false;
        }
        let factor = 1u32.checked_shl(self.opened).unwrap_or(u32::MAX);
        self.until = Some(now + self.policy.open.saturating_mul(factor).min(self.policy.cap));
        self.opened += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_for_a_growing_time_and_closes_with_a_success() {
        let policy = BreakerPolicy { failures: 3, open: Duration::from_secs(1), cap: Duration::from_secs(5) };
        let mut breaker = Breaker::new(policy);
        let mut now = Instant::now();
        let fail = |breaker: &mut Breaker, now| breaker.failed(now, "x".to_owned());
        assert!(!fail(&mut breaker, now) && !fail(&mut breaker, now) && !breaker.is_open());
        assert!(!breaker.succeeded());
        assert!(!fail(&mut breaker, now) && !fail(&mut breaker, now) && fail(&mut breaker, now));
        for seconds in [1, 2, 4, 5, 5] {
            assert_eq!(breaker.rest(now), Some(Duration::from_secs(seconds)));
            // Failures within the time do not make it longer.
            assert!(!fail(&mut breaker, now));
            now += Duration::from_secs(seconds);
            assert!(breaker.rest(now).is_none() && breaker.is_open());
            assert!(fail(&mut breaker, now));
        }
        assert!(breaker.succeeded() && !breaker.is_open() && breaker.rest(now).is_none());
        assert!(!fail(&mut breaker, now) && !fail(&mut breaker, now) && fail(&mut breaker, now));
        assert_eq!(breaker.rest(now), Some(Duration::from_secs(1)));
    }
}
