//! Superblocks, device slots and the places of the tables: everything before the inodes.

use std::ops::Range;

use storage::codec::Codec;
use storage::digest::DigestAlgorithm;

use super::bytes::record;
use super::faults::Faults;
use super::{Nid, Summary};
use crate::format::blob_table::BlobRecord;
use crate::format::chunk::ChunkInfo;
use crate::format::features::ImageFlags;
use crate::format::limits;
use crate::format::superblock::{
    COMPAT_RAFS_V6, DEVICE_TABLE_OFFSET, DEVT_SLOTOFF, DeviceSlot, EROFS_MAGIC, EXT_SUPERBLOCK_OFFSET,
    ExtSuperblock, INCOMPAT, SUPERBLOCK_OFFSET, Superblock,
};
use crate::{Error, ErrorKind, Result};

/// Checked header of a bootstrap.
#[derive(Debug, Clone)]
pub struct Header {
    /// What holds for the whole image.
    pub summary: Summary,
    /// The root directory.
    pub root: Nid,
    /// Time of compact inodes: seconds and nanoseconds.
    pub build_time: (i64, u32),
    /// Byte that nid 0 would have.
    pub meta_offset: u64,
    /// Rows of the blob table and where they start.
    pub blob_table: (u64, u64),
    /// Ranges no inode may touch: superblocks with device slots, and the three tables.
    pub reserved: [Range<u64>; 4],
}

/// The error for a valid image of a kind that is not read yet.
pub fn unsupported(kind: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("this is a {kind} image, which this version does not read; convert it to native RAFS v6"),
    )
}

/// The error for a file of another kind.
fn not_a_bootstrap(found: &str) -> Error {
    Error::corrupt(format!(
        "not a RAFS bootstrap: {found}; a bootstrap is what `nydus-image create --bootstrap FILE` makes, or \
         image/image.boot in the last layer of an image"
    ))
}

impl Header {
    /// Reads and checks the header of `bytes`.
    ///
    /// # Errors
    /// `Corrupt`: not a bootstrap, or a broken rule.
    pub fn parse(bytes: &[u8], faults: &mut Faults) -> Result<Self> {
        let len = bytes.len() as u64;
        if len > limits::MAX_BOOTSTRAP_SIZE {
            return Err(Error::corrupt(format!(
                "bootstrap of {len} bytes: at most {} are accepted",
                limits::MAX_BOOTSTRAP_SIZE
            )));
        }
        let sb: &Superblock = record(bytes, SUPERBLOCK_OFFSET as u64, "superblock")
            .map_err(|_| not_a_bootstrap(&format!("{len} bytes end before a superblock")))?;
        if sb.magic.get() != EROFS_MAGIC || sb.feature_compat.get() & COMPAT_RAFS_V6 == 0 {
            let found = format!(
                "magic {:#010x}, features {:#x} at byte {SUPERBLOCK_OFFSET}",
                sb.magic, sb.feature_compat
            );
            return Err(not_a_bootstrap(&found));
        }
        let ext: &ExtSuperblock = record(bytes, EXT_SUPERBLOCK_OFFSET as u64, "extended superblock")?;
        let flags = image_flags(ext.flags.get())?;
        let block_bits = if flags.contains(ImageFlags::TARFS_MODE) {
            limits::TARFS_BLOCK_BITS
        } else {
            limits::BLOCK_BITS
        };
        check_superblock(sb, len, block_bits, faults)?;
        let (codec, digester) = algorithms(flags, faults)?;

        let chunk_size = ext.chunk_size.get();
        if !limits::is_chunk_size(chunk_size) {
            return Err(Error::corrupt(format!(
                "chunk size {chunk_size:#x}: want a power of two from 4 KiB to 16 MiB"
            )));
        }
        // Every entry but the root's takes a dirent and a byte of name.
        let inode_count = sb.inos.get();
        faults.require((1..=len / 13 + 1).contains(&inode_count), || {
            format!("{inode_count} inodes can not lie in a bootstrap of {len} bytes")
        })?;
        faults.require(sb.build_time_nsec.get() < 1_000_000_000, || {
            format!("build time: {} nanoseconds", sb.build_time_nsec)
        })?;

        let tables = Tables::parse(sb, ext, len, inode_count, faults)?;
        let meta_offset = u64::from(sb.meta_blkaddr.get()) << block_bits;
        if meta_offset > len {
            return Err(Error::corrupt(format!(
                "inode area at {meta_offset} beyond the {len} bytes of the file"
            )));
        }
        Ok(Self {
            summary: Summary {
                fs_version: 6,
                flags,
                codec,
                digester,
                chunk_size,
                block_size: 1 << block_bits,
                inode_count,
                meta_blkaddr: sb.meta_blkaddr.get(),
                blob_table: tables.blobs,
                chunk_table: tables.chunks,
                prefetch_table: tables.prefetch,
                has_xattrs: flags.contains(ImageFlags::HAS_XATTR),
                bootstrap_size: len,
                v5: None,
            },
            root: Nid(u64::from(sb.root_nid.get())),
            build_time: (sb.build_time.get() as i64, sb.build_time_nsec.get().min(999_999_999)),
            meta_offset,
            blob_table: tables.blobs,
            reserved: tables.reserved,
        })
    }
}

