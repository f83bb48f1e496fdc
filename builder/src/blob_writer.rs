//! What follows the chunk data in a blob file.
//!
//! The pipeline streams section 1 into a [`BlobSink`]; then [`BlobWriter`] appends the rest,
//! strictly front to back, so that a FIFO serves as well as a file:
//!
//! ```text
//! 1 chunk data      3 context array    6 chunk digests     8 bootstrap       10 table of content
//! 2 "image.blob"    4 context header   7 "blob.digest"     9 "image.boot"    11 "rafs.blob.toc"
//!                   5 "blob.meta"
//! ```
//!
//! Names are tar headers *behind* what they describe. 2, 5, 7, 9 and 11 exist with an inlined
//! bootstrap or a table of content; 6, 7, 10 and 11 with the latter only; a blob without
//! chunks has 8 to 11 only. The blob's own name covers all but section 6.

use std::io::Write;

use rafs::format::blob_context::{CONTEXT_MAGIC, ContextHeader, Entry, EntryV1};
use rafs::format::blob_table::{BlobRecord, compression, digest};
use rafs::format::features::{BlobFeatures, EntryFlags};
use rafs::format::limits::{INLINED_BLOB_ID, MAX_CHUNKS};
use rafs::format::toc::{self, TocEntry};
use storage::codec::{Codec, Compressor};
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::BlobId;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::bootstrap_writer::padded_id;
use crate::content::ChunkRow;
use crate::sink::BlobSink;
use crate::{Error, Result};

/// What a blob is made with.
#[derive(Clone, Debug)]
pub struct BlobOptions {
    /// Compressor of its chunks.
    pub codec: Codec,
    /// Algorithm of its chunk digests.
    pub digester: DigestAlgorithm,
    /// Chunk size.
    pub chunk_size: u32,
    /// Write the table of content and the chunk digests (`--features blob-toc`).
    pub toc: bool,
    /// The bootstrap comes into the blob (`--blob-inline-meta`).
    pub inline_bootstrap: bool,
    /// A name of the caller's choice in place of the digest.
    pub id: Option<BlobId>,
}

/// A blob whose data and context are written.
pub struct BlobWriter {
    sink: BlobSink,
    options: BlobOptions,
    entries: Vec<TocEntry>,
    record: BlobRecord,
}

/// A complete blob.
pub struct FinishedBlob {
    /// Where it was written, flushed.
    pub out: Box<dyn Write + Send>,
    /// SHA-256 of the file but for its digest section: the name `nydus-image` gives it.
    pub id: Digest,
    /// SHA-256 of the file: the name a registry gives it.
    pub file_digest: Digest,
    /// Bytes of the file.
    pub size: u64,
    /// Its row for the blob table; with an inlined bootstrap the one stored there, under the
    /// placeholder name. Meaningless if it has no chunks.
    pub record: BlobRecord,
}

impl BlobWriter {
    /// Appends what precedes the bootstrap. `sink` holds exactly the data of `chunks`, which
    /// come in the order of their numbers; `decoded_size` is the length of the decoded space.
    ///
    /// # Errors
    /// `Io`: writing failed. `Limit`: too many chunks.
    pub fn new(
        sink: BlobSink,
        options: BlobOptions,
        decoded_size: u64,
        chunks: impl ExactSizeIterator<Item = ChunkRow> + Clone,
    ) -> Result<Self> {
        let mut features = BlobFeatures::ALIGNED | BlobFeatures::CAP_TAR_TOC;
        features.set(BlobFeatures::INLINED_FS_META, options.inline_bootstrap);
        features.set(BlobFeatures::INLINED_CHUNK_DIGEST | BlobFeatures::HAS_TOC, options.toc);
        features.set(BlobFeatures::HAS_TAR_HEADER, options.toc || options.inline_bootstrap);
        let mut record = BlobRecord::new_zeroed();
        record.blob_id = INLINED_BLOB_ID;
        record.chunk_size = U32::new(options.chunk_size);
        record.compression_algo = U32::new(codec_code(options.codec));
        record.digest_algo = U32::new(match options.digester {
            DigestAlgorithm::Blake3 => digest::BLAKE3,
            DigestAlgorithm::Sha256 => digest::SHA256,
        });
        record.features = U32::new(features.bits());
        record.uncompressed_size = U64::new(decoded_size);
        let mut this = Self { sink, options, entries: Vec::new(), record };
        let count = chunks.len();
        if count > MAX_CHUNKS as usize {
            return Err(Error::limit(format!(
                "{count} chunks in one blob, at most {MAX_CHUNKS} are possible; use a larger chunk size"
            )));
        }
        if count > 0 {
            this.record.chunk_count = U32::new(count as u32);
            this.data(decoded_size)?;
            this.context(chunks.clone())?;
            this.digests(chunks)?;
        }
        this.record.compressed_size = U64::new(this.sink.len());
        Ok(this)
    }

