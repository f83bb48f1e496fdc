//! From a range of a file to slices of chunks.

use storage::codec::Codec;
use storage::digest::Digest;
use storage::extent::{ChunkExtent, Cipher, ExpectedDigest, FetchUnit};
use storage::ids::{ByteRange, ChunkIndex};
use storage::read::ReadSlice;

use super::Rafs;
use crate::bootstrap::{Attr, Blob, ChunkRef, FileType, Nid, lies_in_context};
use crate::format::features::{BlobFeatures, ChunkFlags};
use crate::{Error, ErrorKind, Result};

/// What a seek looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekKind {
    /// `SEEK_DATA`: the next byte of data.
    Data,
    /// `SEEK_HOLE`: the next hole. RAFS stores none, so it is the end of the file.
    Hole,
}

impl Rafs {
    /// Appends to `slices` where bytes `offset..offset + len` of file `nid` lie, and
    /// answers how many bytes that is: fewer at the end of the file, 0 behind it.
    ///
    /// The slices are in file order; the sum of their lengths is the answer. On an error
    /// `slices` is as it was.
    ///
    /// # Errors
    /// `NotFound`: no such inode. `WrongType`: not a regular file. `Corrupt`: the blob
    /// context contradicts the bootstrap.
    pub fn read(&self, nid: Nid, offset: u64, len: u32, slices: &mut Vec<ReadSlice>) -> Result<u32> {
        let attr = self.regular(nid)?;
        let end = attr.size.min(offset.saturating_add(len.into()));
        let Some(total) = end.checked_sub(offset).filter(|&n| n > 0) else { return Ok(0) };
        let chunk_size = u64::from(self.bootstrap.summary().chunk_size);
        let before = slices.len();
        let mut at = offset;
        while at < end {
            let position = at / chunk_size;
            let within = at % chunk_size;
            let n = (chunk_size - within).min(end - at);
            match self.file_extent(&attr, position) {
                // Both are below the chunk size.
                Ok((blob, extent)) => {
                    slices.push(ReadSlice { blob, extent, offset: within as u32, len: n as u32 })
                }
                Err(e) => {
                    slices.truncate(before);
                    return Err(e);
                }
            }
            at += n;
        }
        // At most `len`.
        Ok(total as u32)
    }

    /// Visits blob and extent of each chunk of file `nid`, in file order.
    ///
    /// # Errors
    /// Those of [`Rafs::read`]; an error of the visitor ends the visit.
    pub fn file_extents(
        &self,
        nid: Nid,
        visit: &mut dyn FnMut(u32, ChunkExtent) -> Result<()>,
    ) -> Result<()> {
        let attr = self.regular(nid)?;
        let chunk_size = u64::from(self.bootstrap.summary().chunk_size);
        for position in 0..attr.size.div_ceil(chunk_size) {
            let (blob, extent) = self.file_extent(&attr, position)?;
            visit(blob, extent)?;
        }
        Ok(())
    }

    /// Blob and extent of the chunk at `position` of file `nid`; `None` behind the last one.
    ///
    /// # Errors
    /// Those of [`Rafs::read`].
    pub fn file_chunk(&self, nid: Nid, position: u32) -> Result<Option<(u32, ChunkExtent)>> {
        let attr = self.regular(nid)?;
        let start = u64::from(position) * u64::from(self.bootstrap.summary().chunk_size);
        (start < attr.size).then(|| self.file_extent(&attr, position.into())).transpose()
    }

    /// Where a chunk lies and what it must hash to.
    ///
    /// # Errors
    /// `NotFound`: no such blob or chunk, or nothing says where it lies. `Corrupt`: the
    /// blob context is bad.
    pub fn chunk_extent(&self, blob: u32, index: ChunkIndex) -> Result<ChunkExtent> {
        let number = blob as usize;
        let Some(blob_info) = self.bootstrap.blobs().get(number) else {
            return Err(Error::new(ErrorKind::NotFound, format!("blob {blob} is not in the blob table")));
        };
        let Some(record) = self.bootstrap.chunk_info(blob, index) else {
            return self.context_extent(number, blob_info, index, None);
        };
        let digest = ExpectedDigest { algorithm: blob_info.digester, digest: Digest(record.digest) };
        if lies_in_context(record, blob_info) {
            return self.context_extent(number, blob_info, index, Some(digest));
        }
        let compressed = ChunkFlags::from_bits_retain(record.flags.get()).contains(ChunkFlags::COMPRESSED);
        let len = record.uncompressed_size.get();
        Ok(ChunkExtent {
            index,
            unit: FetchUnit {
                compressed: ByteRange::new(
                    record.compressed_offset.get(),
                    record.compressed_size.get().into(),
                )?,
                codec: if compressed { blob_info.codec } else { Codec::None },
                cipher: blob_info.cipher.clone(),
                window: None,
                decoded_len: len,
            },
            offset_in_unit: 0,
            len,
            decoded_offset: record.uncompressed_offset.get(),
            digest: Some(digest),
        })
    }

