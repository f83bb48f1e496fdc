//! Which request gets which answer (contract 3.2, 3.3).
//!
//! Error messages are the contract's nested names, because clients search for parts of them.

use std::sync::Arc;
use std::time::SystemTime;

use clap::ValueEnum as _;
use hyper::{Method, StatusCode};
use serde::Serialize;
use serde_json::json;

use super::types::{Backend, BlobCache, Configure, Info};
use crate::cli::LogLevel;
use crate::daemon::{Daemon, State};
use crate::mount::Mount;

/// What goes back to the client.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: StatusCode,
    pub body: Option<Vec<u8>>,
}

impl Reply {
    /// A document.
    fn json(document: &impl Serialize) -> Self {
        match serde_json::to_vec(document) {
            Ok(body) => Self { status: StatusCode::OK, body: Some(body) },
            Err(e) => Self::error(500, &format!("Serialize(\"{e}\")")),
        }
    }

    /// Done, with nothing to say.
    fn empty() -> Self {
        Self { status: StatusCode::NO_CONTENT, body: None }
    }

    /// The error document.
    pub fn error(status: u16, message: &str) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = json!({ "code": "UNDEFINED", "message": message }).to_string().into_bytes();
        Self { status, body: Some(body) }
    }

    /// A part of the contract that this build does not have.
    fn not_built(wrapper: &str) -> Self {
        Self::error(501, &format!("{wrapper}(DaemonAbnormal(Unsupported))"))
    }
}

/// Answers one request.
pub(super) fn answer(daemon: &Daemon, method: &Method, path: &str, query: &str, body: &[u8]) -> Reply {
    let get = method == Method::GET;
    let put = method == Method::PUT;
    let id = parameter(query, "id");
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
        // Per-file counters and access patterns are not built, so there is none.
        "/api/v1/metrics/files" if get => Reply::error(404, "FsFilesMetrics(Metrics(Stats(NoCounter)))"),
        "/api/v1/metrics/pattern" if get => Reply::error(404, "Pattern(Metrics(Stats(NoCounter)))"),
        "/api/v1/metrics/inflight" if get => {
            let entries = daemon.adapter().inflight().entries();
            if entries.is_empty() { Reply::empty() } else { Reply::json(&entries) }
        }
        "/api/v1/daemon/events" if get => Reply::not_built("Events"),
        "/api/v1/daemon/backend" if get => Reply::not_built("FsBackendInfo"),
        "/api/v1/mount" if put || method == Method::POST || method == Method::DELETE => {
            match parameter(query, "mountpoint") {
                Some(_) => Reply::not_built("Mount"),
                None => Reply::error(400, "QueryString(\"mountpoint should be specified in query string\")"),
            }
        }
        "/api/v1/config" if get || put => Reply::not_built("Configure"),
        "/api/v2/blobs" if get => Reply::not_built("GetBlobObjects"),
        "/api/v2/blobs" if put => Reply::not_built("CreateBlobObject"),
        "/api/v2/blobs" if method == Method::DELETE => Reply::not_built("DeleteBlobObject"),
        known if ROUTES.contains(&known) => Reply::error(400, "BadRequest"),
        _ => Reply::error(404, "NoRoute"),
    }
}

/// Every path of the contract: a wrong method on one of them is a bad request.
const ROUTES: [&str; 17] = [
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

/// Answers for the mount that `id` names by mountpoint or instance id, or for the only one.
fn with_mount(
    daemon: &Daemon,
    id: Option<&str>,
    wrapper: &str,
    answer: impl FnOnce(&Mount) -> Reply,
) -> Reply {
    let mounts = daemon.adapter().table().mounts();
    let found: Option<&Arc<Mount>> = match (id, mounts.as_slice()) {
        (Some(id), mounts) => mounts.iter().find(|mount| mount.mountpoint() == id || mount.config().id == id),
        (None, [only]) => Some(only),
        (None, _) => None,
    };
    match found {
        Some(mount) => answer(mount),
        None => Reply::error(404, &format!("{wrapper}(Metrics(Stats(NoCounter)))")),
    }
}

fn blob_cache(mount: &Mount) -> BlobCache {
    let caches = mount.caches();
    let blobs = mount.rafs().bootstrap().blobs();
    BlobCache {
        underlying_files: blobs.iter().map(|blob| format!("{}.blob.data", blob.id)).collect(),
        store_path: mount.config().work_dir.to_string_lossy().into_owned(),
        counters: mount.cache_metrics().snapshot(),
        entries_count: caches.iter().map(|cache| u64::from(cache.ready_count())).sum(),
        prefetch_workers: 0,
        prefetch_unmerged_chunks: 0,
        prefetch_cumulative_time_millis: 0,
        prefetch_begin_time_secs: 0,
        prefetch_begin_time_millis: 0,
        prefetch_end_time_secs: 0,
        prefetch_end_time_millis: 0,
        buffered_backend_size: 0,
        data_all_ready: caches.iter().all(|cache| cache.ready_count() == cache.chunk_count()),
        chunks_total: blobs.iter().map(|blob| u64::from(blob.chunk_count)).sum(),
        compressed_bytes_total: blobs.iter().map(|blob| blob.data_size).sum(),
    }
}

/// The decoded value of `name` in a query string; `+` is a space.
fn parameter(query: &str, name: &str) -> Option<String> {
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
