//! One layer in, one blob and one bootstrap out.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rafs::bootstrap::Buffer;
use rafs::format::blob_table::BlobRecord;
use storage::codec::Codec;
use storage::digest::TaggedDigest;
use storage::ids::BlobId;

use crate::blob_writer::{BlobOptions, BlobWriter, Context, FinishedBlob};
use crate::bootstrap_v5;
use crate::bootstrap_writer::{self, Image};
use crate::chunks::{BuiltContent, PackedContent};
use crate::content::ChunkSource;
use crate::layered::{Below, Layered};
use crate::merge::shown_id;
use crate::overlay::{self, WhiteoutSpec};
use crate::pipeline::{DataOptions, Layer, LayerData, Placement, Session};
use crate::prefetch::{self, Patterns};
use crate::root::{RootOptions, image_root};
use crate::sink::BlobSink;
use crate::source::dir;
use crate::source::tar::{self, TarOptions};
use crate::tree::{Content, InodeId, LayerIndex, Tree};
use crate::{Error, ErrorKind, Result};

/// The version of the format, and what only one of them leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RAFS v5.
    V5 {
        /// Chunks start at multiples of 4096 in the decoded space (`--aligned-chunk`).
        aligned: bool,
    },
    /// RAFS v6.
    V6,
}

impl Version {
    /// 5 or 6.
    pub fn number(self) -> u32 {
        match self {
            Self::V5 { .. } => 5,
            Self::V6 => 6,
        }
    }
}

/// How one layer is built.
#[derive(Clone, Debug)]
pub struct LayerOptions {
    /// Version of the format.
    pub version: Version,
    /// Chunk size, compressor, digester, threads.
    pub data: DataOptions,
    /// Table of content in the blob.
    pub toc: bool,
    /// Bootstrap in the blob.
    pub inline_bootstrap: bool,
    /// Name of the blob in place of its digest.
    pub blob_id: Option<BlobId>,
    /// What marks removed entries. With no layer below, a directory source loses them; a tar
    /// source keeps them, to be merged later.
    pub whiteouts: WhiteoutSpec,
    /// Patterns of prefetch files, whose data comes first in the blob of a directory. A tar stream
    /// is not reordered.
    pub prefetch: Patterns,
    /// Write the prefetch table (policy `fs`). Without it, v5 says how much of the blob such files take.
    pub prefetch_table: bool,
    /// False stores owners as 0 and says so (`--repeatable`).
    pub explicit_ids: bool,
    /// Also make the daemon's local copy of the blob's context.
    pub keep_context: bool,
}

/// Where the layer comes from.
pub enum LayerSource<'a> {
    /// A directory.
    Directory(&'a Path),
    /// A tar stream, plain or compressed with gzip or zstd, read once from front to end.
    Tar {
        /// What messages call it.
        name: String,
        /// The stream.
        input: Box<dyn Read + 'a>,
    },
    /// The same of an eStargz layer: without the files that belong to its format.
    Estargz {
        /// What messages call it.
        name: String,
        /// The stream.
        input: Box<dyn Read + 'a>,
    },
}

/// A built layer.
pub struct BuiltLayer {
    /// The bootstrap.
    pub bootstrap: Buffer,
    /// The blob. Without chunks and without an inlined bootstrap nothing was written to it.
    pub blob: FinishedBlob,
    /// True if the layer has file data of its own, so that the bootstrap names the blob.
    pub has_data: bool,
    /// Names of the image's blobs in table order; `None` is the layer's own.
    pub blobs: Vec<Option<String>>,
    /// Directory entries of the image with its root.
    pub entry_count: u64,
    /// Image root digest, computed from the source and its chunk digests.
    pub root: TaggedDigest,
}

/// Builds one layer; the blob goes to `sink`.
///
/// # Errors
/// Those of the source, of the format's limits, and of writing. `Invalid`: options that RAFS v5 has
/// nothing for.
pub fn build_layer(source: LayerSource<'_>, options: &LayerOptions, sink: BlobSink) -> Result<BuiltLayer> {
    build_layer_upon(source, options, None, sink)
}

