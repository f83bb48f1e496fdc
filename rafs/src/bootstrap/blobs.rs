//! The blob table: raw records in, checked [`Blob`]s out.

use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::BlobId;

use super::Blob;
use super::bytes::records;
use super::faults::Faults;
use super::header::{Header, unsupported};
use crate::format::blob_context::HEADER_SIZE;
use crate::format::blob_table::{BlobRecord, compression, digest};
use crate::format::features::BlobFeatures;
use crate::format::limits;
use crate::format::superblock::{DEVICE_TABLE_OFFSET, DeviceSlot};
use crate::{Error, ErrorKind, Result};

/// Bytes of a reverse tar header between two sections of a blob.
const TAR_HEADER: u64 = 512;

/// Reads and checks the blob table and the device slots.
///
/// `inlined` is the name of the blob that holds this very bootstrap.
///
/// # Errors
/// `Unsupported`: zran, encrypted, tarfs and other blobs not read yet, by name.
/// `Corrupt`: a broken rule (at the door; a check collects those of later blobs too).
pub fn parse(
    bytes: &[u8],
    header: &Header,
    inlined: Option<&BlobId>,
    faults: &mut Faults,
) -> Result<Vec<Blob>> {
    let (offset, count) = header.blob_table;
    let table: &[BlobRecord] = records(bytes, offset, count, "blob table")?;
    let slots: &[DeviceSlot] = records(bytes, DEVICE_TABLE_OFFSET as u64, count, "device table")?;
    let mut blobs: Vec<Blob> = Vec::with_capacity(table.len());
    let mut mapped: Vec<(u64, u64)> = Vec::with_capacity(table.len());
    for (index, (record, slot)) in table.iter().zip(slots).enumerate() {
        let name = |e: Error| e.context(format_args!("blob {index}"));
        let blob =
            Blob::from_record(record, index as u32, header.summary.chunk_size, inlined).map_err(name)?;
        faults.require(slot.tag == record.blob_id, || {
            format!("device slot {index} and blob record {index} name different blobs")
        })?;
        let blocks = u64::from(slot.blocks.get());
        faults.require(blocks * limits::BLOCK_SIZE == blob.decoded_size, || {
            format!("device slot {index}: {blocks} blocks, the blob record says {} bytes", blob.decoded_size)
        })?;
        if blobs.iter().any(|b| b.id == blob.id) {
            return Err(Error::corrupt(format!("blob {index}: {} is listed twice", blob.id)));
        }
        let start = u64::from(slot.mapped_blkaddr.get());
        mapped.push((start, start + blocks));
        blobs.push(blob);
    }
    let chunks: u64 = blobs.iter().map(|blob| u64::from(blob.chunk_count)).sum();
    faults.require(chunks <= limits::MAX_IMAGE_CHUNKS, || {
        format!("{chunks} chunks in all: want at most {}", limits::MAX_IMAGE_CHUNKS)
    })?;
    // On a flat device these ranges follow the bootstrap; inside it they would redirect
    // the kernel's reads of metadata to blob data.
    mapped.sort_unstable();
    let first_free = bytes.len() as u64 / limits::BLOCK_SIZE;
    let mut end = first_free;
    for (start, stop) in mapped {
        faults.require(start >= end && stop <= 1 << 32, || {
            format!(
                "mapped blocks {start}..{stop}: want a range of their own behind block {end} and below 2^32"
            )
        })?;
        end = stop.max(end);
    }
    Ok(blobs)
}

impl Blob {
    /// True if the blob context must be at hand before the first read: the blob holds batch units,
    /// or chunks without a record.
    pub fn needs_context(&self) -> bool {
        self.features.contains(BlobFeatures::BATCH) || self.unverified_chunks > 0
    }

