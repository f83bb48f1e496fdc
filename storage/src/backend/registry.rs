//! Blobs of a registry's repository, read by range.
//!
//! ```text
//!   open(range) ─▶ resolved URL known? ─ no ─▶ registry ─▶ redirect ─▶ storage
//!                        │ yes                                 │ remembered per blob
//!                        ▼                                     ▼
//!                   GET Range ◀── again from the byte reached ── reset, truncation, 5xx
//! ```
//!
//! Several ranges are asked for with one request where the server has that. A server that
//! ignores `Range` is read once, in sequence ([`sequential`]).
//!
//! Mirrors and a proxy may be tried first ([`detour`]).
//!
//! Invariant: a remembered URL that fails is forgotten and resolved once more. What is believed
//! of an answer, and how a broken stream goes on, is [`ranged`]'s.

mod detour;
mod source;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode, Url};

use self::detour::{Detour, Passage};
pub use self::detour::{MirrorOptions, ProxyOptions};
pub use self::source::{RegistrySource, Rewrite};

use super::http::Answer;
use super::ranged::{self, Part, Parts, Ranged, Segment};
use super::retry::{Failure, RetryPolicy, with_retries, within};
use super::sequential::{Spool, SpoolReader};
use super::{Backend, ByteStream, ReadContext, Sender, Supplier};
use crate::digest::TaggedDigest;
use crate::ids::ByteRange;
use crate::oci::client::{Call, MAX_REDIRECTS, RegistryClient, is_redirect, too_many_redirects};
use crate::oci::token::Access;
use crate::{Error, ErrorKind, Result};

/// Repeats of the stream that reads a blob in sequence, before its readers are told.
const FILL_RETRIES: u32 = 3;