/// [`build_layer`] upon what is there already: chunks of `below` are not stored again, and the
/// image is the layer over the parent's tree.
///
/// # Errors
/// Those of [`build_layer`], and of applying a layer to a tree. `Inconsistent`: RAFS v5, and chunks
/// below that are compressed in another way.
pub fn build_layer_upon(
    source: LayerSource<'_>,
    options: &LayerOptions,
    below: Option<Below>,
    sink: BlobSink,
) -> Result<BuiltLayer> {
    let beyond_v5 = options.toc || options.data.cipher.is_some() || options.data.batch_size != 0;
    if beyond_v5 && options.version != Version::V6 {
        return Err(Error::invalid("RAFS v5 has no table of content, no encryption and no batches"));
    }
    let mut below = below;
    let parent = below.as_mut().and_then(|below| below.parent.take());
    let below = below.map(Arc::new);
    let session = Session::upon(options.data, below.clone())?;
    let mut layer = session.layer(sink)?;
    // With a parent, whiteouts have something to remove.
    let whiteouts = if parent.is_some() { WhiteoutSpec::None } else { options.whiteouts };
    let tar = TarOptions { links_below: parent.is_some(), ..TarOptions::default() };
    let (mut tree, mut first) = match read(source, whiteouts, &options.prefetch, tar, &mut layer) {
        Ok(read) => read,
        Err(error) => {
            return Err(layer.abort(error));
        }
    };
    layer.finish()?;
    let output = session.finish()?;
    let data = output
        .layers
        .into_iter()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Cancelled, "the build ended without its layer"))?;
    let context = match options.version {
        Version::V5 { .. } => Context::None,
        Version::V6 => context_of(&output.content, data.layer, &options.data),
    };
    if let Some(below) = &below {
        below.lift(&mut tree);
    }
    if let Some(mut parent) = parent {
        overlay::apply(&mut parent, tree, options.whiteouts)?;
        tree = parent;
        first = options.prefetch.resolve(&tree);
    }
    let below = below.as_deref();
    finish(Parts { tree: &tree, content: &output.content, below, data, first: &first, context }, options)
}

/// What the context of a layer with data of its own must say.
pub(crate) fn context_of(content: &BuiltContent, layer: LayerIndex, options: &DataOptions) -> Context {
    if options.cipher.is_none() && options.batch_size == 0 {
        return Context::Plain;
    }
    let first = content.chunks.of_layer(layer).next().map_or(0, |id| id.0);
    let (mut units, mut members) = (Vec::new(), HashMap::new());
    for member in content.chunks.members(layer) {
        if units.len() == member.unit as usize {
            units.push((member.stored, member.decoded));
        }
        members.insert(member.id.0 - first, (member.unit, member.start, member.offset));
    }
    Context::Wide { units, members }
}

/// All of a layer but what follows its chunk data.
pub(crate) struct Parts<'a> {
    pub tree: &'a Tree,
    pub content: &'a BuiltContent,
    pub below: Option<&'a Below>,
    pub data: LayerData,
    /// Inodes of the prefetch table.
    pub first: &'a [InodeId],
    pub context: Context,
}

/// Writes what follows the chunk data, and the bootstrap.
pub(crate) fn finish(parts: Parts<'_>, options: &LayerOptions) -> Result<BuiltLayer> {
    let Parts { tree, content, below, data, first, context } = parts;
    let of_layer = content.chunks.of_layer(data.layer);
    let has_data = of_layer.len() > 0;
    let tarfs = options.data.placement == Placement::DecodedSpace;
    let blob_options = BlobOptions {
        codec: options.data.codec,
        digester: options.data.digester,
        chunk_size: options.data.chunk_size,
        toc: options.toc,
        inline_bootstrap: options.inline_bootstrap,
        id: options.blob_id.clone(),
        cipher: options.data.cipher,
        keep_context: options.keep_context,
    };
    let packed = match options.version {
        Version::V5 { aligned: false } => Some(PackedContent::new(content, of_layer.clone())),
        _ => None,
    };
    let decoded_size = packed.as_ref().map_or(content.chunks.decoded_size(data.layer), |packed| packed.size);
    let built: &dyn ChunkSource = match &packed {
        Some(packed) => packed,
        None => content,
    };
    let layered;
    let chunks = match below {
        Some(below) => {
            layered = Layered { below, built };
            &layered
        }
        None => built,
    };
    let mut blobs = below.map_or_else(Vec::new, |below| below.chunks.blobs.clone());
    let prefetch_size = match options.version {
        Version::V5 { .. } if !options.prefetch_table => {
            prefetch_size(tree, chunks, first, blobs.len() as u32, data.sink.start())?
        }
        _ => 0,
    };
    let rows = of_layer.map(|id| content.row(id));
    let writer = BlobWriter::new(data.sink, blob_options, decoded_size, rows, &context)?;
    let mut prefetch_sizes = vec![0; blobs.len()];
    prefetch_sizes.push(prefetch_size);
    let mut write = |record: BlobRecord| {
        blobs.push(record);
        let write = match options.version {
            Version::V5 { .. } => bootstrap_v5::write,
            Version::V6 => bootstrap_writer::write,
        };
        write(&Image {
            tree,
            chunks,
            blobs: &blobs,
            chunk_size: options.data.chunk_size,
            codec: options.data.codec,
            digester: options.data.digester,
            explicit_ids: options.explicit_ids,
            tarfs,
            force_xattr_flag: false,
            kept: below.map_or(&[], |below| &below.kept),
            prefetch: if options.prefetch_table { first } else { &[] },
            prefetch_sizes: &prefetch_sizes,
        })
    };
    let root_options = RootOptions {
        digester: options.data.digester,
        chunk_size: options.data.chunk_size,
        explicit_ids: options.explicit_ids,
    };
    let (written, root) = std::thread::scope(|scope| {
        // Neither needs the other, and both walk the whole tree.
        let root = scope.spawn(|| image_root(tree, chunks, root_options));
        let written = || -> Result<_> {
            Ok(if options.inline_bootstrap {
                let bootstrap = write(*writer.record())?;
                let blob = writer.finish(Some(&bootstrap.bytes))?;
                (bootstrap, blob)
            } else {
                let blob = writer.finish(None)?;
                (write(blob.record)?, blob)
            })
        };
        (written(), root.join())
    });
    let (bootstrap, blob) = written?;
    let root = root.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let known = below.map_or(&[][..], |below| &below.chunks.blobs);
    let blobs = bootstrap.blobs.iter().map(|&place| known.get(place).map(shown_id)).collect();
    Ok(BuiltLayer {
        bootstrap: bootstrap.bytes,
        blob,
        has_data,
        blobs,
        entry_count: bootstrap.entry_count,
        root,
    })
}

