//! Which request gets which answer (contract 3.2, 3.3).
//!
//! [`ROUTES`] says what may be asked and whether a body belongs to it; [`answer`] has one arm a
//! path. `misc/openapi.json` describes the same to people and programs, and a test holds the two
//! together.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use clap::ValueEnum as _;
use hyper::Method;
use serde_json::json;

use super::query::Query;
use super::reply::Reply;
use super::types::{Backend, Configure, Info};
use super::{counters, hot, superblock};
use crate::cli::LogLevel;
use crate::daemon::Daemon;
use crate::failover::LifeError;
use crate::metrics::FsMetrics;
use crate::mount::Mount;
use crate::trace::files::Optimize;
use crate::vfs::mounted::Mounted;
use crate::why;

/// The API's own description.
const OPENAPI: &str = include_str!("../../../misc/openapi.json");

/// Whether a request has a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    /// It has none.
    None,
    /// It has one.
    Some,
    /// As it likes.
    Any,
}

/// Methods of one path, and whether each takes a body. A body of a GET is ignored.
type Methods = &'static [(&'static str, Body)];

const GET: Methods = &[("GET", Body::Any)];
const PUT: Methods = &[("PUT", Body::None)];

/// Every path. Another method on one of them is a bad request, another path no route.
const ROUTES: [(&str, Methods); 23] = [
    ("/metrics", GET),
    ("/api/v1/openapi", GET),
    ("/api/v1/why", GET),
    ("/api/v1/trace", GET),
    ("/api/v1/trace/push", &[("POST", Body::Any)]),
    ("/api/v1/prefetch", &[("GET", Body::Any), ("POST", Body::Some), ("DELETE", Body::Any)]),
    ("/api/v1/daemon", &[("GET", Body::Any), ("PUT", Body::Some)]),
    ("/api/v2/daemon", &[("GET", Body::Any), ("PUT", Body::Some)]),
    ("/api/v1/daemon/events", GET),
    ("/api/v1/daemon/backend", GET),
    ("/api/v1/daemon/start", PUT),
    ("/api/v1/daemon/exit", PUT),
    ("/api/v1/daemon/fuse/sendfd", PUT),
    ("/api/v1/daemon/fuse/takeover", PUT),
    ("/api/v1/mount", &[("POST", Body::Some), ("PUT", Body::Some), ("DELETE", Body::None)]),
    ("/api/v1/config", &[("GET", Body::Any), ("PUT", Body::Some)]),
    ("/api/v1/metrics", GET),
    ("/api/v1/metrics/files", GET),
    ("/api/v1/metrics/pattern", GET),
    ("/api/v1/metrics/backend", GET),
    ("/api/v1/metrics/blobcache", GET),
    ("/api/v1/metrics/inflight", GET),
    ("/api/v2/blobs", &[("GET", Body::Any), ("PUT", Body::Some), ("DELETE", Body::None)]),
];

/// The answer to a request whose path, method or body the API does not know.
fn refuse(method: &Method, path: &str, has_body: bool) -> Option<Reply> {
    let Some((_, methods)) = ROUTES.iter().find(|(known, _)| *known == path) else {
        return Some(Reply::error(404, "NoRoute"));
    };
    let body = methods.iter().find(|(known, _)| *known == method.as_str()).map(|(_, body)| *body);
    match (body, has_body) {
        (Some(Body::Any), _) | (Some(Body::Some), true) | (Some(Body::None), false) => None,
        _ => Some(Reply::bad_request()),
    }
}

