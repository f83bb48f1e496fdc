//! The trace of an image on the node's disk.

use std::io::{ErrorKind, Read as _, Write as _};
use std::path::Path;

use anyhow::Context as _;

use super::Trace;
use super::document::{Document, Identity, MAX_DOCUMENT};

/// The trace at `path`, if there is one that fits the image; else a warning, unless there is
/// no file at all.
pub(super) fn load(path: &Path, identity: &Identity) -> Option<Trace> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return None,
        Err(e) => {
            tracing::warn!("the trace {} can not be read and is ignored: {e}", path.display());
            return None;
        }
    };
    let read = || {
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes)?;
        Document::parse(&bytes)?.trace(identity)
    };
    read().inspect_err(|e| tracing::warn!("the trace {} is ignored: {e:#}", path.display())).ok()
}

/// Replaces the file at `path`, mode 0600. Not made durable: a trace that a power cut takes
/// away is recorded again.
pub(super) fn save(path: &Path, document: &Document) -> anyhow::Result<()> {
    let dir = path.parent().context("no directory")?;
    let mut file = tempfile::Builder::new().prefix(".trace-").tempfile_in(dir)?;
    file.write_all(&document.to_json()?)?;
    file.persist(path)?;
    Ok(())
}
