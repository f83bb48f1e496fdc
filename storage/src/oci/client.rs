//! A client of one registry (OCI distribution specification): requests with logins,
//! manifests, blobs.
//!
//! Authorization goes to the registry's own origin and nowhere else: [`RegistryClient::send`]
//! attaches it only there, whatever URL it is given, and redirects are followed one by one
//! through it.

mod reads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Body, Method, Request, StatusCode, Url};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::auth::{AuthFiles, Credentials, Secret};
use super::challenge::Challenge;
use super::reference::{api_host, check_host, is_loopback};
use super::token::{Access, Authenticator, Login, header_value};
use crate::backend::ReadContext;
use crate::backend::http::{Answer, Http, HttpOptions, is_tls_refused, parse_url, same_origin};
use crate::backend::origin::Origin;
use crate::backend::retry::{Failure, RetryPolicy, within};
use crate::metrics::OriginSnapshot;
use crate::{Error, ErrorKind, Result};

/// Requests that go out before a registry has answered any: each may be told to log in, or bring a
/// login that is wrong, and waiting for one costs a start a round trip.
const FIRST_CONTACTS: usize = 4;

/// Redirects followed in a row.
pub const MAX_REDIRECTS: usize = 5;

/// Whether a registry is spoken to with TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    /// TLS; on this machine plain http, and TLS if the server asks for it, or the other way round
    /// if an authority is named, which nobody needs without TLS.
    #[default]
    Auto,
    /// TLS.
    Https,
    /// Plain http.
    Http,
}

/// How to reach registries.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// Transport. With `skip_verify` a registry without TLS is accepted, too.
    pub http: HttpOptions,
    /// TLS or not.
    pub scheme: Scheme,
    /// Where logins come from.
    pub login: Login,
    /// A bearer token to begin with.
    pub token: Option<Secret>,
    /// How manifests and whole blobs are retried.
    pub retry: RetryPolicy,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            http: HttpOptions::default(),
            scheme: Scheme::Auto,
            login: Login::Files(AuthFiles::from_environment()),
            token: None,
            retry: RetryPolicy::COMMANDS,
        }
    }
}

/// One request to a registry, or to a place it named.
#[derive(Debug)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// From [`RegistryClient::url`], or a `Location` resolved by [`RegistryClient::location`].
    pub url: Url,
    /// What it needs a token for.
    pub access: Access,
    /// Headers beside `Authorization`.
    pub headers: HeaderMap,
    /// The body.
    pub body: Option<Body>,
    /// It may be sent twice if its answer is late.
    pub hedged: bool,
}

impl Call {
    /// A request without headers and body.
    pub fn new(method: Method, url: Url, access: Access) -> Self {
        Self { method, url, access, headers: HeaderMap::new(), body: None, hedged: false }
    }
}

/// A client of one registry. Cheap to clone; clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct RegistryClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    http: Http,
    /// As users name it.
    host: String,
    secure_base: Url,
    plain_base: Url,
    /// Spoken to without TLS now. Relaxed: it guards nothing, a late look costs one request.
    plain: Arc<AtomicBool>,
    /// May `plain` change to what the server turns out to speak? Only until it has answered:
    /// a server that is down for a while must not be sent logins in clear.
    switch: Switch,
    /// The server has answered. Relaxed, as `plain`.
    settled: AtomicBool,
    auth: Authenticator,
    retry: RetryPolicy,
    /// Taken by the first requests; the flag is set before one is released.
    first: Semaphore,
    contacted: AtomicBool,
}

/// One of the first requests to a registry.
struct FirstContact<'a> {
    contacted: &'a AtomicBool,
    _permit: SemaphorePermit<'a>,
}

