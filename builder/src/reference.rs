//! A layer that stays as it is: metadata that refers to the data in the original file.
//!
//! Of a gzip file, slices are found that can be decoded alone (`targz-ref`); of a plain tar every
//! chunk can be read where it lies (`targz-ref`, too, and `tar-tarfs` for the kernel).

use std::io::Read;

use storage::codec::Codec;
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::BlobId;

use crate::blob_writer::{Context, SliceTable};
use crate::content::ChunkSource as _;
use crate::create::{BuiltLayer, LayerOptions, Parts, finish};
use crate::pipeline::{DataOptions, Layer, LayerData, Output, Placement, Session};
use crate::sink::BlobSink;
use crate::source::ahead::Ahead;
use crate::source::gzip_index::{GzipIndex, GzipIndexer};
use crate::source::hashed::Hashed;
use crate::source::stargz::{Collector, Index, Indexed, read_entries};
use crate::source::tar::{self, TarOptions};
use crate::tree::{LayerIndex, Tree};
use crate::{Error, ErrorKind, Result};

/// Bytes of a tar block.
const TAR_BLOCK: u64 = 512;
/// Pieces of 256 KiB that are read ahead of the thread that inflates: with a quarter of them it waits for pages that the
/// kernel is slow to copy.
const PIECES_AHEAD: usize = 16;

/// What refers to the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReferenceKind {
    /// Chunks of a gzip file, or of a plain tar (`targz-ref`).
    Layer,
    /// The same of an eStargz layer, without the files that belong to its format (`estargz-ref`).
    Estargz,
    /// A plain tar, in blocks of 512 bytes, that the kernel can mount beside its metadata (`tar-tarfs`).
    Tarfs,
}

/// A built layer and the original file that it refers to.
pub struct BuiltReference {
    /// Its metadata. What is called its blob holds the context, or nothing.
    pub layer: BuiltLayer,
    /// SHA-256 of the original, which is its name unless one was chosen.
    pub source: Digest,
}

/// Builds the metadata of the layer `input`, which is read once, front to back. The blob with the
/// context goes to `sink`; `tar-tarfs` has none.
///
/// Digests are SHA-256 whatever `options` say, and nothing is compressed but the context.
///
/// # Errors
/// Those of [`crate::create::build_layer`]; `Unsupported`: data that can not be referred to, by name.
pub fn build_reference(
    name: &str,
    input: impl Read + Send + 'static,
    kind: ReferenceKind,
    options: &LayerOptions,
    sink: BlobSink,
) -> Result<BuiltReference> {
    let mut input = Ahead::new(Hashed::new(input, DigestAlgorithm::Sha256), "read-source", PIECES_AHEAD)?;
    // A FIFO may give less at first.
    let mut head = Vec::new();
    input.by_ref().take(4).read_to_end(&mut head).map_err(|e| Error::io(format!("read {name}"), e))?;
    let gzip = head.starts_with(&[0x1f, 0x8b]);
    let other = [&[0x28, 0xb5, 0x2f, 0xfd][..], &[0xfd, b'7', b'z'], b"BZh"];
    if other.iter().any(|magic| head.starts_with(magic)) || gzip && kind == ReferenceKind::Tarfs {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{name} is compressed in a way that nothing can refer into it: want a {}; tar-rafs takes it",
                if kind == ReferenceKind::Tarfs { "plain tar" } else { "plain tar or a gzip file" }
            ),
        ));
    }
    let head = &head[..];
    let mut options = options.clone();
    options.data = DataOptions {
        codec: if kind == ReferenceKind::Tarfs { Codec::None } else { Codec::Gzip },
        digester: DigestAlgorithm::Sha256,
        placement: match kind {
            ReferenceKind::Tarfs => Placement::DecodedSpace,
            ReferenceKind::Layer | ReferenceKind::Estargz => Placement::Source,
        },
        batch_size: 0,
        cipher: None,
        ..options.data
    };
    let session = Session::new(options.data)?;
    let layer = session.layer(BlobSink::new("nowhere", std::io::sink()))?;
    let (tree, index) = if gzip {
        let mut indexer = GzipIndexer::new(head.chain(&mut input))?;
        let tree = read(name, &mut indexer, layer, kind)?;
        (tree, Some(indexer.finish().0))
    } else {
        (read(name, head.chain(&mut input), layer, kind)?, None)
    };
    let (source, len) = input.finish().map_err(|e| e.context(name.to_owned()))?.finish();
    let mut output = session.finish()?;
    let context = match kind {
        ReferenceKind::Layer | ReferenceKind::Estargz => {
            let slices = index.map(|index| place(&mut output, index)).transpose()?;
            Context::Separate { id: source, size: len, slices }
        }
        ReferenceKind::Tarfs if len.is_multiple_of(TAR_BLOCK) => {
            let id = match &options.blob_id {
                Some(id) => id.clone(),
                None => BlobId::new(&source.to_string())?,
            };
            Context::Tar { id, size: len }
        }
        ReferenceKind::Tarfs => {
            return Err(Error::bad_source(format!(
                "{name}: {len} bytes, want a multiple of {TAR_BLOCK}: the archive is cut short"
            )));
        }
    };
    let first = options.prefetch.resolve(&tree);
    let mut data = output
        .layers
        .into_iter()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Cancelled, "the build ended without its layer"))?;
    data.sink = sink;
    let parts = Parts { tree: &tree, content: &output.content, below: None, data, first: &first, context };
    Ok(BuiltReference { layer: finish(parts, &options)?, source })
}

