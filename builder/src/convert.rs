//! `convert`: an OCI image in, a Nydus OCI image out.
//!
//! ```text
//! source layers ─▶ tar reader ─▶ build session ─▶ chunk data of each layer, spooled at the target
//!                       │                                   │
//!                       └─▶ a tree per layer ─┬─▶ its bootstrap, inlined in its blob ─▶ blob layers
//!                                             └─▶ merged tree ─▶ hints ─▶ bootstrap ─▶ root digest
//!                                                                    └─▶ bootstrap layer, config, manifest
//! ```
//!
//! Decisions:
//!
//! - Every source layer becomes one blob layer, also one without file data of its own (its blob
//!   then holds metadata only) and one that upper layers hide completely. So history, diff ids
//!   and layers keep their one-to-one order, and layers can be merged again later. The merged
//!   bootstrap names only the blobs that a surviving file uses (rafs-v6 section 11.2); nothing
//!   else is ever fetched for a mount.
//! - A chunk that a lower layer of the image has stored is not stored again; the upper layer's
//!   bootstrap then names the lower layer's blob.
//! - A hard link to a file of a lower layer becomes, in the bootstrap of its own layer, that file
//!   once more; in the merged one, another name of it.
//! - Whiteouts without anything below them vanish in the merged tree.
//! - Nothing is published before every layer has matched its digests and the merged bootstrap
//!   has passed the reader's own checks.

use std::collections::VecDeque;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rafs::bootstrap::Buffer;
use rafs::format::blob_table::BlobRecord;
use rafs::format::features::BlobFeatures;
use rafs::format::limits::MAX_CHUNK_SIZE;
use storage::codec::Codec;
use storage::digest::{Digest, DigestAlgorithm, TaggedDigest};
use tempfile::NamedTempFile;
use tokio_util::sync::CancellationToken;
use zerocopy::byteorder::little_endian::{U32, U64};

use crate::blob_writer::{BlobOptions, BlobWriter};
use crate::bootstrap_writer::{self, Image, padded_id};
use crate::chunks::BuiltContent;
use crate::content::ChunkSource as _;
use crate::create::context_of;
use crate::hints::{self, Contents};
use crate::oci::image::{self, BlobLayer, BootstrapLayer, ManifestParts, RootStatement};
use crate::oci::manifest::SourceConfig;
use crate::oci::read::{LayerTaker, ReadOptions, read_layers};
use crate::oci::source::ImageSource;
use crate::oci::spool::{SpooledBlob, TEMP_PREFIX};
use crate::oci::target::Target;
use crate::overlay::{self, WhiteoutSpec};
use crate::pipeline::{DataOptions, LayerData, Placement};
use crate::progress::{Observer, check};
use crate::root::{RootOptions, check_written, image_root};
use crate::sink::BlobSink;
use crate::tree::{InodeId, Tree};
use crate::write_back::WriteBack;
use crate::{Error, ErrorKind, Result};

/// Chunk size of converted images: 512 KiB. Measured, with the size of units: "Layout for start-up" in
/// misc/docs/nydus-image.md.
pub const DEFAULT_CHUNK_SIZE: u32 = 0x80000;

/// Unit of small files of images converted with chunks of so many bytes: 256 KiB as far as possible.
pub fn default_batch_size(chunk_size: u32) -> u32 {
    // The context has no room for units beside chunks of the largest size.
    if chunk_size < MAX_CHUNK_SIZE { chunk_size.min(0x40000) } else { 0 }
}

/// Most layers that are read at a time: each has threads and buffers, and only one is decided.
pub const MAX_JOBS: usize = 16;

/// Write buffer of a blob's temporary file.
const WRITE_BUFFER: usize = 256 << 10;

/// How an image is converted.
pub struct ConvertOptions<'a> {
    /// Chunking, compression and threads.
    pub data: DataOptions,
    /// Layers read, and blobs uploaded, at a time: at most [`MAX_JOBS`].
    pub jobs: usize,
    /// Name the files that a start surely reads in the prefetch table: see [`crate::hints`].
    pub hints: bool,
    /// Hears of progress.
    pub observer: &'a dyn Observer,
    /// Ends the work; nothing is published then.
    pub cancel: &'a CancellationToken,
}

