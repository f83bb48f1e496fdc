//! Which request gets which answer (contract 3.2, 3.3).
//!
//! Error messages are the contract's nested names, because clients search for parts of them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::ValueEnum as _;
use hyper::{Method, StatusCode};
use serde::Serialize;
use serde_json::json;

use super::types::{Backend, BlobCache, Configure, Info};
use crate::cli::LogLevel;
use crate::daemon::{Daemon, State};
use crate::metrics;
use crate::mount::Mount;
use crate::trace::files::Optimize;
use crate::why;

/// What goes back to the client.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub body: Option<Vec<u8>>,
}

/// What most answers are.
const JSON: &str = "application/json";

impl Reply {
    /// A document.
    pub fn json(document: &impl Serialize) -> Self {
        match serde_json::to_vec(document) {
            Ok(body) => Self { status: StatusCode::OK, content_type: JSON, body: Some(body) },
            Err(e) => Self::error(500, &format!("Serialize(\"{e}\")")),
        }
    }

    /// Done, with nothing to say.
    pub fn empty() -> Self {
        Self { status: StatusCode::NO_CONTENT, content_type: JSON, body: None }
    }

    /// The error document.
    pub fn error(status: u16, message: &str) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = json!({ "code": "UNDEFINED", "message": message }).to_string().into_bytes();
        Self { status, content_type: JSON, body: Some(body) }
    }

    /// The counters for a scraper.
    pub fn metrics(daemon: &Daemon) -> Self {
        match metrics::expose(daemon) {
            Ok(text) => Self {
                status: StatusCode::OK,
                content_type: metrics::CONTENT_TYPE,
                body: Some(text.into_bytes()),
            },
            Err(e) => Self::error(500, &format!("GlobalMetrics(\"{e}\")")),
        }
    }

    /// A part of the contract that this build does not have.
    fn not_built(wrapper: &str) -> Self {
        Self::error(501, &format!("{wrapper}(DaemonAbnormal(Unsupported))"))
    }
}

/// Answers one request.
pub(super) async fn answer(daemon: &Daemon, method: &Method, path: &str, query: &str, body: &[u8]) -> Reply {
    let get = method == Method::GET;
    let put = method == Method::PUT;
    let delete = method == Method::DELETE;
    let id = parameter(query, "id");
    let has = |name| parameter(query, name).is_some();
    match path {
        "/api/v1/daemon" | "/api/v2/daemon" if get => info(daemon, path.starts_with("/api/v1")),
        "/api/v1/daemon" | "/api/v2/daemon" if put => configure(body),
        "/api/v1/daemon/start" if put => unexpected("Configure", "Start"),
        "/api/v1/daemon/exit" if put => {
            daemon.exit();
            Reply::empty()
        }
        "/api/v1/daemon/fuse/sendfd" if put => match daemon.state() {
            State::Init => Reply::error(503, "Upgrade(DaemonAbnormal(NotReady))"),
            _ => Reply::error(500, "Upgrade(DaemonAbnormal(UpgradeManager(\"MissingSupervisorPath\")))"),
        },
        "/api/v1/daemon/fuse/takeover" if put => unexpected("Upgrade", "Takeover"),
        "/api/v1/metrics" if get => with_mount(daemon, id.as_deref(), "GlobalMetrics", |mount| {
            Reply::json(&mount.metrics().snapshot(mount.mountpoint()))
        }),
        "/api/v1/metrics/backend" if get => with_mount(daemon, id.as_deref(), "BackendMetrics", |mount| {
            Reply::json(&mount.backend_metrics().snapshot(mount.config().backend.kind()))
        }),
        "/api/v1/metrics/blobcache" if get => {
            with_mount(daemon, id.as_deref(), "BlobcacheMetrics", |mount| Reply::json(&blob_cache(mount)))
        }
        "/api/v1/metrics/files" if get => with_mount(daemon, id.as_deref(), "FsFilesMetrics", |mount| {
            files(mount, parameter(query, "latest").as_deref() == Some("true"))
        }),
        "/api/v1/metrics/pattern" if get => {
            with_mount(daemon, id.as_deref(), "Pattern", |mount| match mount.metrics().files() {
                files if files.options().pattern => Reply::json(&files.pattern()),
                _ => no_counter("Pattern"),
            })
        }
        "/metrics" if get => Reply::metrics(daemon),
        "/api/v1/why" if get => with_mount(daemon, id.as_deref(), "Why", |mount| match mount.recorder() {
            Some(recorder) => Reply::json(&why::build(mount, recorder)),
            None => Reply::error(404, "Why(\"nothing is recorded: `why` is false in the configuration\")"),
        }),
        "/api/v1/trace/push" if method == Method::POST => push_trace(daemon, id.as_deref()).await,
        "/api/v1/trace" if get => {
            let format = parameter(query, "format");
            with_mount(daemon, id.as_deref(), "Trace", |mount| trace(mount, format.as_deref()))
        }
        "/api/v1/metrics/inflight" if get => {
            let entries = daemon.adapter().inflight().entries();
            if entries.is_empty() { Reply::empty() } else { Reply::json(&entries) }
        }
        "/api/v1/prefetch" => super::prefetch::answer(daemon, method, query, body),
        "/api/v1/daemon/events" if get => Reply::not_built("Events"),
        "/api/v1/daemon/backend" if get => Reply::not_built("FsBackendInfo"),
        "/api/v1/mount" if put || method == Method::POST || delete => match parameter(query, "mountpoint") {
            Some(_) => Reply::not_built("Mount"),
            None => Reply::error(400, "QueryString(\"mountpoint should be specified in query string\")"),
        },
        "/api/v1/config" if get || put => Reply::not_built("Configure"),
        "/api/v2/blobs" if get => Reply::not_built("GetBlobObjects"),
        "/api/v2/blobs" if put => Reply::not_built("CreateBlobObject"),
        // To drop fscache's file of a blob: a FUSE daemon has none, so that is done already.
        "/api/v2/blobs" if delete && has("blob_id") && !has("domain_id") => Reply::empty(),
        "/api/v2/blobs" if delete => Reply::not_built("DeleteBlobObject"),
        known if ROUTES.contains(&known) => Reply::error(400, "BadRequest"),
        _ => Reply::error(404, "NoRoute"),
    }
}