/// The flags of a superblock.
///
/// # Errors
/// `Unsupported`: unknown bits.
pub fn image_flags(bits: u64) -> Result<ImageFlags> {
    ImageFlags::from_bits(bits).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "superblock flags {bits:#x}: bits {:#x} are unknown to this version",
                bits & !ImageFlags::all().bits()
            ),
        )
    })
}

/// The rules of section 2.1. Fields the kernel gives another meaning than we do must be 0.
fn check_superblock(sb: &Superblock, len: u64, block_bits: u8, faults: &mut Faults) -> Result<()> {
    if sb.blkszbits != block_bits {
        return Err(Error::corrupt(format!(
            "block size 2^{}: want 2^12, or 2^9 with the tarfs flag",
            sb.blkszbits
        )));
    }
    if len < limits::BLOCK_SIZE || !len.is_multiple_of(limits::BLOCK_SIZE) {
        return Err(Error::corrupt(format!(
            "bootstrap of {len} bytes: want a multiple of 4096; it is truncated or has trailing bytes"
        )));
    }
    let zero: [(&str, u64); 5] = [
        ("checksum", sb.checksum.get().into()),
        ("extra slots", sb.sb_extslots.into()),
        ("shared xattr block", sb.xattr_blkaddr.get().into()),
        ("compression", sb.compression.get().into()),
        ("directory block bits", sb.reserved[0].into()),
    ];
    for (name, value) in zero {
        faults.require(value == 0, || format!("superblock: {name} is {value:#x}, want 0"))?;
    }
    faults.require(sb.feature_incompat.get() == INCOMPAT, || {
        format!("superblock: incompatible features {:#x}, want {INCOMPAT:#x}", sb.feature_incompat)
    })?;
    faults.require(sb.devt_slotoff.get() == DEVT_SLOTOFF, || {
        format!("superblock: device table at slot {}, want {DEVT_SLOTOFF}", sb.devt_slotoff)
    })
}

/// Compressor and digester among the flags.
///
/// # Errors
/// `Corrupt`: not exactly one of each.
pub fn algorithms(flags: ImageFlags, faults: &mut Faults) -> Result<(Codec, DigestAlgorithm)> {
    let compressors = [
        (ImageFlags::COMPRESSION_NONE, Codec::None),
        (ImageFlags::COMPRESSION_LZ4, Codec::Lz4Block),
        (ImageFlags::COMPRESSION_GZIP, Codec::Gzip),
        (ImageFlags::COMPRESSION_ZSTD, Codec::Zstd),
    ];
    let mut set = compressors.iter().filter(|(flag, _)| flags.contains(*flag));
    let codec = match (set.next(), set.next()) {
        (Some((_, codec)), None) => *codec,
        _ => {
            faults.report(Error::corrupt(format!(
                "superblock flags {:#x}: want exactly one compressor",
                flags.bits()
            )))?;
            Codec::None
        }
    };
    let digester = match (flags.contains(ImageFlags::HASH_BLAKE3), flags.contains(ImageFlags::HASH_SHA256)) {
        (false, true) => DigestAlgorithm::Sha256,
        (true, false) => DigestAlgorithm::Blake3,
        _ => {
            faults.report(Error::corrupt(format!(
                "superblock flags {:#x}: want exactly one digester",
                flags.bits()
            )))?;
            DigestAlgorithm::Blake3
        }
    };
    Ok((codec, digester))
}

