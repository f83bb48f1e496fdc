//! Blobs of a registry's repository, read by range.
//!
//! ```text
//!   open(range) ─▶ resolved URL known? ─ no ─▶ registry ─▶ redirect ─▶ storage
//!                        │ yes                                 │ remembered per blob
//!                        ▼                                     ▼
//!                   GET Range ◀── again from the byte reached ── reset, truncation, 5xx
//! ```
//!
//! Invariants: a stream yields exactly its range or ends with an error; a body is believed
//! only where its status and `Content-Range` say it belongs; a remembered URL that fails is
//! forgotten and resolved once more.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::{Buf as _, Bytes};
use futures_util::future::BoxFuture;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE};
use reqwest::{Method, StatusCode, Url};

use super::http::Answer;
use super::retry::{Attempts, Failure, RetryPolicy, with_retries};
use super::{Backend, BlobSource, ByteStream, ReadContext, Supplier};
use crate::digest::{Digest, DigestAlgorithm, TaggedDigest};
use crate::ids::{BlobId, ByteRange};
use crate::oci::client::{Call, MAX_REDIRECTS, RegistryClient, is_redirect, too_many_redirects};
use crate::oci::reference::{check_host, check_repository};
use crate::oci::token::Access;
use crate::{Error, ErrorKind, Result};

/// Where a server ignores `Range`, at most this much is read and thrown away to reach one.
const MAX_SKIP: u64 = 64 << 20;
/// A connection that brought this much before it broke counts as progress.
const PROGRESS_SIZE: u64 = 64 << 10;

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

    fn named(&self, failure: Failure) -> Failure {
        let error = failure.error.context(format_args!("blob {} of {}", self.digest, self.repository));
        Failure { error, ..failure }
    }

    async fn get(
        &self,
        url: Url,
        range: ByteRange,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let mut call = Call::new(Method::GET, url, Access::pull(&*self.repository));
        let value = format!("bytes={}-{}", range.start(), range.end() - 1);
        let value = HeaderValue::from_str(&value)
            .map_err(|e| Error::new(ErrorKind::Invalid, "a Range header").with_source(e))?;
        call.headers.insert(RANGE, value);
        // A compressed transfer would count other bytes than the blob's.
        call.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        self.client.send(call, context).await
    }

    /// Asks for `range`, which is not empty, and checks what the answer is.
    async fn segment(
        &self,
        range: ByteRange,
        context: &ReadContext,
    ) -> std::result::Result<Segment, Failure> {
        let remembered = self.resolved().clone();
        if let Some(url) = remembered {
            let result = self.get(url.clone(), range, context).await;
            match result {
                Ok(answer) if answer.status().is_success() => {
                    match self.accept(answer, range, context).await {
                        Ok(segment) => return Ok(segment),
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
            let answer = self.get(url.clone(), range, context).await?;
            if is_redirect(answer.status()) {
                url = self.rewrite.apply(RegistryClient::location(&answer)?)?;
                continue;
            }
            let segment = self.accept(answer, range, context).await?;
            if hop > 0 {
                *self.resolved() = Some(url);
            }
            return Ok(segment);
        }
        Err(too_many_redirects(&Method::GET, &url).into())
    }

    async fn accept(
        &self,
        answer: Answer,
        range: ByteRange,
        context: &ReadContext,
    ) -> std::result::Result<Segment, Failure> {
        let refuse =
            |kind, why: String| -> Failure { Error::new(kind, format!("{}: {why}", answer.what())).into() };
        if !matches!(answer.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
            return Err(answer.into_failure(self.client.host(), context).await);
        }
        if let Some(encoding) =
            answer.header(CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity"))
        {
            return Err(refuse(ErrorKind::Unsupported, format!("the body is encoded as {encoding:?}")));
        }
        let shorter = |size: u64| format!("the blob has {size} bytes, {range} was asked for");
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            let header = answer.header(CONTENT_RANGE).unwrap_or_default();
            let Some((start, end, size)) = parse_content_range(header) else {
                return Err(refuse(
                    ErrorKind::Corrupt,
                    format!("Content-Range {header:?} is not one of bytes"),
                ));
            };
            if start != range.start() || end > range.end() {
                let why = format!("Content-Range {header:?} is not the range {range} that was asked for");
                return Err(refuse(ErrorKind::Corrupt, why));
            }
            if let Some(size) = size.filter(|size| *size < range.end()) {
                return Err(refuse(ErrorKind::OutOfRange, shorter(size)));
            }
            return Ok(Segment { answer, skip: 0, left: end - start });
        }
        let size = answer.header(CONTENT_LENGTH).and_then(|v| v.parse::<u64>().ok());
        if let Some(size) = size.filter(|size| *size < range.end()) {
            return Err(refuse(ErrorKind::OutOfRange, shorter(size)));
        }
        if range.start() > MAX_SKIP {
            let why =
                format!("the server ignores Range, and byte {} is too far in to skip to", range.start());
            return Err(refuse(
                ErrorKind::Unsupported,
                format!("{why}; use a registry that supports ranges"),
            ));
        }
        Ok(Segment { answer, skip: range.start(), left: range.len() })
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
            let segment = self.segment(first, context).await.map_err(|f| self.named(f))?;
            let answer = &segment.answer;
            let total = match answer.status() {
                StatusCode::PARTIAL_CONTENT => {
                    answer.header(CONTENT_RANGE).and_then(parse_content_range).and_then(|r| r.2)
                }
                _ => answer.header(CONTENT_LENGTH).and_then(|v| v.parse().ok()),
            };
            total.ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, format!("{}: the server tells no size", answer.what()))
                    .into()
            })
        })
        .await
    }
}

