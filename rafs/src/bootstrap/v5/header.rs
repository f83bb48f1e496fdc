//! The superblock of RAFS v5 and the places of its tables.

use std::ops::Range;

use super::super::bytes::record;
use super::super::faults::Faults;
use super::super::header::{algorithms, image_flags, unsupported};
use super::super::{Summary, V5Tables};
use crate::format::features::ImageFlags;
use crate::format::limits;
use crate::format::v5::{ALIGNMENT, ExtendedBlob, Inode, SUPERBLOCK_SIZE, Superblock, VERSION};
use crate::{Error, Result};

/// Checked superblock.
#[derive(Debug, Clone)]
pub struct Header {
    /// What holds for the whole image.
    pub summary: Summary,
    /// Byte of the inode table.
    pub inode_table: u64,
    /// Slots, at least 1.
    pub entries: u32,
    /// Byte and length of the blob table.
    pub blob_table: (u64, u64),
    /// Byte and rows of the extended blob table; no rows if there is none.
    pub extended: (u64, u64),
    /// Ranges no inode may touch: superblock and tables.
    pub reserved: [Range<u64>; 5],
}

impl Header {
    /// Reads and checks the superblock of `bytes`.
    ///
    /// # Errors
    /// `Unsupported`: another version, unknown flags, gzip (old stargz images). `Corrupt`: a
    /// broken rule.
    pub fn parse(bytes: &[u8], faults: &mut Faults) -> Result<Self> {
        let len = bytes.len() as u64;
        if len <= SUPERBLOCK_SIZE || len > limits::MAX_BOOTSTRAP_SIZE || !len.is_multiple_of(ALIGNMENT) {
            return Err(Error::corrupt(format!(
                "RAFS v5 bootstrap of {len} bytes: want a multiple of 8 above {SUPERBLOCK_SIZE} and at most {}; it is \
                 truncated or has trailing bytes",
                limits::MAX_BOOTSTRAP_SIZE
            )));
        }
        let sb: &Superblock = record(bytes, 0, "superblock")?;
        if sb.version.get() != VERSION {
            return Err(unsupported(&format!("RAFS version {:#x}", sb.version)));
        }
        if u64::from(sb.sb_size.get()) != SUPERBLOCK_SIZE {
            return Err(Error::corrupt(format!(
                "superblock of {} bytes: want {SUPERBLOCK_SIZE}",
                sb.sb_size
            )));
        }
        let flags = image_flags(sb.flags.get())?;
        let kinds = [
            (ImageFlags::COMPRESSION_GZIP, "RAFS v5 gzip (stargz)"),
            (ImageFlags::TARFS_MODE, "RAFS v5 tarfs"),
            (ImageFlags::ENCRYPTION_AES_128_XTS, "RAFS v5 encrypted"),
        ];
        if let Some((_, kind)) = kinds.iter().find(|(flag, _)| flags.contains(*flag)) {
            return Err(unsupported(kind));
        }
        let (codec, digester) = algorithms(flags, faults)?;
        let chunk_size = sb.chunk_size.get();
        if !limits::is_chunk_size(chunk_size) {
            return Err(Error::corrupt(format!(
                "chunk size {chunk_size:#x}: want a power of two from 4 KiB to 16 MiB"
            )));
        }
        let entries = sb.inode_table_entries.get();
        let smallest = size_of::<Inode>() as u64 + ALIGNMENT + 4;
        if entries == 0 || u64::from(entries) > (len - SUPERBLOCK_SIZE) / smallest {
            return Err(Error::corrupt(format!(
                "{entries} inodes can not lie in a bootstrap of {len} bytes"
            )));
        }
        let inodes = sb.inodes_count.get();
        faults.require(inodes <= entries.into(), || format!("{inodes} inodes in {entries} slots"))?;

        let inode_table = table("inode table", sb.inode_table_offset.get(), u64::from(entries) * 4, len)?;
        let prefetch_entries = sb.prefetch_table_entries.get();
        let prefetch_size = u64::from(prefetch_entries) * 4;
        let prefetch_table = table("prefetch table", sb.prefetch_table_offset.get(), prefetch_size, len)?;
        faults.require(prefetch_entries <= entries, || {
            format!("prefetch table: {prefetch_entries} numbers in an image of {entries} inodes")
        })?;
        let blob_size = u64::from(sb.blob_table_size.get());
        let blob_table = table("blob table", sb.blob_table_offset.get(), blob_size, len)?;
        let rows = u64::from(sb.extended_blob_table_entries.get());
        let extended_size = rows * size_of::<ExtendedBlob>() as u64;
        let extended = table("extended blob table", sb.extended_blob_table_offset.get(), extended_size, len)?;

        let reserved =
            [0..SUPERBLOCK_SIZE, inode_table.clone(), prefetch_table.clone(), blob_table, extended];
        let mut sorted: Vec<_> = reserved.iter().filter(|r| !r.is_empty()).cloned().collect();
        sorted.sort_unstable_by_key(|r| r.start);
        for pair in sorted.windows(2) {
            if pair[1].start < pair[0].end {
                return Err(Error::corrupt(format!("tables at {:?} and {:?} overlap", pair[0], pair[1])));
            }
        }
        Ok(Self {
            summary: Summary {
                fs_version: 5,
                flags,
                codec,
                digester,
                chunk_size,
                block_size: limits::BLOCK_SIZE as u32,
                inode_count: entries.into(),
                meta_blkaddr: 0,
                blob_table: (reserved[3].start, 0),
                chunk_table: (0, 0),
                prefetch_table: (prefetch_table.start, prefetch_entries),
                has_xattrs: flags.contains(ImageFlags::HAS_XATTR),
                bootstrap_size: len,
                v5: Some(V5Tables {
                    inodes,
                    inode_table: (inode_table.start, entries),
                    blob_table_size: blob_size,
                    extended_blob_table: (reserved[4].start, rows as u32),
                }),
            },
            inode_table: inode_table.start,
            entries,
            blob_table: (reserved[3].start, blob_size),
            extended: (reserved[4].start, rows),
            reserved,
        })
    }
}

/// Checks the place of a table; an empty one may be anywhere.
fn table(name: &str, offset: u64, size: u64, len: u64) -> Result<Range<u64>> {
    let end = offset.checked_add(size).filter(|&end| end <= len);
    match end {
        _ if !offset.is_multiple_of(ALIGNMENT) => {}
        _ if size == 0 => return Ok(offset..offset),
        Some(end) if offset >= SUPERBLOCK_SIZE => return Ok(offset..end),
        _ => {}
    }
    Err(Error::corrupt(format!(
        "{name}: {size} bytes at {offset}: want a multiple of 8 between the superblock and the end of the {len} bytes of the file"
    )))
}
