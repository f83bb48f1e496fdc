//! An HTTP relay between a client and a registry: it counts, stalls, cuts, refuses, lies and,
//! if told, asks for bearer tokens that it hands out itself, or redirects blobs to signed links.

mod access;
mod body;
mod wire;

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
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
    /// Forward the head and this many bytes, then reset the connection.
    ResetAfter(u64),
    /// Forward the head and this many bytes, then nothing more.
    StallAfter(u64),
    /// Answer with this status and so many seconds in `Retry-After`.
    RetryLater(u16, u64),
    /// Forward with a `Content-Range` that begins one byte later than the body.
    ShiftContentRange,
    /// Redirect blobs to a host that no name server knows; for [`Relay::with_links`].
    LoseHost,
    /// Send answers, heads as well, byte by byte with a tenth of a second between.
    Drip,
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
    /// Another rule, and for how many requests it still comes first.
    passing: Mutex<(Rule, usize)>,
    /// Number that signs links now; `None` serves blobs without redirects.
    signature: Option<watch::Sender<u64>>,
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
    arrivals: Vec<Instant>,
    links_given: usize,
    tokens: HashSet<String>,
    tokens_given: usize,
}

impl Log {
    fn arrived(&mut self, fetch: Fetch) {
        self.fetches.push(fetch);
        self.arrivals.push(Instant::now());
    }
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
        Self::launch(upstream, None, false)
    }

    /// A relay that redirects every blob to a link of its own that expires when told to.
    ///
    /// # Errors
    /// No free port.
    pub fn with_links(upstream: SocketAddr) -> Result<Self> {
        Self::launch(upstream, None, true)
    }

    /// A relay that wants a bearer token, and gives tokens at `/token`.
    ///
    /// # Errors
    /// No free port.
    pub fn with_tokens(upstream: SocketAddr, bearer: Bearer) -> Result<Self> {
        Self::launch(upstream, Some(bearer), false)
    }

    fn launch(upstream: SocketAddr, bearer: Option<Bearer>, links: bool) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            address,
            bearer,
            rule: watch::Sender::new(Rule::Pass),
            passing: Mutex::new((Rule::Pass, 0)),
            signature: links.then(|| watch::Sender::new(1)),
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

    /// The next `count` requests for blob bytes meet this rule, all others the one that was set.
    pub fn set_for(&self, count: usize, rule: Rule) {
        *self.shared.passing.lock().unwrap_or_else(PoisonError::into_inner) = (rule, count);
    }

    /// Makes all links given so far worthless: they are answered with 403.
    pub fn expire_links(&self) {
        if let Some(signature) = &self.shared.signature {
            signature.send_modify(|number| *number += 1);
        }
    }

    /// Redirects to links so far.
    pub fn links_given(&self) -> usize {
        self.shared.log().links_given
    }

    /// When requests for blob bytes came.
    pub fn arrivals(&self) -> Vec<Instant> {
        self.shared.log().arrivals.clone()
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
        log.arrivals.clear();
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

    /// The rule for one more request for blob bytes.
    fn next_rule(&self) -> Rule {
        let mut passing = self.passing.lock().unwrap_or_else(PoisonError::into_inner);
        if passing.1 == 0 {
            return *self.rule.borrow();
        }
        passing.1 -= 1;
        passing.0
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let Ok(socket) = wire::Socket::of(&stream) else { return };
            let wire = wire::Wire::new(stream, shared.rule.subscribe());
            let service = service_fn(move |request| answer(Arc::clone(&shared), socket.clone(), request));
            // A client that hangs up is its own affair.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(wire), service)
                .await;
        });
    }
}

async fn answer(
    shared: Arc<Shared>,
    socket: wire::Socket,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    Ok(relay(&shared, &socket, request).await.unwrap_or_else(|error| {
        let mut response = Response::new(text(format!("relay: {error:#}")));
        *response.status_mut() = StatusCode::BAD_GATEWAY;
        response
    }))
}

fn text(text: String) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed()
}

async fn relay(
    shared: &Arc<Shared>,
    socket: &wire::Socket,
    mut request: Request<Incoming>,
) -> Result<Response<Body>> {
    if request.uri().path() == "/token" {
        return access::token(shared, &request);
    }
    if let Some(challenge) = access::refused(shared, &request) {
        return Ok(challenge);
    }
    if let Some(answer) = access::linked(shared, &mut request)? {
        return Ok(answer);
    }
    let mut rule = Rule::Pass;
    let mut active = None;
    let ranges = body::ranges_of(&request);
    if let Some(fetch) = blob_fetch(&request) {
        active = Some(Held::count(&shared.active));
        shared.log().arrived(fetch);
        shared.arrived.send_modify(|count| *count += 1);
        rule = shared.next_rule();
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
        Rule::RetryLater(status, seconds) => {
            let mut response = Response::new(text("refused by rule".into()));
            *response.status_mut() = StatusCode::from_u16(status)?;
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            return Ok(response);
        }
        Rule::ResetAfter(_) => socket.reset_on_close()?,
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
    body::pour(shared, response, rule, &ranges).await
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