/// Answers one request. `body` is empty if there is none.
pub(super) async fn answer(
    daemon: &Arc<Daemon>,
    method: &Method,
    path: &str,
    query: &str,
    body: &[u8],
) -> Reply {
    if let Some(refusal) = refuse(method, path, !body.is_empty()) {
        return refusal;
    }
    let get = method == Method::GET;
    let Some(query) = Query::parse(query) else { return Reply::bad_query("want UTF-8 behind the %") };
    let id = query.get("id").filter(|id| !id.is_empty());
    match path {
        "/api/v1/daemon" | "/api/v2/daemon" if get => info(daemon, path.starts_with("/api/v1")),
        "/api/v1/daemon" | "/api/v2/daemon" => configure(body),
        "/api/v1/daemon/start" => step("Configure", daemon, Daemon::begin).await,
        "/api/v1/daemon/exit" => {
            daemon.exit();
            Reply::empty()
        }
        "/api/v1/daemon/fuse/sendfd" => step("Upgrade", daemon, Daemon::save_state).await,
        "/api/v1/daemon/fuse/takeover" => step("Upgrade", daemon, Daemon::take_over).await,
        "/api/v1/mount" => match query.get("mountpoint") {
            Some(mountpoint) => super::mounts::answer(daemon, method, mountpoint.to_owned(), body).await,
            None => Reply::bad_query("mountpoint should be specified in query string"),
        },
        "/api/v1/daemon/events" => Reply::json(&crate::metrics::events::snapshot()),
        "/api/v1/daemon/backend" => match query.get("mountpoint") {
            Some(mountpoint) => superblock::answer(daemon, mountpoint),
            None => Reply::bad_query("mountpoint should be specified in query string"),
        },
        "/api/v1/config" if get => hot::get(daemon, id),
        "/api/v1/config" => {
            let reply = hot::put(daemon, id, body);
            keep(daemon).await;
            reply
        }
        "/api/v1/metrics" => counters::global(daemon, id),
        "/api/v1/metrics/files" => counters::files(daemon, id, query.get("latest") == Some("true")),
        "/api/v1/metrics/pattern" => counters::pattern(daemon, id),
        "/api/v1/metrics/backend" => counters::backend(daemon, id),
        "/api/v1/metrics/blobcache" => beside(daemon, id, counters::blob_cache).await,
        "/api/v1/metrics/inflight" => counters::inflight(daemon),
        "/metrics" => beside(daemon, id, |daemon, _| counters::exposition(daemon)).await,
        "/api/v1/openapi" => Reply::json_text(OPENAPI),
        "/api/v1/why" => beside(daemon, id, explain).await,
        "/api/v1/trace/push" => push_trace(daemon, id).await,
        "/api/v1/trace" => with_mount(daemon, id, "Trace", |mount| trace(mount, query.get("format"))),
        "/api/v1/prefetch" => super::prefetch::answer(daemon, method, query.get("id"), body),
        "/api/v2/blobs" => blobs(method, &query, body),
        // What the table knows has an arm above.
        _ => Reply::error(404, "NoRoute"),
    }
}

/// Makes an answer beside the control plane: to count what is in a cache is to read its disk.
pub(super) async fn beside(
    daemon: &Arc<Daemon>,
    id: Option<&str>,
    answer: impl FnOnce(&Daemon, Option<&str>) -> Reply + Send + 'static,
) -> Reply {
    let (daemon, id) = (Arc::clone(daemon), id.map(str::to_owned));
    let answered = tokio::task::spawn_blocking(move || answer(&daemon, id.as_deref())).await;
    answered.unwrap_or_else(|_| Reply::error(500, "BadRequest(\"the answer could not be made\")"))
}

fn explain(daemon: &Daemon, id: Option<&str>) -> Reply {
    with_mount(daemon, id, "Why", |mount| match mount.recorder() {
        Some(recorder) => Reply::json(&why::build(mount, recorder)),
        None => Reply::error(404, "Why(\"nothing is recorded: `why` is false in the configuration\")"),
    })
}

/// Blobs belong to fscache, which this kind of daemon is not; only to drop its file of a blob is
/// done already.
fn blobs(method: &Method, query: &Query, body: &[u8]) -> Reply {
    let has = |name| query.get(name).is_some();
    match *method {
        Method::PUT => match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(body) {
            Ok(_) => Reply::unsupported("CreateBlobObject"),
            Err(e) => Reply::bad_body(&e),
        },
        Method::DELETE if has("domain_id") => Reply::unsupported("DeleteBlobObject"),
        Method::DELETE if has("blob_id") => Reply::empty(),
        Method::DELETE => Reply::bad_query("domain_id or blob_id should be specified in query string"),
        _ if has("domain_id") => Reply::unsupported("GetBlobObjects"),
        _ => Reply::bad_query("domain_id should be specified in query string"),
    }
}

/// Takes a step of the daemon's life, which blocks, and answers how that went.
async fn step(
    wrapper: &str,
    daemon: &Arc<Daemon>,
    step: impl FnOnce(&Daemon) -> Result<(), LifeError> + Send + 'static,
) -> Reply {
    let daemon = Arc::clone(daemon);
    let result = tokio::task::spawn_blocking(move || step(&daemon)).await;
    let error = match result {
        Ok(Ok(())) => return Reply::empty(),
        Ok(Err(error)) => error,
        Err(e) => LifeError::Failed(e.into()),
    };
    let (status, inner) = match error {
        LifeError::Unexpected(event) => return Reply::unexpected(wrapper, event),
        LifeError::NotReady => (503, "NotReady".to_owned()),
        LifeError::NoSupervisor => (500, "UpgradeManager(\"MissingSupervisorPath\")".to_owned()),
        LifeError::Failed(e) => {
            tracing::error!("{e:#}");
            (500, format!("UpgradeManager({:?})", format!("{e:#}")))
        }
    };
    Reply::error(status, &format!("{wrapper}(DaemonAbnormal({inner}))"))
}

/// Has a successor know of a change, before the client hears that it is done. Blocks beside this.
async fn keep(daemon: &Arc<Daemon>) {
    let daemon = Arc::clone(daemon);
    // A failure is logged there; a panic is, too.
    let _ = tokio::task::spawn_blocking(move || daemon.keep_state()).await;
}

