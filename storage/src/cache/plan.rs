//! Ranges wanted → ranges to fetch. Pure.
//!
//! A request costs a round trip, unwanted bytes cost bandwidth: neighbours are read
//! together while the bytes between them cost less than asking again.

use std::ops::Range;

use crate::extent::FetchUnit;

/// Bytes between two units that are read to save a request: at 100 Mbit/s 16 KiB take 1.3 ms,
/// well below one round trip to a registry.
pub const MAX_GAP: u64 = 16 << 10;

/// Chunks that lie in such a gap at most: more would be smaller than any builder makes them.
pub(super) const MAX_BETWEEN: usize = 64;

/// Stored bytes of one merged range. Beyond this a request's fixed cost is noise, and
/// several connections are faster than one.
pub const MAX_RANGE: u64 = 4 << 20;

/// Groups units that are fetched with one request each: ranges of places in `units`,
/// which are sorted by where they start in the blob. `is_free` tells of a place whether the bytes
/// before that unit, behind the one before it, are nobody's.
///
/// Every unit is in exactly one group, in order. Units of a group do not overlap; the
/// bytes between neighbours are free and at most [`MAX_GAP`], and the whole is at most
/// [`MAX_RANGE`], except that a single larger unit stands alone.
pub fn plan(units: &[FetchUnit], is_free: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (place, unit) in units.iter().enumerate() {
        if let Some(group) = groups.last_mut() {
            let start = units[group.start].compressed.start();
            let end = units[place - 1].compressed.end();
            let gap = unit.compressed.start().checked_sub(end);
            let near = gap.is_some_and(|gap| gap == 0 || (gap <= MAX_GAP && is_free(place)));
            if near && unit.compressed.end() - start <= MAX_RANGE {
                group.end = place + 1;
                continue;
            }
        }
        groups.push(place..place + 1);
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::Codec;
    use crate::extent::Cipher;
    use crate::ids::ByteRange;

    fn unit(start: u64, len: u64) -> FetchUnit {
        let compressed = ByteRange::new(start, len).unwrap();
        FetchUnit { compressed, codec: Codec::None, cipher: Cipher::None, window: None, decoded_len: 1 }
    }

    #[test]
    fn neighbours_merge_within_gap_and_range() {
        // Units as (start, length); how many units each group has.
        type Case = (&'static [(u64, u64)], &'static [usize]);
        let table: [Case; 7] = [
            (&[], &[]),
            (&[(7, 1)], &[1]),
            (&[(0, 10), (10, 10), (20, 1)], &[3]),
            (&[(0, 10), (10 + MAX_GAP, 1)], &[2]),
            (&[(0, 10), (11 + MAX_GAP, 1)], &[1, 1]),
            (&[(0, MAX_RANGE + 1), (MAX_RANGE + 1, 1)], &[1, 1]),
            (&[(0, 10), (9, 10), (19, 1)], &[1, 2]),
        ];
        for (places, want) in table {
            let units: Vec<_> = places.iter().map(|(start, len)| unit(*start, *len)).collect();
            let sizes: Vec<_> = plan(&units, |_| true).into_iter().map(|group| group.len()).collect();
            assert_eq!(sizes, want, "{places:?}");
        }
    }

    #[test]
    fn what_is_somebodys_is_not_read_again() {
        let units = [unit(0, 10), unit(10, 10), unit(21, 10), unit(32, 10)];
        assert_eq!(plan(&units, |place| place == 3), [0..2, 2..4]);
    }

    proptest! {
        #[test]
        fn every_unit_is_in_one_group_that_keeps_the_bounds(
            mut places in proptest::collection::vec((0..MAX_RANGE * 4, 1..MAX_RANGE), 0..50),
        ) {
            places.sort_unstable();
            let units: Vec<_> = places.iter().map(|(start, len)| unit(*start, *len)).collect();
            let groups = plan(&units, |_| true);
            let covered: Vec<_> = groups.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..units.len()).collect::<Vec<_>>());
            for group in groups {
                let members = &units[group];
                for pair in members.windows(2) {
                    let gap = pair[1].compressed.start().checked_sub(pair[0].compressed.end());
                    prop_assert!(gap.is_some_and(|gap| gap <= MAX_GAP));
                }
                let whole = members[members.len() - 1].compressed.end() - members[0].compressed.start();
                prop_assert!(members.len() == 1 || whole <= MAX_RANGE);
            }
        }
    }
}
