//! Ranges over HTTP: which answers are believed, and how a read goes on after a break.
//!
//! Shared by every source that is read with `Range` requests. Several ranges are asked for
//! with one request where the source has that, else one by one. Invariants: a stream yields
//! exactly its ranges or ends with an error; a body is believed only where its status and
//! `Content-Range` say it belongs; what a broken connection has brought is kept, and only
//! the rest is asked for again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::{Buf as _, Bytes};
use reqwest::StatusCode;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue,
    RANGE,
};

use super::http::{Answer, Help};
use super::multipart::{MAX_MANY_RANGES, Multipart, Taken, Violation};
use super::origin::Origin;
use super::retry::{Attempts, Failure, RetryPolicy, with_retries};
use super::{ByteStream, ReadContext, Sender, Supplier};
use crate::ids::ByteRange;
use crate::{Error, ErrorKind, Result};

/// A connection that brought this much before it broke counts as progress.
const PROGRESS_SIZE: u64 = 64 << 10;
/// Where a server ignores `Range` and nothing of what it sends is kept, at most this much is thrown away to reach a
/// range ([`Segment::near`]): small objects are read so, and of a large one each read would transfer half.
const MAX_SKIP: u64 = 4 << 20;

/// An object that can be asked for ranges, one attempt a call.
pub(super) trait Ranged: Clone + Send + Sync + 'static {
    /// What answers such a request.
    type Part: Part;

    /// Asks once for `range`, which is not empty. The part covers its front, at least a byte.
    fn ask(
        &self,
        range: ByteRange,
        context: &ReadContext,
    ) -> impl Future<Output = std::result::Result<Self::Part, Failure>> + Send;

    /// Asks once for several ranges, none of them empty, at most [`MAX_MANY_RANGES`]. `None`:
    /// the source has no such request.
    fn ask_many(
        &self,
        ranges: &[ByteRange],
        context: &ReadContext,
    ) -> impl Future<Output = std::result::Result<Option<Self::Part>, Failure>> + Send {
        let _ = (ranges, context);
        async { Ok(None) }
    }

    /// A request is made again.
    fn retried(&self) {}

    /// Puts the object's name before a failure.
    fn named(&self, failure: Failure) -> Failure;
}

/// A body whose place in the object is known and right.
pub(super) trait Part: Send + 'static {
    /// The next wanted bytes of one range, never empty and never more than asked for; `None`
    /// at the end. It may be called again after the last byte to let the body end well.
    fn next(
        &mut self,
        context: &ReadContext,
    ) -> impl Future<Output = std::result::Result<Option<Bytes>, Failure>> + Send;

    /// Who sends it, if it is another one than usual.
    fn sender(&self) -> Option<Sender> {
        None
    }
}

/// The size of an object, asked for once.
pub(super) async fn size<F: Future<Output = std::result::Result<u64, Failure>>>(
    known: &OnceLock<u64>,
    retry: RetryPolicy,
    context: &ReadContext,
    ask: impl FnMut() -> F,
) -> Result<u64> {
    if let Some(size) = known.get() {
        return Ok(*size);
    }
    let size = with_retries(retry, context, ask).await?;
    Ok(*known.get_or_init(|| size))
}

/// Opens `range` of `object` and goes on after breaks as `retry` says.
///
/// # Errors
/// Those of the first answer, retries used up.
pub(super) async fn open<O: Ranged>(
    object: O,
    supplier: Supplier,
    range: ByteRange,
    retry: RetryPolicy,
    context: &ReadContext,
) -> Result<ByteStream> {
    let mut reading = Reading::new(object, supplier, &[range], retry, context);
    reading.begin().await?;
    Ok(reading.into_stream())
}

/// As [`open`], but several ranges, the bytes of one behind those of the other. `None`: the
/// source has no request for several ranges.
///
/// # Errors
/// As [`open`].
pub(super) async fn open_many<O: Ranged>(
    object: O,
    supplier: Supplier,
    ranges: &[ByteRange],
    retry: RetryPolicy,
    context: &ReadContext,
) -> Result<Option<ByteStream>> {
    let mut reading = Reading::new(object, supplier, ranges, retry, context);
    let answered = reading.begin().await?;
    Ok(answered.then(|| reading.into_stream()))
}

/// As [`open`], for a range whose first part is there already.
pub(super) fn resume<O: Ranged>(
    object: O,
    supplier: Supplier,
    range: ByteRange,
    part: Option<O::Part>,
    retry: RetryPolicy,
    context: &ReadContext,
) -> ByteStream {
    let mut reading = Reading::new(object, supplier, &[range], retry, context);
    reading.part = part;
    reading.into_stream()
}