/// Bytes from `start`, where the data of the blob in place `own` begins, that are chunks of `first` and what
/// lies below.
fn prefetch_size(
    tree: &Tree,
    content: &dyn ChunkSource,
    first: &[InodeId],
    own: u32,
    start: u64,
) -> Result<u32> {
    let mut chunks = HashSet::new();
    for id in prefetch::below(tree, first) {
        if let Content::Regular { file, .. } = tree.inode(id).content {
            chunks.extend(content.file_chunks(file).iter().copied());
        }
    }
    let mut places: Vec<_> =
        chunks.into_iter().map(|id| content.row(id)).filter(|row| row.blob == own).collect();
    places.sort_unstable_by_key(|row| row.compressed_offset);
    let mut end = start;
    for row in places {
        // In the order of a tar other data may come first or between.
        if row.compressed_offset != end {
            break;
        }
        end += u64::from(row.compressed_size);
    }
    let size = end - start;
    u32::try_from(size).map_err(|_| {
        Error::limit(format!(
            "prefetch files take {size} bytes of the blob, RAFS v5 can state 4 GiB; name fewer files"
        ))
    })
}

/// Reads layers, lowest first, into one tree, cutting and hashing their data but storing none:
/// what a built image is compared with. `whiteouts` are consumed; with `None` a single layer
/// keeps them.
///
/// # Errors
/// Those of the sources.
pub fn read_layers(
    layers: Vec<LayerSource<'_>>,
    data: DataOptions,
    whiteouts: WhiteoutSpec,
) -> Result<(Tree, BuiltContent)> {
    let data =
        DataOptions { codec: Codec::None, placement: Placement::Blob, batch_size: 0, cipher: None, ..data };
    let session = Session::new(data)?;
    let mut merged: Option<Tree> = None;
    for source in layers {
        let mut layer = session.layer(BlobSink::new("nowhere", std::io::sink()))?;
        let tar = TarOptions { links_below: merged.is_some(), ..TarOptions::default() };
        let (tree, _) = match read(source, whiteouts, &Patterns::default(), tar, &mut layer) {
            Ok(read) => read,
            Err(error) => {
                return Err(layer.abort(error));
            }
        };
        layer.finish()?;
        merged = Some(match merged {
            None => {
                let mut tree = tree;
                overlay::drop_whiteouts(&mut tree, whiteouts);
                tree
            }
            Some(mut lower) => {
                overlay::apply(&mut lower, tree, whiteouts)?;
                lower
            }
        });
    }
    Ok((merged.unwrap_or_default(), session.finish()?.content))
}

fn read(
    source: LayerSource<'_>,
    whiteouts: WhiteoutSpec,
    prefetch: &Patterns,
    options: TarOptions,
    layer: &mut Layer,
) -> Result<(Tree, Vec<InodeId>)> {
    match source {
        LayerSource::Directory(path) => read_directory(path, whiteouts, prefetch, layer),
        LayerSource::Tar { name, input } => {
            let tree = tar::read_layer(&name, input, layer, options)?;
            let first = prefetch.resolve(&tree);
            Ok((tree, first))
        }
        LayerSource::Estargz { name, input } => {
            let options = TarOptions { estargz: true, ..options };
            let tree = tar::read_layer(&name, input, layer, options)?;
            let first = prefetch.resolve(&tree);
            Ok((tree, first))
        }
    }
}

fn read_directory(
    path: &Path,
    whiteouts: WhiteoutSpec,
    patterns: &Patterns,
    layer: &mut Layer,
) -> Result<(Tree, Vec<InodeId>)> {
    if patterns.is_empty() {
        let tree = dir::read(path, whiteouts, |mut file, size| layer.add_file(&mut file, size))?;
        return Ok((tree, Vec::new()));
    }
    let mut source = dir::scan(path, whiteouts)?;
    let first = patterns.resolve(&source.tree);
    let order = prefetch::file_order(&source.tree, &first);
    source.read_files(&order, |mut file, size| layer.add_file(&mut file, size))?;
    Ok((source.tree, first))
}
