//! What carries OpenDAL's requests: our connections, deadlines and judgement of answers.

use std::fmt;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::{BoxStream, try_unfold};
use opendal::{Buffer, HttpBody, HttpTransport};
use reqwest::header::{ACCEPT_ENCODING, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};

use crate::backend::ReadContext;
use crate::backend::http::{Answer, Help, Http};
use crate::backend::ranged::{self, Part as _, Segment};
use crate::backend::retry::Failure;
use crate::ids::ByteRange;
use crate::oci::client::is_redirect;
use crate::{Error, ErrorKind};

/// What to do where the store refuses.
const HELP: Help<'static> = Help::Text(
    "check `access_key_id`, `access_key_secret`, `bucket_name` and `object_prefix`; some stores refuse what is not there",
);

/// Sends requests on behalf of one read.
pub(super) struct Transport {
    http: Http,
    wanted: Option<ByteRange>,
    context: ReadContext,
}

impl Transport {
    /// `wanted` is the range that a request with a `Range` header asks for.
    pub(super) fn new(http: Http, wanted: Option<ByteRange>, context: ReadContext) -> Self {
        Self { http, wanted, context }
    }

    async fn exchange(&self, request: http::Request<Buffer>) -> Result<http::Response<HttpBody>, Failure> {
        let mut request =
            reqwest::Request::try_from(request.map(|body| reqwest::Body::from(body.to_bytes())))
                .map_err(|e| Error::new(ErrorKind::Invalid, "a request to an object store").with_source(e))?;
        let (size_asked, range) =
            (request.method() == Method::HEAD, self.wanted.filter(|_| request.headers().contains_key(RANGE)));
        // The signatures cover neither.
        request.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if size_asked || range.is_some() {
            let answer = self.http.send_hedged(request, &self.context).await?;
            self.check(answer, range).await
        } else {
            // A source of credentials: its answers are OpenDAL's to judge.
            let answer = self.http.send(request, &self.context).await?;
            Ok(respond(&answer.headers().clone(), answer.status(), self.rest(answer)))
        }
    }

    /// An object's answer, if it is the one that was asked for.
    async fn check(
        &self,
        answer: Answer,
        range: Option<ByteRange>,
    ) -> Result<http::Response<HttpBody>, Failure> {
        if is_redirect(answer.status()) {
            let place = answer.header("x-amz-bucket-region").map(|r| format!(" in region {r}"));
            let why = format!("{}: {}; the bucket is elsewhere", answer.what(), answer.status());
            let why = format!("{why}{}: check `endpoint` and `region`", place.unwrap_or_default());
            return Err(Error::new(ErrorKind::Invalid, why).into());
        }
        let (headers, status) = (answer.headers().clone(), answer.status());
        let Some(range) = range else {
            if status != StatusCode::OK {
                return Err(answer.into_failure(HELP, &self.context).await);
            }
            if ranged::total(&answer).is_none() {
                let why = format!("{}: the store tells no size", answer.what());
                return Err(Error::new(ErrorKind::Unsupported, why).into());
            }
            return Ok(respond(&headers, status, futures_util::stream::empty()));
        };
        let segment = Segment::accept(answer, range, HELP, &self.context).await?.near()?;
        Ok(respond(&headers, status, self.pieces(segment, range)))
    }

    /// The bytes of `segment`; a failure where they are fewer than `range`.
    fn pieces(
        &self,
        segment: Segment,
        range: ByteRange,
    ) -> impl Stream<Item = Result<Bytes, Failure>> + use<> {
        let state = (segment, range.len(), self.context.clone());
        try_unfold(state, |(mut segment, left, context)| async move {
            match segment.next(&context).await? {
                Some(piece) => {
                    let left = left.saturating_sub(piece.len() as u64);
                    Ok(Some((piece, (segment, left, context))))
                }
                None if left == 0 => Ok(None),
                None => {
                    let why = format!("{}: {left} bytes fewer than asked for", segment.answer().what());
                    Err(Failure::passing(Error::new(ErrorKind::Unavailable, why)))
                }
            }
        })
    }

    /// The body of `answer`.
    fn rest(&self, answer: Answer) -> impl Stream<Item = Result<Bytes, Failure>> + use<> {
        try_unfold((answer, self.context.clone()), |(mut answer, context)| async move {
            Ok(answer.chunk(&context).await?.map(|piece| (piece, (answer, context))))
        })
    }
}

fn respond(
    headers: &http::HeaderMap,
    status: StatusCode,
    body: impl Stream<Item = Result<Bytes, Failure>> + Send + 'static,
) -> http::Response<HttpBody> {
    let body = futures_util::StreamExt::map(body, |piece| piece.map(Buffer::from).map_err(carry));
    let mut response = http::Response::new(HttpBody::new(Exclusive(Mutex::new(Box::pin(body))), None));
    *response.status_mut() = status;
    response.headers_mut().clone_from(headers);
    response
}

impl HttpTransport for Transport {
    async fn fetch(&self, request: http::Request<Buffer>) -> opendal::Result<http::Response<HttpBody>> {
        self.exchange(request).await.map_err(carry)
    }
}

/// A stream that OpenDAL may share; nobody polls it through a shared reference.
struct Exclusive(Mutex<BoxStream<'static, opendal::Result<Buffer>>>);

impl Stream for Exclusive {
    type Item = opendal::Result<Buffer>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).as_mut().poll_next(context)
    }
}

/// A failure of ours on its way through OpenDAL.
#[derive(Debug)]
struct Carried(Failure);

impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.error.fmt(f)
    }
}

impl std::error::Error for Carried {}

fn carry(failure: Failure) -> opendal::Error {
    let kind = match failure.error.kind() {
        ErrorKind::NotFound => opendal::ErrorKind::NotFound,
        ErrorKind::Denied => opendal::ErrorKind::PermissionDenied,
        _ => opendal::ErrorKind::Unexpected,
    };
    opendal::Error::new(kind, "the transport failed").set_source(Carried(failure))
}

/// The failure behind an error of OpenDAL: ours if there is one, otherwise its meaning.
pub(super) fn failure(error: opendal::Error) -> Failure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(this) = cause {
        if let Some(Carried(Failure { error, passing, retry_after })) = this.downcast_ref() {
            return Failure { error: error.clone(), passing: *passing, retry_after: *retry_after };
        }
        cause = this.source();
    }
    let kind = match error.kind() {
        opendal::ErrorKind::ConfigInvalid => ErrorKind::Invalid,
        opendal::ErrorKind::NotFound => ErrorKind::NotFound,
        opendal::ErrorKind::PermissionDenied => ErrorKind::Denied,
        opendal::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ if error.is_temporary() => ErrorKind::Unavailable,
        _ => ErrorKind::Io,
    };
    Error::new(kind, error.message().to_owned()).with_source(error).into()
}
