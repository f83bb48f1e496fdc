//! When to try again, and how long to wait before it.
//!
//! A request that fails in passing (reset, truncation, 5xx, 429, a stalled answer) is
//! repeated with exponential backoff and jitter, so that many readers of one
//! overloaded source do not come back in step. A reader that waits is served until its
//! deadline; nobody's bytes (prefetch) are given up early. Every wait ends at the
//! deadline and on cancellation.

use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::{Priority, ReadContext};
use crate::{Error, ErrorKind, Result};

/// How a remote source is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Repeats of a request somebody waits for; `u32::MAX` leaves it to the deadline.
    pub on_demand: u32,
    /// Repeats of a request nobody waits for.
    pub prefetch: u32,
    /// Longest wait before the first repeat; doubles with each.
    pub base: Duration,
    /// No computed wait is longer.
    pub cap: Duration,
    /// A longer `Retry-After` is cut to this, lest one answer stalls a reader for hours.
    pub retry_after_cap: Duration,
}

impl RetryPolicy {
    /// For blob reads: readers are served until their deadline, prefetch is tried twice.
    pub const READS: Self = Self {
        on_demand: u32::MAX,
        prefetch: 1,
        base: Duration::from_millis(100),
        cap: Duration::from_secs(5),
        retry_after_cap: Duration::from_secs(30),
    };

    /// For a command somebody watches: five repeats, about half a minute in all.
    pub const COMMANDS: Self = Self { on_demand: 5, base: Duration::from_millis(500), ..Self::READS };

    /// The wait before repeat number `attempt` (from 0), `jitter` in 0..=u64::MAX: half of
    /// the doubled base is fixed, half is left to chance.
    fn delay(&self, attempt: u32, retry_after: Option<Duration>, jitter: u64) -> Duration {
        let whole = self.base.saturating_mul(1u32.checked_shl(attempt).unwrap_or(u32::MAX)).min(self.cap);
        let half = whole / 2;
        let jittered = half + half.mul_f64(jitter as f64 / u64::MAX as f64);
        jittered.max(retry_after.unwrap_or_default().min(self.retry_after_cap))
    }
}

/// A failed attempt, and whether another could end better.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong.
    pub error: Error,
    /// True if the same request may succeed later.
    pub passing: bool,
    /// The wait the server asked for.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure that a repeat may cure.
    pub fn passing(error: Error) -> Self {
        Self { error, passing: true, retry_after: None }
    }
}

impl From<Error> for Failure {
    /// A final failure, unless its kind says that the source was only unavailable.
    fn from(error: Error) -> Self {
        let passing = error.kind() == ErrorKind::Unavailable;
        Self { error, passing, retry_after: None }
    }
}

/// The attempts of one request.
#[derive(Debug)]
pub struct Attempts {
    policy: RetryPolicy,
    limit: u32,
    made: u32,
}

impl Attempts {
    /// No attempt has failed yet.
    pub fn new(policy: RetryPolicy, priority: Priority) -> Self {
        let limit = match priority {
            Priority::OnDemand => policy.on_demand,
            Priority::Prefetch => policy.prefetch,
        };
        Self { policy, limit, made: 0 }
    }

    /// Forgets earlier failures: the source made progress since.
    pub fn reset(&mut self) {
        self.made = 0;
    }

    /// Waits until the next attempt is due, or answers with the error to give up with.
    ///
    /// # Errors
    /// The failure itself if it is final or attempts are used up; `TimedOut` with it as
    /// the source if the next attempt would start past the deadline; `Cancelled`.
    pub async fn pause(&mut self, failure: Failure, context: &ReadContext) -> Result<()> {
        if !failure.passing {
            return Err(failure.error);
        }
        if self.made >= self.limit {
            let tries = u64::from(self.made) + 1;
            return Err(if tries > 1 {
                failure.error.context(format_args!("gave up after {tries} attempts"))
            } else {
                failure.error
            });
        }
        let delay = self.policy.delay(self.made, failure.retry_after, RandomState::new().hash_one(0u8));
        self.made = self.made.saturating_add(1);
        if context.deadline.is_some_and(|deadline| Instant::now() + delay >= deadline) {
            let what = format!("no success in {} attempts before the read's deadline", self.made);
            return Err(Error::new(ErrorKind::TimedOut, what).with_source(failure.error));
        }
        tracing::debug!(error = %failure.error, attempt = self.made, ?delay, "a request failed, trying again");
        within(context, "wait before a repeat", async {
            tokio::time::sleep(delay).await;
            Ok::<_, Error>(())
        })
        .await?;
        context.retries.fetch_add(1, Relaxed);
        Ok(())
    }
}

