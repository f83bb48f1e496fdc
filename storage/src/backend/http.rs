//! The transport of remote sources: kept connections, TLS, timeouts, and errors that
//! name what was asked and what helps.
//!
//! Redirects are never followed here and proxies never used unless asked for: both
//! decide who sees credentials, so the callers decide them.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
pub use reqwest::Url;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Request, Response, StatusCode};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use super::origin::{Limits, Origin, Origins, Ticket};
use super::retry::{Failure, within};
use super::{Priority, ReadContext};
use crate::oci::auth::Secret;
use crate::{Error, ErrorKind, Result};

/// How this program names itself to servers.
const USER_AGENT: &str = concat!("nydus/", env!("CARGO_PKG_VERSION"));
/// Idle connections kept to one host: as many as reads usually run side by side.
const MAX_IDLE_CONNECTIONS: usize = 16;
/// An error page is read this far for its message.
const MAX_ERROR_BODY: usize = 4096;
/// A server's own words are shown this far.
const MAX_ERROR_TEXT: usize = 200;

/// What is never reached through a proxy from the environment.
const LOOPBACK: &str = "localhost,127.0.0.0/8,::1";

/// How to reach servers.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Longest wait for a connection, TLS included; `None` waits for ever.
    pub connect_timeout: Option<Duration>,
    /// Longest silence of a server that owes an answer or more of one; `None` waits for ever.
    pub progress_timeout: Option<Duration>,
    /// PEM files with roots trusted beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate.
    pub skip_verify: bool,
    /// Use the proxies of `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, except for `NO_PROXY`.
    pub proxy_from_environment: bool,
    /// Connect to this socket, whatever host a URL names; proxies then mean nothing.
    pub unix_socket: Option<PathBuf>,
    /// How each server is spared.
    pub limits: Limits,
    /// Go through this HTTP proxy, `http://[USER:PASSWORD@]HOST:PORT`. Secret.
    pub proxy: Option<Secret>,
    /// PEM files with the certificate chain and the private key to show to servers that ask.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Some(Duration::from_secs(5)),
            progress_timeout: Some(Duration::from_secs(15)),
            ca_files: Vec::new(),
            skip_verify: false,
            proxy_from_environment: false,
            unix_socket: None,
            limits: Limits::default(),
            proxy: None,
            client_certificate: None,
        }
    }
}

/// What helps whom a server refuses.
#[derive(Clone, Copy, Debug)]
pub enum Help<'a> {
    /// A login for the server of this name.
    Login(&'a str),
    /// This.
    Text(&'a str),
}

impl<'a> From<&'a str> for Help<'a> {
    fn from(server: &'a str) -> Self {
        Self::Login(server)
    }
}

impl<'a> From<&'a String> for Help<'a> {
    fn from(server: &'a String) -> Self {
        Self::Login(server)
    }
}

/// A pool of connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Http {
    client: reqwest::Client,
    /// The connections of second requests: over HTTP/2 one of the first pool would wait behind
    /// the very stream that is late.
    second: reqwest::Client,
    progress_timeout: Option<Duration>,
    origins: Origins,
}

impl Http {
    /// A pool without connections.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Invalid`: a CA file is missing, unreadable or holds no certificate.
    pub fn new(options: &HttpOptions) -> Result<Self> {
        let tls = tls_config(options)?;
        let client = client(options, tls.clone())?;
        let second = self::client(options, tls)?;
        let origins = Origins::new(options.limits);
        Ok(Self { client, second, progress_timeout: options.progress_timeout, origins })
    }

    /// The servers spoken to.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }

    /// What is known about the server behind `url`.
    pub fn origin(&self, url: &Url) -> Arc<Origin> {
        self.origins.of(url)
    }

    /// Sends `request` and awaits the head of its answer, whatever its status.
    ///
    /// It takes a place among the server's requests until the answer is read or dropped. A
    /// request whose body is a stream may take as long as the context allows.
    ///
    /// # Errors
    /// A passing failure if the server can not be reached or falls silent; a final one if
    /// it can not be trusted, or is left in peace; `TimedOut`, `Cancelled` as the context says.
    pub async fn send(
        &self,
        request: Request,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        self.exchange(request, false, context).await
    }

    /// As [`Http::send`], for a request that may be sent twice if somebody waits for it and its
    /// answer is late: the first answer counts.
    ///
    /// # Errors
    /// As [`Http::send`].
    pub async fn send_hedged(
        &self,
        request: Request,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        self.exchange(request, true, context).await
    }