    /// The next data or hole at or behind `offset`; `None` if `offset` is not inside the
    /// file (`ENXIO`).
    ///
    /// # Errors
    /// `NotFound`: no such inode. `WrongType`: not a regular file.
    pub fn seek(&self, nid: Nid, offset: u64, kind: SeekKind) -> Result<Option<u64>> {
        let size = self.regular(nid)?.size;
        Ok((offset < size).then_some(match kind {
            SeekKind::Data => offset,
            SeekKind::Hole => size,
        }))
    }

    fn regular(&self, nid: Nid) -> Result<Attr> {
        let attr = self.bootstrap.attr(nid)?;
        if attr.file_type != FileType::Regular {
            return Err(Error::new(ErrorKind::WrongType, format!("inode {nid} is not a regular file")));
        }
        Ok(attr)
    }

    /// Extent of the chunk at `position` of a file, checked against the file.
    fn file_extent(&self, attr: &Attr, position: u64) -> Result<(u32, ChunkExtent)> {
        let place = u32::try_from(position).map_err(|_| {
            Error::new(ErrorKind::NotFound, format!("inode {} has no chunk {position}", attr.nid))
        })?;
        let chunk = self.bootstrap.chunk(attr.nid, place)?;
        let chunk_size = u64::from(self.bootstrap.summary().chunk_size);
        let want = (attr.size - position * chunk_size).min(chunk_size);
        let blob = self.bootstrap.blobs().get(chunk.blob as usize);
        let plain_tar = blob.is_some_and(|blob| blob.features.contains(BlobFeatures::TARFS));
        if plain_tar && self.bootstrap.chunk_info(chunk.blob, chunk.index).is_none() {
            // At most the chunk size; the door found it inside the tar.
            return Ok((chunk.blob, tar_extent(&chunk, want as u32)?));
        }
        let extent = self.chunk_extent(chunk.blob, chunk.index)?;
        // The records were checked at the door, entries of a blob context are seen here first.
        if extent.decoded_offset != chunk.decoded_offset || u64::from(extent.len) != want {
            return Err(Error::corrupt(format!(
                "inode {}, chunk {position}: the file wants {want} bytes at {}, the blob context says {} at {}",
                attr.nid, chunk.decoded_offset, extent.len, extent.decoded_offset
            )));
        }
        Ok((chunk.blob, extent))
    }

    fn context_extent(
        &self,
        number: usize,
        blob: &Blob,
        index: ChunkIndex,
        digest: Option<ExpectedDigest>,
    ) -> Result<ChunkExtent> {
        let context = self.contexts.get(number).and_then(Option::as_ref).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("blob {}: nothing says where chunk {index} lies", blob.id),
            )
        })?;
        let entry = context.entry(index)?;
        let (unit, offset_in_unit) = context.unit(&entry)?;
        Ok(ChunkExtent {
            index,
            unit,
            offset_in_unit,
            len: entry.uncompressed_size,
            decoded_offset: entry.uncompressed_offset,
            digest,
        })
    }
}

/// A chunk of a plain tar without a record: it lies in the tar as it is, and nothing vouches for it.
fn tar_extent(chunk: &ChunkRef, len: u32) -> Result<ChunkExtent> {
    Ok(ChunkExtent {
        index: chunk.index,
        unit: FetchUnit {
            compressed: ByteRange::new(chunk.decoded_offset, len.into())?,
            codec: Codec::None,
            cipher: Cipher::None,
            window: None,
            decoded_len: len,
        },
        offset_in_unit: 0,
        len,
        decoded_offset: chunk.decoded_offset,
        digest: None,
    })
}
