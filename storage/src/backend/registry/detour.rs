//! Ways to a blob that are tried before its registry: mirrors in their order, then a proxy.
//!
//! Invariants: what goes wrong on a detour costs a read time, never the read; a mirror gets no
//! login of the registry unless the configuration says so.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::{Body, RegistryBlob, Served};
use crate::backend::health::{Health, HealthPolicy};
use crate::backend::http::{Http, HttpOptions, parse_url};
use crate::backend::ranged::Part as _;
use crate::backend::retry::{Failure, RetryPolicy, within};
use crate::backend::{Priority, ReadContext, Sender, Supplier};
use crate::digest::TaggedDigest;
use crate::ids::ByteRange;
use crate::oci::auth::Credentials;
use crate::oci::client::{RegistryClient, RegistryOptions, Scheme};
use crate::oci::token::Login;
use crate::{Error, ErrorKind, Result};

/// A reader waits this long for the first byte of a detour, then goes on to the next one.
const PATIENCE: Duration = Duration::from_secs(2);
/// So long the body of a detour may take where its reader would wait for ever. One that drips is left with what it
/// has brought.
const BODY_PATIENCE: Duration = Duration::from_secs(30);

/// A registry that holds the same blobs.
#[derive(Clone, Debug)]
pub struct MirrorOptions {
    /// `HOST`, `HOST:PORT` (both over TLS), or a URL of scheme and host alone.
    pub host: String,
    /// Sent with every request to it. Secret.
    pub headers: Vec<(String, String)>,
    /// May it have the registry's login?
    pub login: bool,
    /// When it is left out.
    pub health: HealthPolicy,
}

/// A proxy on the way to the registry.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// Ask it for `http` URLs also where the registry speaks TLS, so that it can keep what passes.
    pub use_http: bool,
    /// When it is left out.
    pub health: HealthPolicy,
}

/// A detour for all blobs of a source.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) client: RegistryClient,
    pub(super) supplier: Supplier,
    pub(super) login: bool,
    headers: HeaderMap,
    use_http: bool,
    health: Arc<Health>,
}

impl Way {
    /// A mirror, reached as `options` say, logged in to as they say only if it may be.
    ///
    /// # Errors
    /// `Invalid`: its name or a header is none.
    pub(super) fn mirror(mirror: &MirrorOptions, mut options: RegistryOptions) -> Result<Self> {
        let what = format!("mirror {}", shown(&mirror.host));
        let (scheme, host) = match mirror.host.split_once("://") {
            Some(_) => {
                let url = parse_url(&what, &mirror.host)?;
                let bare = url.path() == "/" && url.query().is_none() && url.username().is_empty();
                let scheme = if url.scheme() == "http" { Scheme::Http } else { Scheme::Https };
                let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
                match url.host_str() {
                    Some(host) if bare => (scheme, format!("{host}{port}")),
                    _ => {
                        let why =
                            "want [http[s]://]HOST[:PORT] and nothing else; logins belong into `headers`";
                        return Err(Error::new(ErrorKind::Invalid, format!("{what}: {why}")));
                    }
                }
            }
            None => (Scheme::Https, mirror.host.clone()),
        };
        options.scheme = scheme;
        if !mirror.login {
            options.login = Login::Fixed(Credentials::Anonymous);
            options.token = None;
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &mirror.headers {
            let bad = || Error::new(ErrorKind::Invalid, format!("{what}: header {name:?} can not be sent"));
            let key = HeaderName::try_from(name).map_err(|_| bad())?;
            let mut value = HeaderValue::from_str(value).map_err(|_| bad())?;
            value.set_sensitive(true);
            headers.append(key, value);
        }
        let health = Health::new(what.clone(), mirror.health.clone(), Http::new(&options.http)?);
        let client = RegistryClient::new(&host, options).map_err(|e| e.context(what))?;
        Ok(Self {
            client,
            supplier: Supplier::Mirror,
            login: mirror.login,
            headers,
            use_http: false,
            health: Arc::new(health),
        })
    }

    /// The registry `host` through the proxy that `options` name; pings go around it.
    ///
    /// # Errors
    /// `Invalid`: not a proxy's URL.
    pub(super) fn proxy(host: &str, proxy: &ProxyOptions, mut options: RegistryOptions) -> Result<Self> {
        if proxy.use_http {
            options.scheme = Scheme::Http;
        }
        let direct = Http::new(&HttpOptions { proxy: None, ..options.http.clone() })?;
        let health = Health::new(format!("proxy of {host}"), proxy.health.clone(), direct);
        Ok(Self {
            client: RegistryClient::new(host, options)?,
            supplier: Supplier::Proxy,
            login: true,
            headers: HeaderMap::new(),
            use_http: proxy.use_http,
            health: Arc::new(health),
        })
    }
}

/// A mirror's name without what may be a login in it.
fn shown(host: &str) -> &str {
    host.rsplit_once('@').map_or(host, |(_, host)| host)
}

/// A detour to one blob.
#[derive(Debug)]
pub(super) struct Detour {
    way: Arc<Way>,
    /// Counted from 1.
    number: usize,
    blob: RegistryBlob,
    /// The blob is not there, or wrong.
    lacks: AtomicBool,
    /// A body broke: reads go on elsewhere until then.
    broken: Mutex<Option<Instant>>,
}

impl Detour {
    /// The detour `number` to a blob of `size` bytes, if that is known.
    pub(super) fn new(
        (number, way): (usize, &Arc<Way>),
        repository: &str,
        digest: TaggedDigest,
        size: Option<u64>,
        retry: RetryPolicy,
    ) -> Self {
        let mut blob = RegistryBlob::new(way.client.clone(), repository, digest).with_retry(retry);
        (blob.spool, blob.stored_size) = (None, size);
        blob.headers = way.headers.clone();
        if way.use_http {
            blob.rewrite.scheme = Some("http".to_owned());
        }
        let way = Arc::clone(way);
        Self { way, number, blob, lacks: AtomicBool::new(false), broken: Mutex::default() }
    }

