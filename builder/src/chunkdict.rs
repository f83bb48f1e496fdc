//! Chunks that several images have, as an image of their own: a dictionary to build others with.
//!
//! A chunk is worth being in it if two images or versions have it. The dictionary stores no data:
//! it names the blobs that have its chunks. Of several blobs that have a chunk the one with most
//! shared bytes is taken, so that few blobs serve many chunks.
//!
//! Its tree has a directory for each blob, named by the blob's id, and in that a file for each
//! chunk, named by the chunk's number. So it is an ordinary bootstrap that can be checked,
//! merged and mounted like any other.

use std::collections::BTreeMap;
use std::sync::Arc;

use rafs::bootstrap::{Bootstrap, Buffer, digester_code};
use rafs::format::blob_table::BlobRecord;
use rafs::format::features::{BlobFeatures, ImageFlags};
use rafs::format::limits::MAX_BLOBS;
use storage::codec::Codec;
use zerocopy::byteorder::little_endian::U32;

use crate::bootstrap_v5;
use crate::bootstrap_writer::{self, Image};
use crate::content::{ChunkId, ChunkRow, ChunkSource};
use crate::load::LoadedChunks;
use crate::merge::{carried_records, consistent, shown_id};
use crate::root::{RootOptions, check_written, image_root};
use crate::tree::{Content, FileId, Inode, LayerIndex, Metadata, Tree};
use crate::{Error, ErrorKind, Result};

/// Blobs of a dictionary: an image built with it has room for as many of its own.
const MAX_DICTIONARY_BLOBS: usize = MAX_BLOBS / 2;

/// Blobs that are no good for a dictionary: every image built with it would get the key of an
/// encrypted one, and data of original layers takes longer to read.
const LEFT_OUT: BlobFeatures = BlobFeatures::ENCRYPTED
    .union(BlobFeatures::ZRAN)
    .union(BlobFeatures::SEPARATE)
    .union(BlobFeatures::TARFS)
    .union(BlobFeatures::EXTERNAL);

/// A bootstrap that a dictionary is made from.
pub struct DictionarySource {
    /// What to call it in messages.
    pub name: String,
    /// Image and version. Sources with the same count as one.
    pub version: String,
    /// The opened bootstrap.
    pub bootstrap: Arc<dyn Bootstrap>,
}

/// A blob of a dictionary.
#[derive(Clone, Debug)]
pub struct DictionaryBlob {
    /// Its name.
    pub id: String,
    /// Chunks of it that are in the dictionary.
    pub chunks: u64,
    /// Their decoded bytes.
    pub bytes: u64,
}

/// A dictionary.
#[derive(Debug)]
pub struct Dictionary {
    /// The bootstrap.
    pub bootstrap: Buffer,
    /// Its blobs in table order; empty if the images have nothing in common.
    pub blobs: Vec<DictionaryBlob>,
    /// Version of the format, that of all sources.
    pub fs_version: u32,
    /// Default compressor, that of the first source.
    pub codec: Codec,
    /// Shared chunks that are left out, because too many blobs would be needed for all.
    pub dropped: u64,
}

/// Makes a dictionary of what `sources` have in common.
///
/// # Errors
/// `Invalid`: no source. `Inconsistent`: version, chunk size, digester or owners' meaning differ.
/// `Unsupported`: plain tars, whose blocks are others. Those of [`LoadedChunks::load`].
pub fn generate(sources: &[DictionarySource]) -> Result<Dictionary> {
    let first = sources.first().ok_or_else(|| Error::invalid("no image to make a dictionary from"))?;
    let summary = first.bootstrap.summary();
    if summary.flags.contains(ImageFlags::TARFS_MODE) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: images over plain tars have no chunks that others can use", first.name),
        ));
    }
    let mut chunks = LoadedChunks::default();
    for source in sources {
        consistent((&first.name, &*first.bootstrap), (&source.name, &*source.bootstrap))?;
        let other = source.bootstrap.summary().digester;
        if other != summary.digester {
            return Err(Error::new(
                ErrorKind::Inconsistent,
                format!(
                    "{} has {} digests, {} {other}: they have no chunk in common",
                    first.name, summary.digester, source.name
                ),
            ));
        }
        chunks
            .load(&*source.bootstrap, &carried_records(&*source.bootstrap))
            .map_err(|e| e.context(format!("read {}", source.name)))?;
    }
    let (rows, dropped) = choose(&chunks, sources);
    let rows = Rows { files: (0..rows.len() as u32).map(ChunkId).collect(), rows };
    let tree = tree(&rows, &chunks.blobs)?;
    for record in &mut chunks.blobs {
        record.features = U32::new(record.features.get() | BlobFeatures::IS_CHUNKDICT_GENERATED.bits());
    }
    let explicit_ids = summary.flags.contains(ImageFlags::EXPLICIT_UID_GID);
    let write = if summary.fs_version == 5 { bootstrap_v5::write } else { bootstrap_writer::write };
    let written = write(&Image {
        tree: &tree,
        chunks: &rows,
        blobs: &chunks.blobs,
        chunk_size: summary.chunk_size,
        codec: summary.codec,
        digester: summary.digester,
        explicit_ids,
        tarfs: false,
        force_xattr_flag: false,
        kept: &[],
        prefetch: &[],
        prefetch_sizes: &[],
    })?;
    let options = RootOptions { digester: summary.digester, chunk_size: summary.chunk_size, explicit_ids };
    check_written(&written.bytes, Some(image_root(&tree, &rows, options)?))?;
    let mut blobs: Vec<DictionaryBlob> = written
        .blobs
        .iter()
        .map(|&blob| DictionaryBlob { id: shown_id(&chunks.blobs[blob]), chunks: 0, bytes: 0 })
        .collect();
    for row in &rows.rows {
        if let Some(place) = written.blobs.iter().position(|&blob| blob == row.blob as usize) {
            blobs[place].chunks += 1;
            blobs[place].bytes += u64::from(row.uncompressed_size);
        }
    }
    Ok(Dictionary {
        bootstrap: written.bytes,
        blobs,
        fs_version: summary.fs_version,
        codec: summary.codec,
        dropped,
    })
}