fn info(daemon: &Daemon, with_backends: bool) -> Reply {
    let backends = || {
        let mounts = daemon.adapter().table().all();
        mounts.iter().map(|mounted| (mounted.mountpoint().to_owned(), backend(mounted))).collect()
    };
    Reply::json(&Info {
        version: crate::version::BUILD,
        id: daemon.id(),
        supervisor: daemon.supervisor().map(Path::to_string_lossy),
        state: daemon.state().name(),
        backend_collection: with_backends.then(backends),
    })
}

fn backend(mounted: &Mounted) -> Backend {
    let time = |at: SystemTime| chrono::DateTime::<chrono::Local>::from(at).to_rfc3339();
    let mountpoint = mounted.mountpoint().to_owned();
    match mounted {
        Mounted::Image(mount) => Backend {
            backend_type: "Rafs",
            mountpoint,
            mounted_time: time(mount.mounted_at()),
            config: mount.config().public_json(),
            bootstrap: Some(format!("sha256:{}", mount.bootstrap_digest())),
            verified: Some(!mount.rafs().is_unverified()),
            source: None,
        },
        Mounted::Host(host) => Backend {
            backend_type: "PassthroughFs",
            mountpoint,
            mounted_time: time(host.mounted_at()),
            config: serde_json::Value::Null,
            bootstrap: None,
            verified: None,
            source: Some(host.source().to_string_lossy().into_owned()),
        },
    }
}

/// Pushes the start-up trace: the artifact's digest, null if the registry knew it all.
async fn push_trace(daemon: &Daemon, id: Option<&str>) -> Reply {
    let (Some(mount), Some(engine)) = (find_mount(daemon, id), daemon.engine()) else {
        return Reply::no_counter("Trace");
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
        Some(_) => Reply::bad_query("format: want trace or optimize"),
    }
}

fn configure(body: &[u8]) -> Reply {
    let request: Configure = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(e) => return Reply::bad_body(&e),
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
pub(super) fn with_mount(
    daemon: &Daemon,
    id: Option<&str>,
    wrapper: &str,
    answer: impl FnOnce(&Mount) -> Reply,
) -> Reply {
    match find_mount(daemon, id) {
        Some(mount) => answer(&mount),
        None => Reply::no_counter(wrapper),
    }
}

/// The mount that `id` names by mountpoint, else by instance id; without `id` the only one.
pub(super) fn find_mount(daemon: &Daemon, id: Option<&str>) -> Option<Arc<Mount>> {
    let mounts = daemon.adapter().table().mounts();
    match (id, mounts.as_slice()) {
        (Some(id), mounts) => {
            let by_place = mounts.iter().find(|mount| mount.mountpoint() == id);
            by_place.or_else(|| mounts.iter().find(|mount| mount.config().id == id)).cloned()
        }
        (None, [only]) => Some(Arc::clone(only)),
        (None, _) => None,
    }
}

/// The counters of what `id` names, or of all that is mounted if that is one: with their mountpoint.
pub(super) fn with_counters(
    daemon: &Daemon,
    id: Option<&str>,
    wrapper: &str,
    answer: impl FnOnce(&str, &FsMetrics) -> Reply,
) -> Reply {
    let all = daemon.adapter().table().all();
    let host = match (id, all.as_slice()) {
        (Some(id), all) => all.iter().find(|mounted| mounted.mountpoint() == id),
        (None, [only]) => Some(only),
        (None, _) => return Reply::no_counter(wrapper),
    };
    match host.and_then(Mounted::host) {
        Some(host) => answer(host.mountpoint(), host.metrics()),
        None => with_mount(daemon, id, wrapper, |mount| answer(mount.mountpoint(), mount.metrics())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_table_does_not_know_is_refused() {
        for (method, path, has_body, status) in [
            (Method::GET, "/api/v1/daemon", false, None),
            (Method::GET, "/api/v1/daemon", true, None),
            (Method::GET, "/api/v1/daemon/", false, Some(404)),
            (Method::GET, "/api/v1/Daemon", false, Some(404)),
            (Method::PUT, "/api/v1/daemon", false, Some(400)),
            (Method::POST, "/api/v1/daemon", true, Some(400)),
            (Method::HEAD, "/api/v1/daemon", false, Some(400)),
            (Method::PUT, "/api/v1/daemon/exit", true, Some(400)),
            (Method::PUT, "/api/v1/daemon/exit", false, None),
            (Method::POST, "/api/v1/mount", false, Some(400)),
            (Method::DELETE, "/api/v1/mount", true, Some(400)),
        ] {
            let found = refuse(&method, path, has_body).map(|reply| reply.status.as_u16());
            assert_eq!(found, status, "{method} {path} {has_body}");
        }
    }
}
