//! Start-up traces: which chunks a container reads when it starts, in which order.
//!
//! The first start of an image on a node is recorded; the next one fetches the same chunks in
//! the same order, ahead of its reads.
//!
//! ```text
//! READ ──touch──▶ Recorder ──end──▶ merge with the older trace ──▶ <work_dir>/<sha256>.trace
//!                                                                          │ next mount
//!                 prefetch (Class::Trace) ◀── order of chunks ◀── checked ◀┘
//! ```
//!
//! - [`record`]: one bit a chunk and 8 bytes a touched chunk; hits and misses alike, so that a
//!   start from a warm cache is recorded as well as a cold one.
//! - Recording begins with the first READ and ends by itself: after [`Limits::longest`], when
//!   no new chunk was touched for [`Limits::idle`], after [`MAX_CHUNKS`] chunks, or with the
//!   mount.
//! - [`document`]: a trace as JSON. It belongs to one bootstrap; whatever is read back is
//!   checked against the image that is mounted, and ignored with a warning if it does not fit.
//! - [`Trace::merged`]: what several starts of the image have in common goes first.
//! - [`share`]: a trace in the registry, for other nodes.
//! - [`files`]: the same as ranges of files, for people and for `nydus-image optimize`.

mod document;
pub mod files;
mod record;
pub mod share;
mod store;
#[cfg(test)]
mod tests;

use crate::words::counted;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rafs::fs::Rafs;
use storage::digest::{Digest, TaggedDigest};
use storage::engine::{Engine, Handle};
use storage::ids::ChunkIndex;
use storage::prefetch::Order;
use storage::read::ReadSlice;
use tokio::sync::Notify;

pub use document::{Document, Identity, MAX_DOCUMENT};
use record::Recorder;
use share::Share;

/// Chunks in a trace at most: 16 GiB in chunks of 256 KiB, more than any start reads.
pub const MAX_CHUNKS: usize = 1 << 16;

/// Starts that a trace remembers: a chunk that none of so many has touched is forgotten.
const STARTS: u8 = 8;

/// What is done about traces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Record starts, and fetch ahead what earlier ones read.
    #[default]
    On,
    /// Record starts and do nothing else.
    Record,
    /// Nothing.
    Off,
}

impl Mode {
    /// The word for it in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Record => "record",
            Self::Off => "off",
        }
    }
}

/// When recording ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// After the first read.
    pub longest: Duration,
    /// After the last read that touched a new chunk.
    pub idle: Duration,
}

impl Default for Limits {
    /// A minute, and ten seconds.
    fn default() -> Self {
        Self { longest: Duration::from_secs(60), idle: Duration::from_secs(10) }
    }
}

/// A chunk of the image: place of its blob in the blob table, place in the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Chunk {
    /// Row of the blob table.
    pub blob: u32,
    /// Chunk of that blob.
    pub index: u32,
}

/// A chunk of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The chunk.
    pub chunk: Chunk,
    /// Which of the last eight starts touched it; bit 0 is the last start. Never 0.
    pub history: u8,
}

/// What starts of one image read, most wanted first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Starts it was made from, at most 8; of older ones nothing is known.
    pub starts: u8,
    /// Each chunk once, at most [`MAX_CHUNKS`].
    pub entries: Vec<Entry>,
}

impl Trace {
    /// This trace with one more start, which touched `order`.
    ///
    /// The new start's chunks come in its order, then those of earlier ones in theirs; a chunk
    /// that only one of several starts touched comes behind all others.
    #[must_use]
    pub fn merged(&self, order: &[Chunk]) -> Self {
        let mut earlier: std::collections::HashMap<Chunk, u8> =
            self.entries.iter().map(|entry| (entry.chunk, entry.history)).collect();
        let mut entries: Vec<Entry> = order
            .iter()
            .map(|&chunk| Entry { chunk, history: earlier.remove(&chunk).unwrap_or(0) << 1 | 1 })
            .collect();
        entries.extend(self.entries.iter().filter(|entry| earlier.contains_key(&entry.chunk)).filter_map(
            |entry| {
                let history = entry.history << 1;
                (history != 0).then_some(Entry { history, ..*entry })
            },
        ));
        let starts = STARTS.min(self.starts.saturating_add(1));
        // Stable: order is kept on both sides.
        entries.sort_by_key(|entry| starts > 1 && entry.history.is_power_of_two());
        entries.truncate(MAX_CHUNKS);
        Self { starts, entries }
    }