/// Ranges being read.
struct Reading<O: Ranged> {
    object: O,
    /// The usual sender, and the one of `part`.
    supplier: Supplier,
    sender: Arc<Mutex<Sender>>,
    context: ReadContext,
    /// What is not yet delivered, in order; none is empty.
    ranges: VecDeque<ByteRange>,
    /// Ask for several ranges at once.
    many: bool,
    part: Option<O::Part>,
    attempts: Attempts,
    /// Delivered since the last failure.
    progress: u64,
}

impl<O: Ranged> Reading<O> {
    fn new(
        object: O,
        supplier: Supplier,
        ranges: &[ByteRange],
        retry: RetryPolicy,
        context: &ReadContext,
    ) -> Self {
        let ranges: VecDeque<_> = ranges.iter().copied().filter(|range| !range.is_empty()).collect();
        Self {
            object,
            supplier,
            sender: Arc::new(Mutex::new(supplier.into())),
            context: context.clone(),
            many: ranges.len() > 1,
            ranges,
            part: None,
            attempts: Attempts::new(retry, context.priority),
            progress: 0,
        }
    }

    async fn fail(&mut self, failure: Failure) -> Result<()> {
        self.part = None;
        if self.progress >= PROGRESS_SIZE {
            self.attempts.reset();
        }
        self.progress = 0;
        self.attempts.pause(self.object.named(failure), &self.context).await?;
        self.object.retried();
        Ok(())
    }

    /// Awaits the first answer. False: several ranges are wanted, and the source has no request
    /// for that; nothing was delivered.
    async fn begin(&mut self) -> Result<bool> {
        if self.ranges.is_empty() {
            return Ok(true);
        }
        let many = self.many;
        self.connect().await?;
        Ok(self.many == many)
    }

    /// Holds a part afterwards, unless the source turned out not to take several ranges.
    async fn connect(&mut self) -> Result<()> {
        loop {
            let ranges = &*self.ranges.make_contiguous();
            let asked = match ranges {
                [_, _, ..] if self.many => {
                    let ranges = &ranges[..ranges.len().min(MAX_MANY_RANGES)];
                    self.object.ask_many(ranges, &self.context).await
                }
                [first, ..] => self.object.ask(*first, &self.context).await.map(Some),
                [] => return Ok(()),
            };
            match asked {
                Ok(Some(part)) => {
                    let sender = part.sender().unwrap_or_else(|| self.supplier.into());
                    *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = sender;
                    self.part = Some(part);
                    return Ok(());
                }
                Ok(None) => {
                    self.many = false;
                    return Ok(());
                }
                Err(failure) => self.fail(failure).await?,
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        while let Some(rest) = self.ranges.front().copied() {
            let Some(part) = &mut self.part else {
                self.connect().await?;
                continue;
            };
            match part.next(&self.context).await {
                Ok(Some(piece)) => {
                    let len = piece.len() as u64;
                    let left = ByteRange::new(rest.start() + len, rest.len() - len)?;
                    match self.ranges.front_mut() {
                        Some(front) if !left.is_empty() => *front = left,
                        _ => drop(self.ranges.pop_front()),
                    }
                    self.progress += len;
                    return Ok(Some(piece));
                }
                // The server sent less than asked for, as it may, or other parts than asked
                // for: the rest is asked for again.
                Ok(None) => self.part = None,
                Err(failure) => self.fail(failure).await?,
            }
        }
        // All is there: what goes wrong from here on costs a kept connection, no bytes.
        if let Some(mut part) = self.part.take() {
            let _ = part.next(&self.context).await;
        }
        Ok(None)
    }

    /// The bytes, still to be awaited.
    fn into_stream(self) -> ByteStream {
        let sender = Arc::clone(&self.sender);
        let stream = futures_util::stream::try_unfold(self, |mut reading| async move {
            Ok(reading.next().await?.map(|piece| (piece, reading)))
        });
        ByteStream::changing(sender, stream)
    }
}

/// The headers that ask for `ranges`, none of them empty, at most [`MAX_MANY_RANGES`].
pub(super) fn headers(ranges: &[ByteRange]) -> Result<HeaderMap> {
    let list: Vec<_> = ranges.iter().map(|range| format!("{}-{}", range.start(), range.end() - 1)).collect();
    let value = HeaderValue::from_str(&format!("bytes={}", list.join(",")))
        .map_err(|e| Error::new(ErrorKind::Invalid, "a Range header").with_source(e))?;
    // A compressed transfer would count other bytes than the blob's.
    let plain = HeaderValue::from_static("identity");
    Ok(HeaderMap::from_iter([(RANGE, value), (ACCEPT_ENCODING, plain)]))
}

/// The size of the whole object, as the answer to a `HEAD`, or to a `GET` of a range, states it.
pub(super) fn total(answer: &Answer) -> Option<u64> {
    match answer.status() {
        StatusCode::PARTIAL_CONTENT => answer.header(CONTENT_RANGE).and_then(parse_content_range)?.2,
        StatusCode::OK => answer.header(CONTENT_LENGTH)?.parse().ok(),
        _ => None,
    }
}

/// `bytes FIRST-LAST/TOTAL` as start, end and size; `None` if it is anything else.
pub(super) fn parse_content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse::<u64>().ok()?),
    };
    let end = last.checked_add(1)?;
    (first < end && total.is_none_or(|total| end <= total)).then_some((first, end, total))
}

