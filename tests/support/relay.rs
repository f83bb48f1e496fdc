//! An HTTP relay between a client and a registry: it counts, stalls, cuts, refuses, lies and,
//! if told, asks for bearer tokens that it hands out itself.

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// What happens to requests for blob bytes (GET of `/v2/…/blobs/…`). All else passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Forward.
    Pass,
    /// Hold every request, unanswered, until the rule changes.
    Stall,
    /// Forward after this long, as a registry far away does.
    Slow(Duration),
    /// Answer with this status.
    Refuse(u16),
    /// Forward the head and this many bytes, then drop the connection.
    CutAfter(u64),
    /// Forward without `Range`: the whole blob with status 200.
    IgnoreRange,
    /// Forward, but stop for so long before these bytes of a blob: first and last. An answer in
    /// several parts stops before all of them.
    Late(u64, u64, Duration),
    /// Forward with the first bit of the first byte of the answer flipped.
    FlipFirstBit,
}

/// One request for blob bytes as it went through.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fetch {
    /// `sha256:…`.
    pub digest: String,
    /// First and last byte, as asked; `None` without `Range`.
    pub range: Option<(u64, u64)>,
}

/// The relay; it ends when dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    address: SocketAddr,
    /// User and password to exchange for a token; `None` lets everybody in.
    bearer: Option<Bearer>,
    rule: watch::Sender<Rule>,
    /// Requests that [`Rule::Stall`] holds now.
    stalled: watch::Sender<usize>,
    /// Requests for blob bytes that have come and are not answered yet.
    active: watch::Sender<usize>,
    /// Requests for blob bytes that have come so far.
    arrived: watch::Sender<usize>,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    fetches: Vec<Fetch>,
    bytes: u64,
    tokens: HashSet<String>,
    tokens_given: usize,
}

/// What the token server wants.
#[derive(Clone, Debug)]
pub struct Bearer {
    /// `Some((user, password))`, or `None` to give tokens to anybody who asks.
    pub credentials: Option<(String, String)>,
}

type Body = BoxBody<Bytes, std::io::Error>;

impl Relay {
    /// A relay to `upstream` that lets everybody in.
    ///
    /// # Errors
    /// No free port.
    pub fn start(upstream: SocketAddr) -> Result<Self> {
        Self::launch(upstream, None)
    }

    /// A relay that wants a bearer token, and gives tokens at `/token`.
    ///
    /// # Errors
    /// No free port.
    pub fn with_tokens(upstream: SocketAddr, bearer: Bearer) -> Result<Self> {
        Self::launch(upstream, Some(bearer))
    }

    fn launch(upstream: SocketAddr, bearer: Option<Bearer>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            address,
            bearer,
            rule: watch::Sender::new(Rule::Pass),
            stalled: watch::Sender::new(0),
            active: watch::Sender::new(0),
            arrived: watch::Sender::new(0),
            log: Mutex::default(),
        });
        runtime.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `docker://127.0.0.1:PORT/NAME`, through the relay.
    pub fn reference(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    /// Changes the rule; requests stalled by the old one go on under the new one.
    pub fn set(&self, rule: Rule) {
        self.shared.rule.send_replace(rule);
    }

    /// Waits until at least `count` requests are held by [`Rule::Stall`].
    ///
    /// # Errors
    /// Not within 30 seconds.
    pub fn wait_stalled(&self, count: usize) -> Result<()> {
        self.wait(&self.shared.stalled, count).context("stalled requests")
    }

    /// Waits until `count` requests for blob bytes have come since the start of the relay.
    ///
    /// # Errors
    /// Not within 30 seconds.
    pub fn wait_arrived(&self, count: usize) -> Result<()> {
        self.wait(&self.shared.arrived, count).context("arrived requests")
    }

    /// Requests for blob bytes that have come since the start of the relay.
    pub fn arrived(&self) -> usize {
        *self.shared.arrived.borrow()
    }

    /// Requests for blob bytes that are on their way at this moment.
    pub fn active(&self) -> usize {
        *self.shared.active.borrow()
    }

    fn wait(&self, counter: &watch::Sender<usize>, count: usize) -> Result<()> {
        let mut counter = counter.subscribe();
        let runtime = self.runtime.as_ref().context("the relay has ended")?;
        runtime.block_on(async {
            let wait = counter.wait_for(|now| *now >= count);
            match tokio::time::timeout(Duration::from_secs(30), wait).await {
                Ok(Ok(_)) => Ok(()),
                _ => bail!("fewer than {count} within 30 s"),
            }
        })
    }

    /// Every request for blob bytes so far, in order of arrival.
    pub fn fetches(&self) -> Vec<Fetch> {
        self.shared.log().fetches.clone()
    }

    /// Bytes of blobs handed on so far.
    pub fn bytes(&self) -> u64 {
        self.shared.log().bytes
    }

    /// Tokens given so far.
    pub fn tokens_given(&self) -> usize {
        self.shared.log().tokens_given
    }

    /// Forgets every token: the next request with one is refused with 401.
    pub fn expire_tokens(&self) {
        self.shared.log().tokens.clear();
    }

    /// Forgets the requests and bytes so far.
    pub fn forget(&self) {
        let mut log = self.shared.log();
        log.fetches.clear();
        log.bytes = 0;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&shared), request));
            // A client that hangs up is its own affair.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    Ok(relay(&shared, request).await.unwrap_or_else(|error| {
        let mut response = Response::new(text(format!("relay: {error:#}")));
        *response.status_mut() = StatusCode::BAD_GATEWAY;
        response
    }))
}

