//! Bodies that answer several ranges at once (`multipart/byteranges`, RFC 9110 section 14.6).
//!
//! ```text
//!   --B CRLF headers CRLF CRLF bytes  CRLF --B CRLF headers CRLF CRLF bytes  CRLF --B--
//!   └──────── head ─────────┘└─part─┘└──────── head ─────────┘└─part─┘└─── tail ──┘
//! ```
//!
//! Servers are not trusted: a part's bytes are counted by what was asked for, never
//! searched for a boundary, and whatever stands between parts is bounded.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};

use super::ranged::parse_content_range;
use crate::ids::ByteRange;

/// Ranges that one request asks for at most. Every one is below 42 characters, so the header
/// stays below the 4 KiB that all servers and proxies take.
pub const MAX_MANY_RANGES: usize = 96;
/// What stands before a part, boundary and headers together; servers write about 150 bytes.
const MAX_PART_HEAD: usize = 2048;
/// What stands behind the last part: its boundary, and what a server may say after it.
const MAX_TAIL: usize = 2048;
/// Characters of a boundary (RFC 2046).
const MAX_BOUNDARY: usize = 70;

/// The body of a `multipart/byteranges` answer, taken apart as it comes.
///
/// Feed pieces with [`Multipart::feed`] and take bytes with [`Multipart::take`] until it
/// wants more.
#[derive(Debug)]
pub(super) struct Multipart {
    /// `--` and the boundary.
    delimiter: Vec<u8>,
    /// Parts whose head is still to come.
    ranges: VecDeque<ByteRange>,
    /// Bytes of the present part still to come.
    left: u64,
    /// What came and is not looked at yet.
    piece: Bytes,
    /// The head so far, or the tail.
    head: Vec<u8>,
    /// No part has begun.
    first: bool,
}

/// What [`Multipart::take`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Bytes of the ranges, in order, never empty.
    Bytes(Bytes),
    /// Nothing yet: feed the next piece.
    More,
    /// All ranges are complete; what follows is no business of the reader.
    End,
}

/// The body is not what was asked for; why.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation(pub(super) String);

impl Multipart {
    /// For a body with this `Content-Type` that answers `ranges`; `None` if it is no such body.
    pub(super) fn new(content_type: &str, ranges: &[ByteRange]) -> Option<Self> {
        let mut parts = content_type.split(';').map(str::trim);
        if !parts.next()?.eq_ignore_ascii_case("multipart/byteranges") {
            return None;
        }
        let boundary = parts.find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim_end().eq_ignore_ascii_case("boundary").then(|| value.trim_start().trim_matches('"'))
        })?;
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(&b);
        let good = (1..=MAX_BOUNDARY).contains(&boundary.len()) && boundary.bytes().all(fits);
        good.then(|| Self {
            delimiter: format!("--{boundary}").into_bytes(),
            ranges: ranges.iter().copied().collect(),
            left: 0,
            piece: Bytes::new(),
            head: Vec::new(),
            first: true,
        })
    }

    /// Takes in what came next; only after [`Taken::More`].
    pub(super) fn feed(&mut self, piece: Bytes) {
        debug_assert!(self.piece.is_empty());
        self.piece = piece;
    }

    /// Bytes of the ranges still to come.
    pub(super) fn wanted(&self) -> u64 {
        self.ranges.iter().fold(self.left, |sum, range| sum.saturating_add(range.len()))
    }

    /// The next bytes of the ranges.
    ///
    /// # Errors
    /// The body breaks the format, or its next part is another than the next range.
    pub(super) fn take(&mut self) -> Result<Taken, Violation> {
        loop {
            if self.left > 0 {
                if self.piece.is_empty() {
                    return Ok(Taken::More);
                }
                let len =
                    usize::try_from(self.left).map_or(self.piece.len(), |left| left.min(self.piece.len()));
                self.left -= len as u64;
                return Ok(Taken::Bytes(self.piece.split_to(len)));
            }
            let Some(range) = self.ranges.front().copied() else { return Ok(Taken::End) };
            if !self.read_head()? {
                return Ok(Taken::More);
            }
            let found = part_range(&self.head, &self.delimiter, self.first).map_err(Violation)?;
            if found.0 != range.start() || found.1 != range.end() {
                let why = format!("a part holds bytes {}..{}, {range} was to come", found.0, found.1);
                return Err(Violation(why));
            }
            self.head.clear();
            self.first = false;
            self.left = range.len();
            self.ranges.pop_front();
        }
    }

    /// Moves bytes into the head until it is complete.
    fn read_head(&mut self) -> Result<bool, Violation> {
        while !self.head.ends_with(b"\r\n\r\n") {
            if self.head.len() >= MAX_PART_HEAD {
                return Err(Violation(format!("the head of a part is longer than {MAX_PART_HEAD} bytes")));
            }
            if self.piece.is_empty() {
                return Ok(false);
            }
            self.head.push(self.piece.get_u8());
        }
        Ok(true)
    }

    /// After [`Taken::End`]: takes in the rest, so that the connection can be used again.
    /// True while there may be more of it.
    pub(super) fn wants_tail(&mut self) -> bool {
        let piece = std::mem::take(&mut self.piece);
        self.head.extend_from_slice(&piece[..piece.len().min(MAX_TAIL)]);
        self.head.len() < MAX_TAIL
    }
}

