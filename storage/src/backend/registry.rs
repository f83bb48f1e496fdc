//! Blobs of a registry's repository, read by range.
//!
//! ```text
//!   open(range) ─▶ resolved URL known? ─ no ─▶ registry ─▶ redirect ─▶ storage
//!                        │ yes                                 │ remembered per blob
//!                        ▼                                     ▼
//!                   GET Range ◀── again from the byte reached ── reset, truncation, 5xx
//! ```
//!
//! Invariant: a remembered URL that fails is forgotten and resolved once more. What is believed
//! of an answer, and how a broken stream goes on, is [`ranged`]'s.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::{Method, StatusCode, Url};

use super::http::Answer;
use super::ranged::{self, Part, Parts, Ranged, Segment};
use super::retry::{Failure, RetryPolicy, with_retries};
use super::{Backend, BlobSource, ByteStream, ReadContext, Supplier};
use crate::digest::{Digest, DigestAlgorithm, TaggedDigest};
use crate::ids::{BlobId, ByteRange};
use crate::oci::client::{Call, MAX_REDIRECTS, RegistryClient, is_redirect, too_many_redirects};
use crate::oci::reference::{check_host, check_repository};
use crate::oci::token::Access;
use crate::{Error, ErrorKind, Result};

/// How `Location`s of blobs are changed before use (`blob_url_scheme`, `blob_redirected_host`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// `HOST` or `HOST:PORT`.
    pub host: Option<String>,
}

impl Rewrite {
    /// Checks the configuration's values; empty ones mean none.
    ///
    /// # Errors
    /// `Invalid`: another scheme, or not a host.
    pub fn new(blob_url_scheme: &str, blob_redirected_host: &str) -> Result<Self> {
        if !matches!(blob_url_scheme, "" | "http" | "https") {
            let why = format!("blob_url_scheme {blob_url_scheme:?}: want http or https");
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        if !blob_redirected_host.is_empty() {
            check_host(blob_redirected_host).map_err(|e| e.context("blob_redirected_host"))?;
        }
        let set = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        Ok(Self { scheme: set(blob_url_scheme), host: set(blob_redirected_host) })
    }

    fn apply(&self, mut url: Url) -> Result<Url> {
        let refused = || Error::new(ErrorKind::Invalid, "a redirect that can not be rewritten as configured");
        if let Some(host) = &self.host {
            let (name, port) = match host.rsplit_once(':') {
                Some((name, port)) if !port.ends_with(']') => (name, port.parse().ok()),
                _ => (host.as_str(), None),
            };
            url.set_host(Some(name)).map_err(|_| refused())?;
            url.set_port(port).map_err(|()| refused())?;
        }
        if let Some(scheme) = &self.scheme {
            url.set_scheme(scheme).map_err(|()| refused())?;
        }
        Ok(url)
    }
}

/// Opens blobs of one repository.
#[derive(Debug)]
pub struct RegistrySource {
    client: RegistryClient,
    repository: String,
    rewrite: Rewrite,
    retry: RetryPolicy,
}

impl RegistrySource {
    /// Blobs of `repository`; `retry` is for reads, usually [`RetryPolicy::READS`].
    ///
    /// # Errors
    /// `Invalid`: not a repository's name.
    pub fn new(
        client: RegistryClient,
        repository: &str,
        rewrite: Rewrite,
        retry: RetryPolicy,
    ) -> Result<Self> {
        check_repository(repository)?;
        Ok(Self { client, repository: repository.to_owned(), rewrite, retry })
    }

    /// The client, for a change of login.
    pub fn client(&self) -> &RegistryClient {
        &self.client
    }
}

impl BlobSource for RegistrySource {
    fn kind(&self) -> &'static str {
        "registry"
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        let digest = Digest::from_hex(id.as_str())
            .map_err(|e| e.context("a registry holds only blobs named by SHA-256"))?;
        let digest = TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest };
        let blob = RegistryBlob::new(self.client.clone(), &self.repository, digest);
        Ok(Arc::new(blob.with_retry(self.retry).with_rewrite(self.rewrite.clone())))
    }
}

/// One blob of a repository.
#[derive(Clone, Debug)]
pub struct RegistryBlob {
    client: RegistryClient,
    repository: String,
    digest: TaggedDigest,
    rewrite: Rewrite,
    retry: RetryPolicy,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Where the registry's redirects led last; may hold a signature, so never shown whole.
    resolved: Mutex<Option<Url>>,
    size: OnceLock<u64>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("size", &self.size).finish_non_exhaustive()
    }
}

impl RegistryBlob {
    /// The blob `digest` of `repository`, retried as the client's own requests are.
    pub fn new(client: RegistryClient, repository: &str, digest: TaggedDigest) -> Self {
        let retry = client.retry();
        let (repository, rewrite) = (repository.to_owned(), Rewrite::default());
        Self { client, repository, digest, rewrite, retry, shared: Arc::default() }
    }

    /// Retries as `retry` says.
    #[must_use]
    pub fn with_retry(self, retry: RetryPolicy) -> Self {
        Self { retry, ..self }
    }

    /// Changes redirects as `rewrite` says.
    #[must_use]
    pub fn with_rewrite(self, rewrite: Rewrite) -> Self {
        Self { rewrite, ..self }
    }

    fn resolved(&self) -> std::sync::MutexGuard<'_, Option<Url>> {
        self.shared.resolved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the remembered URL, unless another reader has replaced it meanwhile.
    fn forget(&self, url: &Url) {
        let mut resolved = self.resolved();
        if resolved.as_ref() == Some(url) {
            *resolved = None;
        }
    }

