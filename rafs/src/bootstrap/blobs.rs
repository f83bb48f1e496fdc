//! The blob table: raw records in, checked [`Blob`]s out.

use std::sync::Arc;

use storage::cipher::XtsKey;
use storage::codec::Codec;
use storage::digest::{Digest, DigestAlgorithm};
use storage::extent::Cipher;
use storage::ids::BlobId;

use super::Blob;
use super::bytes::records;
use super::faults::Faults;
use super::header::{Header, unsupported};
use crate::format::blob_context::HEADER_SIZE;
use crate::format::blob_table::{BlobRecord, compression, digest};
use crate::format::features::{BlobFeatures, ImageFlags};
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
/// `Unsupported`: kinds of blobs that are not known here, by name.
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
    let block_size = u64::from(header.summary.block_size);
    let mut blobs: Vec<Blob> = Vec::with_capacity(table.len());
    let mut mapped: Vec<(u64, u64)> = Vec::with_capacity(table.len());
    for (index, (record, slot)) in table.iter().zip(slots).enumerate() {
        let name = |e: Error| e.context(format_args!("blob {index}"));
        let mut blob =
            Blob::from_record(record, index as u32, header.summary.chunk_size, inlined).map_err(name)?;
        let tarfs = header.summary.flags.contains(ImageFlags::TARFS_MODE);
        if blob.features.contains(BlobFeatures::TARFS) != tarfs {
            return Err(Error::corrupt(format!(
                "blob {index}: image and blob disagree whether it is a plain tar"
            )));
        }
        faults.require(slot.tag == record.blob_id, || {
            format!("device slot {index} and blob record {index} name different blobs")
        })?;
        let blocks = u64::from(slot.blocks.get());
        faults.require(blocks * block_size == blob.decoded_size, || {
            format!("device slot {index}: {blocks} blocks, the blob record says {} bytes", blob.decoded_size)
        })?;
        if blobs.iter().any(|b| b.id == blob.id) {
            return Err(Error::corrupt(format!("blob {index}: {} is listed twice", blob.id)));
        }
        let start = u64::from(slot.mapped_blkaddr.get());
        mapped.push((start, start + blocks));
        blob.flat_offset = Some(start * block_size);
        blobs.push(blob);
    }
    let chunks: u64 = blobs.iter().map(|blob| u64::from(blob.chunk_count)).sum();
    faults.require(chunks <= limits::MAX_IMAGE_CHUNKS, || {
        format!("{chunks} chunks in all: want at most {}", limits::MAX_IMAGE_CHUNKS)
    })?;
    // On a flat device these ranges follow the bootstrap; inside it they would redirect
    // the kernel's reads of metadata to blob data.
    mapped.sort_unstable();
    let first_free = bytes.len() as u64 / block_size;
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
    /// True if the blob context must be at hand before the first read: only it knows batch units and
    /// slices of gzip files, and chunks without a record.
    pub fn needs_context(&self) -> bool {
        self.features.intersects(BlobFeatures::BATCH | BlobFeatures::ZRAN)
            || self.unverified_chunks > 0 && !self.features.contains(BlobFeatures::TARFS)
    }

    /// True if what the context array decodes to has more than entries.
    pub(crate) fn has_units(&self) -> bool {
        self.features.intersects(BlobFeatures::BATCH | BlobFeatures::ZRAN)
    }

    /// True if the blob has a context at all: blobs of RAFS v5 images have none.
    pub fn has_context(&self) -> bool {
        self.record.ci_uncompressed_size.get() != 0
    }

    /// Checks `record`, row `index` of a table of an image with `chunk_size`.
    ///
    /// `inlined` replaces the placeholder name of a bootstrap that lies in its own blob.
    ///
    /// # Errors
    /// `Unsupported`: a kind of blob that is not known here, by name. `Corrupt`: a broken rule.
    pub fn from_record(
        record: &BlobRecord,
        index: u32,
        chunk_size: u32,
        inlined: Option<&BlobId>,
    ) -> Result<Self> {
        let features = BlobFeatures::from_bits_retain(record.features.get());
        refuse_unsupported(features)?;
        let id = blob_id(record, inlined)?;
        let cipher = cipher(record, features).map_err(|e| e.context(&id))?;
        let separate = features.contains(BlobFeatures::SEPARATE);
        let fail = |why: String| Err(Error::corrupt(format!("{id}: {why}")));
        if features.contains(BlobFeatures::INTERNAL_V5) {
            return fail("a feature bit of the reader's memory is set on disk".into());
        }
        let tarfs = features.contains(BlobFeatures::TARFS);
        if features.contains(BlobFeatures::ALIGNED) == tarfs {
            return fail("chunks of tarfs, and only these, are not aligned to 4 KiB".into());
        }
        if record.blob_index.get() != index {
            return fail(format!("record {index} claims to be record {}", record.blob_index));
        }
        if record.chunk_size.get() != chunk_size {
            return fail(format!("chunk size {:#x} in an image of {chunk_size:#x}", record.chunk_size));
        }
        let codec = codec(record.compression_algo.get())?;
        if codec == Codec::Gzip && !separate {
            return fail("gzip is for layers that an image refers to".into());
        }
        let digester = digester(record.digest_algo.get())?;
        codec_of_context(record)?;

        let (compressed_size, decoded_size) = (record.compressed_size.get(), record.uncompressed_size.get());
        let chunk_count = record.chunk_count.get();
        let chunks = u64::from(chunk_count);
        if chunks == 0 || chunks > 1 << 24 {
            return fail(format!("{chunks} chunks: want 1 to 2^24"));
        }
        let size_fits = decoded_size <= limits::MAX_BLOB_DECODED
            && match tarfs {
                true => decoded_size.is_multiple_of(TAR_HEADER) && decoded_size == compressed_size,
                false => {
                    decoded_size.is_multiple_of(limits::BLOCK_SIZE)
                        && (chunks * limits::BLOCK_SIZE..=chunks * u64::from(chunk_size))
                            .contains(&decoded_size)
                }
            };
        if !size_fits {
            return fail(format!(
                "decoded size {decoded_size} can not hold {chunks} chunks of {chunk_size:#x}"
            ));
        }
        if !tarfs {
            check_context(record, features, chunks).map_err(|e| e.context(&id))?;
        } else {
            let others = BlobFeatures::ZRAN
                | BlobFeatures::BATCH
                | BlobFeatures::SEPARATE
                | BlobFeatures::CHUNK_INFO_V2;
            let context = [&record.ci_offset, &record.ci_compressed_size, &record.ci_uncompressed_size];
            if codec != Codec::None || cipher != Cipher::None || features.intersects(others) {
                return fail("a plain tar is neither compressed nor encrypted, and has no units".into());
            }
            if context.iter().any(|field| field.get() != 0) {
                return fail("a plain tar with a context".into());
            }
        }
        let ci_offset = record.ci_offset.get();
        let data_size = match (
            !separate && !tarfs && features.contains(BlobFeatures::CAP_TAR_TOC),
            features.contains(BlobFeatures::HAS_TAR_HEADER),
        ) {
            (false, _) => Some(compressed_size),
            (true, true) => ci_offset.checked_sub(TAR_HEADER),
            (true, false) => Some(ci_offset),
        };
        match data_size {
            Some(data_size) if data_size > 0 && compressed_size <= limits::MAX_BLOB_COMPRESSED => Ok(Self {
                context_id: separate.then(|| context_id(record, features, inlined, &id)).flatten(),
                id,
                chunk_count,
                codec,
                digester,
                features,
                compressed_size,
                data_size,
                decoded_size,
                flat_offset: None,
                unverified_chunks: 0,
                cipher,
                record: *record,
            }),
            _ => {
                fail(format!("stored size {compressed_size}, context at {ci_offset}: no room for chunk data"))
            }
        }
    }
}

