//! An HTTP server on loopback that misbehaves on plan and remembers what it was asked.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::TokioIo;

use super::retry::RetryPolicy;

/// What happens after the last byte of the planned body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The body ends.
    Well,
    /// The connection is cut.
    Cut,
    /// Nothing, for ever.
    Stall,
    /// The rest comes, a byte in ten milliseconds.
    Drip,
}

/// A planned answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Bytes,
    sent: usize,
    end: End,
}

impl Reply {
    /// `status` with a body.
    pub(crate) fn new(status: u16, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), sent: body.len(), body, end: End::Well }
    }

    /// Adds a header.
    pub(crate) fn header(mut self, name: impl ToString, value: impl ToString) -> Self {
        self.headers.push((name.to_string(), value.to_string()));
        self
    }

    /// The connection is cut after `sent` bytes of the body.
    pub(crate) fn cut_after(self, sent: usize) -> Self {
        Self { sent, end: End::Cut, ..self }
    }

    /// Nothing comes after `sent` bytes of the body.
    pub(crate) fn stall_after(self, sent: usize) -> Self {
        Self { sent, end: End::Stall, ..self }
    }

    /// All but the first `sent` bytes come one by one.
    pub(crate) fn drip_after(self, sent: usize) -> Self {
        Self { sent, end: End::Drip, ..self }
    }

    /// A registry's 401.
    pub(crate) fn unauthorized(challenge: &str) -> Self {
        let page = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
        Self::new(401, page).header("www-authenticate", challenge)
    }

    /// `data` in answer to the request's `Range`, as a good server does it.
    pub(crate) fn ranged(asked: &Asked, data: &[u8]) -> Self {
        let Some((start, end)) = asked.range else { return Self::new(200, data.to_vec()) };
        let (first, last) = (start as usize, (end as usize).min(data.len()));
        if first >= last {
            return Self::new(416, "");
        }
        Self::new(206, data[first..last].to_vec())
            .header(CONTENT_RANGE, format!("bytes {first}-{}/{}", last - 1, data.len()))
    }

    /// `data` in answer to several ranges, as a good server does it; one range as [`Reply::ranged`].
    pub(crate) fn many(asked: &Asked, data: &[u8]) -> Self {
        if asked.ranges.len() < 2 {
            return Self::ranged(asked, data);
        }
        let mut body = Vec::new();
        for (start, end) in &asked.ranges {
            let head =
                format!("\r\n--b0undary\r\nContent-Range: bytes {start}-{}/{}\r\n\r\n", end - 1, data.len());
            body.extend_from_slice(head.as_bytes());
            body.extend_from_slice(&data[*start as usize..*end as usize]);
        }
        body.extend_from_slice(b"\r\n--b0undary--\r\n");
        Self::new(206, body).header("content-type", "multipart/byteranges; boundary=b0undary")
    }

    fn into_response(self, head: bool) -> Response<impl hyper::body::Body<Data = Bytes, Error = io::Error>> {
        let mut builder = Response::builder().status(self.status);
        for (name, value) in &self.headers {
            builder = builder.header(name, value);
        }
        if !self.headers.iter().any(|(name, _)| name == CONTENT_LENGTH.as_str()) && self.status != 204 {
            builder = builder.header(CONTENT_LENGTH, self.body.len());
        }
        let first =
            futures_util::stream::iter((!head).then(|| Ok(Frame::data(self.body.slice(..self.sent)))));
        let rest: std::pin::Pin<Box<dyn Stream<Item = _> + Send>> = match self.end {
            End::Well => Box::pin(futures_util::stream::empty()),
            // The pending turn lets the bytes before it leave.
            End::Cut => Box::pin(futures_util::stream::once(async {
                tokio::task::yield_now().await;
                Err(io::Error::other("cut on plan"))
            })),
            End::Stall => Box::pin(futures_util::stream::pending()),
            End::Drip => {
                let rest = self.body.slice(self.sent..);
                Box::pin(futures_util::stream::iter(0..rest.len()).then(move |at| {
                    let byte = rest.slice(at..at + 1);
                    async move {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        Ok(Frame::data(byte))
                    }
                }))
            }
        };
        builder.body(StreamBody::new(first.chain(rest))).unwrap()
    }
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    /// Start and end of a `Range`, if it is one.
    pub(crate) range: Option<(u64, u64)>,
    /// All of a `Range`.
    pub(crate) ranges: Vec<(u64, u64)>,
    pub(crate) body: Bytes,
    /// How many requests came before it.
    pub(crate) number: usize,
}

