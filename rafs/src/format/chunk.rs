//! Chunk-info records: the table of the bootstrap that carries the chunk digests.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One distinct chunk referenced by the bootstrap: 80 bytes, sorted by (digest, blob).
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct ChunkInfo {
    /// Digest of the decoded bytes.
    pub digest: [u8; 32], // 0
    /// Row of the blob table.
    pub blob_index: U32, // 32
    /// [`super::features::ChunkFlags`].
    pub flags: U32, // 36
    /// Stored bytes; 0 for batch members, whose place is in the blob context.
    pub compressed_size: U32, // 40
    /// Decoded bytes.
    pub uncompressed_size: U32, // 44
    /// Byte in the blob; 0 for batch members.
    pub compressed_offset: U64, // 48
    /// Byte in the decoded space.
    pub uncompressed_offset: U64, // 56
    /// Offset in the last file that references the chunk; informative.
    pub file_offset: U64, // 64
    /// Chunk number in the blob.
    pub index: U32, // 72
    /// CRC-32C of the decoded bytes if the flag says so.
    pub crc32: U32, // 76
}
const _: () = assert!(size_of::<ChunkInfo>() == 80);
