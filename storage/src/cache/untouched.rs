//! Which chunks were read ahead and have had no reader yet: one bit a chunk.
//!
//! Made in pieces when a bit in them is first set, as [`super::mirror`] is.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::ids::ChunkIndex;

/// Words of 64 bits of one piece.
const WORDS: usize = 64;

/// Chunks of one piece.
const PIECE: usize = WORDS * 64;

type Piece = Box<[AtomicU64; WORDS]>;

/// The bits of all chunks of a blob, none set at first.
pub(super) struct Untouched {
    pieces: Box<[OnceLock<Piece>]>,
}

impl Untouched {
    pub(super) fn new(count: u32) -> Self {
        let pieces = (count as usize).div_ceil(PIECE);
        Self { pieces: std::iter::repeat_with(OnceLock::new).take(pieces).collect() }
    }

    /// Notes that a chunk is read ahead.
    pub(super) fn set(&self, index: ChunkIndex) {
        let place = index.0 as usize;
        if let Some(piece) = self.pieces.get(place / PIECE) {
            let piece = piece.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            piece[place % PIECE / 64].fetch_or(1 << (place % 64), Relaxed);
        }
    }

    /// Notes that a reader has the chunk; true if it was read ahead and this is the first.
    pub(super) fn touch(&self, index: ChunkIndex) -> bool {
        let place = index.0 as usize;
        let Some(piece) = self.pieces.get(place / PIECE).and_then(OnceLock::get) else { return false };
        let (word, bit) = (&piece[place % PIECE / 64], 1 << (place % 64));
        // Most reads find it clear, and a look costs less than an exchange.
        word.load(Relaxed) & bit != 0 && word.fetch_and(!bit, Relaxed) & bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_touch_counts_once() {
        let bits = Untouched::new(PIECE as u32 + 1);
        for index in [0, 63, 64, PIECE as u32] {
            assert!(!bits.touch(ChunkIndex(index)));
            bits.set(ChunkIndex(index));
            assert!(bits.touch(ChunkIndex(index)));
            assert!(!bits.touch(ChunkIndex(index)));
        }
        bits.set(ChunkIndex(u32::MAX));
        assert!(!bits.touch(ChunkIndex(u32::MAX)));
        assert!(!bits.touch(ChunkIndex(1)));
    }
}
