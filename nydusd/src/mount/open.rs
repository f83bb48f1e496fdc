//! From a bootstrap and a configuration to an image that can be mounted.
//!
//! The bootstrap is copied under its digest into the cache directory, compared with what was
//! demanded, validated, and joined with one cache a blob. Nothing is asked of the source unless a
//! blob holds batches, whose context says where chunks lie.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Blob, Bootstrap, adopt, adopt_own};
use rafs::format::features::BlobFeatures;
use rafs::format::limits::MAX_CHUNK_SIZE;
use rafs::fs::{Rafs, RafsOptions};
use storage::backend::{Backend, BlobSource, ReadContext};
use storage::cache::dedup::DedupDb;
use storage::cache::{BlobCache, BlobCacheConfig, BlobSet, ChunkTable, MetaSpec};
use storage::digest::{Digest, TaggedDigest};
use storage::engine::Engine;
use storage::ids::{BlobId, ChunkIndex};
use storage::metrics::{BackendMetrics, CacheMetrics};
use storage::observe::{Fetched, Observer};
use storage::oci::referrers::Subject;
use storage::read::Reader;

use super::Mount;
use crate::config::Config;
use crate::echo::Echoes;
use crate::follow::Watch;
use crate::metrics::{FetchMetrics, FsMetrics};
use crate::trace::share::Share;
use crate::trace::{Tracer, TracerSpec};
use crate::vfs::command::MountCommand;
use crate::vfs::known::Known;
use crate::vfs::place::Place;
use crate::why::Recorder;

/// What a mount that a client asked for may wait for its source at most: clients wait 30 seconds.
const COMMAND_PATIENCE: Duration = Duration::from_secs(20);

/// What is needed to mount an image.
#[derive(Debug)]
pub struct MountSpec {
    /// Where it appears inside the daemon: a checked absolute path.
    pub mountpoint: String,
    /// The API's command, if it came by that.
    pub command: Option<MountCommand>,
    /// Its bootstrap; copied before use.
    pub bootstrap: PathBuf,
    /// Set if `bootstrap` was fetched only for this mount: removed when this value goes.
    pub fetched: Option<tempfile::TempPath>,
    /// The image root digest that the image's manifest states.
    pub stated_root: Option<TaggedDigest>,
    /// Where its blobs are.
    pub source: Arc<dyn BlobSource>,
    /// The image's manifest, if it has one in a registry.
    pub subject: Option<Subject>,
    /// The rest.
    pub config: Config,
}

/// An image that is ready to be mounted. Its place is not known yet.
pub struct Opened {
    /// Chunks that were in the cache.
    cached: u64,
    spec: MountSpec,
    rafs: Arc<Rafs>,
    digest: Digest,
    blobs: Arc<BlobSet>,
    caches: Vec<Arc<BlobCache>>,
    fetch_metrics: Arc<FetchMetrics>,
    recorder: Option<Arc<Recorder>>,
    cache_metrics: Arc<CacheMetrics>,
    backend_metrics: Arc<BackendMetrics>,
    tracer: Tracer,
}

