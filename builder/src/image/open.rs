//! From a path to a bootstrap, be it a file of its own or inside a blob.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rafs::blob_file::BlobFile;
use rafs::bootstrap::{Bootstrap, Buffer, OpenOptions};
use rafs::format::toc::name;
use storage::ids::{BlobId, ByteRange};

use crate::{Error, Result};

/// An image's bootstrap.
pub struct Opened {
    /// The validated tree.
    pub bootstrap: Arc<dyn Bootstrap>,
    /// The blob that holds the bootstrap; its chunks are there too.
    pub blob: Option<PathBuf>,
}

/// Opens the bootstrap at `path`: a bootstrap file, or a blob file with its bootstrap inside.
///
/// A blob that holds its own bootstrap can not state its name there: it gets that of the file, up
/// to the first dot, if that is a SHA-256.
///
/// # Errors
/// `Io`, `Invalid`: the file can not be read, or is not a regular one. `Rafs`: it is neither
/// bootstrap nor blob, or breaks a rule of the format.
pub fn open(path: &Path) -> Result<Opened> {
    let named = |e: rafs::Error| Error::from(e).context(path.display());
    let Some(bytes) = inside(path)? else {
        let bootstrap = rafs::bootstrap::open(path, &OpenOptions::default())?;
        return Ok(Opened { bootstrap: bootstrap.into(), blob: None });
    };
    let options = OpenOptions { inlined_blob_id: blob_id(path) };
    let bootstrap = rafs::bootstrap::from_bytes(bytes, &options).map_err(named)?;
    Ok(Opened { bootstrap: bootstrap.into(), blob: Some(path.to_owned()) })
}

/// The bootstrap inside the blob at `path`, checked against the blob's table of content; `None`
/// if the file is no such blob.
///
/// # Errors
/// As [`open`].
pub fn inside(path: &Path) -> Result<Option<Buffer>> {
    let failed = |e| Error::io(format!("open {}", path.display()), e);
    let file = storage::outside::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::invalid(format!(
            "{} is not a regular file: want a bootstrap, or a blob that holds one",
            path.display()
        )));
    }
    // What is no blob has no sections; what it is then, its reader says.
    let Ok(blob) = BlobFile::read(metadata.len(), &mut |range| read_at(&file, range)) else {
        return Ok(None);
    };
    if blob.section(name::IMAGE_BOOT).is_none() {
        return Ok(None);
    }
    let bytes = blob.bootstrap(&mut |range| read_at(&file, range));
    bytes.map(Some).map_err(|e| Error::from(e).context(path.display()))
}

/// The id that a blob's file name states.
pub fn blob_id(path: &Path) -> Option<BlobId> {
    let name = path.file_name()?.to_str()?.split('.').next()?;
    storage::digest::Digest::from_hex(name).ok().and_then(|_| BlobId::new(name).ok())
}

fn read_at(file: &File, range: ByteRange) -> rafs::Result<Vec<u8>> {
    // The reader of sections caps what it asks for by the size of the file and of its kind.
    let mut bytes = vec![0; range.len() as usize];
    file.read_exact_at(&mut bytes, range.start())
        .map_err(|e| rafs::Error::io(format!("read bytes {range} of the blob"), e))?;
    Ok(bytes)
}
