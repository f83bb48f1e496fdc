//! A batch: the chunks of about a MiB of a layer's stream, in one buffer.

use storage::digest::Digest;

use crate::content::ChunkId;
use crate::tree::LayerIndex;

/// Most chunks in one batch. Bounds the table beside the buffer (64 KiB) when a layer is made of
/// files of a few bytes.
pub(super) const MAX_BATCH_CHUNKS: usize = 1024;

/// One chunk on its way.
pub(super) struct Piece {
    /// First byte in the batch's buffer.
    pub offset: u32,
    /// Decoded bytes.
    pub len: u32,
    /// What the hashing step found, or the reader knew.
    pub digest: Digest,
    pub crc32: u32,
    /// Where it lies in the decoded source, if it stays there.
    pub origin: u64,
    /// All of a file, and small enough to share a unit with others.
    pub shares: bool,
    pub state: PieceState,
}

/// How far a chunk has come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceState {
    /// In the buffer, not yet hashed.
    Read,
    /// Digest and CRC are known. A full chunk of zeros arrives like this and without bytes in the
    /// buffer: an equal one with bytes precedes it in its layer, so it is never stored itself.
    Hashed,
    /// First of its kind: to be stored as this chunk.
    New(ChunkId),
    /// Packed: its stored bytes follow those of the previous one from the start of the buffer.
    Packed(ChunkId, u32),
    /// Stored before.
    Known,
}

/// The chunks of one stretch of a layer, with their bytes.
pub(super) struct Batch {
    pub layer: LayerIndex,
    /// Position among the layer's batches.
    pub number: u64,
    pub buffer: Buffer,
    /// Chunks of earlier batches that go into the first unit of this one.
    pub carried: Unit,
    /// What is to be written, if that is not in the buffer.
    pub packed: Option<Packed>,
}

/// Small chunks that are compressed together.
#[derive(Default)]
pub(super) struct Unit {
    pub bytes: Vec<u8>,
    /// Its chunks and where they begin.
    pub members: Vec<(ChunkId, u32)>,
}

/// Stored bytes that are not packed in place: they can be more than the chunks, or hold chunks of
/// earlier batches.
#[derive(Default)]
pub(super) struct Packed {
    pub bytes: Vec<u8>,
    pub stored: Vec<Stored>,
}

/// One piece of the stored bytes, in order.
pub(super) enum Stored {
    /// A chunk, and its bytes.
    Chunk(ChunkId, u32),
    /// A unit of several: stored and decoded bytes, and its chunks.
    Unit { stored: u32, decoded: u32, members: Vec<(ChunkId, u32)> },
}

/// The memory of a batch, used again for the next one.
pub(super) struct Buffer {
    /// Fixed in length; the first `filled` bytes count.
    pub bytes: Box<[u8]>,
    pub filled: usize,
    pub pieces: Vec<Piece>,
}

impl Buffer {
    pub fn new(size: usize) -> Self {
        Self { bytes: vec![0; size].into_boxed_slice(), filled: 0, pieces: Vec::new() }
    }

    pub fn clear(&mut self) {
        self.filled = 0;
        self.pieces.clear();
    }

    /// True if a chunk of `len` bytes still fits.
    pub fn has_room(&self, len: usize) -> bool {
        self.bytes.len() - self.filled >= len && self.pieces.len() < MAX_BATCH_CHUNKS
    }
}
