//! What a start of an image reads, in one blob of its own.
//!
//! The chunks of the files that are named move there in their order, so that one request after
//! another brings what is needed next. Other files that have one of these chunks, or an equal one of
//! another blob, use it there, too. All other chunks stay where they are.
//!
//! An image has one such blob at most: older ones lose the mark, and leave the image if nothing of them is
//! used any more. So does a blob of the same bytes: the new one takes its place.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rafs::bootstrap::Blob;
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
use crate::layout;
use crate::progress;
use crate::sink::BlobSink;
use crate::tree::{Content, InodeId};
use crate::{Error, ErrorKind, Result};

/// The one version of documents that is known.
const VERSION: &str = "v1";

/// What marks the blob.
const MARK: BlobFeatures = BlobFeatures::IS_SEPARATED_WITH_PREFETCH_FILES;

/// Files, ranges and chunks that are looked at, four times the chunks of the largest image: a list may name one
/// again and again.
const MAX_LOOKS: u64 = 4 * MAX_IMAGE_CHUNKS;

/// How many of them pass before somebody is asked whether to go on: some milliseconds.
const LOOKS_AT_ONCE: u64 = 1 << 16;

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
    /// Blobs of the image of which chunks stay in use.
    used: Vec<bool>,
    /// Those that the new bootstrap lists before the new blob.
    kept: Vec<usize>,
    is_written: bool,
}

impl Optimization {
    /// Finds the chunks of `files` in an image; `None` if there are none. A path that is not in the
    /// image is warned of and passed over; of a directory all files below are taken.
    ///
    /// # Errors
    /// `Unsupported`: data that is a plain tar; chunks without records. `Corrupt`: the bootstrap
    /// contradicts a context. `Limit`: there are 254 blobs already, or the list names the same chunks
    /// far too often. `Cancelled`.
    pub fn plan(data: ImageData, files: &HotFiles) -> Result<Option<Self>> {
        if data.rafs().bootstrap().summary().flags.contains(ImageFlags::TARFS_MODE) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the image's data is a plain tar in blocks of 512 bytes, beside which there can be no other blob",
            ));
        }
        let mut source = Source::load(data)?;
        let hot = hot_chunks(&source, files)?;
        let hot = share(&mut source, hot);
        if hot.is_empty() {
            return Ok(None);
        }
        let used = blobs_without(&source, &hot);
        let is_marked = |blob: usize| source.bootstrap().blobs()[blob].features.contains(MARK);
        let kept: Vec<usize> = (0..source.blob_count).filter(|&n| used[n] || !is_marked(n)).collect();
        if kept.len() >= MAX_BLOBS {
            return Err(Error::limit(format!(
                "the image has {} blobs and can have no other; make them fewer with `nydus-image compact`",
                kept.len()
            )));
        }
        let kind = kind(&source, &hot);
        Ok(Some(Self { source, hot, kind, used, kept, is_written: false }))
    }

    /// Number of chunks that move.
    pub fn chunk_count(&self) -> usize {
        self.hot.len()
    }

    /// Writes the new blob; `progress` is told the decoded bytes as they are written.
    ///
    /// # Errors
    /// `Mismatch`, `Corrupt`, `Storage`: a chunk can not be read, or is damaged. `Io`: writing failed.
    /// `Inconsistent`: a blob of the same bytes is in use with other chunks.
    pub fn write_blob(&mut self, sink: BlobSink, progress: &dyn Fn(u64)) -> Result<FinishedBlob> {
        let (mut blob, rows) = carry(&self.source, &self.hot, &self.kind, sink, progress)?;
        let known = &self.source.chunks.blobs[..self.source.blob_count];
        if let Some(same) = known.iter().position(|record| record.blob_id == blob.record.blob_id) {
            if self.used[same] {
                return Err(Error::new(
                    ErrorKind::Inconsistent,
                    format!(
                        "the new blob has the bytes of blob {}, of which the image uses other chunks; name a file more",
                        blob.id
                    ),
                ));
            }
            self.kept.retain(|&n| n != same);
        }
        blob.record.features = U32::new(blob.record.features.get() | MARK.bits());
        self.source.add_blob(blob.record, self.hot.iter().copied().zip(rows));
        self.is_written = true;
        Ok(blob)
    }

    /// The new bootstrap: the blobs of the image that are kept, then the new one.
    ///
    /// # Errors
    /// `Invalid`: the new blob is not written yet. Those of the writer of bootstraps.
    pub fn finish(mut self) -> Result<Rewritten> {
        if !self.is_written {
            return Err(Error::invalid("the new blob is not written"));
        }
        for &blob in &self.kept {
            let record = &mut self.source.chunks.blobs[blob];
            record.features = U32::new(record.features.get() & !MARK.bits());
        }
        self.source.finish(&self.kept)
    }
}

