//! Checked access to the bytes of a bootstrap.

use std::ops::Deref;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::buffer::Buffer;
use crate::sys::Mapping;
use crate::{Error, Result};

/// The whole bootstrap: a private copy mapped, or bytes in memory.
#[derive(Debug)]
pub enum Image {
    /// A file nobody else can truncate.
    Mapped(Mapping),
    /// Everything else is read.
    Owned(Buffer),
}

impl Image {
    /// After validation: gives back the pages that it touched.
    pub fn release_pages(&self) {
        if let Self::Mapped(mapping) = self {
            mapping.release_pages();
        }
    }
}

impl Deref for Image {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(mapping) => mapping,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// `len` bytes from `offset`; `what` names them in the error.
pub fn slice<'a>(bytes: &'a [u8], offset: u64, len: u64, what: &str) -> Result<&'a [u8]> {
    let range =
        usize::try_from(offset).ok().zip(offset.checked_add(len).and_then(|e| usize::try_from(e).ok()));
    range.and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| {
        Error::corrupt(format!(
            "{what}: {len} bytes at {offset} reach beyond the {} of the file",
            bytes.len()
        ))
    })
}

/// One record at `offset`.
pub fn record<'a, T>(bytes: &'a [u8], offset: u64, what: &str) -> Result<&'a T>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let part = slice(bytes, offset, size_of::<T>() as u64, what)?;
    T::ref_from_bytes(part).map_err(|_| Error::corrupt(format!("{what} at {offset}: wrong size")))
}

/// `count` records from `offset`.
pub fn records<'a, T>(bytes: &'a [u8], offset: u64, count: u64, what: &str) -> Result<&'a [T]>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let len = count
        .checked_mul(size_of::<T>() as u64)
        .ok_or_else(|| Error::corrupt(format!("{what}: {count} records overflow")))?;
    let part = slice(bytes, offset, len, what)?;
    <[T]>::ref_from_bytes(part).map_err(|_| Error::corrupt(format!("{what} at {offset}: wrong size")))
}
