//! What a start of an image reads, in one blob of its own.
//!
//! The chunks of the files that are named move there in their order, so that one request after
//! another brings what is needed next. Other files that have one of these chunks, or an equal one of
//! another blob, use it there, too. All other chunks stay where they are.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rafs::format::features::{BlobFeatures, ImageFlags};
use rafs::format::limits::{MAX_BLOBS, MAX_IMAGE_CHUNKS};
use serde::Deserialize;
use storage::codec::Codec;
use storage::digest::Digest;
use zerocopy::byteorder::little_endian::U32;

use super::carry::{BlobKind, carry};
use super::{Rewritten, Source};
use crate::blob_writer::FinishedBlob;
use crate::content::{ChunkId, ChunkSource as _};
use crate::image::ImageData;
use crate::prefetch;
use crate::sink::BlobSink;
use crate::tree::Content;
use crate::{Error, ErrorKind, Result};

/// The one version of documents that is known.
const VERSION: &str = "v1";

/// Chunks that are looked at, four times the largest image: a list may name one again and again.
const MAX_LOOKS: u64 = 4 * MAX_IMAGE_CHUNKS;

/// Files, and which parts of them: `{"version": "v1", "files": [{"path": "/a", "ranges": [[0, 4096]]}]}`.
#[derive(Clone, Debug, Default)]
pub struct HotFiles(Vec<HotFile>);

#[derive(Clone, Debug, Deserialize)]
struct HotFile {
    path: String,
    /// Offset and size in bytes; none: all of it.
    #[serde(default)]
    ranges: Option<Vec<(u64, u64)>>,
}

#[derive(Deserialize)]
struct Document {
    version: String,
    #[serde(default)]
    files: Vec<HotFile>,
}

impl HotFiles {
    /// Reads a document. One of no bytes names no file.
    ///
    /// # Errors
    /// `Corrupt`: it is no such document. `Unsupported`: it has another version.
    pub fn parse(text: &[u8]) -> Result<Self> {
        if text.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let document: Document = serde_json::from_slice(text).map_err(|e| {
            Error::bad_source(
                r#"not {"version": "v1", "files": [{"path": …, "ranges": [[offset, size], …]}]}"#,
            )
            .with_source(e)
        })?;
        if document.version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("version {:?} of prefetch files: only {VERSION:?} is known", document.version),
            ));
        }
        Ok(Self(document.files))
    }

    /// True if no file is named.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An optimization under way: the new blob, then the bootstrap.
pub struct Optimization {
    source: Source,
    hot: Vec<ChunkId>,
    kind: BlobKind,
    is_written: bool,
}

impl Optimization {
    /// Finds the chunks of `files` in an image; `None` if there are none. A path that is not in the
    /// image is warned of and passed over; of a directory all files below are taken.
    ///
    /// # Errors
    /// `Unsupported`: data that is a plain tar; chunks without records. `Corrupt`: the bootstrap
    /// contradicts a context. `Limit`: there are 254 blobs already, or the list names the same chunks
    /// far too often.
    pub fn plan(data: ImageData, files: &HotFiles) -> Result<Option<Self>> {
        if data.rafs().bootstrap().summary().flags.contains(ImageFlags::TARFS_MODE) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the image's data is a plain tar in blocks of 512 bytes, beside which there can be no other blob",
            ));
        }
        let blobs = data.rafs().bootstrap().blobs().len();
        if blobs >= MAX_BLOBS {
            return Err(Error::limit(format!(
                "the image has {blobs} blobs and can have no other; make them fewer with `nydus-image compact`"
            )));
        }
        let mut source = Source::load(data)?;
        let hot = hot_chunks(&source, files)?;
        let hot = share(&mut source, hot);
        let Some(&first) = hot.first() else { return Ok(None) };
        let blob_of = |id: ChunkId| source.chunks.row(id).blob as usize;
        let mut kind = BlobKind::like(&source, blob_of(first));
        if kind.codec == Codec::Gzip {
            kind.codec = Codec::Zstd;
        }
        // What was encrypted is not stored in clear.
        kind.cipher = hot.iter().find_map(|&id| BlobKind::like(&source, blob_of(id)).cipher);
        Ok(Some(Self { source, hot, kind, is_written: false }))
    }

    /// Number of chunks that move.
    pub fn chunk_count(&self) -> usize {
        self.hot.len()
    }

    /// Writes the new blob; `progress` is told the decoded bytes as they are written.
    ///
    /// # Errors
    /// `Mismatch`, `Corrupt`, `Storage`: a chunk can not be read, or is damaged. `Io`: writing failed.
    pub fn write_blob(&mut self, sink: BlobSink, progress: &dyn Fn(u64)) -> Result<FinishedBlob> {
        let (mut blob, rows) = carry(&self.source, &self.hot, &self.kind, sink, progress)?;
        let features = blob.record.features.get() | BlobFeatures::IS_SEPARATED_WITH_PREFETCH_FILES.bits();
        blob.record.features = U32::new(features);
        self.source.add_blob(blob.record, self.hot.iter().copied().zip(rows));
        self.is_written = true;
        Ok(blob)
    }

    /// The new bootstrap: all blobs of the image, then the new one.
    ///
    /// # Errors
    /// `Invalid`: the new blob is not written yet. Those of the writer of bootstraps.
    pub fn finish(self) -> Result<Rewritten> {
        if !self.is_written {
            return Err(Error::invalid("the new blob is not written"));
        }
        let kept: Vec<usize> = (0..self.source.blob_count).collect();
        self.source.finish(&kept)
    }
}

