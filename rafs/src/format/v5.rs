//! The records of RAFS v5, where they differ from those of v6.
//!
//! A chunk record is [`super::chunk::ChunkInfo`]; it lies behind the inode of each file that
//! holds the chunk. Every structure starts at a multiple of [`ALIGNMENT`].

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Magic of the superblock, at byte 0.
pub const MAGIC: u32 = 0x5241_4653;
/// The only version of it that is read and written.
pub const VERSION: u32 = 0x500;
/// Bytes of the superblock; all behind [`Superblock`] is 0.
pub const SUPERBLOCK_SIZE: u64 = 8192;
/// Where records and tables start.
pub const ALIGNMENT: u64 = 8;
/// Inode number and slot of the root.
pub const ROOT_INO: u64 = 1;
/// Blobs of one image: the reference writer's index has 8 bits.
pub const MAX_BLOBS: usize = 256;
/// Largest value of an xattr.
pub const MAX_XATTR_VALUE: usize = 65536;
/// `i_flags`: a symlink.
pub const FLAG_SYMLINK: u64 = 0x1;
/// `i_flags`: a file of several names, set by builders that read a tar; nobody relies on it.
pub const FLAG_HARDLINK: u64 = 0x2;
/// `i_flags`: an xattr area follows the name and the target.
pub const FLAG_XATTR: u64 = 0x4;

/// True if `bytes` start like a RAFS v5 bootstrap.
pub fn is_v5(bytes: &[u8]) -> bool {
    bytes.first_chunk::<4>().is_some_and(|magic| u32::from_le_bytes(*magic) == MAGIC)
}

/// Start of the superblock at byte 0.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Superblock {
    /// [`MAGIC`].
    pub magic: U32, // 0
    /// [`VERSION`].
    pub version: U32, // 4
    /// [`SUPERBLOCK_SIZE`].
    pub sb_size: U32, // 8
    /// Chunk size: a power of two, 4 KiB to 16 MiB.
    pub chunk_size: U32, // 12
    /// [`super::features::ImageFlags`].
    pub flags: U64, // 16
    /// Distinct inodes.
    pub inodes_count: U64, // 24
    /// Byte offset of the inode table: for each slot the record's offset / 8.
    pub inode_table_offset: U64, // 32
    /// Byte offset of the prefetch table: inode numbers of 4 bytes.
    pub prefetch_table_offset: U64, // 40
    /// Byte offset of the blob table.
    pub blob_table_offset: U64, // 48
    /// Slots: names with the root's.
    pub inode_table_entries: U32, // 56
    /// Entries of the prefetch table.
    pub prefetch_table_entries: U32, // 60
    /// Bytes of the blob table with its padding.
    pub blob_table_size: U32, // 64
    /// Rows of the extended blob table; 0 in very old images.
    pub extended_blob_table_entries: U32, // 68
    /// Byte offset of the extended blob table; 0 in very old images.
    pub extended_blob_table_offset: U64, // 72
}
const _: () = assert!(size_of::<Superblock>() == 80);

/// What the blob table does not say of a blob: 64 bytes, in the same order.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct ExtendedBlob {
    /// Chunks of the blob; 0: nothing is said of the blob.
    pub chunk_count: U32, // 0
    /// [`super::features::BlobFeatures`].
    pub features: U32, // 4
    /// Length of the decoded space.
    pub uncompressed_size: U64, // 8
    /// Length of the blob file, or of what precedes the bootstrap inside.
    pub compressed_size: U64, // 16
    /// 0.
    pub reserved: [u8; 40], // 24
}
const _: () = assert!(size_of::<ExtendedBlob>() == 64);

/// Fixed part of an inode: 128 bytes; then, each padded to 8: name, symlink target, xattr
/// area; then the chunk records of a regular file.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Inode {
    /// Merkle digest of what is below: chunk digests, children, target.
    pub i_digest: [u8; 32], // 0
    /// Inode number of the directory of this name; the root's is 0.
    pub i_parent: U64, // 32
    /// Inode number: the slot of the first name.
    pub i_ino: U64, // 40
    /// Owner.
    pub i_uid: U32, // 48
    /// Group.
    pub i_gid: U32, // 52
    /// 0.
    pub i_projid: U32, // 56
    /// `st_mode`.
    pub i_mode: U32, // 60
    /// Regular: bytes; symlink: bytes of target; directory: a sum over names; else 0.
    pub i_size: U64, // 64
    /// Blocks of 512 bytes, xattrs included; informative.
    pub i_blocks: U64, // 72
    /// [`FLAG_SYMLINK`], [`FLAG_HARDLINK`], [`FLAG_XATTR`].
    pub i_flags: U64, // 80
    /// Link count.
    pub i_nlink: U32, // 88
    /// Directory: slot of the first child.
    pub i_child_index: U32, // 92
    /// Directory: children; regular: chunk records.
    pub i_child_count: U32, // 96
    /// Bytes of the name.
    pub i_name_size: U16, // 100
    /// Bytes of the symlink target.
    pub i_symlink_size: U16, // 102
    /// Device number in the kernel's 32-bit encoding.
    pub i_rdev: U32, // 104
    /// Nanoseconds.
    pub i_mtime_nsec: U32, // 108
    /// Seconds, two's complement.
    pub i_mtime: U64, // 112
    /// 0.
    pub reserved: [u8; 8], // 120
}
const _: () = assert!(size_of::<Inode>() == 128);