impl Drop for FirstContact<'_> {
    fn drop(&mut self) {
        self.contacted.store(true, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Switch {
    Never,
    /// Loopback: a server that answers plain http with 400 may want TLS.
    ToSecure,
    /// Loopback, `skip_verify`: a server that answers, and not in TLS, is accepted without. One that does not answer
    /// may only be down.
    ToPlain,
}

impl RegistryClient {
    /// For the registry that users name `host`. Does no I/O except reading CA files.
    ///
    /// # Errors
    /// `Invalid`: not a host name, or a bad CA file; `NotFound`, `Io`: a CA file is missing.
    pub fn new(host: &str, options: RegistryOptions) -> Result<Self> {
        check_host(host)?;
        let loopback = is_loopback(host);
        let (plain, switch) = match options.scheme {
            Scheme::Http => (true, Switch::Never),
            Scheme::Auto if loopback && options.http.ca_files.is_empty() => (true, Switch::ToSecure),
            Scheme::Auto if loopback => (false, Switch::ToPlain),
            Scheme::Auto | Scheme::Https if options.http.skip_verify => (false, Switch::ToPlain),
            Scheme::Auto | Scheme::Https => (false, Switch::Never),
        };
        let http = Http::new(&options.http)?;
        let base = |scheme| parse_url(host, &format!("{scheme}://{}/v2/", api_host(host)));
        let plain = Arc::new(AtomicBool::new(plain));
        let inner = Inner {
            secure_base: base("https")?,
            plain_base: base("http")?,
            plain: Arc::clone(&plain),
            switch,
            settled: AtomicBool::new(switch == Switch::Never),
            auth: Authenticator::new(http.clone(), host, options.login, options.token, plain),
            http,
            host: host.to_owned(),
            retry: options.retry,
            first: Semaphore::new(FIRST_CONTACTS),
            contacted: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The registry as users name it.
    pub fn host(&self) -> &str {
        &self.inner.host
    }

    /// How this client's own requests are retried.
    pub fn retry(&self) -> RetryPolicy {
        self.inner.retry
    }

    /// Replaces the login from now on.
    pub fn set_credentials(&self, credentials: Credentials) {
        self.inner.auth.set_credentials(credentials);
    }

    /// The servers spoken to, by name.
    pub fn origins(&self) -> Vec<OriginSnapshot> {
        self.inner.http.origins().snapshot()
    }

    /// What is known about the server behind `url`.
    pub fn origin(&self, url: &Url) -> Arc<Origin> {
        self.inner.http.origin(url)
    }

    fn base(&self) -> &Url {
        match self.inner.plain.load(Ordering::Relaxed) {
            true => &self.inner.plain_base,
            false => &self.inner.secure_base,
        }
    }

    /// The URL of `path` below `/v2/`: `REPOSITORY/manifests/NAME`, `REPOSITORY/blobs/DIGEST`, …
    ///
    /// # Errors
    /// `Invalid`: not a path.
    pub fn url(&self, path: &str) -> Result<Url> {
        self.base()
            .join(path)
            .map_err(|e| Error::new(ErrorKind::Invalid, format!("URL path {path:?}")).with_source(e))
    }

    /// The `Location` of an answer, made absolute.
    ///
    /// # Errors
    /// `Invalid`: there is none, or it is not an http or https URL. `Denied`: it leads from TLS
    /// to where everybody on the way can read and change what is sent.
    pub fn location(answer: &Answer) -> Result<Url> {
        let url = Self::any_location(answer)?;
        if is_downgrade(answer.url(), &url) {
            let why = format!(
                "{}: redirected from https to {}, which is not protected; make the registry name an https \
                 URL (behind a TLS proxy it needs X-Forwarded-Proto), or set `blob_url_scheme`",
                answer.what(),
                crate::backend::http::shown(&url)
            );
            return Err(Error::new(ErrorKind::Denied, why));
        }
        Ok(url)
    }

    /// As [`RegistryClient::location`], where the scheme is the configuration's affair.
    pub(crate) fn any_location(answer: &Answer) -> Result<Url> {
        answer
            .header(LOCATION)
            .and_then(|location| answer.url().join(location).ok())
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| {
                let why = format!("{}: {} without a usable Location", answer.what(), answer.status());
                Error::new(ErrorKind::Invalid, why)
            })
    }

    /// True if `url` is the registry itself, which alone is given credentials.
    pub(crate) fn is_own(&self, url: &Url) -> bool {
        // A URL made before a switch of scheme is meant for the same server.
        let first = match self.inner.switch {
            Switch::Never => self.base(),
            Switch::ToSecure => &self.inner.plain_base,
            Switch::ToPlain => &self.inner.secure_base,
        };
        same_origin(url, self.base()) || same_origin(url, first)
    }

    /// Sends one request, logging in if the registry asks for it. Follows no redirect and
    /// repeats nothing else; any status is an answer.
    ///
    /// # Errors
    /// Transport failures; those of the token server; `Denied`: 401 and no login helps. A
    /// passing failure if the login was renewed but the body is a stream that is spent.
    pub async fn send(&self, call: Call, context: &ReadContext) -> std::result::Result<Answer, Failure> {
        // Callers send at many places, and each would hold all of it on its stack.
        Box::pin(self.send_once_or_again(call, context)).await
    }

    async fn send_once_or_again(
        &self,
        call: Call,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let Call { method, url, access, headers, body, hedged } = call;
        let own = self.is_own(&url);
        let mut request = Request::new(method, url);
        *request.headers_mut() = headers;
        *request.body_mut() = body;
        if !own {
            return self.transmit(request, hedged, context).await;
        }
        let _first = self.first_contact(context).await?;
        let used = self.inner.auth.header(&access, context).await?;
        if let Some(header) = &used {
            request.headers_mut().insert(AUTHORIZATION, header_value(header)?);
        }
        let again = request.try_clone();
        let answer = self.exchange(request, hedged, context).await?;
        let forbidden = answer.status() == StatusCode::FORBIDDEN;
        if let (true, Some(used), Some(mut request)) =
            (forbidden, &used, again.as_ref().and_then(Request::try_clone))
        {
            let Some(header) = self.inner.auth.reconsider(&access, used, context).await? else {
                return Ok(answer);
            };
            drop(answer);
            request.headers_mut().insert(AUTHORIZATION, header_value(&header)?);
            return self.exchange(request, hedged, context).await;
        }
        if answer.status() != StatusCode::UNAUTHORIZED {
            self.inner.auth.note_acceptance(&access);
            return Ok(answer);
        }
        let values = answer.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<_> =
            values.iter().filter_map(|v| v.to_str().ok()).flat_map(Challenge::parse).collect();
        let what = answer.what().to_owned();
        let refused = answer.into_failure(self.host(), context);
        if challenges.is_empty() {
            return Err(refused.await);
        }
        // The page is read meanwhile: that leaves the connection to the next request, and its server keeps nobody
        // waiting.
        let mut refused = std::pin::pin!(refused);
        let renewed = self.inner.auth.renew(&access, challenges, used.as_ref(), context);
        let mut renewed = std::pin::pin!(renewed);
        let mut page = None;
        let header = loop {
            tokio::select! {
                biased;
                refused = &mut refused, if page.is_none() => page = Some(refused),
                header = &mut renewed => break header?,
            }
        };
        let Some(header) = header else {
            let refused = match page {
                Some(refused) => refused,
                None => refused.await,
            };
            self.inner.auth.note_refusal(&access, &refused.error);
            return Err(refused);
        };
        let Some(mut request) = again else {
            let why = format!("{what}: the login was renewed, the request must be sent again");
            return Err(Failure::passing(Error::new(ErrorKind::Unavailable, why)));
        };
        request.headers_mut().insert(AUTHORIZATION, header_value(&header)?);
        let answer = self.exchange(request, hedged, context).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            self.inner.auth.note_acceptance(&access);
            return Ok(answer);
        }
        let refused = answer.into_failure(self.host(), context).await;
        self.inner.auth.note_refusal(&access, &refused.error);
        Err(refused)
    }

    /// Held by the first [`FIRST_CONTACTS`] requests to the registry, whatever comes of them; the
    /// others wait until one of them is answered.
    async fn first_contact(
        &self,
        context: &ReadContext,
    ) -> std::result::Result<Option<FirstContact<'_>>, Failure> {
        if self.inner.contacted.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let what = format!("first contact with {}", self.host());
        let closed = |_| Failure::from(Error::new(ErrorKind::Cancelled, "the client is gone"));
        let permit =
            within(context, &what, async { self.inner.first.acquire().await.map_err(closed) }).await?;
        if self.inner.contacted.load(Ordering::Relaxed) {
            return Ok(None);
        }
        Ok(Some(FirstContact { contacted: &self.inner.contacted, _permit: permit }))
    }

    async fn transmit(
        &self,
        request: Request,
        hedged: bool,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        match hedged {
            true => self.inner.http.send_hedged(request, context).await,
            false => self.inner.http.send(request, context).await,
        }
    }

    /// Sends to the registry itself in the scheme it speaks, learning it at first contact.
    async fn exchange(
        &self,
        mut request: Request,
        hedged: bool,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let plain = self.inner.plain.load(Ordering::Relaxed);
        let set = |request: &mut Request, plain| {
            // Between http and https this can not fail.
            let _ = request.url_mut().set_scheme(if plain { "http" } else { "https" });
        };
        set(&mut request, plain);
        if self.inner.settled.load(Ordering::Relaxed) {
            return self.transmit(request, hedged, context).await;
        }
        let again = request.try_clone();
        let result = self.inner.http.send(request, context).await;
        let other = match (&result, self.inner.switch) {
            (Ok(answer), Switch::ToSecure) => plain && answer.status() == StatusCode::BAD_REQUEST,
            (Err(failure), Switch::ToPlain) => !plain && failure.passing && is_tls_refused(&failure.error),
            _ => false,
        };
        let (true, Some(mut request)) = (other, again) else {
            self.inner.settled.fetch_or(result.is_ok(), Ordering::Relaxed);
            return result;
        };
        set(&mut request, !plain);
        match self.inner.http.send(request, context).await {
            // Whatever else listens there, a page that leads to https for example, is not the registry.
            Ok(answer) if self.inner.switch == Switch::ToPlain && !is_from_registry(&answer) => result,
            Ok(answer) => {
                self.inner.plain.store(!plain, Ordering::Relaxed);
                self.inner.settled.store(true, Ordering::Relaxed);
                Ok(answer)
            }
            // An untrusted certificate is the answer; anything else says that the first one stands.
            Err(failure) if failure.error.kind() == ErrorKind::Denied => Err(failure),
            Err(_) => result,
        }
    }
}

/// Could a registry have sent this?
fn is_from_registry(answer: &Answer) -> bool {
    let status = answer.status();
    let page = answer.header(CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html"));
    let secure = |location: Url| location.scheme() == "https";
    let leads_away =
        is_redirect(status) && !RegistryClient::any_location(answer).is_ok_and(|location| !secure(location));
    !page && !leads_away && !status.is_server_error()
}

/// True if what goes to `to` is less protected than what went to `from`.
fn is_downgrade(from: &Url, to: &Url) -> bool {
    from.scheme() == "https" && to.scheme() != "https"
}

/// A status that names another place for the same request.
pub fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The error for a chain of more than [`MAX_REDIRECTS`].
pub fn too_many_redirects(method: &Method, url: &Url) -> Error {
    let url = crate::backend::http::shown(url);
    Error::new(ErrorKind::Invalid, format!("{method} {url}: more than {MAX_REDIRECTS} redirects"))
}

#[cfg(test)]
mod tests;
