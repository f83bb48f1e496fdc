//! Names and positions shared by every crate.

use std::fmt;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

/// Name of a data blob: 1 to 64 bytes of `[0-9A-Za-z._-]`, no leading dot.
///
/// Normally the SHA-256 of the blob file in lower-case hex. It becomes a file name
/// and a part of a URL, hence the narrow alphabet. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId(Arc<str>);

impl BlobId {
    /// Longest name a blob table record can hold, in bytes (rafs-v6 blob record).
    pub const MAX_LEN: usize = 64;

    /// Checks `name` and makes an id of it.
    ///
    /// # Errors
    /// `Invalid`: empty, longer than 64 bytes, a leading dot, or a character outside
    /// the alphabet.
    pub fn new(name: &str) -> Result<Self> {
        let ok = !name.is_empty()
            && name.len() <= Self::MAX_LEN
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !ok {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("blob id {name:?}: want 1 to 64 characters of [0-9A-Za-z._-] without a leading dot"),
            ));
        }
        Ok(Self(Arc::from(name)))
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Number of a chunk inside its blob, below 2^24.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkIndex(pub u32);

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A half-open range of bytes, `start <= end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`.
    ///
    /// # Errors
    /// `OutOfRange`: the end does not fit in 64 bits.
    pub fn new(start: u64, len: u64) -> Result<Self> {
        match start.checked_add(len) {
            Some(end) => Ok(Self { start, end }),
            None => Err(Error::new(ErrorKind::OutOfRange, format!("byte range {start}+{len} overflows"))),
        }
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// True for a range of no bytes.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// True if `other` lies within this range.
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blob_ids_are_file_names() {
        let long = "a".repeat(65);
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ä", long.as_str(), "a\0"] {
            assert!(BlobId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "sha256-0f", &"f".repeat(64), "x.y_z-1"] {
            assert_eq!(BlobId::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn ranges_do_not_overflow() {
        assert!(ByteRange::new(u64::MAX, 1).is_err());
        let r = ByteRange::new(10, 5).unwrap();
        assert_eq!((r.start(), r.end(), r.len()), (10, 15, 5));
        assert!(r.contains(ByteRange::new(12, 3).unwrap()));
        assert!(!r.contains(ByteRange::new(12, 4).unwrap()));
    }
}
