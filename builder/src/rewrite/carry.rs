//! Chunks of an image into a new blob.
//!
//! A chunk that is a unit of its own is copied as it is stored, if the new blob has that
//! compressor and nothing is encrypted. All others are encoded anew: small ones that
//! shared a unit share one again, up to the size that units have had.

use std::collections::HashMap;

use bytes::Bytes;
use rafs::format::features::{BlobFeatures, ChunkFlags};
use rafs::format::limits::{BLOCK_SIZE, MAX_BLOB_COMPRESSED, MAX_BLOB_DECODED, MAX_CHUNKS};
use storage::cipher::XtsKey;
use storage::codec::{Codec, Compressor};
use storage::digest::DigestAlgorithm;
use storage::extent::{ChunkExtent, Cipher};

use super::Source;
use crate::blob_writer::{BlobOptions, BlobWriter, Context, FinishedBlob};
use crate::content::{ChunkId, ChunkRow, ChunkSource as _};
use crate::sink::BlobSink;
use crate::{Error, Result};

/// What a new blob is like.
#[derive(Clone)]
pub(super) struct BlobKind {
    pub codec: Codec,
    pub digester: DigestAlgorithm,
    pub cipher: Option<XtsKey>,
}

/// Writes `chunks`, each at its old place still, into a new blob in this order. Answers where each
/// lies in it, but for the number of the blob.
///
/// # Errors
/// `Mismatch`, `Corrupt`, `Storage`: a chunk can not be read, or is damaged. `Io`: writing
/// failed. `Limit`: too much for one blob.
pub(super) fn carry(
    source: &Source,
    chunks: &[ChunkId],
    kind: &BlobKind,
    sink: BlobSink,
    progress: &dyn Fn(u64),
) -> Result<(FinishedBlob, Vec<ChunkRow>)> {
    let packed = !is_aligned(source, chunks);
    let mut packer = Packer {
        sink,
        kind,
        compressor: Compressor::for_chunks(kind.codec)?,
        alignment: if packed { 1 } else { BLOCK_SIZE },
        stored_end: 0,
        decoded_end: 0,
        rows: Vec::with_capacity(chunks.len()),
        unit: Unit { limit: unit_limit(source, chunks)?, ..Unit::default() },
        units: Vec::new(),
        members: HashMap::new(),
    };
    let mut stream = source.data.stream(chunks.iter().map(|&id| source.extent(id))).keeping_stored();
    for &id in chunks {
        let (blob, extent) = source.extent(id)?;
        let fetched = stream.next_fetched()?;
        // The stream answers every chunk, or an error.
        let Some(fetched) = fetched else { return Err(Error::bad_source("a chunk is missing")) };
        // What is stored in an original layer, or with another compressor, may do better here.
        let blob = &source.bootstrap().blobs()[blob as usize];
        let native = blob.codec == kind.codec && !blob.features.contains(BlobFeatures::SEPARATE);
        let stored = Some(&fetched.stored).filter(|_| native && packer.copies(&extent));
        packer.add(source.chunks.row(id), &extent, &fetched.bytes, stored)?;
        progress(fetched.bytes.len() as u64);
    }
    let chunk_size = source.bootstrap().summary().chunk_size;
    packer.finish(source.bootstrap().summary().fs_version, chunk_size)
}

/// RAFS v6 aligns chunks in the decoded space; in v5 that is a choice, which shows in the offsets.
fn is_aligned(source: &Source, chunks: &[ChunkId]) -> bool {
    let aligned = |id: &ChunkId| source.chunks.row(*id).uncompressed_offset.is_multiple_of(BLOCK_SIZE);
    source.bootstrap().summary().fs_version != 5 || chunks.iter().all(aligned)
}

/// Decoded bytes of the largest unit that several of the chunks' old neighbours share; 0 if there is
/// none.
fn unit_limit(source: &Source, chunks: &[ChunkId]) -> Result<usize> {
    let mut limit = 0;
    for &id in chunks {
        let (_, extent) = source.extent(id)?;
        if shares(&extent) {
            limit = limit.max(extent.unit.decoded_len as usize);
        }
    }
    Ok(limit)
}

/// True for a member of a batch unit. Slices of a gzip file are no such units: nobody chose them.
fn shares(extent: &ChunkExtent) -> bool {
    extent.unit.window.is_none() && extent.len != extent.unit.decoded_len
}

/// Small chunks that are compressed together.
#[derive(Default)]
struct Unit {
    bytes: Vec<u8>,
    /// Numbers of its chunks in the blob, and where they begin.
    members: Vec<(u32, u32)>,
    limit: usize,
}

struct Packer<'a> {
    sink: BlobSink,
    kind: &'a BlobKind,
    compressor: Compressor,
    /// Of chunks in the decoded space.
    alignment: u64,
    stored_end: u64,
    decoded_end: u64,
    rows: Vec<ChunkRow>,
    /// What waits to be written.
    unit: Unit,
    /// As [`Context::Wide`] has them.
    units: Vec<(u32, u32)>,
    members: HashMap<u32, (u32, u64, u32)>,
}