/// What the new blob is like: as the image says of its blobs, but for original layers.
fn kind(source: &Source, hot: &[ChunkId]) -> BlobKind {
    let summary = source.bootstrap().summary();
    let mut is_hot = vec![false; source.blob_count];
    for &id in hot {
        is_hot[source.chunks.row(id).blob as usize] = true;
    }
    let blobs = source.bootstrap().blobs().iter().zip(&is_hot).filter(|&(_, &is_hot)| is_hot);
    let blobs: Vec<&Blob> = blobs.map(|(blob, _)| blob).collect();
    let native = || blobs.iter().filter(|blob| !blob.features.contains(BlobFeatures::SEPARATE));
    let codec = match summary.codec {
        Codec::Gzip => Codec::Zstd,
        // Whoever stores chunks as they are wants that; whoever refers to a plain tar need not.
        Codec::None => match native().map(|blob| blob.codec).find(|&codec| codec != Codec::None) {
            Some(codec) => codec,
            None if native().next().is_some() => Codec::None,
            None => Codec::Zstd,
        },
        codec => codec,
    };
    // What was encrypted is not stored in clear.
    let cipher = (0..source.blob_count).filter(|&n| is_hot[n]).find_map(|n| BlobKind::like(source, n).cipher);
    BlobKind { codec, digester: summary.digester, cipher }
}

/// Which blobs of the image are in use by files without `hot`.
fn blobs_without(source: &Source, hot: &[ChunkId]) -> Vec<bool> {
    let mut is_hot = vec![false; source.chunks.chunk_count()];
    for id in hot {
        is_hot[id.0 as usize] = true;
    }
    let mut used = vec![false; source.blob_count];
    for &id in source.file_chunks().iter().filter(|id| !is_hot[id.0 as usize]) {
        used[source.chunks.row(id).blob as usize] = true;
    }
    used
}

/// The chunks of `files`, each once, in the order in which they are wanted first.
fn hot_chunks(source: &Source, files: &HotFiles) -> Result<Vec<ChunkId>> {
    let mut gathering = Gathering::new(source, MAX_LOOKS);
    for HotFile { path, ranges } in &files.0 {
        let Some(found) = source.tree.lookup(path.as_bytes()) else {
            tracing::warn!("{path:?} is not in the image: passed over");
            continue;
        };
        let ranges = ranges.as_deref().filter(|ranges| !ranges.is_empty());
        match source.tree.inode(found).content {
            Content::Regular { .. } | Content::Directory(_) => gathering.take(found, ranges)?,
            _ => tracing::warn!("{path:?} is not a regular file: passed over"),
        }
    }
    if gathering.others > 0 {
        tracing::warn!(
            "{} chunks stay where they are: the digests of their blobs are of another kind",
            gathering.others
        );
    }
    Ok(gathering.hot)
}

/// What a list has named so far.
struct Gathering<'a> {
    source: &'a Source,
    is_taken: Vec<bool>,
    /// Files and directories of which nothing is left to take.
    is_whole: Vec<bool>,
    hot: Vec<ChunkId>,
    /// Chunks that can not move.
    others: u64,
    looked_at: u64,
    max_looks: u64,
}

impl<'a> Gathering<'a> {
    fn new(source: &'a Source, max_looks: u64) -> Self {
        Self {
            source,
            is_taken: vec![false; source.chunks.chunk_count()],
            is_whole: vec![false; source.tree.inode_count()],
            hot: Vec::new(),
            others: 0,
            looked_at: 0,
            max_looks,
        }
    }

    /// Takes what `ranges` touch, or all, of a file or of all files below a directory.
    fn take(&mut self, start: InodeId, ranges: Option<&[(u64, u64)]>) -> Result<()> {
        let source = self.source;
        if self.is_whole[start.0 as usize] {
            return self.look(1);
        }
        layout::in_number_order_from(&source.tree, start, |id| {
            self.look(1)?;
            if self.is_whole[id.0 as usize] {
                return Ok(());
            }
            if let Content::Regular { file, .. } = source.tree.inode(id).content {
                self.take_file(source.chunks.file_chunks(file), ranges)?;
            }
            self.is_whole[id.0 as usize] = ranges.is_none();
            Ok(())
        })
    }

