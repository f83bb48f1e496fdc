//! HTTP/1.1 over a unix socket.
//!
//! An idle connection is never closed: supervisors hold a silent one and take its end for
//! the daemon's death.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use nix::sys::stat::{Mode, umask};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::routes::{self, Reply};
use crate::daemon::Daemon;

/// Largest request body. The contract's largest documents are configurations of 1 MiB in a
/// JSON string.
const MAX_BODY: usize = 4 << 20;

/// How long answers under way may take at the end.
const CLOSE_LIMIT: Duration = Duration::from_millis(200);

/// The listening API.
pub struct Server {
    path: PathBuf,
    close: watch::Sender<bool>,
    listener: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Replaces a stale socket file, binds and starts to answer. Call in a runtime.
    ///
    /// # Errors
    /// The socket can not be made.
    pub fn bind(path: &Path, daemon: Arc<Daemon>) -> anyhow::Result<Self> {
        let context = || format!("API socket {}", path.display());
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).with_context(context),
            _ => {}
        }
        // Only this user may connect, from the first moment on.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(before);
        let socket = bound.with_context(context)?;
        let (close, closing) = watch::channel(false);
        tracing::info!("API on {}", path.display());
        let listener = tokio::spawn(accept(socket, daemon, closing));
        Ok(Self { path: path.to_owned(), close, listener })
    }

    /// Removes the socket file, lets answers under way go out and closes all connections.
    pub async fn close(self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            tracing::warn!("API socket {}: {e}", self.path.display());
        }
        self.close.send_replace(true);
        // Connections that take longer end with the process.
        let _ = tokio::time::timeout(CLOSE_LIMIT, self.listener).await;
    }
}

/// Waits until the server closes; a server that is gone is closed.
async fn told(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn accept(socket: UnixListener, daemon: Arc<Daemon>, mut closing: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let for_connections = closing.clone();
    loop {
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, Arc::clone(&daemon), for_connections.clone()));
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

async fn converse(stream: UnixStream, daemon: Arc<Daemon>, mut closing: watch::Receiver<bool>) {
    let service = service_fn(move |request| answer(Arc::clone(&daemon), request));
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(true)
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        // A client that breaks off or speaks no HTTP is its own affair.
        _ = connection.as_mut() => return,
        _ = told(&mut closing) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn answer(
    daemon: Arc<Daemon>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let reply = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => {
            let query = head.uri.query().unwrap_or_default();
            routes::answer(&daemon, &head.method, head.uri.path(), query, &body.to_bytes()).await
        }
        Err(_) => Reply::error(400, "BadRequest"),
    };
    let mut response = Response::new(Full::new(reply.body.unwrap_or_default().into()));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Nydus API"));
    headers.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
    if reply.status != hyper::StatusCode::NO_CONTENT {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    }
    Ok(response)
}
