//! File bytes in, blob data out: chunk, hash, de-duplicate, compress and write on all cores.
//!
//! ```text
//! layer threads          pool                committer               pool            committer
//! add_file ─▶ batch ─▶ digest, CRC ─▶ which chunks are new? ─▶ compress the new ─▶ append to the
//! (~1 MiB of chunks)                  (layer order, then                            layer's sink
//!                                      stream order)
//! ```
//!
//! A [`Session`] is one build. Each layer gets a [`Layer`] handle, to be driven by a thread of its
//! own; small files share a batch, so that the cost of handing work over is paid per MiB and not
//! per file.
//!
//! Invariants:
//!
//! - What is stored, and where, is decided by the one committer thread: layers in the order they
//!   were opened, batches of a layer in stream order. The output is the same at any thread count.
//! - A batch lives in one buffer from reading to writing: compressed chunks are compacted in place,
//!   because a stored chunk is never longer than its bytes. Encrypted ones may be, and chunks that
//!   share a unit come from several batches: these are packed into a second buffer of the same
//!   size. So memory is the number of buffers, and that is fixed ([`hub::Limits`]).
//! - Layers that are not next to be decided may read ahead until the shared buffers are used up;
//!   the next one to be decided has a reserve of its own and so always makes progress.
//! - The first failure anywhere (source, sink, panic) ends everything: every wait is on the hub's
//!   one lock and is woken by it, and [`Session::finish`] returns that first error.

mod batch;
mod committer;
mod hub;
mod layer;
mod pack;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rafs::format::limits::{MAX_CHUNK_SIZE, MIN_CHUNK_SIZE};
use storage::cipher::XtsKey;
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;

use crate::chunks::BuiltContent;
use crate::layered::Below;
use crate::sink::BlobSink;
use crate::tree::LayerIndex;
use crate::{Error, ErrorKind, Result};
use hub::Hub;
pub use layer::{Extent, Layer};

/// Most worker threads; more are of no use to one committer, and memory is promised per thread.
const MAX_THREADS: usize = 256;

/// Where the data of files comes to lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In the layer's blob.
    #[default]
    Blob,
    /// It stays in the decoded source, and nothing is written. Equal chunks are one.
    Source,
    /// The same, and the source is the decoded space: every chunk lies there where it lies in the
    /// source, so equal ones are not one.
    DecodedSpace,
}

/// How data is cut, named and stored.
#[derive(Clone, Copy, Debug)]
pub struct DataOptions {
    /// Compression of chunks.
    pub codec: Codec,
    /// Digest of chunks.
    pub digester: DigestAlgorithm,
    /// Bytes of every chunk but the last of a file: a power of two, 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Worker threads that hash and compress, at most 256; 0 means one per core.
    pub threads: usize,
    /// Where it comes to lie.
    pub placement: Placement,
    /// Bytes of a unit of small files that are compressed together: a power of two up to the chunk
    /// size, or 0 for none.
    pub batch_size: u32,
    /// What stored bytes are encrypted with.
    pub cipher: Option<XtsKey>,
}

impl DataOptions {
    /// Checks the options and resolves `threads`.
    pub(crate) fn checked(mut self) -> Result<Self> {
        if !self.chunk_size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&self.chunk_size)
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "chunk size {:#x}: want a power of two from {MIN_CHUNK_SIZE:#x} to {MAX_CHUNK_SIZE:#x}",
                    self.chunk_size
                ),
            ));
        }
        if self.batch_size != 0
            && (!self.batch_size.is_power_of_two()
                || !(MIN_CHUNK_SIZE..=self.chunk_size).contains(&self.batch_size))
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "batch size {:#x}: want 0 or a power of two from {MIN_CHUNK_SIZE:#x} to the chunk size, {:#x}",
                    self.batch_size, self.chunk_size
                ),
            ));
        }
        // Their context states stored sizes in 24 bits.
        let wide = self.batch_size != 0 || self.cipher.is_some() || self.placement == Placement::Source;
        if wide && self.chunk_size == MAX_CHUNK_SIZE {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "chunk size {MAX_CHUNK_SIZE:#x} can not be combined with batches, encryption or references: use {:#x}",
                    MAX_CHUNK_SIZE / 2
                ),
            ));
        }
        if self.codec == Codec::Gzip && self.placement == Placement::Blob {
            return Err(Error::new(
                ErrorKind::Invalid,
                "compressor gzip: want none, lz4_block or zstd; gzip exists in reference images only",
            ));
        }
        if self.threads == 0 {
            self.threads = std::thread::available_parallelism().map_or(1, usize::from);
        }
        self.threads = self.threads.min(MAX_THREADS);
        Ok(self)
    }
}

