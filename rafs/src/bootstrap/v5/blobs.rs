//! Blob table and extended blob table: raw entries in, checked [`Blob`]s out.

use storage::extent::Cipher;
use storage::ids::BlobId;
use zerocopy::FromZeros;
use zerocopy::byteorder::little_endian::{U32, U64};

use super::super::bytes::{records, slice};
use super::super::faults::Faults;
use super::super::header::unsupported;
use super::super::{Blob, blob_name, codec_code, digester_code};
use super::header::Header;
use crate::format::blob_table::BlobRecord;
use crate::format::chunk::ChunkInfo;
use crate::format::features::BlobFeatures;
use crate::format::limits;
use crate::format::tar_header;
use crate::format::v5::{ExtendedBlob, MAX_BLOBS};
use crate::{Error, Result};

/// Bytes of an entry before its name.
const ENTRY_SIZE: usize = 8;

/// Kinds of chunk data that v5 has no records for.
const NOT_V5: BlobFeatures = BlobFeatures::ENCRYPTED
    .union(BlobFeatures::BATCH)
    .union(BlobFeatures::ZRAN)
    .union(BlobFeatures::SEPARATE)
    .union(BlobFeatures::TARFS)
    .union(BlobFeatures::EXTERNAL);

/// A blob, and whether the image says how large it is.
#[derive(Debug)]
pub struct Described {
    /// The blob; sizes and chunks are 0 if the image does not say.
    pub blob: Blob,
    /// False in images of very old tools: only the chunk records tell.
    pub sized: bool,
}

/// Reads and checks both tables. `inlined` is the name of the blob that holds this bootstrap.
///
/// # Errors
/// `Unsupported`: chunk data of a kind that v5 does not have. `Corrupt`: a broken rule.
pub fn parse(
    bytes: &[u8],
    header: &Header,
    inlined: Option<&BlobId>,
    faults: &mut Faults,
) -> Result<Vec<Described>> {
    let (offset, size) = header.blob_table;
    let mut rest = slice(bytes, offset, size, "blob table")?;
    let (offset, rows) = header.extended;
    let extended: &[ExtendedBlob] = records(bytes, offset, rows, "extended blob table")?;
    let mut blobs: Vec<Described> = Vec::new();
    while rest.len() > ENTRY_SIZE {
        let index = blobs.len();
        let (prefetch, name) = rest.split_at(ENTRY_SIZE);
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        rest = name.get(end + 1..).unwrap_or_default();
        if index == MAX_BLOBS {
            return Err(Error::corrupt(format!("more than {MAX_BLOBS} blobs")));
        }
        let row = match extended.get(index) {
            Some(row) => Some(row),
            None if extended.is_empty() => None,
            None => {
                return Err(Error::corrupt(format!("{rows} rows of the extended blob table are too few")));
            }
        };
        let id = blob_name(&name[..end], inlined);
        let blob = id
            .and_then(|id| describe(id, index as u32, row, header))
            .map_err(|e| e.context(format_args!("blob {index}")))?;
        if blobs.iter().any(|b| b.blob.id == blob.blob.id) {
            return Err(Error::corrupt(format!("blob {index}: {} is listed twice", blob.blob.id)));
        }
        faults.require(prefetch[..4] == [0; 4], || format!("blob {index}: prefetch offset is not 0"))?;
        blobs.push(blob);
    }
    faults.require(extended.len() <= blobs.len(), || {
        format!("{rows} rows of the extended blob table for {} blobs", blobs.len())
    })?;
    Ok(blobs)
}