fn refuse_unsupported(features: BlobFeatures) -> Result<()> {
    if features.contains(BlobFeatures::EXTERNAL) {
        return Err(unsupported("external-blob"));
    }
    if features.bits() & BlobFeatures::INCOMPATIBLE != 0 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("blob features {:#x} hold incompatible bits unknown to this version", features.bits()),
        ));
    }
    Ok(())
}

/// How the units of a blob are encrypted.
fn cipher(record: &BlobRecord, features: BlobFeatures) -> Result<Cipher> {
    match (record.cipher_algo.get(), features.contains(BlobFeatures::ENCRYPTED)) {
        (0, false) => Ok(Cipher::None),
        (1, true) => {
            let mut iv = [0; 16];
            iv[..8].copy_from_slice(&record.blob_meta_size.get().to_le_bytes());
            iv[8..].copy_from_slice(&record.cipher_iv.get().to_le_bytes());
            let key = XtsKey::new(record.blob_meta_digest, iv)
                .map_err(|e| Error::corrupt("both halves of its key are the same").with_source(e))?;
            Ok(Cipher::Aes128Xts(Arc::new(key)))
        }
        (2 | 3, _) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("cipher {}: only AES-128-XTS (1) is supported", record.cipher_algo),
        )),
        (code, _) => Err(Error::corrupt(format!("cipher {code} and feature bits contradict each other"))),
    }
}