/// One blob of a repository.
#[derive(Clone, Debug)]
pub struct RegistryBlob {
    client: RegistryClient,
    repository: String,
    digest: TaggedDigest,
    rewrite: Rewrite,
    retry: RetryPolicy,
    shared: Arc<Shared>,
    /// Bytes of it that are ever read, from the start: all of it, or what comes before the bootstrap in it.
    stored_size: Option<u64>,
    /// `None`: this reads a blob for another one.
    spool: Option<Arc<Spool>>,
    /// Sent to the registry itself with each request.
    headers: HeaderMap,
    supplier: Supplier,
    /// Tried first, in this order.
    detours: Arc<[Arc<Detour>]>,
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
        let spool = Some(Arc::new(Spool::new(std::env::temp_dir())));
        Self {
            client,
            repository,
            digest,
            rewrite,
            retry,
            shared: Arc::default(),
            stored_size: None,
            spool,
            headers: HeaderMap::new(),
            supplier: Supplier::Origin,
            detours: Arc::default(),
        }
    }

    /// Says that the blob has `size` bytes.
    #[must_use]
    pub fn of_size(self, size: u64) -> Self {
        Self { stored_size: Some(size), ..self }
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

    /// Keeps the blob in `dir` if its server turns out to ignore `Range`; by default in the
    /// directory for temporary files.
    #[must_use]
    pub fn with_spool_dir(self, dir: &Path) -> Self {
        Self { spool: Some(Arc::new(Spool::new(dir.to_owned()))), ..self }
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
        if self.client.is_own(&call.url) {
            call.headers.clone_from(&self.headers);
        }
        call.headers.extend(ranged::headers(ranges)?);
        call.hedged = true;
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
                url = match &self.rewrite.scheme {
                    Some(_) => self.rewrite.apply(RegistryClient::any_location(&answer)?)?,
                    None => self.rewrite.apply(RegistryClient::location(&answer)?)?,
                };
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

    /// Asks the registry for `range`, or the stream that brings all of the blob.
    async fn ask_own(&self, range: ByteRange, context: &ReadContext) -> std::result::Result<Body, Failure> {
        let Some(spool) = &self.spool else { return self.ask_server(range, context).await };
        if let Some(reader) = spool.read(range)? {
            return Ok(Body::Spooled(reader));
        }
        if !spool.is_begun() && !self.client.origin(&self.place()?).ignores_range() {
            return self.ask_server(range, context).await;
        }
        // All readers but one wait for the stream that this one begins.
        let waited = within(context, "wait for a blob that is read in sequence", async {
            Ok::<_, Failure>(spool.first.lock().await)
        });
        let _first = waited.await?;
        match spool.read(range)? {
            Some(reader) => Ok(Body::Spooled(reader)),
            None => self.ask_server(range, context).await,
        }
    }

    /// Asks for `range`; where the whole blob comes instead, it is kept from then on.
    async fn ask_server(
        &self,
        range: ByteRange,
        context: &ReadContext,
    ) -> std::result::Result<Body, Failure> {
        let body = self.request(&[range], context).await?;
        let none = || Error::new(ErrorKind::Unsupported, "no answer to one range");
        match (body.ok_or_else(none)?, &self.spool) {
            (Body::One(segment), Some(spool)) if segment.ignores_range() => {
                // More than that is never read, so more is not kept.
                let size = match self.stored_size.or_else(|| ranged::total(segment.answer())) {
                    Some(size) => size,
                    None => self.size(context).await?,
                };
                // What an earlier stream brought is skipped, not kept twice.
                let from = spool.reached();
                let rest = ByteRange::new(from, size.saturating_sub(from))?;
                let size = self.shared.size.clone();
                let shared = Shared { resolved: Mutex::new(self.resolved().clone()), size };
                let detours = Arc::default();
                let filler = Self { shared: Arc::new(shared), spool: None, detours, ..self.clone() };
                let retry = RetryPolicy { on_demand: self.retry.on_demand.min(FILL_RETRIES), ..self.retry };
                let own = Spool::context();
                let first = Some(Body::One(segment.widened(rest)).into());
                let stream = ranged::resume(filler, self.supplier, rest, first, retry, &own);
                Ok(Body::Spooled(spool.begin(range, rest, &own, stream)?))
            }
            (body, _) => Ok(body),
        }
    }

    /// Refuses a whole object that is not as long as the blob: it is a page, or something else. Another answer may be
    /// better.
    async fn check_whole(&self, answer: &Answer, context: &ReadContext) -> std::result::Result<(), Failure> {
        if answer.status() != StatusCode::OK {
            return Ok(());
        }
        let (Some(found), Some(stored)) = (ranged::total(answer), self.stored_size) else { return Ok(()) };
        let size = match self.shared.size.get() {
            Some(size) => *size,
            // It may have a bootstrap behind what is read of it: then its registry knows its size.
            None if found > stored => {
                match self.client.blob_size(&self.repository, self.digest, context).await {
                    Ok(size) => size.unwrap_or(stored),
                    Err(e) if e.kind() == ErrorKind::Unsupported => found,
                    Err(e) => return Err(e.into()),
                }
            }
            None => stored,
        };
        if found == size && found >= stored {
            return Ok(());
        }
        let why = format!(
            "{}: {found} bytes in place of the blob, which has {stored} or more; something between here and \
             its registry answers for it",
            answer.what()
        );
        Err(Failure::passing(Error::new(ErrorKind::Unavailable, why)))
    }

    async fn accept(
        &self,
        answer: Answer,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Option<Body>, Failure> {
        let origin = self.client.origin(answer.url());
        if let [range] = ranges {
            self.check_whole(&answer, context).await?;
            let segment = Segment::accept(answer, *range, self.client.host(), context).await?;
            if segment.ignores_range() || segment.answer().status() == StatusCode::PARTIAL_CONTENT {
                origin.set_ignores_range(segment.ignores_range());
            }
            return Ok(Some(Body::One(segment)));
        }
        let parts = Parts::accept(answer, origin, ranges, self.client.host(), context).await?;
        Ok(parts.map(Body::Many))
    }
}

/// Bytes that belong to what was asked for.
pub(super) enum Body {
    One(Segment),
    Many(Parts),
    Spooled(SpoolReader),
}

impl From<Body> for Served {
    fn from(body: Body) -> Self {
        Self { body, via: None }
    }
}

impl Part for Body {
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        match self {
            Self::One(segment) => segment.next(context).await,
            Self::Many(parts) => parts.next(context).await,
            Self::Spooled(reader) => reader.next(context).await,
        }
    }
}

/// A body, and how it comes here if not from the registry.
pub(super) struct Served {
    body: Body,
    via: Option<Passage>,
}

impl Part for Served {
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        match &mut self.via {
            Some(passage) => passage.next(&mut self.body, context).await,
            None => self.body.next(context).await,
        }
    }

    fn sender(&self) -> Option<Sender> {
        self.via.as_ref().map(Passage::sender)
    }
}

impl Ranged for RegistryBlob {
    type Part = Served;

    async fn ask(&self, range: ByteRange, context: &ReadContext) -> std::result::Result<Served, Failure> {
        for detour in &*self.detours {
            if let Some(Some(body)) = detour.ask(&[range], context).await? {
                return Ok(body);
            }
        }
        self.ask_own(range, context).await.map(Served::from)
    }

    async fn ask_many(
        &self,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Option<Served>, Failure> {
        for detour in &*self.detours {
            if let Some(answer) = detour.ask(ranges, context).await? {
                return Ok(answer);
            }
        }
        if self.spool.as_ref().is_some_and(|spool| spool.is_begun()) {
            return Ok(None);
        }
        Ok(self.request(ranges, context).await?.map(Served::from))
    }

    fn retried(&self) {
        if let Ok(url) = self.place() {
            self.client.origin(&url).retried();
        }
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
        Box::pin(ranged::open(self.clone(), self.supplier, range, self.retry, context))
    }

    fn open_many<'a>(
        &'a self,
        ranges: &'a [ByteRange],
        context: &'a ReadContext,
    ) -> BoxFuture<'a, Result<Option<ByteStream>>> {
        Box::pin(ranged::open_many(self.clone(), self.supplier, ranges, self.retry, context))
    }

    fn distrust(&self, sender: Sender) -> bool {
        let detour = sender.way.checked_sub(1).and_then(|place| self.detours.get(place));
        match (detour, &self.spool) {
            (Some(detour), _) => detour.distrust(),
            (None, Some(spool)) => spool.distrust(),
            (None, None) => {}
        }
        detour.is_some()
    }
}

#[cfg(test)]
mod tests;
