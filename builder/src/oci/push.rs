//! Uploading an image to a registry (OCI distribution specification, "Push").
//!
//! ```text
//! HEAD blob ─ there ─▶ done
//!     │ not there
//! POST uploads/ ─▶ session ─▶ PATCH 8 MiB … PATCH ─▶ PUT ?digest=…
//!                     ▲            │ fails in passing
//!                     └── GET session: how far did it get? ── unknown ─▶ a new session
//! ```
//!
//! Small blobs go in one PUT. A registry that refuses PATCH gets large blobs in one streamed PUT
//! too. The manifest goes last: until then nobody sees anything of the image, and an upload
//! session that is left behind is forgotten by the registry.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Body, Method, StatusCode, Url};
use storage::backend::http::Answer;
use storage::backend::retry::{Attempts, Failure};
use storage::backend::{Priority, ReadContext};
use storage::digest::{Digest, DigestAlgorithm};
use storage::oci::client::{Call, RegistryClient};
use storage::oci::token::Access;
use tokio_util::io::ReaderStream;

use super::media;
use super::registry::{RegistryOptions, Repository, tagged};
use super::spool::SpooledBlob;
use crate::progress::Meter;
use crate::{Error, ErrorKind, Result};

/// Bytes of one PATCH: what a broken connection costs at most. Above the 5 MiB that stores
/// behind some registries demand of a part.
const PART_SIZE: u64 = 8 << 20;
/// Silence of a registry while it takes a part and stores it: 70 KB/s are fast enough.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(120);
/// Slowest streamed upload that is waited for, bytes a second.
const SLOWEST_STREAM: u64 = 64 << 10;
/// Read buffer of a streamed upload.
const STREAM_BUFFER: usize = 256 << 10;

/// An image being pushed.
pub struct Pusher {
    repository: Repository,
    spool: tempfile::TempDir,
    part_size: u64,
}

impl Pusher {
    /// Prepares a push to `reference`. Sends nothing.
    ///
    /// # Errors
    /// `Invalid`: the reference has a digest, which only the finished image decides. `Io`: no
    /// temporary directory. Otherwise as [`Repository::new`].
    pub fn new(reference: &str, options: &RegistryOptions) -> Result<Self> {
        let repository =
            Repository::new(reference, options, |c| c.http.progress_timeout = Some(PROGRESS_TIMEOUT))?;
        if repository.reference.digest().is_some() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("docker://{reference}: a target is named by a tag, its digest is the outcome"),
            ));
        }
        let spool = spool_dir()?;
        Ok(Self { repository, spool, part_size: PART_SIZE })
    }

    /// Where blobs are spooled.
    pub fn spool_dir(&self) -> &std::path::Path {
        self.spool.path()
    }

    /// Uploads one blob. May be called by several threads.
    ///
    /// # Errors
    /// Those of the registry; `Cancelled`; `Io`: the temporary file.
    pub fn put(&self, blob: &SpooledBlob, meter: &Arc<dyn Meter>) -> Result<&'static str> {
        self.repository.runtime.block_on(self.upload(blob, meter))
    }

    /// Uploads the manifest and tags it.
    ///
    /// # Errors
    /// Those of the registry. `Corrupt`: it stored something else.
    pub fn publish(&self, manifest: &[u8]) -> Result<Digest> {
        let Repository { runtime, client, reference, context } = &self.repository;
        crate::progress::check(&context.cancel)?;
        // From here on an interruption comes too late: cut short, nobody could say whether the
        // image exists.
        let context = &ReadContext::on_demand(Some(Instant::now() + PROGRESS_TIMEOUT));
        let digest = DigestAlgorithm::Sha256.digest(manifest);
        let (name, body) = (reference.manifest_name(), Bytes::copy_from_slice(manifest));
        runtime
            .block_on(client.put_manifest(reference.repository(), &name, media::OCI_MANIFEST, body, context))
            .map_err(|e| Error::from(e).context(format!("manifest of {reference}")))?;
        Ok(digest)
    }

    fn access(&self) -> Access {
        Access::push(self.repository.reference.repository())
    }

    async fn upload(&self, blob: &SpooledBlob, meter: &Arc<dyn Meter>) -> Result<&'static str> {
        let Repository { client, reference, context, .. } = &self.repository;
        let digest = tagged(blob.digest());
        let there = client.blob_size(reference.repository(), digest, context).await?;
        if there == Some(blob.size()) {
            return Ok("exists already");
        }
        let mut upload = Upload {
            client,
            context,
            access: self.access(),
            repository: reference.repository(),
            blob,
            meter,
            part_size: self.part_size,
            whole: blob.size() <= self.part_size,
            session: None,
            offset: 0,
            furthest: 0,
        };
        upload.run().await.map_err(|e| e.context(format!("upload of {digest} to {reference}")))?;
        Ok("")
    }
}

