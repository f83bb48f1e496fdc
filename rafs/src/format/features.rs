//! Feature words: what each bit means and what an unknown bit does.

use bitflags::bitflags;

bitflags! {
    /// Flags of the extended superblock. Unknown bits refuse the image.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ImageFlags: u64 {
        /// Default compressor none.
        const COMPRESSION_NONE = 0x1;
        /// Default compressor lz4_block.
        const COMPRESSION_LZ4 = 0x2;
        /// Chunk digests are BLAKE3.
        const HASH_BLAKE3 = 0x4;
        /// Chunk digests are SHA-256.
        const HASH_SHA256 = 0x8;
        /// uid and gid of inodes are meaningful.
        const EXPLICIT_UID_GID = 0x10;
        /// Some inode has xattrs.
        const HAS_XATTR = 0x20;
        /// Default compressor gzip (reference images).
        const COMPRESSION_GZIP = 0x40;
        /// Default compressor zstd.
        const COMPRESSION_ZSTD = 0x80;
        /// Every blob carries its chunk-digest array.
        const INLINED_CHUNK_DIGEST = 0x100;
        /// Tarfs: 512-byte blocks, data blob is a plain tar.
        const TARFS_MODE = 0x200;
        /// No blob is encrypted. Absent from images of 2.2.0-era tools.
        const ENCRYPTION_NONE = 0x0100_0000;
        /// Some blob is encrypted with AES-128-XTS.
        const ENCRYPTION_AES_128_XTS = 0x0200_0000;
        /// Preserved compatible bits: accepted, ignored, never written.
        const PRESERVED = 0xfc00_0000;
    }
}

bitflags! {
    /// Features of one blob, in its blob record and in its context header.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BlobFeatures: u32 {
        /// Chunks are 4 KiB-aligned in the decoded space; always in v6 but for tarfs.
        const ALIGNED = 0x1;
        /// The bootstrap lies inside this blob.
        const INLINED_FS_META = 0x2;
        /// Context entries are 24 bytes.
        const CHUNK_INFO_V2 = 0x4;
        /// Data is a tar.gz, reached through decompression contexts.
        const ZRAN = 0x8;
        /// Data lies in the original tar(.gz), the context in another blob.
        const SEPARATE = 0x10;
        /// The chunk-digest array exists.
        const INLINED_CHUNK_DIGEST = 0x20;
        /// Data is a plain tar.
        const TARFS = 0x40;
        /// Small chunks share compressed units.
        const BATCH = 0x80;
        /// Chunks and context are encrypted.
        const ENCRYPTED = 0x100;
        /// Record made by the chunk dictionary generator.
        const IS_CHUNKDICT_GENERATED = 0x200;
        /// Blob made by the optimizer; holds the prefetch files' chunks.
        const IS_SEPARATED_WITH_PREFETCH_FILES = 0x400;
        /// Data lives in an external backend.
        const EXTERNAL = 0x800;
        /// Reverse tar headers exist.
        const HAS_TAR_HEADER = 0x1000_0000;
        /// Table of content exists.
        const HAS_TOC = 0x2000_0000;
        /// Written by tools since 2.2; always set today.
        const CAP_TAR_TOC = 0x4000_0000;
        /// Internal to v5 loading; must not be on disk.
        const INTERNAL_V5 = 0x8000_0000;
    }
}

impl BlobFeatures {
    /// Bits whose presence refuses the blob when this build does not know them.
    pub const INCOMPATIBLE: u32 = 0xf000;
}

bitflags! {
    /// Flags of a chunk-info record (80 bytes).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u32 {
        /// Stored compressed.
        const COMPRESSED = 0x1;
        /// Hole (v5 only).
        const HOLE = 0x2;
        /// Stored encrypted.
        const ENCRYPTED = 0x4;
        /// Member of a batch unit.
        const BATCH = 0x8;
        /// The crc32 field holds a CRC-32C of the decoded bytes.
        const HAS_CRC32 = 0x10;
    }
}

bitflags! {
    /// Flags of a V2 context entry, bits 56 to 63 of its first word.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EntryFlags: u8 {
        /// Stored compressed.
        const COMPRESSED = 0x1;
        /// Lies in a zran slice.
        const ZRAN = 0x2;
        /// Lies in a batch unit.
        const BATCH = 0x4;
        /// Stored encrypted.
        const ENCRYPTED = 0x8;
        /// The data word holds a CRC-32C.
        const HAS_CRC32 = 0x10;
    }
}
