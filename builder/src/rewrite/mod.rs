//! Images whose chunks move to other blobs; the tree stays as it is.
//!
//! ```text
//! bootstrap ─▶ tree, chunks ─▶ which chunks move ─┬─▶ carry: verified, into a new blob
//!                                                 └─▶ the same tree over the new places
//! ```
//!
//! The image root digest does not depend on where chunks lie, so it is compared before the new
//! bootstrap gets a name.

mod carry;
pub mod compact;
pub mod optimize;

use rafs::bootstrap::{Bootstrap, Buffer};
use rafs::format::blob_table::BlobRecord;
use rafs::format::features::ImageFlags;
use storage::codec::Codec;
use storage::digest::TaggedDigest;
use storage::extent::ChunkExtent;
use storage::ids::ChunkIndex;

use crate::bootstrap_v5;
use crate::bootstrap_writer::{self, Image};
use crate::content::{ChunkId, ChunkRow, ChunkSource as _};
use crate::image::ImageData;
use crate::load::LoadedChunks;
use crate::merge::{carried_records, shown_id};
use crate::root::check_written;
use crate::tree::{InodeId, LayerIndex, Tree};
use crate::{Error, Result};

/// An image with its chunks in other places.
#[derive(Debug)]
pub struct Rewritten {
    /// The bootstrap.
    pub bootstrap: Buffer,
    /// Names of its blobs in table order.
    pub blobs: Vec<String>,
    /// Version of the format, that of the image.
    pub fs_version: u32,
    /// Default compressor, that of the image.
    pub codec: Codec,
    /// Image root digest, that of the image; `None` if the digesters of its blobs differ.
    pub root: Option<TaggedDigest>,
}

/// An image read for being rewritten.
struct Source {
    data: ImageData,
    tree: Tree,
    chunks: LoadedChunks,
    prefetch: Vec<InodeId>,
    /// Blobs of the image itself: the first ones of `chunks`, in the order of its table.
    blob_count: usize,
}

impl Source {
    fn load(data: ImageData) -> Result<Self> {
        let bootstrap = &**data.rafs().bootstrap();
        let mut chunks = LoadedChunks::default();
        let (tree, prefetch) = chunks.load_image(bootstrap, &carried_records(bootstrap))?;
        let blob_count = chunks.blobs.len();
        Ok(Self { tree, chunks, prefetch, blob_count, data })
    }

    fn bootstrap(&self) -> &dyn Bootstrap {
        &**self.data.rafs().bootstrap()
    }

    /// Where the chunk lies as long as it has not moved.
    fn extent(&self, id: ChunkId) -> Result<(u32, ChunkExtent)> {
        let row = self.chunks.row(id);
        Ok((row.blob, self.data.rafs().chunk_extent(row.blob, ChunkIndex(row.index))?))
    }

    /// The chunks of all files, one file behind the other.
    fn file_chunks(&self) -> &[ChunkId] {
        self.chunks.layer_chunks(LayerIndex(0))
    }

    /// Adds a blob with what has moved there.
    fn add_blob(&mut self, record: BlobRecord, moved: impl Iterator<Item = (ChunkId, ChunkRow)>) {
        let blob = self.chunks.blobs.len() as u32;
        self.chunks.blobs.push(record);
        for (id, row) in moved {
            self.chunks.place(id, ChunkRow { blob, ..row });
        }
    }

    /// The bootstrap over the new places. `kept`: blobs that are listed first, used or not.
    fn finish(self, kept: &[usize]) -> Result<Rewritten> {
        let summary = self.bootstrap().summary();
        let explicit_ids = summary.flags.contains(ImageFlags::EXPLICIT_UID_GID);
        let write = if summary.fs_version == 5 { bootstrap_v5::write } else { bootstrap_writer::write };
        let written = write(&Image {
            tree: &self.tree,
            chunks: &self.chunks,
            blobs: &self.chunks.blobs,
            chunk_size: summary.chunk_size,
            codec: summary.codec,
            digester: summary.digester,
            explicit_ids,
            tarfs: summary.flags.contains(ImageFlags::TARFS_MODE),
            force_xattr_flag: summary.flags.contains(ImageFlags::HAS_XATTR),
            kept,
            prefetch: &self.prefetch,
            prefetch_sizes: &[],
        })?;
        let one_digester = self.bootstrap().blobs().iter().all(|blob| blob.digester == summary.digester);
        let root = match one_digester {
            true => Some(
                rafs::merkle::image_root(self.bootstrap())
                    .map_err(|e| Error::from(e).context("root digest of the image"))?,
            ),
            false => None,
        };
        check_written(&written.bytes, root)?;
        Ok(Rewritten {
            blobs: written.blobs.iter().map(|&blob| shown_id(&self.chunks.blobs[blob])).collect(),
            bootstrap: written.bytes,
            fs_version: summary.fs_version,
            codec: summary.codec,
            root,
        })
    }
}
