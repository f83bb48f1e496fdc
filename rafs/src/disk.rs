//! An image as disks: where each byte of one comes from, without any of it being made.
//!
//! ```text
//! flat:   | bootstrap | 0 … | decoded blob 0 | 0 … | decoded blob 1 |      one disk (Linux 6.4 and later)
//! split:  | bootstrap |     | decoded blob 0 |     | decoded blob 1 |      one each (`-o device=…`)
//! ```
//!
//! A bootstrap is an EROFS file system whose files lie on other devices, which are the decoded spaces of its blobs in
//! the order of its device table; or all on its own device, at `mapped_blkaddr` (rafs/FORMAT.md).

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use storage::ids::ChunkIndex;
use storage::read::ReadSlice;

use crate::format::features::BlobFeatures;
use crate::fs::Rafs;
use crate::{Error, ErrorKind, Result};

/// Which disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Flat,
    /// The bootstrap alone.
    Metadata,
    /// The decoded space of the blob at this place of the blob table.
    Blob(u32),
}

/// Where a run of bytes comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes of the bootstrap.
    Metadata(Range<u64>),
    /// A piece of a chunk.
    Chunk(ReadSlice),
    /// So many zeros.
    Zeros(u64),
}

impl Piece {
    /// Its bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Metadata(range) => range.end - range.start,
            Self::Chunk(slice) => slice.len.into(),
            Self::Zeros(len) => *len,
        }
    }

    /// True if it has none, which none has that is part of an answer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The disks of an image.
#[derive(Debug)]
pub struct Disks {
    rafs: Arc<Rafs>,
    /// By blob: its chunks that the image uses, with the first byte of each, in the order of these. Made by whoever
    /// reads there first: the chunks of a blob may be many, and may be where they please.
    chunks: Vec<OnceLock<Vec<(u64, u32)>>>,
}

impl Disks {
    /// The disks of `rafs`.
    ///
    /// # Errors
    /// `Unsupported`: no kernel mounts the image: RAFS v5; or its data is in plain tars, which the kernel reads as they
    /// are.
    pub fn new(rafs: &Arc<Rafs>) -> Result<Self> {
        let unsupported = |why: &str| Err(Error::new(ErrorKind::Unsupported, why));
        let bootstrap = rafs.bootstrap();
        if bootstrap.summary().fs_version != 6 || bootstrap.bytes().is_none() {
            return unsupported("no kernel mounts RAFS v5; convert the image to RAFS v6");
        }
        if bootstrap.blobs().iter().any(|blob| blob.features.contains(BlobFeatures::TARFS)) {
            return unsupported("the image refers to plain tars; give the kernel these with its bootstrap");
        }
        if bootstrap.blobs().iter().any(|blob| blob.flat_offset.is_none()) {
            return unsupported("the image says of a blob not where it is on a disk");
        }
        let chunks = bootstrap.blobs().iter().map(|_| OnceLock::new()).collect();
        Ok(Self { rafs: Arc::clone(rafs), chunks })
    }

    /// The image.
    pub fn rafs(&self) -> &Arc<Rafs> {
        &self.rafs
    }

