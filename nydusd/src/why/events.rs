//! Events in bounded memory: the first of a mount's life, which are its start, and the last.

use std::collections::VecDeque;

/// Events kept of either end: with 40 bytes an event, 320 KiB.
const KEPT: usize = 8 << 10;

/// The first and the last [`KEPT`] events.
#[derive(Debug)]
pub(super) struct Events<T> {
    first: Vec<T>,
    last: VecDeque<T>,
    dropped: u64,
}

impl<T> Default for Events<T> {
    fn default() -> Self {
        Self { first: Vec::new(), last: VecDeque::new(), dropped: 0 }
    }
}

impl<T: Copy> Events<T> {
    /// Adds one; the oldest that is not of the start may go.
    pub fn push(&mut self, event: T) {
        if self.first.len() < KEPT {
            self.first.push(event);
            return;
        }
        if self.last.len() == KEPT {
            self.last.pop_front();
            self.dropped += 1;
        }
        self.last.push_back(event);
    }

    /// All that are kept, oldest first, and how many are not.
    pub fn all(&self) -> (Vec<T>, u64) {
        (self.first.iter().chain(&self.last).copied().collect(), self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_and_the_end_are_kept() {
        let mut events = Events::default();
        let total = 3 * KEPT;
        (0..total).for_each(|n| events.push(n));
        let (kept, dropped) = events.all();
        assert_eq!((kept.len(), dropped), (2 * KEPT, KEPT as u64));
        assert_eq!(
            (kept[0], kept[KEPT - 1], kept[KEPT], kept[2 * KEPT - 1]),
            (0, KEPT - 1, 2 * KEPT, total - 1)
        );
    }
}
