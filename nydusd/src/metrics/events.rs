//! The last errors of this process: every line that is logged as an error is kept for
//! `/api/v1/daemon/events`, within bounds.
//!
//! What may not be logged is not kept either: [`Errors`] stands behind the log's own filter.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Errors that are kept (contract 3.8).
const MAX_ERRORS: usize = 500;

/// Bytes that they have together (contract 3.8).
const MAX_SIZE: usize = 51_200;

/// A longer error is cut: one must not push all others out.
const LONGEST: usize = 4096;

/// Of the process, as its log is. Held for one insertion or copy.
static RING: Mutex<Ring> = Mutex::new(Ring { errors: VecDeque::new(), size: 0 });

#[derive(Debug)]
struct Ring {
    errors: VecDeque<String>,
    /// Bytes of `errors`.
    size: usize,
}

/// The last errors, oldest first, as the API shows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EventsSnapshot {
    /// Errors that are kept at most.
    pub max_errors: usize,
    /// Errors that are kept now.
    pub total_errors: usize,
    /// Bytes that are kept at most.
    pub max_size: usize,
    /// Bytes that are kept now.
    pub total_size: usize,
    /// Time and text of each.
    pub errors: Vec<String>,
}

impl Ring {
    fn push(&mut self, mut error: String) {
        if error.len() > LONGEST {
            error.truncate(error.floor_char_boundary(LONGEST));
        }
        self.size += error.len();
        self.errors.push_back(error);
        while self.errors.len() > MAX_ERRORS || self.size > MAX_SIZE {
            self.size -= self.errors.pop_front().map_or(0, |oldest| oldest.len());
        }
    }

    fn snapshot(&self) -> EventsSnapshot {
        EventsSnapshot {
            max_errors: MAX_ERRORS,
            total_errors: self.errors.len(),
            max_size: MAX_SIZE,
            total_size: self.size,
            errors: self.errors.iter().cloned().collect(),
        }
    }
}

/// The errors that are kept now.
pub fn snapshot() -> EventsSnapshot {
    // Each push leaves the ring whole.
    RING.lock().unwrap_or_else(PoisonError::into_inner).snapshot()
}

/// The part of the log that keeps errors.
#[derive(Clone, Copy, Debug)]
pub struct Errors;

impl<S: Subscriber> Layer<S> for Errors {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() != Level::ERROR {
            return;
        }
        let mut text = Text(format!("[{}]", chrono::Local::now().format("%Y-%m-%d %H:%M:%S%.6f %:z")));
        event.record(&mut text);
        RING.lock().unwrap_or_else(PoisonError::into_inner).push(text.0);
    }
}

/// The message and the fields of an event on one line.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn the_ring_is_bounded_by_number_and_by_size() {
        let mut ring = Ring { errors: VecDeque::new(), size: 0 };
        for number in 0..MAX_ERRORS + 3 {
            ring.push(format!("{number:04}"));
        }
        let shot = ring.snapshot();
        assert_eq!((shot.total_errors, shot.total_size), (500, 2000));
        assert_eq!((shot.errors[0].as_str(), shot.errors[499].as_str()), ("0003", "0502"));
        // Two bytes each: the cut is between characters.
        for _ in 0..20 {
            ring.push("ä".repeat(4000));
        }
        let shot = ring.snapshot();
        assert_eq!((shot.total_errors, shot.total_size), (12, 12 * LONGEST));
        assert!(shot.errors.iter().all(|error| error.len() == LONGEST));
    }

    #[test]
    fn errors_of_the_log_are_kept_and_nothing_else() {
        let log = tracing_subscriber::registry().with(Errors);
        tracing::subscriber::with_default(log, || {
            tracing::warn!("no event of this kind, {}", "warned");
            tracing::error!(blob = 7, "a read of {} failed", "/bin/kept-by-the-ring");
        });
        let all = snapshot().errors;
        let kept: Vec<_> = all.iter().filter(|e| e.contains("kept-by-the-ring")).collect();
        assert!(
            matches!(kept[..], [one] if one.ends_with(" a read of /bin/kept-by-the-ring failed blob=7")),
            "{all:?}"
        );
        assert!(all.iter().all(|error| !error.contains("no event of this kind")), "{all:?}");
    }
}