    async fn exchange(
        &self,
        request: Request,
        hedged: bool,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let what = format!("{} {}", request.method(), shown(request.url()));
        let streams = request.body().is_some_and(|body| body.as_bytes().is_none());
        let silence = if streams { None } else { self.progress_timeout };
        let origin = self.origins.of(request.url());
        let mut ticket = origin.admit(context).await?;
        let started = Instant::now();
        let again = if hedged { request.try_clone() } else { None };
        let first = progress(silence, &what, context, self.client.execute(request));
        let late = (context.priority == Priority::OnDemand && hedged).then(|| origin.late_after()).flatten();
        let result = match (again, late) {
            (Some(again), Some(late)) => {
                let second = || progress(silence, &what, context, self.second.execute(again));
                sooner(first, late, second, &origin).await
            }
            _ => first.await,
        };
        match &result {
            Ok(response) => {
                let status = response.status();
                let wait = retry_after(response.headers());
                let (_, passing, _) = judge(status, Help::Text(""));
                if status.is_server_error() && passing {
                    ticket.failed(format!("{what}: {status}"), wait);
                } else {
                    let wait = wait.filter(|_| status == StatusCode::TOO_MANY_REQUESTS);
                    ticket.answered(hedged.then(|| started.elapsed()), wait);
                }
            }
            Err(failure) if failure.passing => ticket.failed(failure.error.to_string(), None),
            Err(_) => {}
        }
        Ok(Answer { what, response: result?, silence: self.progress_timeout, ticket })
    }
}

type Head = std::result::Result<Response, Failure>;

/// The answer of the first request; if that is late, the first good one of it and a second.
async fn sooner<F: Future<Output = Head>>(
    first: impl Future<Output = Head>,
    late: Duration,
    second: impl FnOnce() -> F,
    origin: &Origin,
) -> Head {
    tokio::pin!(first);
    tokio::select! {
        biased;
        head = &mut first => return head,
        () = tokio::time::sleep(late) => {}
    }
    let Some(_place) = origin.second() else { return first.await };
    let good = |head: &Head| {
        let bad = |status: StatusCode| status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        head.as_ref().is_ok_and(|response| !bad(response.status()))
    };
    let second = second();
    tokio::pin!(second);
    let (head, other) = tokio::select! {
        biased;
        head = &mut first => {
            let other = if good(&head) { None } else { Some(second.await) };
            (Some(head), other)
        }
        other = &mut second => {
            let head = if good(&other) { None } else { Some(first.await) };
            (head, Some(other))
        }
    };
    match (head, other) {
        (Some(head), other) if good(&head) || !other.as_ref().is_some_and(good) => head,
        (_, Some(other)) => {
            origin.second_won();
            other
        }
        // One of them is always there.
        (Some(head), None) => head,
        (None, None) => Err(Error::new(ErrorKind::Cancelled, "a request without an end").into()),
    }
}

/// Connections made as `options` say.
fn client(options: &HttpOptions, tls: rustls::ClientConfig) -> Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .http2_adaptive_window(true)
        .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
        .tcp_nodelay(true);
    if let Some(timeout) = options.connect_timeout {
        builder = builder.connect_timeout(timeout);
    }
    if let Some(path) = &options.unix_socket {
        builder = builder.unix_socket(path.as_path());
    }
    builder = builder.no_proxy();
    if options.proxy_from_environment {
        for proxy in environment_proxies(|name| std::env::var(name).ok())? {
            builder = builder.proxy(proxy);
        }
    }
    if let Some(url) = &options.proxy {
        // The library's message could repeat the URL's password.
        let invalid = || Error::new(ErrorKind::Invalid, "`proxy.url`: not the URL of an http proxy");
        let named = parse_url("`proxy.url`", url.expose()).map_err(|_| invalid())?;
        builder = builder.proxy(reqwest::Proxy::all(named).map_err(|_| invalid())?);
    }
    builder.build().map_err(|e| Error::new(ErrorKind::Invalid, "set up the HTTP client").with_source(e))
}

