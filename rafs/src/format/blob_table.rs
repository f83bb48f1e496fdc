//! Blob records: the bootstrap's table of data blobs.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Codes of `compression_algo` and `ci_compressor`.
pub mod compression {
    /// Stored.
    pub const NONE: u32 = 0;
    /// Raw LZ4 block.
    pub const LZ4_BLOCK: u32 = 1;
    /// gzip member.
    pub const GZIP: u32 = 2;
    /// zstd frame.
    pub const ZSTD: u32 = 3;
}

/// Codes of `digest_algo`.
pub mod digest {
    /// BLAKE3.
    pub const BLAKE3: u32 = 0;
    /// SHA-256.
    pub const SHA256: u32 = 1;
}

/// One data blob: 256 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct BlobRecord {
    /// ASCII, NUL-padded.
    pub blob_id: [u8; 64], // 0
    /// Position in the table.
    pub blob_index: U32, // 64
    /// The image's chunk size.
    pub chunk_size: U32, // 68
    /// 1 to 2^24.
    pub chunk_count: U32, // 72
    /// [`compression`] code.
    pub compression_algo: U32, // 76
    /// [`digest`] code.
    pub digest_algo: U32, // 80
    /// [`super::features::BlobFeatures`].
    pub features: U32, // 84
    /// Length of the blob file, see FORMAT.md.
    pub compressed_size: U64, // 88
    /// Length of the decoded space, multiple of 4096.
    pub uncompressed_size: U64, // 96
    /// TOC entries and their tar header; 0 if none.
    pub blob_toc_size: U32, // 104
    /// [`compression`] code of the context array.
    pub ci_compressor: U32, // 108
    /// Where the context array starts.
    pub ci_offset: U64, // 112
    /// Its stored length.
    pub ci_compressed_size: U64, // 120
    /// Its decoded length.
    pub ci_uncompressed_size: U64, // 128
    /// SHA-256 over TOC entries and header; zero if none.
    pub blob_toc_digest: [u8; 32], // 136
    /// Reference modes: SHA-256 of the RAFS blob. Encrypted: the key.
    pub blob_meta_digest: [u8; 32], // 168
    /// Reference modes: length of the RAFS blob. Encrypted: IV bytes 0 to 7.
    pub blob_meta_size: U64, // 200
    /// Encrypted: IV bytes 8 to 15.
    pub cipher_iv: U64, // 208
    /// 0 none, 1 AES-128-XTS.
    pub cipher_algo: U32, // 216
    /// 0.
    pub reserved: [u8; 36], // 220
}
const _: () = assert!(size_of::<BlobRecord>() == 256);