impl Asked {
    /// The `Authorization` header, empty if there is none.
    pub(crate) fn authorization(&self) -> &str {
        self.headers.get(AUTHORIZATION).map_or("", |v| v.to_str().unwrap())
    }
}

/// The answer, and whether it never comes.
type Plan = dyn Fn(&Asked) -> (Reply, bool) + Send + Sync;

/// A policy that waits so little that tests need not notice.
pub(crate) const QUICK: RetryPolicy = RetryPolicy {
    on_demand: 4,
    prefetch: 1,
    base: Duration::from_micros(100),
    cap: Duration::from_micros(100),
    retry_after_cap: Duration::from_millis(1),
};

/// The bytes of an object: no two neighbouring pieces are alike.
pub(crate) fn data(len: u32) -> Vec<u8> {
    (0..len).map(|i| (i * 31 / 7) as u8).collect()
}

/// A server of `data` whose answers are planned; where the plan has none it is a good one.
pub(crate) async fn planned(
    data: Vec<u8>,
    plan: impl Fn(&Asked) -> Option<Reply> + Send + Sync + 'static,
) -> FaultServer {
    FaultServer::start(move |asked| plan(asked).unwrap_or_else(|| Reply::ranged(asked, &data))).await
}

/// The server; gone when dropped.
pub(crate) struct FaultServer {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    connections: Arc<AtomicUsize>,
    accept: tokio::task::JoinHandle<()>,
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl FaultServer {
    /// Answers each request as `plan` says.
    pub(crate) async fn start(plan: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_late(move |asked| (plan(asked), false)).await
    }

    /// Answers each request as `plan` says, or, where it says true, never.
    pub(crate) async fn start_late(plan: impl Fn(&Asked) -> (Reply, bool) + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let plan: Arc<Plan> = Arc::new(plan);
        let (log, count) = (asked.clone(), connections.clone());
        let accept = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let (plan, log) = (plan.clone(), log.clone());
                let service =
                    hyper::service::service_fn(move |request| answer(request, plan.clone(), log.clone()));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(socket), service),
                );
            }
        });
        Self { address, asked, connections, accept }
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> &str {
        &self.address
    }

    /// All requests so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn answer(
    request: Request<Incoming>,
    plan: Arc<Plan>,
    log: Arc<Mutex<Vec<Asked>>>,
) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = io::Error>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let ranges = head.headers.get(RANGE).and_then(|value| {
        let list = value.to_str().ok()?.strip_prefix("bytes=")?.split(',');
        list.map(|range| {
            let (first, last) = range.split_once('-')?;
            Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
        })
        .collect::<Option<Vec<_>>>()
    });
    let ranges = ranges.unwrap_or_default();
    let mut asked = Asked {
        method: head.method,
        path: head.uri.to_string(),
        headers: head.headers,
        range: (ranges.len() == 1).then(|| ranges[0]),
        ranges,
        body,
        number: 0,
    };
    {
        let mut log = log.lock().unwrap();
        asked.number = log.len();
        log.push(asked.clone());
    }
    let (reply, never) = plan(&asked);
    if never {
        std::future::pending::<()>().await;
    }
    Ok(reply.into_response(asked.method == Method::HEAD))
}
