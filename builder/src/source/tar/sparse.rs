//! The maps of sparse files: GNU's old format and its three ways to say it in pax records.

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::fields;
use super::member::{BLOCK, Members, unsigned};
use super::pax::PaxSparse;
use crate::pipeline::Extent;
use crate::{Error, ErrorKind, Result};

/// Stretches of data in one sparse file.
const MAX_EXTENTS: usize = 1 << 17;

impl<R: Read> Members<R> {
    /// The map of an old GNU sparse file: four entries in the header, 21 in each block after it.
    pub(super) fn gnu_sparse(&mut self, header: &Header) -> Result<(u64, Option<Vec<Extent>>)> {
        let gnu = header.as_gnu().ok_or_else(|| Error::bad_source("a sparse entry without GNU header"))?;
        let size = unsigned(&gnu.realsize, "real size")?;
        let mut extents = Vec::new();
        let mut add = |entries: &[GnuSparseHeader]| -> Result<()> {
            for entry in entries.iter().filter(|e| !e.is_empty()) {
                let offset = unsigned(&entry.offset, "sparse offset")?;
                push_extent(&mut extents, offset, unsigned(&entry.numbytes, "sparse length")?)?;
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.exact(block.as_mut_bytes(), "a sparse map")?;
            add(block.sparse())?;
            more = block.is_extended();
        }
        self.sparse(size, extents)
    }

    /// The map of a pax sparse file: in the records (0.0, 0.1) or in front of the data (1.0).
    pub(super) fn pax_sparse(&mut self, pax: &PaxSparse) -> Result<(u64, Option<Vec<Extent>>)> {
        let map = match (pax.major, pax.minor, &pax.map) {
            (None, None, None) => return Ok((self.left, None)),
            (None | Some(0), None | Some(0 | 1), Some(map)) => map.clone(),
            (Some(1), Some(0), None) => self.sparse_map()?,
            (major, minor, _) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "a sparse file of GNU format {}.{}; known are 0.0, 0.1 and 1.0",
                        major.unwrap_or(0),
                        minor.unwrap_or(0)
                    ),
                ));
            }
        };
        let size = pax.real_size.ok_or_else(|| Error::bad_source("a sparse file without its real size"))?;
        if !map.len().is_multiple_of(2) {
            return Err(Error::bad_source("a sparse map with an offset that has no length"));
        }
        let mut extents = Vec::new();
        for pair in map.chunks_exact(2) {
            push_extent(&mut extents, pair[0], pair[1])?;
        }
        self.sparse(size, extents)
    }

    /// The map in front of the data: decimal numbers, a line each, the count of pairs first,
    /// padded to a block.
    fn sparse_map(&mut self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        let mut wanted = None;
        let mut digits = Vec::new();
        while wanted.is_none_or(|w| numbers.len() < w) {
            let mut block = [0; BLOCK];
            if self.left < BLOCK as u64 {
                return Err(Error::bad_source("a sparse map that is longer than the entry"));
            }
            self.exact(&mut block, "a sparse map")?;
            self.left -= BLOCK as u64;
            for &byte in &block {
                if wanted.is_some_and(|w| numbers.len() == w) {
                    break;
                }
                if byte != b'\n' {
                    digits.push(byte);
                    continue;
                }
                let number =
                    fields::decimal(&digits).ok_or_else(|| Error::bad_source("a malformed sparse map"))?;
                digits.clear();
                match wanted {
                    Some(_) => numbers.push(number),
                    None if number as usize <= MAX_EXTENTS => wanted = Some(number as usize * 2),
                    None => return Err(too_many_extents()),
                }
            }
            if digits.len() > 20 {
                return Err(Error::bad_source("a malformed sparse map"));
            }
        }
        Ok(numbers)
    }

    /// Checks that the extents take just the stored data.
    fn sparse(&self, size: u64, extents: Vec<Extent>) -> Result<(u64, Option<Vec<Extent>>)> {
        let total = extents.iter().try_fold(0u64, |sum, e| sum.checked_add(e.len));
        if total != Some(self.left) {
            return Err(Error::bad_source(format!(
                "its sparse map does not describe the {} bytes that are stored",
                self.left
            )));
        }
        Ok((size, Some(extents)))
    }
}

fn push_extent(extents: &mut Vec<Extent>, offset: u64, len: u64) -> Result<()> {
    if extents.len() >= MAX_EXTENTS {
        return Err(too_many_extents());
    }
    // Readers disagree on whether a stretch starts on a block of its own; this one is the same
    // for all of them.
    if len > 0 && extents.last().is_some_and(|last| !last.len.is_multiple_of(BLOCK as u64)) {
        return Err(Error::bad_source("a sparse file whose data is not cut at multiples of 512 bytes"));
    }
    if len > 0 {
        extents.push(Extent { offset, len });
    }
    Ok(())
}

fn too_many_extents() -> Error {
    Error::limit(format!("a sparse file of more than {MAX_EXTENTS} pieces"))
}