    /// Checks `record`, row `index` of a table of an image with `chunk_size`.
    ///
    /// `inlined` replaces the placeholder name of a bootstrap that lies in its own blob.
    ///
    /// # Errors
    /// `Unsupported`: a kind of blob not read yet, by name. `Corrupt`: a broken rule.
    pub fn from_record(
        record: &BlobRecord,
        index: u32,
        chunk_size: u32,
        inlined: Option<&BlobId>,
    ) -> Result<Self> {
        let features = BlobFeatures::from_bits_retain(record.features.get());
        refuse_unsupported(record, features)?;
        let id = blob_id(record, inlined)?;
        let fail = |why: String| Err(Error::corrupt(format!("{id}: {why}")));
        if features.contains(BlobFeatures::INTERNAL_V5) {
            return fail("a feature bit of the reader's memory is set on disk".into());
        }
        if !features.contains(BlobFeatures::ALIGNED) {
            return fail("chunks are not aligned to 4 KiB".into());
        }
        if record.blob_index.get() != index {
            return fail(format!("record {index} claims to be record {}", record.blob_index));
        }
        if record.chunk_size.get() != chunk_size {
            return fail(format!("chunk size {:#x} in an image of {chunk_size:#x}", record.chunk_size));
        }
        let codec = codec(record.compression_algo.get())?;
        let digester = digester(record.digest_algo.get())?;
        codec_of_context(record)?;

        let (compressed_size, decoded_size) = (record.compressed_size.get(), record.uncompressed_size.get());
        let chunk_count = record.chunk_count.get();
        let chunks = u64::from(chunk_count);
        if chunks == 0 || chunks > 1 << 24 {
            return fail(format!("{chunks} chunks: want 1 to 2^24"));
        }
        let size_fits = decoded_size.is_multiple_of(limits::BLOCK_SIZE)
            && decoded_size <= limits::MAX_BLOB_DECODED
            && (chunks * limits::BLOCK_SIZE..=chunks * u64::from(chunk_size)).contains(&decoded_size);
        if !size_fits {
            return fail(format!(
                "decoded size {decoded_size} can not hold {chunks} chunks of {chunk_size:#x}"
            ));
        }
        check_context(record, features, chunks).map_err(|e| e.context(&id))?;
        let ci_offset = record.ci_offset.get();
        let data_size = match (
            features.contains(BlobFeatures::CAP_TAR_TOC),
            features.contains(BlobFeatures::HAS_TAR_HEADER),
        ) {
            (false, _) => Some(compressed_size),
            (true, true) => ci_offset.checked_sub(TAR_HEADER),
            (true, false) => Some(ci_offset),
        };
        match data_size {
            Some(data_size) if data_size > 0 && compressed_size <= limits::MAX_BLOB_COMPRESSED => Ok(Self {
                id,
                chunk_count,
                codec,
                digester,
                features,
                compressed_size,
                data_size,
                decoded_size,
                unverified_chunks: 0,
                record: *record,
            }),
            _ => {
                fail(format!("stored size {compressed_size}, context at {ci_offset}: no room for chunk data"))
            }
        }
    }
}

fn refuse_unsupported(record: &BlobRecord, features: BlobFeatures) -> Result<()> {
    let kinds = [
        (BlobFeatures::TARFS, "tarfs"),
        (BlobFeatures::ENCRYPTED, "encrypted"),
        (BlobFeatures::ZRAN, "zran (targz-ref)"),
        (BlobFeatures::SEPARATE, "tar reference (tar-ref)"),
        (BlobFeatures::EXTERNAL, "external-blob"),
        (BlobFeatures::IS_CHUNKDICT_GENERATED, "generated chunk dictionary"),
    ];
    if let Some((_, kind)) = kinds.iter().find(|(bit, _)| features.contains(*bit)) {
        return Err(unsupported(kind));
    }
    if record.cipher_algo.get() != 0 {
        return Err(unsupported("encrypted"));
    }
    if record.compression_algo.get() == compression::GZIP {
        return Err(unsupported("gzip reference (estargz)"));
    }
    if features.bits() & BlobFeatures::INCOMPATIBLE != 0 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("blob features {:#x} hold incompatible bits unknown to this version", features.bits()),
        ));
    }
    Ok(())
}

