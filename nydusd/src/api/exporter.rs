//! `/metrics` on a TCP address, for scrapers that can not reach the API socket. Read-only;
//! nothing else is served here, for anybody may connect.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::counters;
use super::routes::beside;
use crate::daemon::Daemon;

/// Connections at once; more wait.
const CONNECTIONS: usize = 16;

/// How long one connection may last: a scrape takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// The listening exporter; it ends when dropped.
pub struct Exporter(AbortHandle);

impl Exporter {
    /// Binds and starts to answer.
    ///
    /// # Errors
    /// The address can not be had.
    pub async fn bind(address: SocketAddr, daemon: Arc<Daemon>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("listen on {address} for metrics; name another --metrics-addr, or port 0")
        })?;
        tracing::info!("metrics on http://{}/metrics", listener.local_addr()?);
        Ok(Self(tokio::spawn(accept(listener, daemon)).abort_handle()))
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn accept(listener: TcpListener, daemon: Arc<Daemon>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Nobody closes the semaphore.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = Arc::clone(&daemon);
                tokio::spawn(async move {
                    // Whoever is slow, or speaks no HTTP, is let go.
                    let _ = tokio::time::timeout(PATIENCE, converse(stream, daemon)).await;
                    drop(place);
                });
            }
            Err(e) => {
                tracing::warn!("metrics: accept: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, daemon: Arc<Daemon>) -> Result<(), hyper::Error> {
    let service = service_fn(move |request| {
        let daemon = Arc::clone(&daemon);
        async move { Ok::<_, Infallible>(answer(&daemon, &request).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn answer<B>(daemon: &Arc<Daemon>, request: &Request<B>) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" || request.method() != Method::GET {
        let mut response = Response::new(Full::new(Bytes::from_static(b"see /metrics\n")));
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    }
    let reply = beside(daemon, None, |daemon, _| counters::exposition(daemon)).await;
    let mut response = Response::new(Full::new(reply.body.unwrap_or_default().into()));
    *response.status_mut() = reply.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    response
}