fn text(text: String) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed()
}

async fn relay(shared: &Shared, mut request: Request<Incoming>) -> Result<Response<Body>> {
    if request.uri().path() == "/token" {
        return token(shared, request).await;
    }
    if let Some(challenge) = refused(shared, &request) {
        return Ok(challenge);
    }
    let mut rule = Rule::Pass;
    let mut active = None;
    let ranges = ranges_of(&request);
    if let Some(fetch) = blob_fetch(&request) {
        active = Some(Held::count(&shared.active));
        shared.log().fetches.push(fetch);
        shared.arrived.send_modify(|count| *count += 1);
        rule = *shared.rule.borrow();
        if rule == Rule::Stall {
            rule = stall(shared).await?;
        }
    }
    match rule {
        Rule::Slow(delay) => tokio::time::sleep(delay).await,
        Rule::Refuse(status) => {
            let mut response = Response::new(text("refused by rule".into()));
            *response.status_mut() = StatusCode::from_u16(status)?;
            return Ok(response);
        }
        Rule::IgnoreRange => {
            request.headers_mut().remove(header::RANGE);
        }
        _ => {}
    }
    // Only the relay's own token: the registry behind knows nothing of it.
    if shared.bearer.is_some() {
        request.headers_mut().remove(header::AUTHORIZATION);
    }
    let stream = TcpStream::connect(shared.upstream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    if active.is_none() {
        return Ok(response.map(|body| body.map_err(std::io::Error::other).boxed()));
    }
    pour(shared, response, rule, &ranges).await
}

/// Hands the body, an answer to `ranges`, on in pieces as they come, changed as the rule wants.
async fn pour(
    shared: &Shared,
    response: Response<Incoming>,
    rule: Rule,
    ranges: &[(u64, u64)],
) -> Result<Response<Body>> {
    let (head, mut body) = response.into_parts();
    let mut frames: Vec<Result<Frame<Bytes>, std::io::Error>> = Vec::new();
    let mut left = if let Rule::CutAfter(limit) = rule { limit } else { u64::MAX };
    let mut first = rule == Rule::FlipFirstBit;
    while let Some(frame) = body.frame().await {
        let Ok(mut data) = frame?.into_data() else { continue };
        if first && !data.is_empty() {
            let mut flipped = data.to_vec();
            flipped[0] ^= 1;
            data = flipped.into();
            first = false;
        }
        if data.len() as u64 > left {
            data.truncate(usize::try_from(left)?);
            shared.log().bytes += data.len() as u64;
            frames.push(Ok(Frame::data(data)));
            frames.push(Err(std::io::Error::other("cut by rule")));
            break;
        }
        left -= data.len() as u64;
        shared.log().bytes += data.len() as u64;
        frames.push(Ok(Frame::data(data)));
    }
    let stream = futures_util::stream::iter(paused(frames, pause_of(rule, ranges))).then(
        |(delay, frame)| async move {
            tokio::time::sleep(delay).await;
            frame
        },
    );
    Ok(Response::from_parts(head, BodyExt::boxed(http_body_util::StreamBody::new(stream))))
}

/// Bytes before the pause that [`Rule::Late`] wants of an answer to `ranges`, and the pause.
fn pause_of(rule: Rule, ranges: &[(u64, u64)]) -> Option<(u64, Duration)> {
    let Rule::Late(first, last, delay) = rule else { return None };
    match ranges {
        [] => Some((first, delay)),
        [(start, end)] => (*start <= last && first <= *end).then(|| (first.saturating_sub(*start), delay)),
        many => many.iter().any(|(start, end)| *start <= last && first <= *end).then_some((0, delay)),
    }
}

/// The ranges that a request asks for, first and last byte of each.
fn ranges_of(request: &Request<Incoming>) -> Vec<(u64, u64)> {
    let header = request.headers().get(header::RANGE).and_then(|value| value.to_str().ok());
    let list = header.and_then(|text| text.strip_prefix("bytes=")).unwrap_or_default();
    let range = |text: &str| {
        let (first, last) = text.trim().split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    list.split(',').filter_map(range).collect()
}

/// The frames, each with the time to wait before it: none but before the byte of `pause`.
fn paused(
    frames: Vec<Result<Frame<Bytes>, std::io::Error>>,
    mut pause: Option<(u64, Duration)>,
) -> Vec<(Duration, Result<Frame<Bytes>, std::io::Error>)> {
    let mut paused = Vec::new();
    let mut at = 0;
    for frame in frames {
        let len = frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
        match pause {
            Some((before, delay)) if before < at + len => {
                pause = None;
                let mut data = frame.ok().and_then(|frame| frame.into_data().ok()).unwrap_or_default();
                let late = data.split_off(usize::try_from(before - at).unwrap_or(0));
                paused.push((Duration::ZERO, Ok(Frame::data(data))));
                paused.push((delay, Ok(Frame::data(late))));
            }
            _ => paused.push((Duration::ZERO, frame)),
        }
        at += len;
    }
    paused
}

/// One in a counter of requests; it goes also when the client hangs up.
struct Held<'a>(&'a watch::Sender<usize>);

impl<'a> Held<'a> {
    fn count(counter: &'a watch::Sender<usize>) -> Self {
        counter.send_modify(|count| *count += 1);
        Self(counter)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Holds a request until the rule is another one.
async fn stall(shared: &Shared) -> Result<Rule> {
    let _held = Held::count(&shared.stalled);
    let mut rule = shared.rule.subscribe();
    Ok(*rule.wait_for(|rule| *rule != Rule::Stall).await?)
}

fn blob_fetch(request: &Request<Incoming>) -> Option<Fetch> {
    if request.method() != hyper::Method::GET {
        return None;
    }
    let (_, digest) = request.uri().path().split_once("/blobs/")?;
    if !digest.starts_with("sha256:") {
        return None;
    }
    let range = request.headers().get(header::RANGE).and_then(|value| {
        let (first, last) = value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    });
    Some(Fetch { digest: digest.to_owned(), range })
}

/// The 401 with a bearer challenge, unless the request carries a token of ours.
fn refused(shared: &Shared, request: &Request<Incoming>) -> Option<Response<Body>> {
    shared.bearer.as_ref()?;
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    if token.is_some_and(|token| shared.log().tokens.contains(token)) {
        return None;
    }
    let repository = request
        .uri()
        .path()
        .strip_prefix("/v2/")
        .and_then(|rest| {
            let end = ["/blobs/", "/manifests/"].iter().filter_map(|part| rest.find(part)).min()?;
            Some(&rest[..end])
        })
        .unwrap_or("");
    let mut challenge = format!(r#"Bearer realm="http://{}/token",service="tests""#, shared.address);
    if !repository.is_empty() {
        challenge += &format!(r#",scope="repository:{repository}:pull,push""#);
    }
    let mut response = Response::new(text(r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#.into()));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().ok()?);
    Some(response)
}

/// `/token`: GET with Basic credentials or none. A POSTed form is answered 404, as most servers do,
/// so that clients fall back.
async fn token(shared: &Shared, request: Request<Incoming>) -> Result<Response<Body>> {
    let refuse = |status| {
        let mut response = Response::new(text("{}".into()));
        *response.status_mut() = status;
        response
    };
    if request.method() != hyper::Method::GET {
        return Ok(refuse(StatusCode::NOT_FOUND));
    }
    let Some(bearer) = &shared.bearer else { return Ok(refuse(StatusCode::NOT_FOUND)) };
    if let Some((user, password)) = &bearer.credentials {
        let wanted = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        if request
            .headers()
            .get(header::AUTHORIZATION)
            .is_none_or(|given| given.as_bytes() != wanted.as_bytes())
        {
            return Ok(refuse(StatusCode::UNAUTHORIZED));
        }
    }
    let mut log = shared.log();
    log.tokens_given += 1;
    let token = format!("token-{}", log.tokens_given);
    log.tokens.insert(token.clone());
    let mut response = Response::new(text(format!(r#"{{"token":"{token}","expires_in":300}}"#)));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(response)
}
