//! From a path to a validated bootstrap.

use std::fs::File;
use std::io::{Read, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::BlobId;

use super::Bootstrap;
use super::buffer::Buffer;
use super::bytes::Image;
use super::v5::V5;
use super::v6::V6;
use crate::format::limits::MAX_BOOTSTRAP_SIZE;
use crate::format::v5::is_v5;
use crate::sys::Mapping;
use crate::{Error, ErrorKind, Result};

/// What a bootstrap can not say of itself.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Name of the blob that holds this bootstrap, if it was taken from the end of its own
    /// blob: there it can only store 64 times `x`. Without it that placeholder stays.
    pub inlined_blob_id: Option<BlobId>,
}

/// Opens and validates the bootstrap at `path`.
///
/// A file that belongs to this user with mode 0600 or stricter, as [`adopt`] makes them, is
/// mapped. Any other could be truncated by others while mapped and is read instead.
///
/// # Errors
/// `Io`: the file can not be read. `Unsupported`: an image of a kind not read yet, by name.
/// `Corrupt`: not a bootstrap, or a broken rule of the format.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Bootstrap>> {
    validate(&mut open_source(path)?, options).map_err(|e| e.context(path.display()))
}

/// The bytes of `path`, whatever they are.
///
/// # Errors
/// `Io`, `Invalid`, `Corrupt`: it can not be read, is no regular file, or larger than any bootstrap.
pub fn read(path: &Path) -> Result<Buffer> {
    read_bounded(&mut open_source(path)?).map_err(|e| e.context(path.display()))
}

/// The bootstrap that `file` holds.
fn validate(file: &mut File, options: &OpenOptions) -> Result<Box<dyn Bootstrap>> {
    let image = if is_private(file)? {
        Image::Mapped(Mapping::new(file)?)
    } else {
        Image::Owned(read_bounded(file)?)
    };
    from_image(image, options)
}

/// The reader for the version of `image`.
fn from_image(image: Image, options: &OpenOptions) -> Result<Box<dyn Bootstrap>> {
    if is_v5(&image) {
        return Ok(Box::new(V5::new(image, options)?));
    }
    Ok(Box::new(V6::new(image, options)?))
}

/// Validates a bootstrap that is in memory.
///
/// # Errors
/// As [`open`], without `Io`.
pub fn from_bytes(bytes: impl Into<Buffer>, options: &OpenOptions) -> Result<Box<dyn Bootstrap>> {
    from_image(Image::Owned(bytes.into()), options)
}

/// Copies the bootstrap at `source` into `work_dir` as `<sha256>.boot`, mode 0600, and opens
/// the copy as [`open`] does; answers it with its digest.
///
/// The copy appears under its name only when it is whole and valid; an older one is replaced. If `source` is the copy
/// itself, of `expect` and still private, nothing is written: it is opened where it is, after the same checks.
///
/// # Errors
/// `Mismatch`: its SHA-256 is not `expect`. `Io`: reading or writing failed. `Unsupported`,
/// `Corrupt`: as [`open`]. Each names `source`, and nothing is left behind.
pub fn adopt(source: &Path, work_dir: &Path, expect: Option<Digest>) -> Result<(Box<dyn Bootstrap>, Digest)> {
    let mut from = open_source(source)?;
    let named = |e: Error| e.context(source.display());
    let copied = |digest: Digest| work_dir.join(format!("{digest}.boot"));
    if expect.is_some_and(|digest| copied(digest) == source) && is_private(&from).map_err(named)? {
        return check(source, &mut from, expect);
    }
    let failed = |e| Error::io(format!("copy {} to {}", source.display(), work_dir.display()), e);
    // Temporary files have mode 0600 from the start.
    let mut copy = tempfile::Builder::new().prefix(".boot-").tempfile_in(work_dir).map_err(failed)?;
    let digest = hash(source, &mut from, |piece| copy.write_all(piece).map_err(failed))?;
    check_digest(source, digest, expect)?;
    let file = copy.as_file_mut();
    file.rewind().map_err(failed)?;
    let bootstrap = validate(file, &OpenOptions::default()).map_err(named)?;
    copy.persist(copied(digest)).map_err(|e| failed(e.error))?;
    Ok((bootstrap, digest))
}

