//! EROFS superblock, RAFS extended superblock, device slots.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where the EROFS superblock starts.
pub const SUPERBLOCK_OFFSET: usize = 1024;
/// Where the extended superblock starts.
pub const EXT_SUPERBLOCK_OFFSET: usize = 1152;
/// Where the device slots start: slot 11 of 128 bytes.
pub const DEVICE_TABLE_OFFSET: usize = 1408;
/// EROFS magic.
pub const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
/// Compatible feature bit that marks a RAFS v6 image; the kernel ignores it.
pub const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// Incompatible features of every RAFS v6 image: chunked files and device table.
pub const INCOMPAT: u32 = 0xc;
/// `devt_slotoff`: device table offset in slots of 128 bytes.
pub const DEVT_SLOTOFF: u16 = 11;

/// EROFS superblock at byte 1024: 128 bytes (Linux `fs/erofs/erofs_fs.h`).
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Superblock {
    /// [`EROFS_MAGIC`].
    pub magic: U32, // 0
    /// 0: the checksum feature is never set.
    pub checksum: U32, // 4
    /// [`COMPAT_RAFS_V6`] and unknown bits, which are ignored.
    pub feature_compat: U32, // 8
    /// log2 of the block size: 12, or 9 in tarfs mode.
    pub blkszbits: u8, // 12
    /// 0.
    pub sb_extslots: u8, // 13
    /// nid of the root directory.
    pub root_nid: U16, // 14
    /// Number of directory entries with root, hard links counted each.
    pub inos: U64, // 16
    /// Time of compact inodes, seconds.
    pub build_time: U64, // 24
    /// Nanoseconds of it.
    pub build_time_nsec: U32, // 32
    /// Sum of the blobs' blocks.
    pub blocks: U32, // 36
    /// First block of the inode area.
    pub meta_blkaddr: U32, // 40
    /// 0: no shared xattrs.
    pub xattr_blkaddr: U32, // 44
    /// 0.
    pub uuid: [u8; 16], // 48
    /// 0.
    pub volume_name: [u8; 16], // 64
    /// [`INCOMPAT`].
    pub feature_incompat: U32, // 80
    /// 0.
    pub compression: U16, // 84
    /// Number of device slots = blobs.
    pub extra_devices: U16, // 86
    /// [`DEVT_SLOTOFF`].
    pub devt_slotoff: U16, // 88
    /// 0; newer kernels give these bytes meaning.
    pub reserved: [u8; 38], // 90
}
const _: () = assert!(size_of::<Superblock>() == 128);

/// RAFS extended superblock at byte 1152: 256 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct ExtSuperblock {
    /// [`super::features::ImageFlags`].
    pub flags: U64, // 0
    /// Byte offset, multiple of 4096.
    pub blob_table_offset: U64, // 8
    /// Bytes, multiple of 256.
    pub blob_table_size: U32, // 16
    /// Power of two, 4 KiB to 16 MiB.
    pub chunk_size: U32, // 20
    /// Byte offset, multiple of 4096.
    pub chunk_table_offset: U64, // 24
    /// Bytes, multiple of 80.
    pub chunk_table_size: U64, // 32
    /// Byte offset or 0.
    pub prefetch_table_offset: U64, // 40
    /// Bytes, multiple of 4.
    pub prefetch_table_size: U32, // 48
    /// 0.
    pub padding: U32, // 52
    /// 0.
    pub reserved: [u8; 200], // 56
}
const _: () = assert!(size_of::<ExtSuperblock>() == 256);

/// Device slot: 128 bytes, slot `i` is blob `i` is EROFS device id `i + 1`.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct DeviceSlot {
    /// Blob id in ASCII, NUL-padded.
    pub tag: [u8; 64], // 0
    /// Decoded size in blocks, not 0.
    pub blocks: U32, // 64
    /// First block of this blob on a flat device.
    pub mapped_blkaddr: U32, // 68
    /// 0.
    pub reserved: [u8; 56], // 72
}
const _: () = assert!(size_of::<DeviceSlot>() == 128);
