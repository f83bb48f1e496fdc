//! Blobs of object stores: one object per blob, `PREFIX ID` in one bucket.
//!
//! OpenDAL knows the stores: their URLs, signatures and sources of credentials. What goes over
//! the network is ours: it sends through [`Http`], answers are believed as in [`ranged`], and
//! its own retries are not there, so that deadlines and repeats have one place ([`super::retry`]).
//!
//! ```text
//! ranged::open ─▶ ask ─▶ opendal (URL, signature) ─▶ Transport ─▶ Http ─▶ store
//!                 ◀────── bytes that belong ◀──────── Segment ◀───────────┘
//! ```

mod transport;

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use opendal::{BufferStream, Builder, HttpTransporter, OperationContext, Operator, services};

use super::http::{Http, HttpOptions};
use super::ranged::{self, Part, Ranged};
use super::retry::{Failure, RetryPolicy};
use super::{Backend, BlobSource, ByteStream, ReadContext, Supplier};
use crate::ids::{BlobId, ByteRange};
use crate::metrics::OriginSnapshot;
use crate::oci::auth::Secret;
use crate::oci::reference::check_host;
use crate::{Error, ErrorKind, Result};
use transport::{Transport, failure};

/// Whose name requests are signed in.
#[derive(Clone, Debug)]
pub enum StoreCredentials {
    /// Nobody's: public objects.
    Anonymous,
    /// This account's.
    Keys {
        /// Its `access_key_id`.
        id: Secret,
        /// Its `access_key_secret`.
        secret: Secret,
    },
    /// Whoever the store's own tools would act as here: environment variables, profile files,
    /// web identity, the instance's role.
    Environment,
}

/// Where a bucket is, and what of it.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// `HOST` or `HOST:PORT`.
    pub endpoint: String,
    /// https, not http.
    pub secure: bool,
    /// The bucket's name.
    pub bucket: String,
    /// What stands before a blob's id in the object's key; usually ends with a slash.
    pub prefix: String,
    /// Whose name requests are signed in.
    pub credentials: StoreCredentials,
    /// How to reach it.
    pub http: HttpOptions,
    /// Repeats of reads, usually [`RetryPolicy::READS`].
    pub retry: RetryPolicy,
}

/// The `s3` and `oss` backends.
#[derive(Clone)]
pub struct ObjectStoreSource {
    shared: Arc<Shared>,
}

struct Shared {
    kind: &'static str,
    operator: Operator,
    http: Http,
    prefix: String,
    /// `bucket NAME at ENDPOINT`, for messages.
    place: String,
    retry: RetryPolicy,
}

impl fmt::Debug for ObjectStoreSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { kind, place, prefix, .. } = &*self.shared;
        f.debug_struct("ObjectStoreSource")
            .field("kind", kind)
            .field("place", place)
            .field("prefix", prefix)
            .finish()
    }
}

impl ObjectStoreSource {
    /// A store that speaks S3, signature version 4: `SCHEME://ENDPOINT/BUCKET/KEY`. An empty
    /// `endpoint` is that of AWS in `region`. Does no I/O but reading CA files.
    ///
    /// # Errors
    /// `Invalid`: a part is malformed. Those of [`Http::new`].
    pub fn s3(mut options: StoreOptions, region: &str) -> Result<Self> {
        let region_ok = region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if region.is_empty() || !region_ok {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("s3 backend: `region` {region:?}: want a name"),
            ));
        }
        if options.endpoint.is_empty() {
            let suffix = if region.starts_with("cn-") { ".cn" } else { "" };
            options.endpoint = format!("s3.{region}.amazonaws.com{suffix}");
        }
        let mut service =
            services::S3::default().endpoint(&options.base("s3")?).bucket(&options.bucket).region(region);
        service = match &options.credentials {
            StoreCredentials::Anonymous => service.skip_signature(),
            StoreCredentials::Keys { id, secret } => {
                let service = service.access_key_id(id.expose()).secret_access_key(secret.expose());
                service.disable_config_load().disable_ec2_metadata()
            }
            StoreCredentials::Environment => service,
        };
        Self::new("s3", service, options)
    }

    /// Alibaba Cloud's store, header signature: `SCHEME://BUCKET.ENDPOINT/KEY`; where the
    /// endpoint is an IP address, which has no subdomains, `SCHEME://ENDPOINT/BUCKET/KEY`.
    /// Does no I/O but reading CA files.
    ///
    /// # Errors
    /// `Invalid`: a part is malformed. Those of [`Http::new`].
    pub fn oss(options: StoreOptions) -> Result<Self> {
        let mut service = services::Oss::default().endpoint(&options.base("oss")?).bucket(&options.bucket);
        if is_address(&options.endpoint) {
            service = service.addressing_style("path");
        }
        service = match &options.credentials {
            StoreCredentials::Anonymous => service.skip_signature(),
            StoreCredentials::Keys { id, secret } => {
                service.access_key_id(id.expose()).access_key_secret(secret.expose())
            }
            StoreCredentials::Environment => service,
        };
        Self::new("oss", service, options)
    }

    fn new(kind: &'static str, service: impl Builder, options: StoreOptions) -> Result<Self> {
        let StoreOptions { endpoint, bucket, prefix, http, retry, .. } = options;
        let operator = Operator::new(service)
            .map_err(|e| Error::new(ErrorKind::Invalid, format!("{kind} backend: {}", e.message())))?;
        let place = format!("bucket {bucket} at {endpoint}");
        let http = Http::new(&http)?;
        Ok(Self { shared: Arc::new(Shared { kind, operator, http, prefix, place, retry }) })
    }
}