    /// Disks of a split image, in the order in which a kernel wants them.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        std::iter::once(Part::Metadata).chain((0..self.chunks.len() as u32).map(Part::Blob))
    }

    /// Bytes of a disk, whole blocks; a blob that is not there has none.
    pub fn size(&self, part: Part) -> u64 {
        let blobs = self.rafs.bootstrap().blobs();
        let metadata = self.metadata().len() as u64;
        let size = match part {
            Part::Metadata => metadata,
            Part::Blob(blob) => blobs.get(blob as usize).map_or(0, |blob| blob.decoded_size),
            Part::Flat => {
                let ends = blobs.iter().map(|blob| blob.flat_offset.unwrap_or(0) + blob.decoded_size);
                ends.fold(metadata, u64::max)
            }
        };
        size.next_multiple_of(self.rafs.bootstrap().summary().block_size.into())
    }

    /// The bootstrap.
    pub fn metadata(&self) -> &[u8] {
        self.rafs.bootstrap().bytes().unwrap_or_default()
    }

    /// Where bytes `range` of a disk come from, in order and without a gap.
    ///
    /// # Errors
    /// `Invalid`: they are not all on the disk. `Corrupt`: the context of a blob is bad.
    pub fn read(&self, part: Part, range: Range<u64>, pieces: &mut Vec<Piece>) -> Result<()> {
        let size = self.size(part);
        if range.start > range.end || range.end > size {
            return Err(Error::new(ErrorKind::Invalid, format!("bytes {range:?} of a disk of {size} bytes")));
        }
        match part {
            Part::Blob(blob) => self.read_blob(blob, range, pieces),
            Part::Metadata => {
                self.read_metadata(&range, pieces);
                Ok(())
            }
            Part::Flat => self.read_flat(range, pieces),
        }
    }

    /// The bootstrap may end inside a block.
    fn read_metadata(&self, range: &Range<u64>, pieces: &mut Vec<Piece>) {
        let end = range.end.min(self.metadata().len() as u64).max(range.start);
        push(pieces, Piece::Metadata(range.start..end));
        push(pieces, Piece::Zeros(range.end - end));
    }

    fn read_flat(&self, range: Range<u64>, pieces: &mut Vec<Piece>) -> Result<()> {
        let metadata = self.metadata().len() as u64;
        let mut places: Vec<(u64, u64, u32)> = (0..)
            .zip(self.rafs.bootstrap().blobs())
            .map(|(number, blob)| (blob.flat_offset.unwrap_or(0), blob.decoded_size, number))
            .filter(|(start, size, _)| *size > 0 && *start < range.end && start + size > range.start)
            .collect();
        places.sort_unstable();
        let mut at = range.start;
        if at < metadata {
            let end = range.end.min(metadata);
            push(pieces, Piece::Metadata(at..end));
            at = end;
        }
        for (start, size, number) in places {
            push(pieces, Piece::Zeros(start.saturating_sub(at).min(range.end - at)));
            let from = at.max(start);
            let to = range.end.min(start + size);
            if from < to {
                self.read_blob(number, from - start..to - start, pieces)?;
                at = to;
            }
        }
        push(pieces, Piece::Zeros(range.end - at));
        Ok(())
    }

    /// Chunks that the image does not use are zeros: nothing leads to them.
    fn read_blob(&self, blob: u32, range: Range<u64>, pieces: &mut Vec<Piece>) -> Result<()> {
        let chunks = self.chunks_of(blob)?;
        let first = chunks.partition_point(|(start, _)| *start <= range.start).saturating_sub(1);
        let mut at = range.start;
        for (start, index) in &chunks[first..] {
            if *start >= range.end {
                break;
            }
            let extent = self.rafs.chunk_extent(blob, ChunkIndex(*index))?;
            let end = start.saturating_add(extent.len.into()).min(range.end);
            if end <= at {
                continue;
            }
            push(pieces, Piece::Zeros(start.saturating_sub(at)));
            at = at.max(*start);
            // Both are inside the chunk.
            let (offset, len) = ((at - start) as u32, (end - at) as u32);
            push(pieces, Piece::Chunk(ReadSlice { blob, extent, offset, len }));
            at = end;
        }
        push(pieces, Piece::Zeros(range.end - at));
        Ok(())
    }

    fn chunks_of(&self, blob: u32) -> Result<&[(u64, u32)]> {
        let Some(place) = self.chunks.get(blob as usize) else { return Ok(&[]) };
        if let Some(known) = place.get() {
            return Ok(known);
        }
        let count = self.rafs.bootstrap().blobs()[blob as usize].chunk_count;
        let mut found = Vec::with_capacity(count as usize);
        for index in 0..count {
            match self.rafs.chunk_extent(blob, ChunkIndex(index)) {
                // What no file uses has no digest, and nobody is to see it.
                Ok(extent) if extent.digest.is_none() && !self.rafs.is_unverified() => {}
                Ok(extent) => found.push((extent.decoded_offset, index)),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        found.sort_unstable();
        Ok(place.get_or_init(|| found))
    }
}

/// Adds what has bytes.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if !piece.is_empty() {
        pieces.push(piece);
    }
}
