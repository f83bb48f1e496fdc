//! Which files are read from front to back: what comes next is read from the local disk before it is asked for.
//!
//! The kernel does that by itself for whoever reads one file through one descriptor. Here all readers of an
//! image share the one descriptor of a cache file, and none of them knows where a file of the image ends.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::node::NodeId;

/// Bytes that are read ahead. A disk of a GiB/s and its queue take 1 to 2 MiB to keep busy; twice that, as
/// half of it may be used up before there is more.
const AHEAD: u64 = 4 << 20;

/// Reads are at least this large once the kernel itself reads ahead: half of what it does by default.
const LARGE: u32 = 64 << 10;

/// Threads overtake one another by so many bytes.
const SLACK: u64 = 1 << 20;

/// The second read of a stream is no farther from the first: whoever jumps about comes near where it was, too.
const NEAR: u64 = 256 << 10;

/// Streams at once. With more, the one that paused longest starts anew.
const MOST: usize = 32;

/// Streams of one file.
const MOST_OF_FILE: usize = 4;

/// A place in a file that somebody reads on from.
#[derive(Debug)]
struct Stream {
    node: NodeId,
    /// Behind the last byte read.
    end: u64,
    /// Behind the last byte read ahead; `None` before the second read.
    ahead: Option<u64>,
}

impl Stream {
    fn goes_on(&self, node: NodeId, offset: u64) -> bool {
        let most = if self.ahead.is_some() { SLACK } else { NEAR };
        self.node == node && self.end.abs_diff(offset) <= most
    }
}

/// What is being read, the latest at the back.
#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<VecDeque<Stream>>);

impl Streams {
    /// Notes a read, and answers which bytes of the file to read ahead now; they may lie behind its end.
    pub fn follow(&self, node: NodeId, offset: u64, len: u32) -> Option<Range<u64>> {
        if len < LARGE {
            return None;
        }
        let end = offset.checked_add(len.into())?;
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = streams.iter().rposition(|stream| stream.goes_on(node, offset));
        let Some(mut stream) = known.and_then(|place| streams.remove(place)) else {
            let of_file = || streams.iter().enumerate().filter(|(_, stream)| stream.node == node);
            let oldest = match of_file().next() {
                Some((place, _)) if of_file().count() >= MOST_OF_FILE => Some(place),
                _ => (streams.len() >= MOST).then_some(0),
            };
            if let Some(place) = oldest {
                streams.remove(place);
            }
            streams.push_back(Stream { node, end, ahead: None });
            return None;
        };
        stream.end = stream.end.max(end);
        let from = stream.ahead.unwrap_or(0).max(stream.end);
        let until = stream.end.saturating_add(AHEAD);
        let wanted = until - from >= AHEAD / 2;
        stream.ahead = Some(if wanted { until } else { from });
        streams.push_back(stream);
        wanted.then_some(from..until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u32 = 128 << 10;
    const FILE: NodeId = NodeId(7);

    fn at(block: u64) -> u64 {
        block * u64::from(BLOCK)
    }

    #[test]
    fn all_behind_the_second_block_is_read_ahead_once() {
        let streams = Streams::default();
        let mut ahead = at(2);
        for block in 0..1000 {
            match streams.follow(FILE, at(block), BLOCK) {
                Some(range) => {
                    assert_eq!((range.start, range.end), (ahead, at(block + 1) + AHEAD));
                    ahead = range.end;
                }
                None => assert!(block == 0 || ahead - at(block + 1) > AHEAD / 2),
            }
        }
    }

    #[test]
    fn nothing_is_read_ahead_for_jumps_and_small_reads() {
        let streams = Streams::default();
        for block in [0, 100, 50, 900, 30, 500, 110] {
            assert_eq!(streams.follow(FILE, at(block), BLOCK), None);
        }
        for block in 0..10 {
            assert_eq!(streams.follow(FILE, block * 4096, 4096), None);
        }
        assert_eq!(streams.follow(FILE, u64::MAX, BLOCK), None);
    }

    #[test]
    fn order_does_not_matter_among_threads_and_files_do_not_mix() {
        let streams = Streams::default();
        let others = (100..100 + MOST as u64 - 1).map(NodeId);
        for block in [1, 0] {
            for node in others.clone().chain([FILE]) {
                assert_eq!(streams.follow(node, at(block), BLOCK).is_some(), block == 0, "{node:?}");
            }
        }
        assert_eq!(streams.follow(NodeId(1), 0, BLOCK), None);
        assert_eq!(streams.follow(NodeId(2), 0, BLOCK), None, "the oldest went for it");
        assert_eq!(streams.follow(NodeId(100), at(2), BLOCK), None);
        assert!(streams.follow(FILE, at(32), BLOCK).is_none(), "a jump");
    }

    #[test]
    fn several_may_read_one_file() {
        let streams = Streams::default();
        let starts = [0, 1000, 2000, 3000];
        for block in 0..100 {
            for start in starts {
                let ahead = streams.follow(FILE, at(start + block), BLOCK);
                assert!(block != 1 || ahead.is_some(), "the one that began at {start}");
            }
        }
        assert_eq!(streams.follow(FILE, at(5000), BLOCK), None, "the one that paused longest goes for it");
        assert_eq!(streams.follow(FILE, at(100), BLOCK), None);
        assert!(streams.follow(FILE, at(5001), BLOCK).is_some());
    }
}
