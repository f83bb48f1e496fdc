//! From a chunk to its row of the chunk-info table: 4 bytes a chunk.

use storage::extent::Cipher;

use super::Blob;
use super::faults::Faults;
use crate::format::chunk::ChunkInfo;
use crate::format::features::{BlobFeatures, ChunkFlags};
use crate::format::limits;
use crate::{Error, Result};

/// A blob whose rows fill at least this share of its numbers gets a plain array. Below
/// it (a few chunks used of a dictionary blob, or a hostile chunk count) pairs are kept.
/// So memory stays below 32 bytes a row, whatever a record claims.
const DENSE_SHARE: usize = 8;

/// Rows of one blob.
#[derive(Debug)]
pub enum Rows {
    /// `row + 1` by chunk number; 0 where there is none.
    Dense(Box<[u32]>),
    /// (chunk number, row), sorted.
    Sparse(Box<[(u32, u32)]>),
}

impl Rows {
    /// The rows of `pairs`, sorted by chunk number, each once; a row is below 2^32 - 1.
    pub fn from_sorted(pairs: Vec<(u32, u32)>) -> Self {
        let numbers = pairs.last().map_or(0, |&(index, _)| index as usize + 1);
        if numbers > pairs.len().saturating_mul(DENSE_SHARE) {
            return Self::Sparse(pairs.into_boxed_slice());
        }
        let mut dense = vec![0u32; numbers].into_boxed_slice();
        for (index, row) in pairs {
            dense[index as usize] = row + 1;
        }
        Self::Dense(dense)
    }
}

/// The index over the chunk-info table, by blob and chunk number.
#[derive(Debug)]
pub struct ChunkRows(Vec<Rows>);

impl From<Vec<Rows>> for ChunkRows {
    fn from(rows: Vec<Rows>) -> Self {
        Self(rows)
    }
}

impl ChunkRows {
    /// Checks every record of `table` and indexes it.
    ///
    /// Rules beyond those of one record: a chunk has one record, and in the order of chunk
    /// numbers the decoded ranges of a blob ascend without overlap. The second keeps one
    /// verified chunk from being written over another in the cache.
    ///
    /// # Errors
    /// `Corrupt`: a broken rule.
    pub fn build(table: &[ChunkInfo], blobs: &[Blob], faults: &mut Faults) -> Result<Self> {
        let mut pairs: Vec<Vec<(u32, u32)>> = Vec::new();
        let mut counts = vec![0usize; blobs.len()];
        for record in table {
            if let Some(count) = counts.get_mut(record.blob_index.get() as usize) {
                *count += 1;
            }
        }
        pairs.extend(counts.iter().map(|&n| Vec::with_capacity(n)));
        for (row, record) in table.iter().enumerate() {
            match check_record(record, blobs) {
                Ok(()) if is_blank(record, blobs) => {}
                Ok(()) => {
                    // The number of rows is bounded by the file size, 2 GiB / 80.
                    pairs[record.blob_index.get() as usize].push((record.index.get(), row as u32));
                }
                Err(e) => faults.report(e.context(format_args!("chunk record {row}")))?,
            }
        }
        let mut rows = Vec::with_capacity(blobs.len());
        for (blob, mut pairs) in blobs.iter().zip(pairs) {
            pairs.sort_unstable();
            check_order(blob, &mut pairs, table, faults)?;
            rows.push(Rows::from_sorted(pairs));
        }
        Ok(Self(rows))
    }

    /// Row of a chunk.
    pub fn get(&self, blob: u32, index: u32) -> Option<usize> {
        match self.0.get(blob as usize)? {
            Rows::Dense(rows) => (*rows.get(index as usize)?).checked_sub(1).map(|row| row as usize),
            Rows::Sparse(pairs) => {
                let at = pairs.binary_search_by_key(&index, |&(i, _)| i).ok()?;
                Some(pairs[at].1 as usize)
            }
        }
    }
}

