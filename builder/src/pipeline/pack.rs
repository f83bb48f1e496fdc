//! From new chunks to stored bytes.

use storage::cipher::XtsKey;
use storage::codec::Compressor;

use super::DataOptions;
use super::batch::{Batch, Packed, PieceState, Stored, Unit};
use crate::Result;

impl DataOptions {
    /// True if what is stored of a chunk is never longer than the chunk, and a chunk is stored alone.
    pub(super) fn packs_in_place(&self) -> bool {
        self.cipher.is_none() && self.batch_size == 0
    }

    /// Buffers that a batch takes, the one that it is packed into among them.
    pub(super) fn buffers_of_a_batch(&self) -> usize {
        if self.packs_in_place() { 1 } else { 2 }
    }
}

/// Replaces the bytes in the buffer by the stored form of the new chunks, one after another.
///
/// In place: what is stored of a chunk is never longer than the chunk, so the write position
/// never passes the start of the chunk that is read.
pub(super) fn pack_in_place(compressor: &mut Compressor, batch: &mut Batch) -> Result<()> {
    let buffer = &mut batch.buffer;
    let mut end = 0;
    for piece in &mut buffer.pieces {
        let PieceState::New(id) = piece.state else { continue };
        let (start, len) = (piece.offset as usize, piece.len as usize);
        let stored = match compressor.compress_borrowed(&buffer.bytes[start..start + len])? {
            Some(packed) => {
                buffer.bytes[end..end + packed.len()].copy_from_slice(packed);
                packed.len()
            }
            None => {
                buffer.bytes.copy_within(start..start + len, end);
                len
            }
        };
        end += stored;
        piece.state = PieceState::Packed(id, stored as u32);
    }
    buffer.filled = end;
    Ok(())
}

/// Compresses and encrypts the new chunks of a batch, units of small ones among them. Small chunks
/// behind the last unit are left: they go into one of a later batch.
pub(super) fn pack(options: &DataOptions, compressor: &mut Compressor, batch: &mut Batch) -> Result<()> {
    let mut packed = Packed::default();
    let mut unit = std::mem::take(&mut batch.carried);
    let buffer = &mut batch.buffer;
    for piece in &mut buffer.pieces {
        let PieceState::New(id) = piece.state else { continue };
        let bytes = &buffer.bytes[piece.offset as usize..][..piece.len as usize];
        if ends_unit(options, unit.bytes.len(), piece.shares, bytes.len()) {
            pack_unit(options, compressor, &mut unit, &mut packed)?;
        }
        if piece.shares {
            unit.push(id, bytes);
        } else {
            let size = append(options, compressor, bytes, &mut packed.bytes)?;
            packed.stored.push(Stored::Chunk(id, size));
        }
        piece.state = PieceState::Known;
    }
    // The chunk that ended this unit waits for a later batch itself.
    if !unit.members.is_empty() {
        pack_unit(options, compressor, &mut unit, &mut packed)?;
    }
    buffer.filled = 0;
    batch.packed = Some(packed);
    Ok(())
}

/// True if a unit of `len` bytes ends before a new chunk of `next` bytes.
pub(super) fn ends_unit(options: &DataOptions, len: usize, shares: bool, next: usize) -> bool {
    len > 0 && (!shares || len + next >= options.batch_size as usize)
}

/// Compresses and encrypts a unit, which is empty afterwards.
pub(super) fn pack_unit(
    options: &DataOptions,
    compressor: &mut Compressor,
    unit: &mut Unit,
    packed: &mut Packed,
) -> Result<()> {
    let Unit { bytes, members } = std::mem::take(unit);
    let stored = append(options, compressor, &bytes, &mut packed.bytes)?;
    packed.stored.push(Stored::Unit { stored, decoded: bytes.len() as u32, members });
    Ok(())
}

impl Unit {
    /// Adds a chunk.
    pub(super) fn push(&mut self, id: crate::content::ChunkId, bytes: &[u8]) {
        self.members.push((id, self.bytes.len() as u32));
        self.bytes.extend_from_slice(bytes);
    }
}

/// Appends the stored form of `bytes` and answers its length. It is compressed if that makes it
/// shorter, what encryption adds included: so the length tells whether it is.
fn append(
    options: &DataOptions,
    compressor: &mut Compressor,
    bytes: &[u8],
    out: &mut Vec<u8>,
) -> Result<u32> {
    let compressed = compressor.compress_borrowed(bytes)?;
    let Some(key) = &options.cipher else {
        let stored = compressed.unwrap_or(bytes);
        out.extend_from_slice(stored);
        return Ok(stored.len() as u32);
    };
    let plain = XtsKey::sealed_len(bytes.len());
    let shorter = compressed.filter(|compressed| XtsKey::sealed_len(compressed.len()) < plain);
    let mut sealed = shorter.unwrap_or(bytes).to_vec();
    key.seal(&mut sealed);
    out.extend_from_slice(&sealed);
    Ok(sealed.len() as u32)
}