/// The chunks of `files`, each once, in the order in which they are wanted first.
fn hot_chunks(source: &Source, files: &HotFiles) -> Result<Vec<ChunkId>> {
    let summary = source.bootstrap().summary();
    let chunk_size = u64::from(summary.chunk_size);
    let mut taken = vec![false; source.chunks.chunk_count()];
    let mut hot = Vec::new();
    let (mut others, mut looked_at) = (0u64, 0u64);
    for HotFile { path, ranges } in &files.0 {
        let Some(found) = source.tree.lookup(path.as_bytes()) else {
            tracing::warn!("{path:?} is not in the image: passed over");
            continue;
        };
        let whole = [(0, u64::MAX)];
        let ranges = ranges.as_deref().filter(|ranges| !ranges.is_empty()).unwrap_or(&whole);
        let inodes = match source.tree.inode(found).content {
            Content::Regular { .. } => vec![found],
            Content::Directory(_) => prefetch::below(&source.tree, &[found]),
            _ => {
                tracing::warn!("{path:?} is not a regular file: passed over");
                continue;
            }
        };
        for inode in inodes {
            let Content::Regular { file, .. } = source.tree.inode(inode).content else { continue };
            let chunks = source.chunks.file_chunks(file);
            for &(offset, size) in ranges {
                // A file has less than 2^32 chunks.
                let first = (offset / chunk_size).min(chunks.len() as u64) as usize;
                let end = offset.saturating_add(size).div_ceil(chunk_size);
                let end = if size == 0 { first } else { end.min(chunks.len() as u64) as usize };
                let wanted = &chunks[first..end.max(first)];
                looked_at += wanted.len() as u64;
                if looked_at > MAX_LOOKS {
                    return Err(Error::limit(format!(
                        "the files name more than {MAX_LOOKS} chunks, many of them again and again"
                    )));
                }
                for &id in wanted {
                    let blob = &source.bootstrap().blobs()[source.chunks.row(id).blob as usize];
                    if blob.digester != summary.digester {
                        others += 1;
                    } else if !std::mem::replace(&mut taken[id.0 as usize], true) {
                        hot.push(id);
                    }
                }
            }
        }
    }
    if others > 0 {
        tracing::warn!("{others} chunks stay where they are: the digests of their blobs are of another kind");
    }
    Ok(hot)
}

/// Lets all files use `hot` chunks in place of equal ones; answers those that are the first of their
/// content.
fn share(source: &mut Source, hot: Vec<ChunkId>) -> Vec<ChunkId> {
    let summary = source.bootstrap().summary();
    let chunks = &source.chunks;
    let content = |id: ChunkId| {
        let row = chunks.row(id);
        (row.digest, row.uncompressed_size)
    };
    let mut first: HashMap<(Digest, u32), ChunkId> = HashMap::with_capacity(hot.len());
    let mut distinct = Vec::with_capacity(hot.len());
    for id in hot {
        if let Entry::Vacant(entry) = first.entry(content(id)) {
            entry.insert(id);
            distinct.push(id);
        }
    }
    let blobs = source.data.rafs().bootstrap().blobs();
    let instead = |id: ChunkId| match first.get(&content(id)) {
        Some(&hot) if blobs[chunks.row(id).blob as usize].digester == summary.digester => hot,
        _ => id,
    };
    let instead: Vec<ChunkId> = (0..chunks.chunk_count() as u32).map(|id| instead(ChunkId(id))).collect();
    source.chunks.replace(&instead);
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_read_or_refused() {
        for text in ["", " \n", r#"{"version": "v1"}"#, r#"{"version": "v1", "files": []}"#] {
            assert!(HotFiles::parse(text.as_bytes()).unwrap().is_empty(), "{text:?}");
        }
        let text = r#"{"version": "v1", "files": [{"path": "/a"}, {"path": "/b", "ranges": [[1, 2]]}]}"#;
        let files = HotFiles::parse(text.as_bytes()).unwrap();
        assert_eq!(files.0[1].ranges, Some(vec![(1, 2)]));
        for (text, kind) in [
            (r#"{"version": "v2", "files": []}"#, ErrorKind::Unsupported),
            (r#"{"files": []}"#, ErrorKind::Corrupt),
            (r#"{"version": "v1", "files": [{"path": "/a", "ranges": [[-1, 2]]}]}"#, ErrorKind::Corrupt),
            ("/usr/bin/env\n", ErrorKind::Corrupt),
        ] {
            assert_eq!(HotFiles::parse(text.as_bytes()).unwrap_err().kind(), kind, "{text}");
        }
    }
}
