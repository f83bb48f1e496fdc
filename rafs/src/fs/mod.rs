//! Lookup, attributes, directories, reads and xattrs of one mounted image.
//!
//! [`Rafs`] joins a bootstrap with the blob contexts it needs and turns file ranges into
//! slices of chunks; the bytes themselves are `storage`'s. Lookup, attributes, directory
//! entries and link targets are the bootstrap's own methods, see [`Rafs::bootstrap`].

mod read;
mod xattr;

use std::sync::Arc;

use storage::ids::ChunkIndex;

use crate::blob_context::BlobContext;
use crate::bootstrap::{Blob, Bootstrap};
use crate::format::limits::MAX_NAME_LEN;
use crate::{Error, ErrorKind, Result};

pub use read::SeekKind;

/// Choices of whoever mounts an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct RafsOptions {
    /// Show an image although it has no digest for some of its chunks.
    pub allow_unverified: bool,
}

/// Numbers of the whole file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statfs {
    /// Block size in bytes.
    pub block_size: u32,
    /// Blocks of bootstrap and decoded blobs; none is free.
    pub blocks: u64,
    /// Entries of the image with its root; none is free.
    pub files: u64,
    /// Longest name in bytes.
    pub name_max: u32,
}

/// One image: a validated bootstrap and what reads of its blobs need.
#[derive(Debug)]
pub struct Rafs {
    bootstrap: Arc<dyn Bootstrap>,
    /// By blob; present where [`Rafs::needs_context`] says so.
    contexts: Vec<Option<BlobContext>>,
}

impl Rafs {
    /// Joins a bootstrap with the contexts of its blobs, one place per blob.
    ///
    /// # Errors
    /// `Unsupported`: chunks without digests, unless allowed. `Invalid`: a context that
    /// [`Rafs::needs_context`] asks for is missing. `Corrupt`: a context contradicts the
    /// bootstrap's chunk records.
    pub fn new(
        bootstrap: Arc<dyn Bootstrap>,
        mut contexts: Vec<Option<BlobContext>>,
        options: RafsOptions,
    ) -> Result<Self> {
        contexts.resize_with(bootstrap.blobs().len(), || None);
        let needed = Self::needs_context(&*bootstrap);
        for (number, (blob, needed)) in (0u32..).zip(bootstrap.blobs().iter().zip(needed)) {
            if blob.unverified_chunks > 0 && !options.allow_unverified {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "blob {}: the image has no digests for {} of its chunk references, so they can not be \
                         verified; build it with a chunk table, or accept that with --allow-unverified",
                        blob.id, blob.unverified_chunks
                    ),
                ));
            }
            match &contexts[number as usize] {
                None if needed => {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("the context of blob {} is missing", blob.id),
                    ));
                }
                None => {}
                Some(context) => check_agreement(&*bootstrap, number, blob, context)?,
            }
        }
        Ok(Self { bootstrap, contexts })
    }

    /// Says for each blob whether its context must be fetched before the first read.
    pub fn needs_context(bootstrap: &dyn Bootstrap) -> Vec<bool> {
        bootstrap.blobs().iter().map(Blob::needs_context).collect()
    }

    /// The tree.
    pub fn bootstrap(&self) -> &Arc<dyn Bootstrap> {
        &self.bootstrap
    }

    /// True if some chunk has no digest, so that its data is shown unverified.
    pub fn is_unverified(&self) -> bool {
        self.bootstrap.blobs().iter().any(|b| b.unverified_chunks > 0)
    }

    /// Numbers of the whole file system.
    pub fn statfs(&self) -> Statfs {
        let summary = self.bootstrap.summary();
        let block_size = u64::from(summary.block_size);
        let data: u64 = self.bootstrap.blobs().iter().map(|b| b.decoded_size / block_size).sum();
        Statfs {
            block_size: summary.block_size,
            blocks: data + summary.bootstrap_size / block_size,
            files: summary.inode_count,
            name_max: MAX_NAME_LEN as u32,
        }
    }
}

/// Both the bootstrap and the blob say where chunks lie; they must say the same.
fn check_agreement(bootstrap: &dyn Bootstrap, number: u32, blob: &Blob, context: &BlobContext) -> Result<()> {
    if context.chunk_count() != blob.chunk_count {
        return Err(Error::corrupt(format!("context of blob {}: {} chunks", blob.id, context.chunk_count())));
    }
    for index in (0..blob.chunk_count).map(ChunkIndex) {
        let Some(record) = bootstrap.chunk_info(number, index) else { continue };
        let entry = context.entry(index)?;
        if entry.uncompressed_offset != record.uncompressed_offset.get()
            || entry.uncompressed_size != record.uncompressed_size.get()
        {
            return Err(Error::corrupt(format!(
                "blob {}: chunk {index} has {} bytes at {} in its context, {} at {} in the bootstrap",
                blob.id,
                entry.uncompressed_size,
                entry.uncompressed_offset,
                record.uncompressed_size,
                record.uncompressed_offset
            )));
        }
    }
    Ok(())
}