/// The same for a file of this user's own in `work_dir` that nobody else uses: it gets the name that the copy would have.
///
/// # Errors
/// As [`adopt`]; the file keeps its name then.
pub fn adopt_own(
    source: &Path,
    work_dir: &Path,
    expect: Option<Digest>,
) -> Result<(Box<dyn Bootstrap>, Digest)> {
    let mut from = open_source(source)?;
    if !is_private(&from).map_err(|e| e.context(source.display()))? {
        return adopt(source, work_dir, expect);
    }
    let (bootstrap, digest) = check(source, &mut from, expect)?;
    let own = work_dir.join(format!("{digest}.boot"));
    let failed = |e| Error::io(format!("rename {} to {}", source.display(), own.display()), e);
    std::fs::rename(source, &own).map_err(failed)?;
    Ok((bootstrap, digest))
}

/// Opens the bootstrap at `source`, which is open as `from`, where it is.
fn check(source: &Path, from: &mut File, expect: Option<Digest>) -> Result<(Box<dyn Bootstrap>, Digest)> {
    let named = |e: Error| e.context(source.display());
    let digest = hash(source, from, |_| Ok(()))?;
    check_digest(source, digest, expect)?;
    from.rewind().map_err(|e| named(Error::io("read", e)))?;
    Ok((validate(from, &OpenOptions::default()).map_err(named)?, digest))
}

fn check_digest(source: &Path, found: Digest, expect: Option<Digest>) -> Result<()> {
    match expect {
        Some(expect) if expect != found => Err(Error::new(
            ErrorKind::Mismatch,
            format!(
                "the bootstrap's SHA-256 is {found}, but {expect} is demanded; mount the image that was \
                 meant, or correct `expect_bootstrap` (read from {})",
                source.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// The SHA-256 of the file `source`, whether or not it is a bootstrap.
///
/// # Errors
/// `Io`, `Invalid`, `Corrupt`: it can not be read, is no regular file, or larger than any bootstrap.
pub fn digest(source: &Path) -> Result<Digest> {
    hash(source, &mut open_source(source)?, |_| Ok(()))
}

/// Reads `source`, which is open as `from`, to its end; what is read goes to `take`, too.
fn hash(source: &Path, from: &mut File, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<Digest> {
    let mut hasher = DigestAlgorithm::Sha256.hasher();
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let n = from.read(&mut buffer).map_err(|e| Error::io(format!("read {}", source.display()), e))?;
        if n == 0 {
            return Ok(hasher.finish());
        }
        total += n as u64;
        check_size(total).map_err(|e| e.context(source.display()))?;
        hasher.update(&buffer[..n]);
        take(&buffer[..n])?;
    }
}

fn open_source(path: &Path) -> Result<File> {
    let failed = |e| Error::io(format!("open bootstrap {}", path.display()), e);
    let file = storage::outside::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("bootstrap {} is not a regular file", path.display()),
        ));
    }
    Ok(file)
}

/// True if nobody but this user (and root) can change the file.
fn is_private(file: &File) -> Result<bool> {
    let metadata = file.metadata().map_err(|e| Error::io("stat", e))?;
    check_size(metadata.len())?;
    let own = metadata.uid() == nix::unistd::geteuid().as_raw();
    Ok(own && metadata.mode() & 0o177 == 0 && metadata.len() > 0)
}

fn check_size(size: u64) -> Result<()> {
    if size > MAX_BOOTSTRAP_SIZE {
        return Err(Error::corrupt(format!("more than {MAX_BOOTSTRAP_SIZE} bytes: not a bootstrap")));
    }
    Ok(())
}

fn read_bounded(file: &mut File) -> Result<Buffer> {
    let len = file.metadata().map_err(|e| Error::io("stat", e))?.len().min(MAX_BOOTSTRAP_SIZE);
    let bytes = Buffer::read(file.take(MAX_BOOTSTRAP_SIZE + 1), len as usize);
    let bytes = bytes.map_err(|e| Error::io("read", e))?;
    check_size(bytes.len() as u64)?;
    Ok(bytes)
}
