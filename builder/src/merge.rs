//! Bootstraps of layers in, the bootstrap of the image out; no data blob is touched.
//!
//! Every bootstrap is read back into a tree, the trees are applied to one another lowest
//! first, and the result is written with the chunk rows carried over: chunk numbers and
//! offsets inside blobs do not change, blobs are numbered anew by first use.

use std::collections::HashMap;
use std::sync::Arc;

use rafs::bootstrap::{Bootstrap, Buffer, digester_code};
use rafs::format::blob_table::BlobRecord;
use rafs::format::features::{BlobFeatures, ImageFlags};
use storage::codec::Codec;
use storage::digest::{Digest, TaggedDigest};
use storage::ids::BlobId;
use zerocopy::byteorder::little_endian::{U32, U64};

use crate::bootstrap_v5;
use crate::bootstrap_writer::{self, Image, padded_id};
use crate::load::LoadedChunks;
use crate::overlay::{self, WhiteoutSpec};
use crate::prefetch::Patterns;
use crate::root::{RootOptions, check_written, image_root};
use crate::tree::Tree;
use crate::{Error, ErrorKind, Result};

/// What the caller knows of the blob that a layer brought itself.
#[derive(Clone, Debug, Default)]
pub struct OwnBlob {
    /// Its id; for a blob whose data lies in the original tar, the digest of the blob with its
    /// context (`--blob-digests`).
    pub digest: Option<Digest>,
    /// Its original id (`--original-blob-ids`).
    pub original_id: Option<BlobId>,
    /// Its length (`--blob-sizes`).
    pub size: Option<u64>,
    /// Digest of its table of content (`--blob-toc-digests`).
    pub toc_digest: Option<Digest>,
    /// Length of its table of content (`--blob-toc-sizes`).
    pub toc_size: Option<u32>,
}

/// One bootstrap to merge.
pub struct MergeSource {
    /// What to call it in messages.
    pub name: String,
    /// The opened bootstrap. An inlined one was opened with the id its blob is to have: the
    /// `--blob-digests` entry, the original id, the SHA-256 that the file's name states, or the blob's own.
    pub bootstrap: Arc<dyn Bootstrap>,
    /// What is known of its own blob.
    pub own: OwnBlob,
}

/// A merged image.
pub struct Merged {
    /// The bootstrap.
    pub bootstrap: Buffer,
    /// Names of its blobs in table order.
    pub blobs: Vec<String>,
    /// Default compressor: the last layer's.
    pub codec: Codec,
    /// Version of the format, that of all layers.
    pub fs_version: u32,
    /// Directory entries with the root.
    pub entry_count: u64,
    /// Image root digest, from the merged tree; `None` if the blobs' digesters differ.
    pub root: Option<TaggedDigest>,
}

/// Merges `sources`, lowest first.
///
/// Blobs of `dictionary` keep their names, whichever layer uses them.
///
/// # Errors
/// `Inconsistent`: chunk size, version or owners' meaning differ, in v5 also the digester or the
/// compressor. `Invalid`: no source.
/// `Limit`, `Corrupt`: as [`crate::bootstrap_writer::write`] and [`LoadedChunks::load`].
pub fn merge(
    sources: &[MergeSource],
    dictionary: Option<&dyn Bootstrap>,
    prefetch: &Patterns,
) -> Result<Merged> {
    let (first, last) = match sources {
        [first, .., last] => (first, last),
        [only] => (only, only),
        [] => return Err(Error::invalid("nothing to merge: give at least one bootstrap")),
    };
    let mut chunks = LoadedChunks::default();
    let mut merged: Option<Tree> = None;
    let mut named = HashMap::new();
    for blob in dictionary.map_or(&[][..], Bootstrap::blobs) {
        named.insert(blob.id.clone(), padded_id(blob.id.as_str()));
    }
    for source in sources {
        consistent((&first.name, &*first.bootstrap), (&source.name, &*source.bootstrap))?;
        let records = records(source, &mut named)?;
        let mut tree = chunks
            .load(&*source.bootstrap, &records)
            .map_err(|e| e.context(format!("read {}", source.name)))?;
        merged = Some(match merged {
            None => {
                // There is nothing below for these to remove.
                overlay::drop_whiteouts(&mut tree, WhiteoutSpec::Oci);
                tree
            }
            Some(mut lower) => {
                overlay::apply(&mut lower, tree, WhiteoutSpec::Oci)
                    .map_err(|e| e.context(format!("merge {}", source.name)))?;
                lower
            }
        });
    }
    let tree = merged.unwrap_or_default();
    let summary = last.bootstrap.summary();
    let write = if summary.fs_version == 5 { bootstrap_v5::write } else { bootstrap_writer::write };
    let written = write(&Image {
        tree: &tree,
        chunks: &chunks,
        blobs: &chunks.blobs,
        chunk_size: summary.chunk_size,
        codec: summary.codec,
        digester: summary.digester,
        explicit_ids: summary.flags.contains(ImageFlags::EXPLICIT_UID_GID),
        tarfs: summary.flags.contains(ImageFlags::TARFS_MODE),
        force_xattr_flag: true,
        kept: &[],
        prefetch: &prefetch.resolve(&tree),
        prefetch_sizes: &[],
    })?;
    let options = RootOptions {
        digester: summary.digester,
        chunk_size: summary.chunk_size,
        explicit_ids: summary.flags.contains(ImageFlags::EXPLICIT_UID_GID),
    };
    let one_digester =
        written.blobs.iter().all(|&b| chunks.blobs[b].digest_algo.get() == digester_code(summary.digester));
    let root = if one_digester { Some(image_root(&tree, &chunks, options)?) } else { None };
    check_written(&written.bytes, root)?;
    let blobs = written.blobs.iter().map(|&b| shown_id(&chunks.blobs[b])).collect();
    Ok(Merged {
        bootstrap: written.bytes,
        blobs,
        codec: summary.codec,
        fs_version: summary.fs_version,
        entry_count: written.entry_count,
        root,
    })
}

