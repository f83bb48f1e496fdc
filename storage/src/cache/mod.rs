//! Where bytes stay: decoded, verified chunks of a blob in a sparse file, shared by
//! every process that uses the directory.
//!
//! ```text
//!  set.rs       BlobSet: the Reader of an image; a request over several blobs
//!  mod.rs       BlobCache: one blob
//!  inflight.rs    one leader a chunk in this process
//!  obtain.rs      wishes → waiters, and leads for what nobody fetches yet
//!  fetch.rs       leader's work: claim, fetch, decode, verify, answer, write
//!  ahead.rs       works off orders, within their limit of bandwidth (pace.rs)
//!  plan.rs        units wanted → ranges to fetch
//!  local.rs       units that other cache files have: taken from there
//!  dedup.rs       which file has which chunk, for all daemons of the node
//!  data_file.rs   <id>.blob.data            bytes at their decoded offsets
//!  chunk_map.rs   <id>.blob.data.chunk_map  what of it is ready; lock a chunk
//!  mirror.rs      what of that this process has seen
//!  duty.rs        what one process does for all that share the map
//!  syncer.rs      data durable, then ready
//!  stock.rs     what lies in a directory, and taking it away
//! ```
//!
//! # Order of things
//!
//! 1. A chunk's bytes match its digest before anybody sees them.
//! 2. The waiting readers are answered from memory.
//! 3. The bytes are written to the data file; from here on this process reads them there.
//! 4. `fdatasync` of the data file, grouped over many chunks.
//! 5. The ready record is written to the chunk map; other processes see the chunk, and so
//!    does the next start, after any crash.
//! 6. The chunk's lock is given back.
//!
//! A failure in 3 to 5 (a full disk) costs a later fetch and fails no read.
//!
//! # Leaders
//!
//! A chunk is fetched by one leader: in a process the first to enter the in-flight table,
//! among processes the holder of a byte lock on the chunk map, which dies with its holder.
//! A follower has its own deadline; if its leader gives up earlier, it leads itself. A
//! process that does not get on (it may be stopped) is waited for for a few seconds; then the
//! chunk is fetched here too, past the cache. A fetch that nobody waits for any more runs on
//! to its own deadline and fills the cache; dropping the [`BlobCache`] or the engine cancels
//! it, and one without a deadline asks no more.

mod ahead;
mod chunk_map;
mod cutter;
mod data_file;
pub mod dedup;
mod duty;
mod fetch;
mod inflight;
mod local;
mod lock;
mod meta;
mod mirror;
mod neighbours;
mod obtain;
mod opener;
mod pace;
pub mod plan;
mod set;
mod speculate;
pub mod stock;
mod syncer;
#[cfg(test)]
mod tests;
mod untouched;

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::chunk_map::{ChunkMap, MAX_DECODED_SIZE, Record};
use self::data_file::Storage;
use self::dedup::{DedupDb, Member};
use self::inflight::Inflight;
pub use self::neighbours::ChunkTable;
pub use self::set::BlobSet;
use self::syncer::Syncer;
use self::untouched::Untouched;
use crate::backend::Backend;
use crate::engine::{Engine, Handle};
use crate::extent::ChunkExtent;
use crate::ids::{BlobId, ByteRange, ChunkIndex};
use crate::metrics::{BackendMetrics, CacheMetrics};
use crate::observe::Observer;
use crate::{Error, ErrorKind, Result};

/// After a failed write nothing is fetched ahead for this long: room may be made meanwhile.
const WRITE_AGAIN: Duration = Duration::from_secs(10);

/// Decoded bytes of one unit (rafs-v6: chunks and batches are at most 16 MiB).
const MAX_UNIT_DECODED: u32 = 16 << 20;

/// Stored bytes of one unit. Chunks that do not shrink are stored as they are, so only
/// framing can exceed the decoded size; 1 MiB is ample.
const MAX_UNIT_STORED: u64 = MAX_UNIT_DECODED as u64 + (1 << 20);

/// Chunks of one blob (rafs-v6: the index has 24 bits).
const MAX_CHUNK_COUNT: u32 = 1 << 24;