/// True if the record says nothing of its place: it lies in a batch unit or in a slice of a gzip
/// file, and only the blob context knows where.
pub fn lies_in_context(record: &ChunkInfo, blob: &Blob) -> bool {
    if blob.features.contains(BlobFeatures::ZRAN) {
        return true;
    }
    blob.features.contains(BlobFeatures::BATCH)
        && (record.compressed_size.get() == 0
            || ChunkFlags::from_bits_retain(record.flags.get()).contains(ChunkFlags::BATCH))
}

/// Bytes that `decoded` ones take if they are not compressed: a cipher pads less than a block of its own.
pub fn stored_size(decoded: u32, cipher: &Cipher) -> u32 {
    match cipher {
        Cipher::Aes128Xts(_) if decoded < 16 => 18,
        _ => decoded,
    }
}

/// True for the one record in which the reference builder collapses all chunks of a plain tar: it
/// has computed no digests.
fn is_blank(record: &ChunkInfo, blobs: &[Blob]) -> bool {
    let tarfs = |blob: &Blob| blob.features.contains(BlobFeatures::TARFS);
    record.digest == [0; 32] && blobs.get(record.blob_index.get() as usize).is_some_and(tarfs)
}

/// The rules of one record on its own.
fn check_record(record: &ChunkInfo, blobs: &[Blob]) -> Result<()> {
    let fail = |why: String| Err(Error::corrupt(why));
    let Some(blob) = blobs.get(record.blob_index.get() as usize) else {
        return fail(format!("blob {} of {}", record.blob_index, blobs.len()));
    };
    if record.index.get() >= blob.chunk_count {
        return fail(format!("chunk {} of blob {} with {} chunks", record.index, blob.id, blob.chunk_count));
    }
    let flags = ChunkFlags::from_bits_retain(record.flags.get());
    let encrypted = blob.cipher != Cipher::None;
    if flags.contains(ChunkFlags::HOLE) || flags.contains(ChunkFlags::ENCRYPTED) && !encrypted {
        return fail(format!("flags {:#x}: holes and encryption are not of this image", record.flags));
    }
    let alignment = if blob.features.contains(BlobFeatures::TARFS) { 512 } else { limits::BLOCK_SIZE };
    let (decoded, decoded_offset) = (record.uncompressed_size.get(), record.uncompressed_offset.get());
    let inside = decoded_offset.checked_add(decoded.into()).is_some_and(|end| end <= blob.decoded_size);
    if decoded == 0
        || decoded > blob.record.chunk_size.get()
        || !inside
        || !decoded_offset.is_multiple_of(alignment)
    {
        return fail(format!(
            "decoded {decoded} bytes at {decoded_offset} do not fit blob {} ({} bytes in chunks of {:#x})",
            blob.id, blob.decoded_size, blob.record.chunk_size
        ));
    }
    if lies_in_context(record, blob) {
        return Ok(());
    }
    let (stored, offset) = (record.compressed_size.get(), record.compressed_offset.get());
    let inside = offset.checked_add(stored.into()).is_some_and(|end| end <= blob.data_size);
    if stored == 0 || stored > limits::MAX_CHUNK_SIZE || !inside {
        return fail(format!(
            "stored {stored} bytes at {offset} of the {} of blob {}",
            blob.data_size, blob.id
        ));
    }
    if !flags.contains(ChunkFlags::COMPRESSED) && stored != stored_size(decoded, &blob.cipher) {
        return fail(format!("not compressed, yet {stored} bytes hold {decoded}"));
    }
    Ok(())
}

/// Drops (and reports) rows that repeat a number or overlap the one before.
fn check_order(
    blob: &Blob,
    pairs: &mut Vec<(u32, u32)>,
    table: &[ChunkInfo],
    faults: &mut Faults,
) -> Result<()> {
    let mut end = 0;
    let mut last = None;
    let mut result = Ok(());
    pairs.retain(|&(index, row)| {
        let record = &table[row as usize];
        let start = record.uncompressed_offset.get();
        let good = last != Some(index) && start >= end;
        if good {
            end = start + u64::from(record.uncompressed_size.get());
            last = Some(index);
        } else if result.is_ok() {
            result = faults.report(Error::corrupt(format!(
                "chunk record {row}: chunk {index} of blob {} repeats or overlaps the chunk before it",
                blob.id
            )));
        }
        good
    });
    result
}