/// One layer of the result.
#[derive(Clone, Debug)]
pub struct ConvertedLayer {
    /// Digest of the source layer's stored bytes, if its source tells.
    pub source: Option<Digest>,
    /// Digest of the source layer's tar.
    pub diff_id: Digest,
    /// Digest of the blob.
    pub blob: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Chunks stored in it.
    pub chunk_count: u64,
    /// True if the merged bootstrap names it.
    pub used: bool,
}

/// The result of a conversion.
#[derive(Clone, Debug)]
pub struct Converted {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Digest of the merged bootstrap, uncompressed.
    pub bootstrap: Digest,
    /// Bytes of the merged bootstrap.
    pub bootstrap_size: u64,
    /// The image root digest.
    pub root: TaggedDigest,
    /// Directory entries of the merged tree, root included.
    pub entry_count: u64,
    /// One for each source layer, lowest first.
    pub layers: Vec<ConvertedLayer>,
    /// Ids of the blobs that the merged bootstrap names, in its order.
    pub blobs: Vec<String>,
    /// Stored bytes of the source's layers, as far as it tells.
    pub source_size: u64,
    /// Stored bytes of all layers of the result.
    pub size: u64,
}

/// Converts `source` into `target`.
///
/// # Errors
/// Those of the source (`Mismatch`, `Corrupt`, `Unsupported`, …), of the format's limits and of
/// the target; `Cancelled`. Nothing is published then, and temporary files are gone.
pub fn convert(source: &ImageSource, target: Target, options: &ConvertOptions<'_>) -> Result<Converted> {
    let spool_dir = target.spool_dir();
    let layers = Arc::new(Mutex::new(Layers::new(options.data, source.layers().len())));
    let read = ReadOptions {
        data: options.data,
        jobs: options.jobs.min(MAX_JOBS),
        observer: options.observer,
        cancel: options.cancel,
    };
    let blob_file = |_| {
        let (file, sink) = blob_file(&spool_dir)?;
        lock(&layers).files.push_back(file);
        Ok(sink)
    };
    let taker = Arc::clone(&layers);
    let taker: LayerTaker = Box::new(move |chunks, layer, tree| lock(&taker).add(chunks, layer, tree));
    let chunks = &read_layers(source, &read, blob_file, taker)?;
    check(options.cancel)?;

    let data = &options.data;
    // Whoever else had them is joined.
    let layers = Arc::into_inner(layers).and_then(|layers| layers.into_inner().ok());
    let layers = layers.ok_or_else(|| Error::new(ErrorKind::Cancelled, "the layers were given up"))?;
    let Layers { merged, layers, spooled, records, owners, .. } = layers;
    let stored = spooled.iter().map(|(_, blob)| blob.reader()).collect::<Result<Vec<_>>>()?;
    // Blobs are on their way while one thread makes the bootstrap of them all; without it they are of no use.
    let wanted = options.cancel.child_token();
    let puts = ConvertOptions { cancel: &wanted, ..*options };
    let (put, merged) = std::thread::scope(|scope| {
        let put = scope.spawn(|| put_all(&target, spooled, &puts));
        let config = options.hints.then(|| source.config());
        let merged = write_merged(chunks, data, &merged, &records, stored, config)
            .and_then(|merged| Ok((merged.pack(&spool_dir, data.chunk_size)?, merged)))
            .inspect_err(|_| wanted.cancel());
        (put.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), merged)
    });
    let (packed, Merged { bootstrap, digest: bootstrap_digest, root, entry_count, places }) = merged?;
    put?;
    let blobs: Vec<String> = places.iter().map(|&place| layers[owners[place]].digest.to_string()).collect();

    let blob_layers: Vec<BlobLayer> =
        layers.iter().map(|l| BlobLayer { digest: l.digest, size: l.size }).collect();
    let config = image::config(source.config(), &blob_layers, packed.diff_id)?;
    let config = SpooledBlob::from_bytes(&spool_dir, &config)?;
    let manifest = image::manifest(&ManifestParts {
        config: (config.digest(), config.size()),
        blobs: &blob_layers,
        bootstrap: (packed.blob.digest(), packed.blob.size()),
        root,
        annotations: source.annotations(),
    })?;
    let size = blob_layers.iter().map(|l| l.size).sum::<u64>() + packed.blob.size();
    put_all(&target, vec![("bootstrap".into(), packed.blob), ("config".into(), config)], options)?;
    check(options.cancel)?;
    let manifest = target.publish(&manifest)?;

    let layers = source
        .layers()
        .iter()
        .zip(&layers)
        .map(|(promise, layer)| ConvertedLayer {
            source: promise.stored.map(|(digest, _)| digest),
            diff_id: promise.diff_id,
            blob: layer.digest,
            size: layer.size,
            chunk_count: layer.chunk_count,
            used: blobs.contains(&layer.digest.to_string()),
        })
        .collect();
    Ok(Converted {
        manifest,
        bootstrap: bootstrap_digest,
        bootstrap_size: bootstrap.len() as u64,
        root,
        entry_count,
        layers,
        blobs,
        source_size: source.stored_size(),
        size,
    })
}