/// Every path of the contract, and ours: a wrong method on one of them is a bad request.
const ROUTES: [&str; 21] = [
    "/metrics",
    "/api/v1/why",
    "/api/v1/daemon",
    "/api/v2/daemon",
    "/api/v1/daemon/start",
    "/api/v1/daemon/exit",
    "/api/v1/daemon/fuse/sendfd",
    "/api/v1/daemon/fuse/takeover",
    "/api/v1/daemon/events",
    "/api/v1/daemon/backend",
    "/api/v1/mount",
    "/api/v1/config",
    "/api/v1/metrics",
    "/api/v1/metrics/files",
    "/api/v1/metrics/pattern",
    "/api/v1/metrics/backend",
    "/api/v1/metrics/blobcache",
    "/api/v1/metrics/inflight",
    "/api/v1/trace",
    "/api/v1/trace/push",
    "/api/v2/blobs",
];

fn unexpected(wrapper: &str, event: &str) -> Reply {
    Reply::error(400, &format!("{wrapper}(DaemonAbnormal(UnexpectedEvent(\"{event}\")))"))
}

fn info(daemon: &Daemon, with_backends: bool) -> Reply {
    let backends = || {
        let mounts = daemon.adapter().table().mounts();
        mounts.iter().map(|mount| (mount.mountpoint().to_owned(), backend(mount))).collect()
    };
    Reply::json(&Info {
        version: crate::version::BUILD,
        id: daemon.id(),
        supervisor: None,
        state: daemon.state().name(),
        backend_collection: with_backends.then(backends),
    })
}

fn backend(mount: &Mount) -> Backend {
    let time: chrono::DateTime<chrono::Local> = SystemTime::into(mount.mounted_at());
    Backend {
        backend_type: "Rafs",
        mountpoint: mount.mountpoint().to_owned(),
        mounted_time: time.to_rfc3339(),
        config: mount.config().public_json(),
        bootstrap: format!("sha256:{}", mount.bootstrap_digest()),
        verified: !mount.rafs().is_unverified(),
    }
}

/// Pushes the start-up trace: the artifact's digest, null if the registry knew it all.
async fn push_trace(daemon: &Daemon, id: Option<&str>) -> Reply {
    let (Some(mount), Some(engine)) = (find_mount(daemon, id), daemon.engine()) else {
        return no_counter("Trace");
    };
    match mount.tracer().push(engine.handle()).await {
        Ok(digest) => Reply::json(&json!({ "digest": digest })),
        Err(e) => Reply::error(500, &format!("Trace({e:#})")),
    }
}

