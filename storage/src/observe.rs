//! What happened to each fetched chunk and when, for whoever wants to explain a slow start.

use std::time::Instant;

use crate::Error;
use crate::backend::Supplier;
use crate::ids::{BlobId, ChunkIndex};

/// One chunk whose fetch has ended. The moments are in order; one that was never reached
/// has the value of the one before it.
#[derive(Clone, Copy, Debug)]
pub struct Fetched<'a> {
    /// The blob.
    pub blob: &'a BlobId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Its part of the stored bytes of its unit: [`crate::extent::ChunkExtent::stored_share`].
    pub stored: u64,
    /// A reader waited for it; else it was fetched ahead.
    pub demanded: bool,
    /// Who served it, if somebody answered.
    pub supplier: Option<Supplier>,
    /// Somebody wanted it.
    pub wanted: Instant,
    /// The request that brought it went out: until then it waited for its turn.
    pub requested: Instant,
    /// The first byte of the answer came.
    pub answered: Instant,
    /// The last byte of its unit came.
    pub received: Instant,
    /// It was decoded and compared with its digest; its readers are answered next.
    pub verified: Instant,
    /// Why it did not come.
    pub error: Option<&'a Error>,
}

/// Told of every fetch on threads of the engine: it must be quick and must not block.
pub trait Observer: Send + Sync + 'static {
    /// A chunk came, or did not.
    fn fetched(&self, event: &Fetched<'_>);

    /// A reader that had waited got bytes of this chunk, and others perhaps, from the data
    /// file: they were there already, or another process had fetched them.
    fn copied(&self, blob: &BlobId, chunk: ChunkIndex, began: Instant, ended: Instant) {
        let _ = (blob, chunk, began, ended);
    }
}
