//! One mounted image and all it owns: bootstrap, caches, counters. [`open()`] is the only way in.

mod open;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rafs::bootstrap::Nid;
use rafs::fs::Rafs;
use storage::backend::BlobSource;
use storage::cache::{BlobCache, BlobSet};
use storage::digest::Digest;
use storage::engine::Handle;
use storage::extent::ChunkExtent;
use storage::metrics::{BackendMetrics, CacheMetrics, OriginSnapshot};
use storage::oci::auth::Credentials;
use storage::prefetch::{Class, Order, Prefetch, PrefetchOptions};
use storage::read::Reader;

pub(crate) use self::open::make_cache_dir;
pub use self::open::{MountSpec, Opened, open};
use crate::config::Config;
use crate::echo::Echoes;
use crate::follow::Watch;
use crate::metrics::{FetchMetrics, FsMetrics};
use crate::node::NodeId;
use crate::pending::Pending;
use crate::trace::{Trace, Tracer};
use crate::vfs::command::{MountCommand, SavedMount};
use crate::vfs::place::Place;
use crate::why::Recorder;
use crate::words::counted;

/// One mounted image.
pub struct Mount {
    place: Place,
    mountpoint: String,
    /// The API's command; `None` for the command line's image.
    command: Option<MountCommand>,
    /// It was made from saved state, and nobody has asked for it since.
    restored: AtomicBool,
    rafs: Arc<Rafs>,
    reader: Arc<dyn Reader>,
    /// The same as `reader`, to fetch ahead with; tests have none.
    blobs: Option<Arc<BlobSet>>,
    caches: Vec<Arc<BlobCache>>,
    /// Where its blobs come from; tests have none.
    source: Option<Arc<dyn BlobSource>>,
    config: Config,
    /// SHA-256 of the bootstrap.
    bootstrap_digest: Digest,
    mounted_at: SystemTime,
    metrics: Arc<FsMetrics>,
    fetch_metrics: Arc<FetchMetrics>,
    /// Who read what when; `None` if that is not wanted.
    recorder: Option<Arc<Recorder>>,
    /// Chunks that were in the cache at the mount.
    cached_at_mount: u64,
    cache_metrics: Arc<CacheMetrics>,
    backend_metrics: Arc<BackendMetrics>,
    pending: Arc<Pending>,
    echoes: Echoes,
    /// Held for a few moves, and to begin an order.
    orders: Mutex<Orders>,
    tracer: Tracer,
    watch: Watch,
}

/// What is fetched ahead for a mount.
#[derive(Default)]
struct Orders {
    /// Those that were being worked off when last looked at.
    under_way: Vec<Prefetch>,
    /// There are no more.
    over: bool,
}

impl std::fmt::Debug for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mount")
            .field("mountpoint", &self.mountpoint)
            .field("bootstrap", &self.bootstrap_digest)
            .finish_non_exhaustive()
    }
}

impl Mount {
    /// A mount for tests: an image with a reader of the test's choosing and no caches.
    #[cfg(test)]
    pub(crate) fn for_tests(place: Place, rafs: Arc<Rafs>, reader: Arc<dyn Reader>) -> Self {
        Self::for_tests_at("/", place, rafs, reader)
    }

    /// The same somewhere else.
    #[cfg(test)]
    pub(crate) fn for_tests_at(
        mountpoint: &str,
        place: Place,
        rafs: Arc<Rafs>,
        reader: Arc<dyn Reader>,
    ) -> Self {
        Self {
            place,
            mountpoint: mountpoint.to_owned(),
            command: None,
            restored: AtomicBool::new(false),
            pending: Arc::default(),
            echoes: Echoes::default(),
            tracer: Tracer::off(Arc::clone(&rafs)),
            watch: Watch::default(),
            rafs,
            reader,
            blobs: None,
            caches: Vec::new(),
            source: None,
            config: Config::localfs_dir(std::path::Path::new("/nonexistent")),
            bootstrap_digest: Digest([0; 32]),
            mounted_at: SystemTime::now(),
            metrics: Arc::default(),
            fetch_metrics: Arc::default(),
            recorder: None,
            cached_at_mount: 0,
            orders: Mutex::default(),
            cache_metrics: Arc::default(),
            backend_metrics: Arc::default(),
        }
    }

