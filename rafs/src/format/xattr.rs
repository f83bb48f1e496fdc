//! Inline extended attributes: header, entries, and the prefixes behind an index.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Header of an inode's xattr area: 12 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct XattrHeader {
    /// 0: no name filter.
    pub name_filter: U32, // 0
    /// 0: nothing shared.
    pub shared_count: u8, // 4
    /// 0.
    pub reserved: [u8; 7], // 5
}
const _: () = assert!(size_of::<XattrHeader>() == 12);

/// Entry: 4 bytes, then name without prefix, then value, padded to 4.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes of name after the prefix.
    pub name_len: u8, // 0
    /// Row of [`PREFIXES`].
    pub name_index: u8, // 1
    /// Bytes of value.
    pub value_size: U16, // 2
}
const _: () = assert!(size_of::<XattrEntry>() == 4);

/// Name prefixes by index. The two ACL names are whole: nothing may follow them.
pub const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Bytes of an entry with padding.
pub const fn entry_size(name_len: usize, value_len: usize) -> usize {
    (size_of::<XattrEntry>() + name_len + value_len).next_multiple_of(4)
}

/// `i_xattr_icount` of an area of `size` bytes, header included; 0 for no area.
pub const fn icount(size: usize) -> usize {
    if size == 0 { 0 } else { (size - size_of::<XattrHeader>()) / 4 + 1 }
}

/// Bytes of the area that `icount` stands for.
pub const fn area_size(icount: u16) -> usize {
    if icount == 0 { 0 } else { size_of::<XattrHeader>() + 4 * (icount as usize - 1) }
}