/// A directory for blobs on their way: where the environment says, else on disk rather than in
/// memory, where `/tmp` may be.
fn spool_dir() -> Result<tempfile::TempDir> {
    let make = |dir: &Path| {
        super::spool::sweep(dir);
        tempfile::Builder::new().prefix(super::spool::TEMP_PREFIX).tempdir_in(dir)
    };
    let var_tmp = Path::new("/var/tmp");
    let made = if std::env::var_os("TMPDIR").is_none() && var_tmp.is_dir() {
        make(var_tmp).or_else(|_| make(&std::env::temp_dir()))
    } else {
        make(&std::env::temp_dir())
    };
    made.map_err(|e| Error::io("temporary directory for blobs (set TMPDIR to choose another)", e))
}

type Attempt<T> = std::result::Result<T, Failure>;

/// One blob on its way.
struct Upload<'a> {
    client: &'a RegistryClient,
    context: &'a ReadContext,
    access: Access,
    repository: &'a str,
    blob: &'a SpooledBlob,
    meter: &'a Arc<dyn Meter>,
    part_size: u64,
    /// In one PUT instead of parts.
    whole: bool,
    /// Where the next part goes.
    session: Option<Url>,
    /// Bytes the registry has.
    offset: u64,
    /// The most bytes it ever had; going beyond is progress.
    furthest: u64,
}