/// Opens the image. What this process has validated before, `known`, is not read again; what other
/// caches have is looked up in `dedup`.
///
/// # Errors
/// The bootstrap is unreadable, malformed or not the one demanded; the cache directory can
/// not be used; a blob context that reads depend on can not be had.
pub fn open(
    engine: &Engine,
    mut spec: MountSpec,
    known: &Known,
    dedup: Option<&Arc<DedupDb>>,
) -> anyhow::Result<Opened> {
    let fetched = spec.fetched.take();
    let MountSpec { stated_root, source, subject, config, .. } = &spec;
    let work_dir = &config.work_dir;
    make_cache_dir(work_dir)?;
    if known.is_untidied(work_dir) {
        storage::leftovers::sweep(work_dir, storage::leftovers::is_cache_temporary);
    }
    let found = known.find(&spec.bootstrap, work_dir, config.allow_unverified);
    let (bootstrap, digest) = match &found {
        Some((rafs, digest)) => {
            check_digest(*digest, config.expect_bootstrap)?;
            (Arc::clone(rafs.bootstrap()), *digest)
        }
        None => {
            // What was fetched lies in a temporary file of its own.
            let adopt = if fetched.is_some() { adopt_own } else { adopt };
            let (bootstrap, digest) = adopt(&spec.bootstrap, work_dir, config.expect_bootstrap)?;
            (Arc::from(bootstrap), digest)
        }
    };
    drop(fetched);
    let root = check_root(&*bootstrap, *stated_root, config.expect_root)?;
    let records = bootstrap.blobs();
    let backends = records
        .iter()
        .map(|blob| source.blob_of_size(&blob.id, blob.compressed_size))
        .collect::<storage::Result<Vec<_>>>()?;
    let rafs = match found {
        Some((rafs, _)) => rafs,
        None => {
            // What the command line says may wait for its source as long as readers may.
            let deadline = match &spec.command {
                Some(_) => Instant::now().checked_add(config.read_timeout.min(COMMAND_PATIENCE)),
                None => config.outage_policy().deadline(),
            };
            let rafs = Arc::new(join_contexts(engine, config, &bootstrap, (&**source, &backends), deadline)?);
            known.remember(&rafs, digest, work_dir, config.allow_unverified);
            rafs
        }
    };
    if rafs.is_unverified() {
        tracing::warn!("the image has chunks without digests: their data is served UNVERIFIED");
    }

    // A batch or a slice may be a unit of this size whatever the chunks are.
    let batches = BlobFeatures::BATCH | BlobFeatures::ZRAN;
    let batches = records.iter().any(|blob| blob.features.intersects(batches));
    let summary = bootstrap.summary();
    engine.serve_units(if batches { MAX_CHUNK_SIZE } else { summary.chunk_size });
    let fetch_metrics = Arc::<FetchMetrics>::default();
    let recorder = config.why.then(|| Arc::new(Recorder::new(records.iter().map(|blob| &blob.id))));
    let observer: Arc<dyn Observer> =
        Arc::new(Observers { metrics: Arc::clone(&fetch_metrics), recorder: recorder.clone() });
    let cache_metrics = Arc::<CacheMetrics>::default();
    let backend_metrics = Arc::<BackendMetrics>::default();
    let mut caches = Vec::with_capacity(records.len());
    for ((number, blob), backend) in (0u32..).zip(records).zip(backends) {
        let base = BlobCacheConfig::new(work_dir, blob.id.clone(), blob.decoded_size, blob.chunk_count);
        let cache_config = BlobCacheConfig {
            meta: meta_spec(blob),
            chunks: Some(chunk_table(&rafs, number)),
            allow_unverified: config.allow_unverified,
            dedup: dedup.cloned(),
            observer: Some(Arc::clone(&observer)),
            metrics: Arc::clone(&cache_metrics),
            backend_metrics: Arc::clone(&backend_metrics),
            ..base
        };
        caches.push(BlobCache::open(engine, cache_config, backend)?);
    }
    let blobs =
        Arc::new(BlobSet::reading_ahead(engine, caches.clone(), config.outage_policy(), config.read_ahead));
    let tracer = Tracer::open(
        engine,
        TracerSpec {
            mode: config.trace,
            limits: config.trace_limits,
            work_dir,
            bootstrap: digest,
            root,
            rafs: Arc::clone(&rafs),
            share: subject.clone().map(|subject| Share { subject, push: config.push_trace }),
        },
    );
    let cached = caches.iter().map(|cache| u64::from(cache.ready_count())).sum();
    Ok(Opened {
        cached,
        spec,
        rafs,
        digest,
        blobs,
        caches,
        fetch_metrics,
        recorder,
        cache_metrics,
        backend_metrics,
        tracer,
    })
}

impl Opened {
    /// The mount at `place`. Does no I/O.
    pub fn at(self, place: Place) -> Mount {
        let MountSpec { mountpoint, command, source, config, .. } = self.spec;
        Mount {
            place,
            mountpoint,
            command,
            restored: AtomicBool::new(false),
            pending: Arc::default(),
            rafs: self.rafs,
            reader: Arc::clone(&self.blobs) as Arc<dyn Reader>,
            blobs: Some(self.blobs),
            cached_at_mount: self.cached,
            caches: self.caches,
            source: Some(source),
            metrics: Arc::new(FsMetrics::new(config.files)),
            fetch_metrics: self.fetch_metrics,
            recorder: self.recorder,
            orders: Mutex::default(),
            config,
            bootstrap_digest: self.digest,
            mounted_at: SystemTime::now(),
            cache_metrics: self.cache_metrics,
            backend_metrics: self.backend_metrics,
            echoes: Echoes::default(),
            tracer: self.tracer,
            watch: Watch::default(),
        }
    }

    /// SHA-256 of its bootstrap.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// True if it has extended attributes, and they are to be shown.
    pub fn has_xattrs(&self) -> bool {
        self.spec.config.enable_xattr && self.rafs.bootstrap().summary().has_xattrs
    }
}