/// The name in a record, NUL-padded to 64 bytes.
fn blob_id(record: &BlobRecord, inlined: Option<&BlobId>) -> Result<BlobId> {
    if record.blob_id == limits::INLINED_BLOB_ID
        && let Some(id) = inlined
    {
        return Ok(id.clone());
    }
    let end = record.blob_id.iter().position(|&b| b == 0).unwrap_or(record.blob_id.len());
    let (name, padding) = record.blob_id.split_at(end);
    if padding.iter().any(|&b| b != 0) {
        return Err(Error::corrupt("the blob id has bytes behind its NUL"));
    }
    std::str::from_utf8(name).ok().and_then(|name| BlobId::new(name).ok()).ok_or_else(|| {
        Error::corrupt(format!(
            "blob id \"{}\": want 1 to 64 characters of [0-9A-Za-z._-] without a leading dot",
            name.escape_ascii()
        ))
    })
}

/// The chunk codec behind a code.
pub fn codec(code: u32) -> Result<Codec> {
    Ok(match code {
        compression::NONE => Codec::None,
        compression::LZ4_BLOCK => Codec::Lz4Block,
        compression::GZIP => Codec::Gzip,
        compression::ZSTD => Codec::Zstd,
        _ => return Err(Error::corrupt(format!("compressor code {code} is unknown"))),
    })
}

/// The code of a chunk codec.
pub fn codec_code(codec: Codec) -> u32 {
    match codec {
        Codec::None => compression::NONE,
        Codec::Lz4Block => compression::LZ4_BLOCK,
        Codec::Gzip => compression::GZIP,
        Codec::Zstd => compression::ZSTD,
    }
}

fn digester(code: u32) -> Result<DigestAlgorithm> {
    Ok(match code {
        digest::BLAKE3 => DigestAlgorithm::Blake3,
        digest::SHA256 => DigestAlgorithm::Sha256,
        _ => return Err(Error::corrupt(format!("digester code {code} is unknown"))),
    })
}

/// The code of a digester, in blob records and in the image root.
pub fn digester_code(digester: DigestAlgorithm) -> u32 {
    match digester {
        DigestAlgorithm::Blake3 => digest::BLAKE3,
        DigestAlgorithm::Sha256 => digest::SHA256,
    }
}

/// Compression of the context array; gzip is never used for it.
pub fn codec_of_context(record: &BlobRecord) -> Result<Codec> {
    match codec(record.ci_compressor.get())? {
        Codec::Gzip => Err(Error::corrupt("the blob context claims to be compressed with gzip")),
        codec => Ok(codec),
    }
}

/// Place and sizes of the context array.
fn check_context(record: &BlobRecord, features: BlobFeatures, chunks: u64) -> Result<()> {
    let (offset, stored, decoded) =
        (record.ci_offset.get(), record.ci_compressed_size.get(), record.ci_uncompressed_size.get());
    let v2 = features.contains(BlobFeatures::CHUNK_INFO_V2);
    let batch = features.contains(BlobFeatures::BATCH);
    if batch && !v2 {
        return Err(Error::corrupt("batch chunks need 24-byte context entries"));
    }
    let entries = chunks * if v2 { 24 } else { 16 };
    let sized = if batch { decoded >= entries } else { decoded == entries };
    if !sized || decoded > limits::MAX_CONTEXT_SIZE || stored > decoded || stored == 0 {
        return Err(Error::corrupt(format!(
            "context of {stored} bytes, {decoded} decoded: want {entries} for {chunks} chunks, at most {}",
            limits::MAX_CONTEXT_SIZE
        )));
    }
    let end = offset.checked_add(stored).and_then(|e| e.checked_add(HEADER_SIZE as u64));
    if end.is_none_or(|end| end > record.compressed_size.get()) {
        return Err(Error::corrupt(format!(
            "context of {stored} bytes at {offset} and its header reach beyond the {} of the blob",
            record.compressed_size
        )));
    }
    Ok(())
}
