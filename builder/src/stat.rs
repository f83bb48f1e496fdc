//! Where the bytes of images are, and what they have in common.
//!
//! Counted is what files refer to, chunk by chunk. Each reference is of one of three kinds:
//!
//! - *ref*: a chunk that an image counted before has, too;
//! - *dedup*: a chunk that this image has had before;
//! - *own*: any other.
//!
//! So the three add up to all references, *dedup* is what sharing inside the image saves, and *ref*
//! what sharing with the others would.

use std::collections::HashSet;

use rafs::bootstrap::{Bootstrap, FileType, Nid, Step, Walk};
use serde::Serialize;
use storage::digest::DigestAlgorithm;
use storage::ids::BlobId;

use crate::{Error, Result};

/// Decoded bytes in a blob are aligned to this.
const ALIGNMENT: u64 = 4096;
/// Sizes of chunks: up to 4 KiB, 8 KiB, … and 1 MiB or more.
const CHUNK_CLASSES: usize = 9;
/// Sizes of files by their highest bit.
const FILE_CLASSES: usize = 45;

/// What tells one chunk from another.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Digest(DigestAlgorithm, [u8; 32]),
    /// A chunk without a digest is only itself.
    Place(BlobId, u32),
}

/// Chunks of the images counted so far.
#[derive(Default)]
pub struct Known(HashSet<Key>);

/// Numbers of one or more images.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stat {
    /// Directories.
    pub dirs: u64,
    /// Regular files, whatever their names.
    pub files: u64,
    /// Symlinks.
    pub symlinks: u64,
    /// References to chunks.
    pub chunks: u64,
    /// Bytes of regular files.
    pub file_size: u64,
    /// Stored bytes of all references.
    pub comp_size: u64,
    /// Decoded bytes of all references.
    pub uncomp_size: u64,
    /// Bytes that aligning the decoded chunks to 4096 adds.
    pub padding_size: u64,
    /// References by decoded size: up to 4 KiB, up to 8 KiB, … above 512 KiB.
    pub chunk_sizes: [u64; CHUNK_CLASSES],
    /// Files by size: 0, 1, 2 to 3, 4 to 7 bytes, …
    pub file_sizes: Vec<u64>,
    /// References to chunks that the image has had before.
    pub dedup_chunks: u64,
    /// Their stored bytes.
    pub dedup_comp_size: u64,
    /// Their decoded bytes.
    pub dedup_uncomp_size: u64,
    /// Chunks that only this image has.
    pub own_chunks: u64,
    /// Their stored bytes.
    pub own_comp_size: u64,
    /// Their decoded bytes.
    pub own_uncomp_size: u64,
    /// References to chunks of images counted before.
    pub ref_chunks: u64,
    /// Their stored bytes.
    pub ref_comp_size: u64,
    /// Their decoded bytes.
    pub ref_uncomp_size: u64,
}

impl Stat {
    /// No image yet.
    pub fn new() -> Self {
        Self { file_sizes: vec![0; FILE_CLASSES], ..Self::default() }
    }

    /// Adds an image. Its chunks are `known` afterwards.
    ///
    /// # Errors
    /// `Rafs`: the tree is damaged where its door can not see it.
    pub fn add(&mut self, bootstrap: &dyn Bootstrap, known: &mut Known) -> Result<()> {
        let mut own = HashSet::new();
        let mut seen = HashSet::new();
        let mut walk = Walk::new(bootstrap, bootstrap.root());
        while let Some(step) = walk.step()? {
            match step {
                Step::Enter(_) => self.dirs += 1,
                Step::Leaf(entry) => match entry.file_type {
                    FileType::Symlink => self.symlinks += 1,
                    // A file with several names has its data once.
                    FileType::Regular if seen.insert(entry.nid) => {
                        self.file(bootstrap, entry.nid, known, &mut own)?;
                    }
                    _ => {}
                },
                Step::Leave(_) => {}
            }
        }
        known.0.extend(own);
        Ok(())
    }

    fn file(
        &mut self,
        bootstrap: &dyn Bootstrap,
        nid: Nid,
        known: &Known,
        own: &mut HashSet<Key>,
    ) -> Result<()> {
        let size = bootstrap.attr(nid)?.size;
        self.files += 1;
        self.file_size = self.file_size.saturating_add(size);
        self.file_sizes[(u64::BITS - size.leading_zeros()).min(FILE_CLASSES as u32 - 1) as usize] += 1;
        let chunk_size = u64::from(bootstrap.summary().chunk_size);
        for position in 0..size.div_ceil(chunk_size) {
            let place =
                u32::try_from(position).map_err(|_| Error::limit(format!("a file of {size} bytes")))?;
            let chunk = bootstrap.chunk(nid, place)?;
            let blob = bootstrap.blobs().get(chunk.blob as usize);
            let blob = blob.ok_or_else(|| Error::bad_source(format!("a chunk names blob {}", chunk.blob)))?;
            let decoded = (size - position * chunk_size).min(chunk_size);
            let (key, stored) = match bootstrap.chunk_info(chunk.blob, chunk.index) {
                Some(record) => {
                    (Key::Digest(blob.digester, record.digest), u64::from(record.compressed_size.get()))
                }
                None => (Key::Place(blob.id.clone(), chunk.index.0), decoded),
            };
            self.chunks += 1;
            self.comp_size += stored;
            self.uncomp_size += decoded;
            self.padding_size += decoded.next_multiple_of(ALIGNMENT) - decoded;
            let class = decoded.div_ceil(ALIGNMENT).next_power_of_two().ilog2() as usize;
            self.chunk_sizes[class.min(CHUNK_CLASSES - 1)] += 1;
            let kind = if known.0.contains(&key) {
                [&mut self.ref_chunks, &mut self.ref_comp_size, &mut self.ref_uncomp_size]
            } else if own.insert(key) {
                [&mut self.own_chunks, &mut self.own_comp_size, &mut self.own_uncomp_size]
            } else {
                [&mut self.dedup_chunks, &mut self.dedup_comp_size, &mut self.dedup_uncomp_size]
            };
            for (sum, one) in kind.into_iter().zip([1, stored, decoded]) {
                *sum += one;
            }
        }
        Ok(())
    }
}
