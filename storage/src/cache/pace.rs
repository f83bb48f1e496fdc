//! A limit of bandwidth, as a clock that says when to ask for more.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Spreads requests so that no stretch of time sees more than its share of bytes, but for the
/// one request it begins with. Time in which nothing was asked for is not made up for.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes a second.
    rate: u64,
    /// When what was asked for so far is paid off.
    free: Instant,
}

impl Pace {
    pub fn new(rate: NonZeroU64, now: Instant) -> Self {
        Self { rate: rate.get(), free: now }
    }

    /// Bytes that take a second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// How long to wait before asking again.
    pub fn due(&self, now: Instant) -> Duration {
        self.free.saturating_duration_since(now)
    }

    /// Notes that `bytes` are asked for.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        let took = Duration::try_from_secs_f64(bytes as f64 / self.rate as f64).unwrap_or(Duration::MAX);
        // Beyond what a clock can say is for ever.
        self.free = self.free.max(now).checked_add(took).unwrap_or(self.free + Duration::from_secs(1 << 31));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 1000;

    /// Bytes asked for in each second of `seconds`, with requests of `size`, by a clock that
    /// this test turns; during `busy` no request can be made.
    fn asked(size: u64, seconds: u64, busy: std::ops::Range<u64>) -> Vec<u64> {
        let start = Instant::now();
        let mut pace = Pace::new(NonZeroU64::new(RATE).unwrap(), start);
        let mut asked = vec![0; seconds as usize];
        let mut now = start;
        loop {
            now += pace.due(now);
            if busy.contains(&(now - start).as_secs()) {
                now = start + Duration::from_secs(busy.end);
            }
            let second = (now - start).as_secs();
            if second >= seconds {
                return asked;
            }
            asked[second as usize] += size;
            pace.charge(size, now);
        }
    }

    #[test]
    fn no_second_sees_more_than_its_share() {
        for size in [1, 250, 1000] {
            assert_eq!(asked(size, 10, 0..0), [RATE; 10], "{size}");
        }
        // A request larger than a second's share is paid off before the next one.
        assert_eq!(asked(3000, 9, 0..0), [3000, 0, 0, 3000, 0, 0, 3000, 0, 0]);
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        assert_eq!(asked(500, 8, 2..6), [RATE, RATE, 0, 0, 0, 0, RATE, RATE]);
    }

    #[test]
    fn impossible_rates_neither_panic_nor_pass() {
        let now = Instant::now();
        let mut pace = Pace::new(NonZeroU64::MIN, now);
        pace.charge(u64::MAX, now);
        pace.charge(u64::MAX, now);
        assert!(pace.due(now) > Duration::from_secs(1 << 30));
        let mut pace = Pace::new(NonZeroU64::MAX, now);
        pace.charge(1 << 40, now);
        assert!(pace.due(now) < Duration::from_millis(1));
    }
}
