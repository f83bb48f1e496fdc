//! When a second request is worth it: the first one is later than this server usually is.
//!
//! Pure. The time to the first byte of the last requests says what is usual; a purse that
//! every request fills a little bounds how many are sent twice.

use std::time::Duration;

/// Requests remembered.
const SAMPLES: usize = 64;
/// Fewer say nothing about what is usual.
const MIN_SAMPLES: usize = 8;
/// An answer that is sooner than this is never late.
const FLOOR: Duration = Duration::from_millis(50);
/// One request in this many may be sent twice.
const PRICE: u32 = 20;
/// Second requests that may be saved up.
const SAVED: u32 = 5;

/// What is usual, and what is left to spend.
#[derive(Debug)]
pub(super) struct Hedge {
    /// Times to the first byte, the oldest overwritten first.
    times: Vec<Duration>,
    next: usize,
    purse: u32,
}

impl Default for Hedge {
    /// One second request is free: short lives have late answers, too.
    fn default() -> Self {
        Self { times: Vec::new(), next: 0, purse: PRICE }
    }
}

impl Hedge {
    /// Notes an answer's time to the first byte.
    pub(super) fn record(&mut self, time: Duration) {
        if self.times.len() < SAMPLES {
            self.times.push(time);
        } else {
            self.times[self.next] = time;
        }
        self.next = (self.next + 1) % SAMPLES;
    }

    /// Counts a request. Answers after what time it is late; `None`: nobody knows yet.
    ///
    /// Late is later than 95 of 100, but at least half as long again as the median, lest a
    /// steady server is asked twice for nothing, and at most three times the median, lest a
    /// server that is often slow is not.
    pub(super) fn late_after(&mut self) -> Option<Duration> {
        self.purse = (self.purse + 1).min(PRICE * SAVED);
        if self.times.len() < MIN_SAMPLES {
            return None;
        }
        let mut times = self.times.clone();
        times.sort_unstable();
        let (median, p95) = (times[times.len() / 2], times[times.len() * 95 / 100]);
        Some(p95.clamp(median * 3 / 2, median * 3).max(FLOOR))
    }

    /// True if a second request can be paid for; it is paid then.
    pub(super) fn spend(&mut self) -> bool {
        let paid = self.purse.checked_sub(PRICE);
        self.purse = paid.unwrap_or(self.purse);
        paid.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn late_is_measured_by_what_is_usual() {
        for (times, late) in [
            (vec![ms(100); 7], None),
            (vec![ms(1); 64], Some(ms(50))),
            (vec![ms(100); 64], Some(ms(150))),
            ((0..64).map(|i| ms(if i % 4 == 0 { 2000 } else { 100 })).collect(), Some(ms(300))),
            ((0..100).map(|i| ms(if i < 36 { 9000 } else { 100 })).collect(), Some(ms(150))),
            ((0..64).map(|i| ms(if i % 16 == 0 { 220 } else { 100 })).collect(), Some(ms(220))),
        ] {
            let mut hedge = Hedge::default();
            times.iter().for_each(|time| hedge.record(*time));
            assert_eq!(hedge.late_after(), late, "{times:?}");
        }
    }

    #[test]
    fn one_request_in_twenty_is_sent_twice_at_most() {
        let mut hedge = Hedge::default();
        let mut twice = 0;
        for _ in 0..1000 {
            hedge.late_after();
            twice += u32::from(hedge.spend());
        }
        assert_eq!(twice, 51);
        let mut hedge = Hedge::default();
        for _ in 0..1000 {
            hedge.late_after();
        }
        assert_eq!((0..10).filter(|_| hedge.spend()).count(), SAVED as usize);
    }
}