    /// The blob's row as an inlined bootstrap states it: under the placeholder name, its size
    /// counted to where the bootstrap starts.
    pub fn record(&self) -> &BlobRecord {
        &self.record
    }

    /// Appends the bootstrap, if it is to be inlined, and what follows it.
    ///
    /// # Errors
    /// `Io`: writing failed. `Invalid`: a bootstrap came or did not come against the options.
    pub fn finish(mut self, bootstrap: Option<&[u8]>) -> Result<FinishedBlob> {
        match bootstrap {
            Some(bytes) if self.options.inline_bootstrap => self.bootstrap(bytes)?,
            None if !self.options.inline_bootstrap => {}
            _ => return Err(Error::invalid("blob options and bootstrap disagree about inlining")),
        }
        let mut table = None;
        if self.options.toc && !self.entries.is_empty() {
            let mut bytes = self.entries.as_bytes().to_vec();
            bytes.extend_from_slice(&tar_header(toc::name::TOC, bytes.len() as u64));
            self.sink.append(&bytes)?;
            table = Some((DigestAlgorithm::Sha256.digest(&bytes), bytes.len() as u32));
        }
        let (id, size) = (self.sink.digest(), self.sink.len());
        let file_digest = self.sink.file_digest();
        if !self.options.inline_bootstrap {
            self.record.blob_id = match &self.options.id {
                Some(id) => padded_id(id.as_str()),
                None => padded_id(&id.to_string()),
            };
            self.record.compressed_size = U64::new(size);
            if let Some((digest, size)) = table {
                self.record.blob_toc_digest = digest.0;
                self.record.blob_toc_size = U32::new(size);
            }
        }
        Ok(FinishedBlob { out: self.sink.close()?, id, file_digest, size, record: self.record })
    }

    fn has_headers(&self) -> bool {
        self.options.toc || self.options.inline_bootstrap
    }

    /// Section 2.
    fn data(&mut self, decoded_size: u64) -> Result<()> {
        if !self.has_headers() {
            return Ok(());
        }
        let size = self.sink.len();
        self.sink.append(&tar_header(toc::name::IMAGE_BLOB, size))?;
        // Over the header too: the digest is the running one, taken after it was written.
        let digest = self.sink.digest();
        self.entry(toc::name::IMAGE_BLOB, toc::FLAG_NONE, digest, 0, size, decoded_size);
        Ok(())
    }

    /// Sections 3 to 5.
    fn context(&mut self, chunks: impl ExactSizeIterator<Item = ChunkRow>) -> Result<()> {
        let entries: Vec<EntryV1> = chunks
            .map(|row| {
                EntryV1::pack(&Entry {
                    uncompressed_offset: row.uncompressed_offset,
                    uncompressed_size: row.uncompressed_size,
                    compressed_offset: row.compressed_offset,
                    compressed_size: row.compressed_size,
                    flags: EntryFlags::empty(),
                    data: 0,
                })
            })
            .collect();
        let array = entries.as_bytes();
        // Readers of the table of content know stored and zstd sections only.
        let codec = match self.options.codec {
            Codec::Lz4Block if self.options.toc => Codec::Zstd,
            codec => codec,
        };
        let compressed = Compressor::new(codec)?.compress(array)?;
        let (codec, stored) = match &compressed {
            Some(bytes) => (codec, &bytes[..]),
            None => (Codec::None, array),
        };
        let offset = self.sink.len();
        let record = &mut self.record;
        record.ci_compressor = U32::new(codec_code(codec));
        record.ci_offset = U64::new(offset);
        record.ci_compressed_size = U64::new(stored.len() as u64);
        record.ci_uncompressed_size = U64::new(array.len() as u64);
        let mut header = ContextHeader::new_zeroed();
        header.magic = U32::new(CONTEXT_MAGIC);
        header.magic2 = U32::new(CONTEXT_MAGIC);
        header.features = record.features;
        header.ci_compressor = record.ci_compressor;
        header.ci_entries = record.chunk_count;
        header.ci_offset = record.ci_offset;
        header.ci_compressed_size = record.ci_compressed_size;
        header.ci_uncompressed_size = record.ci_uncompressed_size;
        self.sink.append(stored)?;
        self.sink.append(header.as_bytes())?;
        if self.has_headers() {
            let size = self.sink.len() - offset;
            self.sink.append(&tar_header(toc::name::BLOB_META, size))?;
            let flag = if codec == Codec::Zstd { toc::FLAG_ZSTD } else { toc::FLAG_NONE };
            let (stored_size, array_size) = (stored.len() as u64, array.len() as u64);
            let digest = DigestAlgorithm::Sha256.digest(array);
            self.entry(toc::name::BLOB_META, flag, digest, offset, stored_size, array_size);
            let digest = DigestAlgorithm::Sha256.digest(header.as_bytes());
            let size = size_of::<ContextHeader>() as u64;
            self.entry(toc::name::BLOB_META_HEADER, toc::FLAG_NONE, digest, offset + stored_size, size, size);
        }
        Ok(())
    }

