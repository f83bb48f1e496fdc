//! Where a chunk lies: in the blob, in its fetch unit, in the decoded space.
//!
//! A *fetch unit* is what must be fetched and decoded as a whole: one chunk, a
//! batch of small ones, a zran span. A *chunk* is what is verified and shared: a
//! part of a unit with a digest. Both are plain values; `rafs` makes them from the
//! bootstrap and hands them over with each read.

use std::sync::Arc;

use crate::Result;
use crate::cipher::XtsKey;
use crate::codec::{self, Codec};
use crate::digest::{Digest, DigestAlgorithm};
use crate::ids::{ByteRange, ChunkIndex};
use crate::inflate::Window;

/// Encryption of a fetch unit's bytes in the blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// Stored in clear.
    None,
    /// AES-128-XTS with the blob's key.
    Aes128Xts(Arc<XtsKey>),
}

/// What must be fetched and decoded as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchUnit {
    /// Bytes in the blob as stored, never empty.
    pub compressed: ByteRange,
    /// How those bytes are compressed; `Codec::None` when stored as they are.
    pub codec: Codec,
    /// How those bytes are encrypted.
    pub cipher: Cipher,
    /// Where the unit begins inside a stream of gzip data; it is no gzip member then.
    pub window: Option<Arc<Window>>,
    /// Bytes after decoding, 1 to 16 MiB.
    pub decoded_len: u32,
}

impl FetchUnit {
    /// Fills `decoded`, which has `decoded_len` bytes, from `stored`, the bytes of `compressed`.
    ///
    /// # Errors
    /// `Corrupt`: they do not decode to that length.
    pub fn decode(&self, stored: &[u8], decoded: &mut [u8]) -> Result<()> {
        match (&self.cipher, &self.window) {
            (Cipher::None, None) => codec::decompress(self.codec, stored, decoded),
            (Cipher::None, Some(window)) => window.inflate(stored, decoded),
            (Cipher::Aes128Xts(key), _) => {
                key.open(stored, |plain| codec::decompress(self.codec, plain, decoded))
            }
        }
    }

    /// True if the stored bytes are the decoded ones.
    pub fn is_plain(&self) -> bool {
        self.codec == Codec::None && self.cipher == Cipher::None && self.window.is_none()
    }
}

/// What a chunk must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpectedDigest {
    /// Algorithm of the blob.
    pub algorithm: DigestAlgorithm,
    /// Digest of the chunk's decoded bytes.
    pub digest: Digest,
}

/// One chunk: (unit, offset in it, length, decoded offset, digest).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkExtent {
    /// Number in the blob; the key of the chunk map.
    pub index: ChunkIndex,
    /// The unit that holds it.
    pub unit: FetchUnit,
    /// First byte inside the decoded unit; `offset_in_unit + len <= unit.decoded_len`.
    pub offset_in_unit: u32,
    /// Decoded bytes, 1 to 16 MiB.
    pub len: u32,
    /// Byte in the blob's decoded space, which is also the offset in the cache's data
    /// file. Not always 4 KiB-aligned (v5, tarfs).
    pub decoded_offset: u64,
    /// `None` only for images without chunk digests, mounted with `--allow-unverified`.
    pub digest: Option<ExpectedDigest>,
}

impl ChunkExtent {
    /// Its part, by decoded length, of the stored bytes of its unit: over all chunks of a
    /// unit they add up to the unit, but for rounding.
    pub fn stored_share(&self) -> u64 {
        let decoded = u64::from(self.unit.decoded_len.max(1));
        // Units of a checked image are far smaller than the product allows.
        self.unit.compressed.len().saturating_mul(self.len.into()) / decoded
    }
}