/// The checked form of one blob, its record filled as far as v5 says.
fn describe(id: BlobId, index: u32, row: Option<&ExtendedBlob>, header: &Header) -> Result<Described> {
    let summary = &header.summary;
    let sized = row.is_some_and(|row| row.chunk_count.get() != 0);
    // Unknown bits mean nothing here, the reference reader passes over them.
    let features = BlobFeatures::from_bits_truncate(row.map_or(0, |row| row.features.get()));
    if features.intersects(NOT_V5) {
        return Err(unsupported(&format!("RAFS v5 (blob features {:#x})", features.bits())));
    }
    let mut record = BlobRecord::new_zeroed();
    record.blob_id[..id.as_str().len()].copy_from_slice(id.as_str().as_bytes());
    record.blob_index = U32::new(index);
    record.chunk_size = U32::new(summary.chunk_size);
    record.compression_algo = U32::new(codec_code(summary.codec));
    record.digest_algo = U32::new(digester_code(summary.digester));
    record.features = U32::new(features.bits());
    let mut blob = Blob {
        id,
        chunk_count: 0,
        codec: summary.codec,
        digester: summary.digester,
        features: features & !BlobFeatures::INTERNAL_V5,
        compressed_size: 0,
        data_size: 0,
        decoded_size: 0,
        flat_offset: None,
        unverified_chunks: 0,
        context_id: None,
        cipher: Cipher::None,
        record,
    };
    if let Some(row) = row.filter(|_| sized) {
        let tar_header = features.contains(BlobFeatures::CAP_TAR_TOC | BlobFeatures::HAS_TAR_HEADER);
        let data =
            row.compressed_size.get().checked_sub(if tar_header { tar_header::SIZE as u64 } else { 0 });
        let data = data.ok_or_else(|| {
            Error::corrupt(format!(
                "{}: {} bytes have no room for a tar header",
                blob.id, row.compressed_size
            ))
        })?;
        set_sizes(
            &mut blob,
            row.chunk_count.get(),
            row.compressed_size.get(),
            data,
            row.uncompressed_size.get(),
        )?;
    }
    Ok(Described { blob, sized })
}

/// Puts checked sizes in `blob` and its record.
fn set_sizes(blob: &mut Blob, chunks: u32, stored: u64, data: u64, decoded: u64) -> Result<()> {
    let count = u64::from(chunks);
    let chunk_size = u64::from(blob.record.chunk_size.get());
    let fits = chunks <= 1 << 24
        && stored <= limits::MAX_BLOB_COMPRESSED
        && data >= count
        && decoded <= limits::MAX_BLOB_DECODED
        && (count..=count * chunk_size).contains(&decoded);
    if !fits {
        return Err(Error::corrupt(format!(
            "{}: {stored} bytes stored, {decoded} decoded, {chunks} chunks of {chunk_size:#x} do not fit each other",
            blob.id
        )));
    }
    (blob.chunk_count, blob.compressed_size, blob.data_size, blob.decoded_size) =
        (chunks, stored, data, decoded);
    blob.record.chunk_count = U32::new(chunks);
    blob.record.compressed_size = U64::new(stored);
    blob.record.uncompressed_size = U64::new(decoded);
    Ok(())
}

/// What chunk records say of the blobs that the image does not describe.
#[derive(Debug, Default)]
pub struct Derived(Vec<(u32, u64, u64)>);

impl Derived {
    /// Room for `blobs` blobs.
    pub fn new(blobs: usize) -> Self {
        Self(vec![(0, 0, 0); blobs])
    }

    /// Takes a chunk record into account; one of no blob is passed over.
    pub fn add(&mut self, chunk: &ChunkInfo) {
        let Some((chunks, stored, decoded)) = self.0.get_mut(chunk.blob_index.get() as usize) else { return };
        *chunks = (*chunks).max(chunk.index.get().saturating_add(1));
        let end = |start: U64, len: U32| start.get().saturating_add(len.get().into());
        *stored = (*stored).max(end(chunk.compressed_offset, chunk.compressed_size));
        *decoded = (*decoded).max(end(chunk.uncompressed_offset, chunk.uncompressed_size));
    }

    /// Completes the blobs. One that no chunk record names keeps no chunks.
    ///
    /// # Errors
    /// `Corrupt`: what the records say can not be, or the image claims too many chunks.
    pub fn complete(self, blobs: Vec<Described>) -> Result<Vec<Blob>> {
        let mut complete = Vec::with_capacity(blobs.len());
        for (Described { mut blob, sized }, (chunks, stored, decoded)) in blobs.into_iter().zip(self.0) {
            if !sized && chunks != 0 {
                set_sizes(&mut blob, chunks, stored, stored, decoded)?;
            }
            complete.push(blob);
        }
        let chunks: u64 = complete.iter().map(|blob| u64::from(blob.chunk_count)).sum();
        if chunks > limits::MAX_IMAGE_CHUNKS {
            return Err(Error::corrupt(format!(
                "{chunks} chunks in all: want at most {}",
                limits::MAX_IMAGE_CHUNKS
            )));
        }
        Ok(complete)
    }
}