/// What to open.
pub struct BlobCacheConfig {
    /// Directory of the cache files, made if absent. `None`: nothing is kept, every read
    /// fetches.
    pub work_dir: Option<PathBuf>,
    /// The blob.
    pub id: BlobId,
    /// Length of its decoded space.
    pub decoded_size: u64,
    /// Its number of chunks.
    pub chunk_count: u32,
    /// A data file from the caller in place of `<id>.blob.data`: regular, empty or of
    /// `decoded_size` bytes. Needs a `work_dir`.
    pub data_file: Option<OwnedFd>,
    /// The stored blob context, to be kept beside the data after the first fetch.
    pub meta: Option<MetaSpec>,
    /// Serve chunks without a digest.
    pub allow_unverified: bool,
    /// Knows the other chunks of the blob: those of a unit that holds several, so that one
    /// fetch of the unit caches all of them, and those to read ahead. Called on engine threads.
    pub chunks: Option<ChunkTable>,
    /// Knows which other cache files have a chunk, and is told what this one has.
    pub dedup: Option<Arc<DedupDb>>,
    /// Told of every fetch.
    pub observer: Option<Arc<dyn Observer>>,
    /// Counters of the cache, shared by the blobs of an instance.
    pub metrics: Arc<CacheMetrics>,
    /// Counters of the backend, shared likewise.
    pub backend_metrics: Arc<BackendMetrics>,
}

impl BlobCacheConfig {
    /// A verified cache in `work_dir`, with counters of its own.
    pub fn new(work_dir: impl Into<PathBuf>, id: BlobId, decoded_size: u64, chunk_count: u32) -> Self {
        Self {
            work_dir: Some(work_dir.into()),
            id,
            decoded_size,
            chunk_count,
            data_file: None,
            meta: None,
            allow_unverified: false,
            chunks: None,
            dedup: None,
            observer: None,
            metrics: Arc::default(),
            backend_metrics: Arc::default(),
        }
    }
}

/// Makes the file `<id>.blob.meta` from the stored form, or `None` if that is malformed.
pub type ToCacheFile = Arc<dyn Fn(&[u8]) -> Option<Vec<u8>> + Send + Sync>;

/// Where the blob context is stored, and how it becomes a cache file.
pub struct MetaSpec {
    /// Its bytes in the blob.
    pub range: ByteRange,
    /// From stored bytes to those of `<id>.blob.meta`.
    pub to_cache_file: ToCacheFile,
}

/// The cache of one blob and the way to fill it. Dropping it cancels its fetches.
pub struct BlobCache {
    inner: Arc<Inner>,
}

/// What fetches share with their cache.
struct Inner {
    id: BlobId,
    decoded_size: u64,
    chunk_count: u32,
    allow_unverified: bool,
    engine: Handle,
    backend: Arc<dyn Backend>,
    /// `None`: nothing is kept.
    files: Option<Files>,
    inflight: Arc<Inflight>,
    untouched: Untouched,
    cancel: CancellationToken,
    chunks: Option<ChunkTable>,
    dedup: Option<Member>,
    observer: Option<Arc<dyn Observer>>,
    /// With its file's path; taken by the first successful fetch.
    meta: std::sync::Mutex<Option<(MetaSpec, PathBuf)>>,
    metrics: Arc<CacheMetrics>,
    backend_metrics: Arc<BackendMetrics>,
    /// The cache file could not be read: from then on nothing is kept.
    unreadable: AtomicBool,
    /// A failing cache has been reported.
    write_warned: AtomicBool,
    /// When the last write to the cache failed; `None` if it did not.
    write_failed: Mutex<Option<Instant>>,
    /// Held shared from the answer for a chunk until its bytes are written: readers go on
    /// meanwhile, and whoever holds it alone knows that all they have seen is written.
    storing: RwLock<()>,
}

struct Files {
    data: Arc<dyn Storage>,
    map: Arc<ChunkMap>,
    syncer: Arc<Syncer>,
}

/// Which of the two files is opened; tests put their own storage in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Data,
    Map,
}

impl BlobCache {
    /// Opens or makes the cache files of a blob. Asks nothing of `backend`.
    ///
    /// # Errors
    /// `Invalid`: impossible sizes, or a data file that does not fit. `Denied`, `Io`: the
    /// directory or its files can not be made. A full or read-only disk is no error: the
    /// cache then keeps nothing, with a warning.
    pub fn open(engine: &Engine, config: BlobCacheConfig, backend: Arc<dyn Backend>) -> Result<Arc<Self>> {
        Self::open_through(engine, config, backend, |_, file| Ok(Arc::new(file)))
    }