/// `bytes FIRST-LAST/TOTAL` as start, end and size; `None` if it is anything else.
fn parse_content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse::<u64>().ok()?),
    };
    let end = last.checked_add(1)?;
    (first < end && total.is_none_or(|total| end <= total)).then_some((first, end, total))
}

/// A body that covers the front of the range still wanted.
struct Segment {
    answer: Answer,
    /// Bytes to throw away first.
    skip: u64,
    /// Bytes wanted of it after that.
    left: u64,
}

impl Segment {
    /// The next wanted bytes, never empty; `None` once it is exhausted.
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        while self.left > 0 {
            let Some(mut piece) = self.answer.chunk(context).await? else {
                let why =
                    format!("{}: the body ended {} bytes early", self.answer.what(), self.skip + self.left);
                return Err(Failure::passing(Error::new(ErrorKind::Unavailable, why)));
            };
            let skipped = self.skip.min(piece.len() as u64);
            self.skip -= skipped;
            // Both are at most the piece's length.
            piece.advance(skipped as usize);
            piece.truncate(self.left.min(piece.len() as u64) as usize);
            if !piece.is_empty() {
                self.left -= piece.len() as u64;
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

/// A range being read.
struct Reading {
    blob: RegistryBlob,
    context: ReadContext,
    /// What is not yet delivered.
    rest: ByteRange,
    segment: Option<Segment>,
    attempts: Attempts,
    /// Delivered since the last failure.
    progress: u64,
}

impl Reading {
    async fn fail(&mut self, failure: Failure) -> Result<()> {
        self.segment = None;
        if self.progress >= PROGRESS_SIZE {
            self.attempts.reset();
        }
        self.progress = 0;
        self.attempts.pause(self.blob.named(failure), &self.context).await
    }

    /// Holds a segment afterwards.
    async fn connect(&mut self) -> Result<()> {
        loop {
            match self.blob.segment(self.rest, &self.context).await {
                Ok(segment) => {
                    self.segment = Some(segment);
                    return Ok(());
                }
                Err(failure) => self.fail(failure).await?,
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        while !self.rest.is_empty() {
            let Some(segment) = &mut self.segment else {
                self.connect().await?;
                continue;
            };
            match segment.next(&self.context).await {
                Ok(Some(piece)) => {
                    let len = piece.len() as u64;
                    self.rest = ByteRange::new(self.rest.start() + len, self.rest.len() - len)?;
                    self.progress += len;
                    return Ok(Some(piece));
                }
                // The server sent less than asked for, as it may: the rest is asked for again.
                Ok(None) => self.segment = None,
                Err(failure) => self.fail(failure).await?,
            }
        }
        Ok(None)
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
        Box::pin(async move {
            let mut reading = Reading {
                blob: self.clone(),
                context: context.clone(),
                rest: range,
                segment: None,
                attempts: Attempts::new(self.retry, context.priority),
                progress: 0,
            };
            if !range.is_empty() {
                reading.connect().await?;
            }
            let stream = futures_util::stream::try_unfold(reading, |mut reading| async move {
                Ok(reading.next().await?.map(|piece| (piece, reading)))
            });
            Ok(ByteStream::new(Supplier::Origin, stream))
        })
    }
}

#[cfg(test)]
mod tests;
