//! An image as one disk: a plain EROFS file system that a kernel mounts without any daemon.
//!
//! ```text
//! | bootstrap | 0 … | decoded blob | 0 … | decoded blob | 0 … | hash tree |
//! 0                 └ where the bootstrap says (mapped_blkaddr)   └ --verity
//! ```

mod verity;

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use rafs::bootstrap::Blob;
use rafs::format::features::BlobFeatures;
use storage::digest::{Digest, DigestAlgorithm};
use storage::extent::ChunkExtent;
use storage::ids::{ByteRange, ChunkIndex};

use crate::image::ImageData;
use crate::{Error, ErrorKind, Result};

pub use verity::Verity;

/// Zeros are left out of the file in steps of this many bytes.
const HOLE: usize = 4096;
/// Bytes of a tar read at once.
const STEP: u64 = 4 << 20;

/// The disk that was written.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// The hash tree behind it.
    pub verity: Option<Verity>,
}

/// Writes the disk of `image`, whose bootstrap is `bootstrap`, to the empty file `disk`.
///
/// Every chunk is verified. Chunks that the image does not use are not written: nothing on the
/// disk leads to them. Runs of zeros are left out of the file.
///
/// # Errors
/// `Io`: the disk is full, or `disk` can not be written at any place. `Mismatch`, `Corrupt`,
/// `Storage`: as [`ImageData::stream`]. `Unsupported`: the format knows no flat disk.
pub fn export(image: &ImageData, bootstrap: &mut File, disk: &File, verity: bool) -> Result<Disk> {
    let tree = image.rafs().bootstrap();
    let summary = tree.summary();
    if summary.fs_version != 6 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("no kernel mounts RAFS v{}: only RAFS v6 images can be exported", summary.fs_version),
        ));
    }
    let block_size = summary.block_size;
    let mut size = copy_bootstrap(bootstrap, disk)?;
    if size != summary.bootstrap_size {
        return Err(Error::bad_source("the bootstrap has changed while it was read"));
    }
    for (number, blob) in (0u32..).zip(tree.blobs()) {
        let named = |e: Error| e.context(format!("blob {}", blob.id));
        let start = blob.flat_offset.ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "this version of the format has no place for blobs on a disk: only RAFS v6 images can be exported",
            )
        })?;
        let end = start.checked_add(blob.decoded_size);
        size = size.max(end.ok_or_else(|| named(Error::limit("it ends beyond every disk")))?);
        if blob.features.contains(BlobFeatures::TARFS) {
            copy_tar(image, number, blob, start, disk).map_err(named)?;
        } else {
            copy_chunks(image, number, blob, start, disk)?;
        }
    }
    disk.set_len(size).map_err(failed)?;
    let verity = if verity { Some(verity::append(disk, size, block_size)?) } else { None };
    Ok(Disk { size, block_size, verity })
}

/// Writes the decoded space of blob `number` of `image` to the empty file `out`: every chunk that the image
/// knows, verified, at its decoded offset. Runs of zeros are left out of the file.
///
/// # Errors
/// As [`export`]; `Corrupt`: there is no such blob.
pub fn decode_blob(image: &ImageData, number: u32, out: &File) -> Result<()> {
    let blob = image.rafs().bootstrap().blobs().get(number as usize);
    let blob = blob.ok_or_else(|| Error::bad_source(format!("there is no blob {number}")))?;
    copy_chunks(image, number, blob, 0, out)?;
    out.set_len(blob.decoded_size).map_err(failed)
}

fn failed(error: std::io::Error) -> Error {
    Error::io("write the disk", error)
}

fn copy_bootstrap(bootstrap: &mut File, disk: &File) -> Result<u64> {
    use std::io::Read as _;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let n = bootstrap.read(&mut buffer).map_err(|e| Error::io("read the bootstrap", e))?;
        if n == 0 {
            return Ok(at);
        }
        disk.write_all_at(&buffer[..n], at).map_err(failed)?;
        at += n as u64;
    }
}

/// Writes the chunks of a blob that the image knows, in stored order.
fn copy_chunks(image: &ImageData, number: u32, blob: &Blob, start: u64, disk: &File) -> Result<()> {
    let known = || Known { image, number, next: 0, count: blob.chunk_count };
    let mut stream = image.stream(known());
    for chunk in known() {
        let (_, extent) = chunk?;
        let bytes = stream.next_chunk()?.ok_or_else(|| Error::bad_source("chunks came short"))?;
        // Inside the decoded space, which the door has checked against the slot.
        write_sparse(disk, &bytes, start + extent.decoded_offset)?;
    }
    Ok(())
}

/// The chunks of a blob that the image knows.
struct Known<'a> {
    image: &'a ImageData,
    number: u32,
    next: u32,
    count: u32,
}

impl Iterator for Known<'_> {
    type Item = Result<(u32, ChunkExtent)>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.count {
            let index = ChunkIndex(self.next);
            self.next += 1;
            match self.image.rafs().chunk_extent(self.number, index) {
                Ok(extent) => return Some(Ok((self.number, extent))),
                Err(e) if e.kind() == rafs::ErrorKind::NotFound => {}
                Err(e) => {
                    self.next = self.count;
                    return Some(Err(e.into()));
                }
            }
        }
        None
    }
}

/// Writes a tar that is a blob as it is. Its name is its digest, so it is compared with that.
fn copy_tar(image: &ImageData, number: u32, blob: &Blob, start: u64, disk: &File) -> Result<()> {
    let named = Digest::from_hex(blob.id.as_str()).map_err(|_| {
        let why = "its id is not the SHA-256 of the tar, so nothing vouches for its data; build it with that as --blob-id";
        Error::new(ErrorKind::Unsupported, why)
    })?;
    let mut hasher = DigestAlgorithm::Sha256.hasher();
    let mut at = 0;
    while at < blob.decoded_size {
        let range = ByteRange::new(at, (blob.decoded_size - at).min(STEP))?;
        let bytes = image.read_stored(number, range)?;
        hasher.update(&bytes);
        write_sparse(disk, &bytes, start + at)?;
        at = range.end();
    }
    let found = hasher.finish();
    if found != named {
        return Err(Error::new(
            ErrorKind::Mismatch,
            format!("its SHA-256 is {found}: another tar, or a damaged one"),
        ));
    }
    Ok(())
}

/// Writes what is not zero.
fn write_sparse(disk: &File, bytes: &[u8], at: u64) -> Result<()> {
    let is_zero = |piece: &[u8]| piece.iter().all(|&b| b == 0);
    let mut from = 0;
    while from < bytes.len() {
        let piece = |n: usize| &bytes[n..bytes.len().min(n + HOLE)];
        if is_zero(piece(from)) {
            from += HOLE;
            continue;
        }
        let mut to = from + HOLE;
        while to < bytes.len() && !is_zero(piece(to)) {
            to += HOLE;
        }
        disk.write_all_at(&bytes[from..to.min(bytes.len())], at + from as u64).map_err(failed)?;
        from = to;
    }
    Ok(())
}