/// Fetches the contexts that reads depend on.
fn join_contexts(
    engine: &Engine,
    config: &Config,
    bootstrap: &Arc<dyn Bootstrap>,
    (source, backends): (&dyn BlobSource, &[Arc<dyn Backend>]),
    deadline: Option<Instant>,
) -> anyhow::Result<Rafs> {
    let needed = Rafs::needs_context(&**bootstrap);
    let contexts = bootstrap
        .blobs()
        .iter()
        .zip(backends)
        .zip(needed)
        .map(|((blob, backend), needed)| match needed {
            true => {
                let holder = match &blob.context_id {
                    Some(id) => source.blob(id)?,
                    None => Arc::clone(backend),
                };
                load_context(engine, config, blob, &*holder, deadline).map(Some)
            }
            false => Ok(None),
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let options = RafsOptions { allow_unverified: config.allow_unverified };
    Ok(Rafs::new(Arc::clone(bootstrap), contexts, options)?)
}

/// Compares the digest of a bootstrap that is known with what is demanded.
fn check_digest(found: Digest, expected: Option<Digest>) -> anyhow::Result<()> {
    match expected.filter(|expected| *expected != found) {
        Some(expected) => bail!(
            "the bootstrap's SHA-256 is {found}, but {expected} is demanded; mount the image that was \
             meant, or correct `expect_bootstrap`"
        ),
        None => Ok(()),
    }
}

/// Whoever is told of fetches.
struct Observers {
    metrics: Arc<FetchMetrics>,
    recorder: Option<Arc<Recorder>>,
}

impl Observer for Observers {
    fn fetched(&self, event: &Fetched<'_>) {
        self.metrics.fetched(event);
        crate::limits::passed_through(event.stored);
        if let Some(recorder) = &self.recorder {
            recorder.fetched(event);
        }
    }

    fn copied(&self, blob: &BlobId, chunk: ChunkIndex, began: Instant, ended: Instant) {
        if let Some(recorder) = &self.recorder {
            recorder.copied(blob, chunk, began, ended);
        }
    }
}

/// Makes the cache directory with its parents. What it will hold is private to its owner: an
/// image's files are no more public than the login that fetched them.
pub(crate) fn make_cache_dir(path: &Path) -> anyhow::Result<()> {
    storage::outside::make_directory(path)
        .with_context(|| format!("make the cache directory {}", path.display()))
}

/// Compares the image root digest with what the manifest states and what was demanded. Answers
/// it, if it had to be known.
fn check_root(
    bootstrap: &dyn Bootstrap,
    stated: Option<TaggedDigest>,
    expected: Option<TaggedDigest>,
) -> anyhow::Result<Option<TaggedDigest>> {
    if stated.is_none() && expected.is_none() {
        return Ok(None);
    }
    let found = rafs::merkle::image_root(bootstrap)?;
    if let Some(stated) = stated.filter(|stated| *stated != found) {
        bail!(
            "the image root digest is {found}, but the image's manifest states {stated}; the image is \
             damaged or forged: convert or push it again"
        );
    }
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        bail!(
            "the image root digest is {found}, but {expected} is demanded; mount the image that was \
             meant, or correct `expect_root`"
        );
    }
    Ok(Some(found))
}

/// The context of a blob that reads depend on: from the cache directory if a valid one lies
/// there, else from the source.
fn load_context(
    engine: &Engine,
    config: &Config,
    blob: &Blob,
    backend: &dyn Backend,
    deadline: Option<Instant>,
) -> anyhow::Result<BlobContext> {
    let path = config.work_dir.join(format!("{}.blob.meta", blob.id));
    match std::fs::read(&path) {
        Ok(bytes) => match BlobContext::from_cache_file(blob, &bytes) {
            Ok(context) => return Ok(context),
            Err(e) => tracing::warn!("{} is not usable and fetched anew: {e}", path.display()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => tracing::warn!("{} can not be read and is fetched: {e}", path.display()),
    }
    let context = ReadContext::on_demand(deadline);
    let stored = engine
        .fetch(backend, stored_range(blob)?, &context)
        .with_context(|| format!("fetch the context of blob {}", blob.id))?;
    let context = BlobContext::from_stored(blob, &stored)?;
    if let Err(e) = write_atomically(&path, &context.to_cache_file()) {
        tracing::warn!("{} can not be kept: {e}", path.display());
    }
    Ok(context)
}

fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".meta-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_data()?;
    file.persist(path)?;
    Ok(())
}

/// How the cache keeps the blob's context beside its data.
fn meta_spec(blob: &Blob) -> Option<MetaSpec> {
    if !blob.has_context() || blob.features.intersects(BlobFeatures::SEPARATE | BlobFeatures::TARFS) {
        return None;
    }
    let range = stored_range(blob).ok()?;
    let blob = blob.clone();
    let to_cache_file = Arc::new(move |stored: &[u8]| {
        BlobContext::from_stored(&blob, stored).ok().map(|context| context.to_cache_file())
    });
    Some(MetaSpec { range, to_cache_file })
}

/// Where the chunks of one blob lie.
fn chunk_table(rafs: &Arc<Rafs>, blob: u32) -> ChunkTable {
    let rafs = Arc::clone(rafs);
    Arc::new(move |index| rafs.chunk_extent(blob, index).ok())
}
