//! Chunk records: their rules, and the index from a chunk to its record.

use storage::ids::ChunkIndex;

use super::super::Blob;
use super::super::bytes::record;
use super::super::chunks::{ChunkRows, Rows};
use super::super::faults::Faults;
use crate::format::chunk::ChunkInfo;
use crate::format::features::ChunkFlags;
use crate::format::v5::ALIGNMENT;
use crate::{Error, Result};

/// Every chunk record by blob: chunk number and position (byte / 8).
#[derive(Debug)]
pub struct Collector(Vec<Vec<(u32, u32)>>);

impl Collector {
    /// Room for `blobs` blobs.
    pub fn new(blobs: usize) -> Self {
        Self(vec![Vec::new(); blobs])
    }

    /// Takes the checked record at byte `at`.
    pub fn add(&mut self, chunk: &ChunkInfo, at: u64) {
        // A bootstrap has at most 2^31 bytes.
        self.0[chunk.blob_index.get() as usize].push((chunk.index.get(), (at / ALIGNMENT) as u32));
    }

    /// Keeps the first record of each chunk. All records of a chunk must say the same, and in
    /// the order of chunk numbers the decoded ranges of a blob ascend without overlap, so that
    /// one verified chunk can not be written over another in the cache.
    ///
    /// # Errors
    /// `Corrupt`: a broken rule.
    pub fn index(self, bytes: &[u8], blobs: &[Blob], faults: &mut Faults) -> Result<ChunkRows> {
        let mut rows = Vec::with_capacity(blobs.len());
        for (blob, mut pairs) in blobs.iter().zip(self.0) {
            pairs.sort_unstable();
            let mut kept: Option<(u32, &ChunkInfo)> = None;
            let mut result = Ok(());
            pairs.retain(|&(index, position)| {
                let chunk: &ChunkInfo = match record(bytes, position_byte(position), "chunk record") {
                    Ok(chunk) => chunk,
                    Err(_) => return false,
                };
                let (fault, new) = match kept {
                    Some((last, first)) if last == index => {
                        ((!same(first, chunk)).then_some("two records of it differ"), false)
                    }
                    Some((_, before)) if decoded_end(before) > chunk.uncompressed_offset.get() => {
                        (Some("overlaps the chunk before it"), true)
                    }
                    _ => (None, true),
                };
                if let Some(why) = fault
                    && result.is_ok()
                {
                    result =
                        faults.report(Error::corrupt(format!("chunk {index} of blob {}: {why}", blob.id)));
                }
                if new {
                    kept = Some((index, chunk));
                }
                new
            });
            result?;
            rows.push(Rows::from_sorted(pairs));
        }
        Ok(ChunkRows::from(rows))
    }
}

/// The record of a chunk.
pub fn find<'a>(bytes: &'a [u8], rows: &ChunkRows, blob: u32, index: ChunkIndex) -> Option<&'a ChunkInfo> {
    let position = u32::try_from(rows.get(blob, index.0)?).ok()?;
    record(bytes, position_byte(position), "chunk record").ok()
}

fn position_byte(position: u32) -> u64 {
    u64::from(position) * ALIGNMENT
}

fn decoded_end(chunk: &ChunkInfo) -> u64 {
    chunk.uncompressed_offset.get().saturating_add(chunk.uncompressed_size.get().into())
}

/// True if both records say the same of their chunk, whatever the file.
fn same(a: &ChunkInfo, b: &ChunkInfo) -> bool {
    a.digest == b.digest
        && a.flags == b.flags
        && a.compressed_size == b.compressed_size
        && a.uncompressed_size == b.uncompressed_size
        && a.compressed_offset == b.compressed_offset
        && a.uncompressed_offset == b.uncompressed_offset
        && a.crc32 == b.crc32
}

/// The rules of one record: `want` decoded bytes at `file_offset` of its file.
///
/// # Errors
/// `Corrupt`: a broken rule.
pub fn check(chunk: &ChunkInfo, blobs: &[Blob], file_offset: u64, want: u64) -> Result<()> {
    let fail = |why: String| Err(Error::corrupt(why));
    let Some(blob) = blobs.get(chunk.blob_index.get() as usize) else {
        return fail(format!("blob {} of {}", chunk.blob_index, blobs.len()));
    };
    if chunk.index.get() >= blob.chunk_count {
        return fail(format!("number {} in blob {} of {} chunks", chunk.index, blob.id, blob.chunk_count));
    }
    let flags = ChunkFlags::from_bits_retain(chunk.flags.get());
    if !(ChunkFlags::COMPRESSED | ChunkFlags::HAS_CRC32).contains(flags) {
        return fail(format!("flags {:#x}: want compressed and CRC at most", chunk.flags));
    }
    let (stored, decoded) = (chunk.compressed_size.get(), chunk.uncompressed_size.get());
    if u64::from(decoded) != want || chunk.file_offset.get() != file_offset {
        return fail(format!(
            "{decoded} bytes for {} of the file: want {want} for {file_offset}",
            chunk.file_offset
        ));
    }
    let sizes_fit = if flags.contains(ChunkFlags::COMPRESSED) {
        (1..decoded).contains(&stored)
    } else {
        stored == decoded
    };
    let stored_end = chunk.compressed_offset.get().checked_add(stored.into());
    let decoded_end = chunk.uncompressed_offset.get().checked_add(decoded.into());
    if !sizes_fit
        || stored_end.is_none_or(|end| end > blob.data_size)
        || decoded_end.is_none_or(|end| end > blob.decoded_size)
    {
        return fail(format!(
            "{stored} stored bytes at {}, {decoded} decoded at {}: do not fit each other or blob {} ({} and {} bytes)",
            chunk.compressed_offset, chunk.uncompressed_offset, blob.id, blob.data_size, blob.decoded_size
        ));
    }
    Ok(())
}
