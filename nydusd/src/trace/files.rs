//! A trace as ranges of files: what people read, and what `nydus-image optimize` reads.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use rafs::bootstrap::{Bootstrap, DirEntry, FileType, Nid, Step, Walk};
use serde::Serialize;

use super::{Chunk, Trace};

/// The document of `nydus-image optimize`.
#[derive(Debug, Serialize)]
pub struct Optimize {
    version: &'static str,
    files: Vec<FileRanges>,
}

/// One file and which parts of it are wanted, in order.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct FileRanges {
    path: String,
    /// Offset and size in bytes.
    ranges: Vec<(u64, u64)>,
}

impl Optimize {
    /// The files that hold the chunks of `trace`, most wanted first. A chunk that several files
    /// share is told of the one that has most in it, and least beside it; a file with several names by its
    /// first one. A name that is not UTF-8 has no place in JSON, so its file is left out.
    ///
    /// # Errors
    /// Those of a damaged bootstrap.
    pub fn new(trace: &Trace, bootstrap: &dyn Bootstrap) -> rafs::Result<Self> {
        let mut places: HashMap<Chunk, usize> =
            trace.entries.iter().enumerate().map(|(place, entry)| (entry.chunk, place)).collect();
        let mut candidates = Vec::new();
        let mut seen = HashSet::new();
        let mut walk = Walk::new(bootstrap, bootstrap.root());
        while let Some(step) = walk.step()? {
            let Step::Leaf(DirEntry { nid, file_type: FileType::Regular, .. }) = step else { continue };
            let Ok(path) = std::str::from_utf8(walk.path()) else { continue };
            if !seen.insert(nid) {
                continue;
            }
            let (mut count, mut other) = (0usize, 0usize);
            each_chunk(bootstrap, nid, &mut |chunk, _, _| {
                *(if places.contains_key(&chunk) { &mut count } else { &mut other }) += 1;
            })?;
            if count > 0 {
                candidates.push(((Reverse(count), other), nid, format!("/{path}")));
            }
        }
        candidates.sort_by_key(|(rank, ..)| *rank);
        let mut found: Vec<(usize, FileRanges)> = Vec::new();
        for (_, nid, path) in candidates {
            let mut parts = Vec::new();
            each_chunk(bootstrap, nid, &mut |chunk, offset, size| {
                if let Some(place) = places.remove(&chunk) {
                    parts.push((place, offset, size));
                }
            })?;
            parts.sort_unstable();
            if let Some((first, _, _)) = parts.first() {
                found.push((*first, FileRanges { path, ranges: ranges(&parts) }));
            }
        }
        found.sort_by_key(|(first, _)| *first);
        Ok(Self { version: "v1", files: found.into_iter().map(|(_, file)| file).collect() })
    }

    /// The files.
    pub fn files(&self) -> &[FileRanges] {
        &self.files
    }
}

impl FileRanges {
    /// Absolute path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Offset and size in bytes, most wanted first.
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }
}

/// Visits the chunks of file `nid` with their offset and size in it.
fn each_chunk(
    bootstrap: &dyn Bootstrap,
    nid: Nid,
    visit: &mut dyn FnMut(Chunk, u64, u64),
) -> rafs::Result<()> {
    let size = bootstrap.attr(nid)?.size;
    let chunk_size = u64::from(bootstrap.summary().chunk_size);
    // The format gives a file less than 2^32 chunks.
    for position in 0..u32::try_from(size.div_ceil(chunk_size)).unwrap_or(u32::MAX) {
        let chunk = bootstrap.chunk(nid, position)?;
        let offset = u64::from(position) * chunk_size;
        visit(Chunk { blob: chunk.blob, index: chunk.index.0 }, offset, chunk_size.min(size - offset));
    }
    Ok(())
}

/// Joins parts that follow each other both in the trace and in the file.
fn ranges(parts: &[(usize, u64, u64)]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &(_, offset, size) in parts {
        match ranges.last_mut() {
            Some((start, len)) if *start + *len == offset => *len += size,
            _ => ranges.push((offset, size)),
        }
    }
    ranges
}