/// The data of one layer after the build: section 1 of its blob is in the sink.
#[derive(Debug)]
pub struct LayerData {
    /// Which layer; its chunks are [`crate::chunks::ChunkStore::of_layer`]. A layer without chunks has no blob.
    pub layer: LayerIndex,
    /// The sink, ready for the sections that follow the chunk data.
    pub sink: BlobSink,
}

/// Takes each layer whose data is all stored, lowest first, while those above are on their way. Of what the
/// build knows by then, chunks and files of layers up to this one are final. An error ends the build.
pub type Finisher = Box<dyn FnMut(&BuiltContent, LayerData) -> Result<()> + Send>;

/// What a build knows at its end.
pub struct Output {
    /// Every distinct chunk, and which chunks each file is made of.
    pub content: BuiltContent,
    /// One per layer, in order; none of those that a [`Finisher`] took.
    pub layers: Vec<LayerData>,
}

/// One build: the pool, the committer, and what they share.
pub struct Session {
    hub: Arc<Hub>,
    workers: Vec<JoinHandle<()>>,
    committer: Option<JoinHandle<Option<BuiltContent>>>,
    /// Layers that are complete and that nobody took.
    layers: Arc<Mutex<Vec<LayerData>>>,
}

impl Session {
    /// Starts the threads of a build.
    ///
    /// # Errors
    /// `Invalid`: an option is out of range. `Io`: a thread cannot be started.
    pub fn new(options: DataOptions) -> Result<Self> {
        Self::upon(options, None)
    }

    /// The same; layers go to `finisher`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn finishing(options: DataOptions, finisher: Finisher) -> Result<Self> {
        Self::start(options, None, finisher, Arc::default())
    }

    /// The same for a layer that does not store the chunks of `below` again.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn upon(options: DataOptions, below: Option<Arc<Below>>) -> Result<Self> {
        let layers: Arc<Mutex<Vec<LayerData>>> = Arc::default();
        let kept = Arc::clone(&layers);
        let keep = move |_: &BuiltContent, layer| {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(layer);
            Ok(())
        };
        Self::start(options, below, Box::new(keep), layers)
    }

    fn start(
        options: DataOptions,
        below: Option<Arc<Below>>,
        finisher: Finisher,
        layers: Arc<Mutex<Vec<LayerData>>>,
    ) -> Result<Self> {
        let options = options.checked()?;
        let hub = Arc::new(Hub::new(options, below));
        let mut session = Self { hub: Arc::clone(&hub), workers: Vec::new(), committer: None, layers };
        for number in 0..options.threads {
            let hub = Arc::clone(&hub);
            let thread = std::thread::Builder::new()
                .name(format!("build-{number}"))
                .spawn(move || worker::run(&hub))
                .map_err(|e| Error::io("start a build thread", e))?;
            session.workers.push(thread);
        }
        let thread = std::thread::Builder::new()
            .name("build-commit".into())
            .spawn(move || committer::run(&hub, finisher))
            .map_err(|e| Error::io("start the commit thread", e))?;
        session.committer = Some(thread);
        Ok(session)
    }

    /// Opens the next layer; its chunk data goes to `sink`.
    ///
    /// Layers are decided in the order they are opened, so a thread that drives several must do so
    /// in that order, one after the other.
    ///
    /// # Errors
    /// The first error of the build, if it has failed already. `Limit`: too many layers.
    pub fn layer(&self, sink: BlobSink) -> Result<Layer> {
        let index = self.hub.open_layer(sink)?;
        Ok(Layer::new(Arc::clone(&self.hub), index))
    }

    /// Waits for all data to be written. Every layer must have been finished before.
    ///
    /// # Errors
    /// The first error of the build, whoever met it. `Invalid`: a layer is still open.
    pub fn finish(mut self) -> Result<Output> {
        self.hub.request_finish();
        let content = self.committer.take().and_then(|thread| thread.join().ok().flatten());
        match (self.hub.failure(), content) {
            (None, Some(content)) => {
                let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(Output { content, layers: std::mem::take(&mut *layers) })
            }
            (Some(error), _) => Err(error),
            (None, None) => Err(Error::new(ErrorKind::Cancelled, "the build was given up")),
        }
        // Dropping self stops and joins the pool.
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.close();
        // A panic of these threads was turned into the build's failure where it happened.
        if let Some(thread) = self.committer.take() {
            let _ = thread.join();
        }
        for thread in self.workers.drain(..) {
            let _ = thread.join();
        }
    }
}
