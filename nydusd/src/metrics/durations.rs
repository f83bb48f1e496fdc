//! How long things took, by class: counters that a scraper reads as a histogram.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Inclusive upper bounds of the classes in microseconds, from a cached answer to a dead
/// source; one class more is longer.
const BOUNDS_US: [u64; 15] = [
    100, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    10_000_000, 60_000_000,
];

/// Durations by class, and their sum.
#[derive(Debug, Default)]
pub struct Durations {
    classes: [AtomicU64; BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

impl Durations {
    /// Notes one.
    pub fn record(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let class = BOUNDS_US.iter().position(|bound| us <= *bound).unwrap_or(BOUNDS_US.len());
        self.classes[class].fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// All of them, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum_ns.load(Relaxed) as f64 / 1e9
    }

    /// Upper bound in seconds and number of each class; the last has no bound.
    pub fn classes(&self) -> Vec<(f64, u64)> {
        let bounds = BOUNDS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        bounds.zip(self.classes.iter().map(|class| class.load(Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_classes() {
        let durations = Durations::default();
        for ms in [0, 1, 2, 90_000] {
            durations.record(Duration::from_millis(ms));
        }
        let filled: Vec<_> = durations.classes().into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(0.0001, 1), (0.001, 1), (0.0025, 1), (f64::INFINITY, 1)]);
        assert!((durations.sum() - 90.003).abs() < 1e-9);
    }
}
