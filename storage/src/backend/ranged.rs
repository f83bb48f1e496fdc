//! Ranges over HTTP: which answers are believed, and how a read goes on after a break.
//!
//! Shared by every source that is read with `Range` requests. Invariants: a stream yields
//! exactly its range or ends with an error; a body is believed only where its status and
//! `Content-Range` say it belongs; what a broken connection has brought is kept, and only
//! the rest is asked for again.

use bytes::{Buf as _, Bytes};
use reqwest::StatusCode;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE,
};

use super::http::Answer;
use super::retry::{Attempts, Failure, RetryPolicy};
use super::{ByteStream, ReadContext, Supplier};
use crate::ids::ByteRange;
use crate::{Error, ErrorKind, Result};

/// Where a server ignores `Range`, at most this much is read and thrown away to reach one.
pub(super) const MAX_SKIP: u64 = 64 << 20;
/// A connection that brought this much before it broke counts as progress.
const PROGRESS_SIZE: u64 = 64 << 10;

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

    /// Puts the object's name before a failure.
    fn named(&self, failure: Failure) -> Failure;
}

/// A body whose place in the object is known and right.
pub(super) trait Part: Send + 'static {
    /// The next wanted bytes, never empty and never more than asked for; `None` at the end.
    fn next(
        &mut self,
        context: &ReadContext,
    ) -> impl Future<Output = std::result::Result<Option<Bytes>, Failure>> + Send;
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
    let mut reading = Reading {
        object,
        context: context.clone(),
        rest: range,
        part: None,
        attempts: Attempts::new(retry, context.priority),
        progress: 0,
    };
    if !range.is_empty() {
        reading.connect().await?;
    }
    let stream = futures_util::stream::try_unfold(reading, |mut reading| async move {
        Ok(reading.next().await?.map(|piece| (piece, reading)))
    });
    Ok(ByteStream::new(supplier, stream))
}

/// A range being read.
struct Reading<O: Ranged> {
    object: O,
    context: ReadContext,
    /// What is not yet delivered.
    rest: ByteRange,
    part: Option<O::Part>,
    attempts: Attempts,
    /// Delivered since the last failure.
    progress: u64,
}

impl<O: Ranged> Reading<O> {
    async fn fail(&mut self, failure: Failure) -> Result<()> {
        self.part = None;
        if self.progress >= PROGRESS_SIZE {
            self.attempts.reset();
        }
        self.progress = 0;
        self.attempts.pause(self.object.named(failure), &self.context).await
    }

    /// Holds a part afterwards.
    async fn connect(&mut self) -> Result<()> {
        loop {
            match self.object.ask(self.rest, &self.context).await {
                Ok(part) => {
                    self.part = Some(part);
                    return Ok(());
                }
                Err(failure) => self.fail(failure).await?,
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        while !self.rest.is_empty() {
            let Some(part) = &mut self.part else {
                self.connect().await?;
                continue;
            };
            match part.next(&self.context).await {
                Ok(Some(piece)) => {
                    let len = piece.len() as u64;
                    self.rest = ByteRange::new(self.rest.start() + len, self.rest.len() - len)?;
                    self.progress += len;
                    return Ok(Some(piece));
                }
                // The server sent less than asked for, as it may: the rest is asked for again.
                Ok(None) => self.part = None,
                Err(failure) => self.fail(failure).await?,
            }
        }
        Ok(None)
    }
}

/// The headers that ask for `range`, which is not empty.
pub(super) fn headers(range: ByteRange) -> Result<HeaderMap> {
    let value = HeaderValue::from_str(&format!("bytes={}-{}", range.start(), range.end() - 1))
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
fn parse_content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
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

/// A body that covers the front of the range still wanted.
pub(super) struct Segment {
    answer: Answer,
    /// Bytes to throw away first.
    skip: u64,
    /// Bytes wanted of it after that.
    left: u64,
}

impl Segment {
    /// Checks that `answer` holds the front of `range`; `login` is the name that a login of
    /// its server goes by.
    ///
    /// # Errors
    /// What its status means; `Corrupt`: another range; `OutOfRange`: the object is shorter;
    /// `Unsupported`: encoded, or too far in where the server ignores `Range`.
    pub(super) async fn accept(
        answer: Answer,
        range: ByteRange,
        login: &str,
        context: &ReadContext,
    ) -> std::result::Result<Self, Failure> {
        let refuse =
            |kind, why: String| -> Failure { Error::new(kind, format!("{}: {why}", answer.what())).into() };
        if !matches!(answer.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
            return Err(answer.into_failure(login, context).await);
        }
        if let Some(encoding) =
            answer.header(CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity"))
        {
            return Err(refuse(ErrorKind::Unsupported, format!("the body is encoded as {encoding:?}")));
        }
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
        if range.start() > MAX_SKIP {
            let why =
                format!("the server ignores Range, and byte {} is too far in to skip to", range.start());
            return Err(refuse(ErrorKind::Unsupported, format!("{why}; use a server that supports ranges")));
        }
        Ok(Self { answer, skip: range.start(), left: range.len() })
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
                let why =
                    format!("{}: the body ended {} bytes early", self.answer.what(), self.skip + self.left);
                return Err(Failure::passing(Error::new(ErrorKind::Unavailable, why)));
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
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
