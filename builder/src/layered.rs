//! What a layer is built upon: chunks that exist already, and the tree below.

use rafs::bootstrap::Bootstrap;
use rafs::format::features::{BlobFeatures, ImageFlags};
use storage::digest::{Digest, DigestAlgorithm};

use crate::content::{ChunkId, ChunkRow, ChunkSource};
use crate::id_table::IdTable;
use crate::load::LoadedChunks;
use crate::merge::carried_records;
use crate::tree::{Content, FileId, InodeId, LayerIndex, Tree};
use crate::{Error, ErrorKind, Result};

/// What the images below must have in common with the layer.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    /// Version of the format: 5 or 6.
    pub fs_version: u32,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Digest of chunks.
    pub digester: DigestAlgorithm,
    /// Owners are meaningful.
    pub explicit_ids: bool,
}

/// Chunks of a dictionary and of a parent, and the parent's tree.
pub struct Below {
    pub(crate) chunks: LoadedChunks,
    pub(crate) parent: Option<Tree>,
    /// Places of the parent's blobs, which stay in the image whether it uses them or not.
    pub(crate) kept: Vec<usize>,
    layers: u16,
    by_digest: IdTable,
}

impl Below {
    /// Reads `dictionary`, whose chunks are not stored again, and `parent`, onto which the layer
    /// is put. A dictionary with another digester has no chunk in common with the layer and is
    /// passed over.
    ///
    /// # Errors
    /// `Inconsistent`: an image differs in what it must have in common. Those of
    /// [`LoadedChunks::load`].
    pub fn load(
        dictionary: Option<&dyn Bootstrap>,
        parent: Option<&dyn Bootstrap>,
        common: &Common,
    ) -> Result<Self> {
        let mut this = Self {
            chunks: LoadedChunks::default(),
            parent: None,
            kept: Vec::new(),
            layers: 0,
            by_digest: IdTable::default(),
        };
        if let Some(dictionary) = dictionary {
            agrees("the chunk dictionary", dictionary, common)?;
            if dictionary.summary().digester == common.digester {
                this.add(dictionary).map_err(|e| e.context("read the chunk dictionary"))?;
            } else {
                tracing::warn!(
                    "the chunk dictionary has {} digests, the layer {}: it is of no use",
                    dictionary.summary().digester,
                    common.digester
                );
            }
        }
        if let Some(parent) = parent {
            agrees("the parent bootstrap", parent, common)?;
            if parent.summary().digester != common.digester {
                return Err(Error::new(
                    ErrorKind::Inconsistent,
                    format!(
                        "the parent bootstrap has {} digests, the layer {}: give --digester {0}",
                        parent.summary().digester,
                        common.digester
                    ),
                ));
            }
            let tree = this.add(parent).map_err(|e| e.context("read the parent bootstrap"))?;
            this.kept = parent
                .blobs()
                .iter()
                .filter_map(|blob| {
                    let id = crate::bootstrap_writer::padded_id(blob.id.as_str());
                    this.chunks.blobs.iter().position(|record| record.blob_id == id)
                })
                .collect();
            this.parent = Some(tree);
        }
        Ok(this)
    }

    fn add(&mut self, bootstrap: &dyn Bootstrap) -> Result<Tree> {
        let first = self.chunks.chunk_count() as u32;
        let tree = self.chunks.load(bootstrap, &carried_records(bootstrap))?;
        self.layers += 1;
        for id in (first..self.chunks.chunk_count() as u32).map(ChunkId) {
            let row = self.chunks.row(id);
            // Of equal chunks the first stays: the dictionary's.
            if self.find(&row.digest, row.uncompressed_size).is_none() {
                let key = (row.digest, row.uncompressed_size);
                self.by_digest.insert(&key, id, |other| content_of(&self.chunks, other));
            }
        }
        Ok(tree)
    }

    /// The chunk with this digest and length.
    pub(crate) fn find(&self, digest: &Digest, len: u32) -> Option<ChunkId> {
        self.by_digest.find(&(*digest, len), |id| content_of(&self.chunks, id))
    }

    /// Number of chunks: those of the layer are numbered from here.
    pub(crate) fn chunk_count(&self) -> u32 {
        self.chunks.chunk_count() as u32
    }

    /// Makes the files of a layer's tree known as those of the layer above all of these.
    pub(crate) fn lift(&self, tree: &mut Tree) {
        for id in (0..tree.inode_count() as u32).map(InodeId) {
            if let Content::Regular { file, .. } = &mut tree.inode_mut(id).content {
                file.layer = LayerIndex(file.layer.0 + self.layers);
            }
        }
    }
}

/// What makes two chunks the same.
fn content_of(chunks: &LoadedChunks, id: ChunkId) -> (Digest, u32) {
    let row = chunks.row(id);
    (row.digest, row.uncompressed_size)
}

/// Chunks below, then those of the layer.
pub(crate) struct Layered<'a> {
    pub below: &'a Below,
    pub built: &'a dyn ChunkSource,
}

impl ChunkSource for Layered<'_> {
    fn file_chunks(&self, file: FileId) -> &[ChunkId] {
        match file.layer.0.checked_sub(self.below.layers) {
            None => self.below.chunks.file_chunks(file),
            Some(layer) => self.built.file_chunks(FileId { layer: LayerIndex(layer), ..file }),
        }
    }

    fn row(&self, id: ChunkId) -> ChunkRow {
        if id.0 < self.below.chunk_count() {
            return self.below.chunks.row(id);
        }
        let row = self.built.row(id);
        ChunkRow { blob: row.blob + self.below.chunks.blobs.len() as u32, ..row }
    }

    fn chunk_count(&self) -> usize {
        self.below.chunks.chunk_count() + self.built.chunk_count()
    }
}

fn agrees(what: &str, bootstrap: &dyn Bootstrap, common: &Common) -> Result<()> {
    let summary = bootstrap.summary();
    let explicit_ids = summary.flags.contains(ImageFlags::EXPLICIT_UID_GID);
    let tar = bootstrap.blobs().iter().any(|blob| blob.features.contains(BlobFeatures::TARFS));
    let differs = if summary.fs_version != common.fs_version {
        format!("is RAFS version {}, the layer {}", summary.fs_version, common.fs_version)
    } else if summary.chunk_size != common.chunk_size {
        format!("has chunks of {:#x}, the layer of {:#x}", summary.chunk_size, common.chunk_size)
    } else if explicit_ids != common.explicit_ids {
        "differs from the layer in whether owners are stored (--repeatable)".to_owned()
    } else if tar {
        "refers to a plain tar, whose blocks are others".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Inconsistent, format!("{what} {differs}; build both with the same options")))
}
