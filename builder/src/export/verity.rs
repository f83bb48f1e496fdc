//! The hash tree of dm-verity: format 1, SHA-256, no salt, no superblock.
//!
//! Level 0 has the digests of the data blocks, each level above it those of the blocks below,
//! up to one block whose digest is the root. On the disk the top comes first. Digests fill whole
//! blocks of 4096 bytes, with zeros behind the last.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use storage::digest::{Digest, DigestAlgorithm};

use crate::{Error, Result};

/// Bytes of a block of digests.
const HASH_BLOCK: u64 = 4096;
const DIGEST: u64 = 32;
const PER_BLOCK: u64 = HASH_BLOCK / DIGEST;
/// Bytes read at once; a multiple of every block size.
const STEP: u64 = 1 << 20;

/// What `veritysetup` and the kernel need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verity {
    /// Bytes of a data block.
    pub data_block_size: u32,
    /// Data blocks.
    pub data_blocks: u64,
    /// Byte where the tree starts.
    pub hash_offset: u64,
    /// Root digest.
    pub root: Digest,
}

impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "dm-verity options: --no-superblock --format=1 -s \"\" --hash=sha256 --data-block-size={} \
             --hash-block-size={HASH_BLOCK} --data-blocks {} --hash-offset {} {}",
            self.data_block_size, self.data_blocks, self.hash_offset, self.root
        )
    }
}

/// A run of blocks in the file.
#[derive(Clone, Copy)]
struct Level {
    start: u64,
    blocks: u64,
    block_size: u64,
}

/// Appends the tree of the first `size` bytes of `disk`, which are whole blocks.
pub(super) fn append(disk: &File, size: u64, block_size: u32) -> Result<Verity> {
    let data = Level { start: 0, blocks: size / u64::from(block_size), block_size: block_size.into() };
    let hash_offset = size.next_multiple_of(HASH_BLOCK);
    let mut counts = Vec::new();
    let mut below = data.blocks;
    while below > 1 {
        below = below.div_ceil(PER_BLOCK);
        counts.push(below);
    }
    let mut end = hash_offset + counts.iter().sum::<u64>() * HASH_BLOCK;
    disk.set_len(end).map_err(failed)?;
    let mut from = data;
    for blocks in counts {
        end -= blocks * HASH_BLOCK;
        let to = Level { start: end, blocks, block_size: HASH_BLOCK };
        hash_level(disk, from, to)?;
        from = to;
    }
    // Of a single block the root is its digest, data or not.
    let mut top = vec![0; from.block_size as usize];
    disk.read_exact_at(&mut top, from.start).map_err(failed)?;
    let root = DigestAlgorithm::Sha256.digest(&top);
    Ok(Verity { data_block_size: block_size, data_blocks: data.blocks, hash_offset, root })
}

/// Writes the digests of the blocks `from` to the blocks `to`.
fn hash_level(disk: &File, from: Level, to: Level) -> Result<()> {
    // Much of a disk may be holes.
    let zeros = vec![0; from.block_size as usize];
    let of_zeros = DigestAlgorithm::Sha256.digest(&zeros);
    let end = from.start + from.blocks * from.block_size;
    let mut at = from.start;
    let mut out = to.start;
    let mut buffer = vec![0; STEP as usize];
    let mut digests = Vec::new();
    while at < end {
        let n = (end - at).min(STEP) as usize;
        disk.read_exact_at(&mut buffer[..n], at).map_err(failed)?;
        digests.clear();
        for block in buffer[..n].chunks_exact(from.block_size as usize) {
            let digest = if block == zeros { of_zeros } else { DigestAlgorithm::Sha256.digest(block) };
            digests.extend_from_slice(&digest.0);
        }
        disk.write_all_at(&digests, out).map_err(failed)?;
        at += n as u64;
        out += digests.len() as u64;
    }
    Ok(())
}

fn failed(error: std::io::Error) -> Error {
    Error::io("write the hash tree", error)
}