impl Upload<'_> {
    async fn run(&mut self) -> Result<()> {
        let mut attempts = Attempts::new(self.client.retry(), Priority::OnDemand);
        loop {
            let before = self.furthest;
            let failure = match self.attempt().await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            if self.furthest > before {
                attempts.reset();
            }
            attempts.pause(failure, self.context).await?;
        }
    }

    /// Goes on from wherever the registry is.
    async fn attempt(&mut self) -> Attempt<()> {
        if self.whole {
            let session = self.start().await?;
            return self.put_whole(session).await;
        }
        let mut session = match self.session.take() {
            Some(session) => match self.where_is(session).await? {
                Some(session) => session,
                None => self.start().await?,
            },
            None => self.start().await?,
        };
        while self.offset < self.blob.size() {
            self.session = Some(session.clone());
            let Some(next) = self.patch(session).await? else {
                // The registry takes no parts.
                self.whole = true;
                self.session = None;
                let session = self.start().await?;
                return self.put_whole(session).await;
            };
            session = next;
        }
        self.session = Some(session.clone());
        self.close(session, Body::from(Bytes::new()), 0, self.context).await
    }

    /// Opens an upload session.
    async fn start(&mut self) -> Attempt<Url> {
        let url = self.client.url(&format!("{}/blobs/uploads/", self.repository))?;
        let mut call = Call::new(Method::POST, url, self.access.clone());
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let answer = self.client.send(call, self.context).await?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(self.refused(answer).await);
        }
        if let Some(least) = answer.header("oci-chunk-min-length").and_then(|v| v.parse::<u64>().ok()) {
            // A registry whose parts are larger than memory should hold gets one stream instead.
            self.part_size = self.part_size.max(least);
            self.whole = self.whole || least > 8 * PART_SIZE;
        }
        self.offset = 0;
        self.meter.set(0);
        Ok(RegistryClient::location(&answer)?)
    }

    /// Asks a session how far it got; `None` if the registry has forgotten it.
    async fn where_is(&mut self, session: Url) -> Attempt<Option<Url>> {
        let call = Call::new(Method::GET, session, self.access.clone());
        let answer = self.client.send(call, self.context).await?;
        let received = received(&answer);
        match answer.status() {
            StatusCode::NO_CONTENT | StatusCode::ACCEPTED if received <= self.blob.size() => {
                self.offset = received;
                self.meter.set(received);
                Ok(Some(RegistryClient::location(&answer)?))
            }
            status if status.is_server_error() => Err(self.refused(answer).await),
            _ => Ok(None),
        }
    }

    /// Sends the next part; `None` if the registry does not take parts.
    async fn patch(&mut self, session: Url) -> Attempt<Option<Url>> {
        let len = self.part_size.min(self.blob.size() - self.offset);
        let bytes = self.part(len).await?;
        let mut call = Call::new(Method::PATCH, session, self.access.clone());
        call.headers = octets(len);
        let range = format!("{}-{}", self.offset, self.offset + len - 1);
        call.headers.insert(
            CONTENT_RANGE,
            HeaderValue::from_str(&range)
                .map_err(|e| Error::new(ErrorKind::Invalid, "Content-Range").with_source(e))
                .map_err(storage_error)?,
        );
        call.body = Some(Body::from(bytes));
        let answer = self.client.send(call, self.context).await?;
        match answer.status() {
            StatusCode::ACCEPTED | StatusCode::NO_CONTENT => {}
            StatusCode::BAD_REQUEST
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::NOT_IMPLEMENTED
                if self.offset == 0 =>
            {
                return Ok(None);
            }
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::NOT_FOUND => {
                // The registry is elsewhere than we thought, after a part that was lost on the way.
                let failure = self.refused(answer).await;
                return Err(Failure { passing: true, ..failure });
            }
            _ => return Err(self.refused(answer).await),
        }
        let next = RegistryClient::location(&answer)?;
        // A registry that says nothing has taken all of it.
        self.offset = match answer.header(RANGE) {
            Some(_) => received(&answer).clamp(self.offset, self.offset + len),
            None => self.offset + len,
        };
        self.furthest = self.furthest.max(self.offset);
        self.meter.set(self.offset);
        Ok(Some(next))
    }

    /// Reads the next `len` bytes of the temporary file.
    async fn part(&self, len: u64) -> Attempt<Bytes> {
        let file = self.blob.reader().map_err(storage_error)?;
        let offset = self.offset;
        let read = tokio::task::spawn_blocking(move || {
            // At most a few parts; the cast cannot cut on machines that can hold them.
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, offset).map(|()| Bytes::from(bytes))
        });
        let failed = |e: std::io::Error| Failure::from(storage::Error::io("temporary file of a blob", e));
        read.await.map_err(|e| failed(std::io::Error::other(e)))?.map_err(failed)
    }

    /// Sends the whole blob in the request that ends the session.
    async fn put_whole(&mut self, session: Url) -> Attempt<()> {
        let size = self.blob.size();
        if size <= self.part_size {
            let bytes = self.part(size).await?;
            self.close(session, Body::from(bytes), size, self.context).await?;
            self.meter.set(size);
            return Ok(());
        }
        let file = tokio::fs::File::from_std(self.blob.reader().map_err(storage_error)?);
        let meter = Arc::clone(self.meter);
        let stream = ReaderStream::with_capacity(file, STREAM_BUFFER)
            .inspect_ok(move |piece| meter.advance(piece.len() as u64));
        let patience = PROGRESS_TIMEOUT + Duration::from_secs(size / SLOWEST_STREAM);
        let context = ReadContext { deadline: Some(Instant::now() + patience), ..self.context.clone() };
        self.close(session, Body::wrap_stream(stream), size, &context).await
    }

    /// Ends the session: the registry compares the digest and the blob exists.
    async fn close(&self, mut session: Url, body: Body, len: u64, context: &ReadContext) -> Attempt<()> {
        session.query_pairs_mut().append_pair("digest", &tagged(self.blob.digest()).to_string());
        let mut call = Call::new(Method::PUT, session, self.access.clone());
        call.headers = octets(len);
        call.body = Some(body);
        let answer = self.client.send(call, context).await?;
        match answer.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT => Ok(()),
            _ => Err(self.refused(answer).await),
        }
    }

    async fn refused(&self, answer: Answer) -> Failure {
        answer.into_failure(self.client.host(), self.context).await
    }
}

fn octets(len: u64) -> HeaderMap {
    HeaderMap::from_iter([
        (CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (CONTENT_LENGTH, HeaderValue::from(len)),
    ])
}

/// Bytes a session has, by its `Range: 0-LAST`. Registries write `0-0` for none and for one.
fn received(answer: &Answer) -> u64 {
    answer
        .header(RANGE)
        .and_then(|range| range.rsplit('-').next()?.parse::<u64>().ok())
        .map_or(0, |last| if last == 0 { 0 } else { last + 1 })
}

fn storage_error(error: Error) -> storage::Error {
    storage::Error::new(storage::ErrorKind::Io, "blob on its way").with_source(error)
}

#[cfg(test)]
mod tests;
