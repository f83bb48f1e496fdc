//! The data of an image: where its blobs are, what is needed to find chunks in them.

use std::sync::Arc;

use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Blob, Bootstrap};
use rafs::format::features::BlobFeatures;
use rafs::fs::{Rafs, RafsOptions};
use storage::backend::{Backend, BlobSource, ReadContext};
use storage::engine::Engine;
use storage::extent::ChunkExtent;
use storage::ids::ByteRange;
use storage::read::OutagePolicy;
use tokio_util::sync::CancellationToken;

use super::stream::ChunkStream;
use crate::Result;

/// How an image's data is read.
#[derive(Clone, Debug, Default)]
pub struct DataOptions {
    /// Read chunks that the image has no digest for.
    pub allow_unverified: bool,
    /// Fetch every context there is, not only those that are needed to find chunks: to have it checked.
    pub every_context: bool,
    /// Ends all reading.
    pub cancel: CancellationToken,
}

/// An image with its blobs at hand.
pub struct ImageData {
    pub(super) engine: Arc<Engine>,
    pub(super) backends: Vec<Arc<dyn Backend>>,
    pub(super) options: DataOptions,
    rafs: Rafs,
}

impl ImageData {
    /// Joins the tree with the blobs at `source`. Unless all are asked for, fetches only the contexts
    /// that are needed to find chunks.
    ///
    /// # Errors
    /// `Storage`, `NotFound`, `Io`: a context can not be fetched. `Rafs`: it is damaged, or the
    /// image has no digests and that is not allowed.
    pub fn open(
        engine: Arc<Engine>,
        bootstrap: Arc<dyn Bootstrap>,
        source: &dyn BlobSource,
        options: DataOptions,
    ) -> Result<Self> {
        let mut backends = Vec::with_capacity(bootstrap.blobs().len());
        for blob in bootstrap.blobs() {
            backends.push(source.blob_of_size(&blob.id, blob.compressed_size)?);
        }
        let mut contexts = Vec::with_capacity(backends.len());
        let needed = Rafs::needs_context(&*bootstrap);
        for ((blob, backend), needed) in bootstrap.blobs().iter().zip(&backends).zip(needed) {
            if !(needed || options.every_context && has_context(blob)) {
                contexts.push(None);
                continue;
            }
            let context = read_context(&options.cancel);
            let holder = match &blob.context_id {
                Some(id) => source.blob(id)?,
                None => Arc::clone(backend),
            };
            let stored = engine
                .fetch(&*holder, stored_range(blob)?, &context)
                .map_err(|e| crate::Error::from(e).context(format!("context of blob {}", blob.id)))?;
            contexts.push(Some(BlobContext::from_stored(blob, &stored)?));
        }
        let rafs_options = RafsOptions { allow_unverified: options.allow_unverified };
        let rafs = Rafs::new(bootstrap, contexts, rafs_options)?;
        Ok(Self { engine, backends, options, rafs })
    }

    /// The tree, and where chunks lie.
    pub fn rafs(&self) -> &Rafs {
        &self.rafs
    }

    /// What ends all reading.
    pub fn cancel(&self) -> &CancellationToken {
        &self.options.cancel
    }

    /// Bytes `range` of a blob as they are stored, not verified. The caller bounds the range.
    ///
    /// # Errors
    /// `Corrupt`: there is no such blob. Those of the source.
    pub fn read_stored(&self, blob: u32, range: ByteRange) -> Result<Vec<u8>> {
        let backend = self.backends.get(blob as usize);
        let backend = backend.ok_or_else(|| crate::Error::bad_source(format!("there is no blob {blob}")))?;
        Ok(self.engine.fetch(&**backend, range, &read_context(&self.options.cancel))?)
    }

    /// The bytes of `chunks` (blob and extent), in that order, each verified.
    pub fn stream<I>(&self, chunks: I) -> ChunkStream<'_, I>
    where
        I: Iterator<Item = Result<(u32, ChunkExtent)>>,
    {
        ChunkStream::new(self, chunks)
    }
}

/// True if a blob's context is in some blob. That of an original layer need not be.
fn has_context(blob: &Blob) -> bool {
    let separate = blob.features.contains(BlobFeatures::SEPARATE);
    blob.has_context() && !(separate && blob.context_id.is_none())
}

/// A read that somebody waits for.
pub(super) fn read_context(cancel: &CancellationToken) -> ReadContext {
    ReadContext { cancel: cancel.clone(), ..ReadContext::on_demand(OutagePolicy::DEFAULT.deadline()) }
}
