//! Blobs in directories of this machine.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::retry::within;
use super::{Backend, BlobSource, ByteStream, ReadContext, Supplier};
use crate::ids::{BlobId, ByteRange};
use crate::{Error, ErrorKind, Result};

/// One piece of a stream: large enough to amortise the switch to a blocking thread.
const PIECE_SIZE: u64 = 1 << 20;

/// The `localfs` backend: a blob is a file named by its id in one of several directories,
/// or one file for any id.
#[derive(Debug)]
pub struct LocalFs {
    dirs: Vec<PathBuf>,
    blob_file: Option<PathBuf>,
}

impl LocalFs {
    /// Looks for a blob in `dir`, then in `alt_dirs`, then takes `blob_file`.
    ///
    /// # Errors
    /// `Invalid`: neither `dir` nor `blob_file`.
    pub fn new(dir: Option<PathBuf>, alt_dirs: Vec<PathBuf>, blob_file: Option<PathBuf>) -> Result<Self> {
        if dir.is_none() && blob_file.is_none() {
            return Err(Error::new(ErrorKind::Invalid, "localfs backend: `dir` or `blob_file` must be set"));
        }
        Ok(Self { dirs: dir.into_iter().chain(alt_dirs).collect(), blob_file })
    }
}

impl BlobSource for LocalFs {
    fn kind(&self) -> &'static str {
        "localfs"
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        let named = self.dirs.iter().map(|dir| dir.join(id.as_str()));
        Ok(Arc::new(FileBlob::new(named.chain(self.blob_file.clone()).collect())))
    }
}

/// A blob in a file, opened at the first read and kept open.
#[derive(Debug)]
pub(super) struct FileBlob {
    /// Where it may be, the best place first; never empty.
    places: Vec<PathBuf>,
    opened: OnceLock<Arc<Opened>>,
}

/// A blob's bytes inside an open file.
#[derive(Debug)]
pub(super) struct Opened {
    /// For messages.
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    /// Where the blob starts.
    pub(super) base: u64,
    /// How long it is; `base + size` does not overflow.
    pub(super) size: u64,
}

impl Opened {
    /// Reads `range` of the blob in pieces.
    ///
    /// # Errors
    /// `OutOfRange`: past the blob's end.
    pub(super) fn stream(self: Arc<Self>, range: ByteRange, context: &ReadContext) -> Result<ByteStream> {
        if range.end() > self.size {
            let why = format!("{}: {} bytes, asked for {range}", self.path.display(), self.size);
            return Err(Error::new(ErrorKind::OutOfRange, why));
        }
        let state = (self, range.start(), context.clone());
        let stream = futures_util::stream::try_unfold(state, move |(opened, at, context)| async move {
            let len = (range.end() - at).min(PIECE_SIZE);
            if len == 0 {
                return Ok(None);
            }
            let source = opened.clone();
            let piece = blocking(&context, "read a blob file", move || {
                // At most PIECE_SIZE, so it fits.
                let mut piece = vec![0; len as usize];
                source
                    .file
                    .read_exact_at(&mut piece, source.base + at)
                    .map_err(|e| Error::io(format!("read {} at {at}", source.path.display()), e))?;
                Ok(Bytes::from(piece))
            })
            .await?;
            Ok(Some((piece, (opened, at + len, context))))
        });
        Ok(ByteStream::new(Supplier::Local, stream))
    }
}

impl FileBlob {
    pub(super) fn new(places: Vec<PathBuf>) -> Self {
        Self { places, opened: OnceLock::new() }
    }

    async fn opened(&self, context: &ReadContext) -> Result<Arc<Opened>> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened.clone());
        }
        let places = self.places.clone();
        let opened = blocking(context, "open a blob file", move || {
            let mut first = None;
            for path in places {
                match open_regular(&path) {
                    Ok((file, size)) => return Ok(Opened { path, file: Arc::new(file), base: 0, size }),
                    Err(e) if e.kind() == ErrorKind::NotFound => first = first.or(Some(e)),
                    Err(e) => return Err(e),
                }
            }
            Err(first.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "a blob without a place")))
        })
        .await?;
        // Another reader may have been first; both opened the same file.
        Ok(self.opened.get_or_init(|| Arc::new(opened)).clone())
    }
}

impl Backend for FileBlob {
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        Box::pin(async { Ok(self.opened(context).await?.size) })
    }

    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        Box::pin(async move { self.opened(context).await?.stream(range, context) })
    }
}

/// Opens a regular file for reading, and tells its size. A fifo in its place does not block.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let what = |e| Error::io(format!("open {}", path.display()), e);
    let file = crate::outside::open(path).map_err(what)?;
    let metadata = file.metadata().map_err(what)?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::Invalid, format!("{}: not a regular file", path.display())));
    }
    Ok((file, metadata.len()))
}

/// Runs `job` where it may block, as long as the context allows.
pub(crate) async fn blocking<T: Send + 'static>(
    context: &ReadContext,
    what: &'static str,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    within(context, what, async {
        tokio::task::spawn_blocking(job).await.map_err(|e| Error::new(ErrorKind::Io, what).with_source(e))?
    })
    .await
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt as _;

    use super::*;

    async fn read(blob: &dyn Backend, start: u64, len: u64) -> Result<Vec<u8>> {
        let context = ReadContext::on_demand(None);
        let stream = blob.open(ByteRange::new(start, len).unwrap(), &context).await?;
        stream
            .try_fold(Vec::new(), |mut all, piece| async move {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    #[tokio::test]
    async fn blobs_are_found_in_order_and_read_exactly() {
        let root = tempfile::tempdir().unwrap();
        let (dir, alt) = (root.path().join("a"), root.path().join("b"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::create_dir(&alt).unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 / 8) as u8).collect();
        std::fs::write(alt.join("x"), &data).unwrap();
        std::fs::write(root.path().join("one"), b"single").unwrap();
        let source = LocalFs::new(Some(dir.clone()), vec![alt], Some(root.path().join("one"))).unwrap();
        let blob = |name| source.blob(&BlobId::new(name).unwrap()).unwrap();

        let x = blob("x");
        assert_eq!(x.size(&ReadContext::on_demand(None)).await.unwrap(), data.len() as u64);
        assert_eq!(read(&*x, 0, data.len() as u64).await.unwrap(), data);
        assert_eq!(read(&*x, 1_048_570, 20).await.unwrap(), &data[1_048_570..1_048_590]);
        assert_eq!(read(&*x, 2_999_999, 2).await.unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(read(&*blob("y"), 0, 6).await.unwrap(), b"single");

        let only_dir = LocalFs::new(Some(dir.clone()), vec![], None).unwrap();
        let missing = only_dir.blob(&BlobId::new("z").unwrap()).unwrap();
        let err = read(&*missing, 0, 1).await.unwrap_err();
        assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("/z"), "{err}");
        std::fs::create_dir(dir.join("d")).unwrap();
        let directory = only_dir.blob(&BlobId::new("d").unwrap()).unwrap();
        assert_eq!(read(&*directory, 0, 1).await.unwrap_err().kind(), ErrorKind::Invalid);
        assert!(LocalFs::new(None, vec![dir], None).is_err());
    }

    #[tokio::test]
    async fn a_file_that_shrinks_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x");
        std::fs::write(&path, b"0123456789").unwrap();
        let blob = FileBlob::new(vec![path.clone()]);
        blob.size(&ReadContext::on_demand(None)).await.unwrap();
        std::fs::write(&path, b"0123").unwrap();
        assert!(read(&blob, 2, 8).await.is_err());
    }
}