    fn take_file(&mut self, chunks: &[ChunkId], ranges: Option<&[(u64, u64)]>) -> Result<()> {
        let chunk_size = u64::from(self.source.bootstrap().summary().chunk_size);
        for &(offset, size) in ranges.unwrap_or(&[(0, u64::MAX)]) {
            // A file has less than 2^32 chunks.
            let first = (offset / chunk_size).min(chunks.len() as u64) as usize;
            let end = offset.saturating_add(size).div_ceil(chunk_size);
            let end = if size == 0 { first } else { end.min(chunks.len() as u64) as usize };
            let wanted = &chunks[first..end.max(first)];
            self.look(1 + wanted.len() as u64)?;
            for &id in wanted {
                self.take_chunk(id);
            }
        }
        Ok(())
    }

    fn take_chunk(&mut self, id: ChunkId) {
        if std::mem::replace(&mut self.is_taken[id.0 as usize], true) {
            return;
        }
        let bootstrap = self.source.bootstrap();
        let blob = &bootstrap.blobs()[self.source.chunks.row(id).blob as usize];
        if blob.digester == bootstrap.summary().digester {
            self.hot.push(id);
        } else {
            self.others += 1;
        }
    }

    /// Counts work that a list costs.
    fn look(&mut self, count: u64) -> Result<()> {
        let before = self.looked_at;
        self.looked_at += count;
        if self.looked_at > self.max_looks {
            return Err(Error::limit(format!(
                "the list asks for more than {} files and chunks, many of them again and again",
                self.max_looks
            )));
        }
        if before / LOOKS_AT_ONCE != self.looked_at / LOOKS_AT_ONCE {
            progress::check(self.source.data.cancel())?;
        }
        Ok(())
    }
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
    use std::path::Path;

    use storage::backend::localfs::LocalFs;
    use storage::engine::{Engine, EngineConfig};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::image::{self, DataOptions};

    /// A tree of some files; its data is nowhere.
    fn source(cancel: CancellationToken) -> Source {
        let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/none-4k/image.boot");
        let nowhere = LocalFs::new(Some("/nonexistent".into()), Vec::new(), None).unwrap();
        let options = DataOptions { cancel, ..DataOptions::default() };
        let engine = Engine::new(EngineConfig::default()).unwrap();
        let bootstrap = image::open(&boot).unwrap().bootstrap;
        Source::load(ImageData::open(engine, bootstrap, &nowhere, options).unwrap()).unwrap()
    }

    #[test]
    fn what_is_named_again_costs_no_walk() {
        let source = source(CancellationToken::new());
        let root = source.tree.root();
        let mut gathering = Gathering::new(&source, u64::MAX);
        gathering.take(root, None).unwrap();
        let once = gathering.looked_at;
        let inodes = source.tree.inode_count() as u64;
        assert!(once >= inodes, "{once} looks at {inodes} inodes");
        let chunks = gathering.hot.clone();
        assert!(!chunks.is_empty());
        for ranges in [None, Some(&[(0, 1)][..])] {
            gathering.take(root, ranges).unwrap();
        }
        assert_eq!((gathering.looked_at, gathering.hot), (once + 2, chunks));

        // Ranges of all files below are looked at each time, so there is an end to it.
        let mut gathering = Gathering::new(&source, 10 * inodes);
        let mut take = || gathering.take(root, Some(&[(1 << 50, 1)]));
        assert!((0..4).all(|_| take().is_ok()));
        let refused = (0..10).find_map(|_| take().err()).unwrap();
        assert_eq!(refused.kind(), ErrorKind::Limit);
        let many = vec![(1 << 50, 1); 1 << 14];
        let refused = Gathering::new(&source, 10 * inodes).take(root, Some(&many)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Limit, "ranges beyond the files");
    }

    #[test]
    fn long_lists_can_be_interrupted() {
        let cancel = CancellationToken::new();
        let source = source(cancel.clone());
        let again = || HotFile { path: "/".into(), ranges: None };
        let files = HotFiles((0..2 * LOOKS_AT_ONCE).map(|_| again()).collect());
        assert!(!hot_chunks(&source, &files).unwrap().is_empty());
        cancel.cancel();
        assert_eq!(hot_chunks(&source, &files).unwrap_err().kind(), ErrorKind::Cancelled);
    }

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