/// The chunks of the dictionary, and the number of those that it has no blob for.
fn choose(chunks: &LoadedChunks, sources: &[DictionarySource]) -> (Vec<ChunkRow>, u64) {
    let content = |id: ChunkId| {
        let row = chunks.row(id);
        let digester = chunks.blobs[row.blob as usize].digest_algo.get();
        (digester, row.digest.0, row.uncompressed_size)
    };
    let mut sorted: Vec<ChunkId> = (0..chunks.chunk_count() as u32).map(ChunkId).collect();
    sorted.sort_unstable_by_key(|&id| (content(id), id));
    let versions = versions(chunks, sources, &sorted, content);
    let digester = digester_code(sources[0].bootstrap.summary().digester);
    let usable = |id: &ChunkId| {
        let record = &chunks.blobs[chunks.row(*id).blob as usize];
        let features = BlobFeatures::from_bits_retain(record.features.get());
        !features.intersects(LEFT_OUT) && record.digest_algo.get() == digester
    };
    let shared: Vec<&[ChunkId]> = sorted
        .chunk_by(|&a, &b| content(a) == content(b))
        .zip(versions)
        .filter(|(equal, versions)| *versions > 1 && equal.iter().any(usable))
        .map(|(equal, _)| equal)
        .collect();
    let mut bytes = vec![0u64; chunks.blobs.len()];
    for row in shared.iter().flat_map(|equal| equal.iter()).filter(|id| usable(id)).map(|&id| chunks.row(id))
    {
        bytes[row.blob as usize] += u64::from(row.uncompressed_size);
    }
    let mut best: Vec<usize> = (0..bytes.len()).collect();
    best.sort_by_key(|&blob| (std::cmp::Reverse(bytes[blob]), chunks.blobs[blob].blob_id));
    let mut rank = vec![usize::MAX; bytes.len()];
    for (place, blob) in best.into_iter().take(MAX_DICTIONARY_BLOBS).enumerate() {
        rank[blob] = place;
    }
    let mut dropped = 0;
    let mut rows = Vec::new();
    for equal in shared {
        let rank = |row: &ChunkRow| rank[row.blob as usize];
        let places = equal.iter().filter(|id| usable(id)).map(|&id| chunks.row(id));
        match places.filter(|row| rank(row) != usize::MAX).min_by_key(|row| (rank(row), row.index)) {
            Some(row) => rows.push(row),
            None => dropped += 1,
        }
    }
    (rows, dropped)
}

/// How many versions have each distinct chunk, in the order of `sorted`: 0, 1, or 2 for more.
fn versions<K: PartialEq>(
    chunks: &LoadedChunks,
    sources: &[DictionarySource],
    sorted: &[ChunkId],
    content: impl Fn(ChunkId) -> K,
) -> Vec<u8> {
    let mut number_of = vec![0u32; sorted.len()];
    let mut count = 0;
    for equal in sorted.chunk_by(|&a, &b| content(a) == content(b)) {
        equal.iter().for_each(|id| number_of[id.0 as usize] = count);
        count += 1;
    }
    let mut by_version: BTreeMap<&str, Vec<LayerIndex>> = BTreeMap::new();
    for (layer, source) in (0u16..).zip(sources) {
        by_version.entry(&source.version).or_default().push(LayerIndex(layer));
    }
    let mut counts = vec![0u8; count as usize];
    // The last version, from 1, that had the chunk.
    let mut last = vec![0u32; count as usize];
    for (version, layers) in (1..).zip(by_version.into_values()) {
        for &id in layers.into_iter().flat_map(|layer| chunks.layer_chunks(layer)) {
            let number = number_of[id.0 as usize] as usize;
            if last[number] != version {
                last[number] = version;
                counts[number] = (counts[number] + 1).min(2);
            }
        }
    }
    counts
}

/// The chunks of a dictionary, each a file.
struct Rows {
    rows: Vec<ChunkRow>,
    files: Vec<ChunkId>,
}

impl ChunkSource for Rows {
    fn file_chunks(&self, file: FileId) -> &[ChunkId] {
        std::slice::from_ref(&self.files[file.index as usize])
    }

    fn row(&self, id: ChunkId) -> ChunkRow {
        self.rows[id.0 as usize]
    }

    fn chunk_count(&self) -> usize {
        self.rows.len()
    }
}

fn tree(chunks: &Rows, blobs: &[BlobRecord]) -> Result<Tree> {
    let mut tree = Tree::new();
    let metadata = Metadata { mode: 0o444, ..Metadata::implied_directory() };
    for (index, row) in (0u32..).zip(&chunks.rows) {
        let path = format!("{}/{}", shown_id(&blobs[row.blob as usize]), row.index);
        let file = FileId { layer: LayerIndex(0), index };
        let content = Content::Regular { file, size: row.uncompressed_size.into() };
        tree.insert(path.as_bytes(), Inode::new(metadata.clone(), content))?;
    }
    Ok(tree)
}
