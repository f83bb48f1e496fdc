//! A blob context: its entries and what follows them, before and after compression.

use std::io::{Cursor, Write as _};

use rafs::bootstrap::Buffer;
use rafs::format::blob_context::{BatchUnit, ContextHeader, Entry, EntryV1, EntryV2};
use rafs::format::features::{ChunkFlags, EntryFlags};
use storage::cipher::XtsKey;
use storage::codec::{Codec, Compressor, ZSTD_LEVEL};
use zerocopy::IntoBytes as _;
use zerocopy::byteorder::little_endian::U32;

use super::Context;
use crate::content::ChunkRow;
use crate::{Error, Result};

/// Tables from this size on are compressed piece by piece.
const LARGE_TABLE: usize = 1 << 20;

/// A context before compression.
pub(super) struct ContextArray {
    pub bytes: Buffer,
    /// Where what follows the entries begins.
    pub units_at: usize,
    pub unit_count: u32,
}

/// A context as it is stored, and room for its header behind it.
pub(super) struct StoredContext {
    pub bytes: Buffer,
    /// Without the header.
    pub len: usize,
}

impl StoredContext {
    /// `array` compressed with `codec`, or as it is if that does not make it shorter; and which of both.
    pub fn new(codec: Codec, array: &[u8]) -> Result<(Codec, Self)> {
        let mut bytes = Buffer::zeroed(array.len() + size_of::<ContextHeader>());
        let room = &mut bytes[..array.len()];
        Ok(match compress(codec, array, room)? {
            Some(len) => (codec, Self { bytes, len }),
            None => {
                room.copy_from_slice(array);
                (Codec::None, Self { bytes, len: array.len() })
            }
        })
    }

    pub fn sealed(&self, key: &XtsKey) -> Self {
        let mut bytes = self.bytes[..self.len].to_vec();
        key.seal(&mut bytes);
        let len = bytes.len();
        bytes.resize(len + size_of::<ContextHeader>(), 0);
        Self { bytes: bytes.into(), len }
    }

    pub fn header(&mut self) -> &mut [u8] {
        &mut self.bytes[self.len..][..size_of::<ContextHeader>()]
    }

    pub fn with_header(&self) -> &[u8] {
        &self.bytes[..self.len + size_of::<ContextHeader>()]
    }
}

/// Compresses a table into `room` of as many bytes; `None` if that does not make it shorter.
fn compress(codec: Codec, table: &[u8], room: &mut [u8]) -> Result<Option<usize>> {
    // In one go, room for the worst case is needed beside the table.
    if codec != Codec::Zstd || table.len() < LARGE_TABLE {
        let mut compressor = Compressor::new(codec)?;
        let shorter = compressor.compress_borrowed(table)?;
        return Ok(shorter.map(|bytes| {
            room[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        }));
    }
    let compressed = || {
        let mut encoder = zstd::Encoder::new(Cursor::new(room), ZSTD_LEVEL)?;
        encoder.set_pledged_src_size(Some(table.len() as u64))?;
        encoder.write_all(table)?;
        encoder.finish()
    };
    match compressed() {
        Ok(out) => Ok(Some(out.position() as usize).filter(|&len| len < table.len())),
        // It does not fit.
        Err(e) if e.kind() == std::io::ErrorKind::WriteZero => Ok(None),
        Err(e) => Err(Error::io("compress a blob context with zstd", e)),
    }
}

pub(super) fn context_array(
    chunks: impl ExactSizeIterator<Item = ChunkRow>,
    context: &Context,
) -> ContextArray {
    let entry = |row: &ChunkRow, flags, data| Entry {
        uncompressed_offset: row.uncompressed_offset,
        uncompressed_size: row.uncompressed_size,
        compressed_offset: row.compressed_offset,
        compressed_size: row.compressed_size,
        flags,
        data,
    };
    let wide = |entries: Vec<EntryV2>, units: &[u8], unit_count| {
        let units_at = size_of_val(&entries[..]);
        let mut bytes = Buffer::zeroed(units_at + units.len());
        bytes[..units_at].copy_from_slice(entries.as_bytes());
        bytes[units_at..].copy_from_slice(units);
        ContextArray { bytes, units_at, unit_count }
    };
    match context {
        Context::Plain => {
            let entries: Vec<EntryV1> =
                chunks.map(|row| EntryV1::pack(&entry(&row, EntryFlags::empty(), 0))).collect();
            let bytes = Buffer::copy_of(entries.as_bytes());
            ContextArray { units_at: bytes.len(), bytes, unit_count: 0 }
        }
        Context::Wide { units, members } => {
            let entries = (0u32..).zip(chunks).map(|(number, row)| {
                let chunk = ChunkFlags::from_bits_retain(row.flags);
                let mut flags = EntryFlags::empty();
                flags.set(EntryFlags::ENCRYPTED, chunk.contains(ChunkFlags::ENCRYPTED));
                if let Some(&(unit, start, offset)) = members.get(&number) {
                    flags |= EntryFlags::BATCH | EntryFlags::COMPRESSED;
                    let row = ChunkRow { compressed_offset: start, compressed_size: 0, ..row };
                    return EntryV2::pack(&entry(&row, flags, u64::from(unit) << 32 | u64::from(offset)));
                }
                flags.set(EntryFlags::COMPRESSED, chunk.contains(ChunkFlags::COMPRESSED));
                flags.set(EntryFlags::HAS_CRC32, row.crc32 != 0);
                EntryV2::pack(&entry(&row, flags, row.crc32.into()))
            });
            let units_stored: Vec<BatchUnit> = units
                .iter()
                .map(|&(stored, decoded)| BatchUnit {
                    compressed_size: U32::new(stored),
                    uncompressed_size: U32::new(decoded),
                    reserved: [0; 32],
                })
                .collect();
            wide(entries.collect(), units_stored.as_bytes(), units.len() as u32)
        }
        Context::Separate { slices: Some(slices), .. } => {
            let entries = chunks.zip(&slices.places).map(|(row, &(slice, offset))| {
                let flags = EntryFlags::ZRAN | EntryFlags::COMPRESSED;
                EntryV2::pack(&entry(&row, flags, u64::from(slice) << 32 | u64::from(offset)))
            });
            wide(entries.collect(), &slices.bytes, slices.count)
        }
        Context::None
        | Context::Tar { .. }
        | Context::Members { .. }
        | Context::Separate { slices: None, .. } => {
            let entries = chunks.map(|row| {
                let mut flags = EntryFlags::empty();
                let compressed = ChunkFlags::from_bits_retain(row.flags).contains(ChunkFlags::COMPRESSED);
                flags.set(EntryFlags::COMPRESSED, compressed);
                flags.set(EntryFlags::HAS_CRC32, row.crc32 != 0);
                EntryV2::pack(&entry(&row, flags, row.crc32.into()))
            });
            wide(entries.collect(), &[], 0)
        }
    }
}