/// Awaits `step` of an exchange no longer than `silence` and the context allow.
async fn progress<T>(
    silence: Option<Duration>,
    what: &str,
    context: &ReadContext,
    step: impl Future<Output = std::result::Result<T, reqwest::Error>>,
) -> std::result::Result<T, Failure> {
    within(context, what, async {
        let result = match silence {
            Some(silence) => tokio::time::timeout(silence, step).await.map_err(|_| {
                let why = format!("{what}: the server was silent for {} ms", silence.as_millis());
                Failure::passing(Error::new(ErrorKind::Unavailable, why))
            })?,
            None => step.await,
        };
        result.map_err(|e| transport_failure(what, e))
    })
    .await
}

/// The head of an answer, its body still to come.
#[derive(Debug)]
pub struct Answer {
    what: String,
    response: Response,
    silence: Option<Duration>,
    ticket: Ticket,
}

impl Answer {
    /// `METHOD URL` of the request, fit to be shown.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// A header's value, if it is there and text.
    pub fn header(&self, name: impl reqwest::header::AsHeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// Where the answer comes from.
    pub fn url(&self) -> &Url {
        self.response.url()
    }

    /// The next bytes of the body; `None` at its end.
    ///
    /// # Errors
    /// A passing failure: reset, truncation, silence. `TimedOut`, `Cancelled`.
    pub async fn chunk(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        let piece = progress(self.silence, &self.what, context, self.response.chunk()).await?;
        if let Some(piece) = &piece {
            self.ticket.received(piece.len());
        }
        Ok(piece)
    }

    /// The whole body, at most `cap` bytes.
    ///
    /// # Errors
    /// Those of [`Answer::chunk`]; `Invalid`: it is longer.
    pub async fn bytes(mut self, cap: u64, context: &ReadContext) -> std::result::Result<Vec<u8>, Failure> {
        let mut all = Vec::new();
        while let Some(piece) = self.chunk(context).await? {
            if (all.len() + piece.len()) as u64 > cap {
                let why = format!("{}: the answer is longer than {cap} bytes", self.what);
                return Err(Error::new(ErrorKind::Invalid, why).into());
            }
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    /// Turns an unwelcome answer into a failure that says what it means and what helps.
    pub async fn into_failure<'h>(mut self, help: impl Into<Help<'h>>, context: &ReadContext) -> Failure {
        let status = self.status();
        let retry_after = retry_after(self.headers());
        let mut page = Vec::new();
        // The page only embellishes the message; what can not be read is left out.
        while page.len() < MAX_ERROR_BODY && self.response.status() != StatusCode::NOT_MODIFIED {
            match self.chunk(context).await {
                Ok(Some(piece)) => page.extend_from_slice(&piece),
                Ok(None) | Err(_) => break,
            }
        }
        page.truncate(MAX_ERROR_BODY);
        let (kind, passing, meaning) = judge(status, help.into());
        let mut text = format!("{}: {status}", self.what);
        for part in [error_text(&page).as_str(), meaning.as_str()].into_iter().filter(|part| !part.is_empty())
        {
            text = format!("{text}; {part}");
        }
        Failure { error: Error::new(kind, text), passing, retry_after }
    }
}

/// Kind, whether it may pass, and the remedy of an unwelcome status.
fn judge(status: StatusCode, help: Help<'_>) -> (ErrorKind, bool, String) {
    match status.as_u16() {
        code @ (401 | 403) => {
            let remedy = match help {
                Help::Text(text) => text.to_owned(),
                Help::Login(server) if code == 401 => {
                    format!("log in with `docker login {server}` or set `auth`")
                }
                Help::Login(server) => format!("the login used for {server} does not allow this"),
            };
            (ErrorKind::Denied, false, remedy)
        }
        404 | 410 => (ErrorKind::NotFound, false, String::new()),
        407 => {
            (ErrorKind::Denied, false, "the proxy wants a login: put USER:PASSWORD@ in its URL".to_owned())
        }
        408 | 425 | 429 | 500 | 502..=504 | 506..=599 => (ErrorKind::Unavailable, true, String::new()),
        416 => (ErrorKind::OutOfRange, false, "the object ends before the range asked for".to_owned()),
        405 | 501 | 505 => {
            (ErrorKind::Unsupported, false, "the server does not support this request".to_owned())
        }
        _ => (ErrorKind::Invalid, false, String::new()),
    }
}

/// The message in a registry's error page, or the code in an object store's, without control
/// characters, cut short.
fn error_text(page: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Page {
        errors: Vec<Item>,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Page>(page) {
        Ok(page) => {
            page.errors.iter().map(|e| format!("{}: {}", e.code, e.message)).collect::<Vec<_>>().join(", ")
        }
        Err(_) => xml_code(page).unwrap_or_default(),
    };
    text.chars().filter(|c| !c.is_control()).take(MAX_ERROR_TEXT).collect()
}

/// How long the server wants to be left alone.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    parse_retry_after(headers.get(RETRY_AFTER)?.to_str().ok()?, SystemTime::now())
}

/// The one element of an object store's error page that is never a secret.
fn xml_code(page: &[u8]) -> Option<String> {
    let page = std::str::from_utf8(page).ok()?;
    let (code, _) = page.split_once("<Code>")?.1.split_once("</Code>")?;
    code.bytes().all(|b| b.is_ascii_alphanumeric()).then(|| code.to_owned())
}

/// `Retry-After`: seconds or a date.
fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    match value.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(value.trim()).ok()?.duration_since(now).unwrap_or_default()),
    }
}