fn read(name: &str, input: impl Read, mut layer: Layer, kind: ReferenceKind) -> Result<Tree> {
    // Places are those in the stream as it was decoded once.
    let estargz = kind == ReferenceKind::Estargz;
    let options = TarOptions { plain: true, estargz, ..TarOptions::default() };
    match tar::read_layer(name, input, &mut layer, options) {
        Ok(tree) => layer.finish().map(|()| tree),
        Err(error) => Err(layer.abort(error)),
    }
}

/// Builds the metadata of an eStargz layer from its `index` alone. Records say where in the layer,
/// which is called `id`, chunks lie; no blob is written.
///
/// `layer_size` is the length of the layer, needed if the index does not come from the layer itself.
///
/// # Errors
/// `Corrupt`: the index. `Unsupported`, `Limit`: what records can not refer to. `Invalid`: no size, or an
/// impossible chunk size.
pub fn build_indexed(
    name: &str,
    index: Index,
    id: BlobId,
    layer_size: Option<u64>,
    options: &LayerOptions,
) -> Result<BuiltLayer> {
    let size = match (index.layer_size, layer_size) {
        (Some(found), Some(stated)) if found != stated => {
            return Err(Error::invalid(format!("{name} has {found} bytes, --blob-data-size states {stated}")));
        }
        (found, stated) => found.or(stated).ok_or_else(|| {
            Error::invalid(format!(
                "{name} does not say where the layer ends: give the layer's length in hexadecimal as --blob-data-size"
            ))
        })?,
    };
    let mut options = options.clone();
    options.data = DataOptions {
        codec: Codec::Gzip,
        digester: DigestAlgorithm::Sha256,
        placement: Placement::Source,
        batch_size: 0,
        cipher: None,
        ..options.data
    };
    let mut collector = Collector::new(options.data.checked()?.chunk_size);
    read_entries(name, index.json, &mut collector)?;
    let Indexed { tree, content } = collector
        .finish(index.data_end.unwrap_or(size))
        .map_err(|e| e.context(format_args!("index {name}")))?;
    let first = options.prefetch.resolve(&tree);
    let data = LayerData { layer: LayerIndex(0), sink: BlobSink::new("nowhere", std::io::sink()) };
    let context = Context::Members { id, size };
    finish(Parts { tree: &tree, content: &content, below: None, data, first: &first, context }, &options)
}

/// Finds the slices of all chunks, and replaces their places in the tar by those in the gzip file.
fn place(output: &mut Output, index: GzipIndex) -> Result<SliceTable> {
    let chunks = &mut output.content.chunks;
    let count = chunks.len() as u32;
    let rows = |n: u32| {
        let chunk = output.content.row(crate::content::ChunkId(n));
        (chunk.compressed_offset, chunk.uncompressed_size)
    };
    let mut slices = index.slices((0..count).map(rows))?;
    let places = (0..count).map(|n| slices.place(rows(n).0)).collect();
    let (bytes, count) = slices.encode()?;
    output.content.chunks.place_in_slices(|at, len| slices.hint(at, len));
    Ok(SliceTable { places, bytes, count })
}
