//! Blobs of an OCI image layout: `blobs/sha256/ID`.

use std::path::PathBuf;
use std::sync::Arc;

use super::localfs::FileBlob;
use super::{Backend, BlobSource};
use crate::Result;
use crate::digest::Digest;
use crate::ids::BlobId;

/// Opens blobs of one OCI image layout.
#[derive(Debug)]
pub struct OciLayoutSource {
    blobs: PathBuf,
}

impl OciLayoutSource {
    /// For the layout in the directory `root`. Does no I/O.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { blobs: root.into().join("blobs/sha256") }
    }
}

impl BlobSource for OciLayoutSource {
    fn kind(&self) -> &'static str {
        "oci-layout"
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        Digest::from_hex(id.as_str()).map_err(|e| e.context("a layout holds only blobs named by SHA-256"))?;
        Ok(Arc::new(FileBlob::new(vec![self.blobs.join(id.as_str())])))
    }
}