impl StoreOptions {
    /// Checks all parts; the URL of the endpoint.
    fn base(&self, kind: &str) -> Result<String> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Invalid, format!("{kind} backend: {why}")));
        if check_host(&self.endpoint).is_err() {
            return refuse(format!(
                "`endpoint` {:?}: want HOST or HOST:PORT; `scheme` says http or https",
                self.endpoint
            ));
        }
        let bucket = self.bucket.as_bytes();
        let edges_ok =
            [bucket.first(), bucket.last()].iter().all(|b| b.is_some_and(u8::is_ascii_alphanumeric));
        let inner_ok = bucket.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !edges_ok || !inner_ok {
            return refuse(format!(
                "`bucket_name` {:?}: want letters, digits, dots and hyphens",
                self.bucket
            ));
        }
        // Such keys exist, but no URL that all parties leave as it is names them.
        let parts: Vec<_> = self.prefix.split('/').collect();
        let (last, folders) = parts.split_last().unwrap_or((&"", &[]));
        let odd = |part: &str| matches!(part, "." | "..");
        if folders.iter().any(|part| part.is_empty() || odd(part))
            || odd(last)
            || self.prefix.trim() != self.prefix
            || self.prefix.chars().any(char::is_control)
        {
            return refuse(format!(
                "`object_prefix` {:?}: want no leading, doubled or `.` path components, and no space around it",
                self.prefix
            ));
        }
        Ok(format!("{}://{}", if self.secure { "https" } else { "http" }, self.endpoint))
    }
}

/// True for `1.2.3.4`, `1.2.3.4:5` and `[::1]:5`.
fn is_address(endpoint: &str) -> bool {
    let host = match endpoint.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => endpoint,
    };
    host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok()
}

impl BlobSource for ObjectStoreSource {
    fn kind(&self) -> &'static str {
        self.shared.kind
    }

    fn origins(&self) -> Vec<OriginSnapshot> {
        self.shared.http.origins().snapshot()
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        let key = format!("{}{id}", self.shared.prefix);
        Ok(Arc::new(Object { shared: self.shared.clone(), key, size: Arc::default() }))
    }
}

/// One object.
#[derive(Clone)]
struct Object {
    shared: Arc<Shared>,
    key: String,
    size: Arc<OnceLock<u64>>,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object").field("key", &self.key).field("place", &self.shared.place).finish()
    }
}

impl Object {
    /// The store, with requests on behalf of one read; `wanted` is what a ranged one is for.
    fn operator(&self, wanted: Option<ByteRange>, context: &ReadContext) -> Operator {
        let transport = Transport::new(self.shared.http.clone(), wanted, context.clone());
        let resources = OperationContext::new().with_http_transport(HttpTransporter::new(transport));
        self.shared.operator.clone().with_context(resources)
    }

    async fn ask_size(&self, context: &ReadContext) -> std::result::Result<u64, Failure> {
        let metadata = self.operator(None, context).stat(&self.key).await;
        metadata.map(|m| m.content_length()).map_err(|e| self.named(failure(e)))
    }
}

/// What the store sends of a range.
struct ObjectPart(BufferStream);

impl Part for ObjectPart {
    async fn next(&mut self, _: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        // The transport below ends at the deadline.
        match self.0.next().await {
            Some(piece) => Ok(Some(piece.map_err(failure)?.to_bytes())),
            None => Ok(None),
        }
    }
}

impl Ranged for Object {
    type Part = ObjectPart;

    async fn ask(&self, range: ByteRange, context: &ReadContext) -> std::result::Result<ObjectPart, Failure> {
        let reader = self.operator(Some(range), context).reader(&self.key).await.map_err(failure)?;
        let mut stream = reader.into_stream(range.start()..range.end()).await.map_err(failure)?;
        // Sends the request and awaits the head of the answer.
        stream.metadata().await.map_err(failure)?;
        Ok(ObjectPart(stream))
    }

    fn named(&self, failure: Failure) -> Failure {
        let error = failure.error.context(format_args!("object {} of {}", self.key, self.shared.place));
        Failure { error, ..failure }
    }
}

impl Backend for Object {
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        Box::pin(ranged::size(&self.size, self.shared.retry, context, || self.ask_size(context)))
    }

    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        let retry = self.shared.retry;
        Box::pin(ranged::open(self.clone(), Supplier::Origin, range, retry, context))
    }
}

#[cfg(test)]
mod tests;