/// A URL fit for messages: without user, password, query and fragment, which may hold secrets.
pub fn shown(url: &Url) -> impl fmt::Display {
    let mut url = url.clone();
    // Both fail only for URLs without a host, which have no user either.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url
}

/// True if credentials meant for `a` may go to `b`.
pub fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// Parses an absolute http or https URL.
///
/// # Errors
/// `Invalid`: not one. `what` says whose it is.
pub fn parse_url(what: &str, text: &str) -> Result<Url> {
    match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(url),
        _ => Err(Error::new(ErrorKind::Invalid, format!("{what}: not an http or https URL"))),
    }
}

/// A failure below HTTP.
fn transport_failure(what: &str, error: reqwest::Error) -> Failure {
    let untrusted = certificate_error(&error);
    let (kind, passing, why) = if untrusted {
        let remedy = "its certificate is not trusted; add its CA to `ca_cert_files`, or set `skip_verify`";
        (ErrorKind::Denied, false, remedy)
    } else if error.is_builder() {
        (ErrorKind::Invalid, false, "not a valid request")
    } else if error.is_connect() {
        (ErrorKind::Unavailable, true, "no connection")
    } else {
        (ErrorKind::Unavailable, true, "the connection broke")
    };
    let error = Error::new(kind, format!("{what}: {why}")).with_source(error.without_url());
    Failure { error, passing, retry_after: None }
}

/// True if a cause of `error` is a certificate that was not accepted.
fn certificate_error(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return matches!(tls, rustls::Error::InvalidCertificate(_));
    }
    // An io::Error does not name what it wraps as its source.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    match wrapped {
        Some(inner) => certificate_error(inner),
        None => error.source().is_some_and(certificate_error),
    }
}

/// The proxies that the usual variables name; lower case wins, as in curl.
fn environment_proxies(variable: impl Fn(&str) -> Option<String>) -> Result<Vec<reqwest::Proxy>> {
    let get = |upper: &str| {
        variable(&upper.to_ascii_lowercase()).or_else(|| variable(upper)).filter(|value| !value.is_empty())
    };
    // As in other tools of this kind, this machine itself is never reached through a proxy.
    let list = get("NO_PROXY").map_or_else(|| LOOPBACK.to_owned(), |list| format!("{LOOPBACK},{list}"));
    let except = reqwest::NoProxy::from_string(&list);
    let all = get("ALL_PROXY");
    let mut proxies = Vec::new();
    for (name, https) in [("HTTPS_PROXY", true), ("HTTP_PROXY", false)] {
        let Some(url) = get(name).or_else(|| all.clone()) else { continue };
        let proxy = if https { reqwest::Proxy::https(&url) } else { reqwest::Proxy::http(&url) };
        let proxy = proxy
            .map_err(|_| Error::new(ErrorKind::Invalid, format!("{name}: not the URL of an http proxy")))?;
        proxies.push(proxy.no_proxy(except.clone()));
    }
    Ok(proxies)
}

