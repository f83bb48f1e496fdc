//! The objects of an image layout, whether it is a directory or one tar file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use storage::digest::{Digest, DigestAlgorithm};

use super::archive::Archive;
use crate::{Error, ErrorKind, Result};

/// A stream of bytes and its length.
pub type Object = (Box<dyn Read + Send>, u64);

/// Read access to named objects.
#[derive(Debug)]
pub enum Objects {
    /// Files below a directory.
    Directory(PathBuf),
    /// Entries of a tar file.
    Archive(Archive),
}

impl Objects {
    /// Objects below directory `path`.
    pub fn directory(path: &Path) -> Self {
        Self::Directory(path.to_owned())
    }

    /// Objects in tar file `path`.
    ///
    /// # Errors
    /// As [`Archive::open`].
    pub fn archive(path: &Path) -> Result<Self> {
        Archive::open(path).map(Self::Archive)
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Archive(archive) => archive.path(),
        }
    }

    /// Opens object `name`, a relative path without `..`.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn open(&self, name: &str) -> Result<Object> {
        match self {
            Self::Directory(root) => {
                let path = root.join(name);
                let failed = |e: io::Error| match e.kind() {
                    io::ErrorKind::NotFound => {
                        Error::new(ErrorKind::NotFound, format!("{}: no such file", path.display()))
                    }
                    _ => Error::io(path.display().to_string(), e),
                };
                let file = File::open(&path).map_err(failed)?;
                let size = file.metadata().map_err(failed)?.len();
                Ok((Box::new(file), size))
            }
            Self::Archive(archive) => {
                let (reader, size) = archive.open_object(name)?;
                Ok((Box::new(reader), size))
            }
        }
    }

    /// Reads the whole of object `name`, refusing more than `cap` bytes.
    ///
    /// # Errors
    /// `NotFound`, `Io`; `Limit`: longer than `cap`.
    pub fn read(&self, name: &str, cap: u64) -> Result<Vec<u8>> {
        let what = || format!("{}: {name}", self.path().display());
        let (reader, size) = self.open(name)?;
        if size > cap {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("{}: {size} bytes, at most {cap} are read of such a file", what()),
            ));
        }
        let mut out = Vec::new();
        reader.take(cap).read_to_end(&mut out).map_err(|e| Error::io(what(), e))?;
        Ok(out)
    }

    /// Opens the blob named `digest`.
    ///
    /// # Errors
    /// As [`Objects::open`].
    pub fn open_blob(&self, digest: &Digest) -> Result<Object> {
        self.open(&blob_name(digest))
    }

    /// Reads and verifies the blob named `digest`.
    ///
    /// # Errors
    /// As [`Objects::read`]; `Mismatch`: the bytes have another digest.
    pub fn read_blob(&self, digest: &Digest, cap: u64) -> Result<Vec<u8>> {
        let bytes = self.read(&blob_name(digest), cap)?;
        let found = DigestAlgorithm::Sha256.digest(&bytes);
        if found != *digest {
            return Err(Error::new(
                ErrorKind::Mismatch,
                format!(
                    "{}: blob sha256:{digest} holds bytes with digest sha256:{found}; the layout is damaged, copy \
                     the image again",
                    self.path().display()
                ),
            ));
        }
        Ok(bytes)
    }
}

/// Path of a blob inside a layout.
pub fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{digest}")
}