/// Refuses a body whose bytes are not the object's.
fn check_encoding(answer: &Answer) -> Result<()> {
    match answer.header(CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity")) {
        None => Ok(()),
        Some(encoding) => {
            let why = format!("{}: the body is encoded as {encoding:?}", answer.what());
            Err(Error::new(ErrorKind::Unsupported, why))
        }
    }
}

fn ended_early(answer: &mut Answer, missing: u64) -> Failure {
    let why = format!("{}: the body ended {missing} bytes early", answer.what());
    answer.broke(why.clone());
    Failure::passing(Error::new(ErrorKind::Unavailable, why))
}

/// A body that covers the front of the range still wanted.
pub(super) struct Segment {
    answer: Answer,
    /// Bytes to throw away first.
    skip: u64,
    /// Bytes wanted of it after that.
    left: u64,
}

impl Segment {
    /// Checks that `answer` holds the front of `range`, or the whole object.
    ///
    /// # Errors
    /// What its status means; `Corrupt`: another range; `OutOfRange`: the object is shorter;
    /// `Unsupported`: encoded.
    pub(super) async fn accept<'h>(
        answer: Answer,
        range: ByteRange,
        help: impl Into<Help<'h>>,
        context: &ReadContext,
    ) -> std::result::Result<Self, Failure> {
        let refuse =
            |kind, why: String| -> Failure { Error::new(kind, format!("{}: {why}", answer.what())).into() };
        if !matches!(answer.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
            return Err(answer.into_failure(help, context).await);
        }
        check_encoding(&answer)?;
        let shorter = |size: u64| format!("the blob has {size} bytes, {range} was asked for");
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            let header = answer.header(CONTENT_RANGE).unwrap_or_default();
            let Some((start, end, size)) = parse_content_range(header) else {
                let why = format!("Content-Range {header:?} is not one of bytes");
                return Err(refuse(ErrorKind::Corrupt, why));
            };
            if start != range.start() || end > range.end() {
                let why = format!("Content-Range {header:?} is not the range {range} that was asked for");
                return Err(refuse(ErrorKind::Corrupt, why));
            }
            if let Some(size) = size.filter(|size| *size < range.end()) {
                return Err(refuse(ErrorKind::OutOfRange, shorter(size)));
            }
            return Ok(Self { answer, skip: 0, left: end - start });
        }
        let size = total(&answer);
        if let Some(size) = size.filter(|size| *size < range.end()) {
            return Err(refuse(ErrorKind::OutOfRange, shorter(size)));
        }
        Ok(Self { answer, skip: range.start(), left: range.len() })
    }

    /// The same, for sources that keep nothing of what they skip.
    ///
    /// # Errors
    /// `Unsupported`: the server ignores `Range`, and the range is too far in to skip to.
    pub(super) fn near(self) -> Result<Self> {
        if self.skip <= MAX_SKIP {
            return Ok(self);
        }
        let why = format!("{}: the server ignores Range, and byte {} is", self.answer.what(), self.skip);
        let why = format!("{why} too far in to skip to; use a server that supports ranges");
        Err(Error::new(ErrorKind::Unsupported, why))
    }

    /// True if the server sends more of the object than was asked for.
    pub(super) fn ignores_range(&self) -> bool {
        let more = total(&self.answer).is_some_and(|size| size > self.left);
        self.answer.status() == StatusCode::OK && (self.skip > 0 || more)
    }

    /// The same answer for other bytes of the object that it holds whole.
    pub(super) fn widened(self, range: ByteRange) -> Self {
        Self { skip: range.start(), left: range.len(), ..self }
    }

    /// The answer behind it.
    pub(super) fn answer(&self) -> &Answer {
        &self.answer
    }
}

