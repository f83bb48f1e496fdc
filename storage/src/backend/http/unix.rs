//! HTTP over a unix socket. A sandboxed process can not connect to one, so whoever is outside does.

use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{ACCEPT, USER_AGENT};
use http::{HeaderValue, Uri};
use hyper_util::client::legacy::{Builder, Client};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use reqwest::{Body, Request, Response, ResponseBuilderExt as _};
use tower_service::Service;

use super::meaning::Broken;
use super::{HttpOptions, MAX_IDLE_CONNECTIONS};

/// A pool of connections to one socket.
#[derive(Clone, Debug)]
pub(super) struct UnixClient(Client<Dial, Body>);

impl UnixClient {
    pub fn new(path: &Path, options: &HttpOptions) -> Self {
        let dial = Dial { path: path.to_owned(), limit: options.connect_timeout };
        let mut builder = Builder::new(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_max_idle_per_host(MAX_IDLE_CONNECTIONS);
        Self(builder.build(dial))
    }

    /// Sends `request`, and awaits the head of its answer.
    pub async fn execute(&self, request: Request) -> Result<Response, Broken> {
        let url = request.url().clone();
        let mut request = http::Request::<Body>::try_from(request)?;
        let headers = request.headers_mut();
        headers.entry(USER_AGENT).or_insert(HeaderValue::from_static(super::USER_AGENT));
        headers.entry(ACCEPT).or_insert(HeaderValue::from_static("*/*"));
        let (parts, body) = self.0.request(request).await?.into_parts();
        let response = http::Response::builder().status(parts.status).version(parts.version).url(url);
        let mut response = response.body(Body::wrap(body)).map_err(io::Error::other)?;
        *response.headers_mut() = parts.headers;
        Ok(response.into())
    }
}

/// Connects.
#[derive(Clone, Debug)]
struct Dial {
    path: PathBuf,
    limit: Option<Duration>,
}

impl Service<Uri> for Dial {
    type Response = TokioIo<tokio::net::UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The host in a URL means nothing here.
    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { path, limit } = self.clone();
        let connect = async move {
            let connected = tokio::task::spawn_blocking(move || crate::outside::connect(&path)).await?;
            let stream: UnixStream = connected?;
            stream.set_nonblocking(true)?;
            Ok(TokioIo::new(tokio::net::UnixStream::from_std(stream)?))
        };
        Box::pin(async move {
            match limit {
                Some(limit) => tokio::time::timeout(limit, connect).await?,
                None => connect.await,
            }
        })
    }
}