    /// The same without data, as configured.
    #[cfg(test)]
    pub(crate) fn for_tests_from(
        mountpoint: &str,
        place: Place,
        rafs: Arc<Rafs>,
        config: Config,
        source: Arc<dyn BlobSource>,
    ) -> Self {
        struct NoData;

        impl Reader for NoData {
            fn try_read(&self, _: &[storage::read::ReadSlice], _: &mut [u8]) -> storage::Result<bool> {
                Ok(false)
            }

            fn submit(
                &self,
                _: Vec<storage::read::ReadSlice>,
                _: storage::backend::Priority,
                _: storage::read::Completion,
            ) {
            }
        }

        let mount = Self::for_tests_at(mountpoint, place, rafs, Arc::new(NoData));
        Self { config, source: Some(source), ..mount }
    }

    /// Where it appears inside the daemon.
    pub fn mountpoint(&self) -> &str {
        &self.mountpoint
    }

    /// Its index, generation and references.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The image.
    pub fn rafs(&self) -> &Rafs {
        &self.rafs
    }

    /// The image, to be held on to.
    pub fn rafs_shared(&self) -> &Arc<Rafs> {
        &self.rafs
    }

    /// Its data.
    pub fn reader(&self) -> &Arc<dyn Reader> {
        &self.reader
    }

    /// Starts fetching `order` ahead of readers; `None` once the mount is retired.
    pub fn prefetch(&self, order: Order, options: PrefetchOptions) -> Option<Prefetch> {
        let mut orders = self.orders();
        if orders.over {
            return None;
        }
        let prefetch = self.blobs.as_ref()?.prefetch(order, options);
        orders.under_way.push(prefetch.clone());
        Some(prefetch)
    }

    /// Bytes that its daemon's fetches hold in memory now.
    pub fn buffered(&self) -> u64 {
        self.blobs.as_ref().map_or(0, |blobs| blobs.buffered())
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        orders.under_way.retain(|order| !order.progress().finished);
        orders
    }

    /// How many orders are being worked off.
    pub fn order_count(&self) -> usize {
        self.orders().under_way.len()
    }

    /// Ends all that is fetched ahead, for good.
    pub fn stop_fetching(&self) {
        let mut orders = self.orders();
        orders.over = true;
        orders.under_way.drain(..).for_each(|order| order.cancel());
    }

    /// Starts fetching what earlier starts of the image read; false if that is not known here.
    /// Then the registry is asked beside the mount, and what it knows is fetched.
    pub fn fetch_ahead(self: &Arc<Self>, engine: &Handle) -> bool {
        if let Some(trace) = self.tracer.earlier() {
            self.fetch_trace(&trace);
            return true;
        }
        let (mount, pull) = (Arc::downgrade(self), self.tracer.pull());
        engine.spawn(async move {
            if let Some(trace) = pull.await
                && let Some(mount) = mount.upgrade()
            {
                mount.fetch_trace(&trace);
            }
        });
        false
    }

    fn fetch_trace(&self, trace: &Trace) {
        self.watch.stop();
        tracing::info!(
            "fetching ahead {} that earlier starts read",
            counted(trace.entries.len() as u64, "chunk")
        );
        self.prefetch(trace.order(&self.rafs), PrefetchOptions::of(Class::Trace));
    }

    /// Sees which files are opened.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The image with its data; `None` if it has no caches.
    pub fn image(&self) -> Option<(Arc<Rafs>, Arc<BlobSet>)> {
        Some((Arc::clone(&self.rafs), Arc::clone(self.blobs.as_ref()?)))
    }

    /// Its start-up trace.
    pub fn tracer(&self) -> &Tracer {
        &self.tracer
    }

    /// One cache a blob, in the order of the blob table.
    pub fn caches(&self) -> &[Arc<BlobCache>] {
        &self.caches
    }

    /// Logs in to its source with `credentials` from the next request on. False: logins mean
    /// nothing there.
    pub fn set_credentials(&self, credentials: Credentials) -> bool {
        self.source.as_ref().is_some_and(|source| source.set_credentials(credentials))
    }

    /// The servers that were spoken to for its blobs, by name.
    pub fn origins(&self) -> Vec<OriginSnapshot> {
        self.source.as_ref().map_or_else(Vec::new, |source| OriginSnapshot::merge(source.origins()))
    }