    /// The chunks to fetch, in order; those of which nothing says where they lie are left out.
    pub fn order(&self, rafs: &Arc<Rafs>) -> Order {
        let rafs = Arc::clone(rafs);
        let chunks: Vec<Chunk> = self.entries.iter().map(|entry| entry.chunk).collect();
        Box::new(chunks.into_iter().filter_map(move |chunk| {
            let extent = rafs.chunk_extent(chunk.blob, ChunkIndex(chunk.index)).ok()?;
            Some((chunk.blob, extent))
        }))
    }
}

/// What a [`Tracer`] is made of.
#[derive(Debug)]
pub struct TracerSpec<'a> {
    /// What to do.
    pub mode: Mode,
    /// When to end.
    pub limits: Limits,
    /// Where the trace is kept.
    pub work_dir: &'a Path,
    /// SHA-256 of the bootstrap.
    pub bootstrap: Digest,
    /// The image root digest, if it is known already.
    pub root: Option<TaggedDigest>,
    /// The image.
    pub rafs: Arc<Rafs>,
    /// Where other nodes find it.
    pub share: Option<Share>,
}

/// The trace of one mount: records it, keeps it, knows the earlier one.
#[derive(Debug)]
pub struct Tracer {
    shared: Arc<Shared>,
}

struct Shared {
    mode: Mode,
    limits: Limits,
    path: PathBuf,
    rafs: Arc<Rafs>,
    identity: Identity,
    root: OnceLock<Option<TaggedDigest>>,
    recorder: Recorder,
    /// The earlier trace; merged with this start's once recording has ended. Taken before the
    /// recorder's list, and never held while a disk is waited for.
    trace: Mutex<Option<Arc<Trace>>>,
    /// Told of the first touched chunk, of the last possible one, and of the end.
    wake: Arc<Notify>,
    share: Option<Share>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").field("mode", &self.mode).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Tracer {
    /// Reads the earlier trace, if there is one that fits, and gets ready to record.
    pub fn open(engine: &Engine, spec: TracerSpec<'_>) -> Self {
        let tracer = Self::new(spec);
        if tracer.shared.mode != Mode::Off {
            let handle = engine.handle().clone();
            let shared = Arc::clone(&tracer.shared);
            engine.spawn(async move {
                shared.wait_for_end().await;
                let recorded = Arc::clone(&shared);
                // A mount that ends at the same time has saved it already.
                let saved = handle.blocking(move || recorded.finish()).await;
                if saved.unwrap_or(false) && shared.share.as_ref().is_some_and(|share| share.push) {
                    match shared.push().await {
                        Ok(Some(digest)) => tracing::info!("the trace was pushed as {digest}"),
                        Ok(None) => {}
                        Err(e) => tracing::warn!("the trace was not pushed: {e:#}"),
                    }
                }
            });
        }
        tracer
    }

    fn new(spec: TracerSpec<'_>) -> Self {
        let TracerSpec { mode, limits, work_dir, bootstrap, root, rafs, share } = spec;
        let identity = Identity::new(bootstrap, rafs.bootstrap().blobs());
        let path = work_dir.join(format!("{bootstrap}.trace"));
        let wake = Arc::<Notify>::default();
        let (recorder, trace) = match mode {
            Mode::Off => (Recorder::off(), None),
            Mode::On | Mode::Record => {
                let recorder = Recorder::new(identity.chunk_counts(), Arc::clone(&wake));
                (recorder, store::load(&path, &identity).map(Arc::new))
            }
        };
        let shared = Shared {
            mode,
            limits,
            path,
            rafs,
            identity,
            root: root.map_or_else(OnceLock::new, |root| OnceLock::from(Some(root))),
            recorder,
            trace: Mutex::new(trace),
            wake,
            share,
        };
        Self { shared: Arc::new(shared) }
    }

    /// A tracer that does nothing, for tests.
    #[cfg(test)]
    pub(crate) fn off(rafs: Arc<Rafs>) -> Self {
        Self::new(TracerSpec {
            mode: Mode::Off,
            limits: Limits::default(),
            work_dir: Path::new("/nonexistent"),
            bootstrap: Digest([0; 32]),
            root: None,
            rafs,
            share: None,
        })
    }