    fn open_through(
        engine: &Engine,
        config: BlobCacheConfig,
        backend: Arc<dyn Backend>,
        wrap: impl Fn(Role, File) -> std::io::Result<Arc<dyn Storage>>,
    ) -> Result<Arc<Self>> {
        let BlobCacheConfig { work_dir, id, decoded_size, chunk_count, data_file, meta, .. } = config;
        if chunk_count > MAX_CHUNK_COUNT
            || u64::from(chunk_count) > decoded_size
            || decoded_size > MAX_DECODED_SIZE
        {
            let what = format!("blob {id}: {chunk_count} chunks in {decoded_size} bytes");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        // A file from the caller has no name that others could open.
        let own_path = work_dir.as_ref().filter(|_| data_file.is_none()).map(|dir| data_path(dir, &id));
        let files = match &work_dir {
            None => None,
            Some(dir) => match Files::open(dir, &id, decoded_size, chunk_count, data_file, wrap) {
                Ok(files) => Some(files),
                Err(e) if is_full(&e) => {
                    warn!(blob = %id, error = %e, "nothing is cached: the disk is full or read-only");
                    None
                }
                Err(e) => return Err(e),
            },
        };
        let own_path = own_path.filter(|_| files.is_some());
        let dedup = config.dedup.map(|database| Member::new(database, own_path.as_deref()));
        let meta = meta.zip(work_dir.map(|dir| dir.join(format!("{id}.blob.meta"))));
        Ok(Arc::new(Self {
            inner: Arc::new(Inner {
                id,
                decoded_size,
                chunk_count,
                allow_unverified: config.allow_unverified,
                engine: engine.handle().clone(),
                backend,
                files,
                inflight: Arc::default(),
                untouched: Untouched::new(chunk_count),
                cancel: CancellationToken::new(),
                chunks: config.chunks,
                dedup,
                observer: config.observer,
                meta: std::sync::Mutex::new(meta),
                metrics: config.metrics,
                backend_metrics: config.backend_metrics,
                unreadable: AtomicBool::new(false),
                write_warned: AtomicBool::new(false),
                write_failed: Mutex::default(),
                storing: RwLock::default(),
            }),
        }))
    }

    /// The blob.
    pub fn id(&self) -> &BlobId {
        &self.inner.id
    }

    /// The blob's number of chunks.
    pub fn chunk_count(&self) -> u32 {
        self.inner.chunk_count
    }

    /// How many chunks the chunk map vouches for now, whoever fetched them.
    pub fn ready_count(&self) -> u32 {
        self.inner.files.as_ref().map_or(0, |files| files.map.ready_count())
    }

    /// True if the chunk can be read without a fetch.
    pub fn is_ready(&self, extent: &ChunkExtent) -> bool {
        self.inner.is_ready(extent)
    }

    /// Forgets chunks durably, so that their place may be punched out afterwards.
    ///
    /// Reads of this process in the meantime are right or miss. The caller sees to it that
    /// nobody fetches these chunks, and that no other process has the cache open.
    ///
    /// # Errors
    /// `OutOfRange`: no such chunk. `Io`: the map can not be written; nothing may be
    /// punched.
    pub fn clear_ready(&self, chunks: &[ChunkIndex]) -> Result<()> {
        let Some(files) = &self.inner.files else { return Ok(()) };
        if let Some(bad) = chunks.iter().find(|index| index.0 >= self.inner.chunk_count) {
            let what = format!("blob {}: forget chunk {bad} of {}", self.inner.id, self.inner.chunk_count);
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        // A chunk on its way to the map would be set after we cleared it.
        let context = |what: &str| format!("blob {}: {what}", self.inner.id);
        self.settle().map_err(|e| Error::io(context("sync the cache"), e))?;
        files.map.clear(chunks).map_err(|e| Error::io(context("clear the chunk map"), e))
    }

    /// Makes everything that readers were given so far ready for the next start. Waits for
    /// the disk; for an orderly end.
    ///
    /// # Errors
    /// `Io`: the disk refuses; the chunks concerned will be fetched again.
    pub fn flush(&self) -> Result<()> {
        if let Some(files) = &self.inner.files {
            files.map.touch();
        }
        self.settle().map_err(|e| Error::io(format!("blob {}: sync the cache", self.inner.id), e))
    }

    /// False if nothing is kept: the disk was full or read-only, or failed since.
    pub fn keeps_chunks(&self) -> bool {
        self.inner.files().is_some()
    }

    /// Fetches the blob context and keeps it beside the data now, not after the first chunk.
    /// Does nothing if that is done, under way, or has failed before.
    ///
    /// # Errors
    /// The backend's; `Io`: it can not be written.
    pub async fn keep_context(&self) -> Result<()> {
        meta::keep_now(&self.inner).await
    }

    /// Waits until all answered chunks are written and durable.
    fn settle(&self) -> std::io::Result<()> {
        let Some(files) = &self.inner.files else { return Ok(()) };
        drop(self.inner.storing.write().unwrap_or_else(PoisonError::into_inner));
        files.syncer.run()
    }

    /// The counters this cache adds to.
    pub fn metrics(&self) -> &Arc<CacheMetrics> {
        &self.inner.metrics
    }

    /// The backend counters this cache adds to.
    pub fn backend_metrics(&self) -> &Arc<BackendMetrics> {
        &self.inner.backend_metrics
    }
}

impl Drop for BlobCache {
    fn drop(&mut self) {
        self.inner.cancel.cancel();
    }
}

impl fmt::Debug for BlobCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobCache").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

/// Where the data of a blob is.
fn data_path(dir: &Path, id: &BlobId) -> PathBuf {
    dir.join(format!("{id}.blob.data"))
}

impl Files {
    fn open(
        dir: &Path,
        id: &BlobId,
        decoded_size: u64,
        chunk_count: u32,
        data_file: Option<OwnedFd>,
        wrap: impl Fn(Role, File) -> std::io::Result<Arc<dyn Storage>>,
    ) -> Result<Self> {
        let held = data_file::hold_directory(dir)?;
        let path = data_path(dir, id);
        let map_path = dir.join(format!("{id}.blob.data.chunk_map"));
        let data = match data_file {
            Some(descriptor) => data_file::adopt_data(descriptor, decoded_size, &map_path, &held)?,
            None => data_file::open_data(&path, decoded_size, &map_path, &held)?,
        };
        let map = ChunkMap::open(&map_path, id, chunk_count, &data, |file| wrap(Role::Map, file))?;
        let map = Arc::new(map);
        let data = wrap(Role::Data, data).map_err(|e| Error::io(format!("blob {id}: cache file"), e))?;
        let syncer = Arc::new(Syncer::new(Arc::clone(&data), Arc::clone(&map)));
        Ok(Self { data, map, syncer })
    }
}

impl Inner {
    /// The files, while they serve.
    fn files(&self) -> Option<&Files> {
        self.files.as_ref().filter(|_| !self.unreadable.load(Ordering::Relaxed))
    }

    /// True if what is fetched is kept: else there is no point in fetching ahead.
    fn keeps(&self) -> bool {
        self.files().is_some() && self.write_failed().is_none_or(|at| at.elapsed() >= WRITE_AGAIN)
    }

    fn write_failed(&self) -> MutexGuard<'_, Option<Instant>> {
        // Nothing panics under the lock.
        self.write_failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ready(&self, extent: &ChunkExtent) -> bool {
        self.files().is_some_and(|files| files.map.is_ready(extent.index, &Record::of(extent)))
    }

    /// True if other processes fetch all of `chunks`.
    fn are_led_elsewhere(&self, chunks: &[ChunkExtent]) -> bool {
        let led = |files: &Files| chunks.iter().all(|chunk| files.map.is_led_elsewhere(&Record::of(chunk)));
        self.files().is_some_and(led)
    }

    /// Checks that an extent is possible for this blob, and verifiable unless told otherwise.
    fn check(&self, extent: &ChunkExtent) -> Result<()> {
        let fault = |kind, what: &str| {
            Err(Error::new(kind, format!("blob {}, chunk {}: {what}", self.id, extent.index)))
        };
        let unit = &extent.unit;
        let end = extent.decoded_offset.checked_add(u64::from(extent.len));
        if extent.index.0 >= self.chunk_count || end.is_none_or(|end| end > self.decoded_size) {
            return fault(ErrorKind::OutOfRange, "lies outside the blob");
        }
        let unit_end = extent.offset_in_unit.checked_add(extent.len);
        if extent.len == 0 || unit_end.is_none_or(|end| end > unit.decoded_len) {
            return fault(ErrorKind::OutOfRange, "lies outside its fetch unit");
        }
        if unit.decoded_len > MAX_UNIT_DECODED
            || unit.compressed.is_empty()
            || unit.compressed.len() > MAX_UNIT_STORED
        {
            return fault(ErrorKind::OutOfRange, "its fetch unit has an impossible size");
        }
        if extent.digest.is_none() && !self.allow_unverified {
            return fault(ErrorKind::Corrupt, "has no digest; allow unverified images to read it anyway");
        }
        Ok(())
    }

    /// Reads a ready chunk's bytes from the data file; false if that is impossible, in
    /// which case the backend serves from now on.
    fn read_stored(&self, extent: &ChunkExtent, offset: u32, dst: &mut [u8]) -> bool {
        let Some(files) = self.files() else { return false };
        let read = files.data.read_at(dst, extent.decoded_offset + u64::from(offset));
        if let Err(error) = &read
            && !self.unreadable.swap(true, Ordering::Relaxed)
        {
            warn!(blob = %self.id, chunk = %extent.index, %error, "the cache file can not be read; reads go on from the backend");
        }
        read.is_ok()
    }

    fn warn_of_write(&self, error: &std::io::Error) {
        CacheMetrics::tick(&self.metrics.write_errors);
        *self.write_failed() = Some(Instant::now());
        if !self.write_warned.swap(true, Ordering::Relaxed) {
            warn!(blob = %self.id, %error, "chunks can not be cached; reads go on from the backend");
        }
    }
}

/// True for a disk that takes no more: reads go on without it.
fn is_full(error: &Error) -> bool {
    use std::error::Error as _;
    let io = error.source().and_then(|e| e.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| {
        use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        matches!(e.kind(), QuotaExceeded | ReadOnlyFilesystem | StorageFull)
    })
}
