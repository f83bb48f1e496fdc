//! Blobs of a plain HTTP server, reached over TCP or a unix socket: `ADDR/PATH/ID`.
//!
//! The size comes from a `HEAD`, bytes come by ranged `GET`. The server gets no login.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use futures_util::future::BoxFuture;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::{Method, Request, StatusCode, Url};

use super::http::{Answer, Help, Http, HttpOptions, parse_url, shown};
use super::ranged::{self, Ranged, Segment};
use super::retry::{Failure, RetryPolicy};
use super::{Backend, BlobSource, ByteStream, ReadContext, Supplier};
use crate::ids::{BlobId, ByteRange};
use crate::metrics::OriginSnapshot;
use crate::oci::client::{MAX_REDIRECTS, RegistryClient, is_redirect, too_many_redirects};
use crate::{Error, ErrorKind, Result};

/// What to do where the server refuses.
const HELP: Help<'static> = Help::Text("the server of `addr` refuses; http-proxy sends it no login");

/// The `http-proxy` backend.
#[derive(Clone, Debug)]
pub struct HttpProxySource {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    http: Http,
    /// Its path ends with a slash.
    base: Url,
    /// What serves it, for messages.
    place: String,
    retry: RetryPolicy,
}

impl HttpProxySource {
    /// Objects below `path` of the server `addr`, an http or https URL; or all objects of the
    /// server behind the socket `addr`, an absolute path, and then `path` is not used.
    /// Does no I/O but reading CA files.
    ///
    /// # Errors
    /// `Invalid`: `addr` is neither, or its URL holds a login, query or fragment. Those of
    /// [`Http::new`].
    pub fn new(addr: &str, path: &str, mut options: HttpOptions, retry: RetryPolicy) -> Result<Self> {
        let (mut base, place);
        if Path::new(addr).is_absolute() {
            options.unix_socket = Some(PathBuf::from(addr));
            // The host is named in a header only.
            base = parse_url("addr", "http://localhost/")?;
            place = format!("the unix socket {addr}");
        } else {
            base = parse_url("addr", addr)
                .map_err(|_| refused("want an http or https URL, or the absolute path of a unix socket"))?;
            let login = !base.username().is_empty() || base.password().is_some();
            if login || base.query().is_some() || base.fragment().is_some() {
                return Err(refused("want no login, query or fragment in the URL"));
            }
            if let Ok(mut segments) = base.path_segments_mut() {
                segments.pop_if_empty().extend(path.split('/').filter(|part| !part.is_empty()));
            }
            place = shown(&base).to_string();
        }
        if let Ok(mut segments) = base.path_segments_mut() {
            segments.pop_if_empty().push("");
        }
        let http = Http::new(&options)?;
        Ok(Self { shared: Arc::new(Shared { http, base, place, retry }) })
    }
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("http-proxy backend: `addr`: {why}"))
}

impl BlobSource for HttpProxySource {
    fn kind(&self) -> &'static str {
        "http-proxy"
    }

    fn origins(&self) -> Vec<OriginSnapshot> {
        self.shared.http.origins().snapshot()
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        let url = self.shared.base.join(id.as_str());
        let url = url.map_err(|e| refused("no URL of a blob can be made of it").with_source(e))?;
        let blob = HttpBlob { shared: self.shared.clone(), id: id.clone(), url, size: Arc::default() };
        Ok(Arc::new(blob))
    }
}

/// One blob of the server.
#[derive(Clone, Debug)]
struct HttpBlob {
    shared: Arc<Shared>,
    id: BlobId,
    url: Url,
    size: Arc<OnceLock<u64>>,
}

impl HttpBlob {
    /// Sends a request and follows redirects: no login goes with it.
    async fn send(
        &self,
        method: Method,
        headers: &HeaderMap,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let mut url = self.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::new(method.clone(), url);
            request.headers_mut().clone_from(headers);
            let answer = self.shared.http.send_hedged(request, context).await?;
            if !is_redirect(answer.status()) {
                return Ok(answer);
            }
            url = RegistryClient::location(&answer)?;
        }
        Err(too_many_redirects(&method, &url).into())
    }

    async fn ask_size(&self, context: &ReadContext) -> std::result::Result<u64, Failure> {
        let plain = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]);
        let answer = self.send(Method::HEAD, &plain, context).await?;
        if let Some(size) = ranged::total(&answer) {
            return Ok(size);
        }
        let unanswered = [
            StatusCode::OK,
            StatusCode::METHOD_NOT_ALLOWED,
            StatusCode::NOT_IMPLEMENTED,
            StatusCode::NO_CONTENT,
        ];
        if !unanswered.contains(&answer.status()) {
            return Err(answer.into_failure(HELP, context).await);
        }
        // A range states the size beside its bytes.
        let segment = self.ask(ByteRange::new(0, 1)?, context).await?;
        ranged::total(segment.answer()).ok_or_else(|| {
            let why = format!("{}: the server tells no size", segment.answer().what());
            Error::new(ErrorKind::Unsupported, why).into()
        })
    }
}

impl Ranged for HttpBlob {
    type Part = Segment;

    async fn ask(&self, range: ByteRange, context: &ReadContext) -> std::result::Result<Segment, Failure> {
        let answer = self.send(Method::GET, &ranged::headers(&[range])?, context).await?;
        Ok(Segment::accept(answer, range, HELP, context).await?.near()?)
    }

    fn named(&self, failure: Failure) -> Failure {
        let error = failure.error.context(format_args!("blob {} of {}", self.id, self.shared.place));
        Failure { error, ..failure }
    }
}

impl Backend for HttpBlob {
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        let ask = || async { self.ask_size(context).await.map_err(|f| self.named(f)) };
        Box::pin(ranged::size(&self.size, self.shared.retry, context, ask))
    }

    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        let retry = self.shared.retry;
        Box::pin(ranged::open(self.clone(), Supplier::Origin, range, retry, context))
    }
}

#[cfg(test)]
mod tests;