    /// What it was configured with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// SHA-256 of its bootstrap.
    pub fn bootstrap_digest(&self) -> Digest {
        self.bootstrap_digest
    }

    /// When it was mounted.
    pub fn mounted_at(&self) -> SystemTime {
        self.mounted_at
    }

    /// Counters of file system operations.
    pub fn metrics(&self) -> &Arc<FsMetrics> {
        &self.metrics
    }

    /// Counters of fetched chunks.
    pub fn fetch_metrics(&self) -> &FetchMetrics {
        &self.fetch_metrics
    }

    /// Who read what when, if that is recorded.
    pub fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.recorder.as_ref()
    }

    /// Chunks that were in the cache when it was mounted.
    pub fn cached_at_mount(&self) -> u64 {
        self.cached_at_mount
    }

    /// Chunks in the cache, and chunks of all its blobs.
    pub fn chunk_counts(&self) -> (u64, u64) {
        let ready = self.caches.iter().map(|cache| u64::from(cache.ready_count())).sum();
        (ready, self.rafs.bootstrap().blobs().iter().map(|blob| u64::from(blob.chunk_count)).sum())
    }

    /// True if every chunk that the image uses is in the cache. Its blobs may hold others.
    pub fn is_all_ready(&self) -> bool {
        let is_ready = |(blob, extent): (u32, ChunkExtent)| {
            self.caches.get(blob as usize).is_some_and(|cache| cache.is_ready(&extent))
        };
        crate::preheat::order::image(&self.rafs).all(is_ready)
    }

    /// Counters of its caches.
    pub fn cache_metrics(&self) -> &CacheMetrics {
        &self.cache_metrics
    }

    /// Counters of its source.
    pub fn backend_metrics(&self) -> &BackendMetrics {
        &self.backend_metrics
    }

    /// Reads that timed out just now.
    pub fn echoes(&self) -> &Echoes {
        &self.echoes
    }

    /// Ends the reads that wait for its source.
    pub fn abandon_reads(&self) {
        self.pending.abandon();
        self.blobs.iter().for_each(|blobs| blobs.abandon());
    }

    /// Reads that wait for its source.
    pub fn pending(&self) -> &Arc<Pending> {
        &self.pending
    }

    /// True if extended attributes are shown at all.
    pub fn has_xattrs(&self) -> bool {
        self.config.enable_xattr && self.rafs.bootstrap().summary().has_xattrs
    }

    /// The node id of `nid`: FUSE's root for the root of the image at `/`.
    pub fn node(&self, nid: Nid) -> Option<NodeId> {
        if self.mountpoint == "/" && nid == self.rafs.bootstrap().root() {
            return Some(NodeId::ROOT);
        }
        NodeId::new(self.place.index, nid)
    }

    /// The inode number that users see, no other mount's: the nid for the image at `/`.
    pub fn ino(&self, nid: Nid) -> u64 {
        match self.mountpoint.as_str() {
            "/" => nid.0,
            _ => NodeId::new(self.place.index, nid).map_or(nid.0, |node| node.0),
        }
    }

    /// The API's command that made it; `None` for the command line's image.
    pub fn command(&self) -> Option<&MountCommand> {
        self.command.as_ref()
    }

    /// What a successor needs to make it again.
    pub fn saved(&self) -> SavedMount {
        SavedMount {
            mountpoint: self.mountpoint.clone(),
            command: self.command.clone(),
            index: self.place.index.0,
            generation: self.place.generation,
            bootstrap: self.bootstrap_digest.to_string(),
            work_dir: self.config.work_dir.clone(),
            host: None,
        }
    }

    /// Says that it was made from saved state.
    pub fn set_restored(&self) {
        self.restored.store(true, Ordering::Relaxed);
    }

    /// True once if it was made from saved state by the same command.
    pub fn repeats(&self, command: &MountCommand) -> bool {
        let same = self.command.as_ref().is_some_and(|own| own.source == command.source);
        same && self.restored.swap(false, Ordering::Relaxed)
    }

    /// Ends what goes on behind the mount: nothing more is fetched ahead or recorded. What was fetched
    /// becomes durable. Waits for the disk.
    pub fn finish(&self) {
        self.stop_fetching();
        self.tracer.finish();
        for cache in &self.caches {
            if let Err(e) = cache.flush() {
                tracing::warn!("{}", crate::logging::chain(&e));
            }
        }
    }
}