/// The range that the head of a part states.
fn part_range(head: &[u8], delimiter: &[u8], first: bool) -> Result<(u64, u64), String> {
    let rest = match head.strip_prefix(b"\r\n") {
        Some(rest) => rest,
        None if first => head,
        None => return Err("a part is longer than its range".to_owned()),
    };
    let rest = rest.strip_prefix(delimiter).ok_or("a part does not begin with the boundary")?;
    if rest.starts_with(b"--") {
        return Err("the body ends before its last part".to_owned());
    }
    let text = std::str::from_utf8(rest).map_err(|_| "the head of a part is not text")?;
    let (blank, headers) = text.split_once("\r\n").ok_or("a boundary without a line's end")?;
    if !blank.trim_matches([' ', '\t']).is_empty() {
        return Err("a part does not begin with the boundary".to_owned());
    }
    let mut found = None;
    for line in headers.split("\r\n").filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').ok_or("a line without a colon in the head of a part")?;
        if name.eq_ignore_ascii_case("content-range") {
            let range =
                parse_content_range(value).ok_or_else(|| format!("Content-Range {value:?} in a part"))?;
            if found.replace(range).is_some() {
                return Err("a part with two Content-Range headers".to_owned());
            }
        } else if name.eq_ignore_ascii_case("content-encoding")
            && !value.trim().eq_ignore_ascii_case("identity")
            || name.eq_ignore_ascii_case("content-transfer-encoding")
                && !value.trim().eq_ignore_ascii_case("binary")
        {
            return Err(format!("a part that is encoded: {}", value.trim()));
        }
    }
    found.map(|(start, end, _)| (start, end)).ok_or_else(|| "a part without Content-Range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, len).unwrap()
    }

    fn asked() -> Vec<ByteRange> {
        vec![range(2, 3), range(10, 1), range(20, 6)]
    }

    /// Takes `body` apart, fed in pieces of `step` bytes.
    fn parse(body: &[u8], step: usize) -> Result<Vec<u8>, Violation> {
        let mut parts = Multipart::new("multipart/byteranges; boundary=B-1", &asked()).unwrap();
        let (mut all, mut pieces) = (Vec::new(), body.chunks(step));
        loop {
            match parts.take()? {
                Taken::Bytes(bytes) => all.extend_from_slice(&bytes),
                Taken::More => match pieces.next() {
                    Some(piece) => parts.feed(Bytes::copy_from_slice(piece)),
                    None => return Err(Violation(format!("{} missing", parts.wanted()))),
                },
                Taken::End => {
                    while parts.wants_tail() {
                        let Some(piece) = pieces.next() else { break };
                        parts.feed(Bytes::copy_from_slice(piece));
                    }
                    return Ok(all);
                }
            }
        }
    }

    const GOOD: &str = "--B-1\r\nContent-Type: x/y\r\nContent-Range: bytes 2-4/99\r\n\r\ncde\
        \r\n--B-1 \r\ncontent-range:bytes 10-10/*\r\n\r\nk\
        \r\n--B-1\r\nContent-Range: bytes 20-25/99\r\nX: --B-1\r\n\r\n\r\n--B-\
        \r\n--B-1--\r\n";

    #[test]
    fn parts_come_apart_wherever_the_pieces_end() {
        for step in 1..GOOD.len() {
            assert_eq!(parse(GOOD.as_bytes(), step).unwrap(), b"cdek\r\n--B-", "{step}");
            assert_eq!(parse(format!("\r\n{GOOD}").as_bytes(), step).unwrap(), b"cdek\r\n--B-");
        }
        assert!(parse(format!("{GOOD}{}", "epilogue".repeat(10_000)).as_bytes(), 999).is_ok());
    }

    #[test]
    fn nothing_but_the_ranges_asked_for_passes() {
        let huge = format!("X: {}\r\nContent-Type", "x".repeat(MAX_PART_HEAD));
        for (from, to) in [
            ("bytes 2-4/99", "bytes 2-3/99"),
            ("bytes 2-4/99", "bytes 2-25/99"),
            ("bytes 2-4/99", "bytes 20-25/99"),
            ("bytes 2-4/99", "bytes 2-4/3"),
            ("bytes 2-4/99", "bytes -4/99"),
            ("cde", "cdef"),
            ("cde", "cd"),
            ("--B-1 \r\n", "--B-1--\r\n"),
            ("--B-1 \r\n", "--B-12\r\n"),
            ("--B-1 \r\n", "--B-1 \r\nContent-Range: bytes 10-10/99\r\n"),
            ("content-range:bytes 10-10/*\r\n", ""),
            ("Content-Type", "Content-Encoding"),
            ("Content-Type", "no colon\r\nContent-Type"),
            ("Content-Type", &huge),
            ("\r\n--B-1--", ""),
        ] {
            let body = GOOD.replacen(from, to, 1);
            assert_ne!(body, GOOD);
            let expected_good = to.is_empty() && from.contains("--B-1--");
            for step in [1, 7, body.len()] {
                assert_eq!(parse(body.as_bytes(), step).is_ok(), expected_good, "{from:?} {to:?} {step}");
            }
        }
        assert_eq!(parse(&GOOD.as_bytes()[..GOOD.len() - 12], 5), Err(Violation("1 missing".to_owned())));
    }

    #[test]
    fn only_boundaries_that_can_be_are_taken() {
        for good in ["multipart/byteranges;boundary=x", "Multipart/Byteranges; a=b; Boundary=\"x:y z\""] {
            assert!(Multipart::new(good, &asked()).is_some(), "{good}");
        }
        let long = format!("multipart/byteranges; boundary={}", "x".repeat(71));
        for bad in
            ["multipart/mixed; boundary=x", "multipart/byteranges", "multipart/byteranges; boundary=", &long]
        {
            assert!(Multipart::new(bad, &asked()).is_none(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_body_yields_more_than_was_asked_for(body in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            if let Ok(bytes) = parse(&body, 13) {
                proptest::prop_assert_eq!(bytes.len(), 10);
            }
        }
    }
}