/// Offset and count of each table.
struct Tables {
    blobs: (u64, u64),
    chunks: (u64, u64),
    prefetch: (u64, u32),
    reserved: [Range<u64>; 4],
}

impl Tables {
    fn parse(
        sb: &Superblock,
        ext: &ExtSuperblock,
        len: u64,
        inodes: u64,
        faults: &mut Faults,
    ) -> Result<Self> {
        let devices = u64::from(sb.extra_devices.get());
        let blob_size = u64::from(ext.blob_table_size.get());
        let blobs =
            table("blob table", ext.blob_table_offset.get(), blob_size, size_of::<BlobRecord>(), len)?;
        let chunks = table(
            "chunk table",
            ext.chunk_table_offset.get(),
            ext.chunk_table_size.get(),
            size_of::<ChunkInfo>(),
            len,
        )?;
        if blobs.1 > limits::MAX_BLOBS as u64 {
            return Err(Error::corrupt(format!("{} blobs: at most {} fit", blobs.1, limits::MAX_BLOBS)));
        }
        if blobs.1 != devices {
            return Err(Error::corrupt(format!("{} blob records but {devices} device slots", blobs.1)));
        }
        let prefetch = prefetch_table(ext, len, inodes, faults)?;
        let slots_end = DEVICE_TABLE_OFFSET as u64 + devices * size_of::<DeviceSlot>() as u64;
        let range = |offset: u64, size: u64| if size == 0 { 0..0 } else { offset..offset + size };
        let reserved = [
            0..slots_end,
            range(blobs.0, blob_size),
            range(prefetch.0, u64::from(prefetch.1) * 4),
            range(chunks.0, ext.chunk_table_size.get()),
        ];
        let mut sorted: Vec<_> = reserved.iter().filter(|r| !r.is_empty()).cloned().collect();
        sorted.sort_unstable_by_key(|r| r.start);
        for pair in sorted.windows(2) {
            if pair[1].start < pair[0].end {
                return Err(Error::corrupt(format!("tables at {:?} and {:?} overlap", pair[0], pair[1])));
            }
        }
        Ok(Self { blobs, chunks, prefetch, reserved })
    }
}

/// Checks a table of records; answers its offset and its number of records.
fn table(name: &str, offset: u64, size: u64, record: usize, len: u64) -> Result<(u64, u64)> {
    let record = record as u64;
    let placed = size == 0
        || offset >= limits::BLOCK_SIZE
            && offset.is_multiple_of(limits::BLOCK_SIZE)
            && size.is_multiple_of(record)
            && offset.checked_add(size).is_some_and(|end| end <= len);
    if !placed {
        return Err(Error::corrupt(format!(
            "{name}: {size} bytes at {offset}: want records of {record} at a multiple of 4096 inside the {len} bytes of the file"
        )));
    }
    Ok((offset, size / record))
}

/// A table at offset 0 is no table, whatever its size: old tools wrote that.
fn prefetch_table(ext: &ExtSuperblock, len: u64, inodes: u64, faults: &mut Faults) -> Result<(u64, u32)> {
    let (offset, size) = (ext.prefetch_table_offset.get(), ext.prefetch_table_size.get());
    if offset == 0 || size == 0 {
        return Ok((0, 0));
    }
    let placed = offset.is_multiple_of(8)
        && size.is_multiple_of(4)
        && u64::from(size / 4) <= inodes
        && offset.checked_add(u64::from(size)).is_some_and(|end| end <= len);
    if !placed {
        faults.report(Error::corrupt(format!(
            "prefetch table: {size} bytes at {offset}: want at most {inodes} numbers of 4 bytes inside the file"
        )))?;
        return Ok((0, 0));
    }
    Ok((offset, size / 4))
}
