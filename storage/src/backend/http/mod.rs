//! The transport of remote sources: kept connections, TLS, timeouts, and errors that
//! name what was asked and what helps.
//!
//! Redirects are never followed here and proxies never used unless asked for: both
//! decide who sees credentials, so the callers decide them.

mod answer;
mod hedge;
mod meaning;
mod names;
mod tls;
mod unix;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, Request, Response, StatusCode};
pub use reqwest::{Url, Version};

pub use self::answer::Answer;
use self::hedge::sooner;
pub use self::meaning::Help;
pub(crate) use self::meaning::is_tls_refused;
use self::meaning::{Broken, judge, retry_after, transport_failure};
use self::unix::UnixClient;
use super::origin::{Limits, Origin, Origins, Route};
use super::retry::{Failure, within};
use super::{Priority, ReadContext};
use crate::oci::auth::Secret;
use crate::{Error, ErrorKind, Result};

/// Bytes of one HTTP/2 answer that may come unread: what 200 Mbit/s carry in 80 ms from the first
/// byte on. A window that adapts begins with 64 KiB a round trip, and a start is over before it has
/// grown.
const HTTP2_STREAM_WINDOW: u32 = 2 << 20;
/// The same of all answers on a connection: as many as usually run ahead leave room for a reader's.
const HTTP2_CONNECTION_WINDOW: u32 = 5 * HTTP2_STREAM_WINDOW;

/// How this program names itself to servers.
const USER_AGENT: &str = concat!("nydus/", env!("CARGO_PKG_VERSION"));
/// Idle connections kept to one host: as many as reads usually run side by side.
const MAX_IDLE_CONNECTIONS: usize = 16;

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

/// A pool of connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Http {
    client: Client,
    /// The connections of second requests: over HTTP/2 one of the first pool would wait behind
    /// the very stream that is late.
    second: Client,
    progress_timeout: Option<Duration>,
    origins: Origins,
}

impl Http {
    /// A pool without connections.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Invalid`: a CA file is missing, unreadable or holds no certificate.
    pub fn new(options: &HttpOptions) -> Result<Self> {
        let tls = tls::config(options)?;
        let client = Client::new(options, tls.clone())?;
        let second = Client::new(options, tls)?;
        let route = Route {
            proxy: options.proxy.clone(),
            proxy_from_environment: options.proxy_from_environment,
            unix_socket: options.unix_socket.clone(),
        };
        let origins = Origins::new(options.limits, route);
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
        // Whoever sends waits at many places, and each would hold all of this on its stack.
        Box::pin(self.exchange(request, false, context)).await
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
        Box::pin(self.exchange(request, true, context)).await
    }

    async fn exchange(
        &self,
        request: Request,
        hedged: bool,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let what = format!("{} {}", request.method(), shown(request.url()));
        let bare = request.method() == Method::HEAD;
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
                let time = hedged.then(|| started.elapsed());
                if status.is_server_error() && passing {
                    ticket.failed(format!("{what}: {status}"), wait);
                } else if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) && !bare {
                    ticket.begun(time);
                } else {
                    ticket.answered(time, wait.filter(|_| status == StatusCode::TOO_MANY_REQUESTS));
                }
            }
            Err(failure) if failure.passing => ticket.failed(failure.error.to_string(), None),
            Err(_) => {}
        }
        Ok(Answer { what, response: result?, silence: self.progress_timeout, ticket })
    }
}

/// Who makes the connections.
#[derive(Clone, Debug)]
enum Client {
    Network(reqwest::Client),
    Unix(Box<UnixClient>),
}

impl Client {
    /// Makes them as `options` say.
    fn new(options: &HttpOptions, tls: rustls::ClientConfig) -> Result<Self> {
        Ok(match &options.unix_socket {
            Some(path) => Self::Unix(Box::new(UnixClient::new(path, options))),
            None => Self::Network(network(options, tls)?),
        })
    }

    /// Sends `request`, and awaits the head of its answer.
    async fn execute(&self, request: Request) -> std::result::Result<Response, Broken> {
        match self {
            Self::Network(client) => Ok(client.execute(request).await?),
            Self::Unix(client) => client.execute(request).await,
        }
    }
}

/// Connections over the network, made as `options` say.
fn network(options: &HttpOptions, tls: rustls::ClientConfig) -> Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .http2_initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .http2_initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
        .tcp_nodelay(true);
    if let Some(timeout) = options.connect_timeout {
        builder = builder.connect_timeout(timeout);
    }
    if crate::outside::get().is_some() {
        builder = builder.dns_resolver(Arc::new(names::Names));
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
async fn progress<T, E: Into<Broken>>(
    silence: Option<Duration>,
    what: &str,
    context: &ReadContext,
    step: impl Future<Output = std::result::Result<T, E>>,
) -> std::result::Result<T, Failure> {
    within(context, what, async {
        let result = match silence {
            Some(silence) => tokio::time::timeout(silence, step).await.map_err(|_| {
                let why = format!("{what}: the server was silent for {} ms", silence.as_millis());
                Failure::passing(Error::new(ErrorKind::Unavailable, why))
            })?,
            None => step.await,
        };
        result.map_err(|e| transport_failure(what, e.into()))
    })
    .await
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