/// The id in a blob record as text.
pub fn shown_id(record: &BlobRecord) -> String {
    let len = record.blob_id.iter().position(|&b| b == 0).unwrap_or(record.blob_id.len());
    String::from_utf8_lossy(&record.blob_id[..len]).into_owned()
}

/// Refuses bootstraps, each with its name, of images whose trees or chunks can not be in one.
///
/// # Errors
/// `Inconsistent`: names what differs.
pub(crate) fn consistent(first: (&str, &dyn Bootstrap), other: (&str, &dyn Bootstrap)) -> Result<()> {
    let (a, b) = (first.1.summary(), other.1.summary());
    let ids = |flags: ImageFlags| flags.contains(ImageFlags::EXPLICIT_UID_GID);
    let differs = if a.fs_version != b.fs_version {
        format!("RAFS version {} and {}", a.fs_version, b.fs_version)
    } else if a.fs_version == 5 && a.digester != b.digester {
        format!("digester {} and {}", a.digester, b.digester)
    } else if a.chunk_size != b.chunk_size {
        format!("chunk size {:#x} and {:#x}", a.chunk_size, b.chunk_size)
    } else if a.block_size != b.block_size {
        format!("block size {} and {}", a.block_size, b.block_size)
    } else if a.flags.contains(ImageFlags::TARFS_MODE) != b.flags.contains(ImageFlags::TARFS_MODE) {
        "one refers to a plain tar, the other does not".to_owned()
    } else if ids(a.flags) != ids(b.flags) {
        "one stores owners, the other does not".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Inconsistent,
        format!("{} and {} can not be merged: {differs}; build them with the same options", first.0, other.0),
    ))
}

/// The blob records of an image as another one holds them.
pub(crate) fn carried_records(bootstrap: &dyn Bootstrap) -> Vec<BlobRecord> {
    let carried = |blob: &rafs::bootstrap::Blob| {
        let mut record = blob.record;
        record.blob_id = padded_id(blob.id.as_str());
        // Both say where the bootstrap at hand came from, not what the blob is.
        let here = BlobFeatures::INLINED_FS_META | BlobFeatures::IS_CHUNKDICT_GENERATED;
        record.features = U32::new((blob.features - here).bits());
        // The blob that held this bootstrap holds the context, too; another bootstrap must name it.
        if record.blob_meta_digest == [0; 32]
            && let Some(digest) = blob.context_id.as_ref().and_then(|id| Digest::from_hex(id.as_str()).ok())
        {
            record.blob_meta_digest = digest.0;
        }
        record
    };
    bootstrap.blobs().iter().map(carried).collect()
}

/// The blobs of a source with final names and what the caller knows put in. `named` has the final
/// names of blobs that lower sources know, by the names they have there.
///
/// # Errors
/// `Invalid`: nobody says what the blob is called that says where the data of an original layer is.
fn records(source: &MergeSource, named: &mut HashMap<BlobId, [u8; 64]>) -> Result<Vec<BlobRecord>> {
    let blobs = source.bootstrap.blobs();
    let inlined = |b: &rafs::bootstrap::Blob| b.features.contains(BlobFeatures::INLINED_FS_META);
    // The layer's own blob is the one that holds its bootstrap, or its only one, unless that is a
    // lower layer's: a layer whose data is all there already has no blob of its own.
    let own = blobs.iter().position(inlined).or(match blobs {
        [only] if !named.contains_key(&only.id) => Some(0),
        _ => None,
    });
    let mut records = carried_records(&*source.bootstrap);
    for (n, (blob, record)) in blobs.iter().zip(&mut records).enumerate() {
        if own == Some(n) {
            known(record, blob.features.contains(BlobFeatures::SEPARATE), &source.own);
        } else if let Some(name) = named.get(&blob.id) {
            record.blob_id = *name;
        }
        if inlined(blob)
            && blob.features.contains(BlobFeatures::SEPARATE)
            && record.blob_meta_digest == [0; 32]
        {
            return Err(Error::invalid(format!(
                "{}: it lies in a blob that says where the data of {} is, and nobody says what that blob is called;                  give --blob-digests, or the blob itself instead of its bootstrap",
                source.name, blob.id
            )));
        }
        named.entry(blob.id.clone()).or_insert(record.blob_id);
    }
    Ok(records)
}

fn known(record: &mut BlobRecord, separate: bool, own: &OwnBlob) {
    if let Some(id) = &own.original_id {
        record.blob_id = padded_id(id.as_str());
    }
    if let Some(digest) = own.digest {
        if separate {
            record.blob_meta_digest = digest.0;
        } else {
            record.blob_id = padded_id(&digest.to_string());
        }
    }
    if let Some(size) = own.size {
        if separate {
            record.blob_meta_size = U64::new(size);
        } else {
            record.compressed_size = U64::new(size);
        }
    }
    if let Some(digest) = own.toc_digest {
        record.blob_toc_digest = digest.0;
    }
    if let Some(size) = own.toc_size {
        record.blob_toc_size = U32::new(size);
    }
}
