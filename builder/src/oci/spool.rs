//! Blobs that are finished but not yet at their target: temporary files that vanish when dropped.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::Path;

use storage::digest::{Digest, DigestAlgorithm, Hasher};
use tempfile::{NamedTempFile, TempPath};

use crate::{Error, ErrorKind, Result};

/// Name of every temporary file begins so; what a killed process leaves is told by it.
pub const TEMP_PREFIX: &str = ".nydus-image-";

/// Removes what killed processes left in `dir`.
pub fn sweep(dir: &Path) {
    storage::leftovers::sweep(dir, |name| name.starts_with(TEMP_PREFIX.as_bytes()));
}

/// Write buffer of a spool: large enough that a system call moves many small chunks.
const BUFFER: usize = 256 << 10;

/// A blob being written to a temporary file, hashed as it grows.
pub struct Spool {
    out: io::BufWriter<NamedTempFile>,
    hasher: Hasher,
    size: u64,
}

impl Spool {
    /// A new temporary file in `dir`.
    ///
    /// # Errors
    /// `Io`.
    pub fn new_in(dir: &Path) -> Result<Self> {
        let file = tempfile::Builder::new()
            .prefix(TEMP_PREFIX)
            .tempfile_in(dir)
            .map_err(|e| Error::io(format!("temporary file in {}", dir.display()), e))?;
        Ok(Self {
            out: io::BufWriter::with_capacity(BUFFER, file),
            hasher: DigestAlgorithm::Sha256.hasher(),
            size: 0,
        })
    }

    /// Ends the blob.
    ///
    /// # Errors
    /// `Io`: the last bytes could not be written.
    pub fn finish(self) -> Result<SpooledBlob> {
        let file = self.out.into_inner().map_err(|e| Error::io("temporary file", e.into_error()))?;
        let (file, path) = file.into_parts();
        Ok(SpooledBlob { file, path, digest: self.hasher.finish(), size: self.size })
    }
}

impl Write for Spool {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.out.write(buf)?;
        self.hasher.update(&buf[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A finished blob in a temporary file.
#[derive(Debug)]
pub struct SpooledBlob {
    file: File,
    path: TempPath,
    digest: Digest,
    size: u64,
}

impl SpooledBlob {
    /// Adopts a finished temporary file whose digest and size its writer knows.
    pub fn adopt(file: NamedTempFile, digest: Digest, size: u64) -> Self {
        let (file, path) = file.into_parts();
        Self { file, path, digest, size }
    }

    /// A blob of a few bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn from_bytes(dir: &Path, bytes: &[u8]) -> Result<Self> {
        let mut spool = Spool::new_in(dir)?;
        spool.write_all(bytes).map_err(|e| Error::io("temporary file", e))?;
        spool.finish()
    }

    /// SHA-256 of the bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Number of bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bytes from the first on, through a descriptor of its own.
    ///
    /// # Errors
    /// `Io`.
    pub fn reader(&self) -> Result<File> {
        let failed = |e| Error::io(format!("temporary file {}", self.path.display()), e);
        let mut file = File::open(&self.path).map_err(failed)?;
        file.rewind().map_err(failed)?;
        Ok(file)
    }

    /// Makes the bytes durable and gives the file its name; an equal one already there is replaced.
    ///
    /// # Errors
    /// `Io`; the temporary file is gone then.
    pub fn persist(self, path: &Path) -> Result<()> {
        self.make_durable()?;
        self.path
            .persist(path)
            .map_err(|e| Error::new(ErrorKind::Io, format!("naming {}", path.display())).with_source(e.error))
    }

    /// Makes the bytes durable and readable by others, still under the temporary name.
    ///
    /// # Errors
    /// `Io`.
    pub fn make_durable(&self) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.file
            .set_permissions(std::fs::Permissions::from_mode(0o644))
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Error::io(format!("temporary file {}", self.path.display()), e))
    }
}
