//! What this process knows of a chunk map, in memory: one mark a chunk.
//!
//! Made in pieces when a chunk in them is first marked: an image may claim millions of
//! chunks for each of its blobs and use none.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::ids::ChunkIndex;

/// Marks of one piece: a page of them.
const PIECE: usize = 512;

type Piece = Box<[AtomicU64; PIECE]>;

/// Marks of all chunks of a blob, 0 at first.
pub(super) struct Mirror {
    count: u32,
    pieces: Box<[OnceLock<Piece>]>,
}

impl Mirror {
    pub(super) fn new(count: u32) -> Self {
        let pieces = (count as usize).div_ceil(PIECE);
        Self { count, pieces: std::iter::repeat_with(OnceLock::new).take(pieces).collect() }
    }

    /// Number of chunks.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// A chunk's mark. What was written before it was set is seen after it is read.
    pub(super) fn get(&self, index: ChunkIndex) -> u64 {
        self.made(index).map_or(0, |mark| mark.load(Ordering::Acquire))
    }

    /// Sets a chunk's mark; of no effect for a chunk that does not exist.
    pub(super) fn set(&self, index: ChunkIndex, mark: u64) {
        if index.0 < self.count
            && let Some(piece) = self.pieces.get(index.0 as usize / PIECE)
        {
            let piece = piece.get_or_init(|| Box::new([const { AtomicU64::new(0) }; PIECE]));
            piece[index.0 as usize % PIECE].store(mark, Ordering::SeqCst);
        }
    }

    /// Takes back a chunk's mark.
    pub(super) fn clear(&self, index: ChunkIndex) {
        // Before the look for the piece: what a marker does after it has made one is then
        // later than what our caller did before.
        fence(Ordering::SeqCst);
        if let Some(mark) = self.made(index) {
            mark.store(0, Ordering::SeqCst);
        }
    }

    /// Takes back all marks.
    pub(super) fn clear_all(&self) {
        fence(Ordering::SeqCst);
        for mark in self.pieces.iter().filter_map(OnceLock::get).flat_map(|piece| piece.iter()) {
            mark.store(0, Ordering::SeqCst);
        }
    }

    fn made(&self, index: ChunkIndex) -> Option<&AtomicU64> {
        Some(&self.pieces.get(index.0 as usize / PIECE)?.get()?[index.0 as usize % PIECE])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_kept_apart_and_made_when_needed() {
        let mirror = Mirror::new(PIECE as u32 + 2);
        assert!(mirror.pieces.iter().all(|piece| piece.get().is_none()));
        for index in [0, 511, 512, 513] {
            assert_eq!(mirror.get(ChunkIndex(index)), 0);
            mirror.set(ChunkIndex(index), u64::from(index) + 1);
        }
        mirror.set(ChunkIndex(514), 7);
        mirror.set(ChunkIndex(u32::MAX), 7);
        mirror.clear(ChunkIndex(511));
        mirror.clear(ChunkIndex(u32::MAX));
        let marks = [0, 1, 511, 512, 513, 514, u32::MAX].map(|index| mirror.get(ChunkIndex(index)));
        assert_eq!(marks, [1, 0, 0, 513, 514, 0, 0]);
        mirror.clear_all();
        assert_eq!([0, 512, 513].map(|index| mirror.get(ChunkIndex(index))), [0; 3]);
    }
}
