//! From a path to a bootstrap, be it a file of its own or inside a blob.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rafs::blob_file::BlobFile;
use rafs::bootstrap::{Bootstrap, Buffer, OpenOptions};
use rafs::format::limits::INLINED_BLOB_ID;
use rafs::format::toc::name;
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::{BlobId, ByteRange};

use crate::source::hashed::Hashed;
use crate::{Error, Result};

/// An image's bootstrap.
pub struct Opened {
    /// The validated tree.
    pub bootstrap: Arc<dyn Bootstrap>,
    /// The blob that holds the bootstrap; its chunks are there too, unless they are in an original layer.
    pub blob: Option<PathBuf>,
    /// What the image calls that blob.
    id: Option<BlobId>,
}

impl Opened {
    /// The blob that holds the bootstrap and has no data, but says where that of an original layer lies: what the
    /// image calls it, and its file.
    pub fn context_holder(&self) -> Option<(BlobId, &Path)> {
        let (Some(file), Some(id), [blob]) = (&self.blob, &self.id, self.bootstrap.blobs()) else {
            return None;
        };
        (blob.context_id.as_ref() == Some(id)).then(|| (id.clone(), file.as_path()))
    }

    /// True if what the blob is called can not be its name.
    fn has_unnamed_holder(&self) -> bool {
        self.bootstrap.blobs().iter().any(|blob| blob.context_id == Some(unstated_id()))
    }
}

/// Opens the bootstrap at `path`: a bootstrap file, or a blob file with its bootstrap inside.
///
/// A blob that holds its own bootstrap can not state its name there: it gets that of the file, up to the first dot,
/// if that is a SHA-256. If it is not, and the image's data is in another blob, it gets its own SHA-256.
///
/// # Errors
/// `Io`, `Invalid`: the file can not be read, or is not a regular one. `Rafs`: it is neither
/// bootstrap nor blob, or breaks a rule of the format.
pub fn open(path: &Path) -> Result<Opened> {
    match inside(path)? {
        Some(bytes) => open_inside(path, bytes),
        None => Ok(open_bare(rafs::bootstrap::open(path, &OpenOptions::default())?)),
    }
}

/// A bootstrap that is in no blob.
pub fn open_bare(bootstrap: Box<dyn Bootstrap>) -> Opened {
    Opened { bootstrap: bootstrap.into(), blob: None, id: None }
}

/// Opens what is [`inside`] the blob at `path`, as [`open`] does.
///
/// # Errors
/// As [`open`].
pub fn open_inside(path: &Path, bytes: Buffer) -> Result<Opened> {
    let opened = open_called(path, bytes, stated_id(path).unwrap_or_else(unstated_id))?;
    if opened.has_unnamed_holder() { open_digested(path) } else { Ok(opened) }
}

/// Opens what is [`inside`] the blob at `path`, for an image that names this blob. It is called `told`, or what its
/// file's name states, or else its SHA-256.
///
/// # Errors
/// As [`open`].
pub fn open_named(path: &Path, bytes: Buffer, told: Option<BlobId>) -> Result<Opened> {
    match told.or_else(|| stated_id(path)) {
        Some(id) => open_called(path, bytes, id),
        None => open_digested(path),
    }
    .and_then(|opened| if opened.has_unnamed_holder() { open_digested(path) } else { Ok(opened) })
}

/// The blob is called its SHA-256.
fn open_digested(path: &Path) -> Result<Opened> {
    let bytes = inside(path)?.ok_or_else(|| Error::bad_source(format!("{} has changed", path.display())))?;
    let failed = |e| Error::io(format!("read {}", path.display()), e);
    let mut file = Hashed::new(storage::outside::open(path).map_err(failed)?, DigestAlgorithm::Sha256);
    std::io::copy(&mut file, &mut std::io::sink()).map_err(failed)?;
    open_called(path, bytes, BlobId::new(&file.finish().0.to_string())?)
}

fn open_called(path: &Path, bytes: Buffer, id: BlobId) -> Result<Opened> {
    let options = OpenOptions { inlined_blob_id: Some(id.clone()) };
    let bootstrap =
        rafs::bootstrap::from_bytes(bytes, &options).map_err(|e| Error::from(e).context(path.display()))?;
    Ok(Opened { bootstrap: bootstrap.into(), blob: Some(path.to_owned()), id: Some(id) })
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

/// The SHA-256 that a file's name states, up to its first dot.
pub fn stated_id(path: &Path) -> Option<BlobId> {
    let name = path.file_name()?.to_str()?.split('.').next()?;
    Digest::from_hex(name).ok().and_then(|_| BlobId::new(name).ok())
}

/// What stands for the name in the format.
fn unstated_id() -> BlobId {
    BlobId::new(&String::from_utf8_lossy(&INLINED_BLOB_ID)).expect("the format's own")
}

fn read_at(file: &File, range: ByteRange) -> rafs::Result<Vec<u8>> {
    // The reader of sections caps what it asks for by the size of the file and of its kind.
    let mut bytes = vec![0; range.len() as usize];
    file.read_exact_at(&mut bytes, range.start())
        .map_err(|e| rafs::Error::io(format!("read bytes {range} of the blob"), e))?;
    Ok(bytes)
}