    /// Sections 6 and 7.
    fn digests(&mut self, chunks: impl ExactSizeIterator<Item = ChunkRow>) -> Result<()> {
        if !self.options.toc {
            return Ok(());
        }
        let array: Vec<[u8; 32]> = chunks.map(|row| row.digest.0).collect();
        let (offset, bytes) = (self.sink.len(), array.as_bytes());
        self.sink.append_unhashed(bytes)?;
        let size = bytes.len() as u64;
        self.sink.append(&tar_header(toc::name::BLOB_DIGEST, size))?;
        let digest = DigestAlgorithm::Sha256.digest(bytes);
        self.entry(toc::name::BLOB_DIGEST, toc::FLAG_NONE, digest, offset, size, size);
        Ok(())
    }

    /// Sections 8 and 9.
    fn bootstrap(&mut self, bytes: &[u8]) -> Result<()> {
        let compressed = if self.options.toc { Compressor::new(Codec::Zstd)?.compress(bytes)? } else { None };
        let (flag, stored) = match &compressed {
            Some(stored) => (toc::FLAG_ZSTD, &stored[..]),
            None => (toc::FLAG_NONE, bytes),
        };
        let (offset, size) = (self.sink.len(), stored.len() as u64);
        self.sink.append(stored)?;
        self.sink.append(&tar_header(toc::name::IMAGE_BOOT, size))?;
        let digest = DigestAlgorithm::Sha256.digest(bytes);
        self.entry(toc::name::IMAGE_BOOT, flag, digest, offset, size, bytes.len() as u64);
        Ok(())
    }

    fn entry(&mut self, name: &str, flag: u32, digest: Digest, offset: u64, stored: u64, decoded: u64) {
        let mut entry = TocEntry::new_zeroed();
        entry.flags = U32::new(flag);
        entry.name[..name.len()].copy_from_slice(name.as_bytes());
        entry.digest = digest.0;
        entry.offset = U64::new(offset);
        entry.stored_size = U64::new(stored);
        entry.uncompressed_size = U64::new(decoded);
        self.entries.push(entry);
    }
}

/// The code of `codec` in records.
pub fn codec_code(codec: Codec) -> u32 {
    match codec {
        Codec::None => compression::NONE,
        Codec::Lz4Block => compression::LZ4_BLOCK,
        Codec::Gzip => compression::GZIP,
        Codec::Zstd => compression::ZSTD,
    }
}

/// A tar header as the reference builder writes it behind a section of `size` bytes: GNU
/// format, mode and owners left empty, checksum of seven digits.
fn tar_header(name: &str, size: u64) -> [u8; 512] {
    /// Largest size of 11 octal digits.
    const MAX_OCTAL: u64 = (1 << 33) - 1;
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    if size <= MAX_OCTAL {
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar  \0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:07o}\0").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reverse_tar_headers_are_valid_tar() {
        for size in [0, 70276, (1 << 33) - 1, 1 << 33] {
            let bytes = tar_header("image.blob", size);
            let header = tar::Header::from_byte_slice(&bytes);
            assert_eq!(header.size().unwrap(), size);
            assert_eq!(header.path().unwrap().to_str(), Some("image.blob"));
            assert!(header.as_gnu().is_some());
        }
        assert_eq!(&tar_header("image.blob", 70276)[148..156], b"0005631\0");
    }
}