/// Awaits `future` no longer than the context's deadline and cancellation allow; `what`
/// names the operation in the error.
///
/// # Errors
/// `TimedOut`, `Cancelled`, or those of `future`.
pub async fn within<T, E: From<Error>>(
    context: &ReadContext,
    what: &str,
    future: impl Future<Output = std::result::Result<T, E>>,
) -> std::result::Result<T, E> {
    let expiry = async {
        match context.deadline {
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = context.cancel.cancelled() => {
            Err(Error::new(ErrorKind::Cancelled, format!("{what}: withdrawn")).into())
        }
        result = future => result,
        () = expiry => {
            Err(Error::new(ErrorKind::TimedOut, format!("{what}: no answer before the read's deadline")).into())
        }
    }
}

/// Runs `attempt` until it succeeds, fails for good, or may not be repeated.
///
/// # Errors
/// Those of [`Attempts::pause`].
pub async fn with_retries<T, F: Future<Output = std::result::Result<T, Failure>>>(
    policy: RetryPolicy,
    context: &ReadContext,
    mut attempt: impl FnMut() -> F,
) -> Result<T> {
    let mut attempts = Attempts::new(policy, context.priority);
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(failure) => attempts.pause(failure, context).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable() -> Failure {
        Failure::passing(Error::new(ErrorKind::Unavailable, "GET x: 503"))
    }

    #[test]
    fn delays_double_to_the_cap_and_obey_the_server() {
        let policy = RetryPolicy::READS;
        let ms = |n| Duration::from_millis(n);
        for (attempt, low, high) in
            [(0, 50, 100), (1, 100, 200), (3, 400, 800), (10, 2500, 5000), (99, 2500, 5000)]
        {
            assert_eq!(policy.delay(attempt, None, 0), ms(low));
            let most = policy.delay(attempt, None, u64::MAX);
            assert!(most <= ms(high) && most > ms(high - 2), "{most:?}");
        }
        assert_eq!(policy.delay(0, Some(ms(7000)), 0), ms(7000));
        assert_eq!(policy.delay(0, Some(Duration::from_secs(3600)), 0), policy.retry_after_cap);
    }

    #[tokio::test]
    async fn attempts_and_deadline_end_it_and_keep_the_cause() {
        let context = ReadContext::on_demand(None);
        let mut count = 0;
        let policy = RetryPolicy { on_demand: 4, base: Duration::from_micros(10), ..RetryPolicy::READS };
        let err = with_retries(policy, &context, || {
            count += 1;
            async { Err::<(), _>(unavailable()) }
        })
        .await
        .unwrap_err();
        assert_eq!((err.kind(), count), (ErrorKind::Unavailable, 5));
        assert_eq!(context.retries.load(Relaxed), 4);
        assert!(err.to_string().contains("5 attempts"), "{err}");

        let soon = ReadContext::on_demand(Some(Instant::now() + Duration::from_millis(10)));
        let err = Attempts::new(RetryPolicy::READS, Priority::OnDemand)
            .pause(unavailable(), &soon)
            .await
            .unwrap_err();
        assert_eq!(err.kind(), ErrorKind::TimedOut);
        assert!(std::error::Error::source(&err).unwrap().to_string().contains("503"));
        assert_eq!(soon.retries.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn final_failures_prefetch_and_cancellation_end_at_once() {
        let context = ReadContext::on_demand(None);
        let mut attempts = Attempts::new(RetryPolicy::READS, Priority::OnDemand);
        let denied = Failure::from(Error::new(ErrorKind::Denied, "GET x: 403"));
        assert_eq!(attempts.pause(denied, &context).await.unwrap_err().kind(), ErrorKind::Denied);
        context.cancel.cancel();
        assert_eq!(attempts.pause(unavailable(), &context).await.unwrap_err().kind(), ErrorKind::Cancelled);
        let policy = RetryPolicy { prefetch: 0, ..RetryPolicy::READS };
        let mut attempts = Attempts::new(policy, Priority::Prefetch);
        let fresh = ReadContext::on_demand(None);
        assert_eq!(attempts.pause(unavailable(), &fresh).await.unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn nothing_outlives_its_deadline() {
        let context = ReadContext::on_demand(Some(Instant::now()));
        let err = within(&context, "GET x", std::future::pending::<Result<()>>()).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::TimedOut);
        assert!(err.to_string().contains("GET x"));
    }
}