    async fn get(
        &self,
        url: Url,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let mut call = Call::new(Method::GET, url, Access::pull(&*self.repository));
        call.headers = ranged::headers(ranges)?;
        self.client.send(call, context).await
    }

    /// Size by HEAD, or by the total of a one-byte range where HEAD is not answered.
    async fn ask_size(&self, context: &ReadContext) -> Result<u64> {
        match self.client.blob_size(&self.repository, self.digest, context).await {
            Ok(Some(size)) => return Ok(size),
            Ok(None) => {
                let why = format!("blob {} is not in repository {}", self.digest, self.repository);
                return Err(Error::new(ErrorKind::NotFound, format!("{why} of {}", self.client.host())));
            }
            Err(e) if e.kind() == ErrorKind::Unsupported => {}
            Err(e) => return Err(e.context(format_args!("blob {}", self.digest))),
        }
        let first = ByteRange::new(0, 1)?;
        with_retries(self.retry, context, || async {
            let body = self.request(&[first], context).await.map_err(|f| self.named(f))?;
            let Some(Body::One(segment)) = body else {
                return Err(Error::new(ErrorKind::Unsupported, "no answer to one range").into());
            };
            let answer = segment.answer();
            let total = ranged::total(answer);
            total.ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, format!("{}: the server tells no size", answer.what()))
                    .into()
            })
        })
        .await
    }

    /// Where the blob is asked for: where redirects led last, else the registry.
    fn place(&self) -> Result<Url> {
        match self.resolved().clone() {
            Some(url) => Ok(url),
            None => self.client.url(&format!("{}/blobs/{}", self.repository, self.digest)),
        }
    }

    /// Asks for `ranges`; `None` as [`Ranged::ask_many`].
    async fn request(
        &self,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Option<Body>, Failure> {
        if ranges.len() > 1 && !self.client.origin(&self.place()?).takes_many() {
            return Ok(None);
        }
        let remembered = self.resolved().clone();
        if let Some(url) = remembered {
            let result = self.get(url.clone(), ranges, context).await;
            match result {
                Ok(answer) if answer.status().is_success() => {
                    match self.accept(answer, ranges, context).await {
                        Ok(body) => return Ok(body),
                        // Not the blob any more.
                        Err(_) => self.forget(&url),
                    }
                }
                Ok(answer) if answer.status() == StatusCode::TOO_MANY_REQUESTS => {
                    return Err(answer.into_failure(self.client.host(), context).await);
                }
                // Expired or moved: once more from the start.
                Ok(_) => self.forget(&url),
                Err(failure) => {
                    self.forget(&url);
                    return Err(failure);
                }
            }
        }
        let mut url = self.client.url(&format!("{}/blobs/{}", self.repository, self.digest))?;
        for hop in 0..=MAX_REDIRECTS {
            let answer = self.get(url.clone(), ranges, context).await?;
            if is_redirect(answer.status()) {
                url = self.rewrite.apply(RegistryClient::location(&answer)?)?;
                continue;
            }
            let body = self.accept(answer, ranges, context).await?;
            if hop > 0 {
                *self.resolved() = Some(url);
            }
            return Ok(body);
        }
        Err(too_many_redirects(&Method::GET, &url).into())
    }

    async fn accept(
        &self,
        answer: Answer,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Option<Body>, Failure> {
        if let [range] = ranges {
            let segment = Segment::accept(answer, *range, self.client.host(), context).await?;
            return Ok(Some(Body::One(segment)));
        }
        let origin = self.client.origin(answer.url());
        let parts = Parts::accept(answer, origin, ranges, self.client.host(), context).await?;
        Ok(parts.map(Body::Many))
    }
}

/// A body that belongs to what was asked for.
pub(super) enum Body {
    One(Segment),
    Many(Parts),
}

impl Part for Body {
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        match self {
            Self::One(segment) => segment.next(context).await,
            Self::Many(parts) => parts.next(context).await,
        }
    }
}

impl Ranged for RegistryBlob {
    type Part = Body;

    async fn ask(&self, range: ByteRange, context: &ReadContext) -> std::result::Result<Body, Failure> {
        let body = self.request(&[range], context).await?;
        body.ok_or_else(|| Error::new(ErrorKind::Unsupported, "no answer to one range").into())
    }

    async fn ask_many(
        &self,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Option<Body>, Failure> {
        self.request(ranges, context).await
    }

    fn named(&self, failure: Failure) -> Failure {
        let error = failure.error.context(format_args!("blob {} of {}", self.digest, self.repository));
        Failure { error, ..failure }
    }
}

impl Backend for RegistryBlob {
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        Box::pin(async {
            match self.shared.size.get() {
                Some(size) => Ok(*size),
                None => {
                    let size = self.ask_size(context).await?;
                    Ok(*self.shared.size.get_or_init(|| size))
                }
            }
        })
    }

    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        Box::pin(ranged::open(self.clone(), Supplier::Origin, range, self.retry, context))
    }

    fn open_many<'a>(
        &'a self,
        ranges: &'a [ByteRange],
        context: &'a ReadContext,
    ) -> BoxFuture<'a, Result<Option<ByteStream>>> {
        Box::pin(ranged::open_many(self.clone(), Supplier::Origin, ranges, self.retry, context))
    }
}

#[cfg(test)]
mod tests;