/// The start-up trace: the document of [`crate::trace`], or what `nydus-image optimize` reads.
fn trace(mount: &Mount, format: Option<&str>) -> Reply {
    let missing = || Reply::error(404, "Trace(NoTrace)");
    match format {
        None | Some("trace") => mount.tracer().document().map_or_else(missing, |trace| Reply::json(&trace)),
        Some("optimize") => match mount.tracer().current() {
            Some(trace) => match Optimize::new(&trace, &**mount.rafs().bootstrap()) {
                Ok(document) => Reply::json(&document),
                Err(e) => Reply::error(500, &format!("Trace({e})")),
            },
            None => missing(),
        },
        Some(_) => Reply::error(400, "QueryString(\"format: want trace or optimize\")"),
    }
}

fn configure(body: &[u8]) -> Reply {
    let request: Configure = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(e) => return Reply::error(400, &format!("ParseBody(Error(\"{e}\"))")),
    };
    match LogLevel::from_str(&request.log_level, false) {
        Ok(level) => {
            crate::logging::set_level(level);
            Reply::empty()
        }
        Err(_) => Reply::error(500, "Configure(ResponsePayloadType)"),
    }
}

/// Answers for the mount that `id` names, or for the only one.
fn with_mount(
    daemon: &Daemon,
    id: Option<&str>,
    wrapper: &str,
    answer: impl FnOnce(&Mount) -> Reply,
) -> Reply {
    match find_mount(daemon, id) {
        Some(mount) => answer(&mount),
        None => no_counter(wrapper),
    }
}

/// No such mount, or it does not count this.
fn no_counter(wrapper: &str) -> Reply {
    Reply::error(404, &format!("{wrapper}(Metrics(Stats(NoCounter)))"))
}

fn files(mount: &Mount, latest: bool) -> Reply {
    let files = mount.metrics().files();
    match latest {
        true if files.options().latest => Reply::json(&files.take_latest()),
        false if files.options().counters => Reply::json(&files.counters()),
        _ => no_counter("FsFilesMetrics"),
    }
}

/// The mount that `id` names by mountpoint or instance id; without `id` the only one.
pub(super) fn find_mount(daemon: &Daemon, id: Option<&str>) -> Option<Arc<Mount>> {
    let mounts = daemon.adapter().table().mounts();
    match (id, mounts.as_slice()) {
        (Some(id), mounts) => {
            mounts.iter().find(|mount| mount.mountpoint() == id || mount.config().id == id).cloned()
        }
        (None, [only]) => Some(Arc::clone(only)),
        (None, _) => None,
    }
}

fn blob_cache(mount: &Mount) -> BlobCache {
    let blobs = mount.rafs().bootstrap().blobs();
    let (entries_count, chunks_total) = mount.chunk_counts();
    let ahead = mount.fetch_metrics().ahead();
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    BlobCache {
        underlying_files: blobs.iter().map(|blob| format!("{}.blob.data", blob.id)).collect(),
        store_path: mount.config().work_dir.to_string_lossy().into_owned(),
        counters: mount.cache_metrics().snapshot(),
        entries_count,
        prefetch_workers: mount.orders().len() as u64,
        prefetch_unmerged_chunks: 0,
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

/// The decoded value of `name` in a query string; `+` is a space.
pub(super) fn parameter(query: &str, name: &str) -> Option<String> {
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| decode(value))
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |b: &u8| char::from(*b).to_digit(16);
        let byte;
        (rest, byte) = match (first, tail) {
            (b'%', [high, low, after @ ..]) if hex(high).zip(hex(low)).is_some() => {
                let value = hex(high).zip(hex(low)).map_or(0, |(high, low)| high << 4 | low);
                // Two hex digits make one byte.
                (after, value as u8)
            }
            (b'+', _) => (tail, b' '),
            (other, _) => (tail, *other),
        };
        bytes.push(byte);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_decoded() {
        for (query, value) in [
            ("mountpoint=%2Fabc", Some("/abc")),
            ("a=b&mountpoint=/x+y", Some("/x y")),
            ("mountpoint=%zz%2", Some("%zz%2")),
            ("mountpoint", Some("")),
            ("mountpoints=/a", None),
        ] {
            assert_eq!(parameter(query, "mountpoint").as_deref(), value, "{query}");
        }
    }

    #[test]
    fn errors_have_the_contracts_shape() {
        let reply = Reply::error(404, "NoRoute");
        assert_eq!(reply.status, 404);
        assert_eq!(reply.body.unwrap(), br#"{"code":"UNDEFINED","message":"NoRoute"}"#);
    }
}
