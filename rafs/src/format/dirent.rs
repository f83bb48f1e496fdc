//! Directory entries.

use zerocopy::byteorder::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Directory entry: 12 bytes; the names follow the array of entries of their block.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Dirent {
    /// Inode.
    pub nid: U64, // 0
    /// Offset of the name from the start of this directory block.
    pub nameoff: U16, // 8
    /// One of the `FT_` values.
    pub file_type: u8, // 10
    /// 0.
    pub reserved: u8, // 11
}
const _: () = assert!(size_of::<Dirent>() == 12);

/// Regular file.
pub const FT_REGULAR: u8 = 1;
/// Directory.
pub const FT_DIRECTORY: u8 = 2;
/// Character device.
pub const FT_CHAR: u8 = 3;
/// Block device.
pub const FT_BLOCK: u8 = 4;
/// Fifo.
pub const FT_FIFO: u8 = 5;
/// Socket.
pub const FT_SOCKET: u8 = 6;
/// Symbolic link.
pub const FT_SYMLINK: u8 = 7;
