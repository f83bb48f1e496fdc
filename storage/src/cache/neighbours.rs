//! Which chunks lie beside a chunk in its blob.

use std::sync::Arc;

use crate::extent::ChunkExtent;
use crate::ids::ChunkIndex;

/// Answers where chunk `index` of one blob lies, or `None` behind the last one, and for
/// chunks that the image does not use. Chunks are numbered in the order they lie in the blob.
pub type ChunkTable = Arc<dyn Fn(ChunkIndex) -> Option<ChunkExtent> + Send + Sync>;

/// Chunks of one unit at most: a batch of 16 MiB of chunks of one block each.
const MAX_UNIT_CHUNKS: u32 = 4096;

/// All chunks of the unit that holds `extent`, itself included, in order. Its members have
/// consecutive numbers.
pub(super) fn unit_members(table: &ChunkTable, extent: &ChunkExtent) -> Vec<ChunkExtent> {
    if extent.len == extent.unit.decoded_len {
        return vec![extent.clone()];
    }
    let same_unit = |index: u32| table(ChunkIndex(index)).filter(|other| other.unit == extent.unit);
    let own = extent.index.0;
    let before = (own.saturating_sub(MAX_UNIT_CHUNKS)..own).rev().map_while(same_unit);
    let mut members: Vec<ChunkExtent> = before.collect();
    members.reverse();
    members.push(extent.clone());
    members.extend((own + 1..own.saturating_add(MAX_UNIT_CHUNKS)).map_while(same_unit));
    members
}