/// TLS with ring, the system's roots and the private ones.
fn tls_config(options: &HttpOptions) -> Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::new(ErrorKind::Unsupported, "set up TLS").with_source(e))?;
    let builder = if options.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        builder.with_root_certificates(roots(&options.ca_files)?)
    };
    let mut config = match &options.client_certificate {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let what = || format!("client certificate {} with key {}", chain.display(), key.display());
            let invalid = |e: String| Error::new(ErrorKind::Invalid, format!("{}: {e}", what()));
            let read = |path: &PathBuf| std::fs::read(path).map_err(|e| Error::io(what(), e));
            let chain =
                CertificateDer::pem_slice_iter(&read(chain)?).collect::<std::result::Result<Vec<_>, _>>();
            let key = PrivateKeyDer::from_pem_slice(&read(key)?);
            let (chain, key) =
                (chain.map_err(|e| invalid(e.to_string()))?, key.map_err(|e| invalid(e.to_string()))?);
            builder.with_client_auth_cert(chain, key).map_err(|e| invalid(e.to_string()))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn roots(ca_files: &[PathBuf]) -> Result<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore::empty();
    // A machine without system roots still reaches plain http and private CAs; what is
    // missing shows as an untrusted certificate.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for path in ca_files {
        let what = || format!("CA file {}", path.display());
        let pem = std::fs::read(path).map_err(|e| Error::io(what(), e))?;
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let added =
                certificate.map_err(|e| e.to_string()).and_then(|c| roots.add(c).map_err(|e| e.to_string()));
            added.map_err(|e| Error::new(ErrorKind::Invalid, format!("{}: {e}", what())))?;
            count += 1;
        }
        if count == 0 {
            return Err(Error::new(ErrorKind::Invalid, format!("{}: no PEM certificate in it", what())));
        }
    }
    Ok(roots)
}

/// `skip_verify`: any certificate will do; handshake signatures are still checked.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_urls_hold_no_secrets() {
        let url = Url::parse("https://user:pw@h.io:8443/v2/a/blobs/x?X-Amz-Signature=s3cr3t#f").unwrap();
        assert_eq!(shown(&url).to_string(), "https://h.io:8443/v2/a/blobs/x");
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let u = |s| Url::parse(s).unwrap();
        assert!(same_origin(&u("https://a/x"), &u("https://a:443/y?z")));
        for other in ["http://a/", "https://b/", "https://a:444/", "https://a.b/"] {
            assert!(!same_origin(&u("https://a/x"), &u(other)), "{other}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2026 07:28:00 GMT").unwrap();
        let cases = [
            ("3", Some(3)),
            ("Wed, 21 Oct 2026 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2026 07:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ];
        for (value, seconds) in cases {
            assert_eq!(parse_retry_after(value, now), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn statuses_have_kinds_and_only_some_pass() {
        for (code, kind, passing) in [
            (401, ErrorKind::Denied, false),
            (403, ErrorKind::Denied, false),
            (404, ErrorKind::NotFound, false),
            (416, ErrorKind::OutOfRange, false),
            (429, ErrorKind::Unavailable, true),
            (500, ErrorKind::Unavailable, true),
            (501, ErrorKind::Unsupported, false),
            (503, ErrorKind::Unavailable, true),
        ] {
            let (k, p, _) = judge(StatusCode::from_u16(code).unwrap(), "h".into());
            assert_eq!((k, p), (kind, passing), "{code}");
        }
        assert_eq!(
            error_text(b"{\"errors\":[{\"code\":\"DENIED\",\"message\":\"no\\u001b[31m\"}]}"),
            "DENIED: no[31m"
        );
        assert_eq!(error_text(b"<html>"), "");
        let page = b"<?xml?><Error><Code>SlowDown</Code><AWSAccessKeyId>AK</AWSAccessKeyId></Error>";
        assert_eq!(error_text(page), "SlowDown");
        assert_eq!(error_text(b"<Code>a key: s3cret</Code>"), "");
    }

    #[test]
    fn broken_ca_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, "no certificate").unwrap();
        let options = |path: PathBuf| HttpOptions { ca_files: vec![path], ..HttpOptions::default() };
        let err = Http::new(&options(path)).unwrap_err();
        assert!(err.kind() == ErrorKind::Invalid && err.to_string().contains("ca.pem"), "{err}");
        assert_eq!(Http::new(&options(dir.path().join("gone.pem"))).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn proxies_come_from_the_usual_variables() {
        let set = |list: &'static [(&str, &str)]| {
            environment_proxies(|name| list.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
        };
        assert_eq!(set(&[]).unwrap().len(), 0);
        assert_eq!(set(&[("https_proxy", "http://p:3128"), ("NO_PROXY", "localhost")]).unwrap().len(), 1);
        assert_eq!(set(&[("ALL_PROXY", "http://p:3128")]).unwrap().len(), 2);
        let err = set(&[("HTTP_PROXY", "http://user:secret@[bad")]).unwrap_err();
        assert!(!err.to_string().contains("secret"));
    }
}
