//! The compression context of a blob (`blob.meta`): where each chunk is.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Both magics of the header.
pub const CONTEXT_MAGIC: u32 = 0xb10b_b10b;
/// Bytes of the header.
pub const HEADER_SIZE: usize = 4096;

/// Header behind the context array: 4096 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct ContextHeader {
    /// [`CONTEXT_MAGIC`].
    pub magic: U32, // 0
    /// [`super::features::BlobFeatures`] as known when the header was written.
    pub features: U32, // 4
    /// Compression code of the array.
    pub ci_compressor: U32, // 8
    /// Number of chunks.
    pub ci_entries: U32, // 12
    /// Where the array starts in the file that holds it.
    pub ci_offset: U64, // 16
    /// Stored length of the array.
    pub ci_compressed_size: U64, // 24
    /// Decoded length of the array.
    pub ci_uncompressed_size: U64, // 32
    /// Zran or batch contexts: offset inside the decoded array.
    pub unit_offset: U64, // 40
    /// Bytes of them, with zran dictionaries.
    pub unit_size: U64, // 48
    /// Number of 40-byte contexts.
    pub unit_count: U32, // 56
    /// 0.
    pub reserved: [u8; 4032], // 60
    /// [`CONTEXT_MAGIC`].
    pub magic2: U32, // 4092
}
const _: () = assert!(size_of::<ContextHeader>() == HEADER_SIZE);

/// V1 entry: 16 bytes, two packed words.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct EntryV1 {
    /// Decoded offset and size.
    pub uncompressed: U64, // 0
    /// Stored offset and size.
    pub compressed: U64, // 8
}
const _: () = assert!(size_of::<EntryV1>() == 16);

/// V2 entry: 24 bytes, three packed words.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct EntryV2 {
    /// Decoded block, size, flags.
    pub uncompressed: U64, // 0
    /// Stored offset and size.
    pub compressed: U64, // 8
    /// Unit and offset in it, or CRC.
    pub data: U64, // 16
}
const _: () = assert!(size_of::<EntryV2>() == 24);

/// One batch unit: 40 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct BatchUnit {
    /// Stored bytes.
    pub compressed_size: U32, // 0
    /// Decoded bytes.
    pub uncompressed_size: U32, // 4
    /// 0.
    pub reserved: [u8; 32], // 8
}
const _: () = assert!(size_of::<BatchUnit>() == 40);

/// One slice of a gzip file: 40 bytes, as many as a batch unit. Dictionaries follow the last one.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct ZranSlice {
    /// First byte in the gzip file that decoding needs, but for `ctx_byte`.
    pub in_offset: U64, // 0
    /// Its first byte of the decoded file.
    pub out_offset: U64, // 8
    /// Where its dictionary starts among the dictionaries.
    pub dict_offset: U64, // 16
    /// Bytes of the gzip file.
    pub in_len: U32, // 24
    /// Decoded bytes.
    pub out_len: U32, // 28
    /// Bytes of the dictionary, 0 to 32768.
    pub dict_size: U32, // 32
    /// The byte before `in_offset`.
    pub ctx_byte: u8, // 36
    /// Its upper bits that belong to the slice, 0 to 7.
    pub ctx_bits: u8, // 37
    /// 0.
    pub reserved: [u8; 2], // 38
}
const _: () = assert!(size_of::<ZranSlice>() == 40);

/// What an entry of either version says, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Byte in the decoded space.
    pub uncompressed_offset: u64,
    /// 1 to 16 MiB.
    pub uncompressed_size: u32,
    /// Byte in the blob.
    pub compressed_offset: u64,
    /// V1: 1 to 16 MiB; V2: 0 for batch members.
    pub compressed_size: u32,
    /// V2 flags; for V1 only `COMPRESSED`, derived from differing sizes.
    pub flags: super::features::EntryFlags,
    /// V2 data word, 0 for V1.
    pub data: u64,
}

const MASK_20: u64 = 0xf_ffff;

impl EntryV1 {
    /// Packs offsets and sizes (both sizes are stored minus one).
    ///
    /// `uncompressed_offset` is a multiple of 4096 below 2^44, `compressed_offset` below
    /// 2^40, sizes 1 to 16 MiB: the writer's limits.
    pub fn pack(entry: &Entry) -> Self {
        let size_bits = |size: u32, high_at: u32| {
            let s = u64::from(size) - 1;
            (s & MASK_20) << 44 | (s >> 20 & 0xf) << high_at
        };
        Self {
            uncompressed: U64::new(
                entry.uncompressed_offset & 0xfff_ffff_f000 | size_bits(entry.uncompressed_size, 8),
            ),
            compressed: U64::new(
                entry.compressed_offset & 0xff_ffff_ffff | size_bits(entry.compressed_size, 40),
            ),
        }
    }

    /// The fields.
    pub fn unpack(&self) -> Entry {
        let (u, c) = (self.uncompressed.get(), self.compressed.get());
        let size =
            |word: u64, high_at: u32| ((word >> 44 & MASK_20 | (word >> high_at & 0xf) << 20) + 1) as u32;
        let (uncompressed_size, compressed_size) = (size(u, 8), size(c, 40));
        Entry {
            uncompressed_offset: u & 0xfff_ffff_f000,
            uncompressed_size,
            compressed_offset: c & 0xff_ffff_ffff,
            compressed_size,
            flags: if compressed_size == uncompressed_size {
                super::features::EntryFlags::empty()
            } else {
                super::features::EntryFlags::COMPRESSED
            },
            data: 0,
        }
    }
}

impl EntryV2 {
    /// Packs the fields; the stored size is not minus one here and stays below 2^24.
    pub fn pack(entry: &Entry) -> Self {
        Self {
            uncompressed: U64::new(
                entry.uncompressed_offset >> 12
                    | u64::from(entry.uncompressed_size - 1) << 32
                    | u64::from(entry.flags.bits()) << 56,
            ),
            compressed: U64::new(
                entry.compressed_offset & 0xff_ffff_ffff | u64::from(entry.compressed_size) << 40,
            ),
            data: U64::new(entry.data),
        }
    }

    /// The fields. Unknown flag bits are kept.
    pub fn unpack(&self) -> Entry {
        let (u, c) = (self.uncompressed.get(), self.compressed.get());
        Entry {
            uncompressed_offset: (u & 0xffff_ffff) << 12,
            uncompressed_size: (u >> 32 & 0xff_ffff) as u32 + 1,
            compressed_offset: c & 0xff_ffff_ffff,
            compressed_size: (c >> 40) as u32,
            flags: super::features::EntryFlags::from_bits_retain((u >> 56) as u8),
            data: self.data.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::features::EntryFlags;
    use super::*;

    #[test]
    fn entries_round_trip_at_their_limits() {
        for (usize_, csize) in [(1, 1), (0x10_0000, 0x10_0000 - 1), (0x100_0000, 0xff_ffff), (4097, 12)] {
            let entry = Entry {
                uncompressed_offset: 0xfff_ffff_f000,
                uncompressed_size: usize_,
                compressed_offset: 0xff_ffff_ffff,
                compressed_size: csize,
                flags: if usize_ == csize { EntryFlags::empty() } else { EntryFlags::COMPRESSED },
                data: 0,
            };
            assert_eq!(EntryV1::pack(&entry).unpack(), entry);
            let v2 = Entry {
                flags: EntryFlags::BATCH | EntryFlags::COMPRESSED,
                data: 7 << 32 | 9,
                compressed_size: 0,
                ..entry
            };
            assert_eq!(EntryV2::pack(&v2).unpack(), v2);
        }
    }
}