/// A temporary file for one blob, and the sink that fills it.
fn blob_file(dir: &Path) -> Result<(NamedTempFile, BlobSink)> {
    let failed = |e| Error::io(format!("temporary file in {}", dir.display()), e);
    let file = tempfile::Builder::new().prefix(TEMP_PREFIX).tempfile_in(dir).map_err(failed)?;
    let out: File = file.as_file().try_clone().map_err(failed)?;
    let sink = BlobSink::new(
        file.path().display().to_string(),
        BufWriter::with_capacity(WRITE_BUFFER, WriteBack::new(out)),
    );
    Ok((file, sink))
}

struct FinishedLayer {
    digest: Digest,
    size: u64,
    chunk_count: u64,
}

/// The bootstrap of the merged tree.
struct Merged {
    bootstrap: Buffer,
    /// Of its bytes.
    digest: Digest,
    root: TaggedDigest,
    entry_count: u64,
    /// Which of the blobs with chunks it names.
    places: Vec<usize>,
}

/// Writes the bootstrap of all layers, with hints for the command of `config`, which are told from
/// the blobs as they are stored.
fn write_merged(
    chunks: &BuiltContent,
    data: &DataOptions,
    tree: &Tree,
    records: &[BlobRecord],
    stored: Vec<File>,
    config: Option<&SourceConfig>,
) -> Result<Merged> {
    let options = RootOptions { digester: data.digester, chunk_size: data.chunk_size, explicit_ids: true };
    let (root, written) = std::thread::scope(|scope| {
        let root = scope.spawn(|| image_root(tree, chunks, options));
        let prefetch = config.map_or_else(Vec::new, |config| {
            let contents = Contents::new(chunks, stored, data.codec, data.chunk_size);
            hints::find(tree, &config.document, contents)
        });
        let written = write_bootstrap(chunks, data, tree, records, true, &prefetch);
        (root.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), written)
    });
    let (root, written) = (root?, written?);
    let digest = DigestAlgorithm::Sha256.digest(&written.bytes);
    Ok(Merged {
        bootstrap: written.bytes,
        digest,
        root,
        entry_count: written.entry_count,
        places: written.blobs,
    })
}

impl Merged {
    /// Packs the layer that holds the bootstrap, which is checked meanwhile.
    fn pack(&self, spool_dir: &Path, chunk_size: u32) -> Result<BootstrapLayer> {
        let statement = RootStatement { root: self.root, chunk_size, bootstrap: self.digest };
        std::thread::scope(|scope| {
            let checked = scope.spawn(|| check_written(&self.bootstrap, Some(self.root)));
            let packed = image::pack_bootstrap(spool_dir, &self.bootstrap, &statement);
            checked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            packed
        })
    }
}

/// The layers so far, each with its blob complete.
struct Layers {
    data: DataOptions,
    /// How many there will be.
    count: usize,
    /// The blobs of those that are still to come.
    files: VecDeque<NamedTempFile>,
    /// The image's tree.
    merged: Tree,
    layers: Vec<FinishedLayer>,
    /// With what messages call them.
    spooled: Vec<(String, SpooledBlob)>,
    /// Blobs with chunks, lowest layer first, as other bootstraps name them.
    records: Vec<BlobRecord>,
    /// The layer of each record.
    owners: Vec<usize>,
}

impl Layers {
    fn new(data: DataOptions, count: usize) -> Self {
        Self {
            data,
            count,
            files: VecDeque::new(),
            merged: Tree::new(),
            layers: Vec::new(),
            spooled: Vec::new(),
            records: Vec::new(),
            owners: Vec::new(),
        }
    }