    fn sender(&self) -> Sender {
        Sender { supplier: self.way.supplier, way: self.number }
    }

    fn broken(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A body broke that came this way: the read goes on another one.
    fn broke(&self, failure: &Failure) {
        *self.broken() = Some(Instant::now() + self.way.health.interval());
        self.way.health.failed(&failure.error.to_string());
    }

    /// What came this way was wrong: the blob is not asked for here again.
    pub(super) fn distrust(&self) {
        self.lacks.store(true, Ordering::Relaxed);
    }

    /// Asks for `ranges`; `None`: this is no way to them, go on.
    ///
    /// # Errors
    /// The reader's deadline or its withdrawal; a proxy's word that the registry refuses.
    pub(super) async fn ask(
        self: &Arc<Self>,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> std::result::Result<Option<Option<Served>>, Failure> {
        let broken = self.broken().is_some_and(|until| until > Instant::now());
        if broken || self.lacks.load(Ordering::Relaxed) || !self.way.health.is_usable() {
            return Ok(None);
        }
        let hurry = match context.priority {
            Priority::OnDemand => {
                let at = Instant::now() + PATIENCE;
                ReadContext {
                    deadline: Some(context.deadline.map_or(at, |own| own.min(at))),
                    ..context.clone()
                }
            }
            Priority::Prefetch => context.clone(),
        };
        let asked = within(&hurry, "first byte of a detour", self.blob.request(ranges, &hurry)).await;
        let failure = match asked {
            // The whole blob for a part of it: the registry may do better.
            Ok(Some(Body::One(segment))) if segment.ignores_range() => {
                self.lacks.store(true, Ordering::Relaxed);
                return Ok(None);
            }
            Ok(body) => {
                let left = ranges.iter().map(|range| range.len()).sum();
                let via = Passage { detour: Arc::clone(self), left, until: body_deadline(context) };
                return Ok(Some(body.map(|body| Served { body, via: Some(via) })));
            }
            Err(failure) => failure,
        };
        if over(context) {
            return Err(failure);
        }
        match failure.error.kind() {
            // The registry's own words, passed on.
            ErrorKind::NotFound | ErrorKind::Denied | ErrorKind::OutOfRange
                if self.way.supplier == Supplier::Proxy =>
            {
                return Err(failure);
            }
            ErrorKind::NotFound => self.lacks.store(true, Ordering::Relaxed),
            _ => self.way.health.failed(&failure.error.to_string()),
        }
        Ok(None)
    }
}

/// Until when a body may take: what is left of the reader's time after half of it is enough for another way.
fn body_deadline(context: &ReadContext) -> Option<Instant> {
    let now = Instant::now();
    match (context.deadline, context.priority) {
        (Some(deadline), _) => Some(now + deadline.saturating_duration_since(now) / 2),
        (None, Priority::OnDemand) => Some(now + BODY_PATIENCE),
        // Nobody waits for it; a reader that does so later asks again.
        (None, Priority::Prefetch) => None,
    }
}

/// A body's way here, when it is not the registry's.
pub(super) struct Passage {
    detour: Arc<Detour>,
    /// Bytes that were asked for and did not come yet.
    left: u64,
    until: Option<Instant>,
}

impl Passage {
    pub(super) fn sender(&self) -> Sender {
        self.detour.sender()
    }

    /// The next bytes of `body`. The detour is well if all that was asked for came.
    ///
    /// # Errors
    /// A passing failure, whatever went wrong: the read goes on another way. `TimedOut`, `Cancelled` as the context says.
    pub(super) async fn next(
        &mut self,
        body: &mut Body,
        context: &ReadContext,
    ) -> std::result::Result<Option<Bytes>, Failure> {
        let hurry = ReadContext { deadline: self.until.or(context.deadline), ..context.clone() };
        let failure = match body.next(&hurry).await {
            Ok(piece) => {
                let came = piece.as_ref().map_or(0, |piece| piece.len() as u64);
                if came > 0 && came >= self.left {
                    self.detour.way.health.succeeded();
                }
                self.left = self.left.saturating_sub(came);
                return Ok(piece);
            }
            Err(failure) => failure,
        };
        if over(context) || self.left == 0 {
            return Err(failure);
        }
        self.detour.broke(&failure);
        let what = format!("a {:?} did not bring all of a body in time", self.sender().supplier);
        Err(match failure.error.kind() {
            ErrorKind::TimedOut => Failure::passing(
                Error::new(ErrorKind::Unavailable, what.to_lowercase()).with_source(failure.error),
            ),
            _ => Failure { passing: true, ..failure },
        })
    }
}

/// Nobody wants an answer any more.
fn over(context: &ReadContext) -> bool {
    context.cancel.is_cancelled() || context.deadline.is_some_and(|deadline| deadline <= Instant::now())
}