    /// A read wants these chunks.
    pub fn touch(&self, slices: &[ReadSlice]) {
        self.shared.recorder.touch(slices);
    }

    /// What to fetch ahead of this start, if that is wanted and something is known.
    pub fn earlier(&self) -> Option<Arc<Trace>> {
        (self.shared.mode == Mode::On).then(|| self.shared.trace())?
    }

    /// What is known by now: earlier starts and this one.
    pub fn current(&self) -> Option<Trace> {
        self.shared.current()
    }

    /// Asks the registry for a trace, unless this node has one, and makes it the earlier one.
    /// Answers it if it is still of use.
    pub fn pull(&self) -> impl Future<Output = Option<Arc<Trace>>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move { shared.pull().await }
    }

    /// Pushes what is known by now. Answers the digest of the artifact, `None` if the registry
    /// knows as much.
    ///
    /// # Errors
    /// Nothing is known, the image does not come from a registry by name, or the registry's own.
    pub async fn push(&self, engine: &Handle) -> anyhow::Result<Option<String>> {
        let shared = Arc::clone(&self.shared);
        // On the engine: the control plane may be busy, and its runtime drives no registry.
        engine.spawn(async move { shared.push().await }).await?
    }

    /// [`Tracer::current`] as a document.
    pub fn document(&self) -> Option<Document> {
        let complete = !self.shared.recorder.is_on();
        self.current().map(|trace| self.shared.document(&trace, complete))
    }

    /// Ends recording and keeps what was recorded; of no effect the second time.
    pub fn finish(&self) {
        self.shared.finish();
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.shared.recorder.stop();
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn trace(&self) -> Option<Arc<Trace>> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn current(&self) -> Option<Trace> {
        let earlier = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: what is recorded is in one of the two.
        let order = self.recorder.order();
        match order.is_empty() {
            true => earlier.as_deref().cloned(),
            false => Some(earlier.as_deref().cloned().unwrap_or_default().merged(&order)),
        }
    }

    async fn pull(&self) -> Option<Arc<Trace>> {
        let share = self.share.as_ref()?;
        if self.mode != Mode::On || self.trace().is_some() {
            return None;
        }
        let found = share::pull(&share.subject, &self.identity).await;
        let found =
            found.inspect_err(|e| tracing::warn!("the registry's trace is ignored: {e:#}")).ok()??;
        let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        // Recording may have ended meanwhile: then the start is over.
        trace.is_none().then(|| Arc::clone(trace.insert(Arc::new(found))))
    }

    async fn push(&self) -> anyhow::Result<Option<String>> {
        let share = self.share.as_ref().context("the image was not mounted by its name in a registry")?;
        let ours = self.current().context("no start was recorded yet")?;
        share::push(&share.subject, &self.identity, &ours, |trace| self.document(trace, true)).await
    }

    fn document(&self, trace: &Trace, complete: bool) -> Document {
        let root = self.root.get_or_init(|| rafs::merkle::image_root(&**self.rafs.bootstrap()).ok());
        Document::new(&self.identity, *root, trace, complete)
    }

    async fn wait_for_end(&self) {
        while self.recorder.is_on() {
            let Some((first, last)) = self.recorder.span() else {
                self.wake.notified().await;
                continue;
            };
            let end = (first + self.limits.longest).min(last + self.limits.idle);
            if end <= Instant::now() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(end.into()) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// True if there was something to keep.
    fn finish(&self) -> bool {
        self.recorder.stop();
        let merged = {
            let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
            let order = self.recorder.take();
            if order.is_empty() {
                return false;
            }
            let merged = Arc::new(trace.take().unwrap_or_default().merged(&order));
            *trace = Some(Arc::clone(&merged));
            merged
        };
        let document = self.document(&merged, true);
        match store::save(&self.path, &document) {
            Ok(()) => {
                tracing::info!("the start was recorded: {}", counted(merged.entries.len() as u64, "chunk"))
            }
            Err(e) => tracing::warn!("the trace {} can not be kept: {e:#}", self.path.display()),
        }
        true
    }
}