/// The blob that holds the context of one whose data is the original layer, `own`: as the record says, else the one
/// that holds this bootstrap, if that was made to be held.
fn context_id(
    record: &BlobRecord,
    features: BlobFeatures,
    inlined: Option<&BlobId>,
    own: &BlobId,
) -> Option<BlobId> {
    if record.blob_meta_digest != [0; 32] {
        return BlobId::new(&Digest(record.blob_meta_digest).to_string()).ok();
    }
    // A file may be called after the layer, and is another blob all the same.
    let holder = inlined.filter(|_| features.contains(BlobFeatures::INLINED_FS_META))?;
    if holder == own {
        BlobId::new(&String::from_utf8_lossy(&limits::INLINED_BLOB_ID)).ok()
    } else {
        Some(holder.clone())
    }
}

/// The name in a record, NUL-padded to 64 bytes.
fn blob_id(record: &BlobRecord, inlined: Option<&BlobId>) -> Result<BlobId> {
    let end = record.blob_id.iter().position(|&b| b == 0).unwrap_or(record.blob_id.len());
    let (name, padding) = record.blob_id.split_at(end);
    if padding.iter().any(|&b| b != 0) {
        return Err(Error::corrupt("the blob id has bytes behind its NUL"));
    }
    blob_name(name, inlined)
}

/// A name as stored; `inlined` replaces the placeholder.
pub fn blob_name(name: &[u8], inlined: Option<&BlobId>) -> Result<BlobId> {
    if name == limits::INLINED_BLOB_ID
        && let Some(id) = inlined
    {
        return Ok(id.clone());
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
    let wide = BlobFeatures::BATCH | BlobFeatures::ZRAN | BlobFeatures::ENCRYPTED;
    if features.intersects(wide) && !v2 {
        return Err(Error::corrupt("batch, zran and encrypted chunks need 24-byte context entries"));
    }
    if features.contains(BlobFeatures::BATCH | BlobFeatures::ZRAN) {
        return Err(Error::corrupt("both batch units and slices of a gzip file"));
    }
    let units = features.intersects(BlobFeatures::BATCH | BlobFeatures::ZRAN);
    let entries = chunks * if v2 { 24 } else { 16 };
    let sized = if units { decoded >= entries } else { decoded == entries };
    if !sized && features.contains(BlobFeatures::IS_CHUNKDICT_GENERATED) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a generated chunk dictionary whose chunks have other numbers than in the blob; make it with this \
             version's `nydus-image chunkdict generate`",
        ));
    }
    if !sized || decoded > limits::MAX_CONTEXT_SIZE || stored > decoded || stored == 0 {
        return Err(Error::corrupt(format!(
            "context of {stored} bytes, {decoded} decoded: want {entries} for {chunks} chunks, at most {}",
            limits::MAX_CONTEXT_SIZE
        )));
    }
    let end = offset.checked_add(stored).and_then(|e| e.checked_add(HEADER_SIZE as u64));
    // The file that holds the context of a separate blob may have an unknown size (0).
    let size = match features.contains(BlobFeatures::SEPARATE) {
        true => Some(record.blob_meta_size.get()).filter(|&size| size > 0).unwrap_or(u64::MAX),
        false => record.compressed_size.get(),
    };
    if end.is_none_or(|end| end > size) {
        return Err(Error::corrupt(format!(
            "context of {stored} bytes at {offset} and its header reach beyond the {size} of the blob"
        )));
    }
    Ok(())
}