impl Part for Segment {
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        while self.left > 0 {
            let Some(mut piece) = self.answer.chunk(context).await? else {
                return Err(ended_early(&mut self.answer, self.skip + self.left));
            };
            let skipped = self.skip.min(piece.len() as u64);
            self.skip -= skipped;
            // Both are at most the piece's length.
            piece.advance(skipped as usize);
            piece.truncate(self.left.min(piece.len() as u64) as usize);
            if !piece.is_empty() {
                self.left -= piece.len() as u64;
                return Ok(Some(piece));
            }
        }
        // The end of a body comes once its connection waits for the next request. Without it
        // that request may open another one. The client knows this end, the server can not
        // keep it waiting.
        if self.answer.header(CONTENT_LENGTH).is_some() {
            self.answer.chunk(context).await?;
        }
        Ok(None)
    }
}

/// A body of several ranges, each in a part of its own.
pub(super) struct Parts {
    answer: Answer,
    origin: Arc<Origin>,
    multipart: Multipart,
    /// Read already to find out that the answer is what was asked for.
    first: Option<Bytes>,
}

impl Parts {
    /// Checks that `answer` of `origin` begins with the first of `ranges`; `login` is the name
    /// that a login of its server goes by. `None`: it is something else than parts with these
    /// ranges, and the origin will not be asked for several again.
    ///
    /// # Errors
    /// What its status means; `Unsupported`: encoded.
    pub(super) async fn accept(
        answer: Answer,
        origin: Arc<Origin>,
        ranges: &[ByteRange],
        login: &str,
        context: &ReadContext,
    ) -> std::result::Result<Option<Self>, Failure> {
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => check_encoding(&answer)?,
            // Servers that do not like such a request answer so; what else may be behind it
            // shows when the ranges are asked for one by one.
            StatusCode::OK
            | StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::RANGE_NOT_SATISFIABLE
            | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
            | StatusCode::NOT_IMPLEMENTED => {
                origin.refuses_many(answer.status().as_str());
                return Ok(None);
            }
            _ => return Err(answer.into_failure(login, context).await),
        }
        let Some(multipart) = Multipart::new(answer.header(CONTENT_TYPE).unwrap_or_default(), ranges) else {
            origin.refuses_many("206 without parts");
            return Ok(None);
        };
        let mut parts = Self { answer, origin, multipart, first: None };
        parts.first = parts.next(context).await?;
        Ok(parts.first.is_some().then_some(parts))
    }
}

impl Part for Parts {
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        loop {
            match self.multipart.take() {
                Ok(Taken::Bytes(bytes)) => return Ok(Some(bytes)),
                Ok(Taken::More) => match self.answer.chunk(context).await? {
                    Some(piece) => self.multipart.feed(piece),
                    None => return Err(ended_early(&mut self.answer, self.multipart.wanted())),
                },
                Ok(Taken::End) => {
                    while self.multipart.wants_tail() {
                        match self.answer.chunk(context).await? {
                            Some(piece) => self.multipart.feed(piece),
                            None => break,
                        }
                    }
                    return Ok(None);
                }
                Err(Violation(why)) => {
                    self.origin.refuses_many(&why);
                    return Ok(None);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_bounded() {
        let range = |start, len| ByteRange::new(start, len).unwrap();
        let header = |ranges: &[ByteRange]| headers(ranges).unwrap()[RANGE].clone();
        assert_eq!(header(&[range(2, 3), range(10, 1)]), "bytes=2-4,10-10");
        assert!(header(&[range(u64::MAX - 1, 1); MAX_MANY_RANGES]).len() <= 4096);
    }

    #[test]
    fn content_ranges_are_parsed_strictly() {
        for (value, parsed) in [
            ("bytes 0-9/10", Some((0, 10, Some(10)))),
            ("bytes 5-9/*", Some((5, 10, None))),
            ("bytes 5-4/10", None),
            ("bytes 5-10/10", None),
            ("bytes */10", None),
            ("octets 0-9/10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("", None),
        ] {
            assert_eq!(parse_content_range(value), parsed, "{value}");
        }
    }
}