impl Packer<'_> {
    /// Adds a chunk; `stored`: its stored form, if that will do as it is.
    fn add(
        &mut self,
        old: ChunkRow,
        extent: &ChunkExtent,
        bytes: &Bytes,
        stored: Option<&Bytes>,
    ) -> Result<()> {
        let number = self.rows.len() as u32;
        if number >= MAX_CHUNKS {
            return Err(Error::limit(format!("more than {MAX_CHUNKS} chunks in one blob")));
        }
        let crc32 = crc32c::crc32c(bytes);
        let mut flags = ChunkFlags::empty();
        flags.set(ChunkFlags::ENCRYPTED, self.kind.cipher.is_some());
        flags.set(ChunkFlags::HAS_CRC32, crc32 != 0);
        let mut row = ChunkRow {
            blob: 0,
            index: number,
            compressed_offset: 0,
            compressed_size: 0,
            uncompressed_size: extent.len,
            uncompressed_offset: self.decoded_end,
            crc32,
            flags: flags.bits(),
            ..old
        };
        self.decoded_end = (self.decoded_end + u64::from(extent.len)).next_multiple_of(self.alignment);
        if self.decoded_end > MAX_BLOB_DECODED {
            return Err(Error::limit(format!("a blob of more than {MAX_BLOB_DECODED} decoded bytes")));
        }
        if shares(extent) {
            if self.unit.bytes.len() + bytes.len() > self.unit.limit {
                self.end_unit()?;
            }
            self.unit.members.push((number, self.unit.bytes.len() as u32));
            self.unit.bytes.extend_from_slice(bytes);
        } else {
            self.end_unit()?;
            row = self.alone(row, bytes, stored)?;
        }
        self.rows.push(row);
        Ok(())
    }

    /// Writes a chunk that is a unit of its own, and says so in its row.
    fn alone(&mut self, row: ChunkRow, bytes: &[u8], stored: Option<&Bytes>) -> Result<ChunkRow> {
        let compressed_offset = self.stored_end;
        let compressed_size = match stored {
            Some(stored) => self.write(stored)?,
            None => self.encode(bytes)?,
        };
        // Encryption makes less than a block of the cipher longer.
        let plain = match self.kind.cipher {
            Some(_) => XtsKey::sealed_len(bytes.len()) as u32,
            None => row.uncompressed_size,
        };
        let mut flags = ChunkFlags::from_bits_retain(row.flags);
        flags.set(ChunkFlags::COMPRESSED, compressed_size < plain);
        Ok(ChunkRow { compressed_offset, compressed_size, flags: flags.bits(), ..row })
    }

    /// True if the stored bytes of the chunk are what would be written. A blob states that a chunk is
    /// compressed by its being shorter.
    fn copies(&self, extent: &ChunkExtent) -> bool {
        let unit = &extent.unit;
        let shorter = unit.compressed.len() < u64::from(unit.decoded_len);
        unit.window.is_none()
            && unit.cipher == Cipher::None
            && self.kind.cipher.is_none()
            && extent.len == unit.decoded_len
            && (unit.codec == Codec::None || unit.codec == self.kind.codec && shorter)
    }

    fn encode(&mut self, bytes: &[u8]) -> Result<u32> {
        let compressed = self.compressor.compress_borrowed(bytes)?;
        let stored = match &self.kind.cipher {
            None => compressed.unwrap_or(bytes).to_vec(),
            Some(key) => {
                let plain = XtsKey::sealed_len(bytes.len());
                let shorter = compressed.filter(|shorter| XtsKey::sealed_len(shorter.len()) < plain);
                let mut sealed = shorter.unwrap_or(bytes).to_vec();
                key.seal(&mut sealed);
                sealed
            }
        };
        self.write(&stored)
    }

    fn write(&mut self, stored: &[u8]) -> Result<u32> {
        self.sink.append(stored)?;
        self.stored_end += stored.len() as u64;
        if self.stored_end > MAX_BLOB_COMPRESSED {
            return Err(Error::limit(format!("a blob of more than {MAX_BLOB_COMPRESSED} bytes")));
        }
        // A unit has at most 16 MiB.
        Ok(stored.len() as u32)
    }

    fn end_unit(&mut self) -> Result<()> {
        let Unit { bytes, members, limit } = std::mem::take(&mut self.unit);
        self.unit.limit = limit;
        match members[..] {
            [] => return Ok(()),
            // It shares nothing any more; whoever carries it on from here does the same.
            [(number, _)] => {
                let row = self.rows[number as usize];
                self.rows[number as usize] = self.alone(row, &bytes, None)?;
                return Ok(());
            }
            _ => {}
        }
        let start = self.stored_end;
        let stored = self.encode(&bytes)?;
        let number = self.units.len() as u32;
        self.units.push((stored, bytes.len() as u32));
        self.members.extend(members.into_iter().map(|(chunk, offset)| (chunk, (number, start, offset))));
        Ok(())
    }

    fn finish(mut self, fs_version: u32, chunk_size: u32) -> Result<(FinishedBlob, Vec<ChunkRow>)> {
        self.end_unit()?;
        let context = match (fs_version, &self.kind.cipher) {
            (5, _) => Context::None,
            (_, None) if self.units.is_empty() => Context::Plain,
            _ => Context::Wide { units: self.units, members: self.members },
        };
        let options = BlobOptions {
            codec: self.kind.codec,
            digester: self.kind.digester,
            chunk_size,
            // Its digests would be left out of the blob's name, and a registry knows a blob by all of it.
            toc: false,
            inline_bootstrap: false,
            id: None,
            cipher: self.kind.cipher,
            keep_context: false,
        };
        let rows = self.rows.iter().copied();
        let blob = BlobWriter::new(self.sink, options, self.decoded_end, rows, &context)?.finish(None)?;
        Ok((blob, self.rows))
    }
}

impl BlobKind {
    /// A blob like blob number `blob` of the image.
    pub(super) fn like(source: &Source, blob: usize) -> Self {
        let blob = &source.bootstrap().blobs()[blob];
        let cipher = match &blob.cipher {
            Cipher::Aes128Xts(key) => Some(**key),
            Cipher::None => None,
        };
        Self { codec: blob.codec, digester: blob.digester, cipher }
    }
}
