//! What the writers need to know about file content: where each chunk of each file is.
//!
//! The session's chunk store answers it for new data, [`crate::merge`] for chunks of
//! existing images.

use storage::digest::Digest;

use crate::tree::FileId;

/// Number of a distinct chunk in its [`ChunkSource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub u32);

/// One distinct chunk: what a chunk-info record says, but for the numbering of blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRow {
    /// Digest of the decoded bytes.
    pub digest: Digest,
    /// Place of its blob in the list of blobs handed to the bootstrap writer.
    pub blob: u32,
    /// Number in that blob.
    pub index: u32,
    /// [`rafs::format::features::ChunkFlags`] as the record has them.
    pub flags: u32,
    /// Byte in the blob.
    pub compressed_offset: u64,
    /// Stored bytes.
    pub compressed_size: u32,
    /// Decoded bytes, 1 to the chunk size.
    pub uncompressed_size: u32,
    /// Byte in the blob's decoded space; in v6 a multiple of 4096.
    pub uncompressed_offset: u64,
    /// CRC-32C of the decoded bytes if the flags say so, else 0.
    pub crc32: u32,
}

/// Chunks of files. Ids it did not hand out itself are never asked for.
pub trait ChunkSource: Sync {
    /// Chunks of `file` in order: `div_ceil(size, chunk size)` of them.
    fn file_chunks(&self, file: FileId) -> &[ChunkId];

    /// The chunk `id`.
    fn row(&self, id: ChunkId) -> ChunkRow;

    /// Distinct chunks; ids are below this.
    fn chunk_count(&self) -> usize;
}
