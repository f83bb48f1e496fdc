//! The only unsafe of this crate: mapping a bootstrap, giving its pages back, and memory that a file backs.

use std::fs::File;
use std::ops::{Deref, DerefMut};

use crate::{Error, Result};

/// A file mapped read-only.
///
/// A mapped file must not shrink: touching a page beyond its end is a SIGBUS. The one
/// caller ([`crate::bootstrap::open`]) maps only files that belong to this user with mode
/// 0600 or stricter: the copies [`crate::bootstrap::adopt`] makes, which are written
/// under a temporary name, renamed and never written again.
#[derive(Debug)]
pub struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// `Io`: the system refuses, or the file is empty.
    pub fn new(file: &File) -> Result<Self> {
        // SAFETY: `map` wants that nobody changes the file while the map lives. Only this
        // user may open the file for writing (checked by the caller on this very
        // descriptor), and this project replaces such files by rename, never in place. A
        // change would still not break Rust's rules here beyond stale bytes: every read
        // of the map goes through checked slices and no reference to a byte is turned
        // into a type with invalid values.
        let map = unsafe { memmap2::Mmap::map(file) }.map_err(|e| Error::io("map the bootstrap", e))?;
        Ok(Self(map))
    }

    /// Gives the resident pages back to the system; the next touch reads them again.
    pub fn release_pages(&self) {
        // SAFETY: DONTNEED discards private changes. The mapping is read-only, so there
        // are none, and the pages come back from the file with the same content.
        let result = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        if let Err(error) = result {
            // Only memory is lost, not an answer.
            tracing::debug!(%error, "could not give the bootstrap's pages back");
        }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A file without a name, mapped, which this process alone can reach.
#[derive(Debug)]
pub struct UnnamedFile(memmap2::MmapMut);

impl UnnamedFile {
    /// A file of `len` zeros in the system's folder for temporary files, all of it allocated: a
    /// full disk is an error here, and not a signal when a page is written.
    ///
    /// # Errors
    /// Those of making, allocating and mapping it.
    pub fn zeroed(len: usize) -> std::io::Result<Self> {
        let file = tempfile::tempfile()?;
        let size = i64::try_from(len).map_err(std::io::Error::other)?;
        nix::fcntl::posix_fallocate(&file, 0, size)?;
        // SAFETY: nobody changes the file beside this map: it has no name, and its only descriptor
        // is closed below.
        Ok(Self(unsafe { memmap2::MmapMut::map_mut(&file) }?))
    }
}

impl Deref for UnnamedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for UnnamedFile {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