    /// Completes the blob of the next layer, and merges its tree.
    fn add(&mut self, chunks: &BuiltContent, layer: LayerData, mut tree: Tree) -> Result<()> {
        let number = self.layers.len();
        let place = format!("{} of {}", number + 1, self.count);
        let file = self.files.pop_front().ok_or_else(|| Error::invalid("a layer without a blob"))?;
        tree.resolve_links(&self.merged).map_err(|e| e.context(format!("layer {place}")))?;
        let finished = self
            .finish_blob(chunks, &tree, layer, number)
            .map_err(|e| e.context(format!("blob of layer {place}")))?;
        let blob = SpooledBlob::adopt(file, finished.digest, finished.size);
        self.spooled.push((format!("blob {place}"), blob));
        self.layers.push(finished);
        overlay::apply(&mut self.merged, tree, WhiteoutSpec::Oci)
    }

    fn finish_blob(
        &mut self,
        chunks: &BuiltContent,
        tree: &Tree,
        layer: LayerData,
        number: usize,
    ) -> Result<FinishedLayer> {
        let own = chunks.chunks.of_layer(layer.layer);
        let chunk_count = own.len() as u64;
        let options = BlobOptions {
            codec: self.data.codec,
            digester: self.data.digester,
            chunk_size: self.data.chunk_size,
            toc: true,
            inline_bootstrap: true,
            id: None,
            cipher: None,
            keep_context: false,
        };
        let decoded_size = chunks.chunks.decoded_size(layer.layer);
        let writer = BlobWriter::new(
            layer.sink,
            options,
            decoded_size,
            own.map(|id| chunks.row(id)),
            &context_of(chunks, layer.layer, &self.data),
        )?;
        let mut records = self.records.clone();
        if chunk_count > 0 {
            records.push(*writer.record());
        }
        let bootstrap = write_bootstrap(chunks, &self.data, tree, &records, false, &[])?;
        let blob = writer.finish(Some(&bootstrap.bytes))?;
        if chunk_count > 0 {
            let mut record = blob.record;
            record.blob_id = padded_id(&blob.file_digest.to_string());
            record.compressed_size = U64::new(blob.size);
            // The bootstrap that names this blob is not in it (rafs-v6 section 11.3).
            record.features = U32::new(record.features.get() & !BlobFeatures::INLINED_FS_META.bits());
            self.records.push(record);
            self.owners.push(number);
        }
        Ok(FinishedLayer { digest: blob.file_digest, size: blob.size, chunk_count })
    }
}

fn write_bootstrap(
    chunks: &BuiltContent,
    data: &DataOptions,
    tree: &Tree,
    blobs: &[BlobRecord],
    merged: bool,
    prefetch: &[InodeId],
) -> Result<bootstrap_writer::Bootstrap> {
    bootstrap_writer::write(&Image {
        tree,
        chunks,
        blobs,
        chunk_size: data.chunk_size,
        codec: data.codec,
        digester: data.digester,
        explicit_ids: true,
        tarfs: false,
        force_xattr_flag: merged,
        kept: &[],
        prefetch,
        prefetch_sizes: &[],
    })
}

/// Hands blobs to the target, `jobs` at a time; the first error stops the others.
fn put_all(target: &Target, blobs: Vec<(String, SpooledBlob)>, options: &ConvertOptions<'_>) -> Result<()> {
    let workers = options.jobs.clamp(1, MAX_JOBS).min(blobs.len().max(1));
    let queue = Mutex::new(blobs.into_iter());
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let fail = |error: Error| {
        lock(&failure).get_or_insert(error);
    };
    let failed = || lock(&failure).is_some();
    let next = || lock(&queue).next();
    let work = || {
        while !failed() {
            let Some((name, blob)) = next() else { break };
            let done = check(options.cancel).and_then(|()| target.put(blob, &name, options.observer));
            if let Err(error) = done {
                fail(error.context(name));
            }
        }
    };
    std::thread::scope(|scope| {
        for worker in 1..workers {
            let started = std::thread::Builder::new().name(format!("put-{worker}")).spawn_scoped(scope, work);
            // This thread does the work as well, so a missing helper only costs time.
            if let Err(error) = started {
                tracing::warn!(%error, "an upload thread cannot be started");
            }
        }
        work();
    });
    failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under one of these ends the conversion.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Defaults of conversions: a digest that registries share, and the codec with the best ratio.
pub fn default_data_options() -> DataOptions {
    DataOptions {
        codec: Codec::Zstd,
        digester: DigestAlgorithm::Sha256,
        chunk_size: DEFAULT_CHUNK_SIZE,
        threads: 0,
        placement: Placement::Blob,
        batch_size: 0,
        cipher: None,
    }
}

#[cfg(test)]
mod tests;
