//! `/api/v1/metrics/...` and `/metrics`: counters of one mount, or of all (contract 3.8).

use std::time::Duration;

use super::reply::Reply;
use super::routes::{with_counters, with_mount};
use super::types::{BackendCounters, BlobCache};
use crate::daemon::Daemon;
use crate::metrics;
use crate::mount::Mount;

/// Operations of the file system.
pub(super) fn global(daemon: &Daemon, id: Option<&str>) -> Reply {
    with_counters(daemon, id, "GlobalMetrics", |at, metrics| Reply::json(&metrics.snapshot(at)))
}

/// The same by file, or the files read since somebody last asked. Empty if the configuration
/// does not ask for it.
pub(super) fn files(daemon: &Daemon, id: Option<&str>, latest: bool) -> Reply {
    with_counters(daemon, id, "FsFilesMetrics", |_, metrics| match metrics.files() {
        files if latest => Reply::json(&files.take_latest()),
        files => Reply::json(&files.counters()),
    })
}

/// First accesses. Empty if the configuration does not ask for it.
pub(super) fn pattern(daemon: &Daemon, id: Option<&str>) -> Reply {
    with_counters(daemon, id, "Pattern", |_, metrics| Reply::json(&metrics.files().pattern()))
}

/// Requests to the source of blobs.
pub(super) fn backend(daemon: &Daemon, id: Option<&str>) -> Reply {
    with_mount(daemon, id, "BackendMetrics", |mount| {
        Reply::json(&BackendCounters {
            counters: mount.backend_metrics().snapshot(mount.config().backend.kind()),
            origins: mount.origins(),
        })
    })
}

/// What the cache did and holds.
pub(super) fn blob_cache(daemon: &Daemon, id: Option<&str>) -> Reply {
    with_mount(daemon, id, "BlobcacheMetrics", |mount| Reply::json(&cache_document(mount)))
}

/// Reads that wait; nothing if none does.
pub(super) fn inflight(daemon: &Daemon) -> Reply {
    let entries = daemon.adapter().inflight().entries();
    if entries.is_empty() { Reply::empty() } else { Reply::json(&entries) }
}

/// The counters of all mounts for a scraper.
pub(super) fn exposition(daemon: &Daemon) -> Reply {
    match metrics::expose(daemon) {
        Ok(text) => Reply::text(metrics::CONTENT_TYPE, text),
        Err(e) => Reply::error(500, &format!("GlobalMetrics(\"{e}\")")),
    }
}

fn cache_document(mount: &Mount) -> BlobCache {
    let blobs = mount.rafs().bootstrap().blobs();
    let (entries_count, chunks_total) = mount.chunk_counts();
    let ahead = mount.fetch_metrics().ahead();
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    BlobCache {
        underlying_files: blobs.iter().map(|blob| format!("{}.blob.data", blob.id)).collect(),
        store_path: mount.config().work_dir.to_string_lossy().into_owned(),
        counters: mount.cache_metrics().snapshot(),
        entries_count,
        prefetch_workers: mount.order_count() as u64,
        prefetch_cumulative_time_millis: millis(ahead.busy),
        prefetch_begin_time_secs: ahead.began.as_secs(),
        prefetch_begin_time_millis: ahead.began.subsec_millis().into(),
        prefetch_end_time_secs: ahead.ended.as_secs(),
        prefetch_end_time_millis: ahead.ended.subsec_millis().into(),
        buffered_backend_size: mount.buffered(),
        data_all_ready: mount.is_all_ready(),
        chunks_total,
        compressed_bytes_total: blobs.iter().map(|blob| blob.data_size).sum(),
        fetches: mount.fetch_metrics().snapshot(),
        memory: metrics::resident_memory().into_iter().collect(),
    }
}
