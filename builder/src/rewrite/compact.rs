//! Fewer and fuller blobs: those of which an image uses little, and small ones, become new blobs.
//!
//! - A blob is *sparse* if the image uses less of its chunk data than the ratio asked for, and *small*
//!   if what it uses is less than the size asked for. Sizes are those of chunks as they are stored.
//! - Sparse and small blobs come together, in the order of the blob table, each with the first of
//!   the new blobs where it fits; with others only if it is small itself and of their kind
//!   (compressor, digester, encrypted or not).
//! - A small blob that remains alone and is not sparse stays as it is. So does everything of a
//!   dictionary, of an original layer, and of prefetch files.
//! - A chunk that moves and is in another native blob too is stored once. One in a blob that stays is read
//!   before it stands for another: if that can not be done, the one that moves is kept.

use std::collections::HashSet;

use rafs::bootstrap::{Blob, Bootstrap, digester_code};
use rafs::format::features::BlobFeatures;
use rafs::format::limits::MAX_CHUNKS;
use storage::codec::Codec;
use storage::extent::Cipher;
use storage::ids::BlobId;

use super::carry::{BlobKind, carry};
use super::{Rewritten, Source};
use crate::blob_writer::FinishedBlob;
use crate::content::{ChunkId, ChunkSource as _};
use crate::image::ImageData;
use crate::sink::BlobSink;
use crate::{Error, ErrorKind, Result};

/// Blobs that are left as they are.
const FIXED: BlobFeatures = BlobFeatures::ZRAN
    .union(BlobFeatures::SEPARATE)
    .union(BlobFeatures::TARFS)
    .union(BlobFeatures::EXTERNAL)
    .union(BlobFeatures::IS_SEPARATED_WITH_PREFETCH_FILES);

/// Which blobs become new ones.
#[derive(Clone, Debug)]
pub struct CompactOptions {
    /// Percentage of a blob's chunk data below which it is sparse; 0: none is.
    pub min_used_ratio: u8,
    /// Bytes below which a blob is small.
    pub small: u64,
    /// Bytes of chunk data that small blobs may come to together.
    pub max: u64,
    /// Blobs of the chunk dictionary.
    pub dictionary: HashSet<BlobId>,
}

impl CompactOptions {
    fn may_move(&self, blob: &Blob) -> bool {
        !blob.features.intersects(FIXED) && blob.codec != Codec::Gzip && !self.dictionary.contains(&blob.id)
    }

    /// False if nothing would be done whatever is in the blobs. Needs none of them.
    pub fn may_change(&self, bootstrap: &dyn Bootstrap) -> bool {
        bootstrap.blobs().iter().any(|blob| self.may_move(blob))
    }
}

/// Blobs that become one.
#[derive(Debug)]
struct Group {
    blobs: Vec<usize>,
    /// Stored bytes and number of chunks that are used.
    size: u64,
    chunks: u64,
    /// Whether more may come.
    open: bool,
    /// Whether it is made even of a single blob.
    wanted: bool,
    key: (Codec, u32, bool),
}

/// What the image uses of a blob.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    size: u64,
    chunks: u64,
}

/// A compaction under way: first every new blob, then the bootstrap.
pub struct Compaction {
    source: Source,
    /// First blob of each new one, and its chunks in order.
    new: Vec<(usize, Vec<ChunkId>)>,
    done: usize,
}

impl Compaction {
    /// Decides what becomes of the blobs of an image; `None` if they are to stay as they are.
    ///
    /// # Errors
    /// `Unsupported`: chunks without records. `Rafs`, `Corrupt`: a context contradicts the bootstrap.
    /// `Cancelled`.
    pub fn plan(data: ImageData, options: &CompactOptions) -> Result<Option<Self>> {
        if !options.may_change(&**data.rafs().bootstrap()) {
            return Ok(None);
        }
        let mut source = Source::load(data)?;
        let mut used = vec![Used::default(); source.blob_count];
        for id in (0..source.chunks.chunk_count() as u32).map(ChunkId) {
            let (blob, extent) = source.extent(id)?;
            let used = &mut used[blob as usize];
            used.size += extent.stored_share();
            used.chunks += 1;
        }
        let groups = groups(source.bootstrap().blobs(), &used, options);
        if groups.is_empty() {
            return Ok(None);
        }
        let mut group_of = vec![None; source.blob_count];
        for (number, group) in groups.iter().enumerate() {
            for &blob in &group.blobs {
                group_of[blob] = Some(number);
            }
        }
        let moving = share(&mut source, &group_of)?;
        let mut new: Vec<(usize, Vec<ChunkId>)> =
            groups.iter().map(|group| (group.blobs[0], Vec::new())).collect();
        for id in moving {
            if let Some(number) = group_of[source.chunks.row(id).blob as usize] {
                new[number].1.push(id);
            }
        }
        // What nothing uses, or another blob has too, needs no new blob.
        new.retain(|(_, chunks)| !chunks.is_empty());
        Ok(Some(Self { source, new, done: 0 }))
    }

    /// Number of new blobs.
    pub fn blob_count(&self) -> usize {
        self.new.len()
    }

    /// Writes the next new blob; `progress` is told the decoded bytes as they are written.
    ///
    /// # Errors
    /// `Invalid`: there is none. `Mismatch`, `Corrupt`, `Storage`: a chunk can not be read, or is
    /// damaged. `Io`: writing failed.
    pub fn write_blob(&mut self, sink: BlobSink, progress: &dyn Fn(u64)) -> Result<FinishedBlob> {
        let next = self.new.get(self.done).ok_or_else(|| Error::invalid("all new blobs are written"))?;
        let kind = BlobKind::like(&self.source, next.0);
        let (blob, rows) = carry(&self.source, &next.1, &kind, sink, progress)?;
        let moved = next.1.iter().copied().zip(rows);
        self.source.add_blob(blob.record, moved);
        self.done += 1;
        Ok(blob)
    }

