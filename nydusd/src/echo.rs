//! A reader waits for one read timeout, not for two.
//!
//! When readahead fails, the kernel reads the page again for whoever waits for it. That
//! reader has waited for the whole read timeout already: the second read, the *echo*, is
//! refused at once. The next reader must not be taken for it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rafs::bootstrap::Nid;

/// How soon the kernel asks again for a page whose readahead failed: at once.
const ECHO: Duration = Duration::from_millis(100);

/// What the kernel reads when it reads a page again. A failed read of this size may be that
/// repeat itself, after which nothing follows but a new reader; only longer ones are surely
/// readahead. So the reader of a file of one page may wait twice.
const PAGE: u32 = 4096;

/// Timed out reads, and echoes of them, that are remembered for [`ECHO`].
const REMEMBERED: usize = 256;

/// Which reads of a mount timed out just now.
#[derive(Default)]
pub struct Echoes {
    /// Held for a scan of a few entries.
    recent: Mutex<Recent>,
}

#[derive(Default)]
struct Recent {
    /// Timed out reads: file, bytes, when.
    timed_out: VecDeque<(Nid, Range<u64>, Instant)>,
    /// Files whose waiting reader has been answered by an echo, and when.
    answered: VecDeque<(Nid, Instant)>,
}

impl Echoes {
    /// Remembers a read that timed out, before it is answered. `asked` is when the kernel
    /// asked for it.
    pub fn timed_out(&self, nid: Nid, offset: u64, len: u32, asked: Instant) {
        if len <= PAGE {
            return;
        }
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        // Readahead of a reader that has its answer by now: whoever reads here next is new.
        if recent.answered.iter().any(|(n, at)| *n == nid && *at >= asked) {
            return;
        }
        push(&mut recent.timed_out, (nid, offset..offset.saturating_add(len.into()), Instant::now()));
    }

    /// True, once for all reads of a file that timed out together, for a read of bytes of
    /// theirs that follows at once.
    ///
    /// An echo answers for its whole file: of two readers of one file the second waits
    /// twice, which is better than refusing a third that has not waited at all.
    pub fn is_echo(&self, nid: Nid, offset: u64, len: u32) -> bool {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.timed_out.retain(|(_, _, at)| at.elapsed() < ECHO);
        recent.answered.retain(|(_, at)| at.elapsed() < ECHO);
        let end = offset.saturating_add(len.into());
        let found =
            recent.timed_out.iter().any(|(n, range, _)| *n == nid && range.start < end && offset < range.end);
        if found {
            recent.timed_out.retain(|(n, _, _)| *n != nid);
            push(&mut recent.answered, (nid, Instant::now()));
        }
        found
    }
}

fn push<T>(queue: &mut VecDeque<T>, item: T) {
    if queue.len() == REMEMBERED {
        queue.pop_front();
    }
    queue.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file read again after an outage failed once more where readahead behind its first
    /// bytes had timed out: the new reader was taken for the one that had waited.
    #[test]
    fn the_next_reader_is_not_taken_for_the_one_that_waited() {
        let (file, other) = (Nid(1), Nid(2));
        let echoes = Echoes::default();
        let asked = Instant::now();
        echoes.timed_out(file, 0, 131_072, asked);
        echoes.timed_out(file, 131_072, 131_072, asked);
        echoes.timed_out(other, 0, 8192, asked);
        assert!(!echoes.is_echo(file, 262_144, 4096), "nothing timed out there");
        assert!(echoes.is_echo(file, 4096, 4096));
        echoes.timed_out(file, 262_144, 131_072, asked);
        for offset in [4096, 131_072, 262_144] {
            assert!(!echoes.is_echo(file, offset, 4096), "{offset}");
        }
        assert!(echoes.is_echo(other, 0, 4096));
        // The repeat of one page times out as well: nothing follows it.
        echoes.timed_out(file, 0, 4096, Instant::now());
        assert!(!echoes.is_echo(file, 0, 4096));
        // The new reader's readahead may time out, too.
        echoes.timed_out(file, 0, 8192, Instant::now());
        assert!(echoes.is_echo(file, 0, 4096));
    }
}
