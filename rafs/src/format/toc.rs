//! Table of content at the end of a blob, and the reverse tar headers between sections.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Section names.
pub mod name {
    /// Chunk data.
    pub const IMAGE_BLOB: &str = "image.blob";
    /// Context array and header.
    pub const BLOB_META: &str = "blob.meta";
    /// Context header alone (TOC only).
    pub const BLOB_META_HEADER: &str = "blob.meta.header";
    /// Chunk digest array.
    pub const BLOB_DIGEST: &str = "blob.digest";
    /// Bootstrap.
    pub const IMAGE_BOOT: &str = "image.boot";
    /// The table itself.
    pub const TOC: &str = "rafs.blob.toc";
}

/// Entry flag: stored.
pub const FLAG_NONE: u32 = 1;
/// Entry flag: zstd.
pub const FLAG_ZSTD: u32 = 2;
/// Entry flag: LZ4 block.
pub const FLAG_LZ4: u32 = 4;

/// One section: 128 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct TocEntry {
    /// Exactly one of the flags.
    pub flags: U32, // 0
    /// 0.
    pub reserved: U32, // 4
    /// NUL-padded.
    pub name: [u8; 16], // 8
    /// SHA-256 of the decoded section.
    pub digest: [u8; 32], // 24
    /// Byte in the file.
    pub offset: U64, // 56
    /// Stored bytes.
    pub stored_size: U64, // 64
    /// Decoded bytes.
    pub uncompressed_size: U64, // 72
    /// 0; old tools left garbage.
    pub reserved2: [u8; 48], // 80
}
const _: () = assert!(size_of::<TocEntry>() == 128);