    /// The new bootstrap.
    ///
    /// # Errors
    /// `Invalid`: a new blob is not written yet. Those of the writer of bootstraps.
    pub fn finish(self) -> Result<Rewritten> {
        if self.done < self.new.len() {
            return Err(Error::invalid("not all new blobs are written"));
        }
        self.source.finish(&[])
    }
}

/// Which blobs become one.
fn groups(blobs: &[Blob], used: &[Used], options: &CompactOptions) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (number, (blob, used)) in blobs.iter().zip(used).enumerate() {
        if !options.may_move(blob) {
            continue;
        }
        // Sizes are below 2^40, and what is used of a blob by the shares of its chunks can be more
        // than the blob if those overlap.
        let sparse = used.size.saturating_mul(100)
            < blob.data_size.saturating_mul(options.min_used_ratio.into())
            || used.chunks == 0;
        let small = used.size < options.small;
        if !sparse && !small {
            continue;
        }
        let key = (blob.codec, digester_code(blob.digester), blob.cipher != Cipher::None);
        let fits = |group: &&mut Group| {
            group.open
                && group.key == key
                && group.size.saturating_add(used.size) <= options.max
                && group.chunks + used.chunks <= MAX_CHUNKS.into()
        };
        match groups.iter_mut().find(fits).filter(|_| small) {
            Some(group) => {
                group.blobs.push(number);
                group.size += used.size;
                group.chunks += used.chunks;
                group.wanted = true;
            }
            None => groups.push(Group {
                blobs: vec![number],
                size: used.size,
                chunks: used.chunks,
                open: small,
                wanted: sparse,
                key,
            }),
        }
    }
    groups.retain(|group| group.wanted);
    groups
}

/// Lets files use one of equal chunks if the others would move; answers the chunks that do move, in
/// the order of their blobs and numbers. `group_of`: the new blob of each blob that has one.
fn share(source: &mut Source, group_of: &[Option<usize>]) -> Result<Vec<ChunkId>> {
    let chunks = &source.chunks;
    let blobs = source.data.rafs().bootstrap().blobs();
    let count = chunks.chunk_count() as u32;
    let mut sorted: Vec<ChunkId> = (0..count).map(ChunkId).collect();
    let blob_of = |id: ChunkId| chunks.row(id).blob as usize;
    let moves = |id: ChunkId| group_of[blob_of(id)].is_some();
    // Data of original layers takes longer to read, so nothing is led there.
    let eligible = |id: ChunkId| !blobs[blob_of(id)].features.intersects(FIXED);
    let content = |id: ChunkId| {
        let row = chunks.row(id);
        let digester = digester_code(blobs[row.blob as usize].digester);
        (digester, row.digest.0, row.uncompressed_size)
    };
    sorted.sort_unstable_by_key(|&id| {
        let row = chunks.row(id);
        (content(id), !eligible(id), moves(id), row.blob, row.index)
    });
    let mut instead: Vec<ChunkId> = (0..count).map(ChunkId).collect();
    let mut is_verified = vec![false; count as usize];
    let mut is_broken = vec![false; source.blob_count];
    loop {
        let mut unread = Vec::new();
        for equal in sorted.chunk_by(|&a, &b| content(a) == content(b)) {
            // What moves is eligible and never broken, so what is found is eligible, too.
            if !equal.iter().any(|&id| moves(id)) {
                continue;
            }
            let Some(&first) = equal.iter().find(|&&id| !is_broken[blob_of(id)]) else { continue };
            if !moves(first) && !std::mem::replace(&mut is_verified[first.0 as usize], true) {
                unread.push(first);
            }
            for &id in equal.iter().filter(|&&id| moves(id)) {
                instead[id.0 as usize] = first;
            }
        }
        if unread.is_empty() {
            break;
        }
        unread.sort_unstable_by_key(|&id| (chunks.row(id).blob, chunks.row(id).index));
        for of_blob in unread.chunk_by(|&a, &b| blob_of(a) == blob_of(b)) {
            is_broken[blob_of(of_blob[0])] = !are_readable(source, of_blob)?;
        }
    }
    let mut moving: Vec<ChunkId> = sorted;
    moving.retain(|&id| instead[id.0 as usize] == id && moves(id));
    moving.sort_unstable_by_key(|&id| (chunks.row(id).blob, chunks.row(id).index));
    source.chunks.replace(&instead);
    Ok(moving)
}

/// Reads chunks of a blob that stays.
///
/// # Errors
/// `Cancelled`.
fn are_readable(source: &Source, chunks: &[ChunkId]) -> Result<bool> {
    let mut stream = source.data.stream(chunks.iter().map(|&id| source.extent(id)));
    for _ in chunks {
        match stream.next_fetched() {
            Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
            Ok(Some(_)) => {}
            failed => {
                let why = failed.err().map_or_else(|| "a chunk is missing".to_owned(), |e| e.to_string());
                let blob = &source.bootstrap().blobs()[source.chunks.row(chunks[0]).blob as usize];
                tracing::warn!("blob {} stands for no chunk that moves: {why}", blob.id);
                return Ok(false);
            }
        }
    }
    Ok(true)
}
