//! What is fetched together: a window of the chunks that are wanted next.

use std::collections::HashMap;

use storage::extent::{ChunkExtent, ExpectedDigest, FetchUnit};
use storage::ids::{ByteRange, ChunkIndex};

use crate::Result;

/// Bytes, stored and decoded together, of the units of one window: large enough that requests
/// and jobs are few, small enough that several windows are under way at a time.
const WINDOW: u64 = 4 << 20;

/// Unwanted bytes between two units that cost less than a request of their own.
const GAP: u64 = 32 << 10;

/// One unit of a window, and the chunks of it that are wanted.
#[derive(Debug)]
pub(super) struct UnitPlan {
    pub(super) blob: u32,
    pub(super) unit: FetchUnit,
    pub(super) chunks: Vec<ChunkPlan>,
}

/// A wanted chunk of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkPlan {
    pub(super) index: ChunkIndex,
    pub(super) offset: u32,
    pub(super) len: u32,
    pub(super) digest: Option<ExpectedDigest>,
}

/// Units that one request brings.
#[derive(Debug)]
pub(super) struct RangePlan {
    pub(super) blob: u32,
    pub(super) range: ByteRange,
    /// Units in the order of their stored bytes.
    pub(super) units: Vec<usize>,
}

/// Where a wanted chunk will be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) unit: usize,
    pub(super) offset: u32,
    pub(super) len: u32,
}

/// The chunks wanted next, as far as they go together.
#[derive(Debug, Default)]
pub(super) struct Window {
    pub(super) units: Vec<UnitPlan>,
    pub(super) places: Vec<Place>,
    /// Stored and decoded bytes of its units, and what is remembered of its chunks.
    pub(super) weight: u64,
    by_place: HashMap<(u32, u64), usize>,
}

impl Window {
    /// True if `extent` of `blob` belongs into this window: if there is room, or if its unit comes with it anyway,
    /// which may be larger than a window.
    pub(super) fn takes(&self, blob: u32, extent: &ChunkExtent) -> bool {
        self.weight < WINDOW || (self.remembered() < WINDOW && self.unit_of(blob, extent).is_some())
    }

    /// What is remembered of chunks: many small files with one content have one unit.
    fn remembered(&self) -> u64 {
        (self.places.len() * (size_of::<Place>() + size_of::<ChunkPlan>())) as u64
    }

    fn unit_of(&self, blob: u32, extent: &ChunkExtent) -> Option<usize> {
        let unit = *self.by_place.get(&(blob, extent.unit.compressed.start()))?;
        // Units that start alike and differ are the image's fault; each is decoded for itself.
        (self.units[unit].unit == extent.unit).then_some(unit)
    }

    /// Adds a chunk of `blob`; a unit that is in the window already is not fetched again.
    pub(super) fn add(&mut self, blob: u32, extent: ChunkExtent) {
        let next = self.units.len();
        let unit = self.unit_of(blob, &extent).unwrap_or(next);
        let chunk = ChunkPlan {
            index: extent.index,
            offset: extent.offset_in_unit,
            len: extent.len,
            digest: extent.digest,
        };
        if unit == next {
            self.weight += extent.unit.compressed.len() + u64::from(extent.unit.decoded_len);
            self.by_place.entry((blob, extent.unit.compressed.start())).or_insert(next);
            self.units.push(UnitPlan { blob, unit: extent.unit, chunks: Vec::new() });
        }
        // Members of a unit come in order, so one that is wanted again was there last.
        if self.units[unit].chunks.last() != Some(&chunk) {
            self.units[unit].chunks.push(chunk);
        }
        self.places.push(Place { unit, offset: chunk.offset, len: chunk.len });
        self.weight += (size_of::<Place>() + size_of::<ChunkPlan>()) as u64;
    }

    /// The requests that bring all units.
    ///
    /// # Errors
    /// `Storage`: a range overflows, which a checked image excludes.
    pub(super) fn ranges(&self) -> Result<Vec<RangePlan>> {
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        order.sort_by_key(|&n| (self.units[n].blob, self.units[n].unit.compressed.start()));
        let mut ranges: Vec<RangePlan> = Vec::new();
        for n in order {
            let UnitPlan { blob, unit, .. } = &self.units[n];
            let stored = unit.compressed;
            match ranges.last_mut() {
                Some(last)
                    if last.blob == *blob
                        && stored.start() <= last.range.end().saturating_add(GAP)
                        && stored.end().saturating_sub(last.range.start()) <= 2 * WINDOW =>
                {
                    let end = last.range.end().max(stored.end());
                    last.range = ByteRange::new(last.range.start(), end - last.range.start())?;
                    last.units.push(n);
                }
                _ => ranges.push(RangePlan { blob: *blob, range: stored, units: vec![n] }),
            }
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use storage::codec::Codec;
    use storage::extent::Cipher;
    use storage::ids::ChunkIndex;

    use super::*;

    fn chunk(index: u32, start: u64, stored: u64, offset: u32) -> ChunkExtent {
        ChunkExtent {
            index: ChunkIndex(index),
            unit: FetchUnit {
                compressed: ByteRange::new(start, stored).unwrap(),
                codec: Codec::Zstd,
                cipher: Cipher::None,
                window: None,
                decoded_len: 8192,
            },
            offset_in_unit: offset,
            len: 4096,
            decoded_offset: 0,
            digest: None,
        }
    }

    #[test]
    fn neighbours_share_a_request_and_members_a_unit() {
        let mut window = Window::default();
        window.add(0, chunk(1, 200, 100, 0));
        window.add(0, chunk(0, 100, 100, 0));
        window.add(0, chunk(2, 200, 100, 4096));
        window.add(0, chunk(1, 200, 100, 0));
        window.add(1, chunk(0, 300, 100, 0));
        window.add(0, chunk(3, 300 + GAP + 1, 100, 0));
        let ranges = window.ranges().unwrap();
        let shown: Vec<_> = ranges.iter().map(|r| (r.blob, r.range.start(), r.range.len())).collect();
        assert_eq!(shown, [(0, 100, 200), (0, 300 + GAP + 1, 100), (1, 300, 100)]);
        assert_eq!(ranges[0].units, [1, 0]);
        assert_eq!((window.units.len(), window.units[0].chunks.len(), window.places.len()), (4, 3, 6));
        assert!(window.takes(2, &chunk(0, 0, 100, 0)));
    }

    #[test]
    fn a_window_ends() {
        let same = chunk(0, 0, 4096, 0);
        let mut window = Window::default();
        let mut count = 0;
        while window.takes(0, &same) {
            window.add(0, same.clone());
            count += 1;
        }
        assert!(count < WINDOW, "one small file under many names must not fill the memory");
    }

    #[test]
    fn all_chunks_of_a_unit_larger_than_a_window_share_it() {
        let slice = |offset| {
            let mut extent = chunk(offset / 4096, 0, 1 << 20, offset);
            extent.unit.decoded_len = 2 * WINDOW as u32;
            extent
        };
        let mut window = Window::default();
        for offset in (0..2 * WINDOW as u32).step_by(4096) {
            assert!(window.takes(0, &slice(offset)), "{offset}");
            window.add(0, slice(offset));
        }
        assert_eq!(window.units.len(), 1);
        assert!(!window.takes(0, &chunk(9999, 2 << 20, 100, 0)), "no other unit");
        assert!(!window.takes(1, &slice(0)), "nor that of another blob");
    }
}
