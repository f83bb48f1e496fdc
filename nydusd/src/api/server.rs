//! HTTP/1.1 over a unix socket.
//!
//! An idle connection is never closed: supervisors hold a silent one and take its end for
//! the daemon's death. What a client can make us hold is bounded: connections, the head of a
//! request, its body, the time its body takes, and large bodies at once. A client that is over a
//! limit is told so and let go; the others do not notice.
//!
//! Who may connect: the socket is this user's (mode 0600), and whoever connects must be this
//! user or root.

use std::convert::Infallible;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{Backlog, listen};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::refusals::Refusals;
use super::reply::{Reply, error_document};
use super::routes;
use crate::daemon::Daemon;
use crate::sandbox::{Privileged, Socket};

/// Largest request body. The contract's largest documents are configurations of 1 MiB in a
/// JSON string.
const MAX_BODY: usize = 4 << 20;

/// A body up to this size is taken at any time.
const SMALL_BODY: usize = 64 << 10;

/// Larger bodies at once; more wait.
const LARGE_BODIES: usize = 4;

/// Most bytes that a request may have before its body.
const MAX_HEAD: usize = 64 << 10;

/// How long a client may take to send a body it has announced.
const BODY_PATIENCE: Duration = Duration::from_secs(30);

/// Connections at once. Each daemon has one silent one; clients open one more at a time.
const CONNECTIONS: usize = 1024;

/// Connections that are always allowed (contract 3.1), however few descriptors we may have.
const LEAST_CONNECTIONS: usize = 256;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// How long answers under way may take at the end.
const CLOSE_LIMIT: Duration = Duration::from_millis(200);

/// The listening API.
pub struct Server {
    host: Arc<Privileged>,
    close: watch::Sender<bool>,
    listener: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Replaces a stale socket file, binds and starts to answer. Call in a runtime.
    ///
    /// # Errors
    /// The socket can not be made, or a file that is no socket is in its place.
    pub async fn bind(path: &Path, daemon: Arc<Daemon>) -> anyhow::Result<Self> {
        let host = Arc::clone(daemon.host());
        let binds = Arc::clone(&host);
        // Its directory may be on a file system that does not answer.
        let socket = tokio::task::spawn_blocking(move || binds.bind_socket(Socket::Api)).await??;
        // Here and not where it was bound: clients are told that whoever listens is at the other end.
        listen(&socket, Backlog::new(BACKLOG)?)?;
        let socket = UnixListener::from_std(socket.into())?;
        let (close, closing) = watch::channel(false);
        tracing::info!("API on {}", path.display());
        let listener = tokio::spawn(accept(socket, daemon, closing));
        Ok(Self { host, close, listener })
    }

    /// Removes the socket file, lets answers under way go out and closes all connections.
    pub async fn close(self) {
        if let Err(e) = self.host.remove_socket(Socket::Api) {
            tracing::warn!("remove the API socket: {e:#}");
        }
        self.close.send_replace(true);
        // Connections that take longer end with the process.
        let _ = tokio::time::timeout(CLOSE_LIMIT, self.listener).await;
    }
}

/// How many connections are allowed at once with the descriptors that this process may have.
fn connection_limit() -> usize {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .unwrap_or((CONNECTIONS as u64, 0));
    usize::try_from(soft / 4).unwrap_or(CONNECTIONS).clamp(LEAST_CONNECTIONS, CONNECTIONS)
}

/// Waits until the server closes; a server that is gone is closed.
async fn told(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn accept(socket: UnixListener, daemon: Arc<Daemon>, mut closing: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let for_connections = closing.clone();
    let large = Arc::new(Semaphore::new(LARGE_BODIES));
    let limit = connection_limit();
    loop {
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _)) if !may_connect(&stream) => {
                    turn_away(stream, "403 Forbidden", "this daemon serves its own user and root");
                }
                Ok((stream, _)) if connections.len() >= limit => {
                    tracing::warn!("API: {limit} connections are open, one more is turned away");
                    turn_away(stream, "503 Service Unavailable", "too many connections; close some");
                }
                Ok((stream, _)) => {
                    let session = Session { daemon: Arc::clone(&daemon), large: Arc::clone(&large) };
                    connections.spawn(converse(stream, session, for_connections.clone()));
                }
                Err(e) => {
                    // Out of descriptors: what is open must close before more can come.
                    tracing::warn!("API: accept: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = connections.join_next(), if !connections.is_empty() => {}
            _ = told(&mut closing) => break,
        }
    }
    drop(socket);
    while connections.join_next().await.is_some() {}
}

/// True for root and for the user that this daemon runs as.
fn may_connect(stream: &UnixStream) -> bool {
    let allowed = |uid: u32| uid == 0 || uid == nix::unistd::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) => allowed(peer.uid()),
        Err(e) => {
            tracing::warn!("API: a client without credentials: {e}");
            false
        }
    }
}

/// Answers whatever the client may ask with an error, and closes.
fn turn_away(stream: UnixStream, status: &str, why: &str) {
    let body = error_document(why);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    // A new connection has room for this much; who does not get it sees the end all the same.
    if let Ok(mut stream) = stream.into_std() {
        let _ = stream.write_all(&[head.as_bytes(), &body].concat());
    }
}

/// What the requests of a connection need.
#[derive(Clone)]
struct Session {
    daemon: Arc<Daemon>,
    /// Places of large bodies, over all connections. Nobody closes it.
    large: Arc<Semaphore>,
}

async fn converse(stream: UnixStream, session: Session, mut closing: watch::Receiver<bool>) {
    let service = service_fn(move |request| answer(session.clone(), request));
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(true)
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(Refusals::new(stream)), service);
    tokio::pin!(connection);
    tokio::select! {
        // A client that breaks off or speaks no HTTP is its own affair.
        _ = connection.as_mut() => return,
        _ = told(&mut closing) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn answer(session: Session, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let announced = body.size_hint();
    if announced.lower() > MAX_BODY as u64 {
        return Ok(response(too_large()));
    }
    let is_large = announced.upper().is_none_or(|size| size > SMALL_BODY as u64);
    let received = async {
        let place = if is_large { session.large.acquire().await.ok() } else { None };
        match Limited::new(body, MAX_BODY).collect().await {
            Ok(body) => Ok((body.to_bytes(), place)),
            Err(e) if e.is::<LengthLimitError>() => Err(too_large()),
            Err(_) => Err(Reply::bad_request()),
        }
    };
    let reply = match tokio::time::timeout(BODY_PATIENCE, received).await {
        // The place is kept until the answer is made, for so long is the body.
        Ok(Ok((body, _place))) => {
            let query = head.uri.query().unwrap_or_default();
            routes::answer(&session.daemon, &head.method, head.uri.path(), query, &body).await
        }
        Ok(Err(reply)) => reply,
        Err(_) => Reply::error(408, "BadRequest(\"the body did not come in time\")"),
    };
    Ok(response(reply))
}

fn too_large() -> Reply {
    Reply::error(413, &format!("BadRequest(\"a body has at most {MAX_BODY} bytes\")"))
}

fn response(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(reply.body.unwrap_or_default().into()));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Nydus API"));
    headers.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
    if reply.status != StatusCode::NO_CONTENT {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    }
    response
}
