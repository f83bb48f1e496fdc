//! Inodes and the chunk indexes behind regular files.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bit 0 of `i_format`: 64-byte inode.
pub const FORMAT_EXTENDED: u16 = 1;
/// Data layout (bits 1 to 3 of `i_format`): all data in blocks at `i_u`.
pub const LAYOUT_FLAT_PLAIN: u16 = 0;
/// Data layout: the tail follows the inode.
pub const LAYOUT_FLAT_INLINE: u16 = 2;
/// Data layout: chunk indexes follow the inode.
pub const LAYOUT_CHUNK_BASED: u16 = 4;
/// Chunk format bit: 8-byte indexes; always set.
pub const CHUNK_FORMAT_INDEXES: u16 = 0x20;
/// Chunk format bits that hold log2(chunk size) - log2(block size).
pub const CHUNK_FORMAT_BITS: u16 = 0x1f;

/// `i_format` of an extended inode with `layout`.
pub const fn extended_format(layout: u16) -> u16 {
    FORMAT_EXTENDED | layout << 1
}

/// Compact inode: 32 bytes. Never written here; read all the same.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct CompactInode {
    /// Version and layout.
    pub i_format: U16, // 0
    /// Length of the xattr area in 4-byte units, see [`super::xattr`].
    pub i_xattr_icount: U16, // 2
    /// `st_mode`.
    pub i_mode: U16, // 4
    /// Link count.
    pub i_nlink: U16, // 6
    /// Bytes.
    pub i_size: U32, // 8
    /// 0.
    pub reserved: U32, // 12
    /// As in [`ExtendedInode`].
    pub i_u: U32, // 16
    /// Sequence number, a hint.
    pub i_ino: U32, // 20
    /// Owner.
    pub i_uid: U16, // 24
    /// Group.
    pub i_gid: U16, // 26
    /// 0.
    pub reserved2: U32, // 28
}
const _: () = assert!(size_of::<CompactInode>() == 32);

/// Extended inode: 64 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct ExtendedInode {
    /// Version and layout.
    pub i_format: U16, // 0
    /// Length of the xattr area in 4-byte units, see [`super::xattr`].
    pub i_xattr_icount: U16, // 2
    /// `st_mode`.
    pub i_mode: U16, // 4
    /// 0; newer kernels read address bits here.
    pub reserved: U16, // 6
    /// Regular: length; directory: bytes of entries; symlink: target length; else 0.
    pub i_size: U64, // 8
    /// Regular: chunk format; directory and symlink: first block; special: rdev.
    pub i_u: U32, // 16
    /// Sequence number, a hint.
    pub i_ino: U32, // 20
    /// Owner.
    pub i_uid: U32, // 24
    /// Group.
    pub i_gid: U32, // 28
    /// Seconds, two's complement.
    pub i_mtime: U64, // 32
    /// Nanoseconds.
    pub i_mtime_nsec: U32, // 40
    /// Link count.
    pub i_nlink: U32, // 44
    /// 0.
    pub reserved2: [u8; 16], // 48
}
const _: () = assert!(size_of::<ExtendedInode>() == 64);

/// Index of one chunk of a regular file: 8 bytes, array aligned to 8.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct ChunkIndexRecord {
    /// Chunk number in its blob, bits 0 to 15; the kernel ignores it.
    pub index_low: U16, // 0
    /// Blob index + 1.
    pub device_id: u8, // 2
    /// Chunk number, bits 16 to 23; masked off by the kernel.
    pub index_high: u8, // 3
    /// Decoded offset in blocks.
    pub blkaddr: U32, // 4
}
const _: () = assert!(size_of::<ChunkIndexRecord>() == 8);

impl ChunkIndexRecord {
    /// Chunk number in its blob.
    pub fn chunk_index(&self) -> u32 {
        u32::from(self.index_high) << 16 | u32::from(self.index_low.get())
    }
}
