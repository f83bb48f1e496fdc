//! Where the bytes of one blob go: any writer, with the running SHA-256 that names the blob.

use std::fmt;
use std::io::{self, Write};

use storage::digest::{Digest, DigestAlgorithm, Hasher};

use crate::{Error, Result};

/// A blob being written, strictly front to back.
///
/// It never seeks and never looks at what it writes to, so a file, a FIFO, a socket and
/// [`std::io::sink`] serve alike. The digest covers what [`Self::append`] wrote; one section of
/// a blob is left out of its name (rafs-v6 section 8.1) and goes through
/// [`Self::append_unhashed`].
pub struct BlobSink {
    name: String,
    out: Box<dyn Write + Send>,
    sha256: Hasher,
    /// Digest of everything, kept apart from the first unhashed byte on.
    all: Option<Box<Hasher>>,
    start: u64,
    len: u64,
}

impl BlobSink {
    /// A sink over `out`; `name` (a path, usually) is what errors call it.
    pub fn new(name: impl Into<String>, out: impl Write + Send + 'static) -> Self {
        Self {
            name: name.into(),
            out: Box::new(out),
            sha256: DigestAlgorithm::Sha256.hasher(),
            all: None,
            start: 0,
            len: 0,
        }
    }

    /// The same for a blob that is to lie at byte `start` of a larger file: places in it are counted from
    /// that file's beginning.
    #[must_use]
    pub fn lying_at(mut self, start: u64) -> Self {
        (self.start, self.len) = (start, start);
        self
    }

    /// Appends `bytes` and feeds them to the digest.
    ///
    /// # Errors
    /// `Io`: the writer failed (disk full, reader of a FIFO gone).
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.sha256.update(bytes);
        if let Some(all) = &mut self.all {
            all.update(bytes);
        }
        self.put(bytes)
    }

    /// Appends `bytes` without feeding them to the digest.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_unhashed(&mut self, bytes: &[u8]) -> Result<()> {
        let sha256 = &self.sha256;
        self.all.get_or_insert_with(|| Box::new(sha256.clone())).update(bytes);
        self.put(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| {
            Error::io(format!("write blob {} ({} bytes at {})", self.name, bytes.len(), self.len), e)
        })?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Offset of the first byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Offset of the next byte: how many were written, unless the blob lies in a larger file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True before the first byte.
    pub fn is_empty(&self) -> bool {
        self.len == self.start
    }

    /// SHA-256 of everything hashed so far.
    pub fn digest(&self) -> Digest {
        self.sha256.clone().finish()
    }

    /// SHA-256 of everything written so far.
    pub fn file_digest(&self) -> Digest {
        self.all.as_deref().unwrap_or(&self.sha256).clone().finish()
    }

    /// Flushes the writer and gives it back.
    ///
    /// # Errors
    /// `Io`: buffered bytes could not be written.
    pub fn close(mut self) -> Result<Box<dyn Write + Send>> {
        self.out.flush().map_err(|e| Error::io(format!("flush blob {}", self.name), e))?;
        Ok(self.out)
    }
}

/// As [`BlobSink::append`], for encoders.
impl Write for BlobSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.append(bytes).map_err(Error::into_io)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl fmt::Debug for BlobSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobSink").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}
