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

mod context;
mod reverse_tar;

use std::collections::HashMap;
use std::io::Write;

use rafs::blob_context::BlobContext;
use rafs::bootstrap::{Blob, Buffer, codec_code, digester_code};
use rafs::format::blob_context::{CONTEXT_MAGIC, ContextHeader};
use rafs::format::blob_table::{BlobRecord, compression, digest};
use rafs::format::features::BlobFeatures;
use rafs::format::limits::{INLINED_BLOB_ID, MAX_CHUNKS};
use rafs::format::toc::{self, TocEntry};
use storage::cipher::XtsKey;
use storage::codec::{Codec, ZSTD_LEVEL};
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::BlobId;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use self::context::{ContextArray, StoredContext, context_array};
use self::reverse_tar::tar_header;
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
    /// What chunks and context are encrypted with.
    pub cipher: Option<XtsKey>,
    /// Also make the daemon's local copy of the context.
    pub keep_context: bool,
}

/// What the context says of chunks beside their places.
#[derive(Clone, Debug, Default)]
pub enum Context {
    /// Each chunk is a unit of its own: entries of 16 bytes.
    #[default]
    Plain,
    /// There is none: bootstraps of RAFS v5 say it all.
    None,
    /// Chunks are encrypted, or some share units: entries of 24 bytes.
    Wide {
        /// Units in order: stored and decoded bytes.
        units: Vec<(u32, u32)>,
        /// By chunk number: the unit that it shares, where that begins in the blob, and where in it
        /// the chunk begins.
        members: HashMap<u32, (u32, u64, u32)>,
    },
    /// The data is a plain tar, in a file of its own, and the decoded space: no context at all.
    Tar {
        /// Its name.
        id: BlobId,
        /// Its length, a multiple of 512.
        size: u64,
    },
    /// The data is members of a gzip file that is an original layer. Records say where each chunk
    /// lies; the context is in no blob.
    Members {
        /// The layer's name.
        id: BlobId,
        /// Its length.
        size: u64,
    },
    /// The data is an original layer, in a file of its own.
    Separate {
        /// SHA-256 of that file.
        id: Digest,
        /// Its length.
        size: u64,
        /// If it is a gzip file, the slices that chunks lie in.
        slices: Option<SliceTable>,
    },
}

/// The slices of a gzip file and which of them holds each chunk.
#[derive(Clone, Debug)]
pub struct SliceTable {
    /// By chunk number: slice, and where in it the chunk begins.
    pub places: Vec<(u32, u32)>,
    /// Contexts and dictionaries as they are stored.
    pub bytes: Buffer,
    /// Number of contexts.
    pub count: u32,
}

/// A blob whose data and context are written.
pub struct BlobWriter {
    sink: BlobSink,
    options: BlobOptions,
    entries: Vec<TocEntry>,
    record: BlobRecord,
    /// What is written is not kept.
    nowhere: bool,
    local: Option<Vec<u8>>,
}

/// A complete blob.
pub struct FinishedBlob {
    /// Where it was written, flushed.
    pub out: Box<dyn Write + Send>,
    /// SHA-256 of the file but for its digest section: the name `nydus-image` gives it.
    pub id: Digest,
    /// SHA-256 of the file: the name a registry gives it.
    pub file_digest: Digest,
    /// Bytes that were written.
    pub size: u64,
    /// The content of the daemon's local copy of the context, if that was asked for and there is one.
    pub local_context: Option<Vec<u8>>,
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
        context: &Context,
    ) -> Result<Self> {
        let mut features = BlobFeatures::CAP_TAR_TOC;
        features.set(BlobFeatures::ALIGNED, !matches!(context, Context::None));
        features.set(BlobFeatures::INLINED_FS_META, options.inline_bootstrap);
        features.set(BlobFeatures::INLINED_CHUNK_DIGEST | BlobFeatures::HAS_TOC, options.toc);
        features.set(BlobFeatures::HAS_TAR_HEADER, options.toc || options.inline_bootstrap);
        let mut record = BlobRecord::new_zeroed();
        record.blob_id = INLINED_BLOB_ID;
        if let Context::Wide { units, .. } = context {
            features |= BlobFeatures::CHUNK_INFO_V2;
            features.set(BlobFeatures::BATCH, !units.is_empty());
        }
        if let Some(key) = &options.cipher {
            features |= BlobFeatures::ENCRYPTED;
            let (low, high) = key.iv().split_at(8);
            record.cipher_algo = U32::new(1);
            record.blob_meta_digest = *key.key();
            record.blob_meta_size = U64::from_bytes(low.try_into().unwrap_or_default());
            record.cipher_iv = U64::from_bytes(high.try_into().unwrap_or_default());
        }
        let mut separate = None;
        if let Context::Tar { id, size } = context {
            return Self::over_tar(sink, options, (id, *size), chunks.len());
        }
        if let Context::Separate { id, size, slices } = context {
            features |= BlobFeatures::SEPARATE | BlobFeatures::CHUNK_INFO_V2;
            features.set(BlobFeatures::ZRAN, slices.is_some());
            record.blob_id = padded_id(&id.to_string());
            separate = Some(*size);
        }
        if let Context::Members { id, size } = context {
            features |= BlobFeatures::SEPARATE | BlobFeatures::CHUNK_INFO_V2;
            record.blob_id = padded_id(id.as_str());
            separate = Some(*size);
        }
        record.chunk_size = U32::new(options.chunk_size);
        record.compression_algo = U32::new(codec_code(options.codec));
        record.digest_algo = U32::new(digester_code(options.digester));
        record.features = U32::new(features.bits());
        record.uncompressed_size = U64::new(decoded_size);
        let nowhere = matches!(context, Context::Members { .. });
        let mut this = Self { sink, options, entries: Vec::new(), record, nowhere, local: None };
        let count = chunks.len();
        if count > MAX_CHUNKS as usize {
            return Err(Error::limit(format!(
                "{count} chunks in one blob, at most {MAX_CHUNKS} are possible; use a larger chunk size"
            )));
        }
        let mut context_bytes = None;
        if count > 0 {
            this.record.chunk_count = U32::new(count as u32);
            if separate.is_none() {
                this.data(decoded_size)?;
            }
            if !matches!(context, Context::None) {
                context_bytes = Some(this.context(chunks.clone(), context)?);
                this.digests(chunks)?;
            }
        }
        this.record.compressed_size = U64::new(separate.unwrap_or(this.sink.len()));
        let keep = this.options.keep_context;
        if let Some(bytes) = context_bytes.filter(|_| keep || !matches!(context, Context::Plain)) {
            let context = this.check_context(bytes.with_header())?;
            this.local = keep.then(|| context.to_cache_file());
        }
        Ok(this)
    }

    /// Reads the context back as a mount would: what readers refuse must not get a name.
    fn check_context(&self, bytes: &[u8]) -> Result<BlobContext> {
        const FAILS: &str = "the new blob context fails its own check";
        let fails = |e: rafs::Error| Error::from(e).context(FAILS);
        let blob = Blob::from_record(&self.record, 0, self.options.chunk_size, None).map_err(fails)?;
        BlobContext::from_stored_in(&blob, bytes, Buffer::zeroed).map_err(fails)
    }

    /// A blob of which nothing is written.
    fn over_tar(
        sink: BlobSink,
        options: BlobOptions,
        (id, size): (&BlobId, u64),
        count: usize,
    ) -> Result<Self> {
        let mut record = BlobRecord::new_zeroed();
        record.blob_id = padded_id(id.as_str());
        record.chunk_size = U32::new(options.chunk_size);
        record.chunk_count = U32::new(count as u32);
        record.compression_algo = U32::new(compression::NONE);
        record.digest_algo = U32::new(digest::SHA256);
        record.features = U32::new((BlobFeatures::TARFS | BlobFeatures::CAP_TAR_TOC).bits());
        record.uncompressed_size = U64::new(size);
        record.compressed_size = U64::new(size);
        // There is no context; this is what the reference builder states of it.
        record.ci_compressor = U32::new(compression::LZ4_BLOCK);
        Ok(Self { sink, options, entries: Vec::new(), record, nowhere: false, local: None })
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
        let (id, end) = (self.sink.digest(), self.sink.len());
        let size = end - self.sink.start();
        let file_digest = self.sink.file_digest();
        let separate =
            BlobFeatures::from_bits_retain(self.record.features.get()).contains(BlobFeatures::SEPARATE);
        if self.nowhere {
            // No file to name.
        } else if separate && !self.options.inline_bootstrap {
            self.record.blob_meta_digest = id.0;
            self.record.blob_meta_size = U64::new(end);
        } else if !self.options.inline_bootstrap && size > 0 {
            self.record.blob_id = match &self.options.id {
                Some(id) => padded_id(id.as_str()),
                None => padded_id(&id.to_string()),
            };
            self.record.compressed_size = U64::new(end);
        }
        if let Some((digest, size)) = table.filter(|_| !self.options.inline_bootstrap) {
            self.record.blob_toc_digest = digest.0;
            self.record.blob_toc_size = U32::new(size);
        }
        let local_context = self.local;
        Ok(FinishedBlob {
            out: self.sink.close()?,
            id,
            file_digest,
            size,
            local_context,
            record: self.record,
        })
    }

    fn has_headers(&self) -> bool {
        self.options.toc || self.options.inline_bootstrap
    }

    /// Section 2.
    fn data(&mut self, decoded_size: u64) -> Result<()> {
        if !self.has_headers() {
            return Ok(());
        }
        let start = self.sink.start();
        let size = self.sink.len() - start;
        self.sink.append(&tar_header(toc::name::IMAGE_BLOB, size))?;
        // Over the header too: the digest is the running one, taken after it was written.
        let digest = self.sink.digest();
        self.entry(toc::name::IMAGE_BLOB, toc::FLAG_NONE, digest, start, size, decoded_size);
        Ok(())
    }

    /// Sections 3 to 5.
    fn context(
        &mut self,
        chunks: impl ExactSizeIterator<Item = ChunkRow>,
        context: &Context,
    ) -> Result<StoredContext> {
        let ContextArray { bytes: array, units_at, unit_count } = context_array(chunks, context);
        let array = &array[..];
        // Readers of the table of content know stored and zstd sections only.
        let codec = match self.options.codec {
            Codec::Lz4Block if self.options.toc => Codec::Zstd,
            // What is gzip is an original layer; nothing here is.
            Codec::Gzip => Codec::Zstd,
            codec => codec,
        };
        let (codec, mut stored) = StoredContext::new(codec, array)?;
        if let Some(key) = &self.options.cipher {
            stored = stored.sealed(key);
        }
        let stored_size = stored.len as u64;
        let offset = self.sink.len();
        let record = &mut self.record;
        record.ci_compressor = U32::new(codec_code(codec));
        record.ci_offset = U64::new(offset);
        record.ci_compressed_size = U64::new(stored_size);
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
        if unit_count > 0 {
            header.unit_offset = U64::new(units_at as u64);
            header.unit_size = U64::new((array.len() - units_at) as u64);
            header.unit_count = U32::new(unit_count);
        }
        let mut stored_header = header.as_bytes().to_vec();
        if let Some(key) = &self.options.cipher {
            // Whole blocks of the cipher stay as long as they are.
            key.seal(&mut stored_header);
        }
        stored.header().copy_from_slice(&stored_header);
        self.sink.append(stored.with_header())?;
        if self.has_headers() {
            let size = self.sink.len() - offset;
            self.sink.append(&tar_header(toc::name::BLOB_META, size))?;
            let flag = if codec == Codec::Zstd { toc::FLAG_ZSTD } else { toc::FLAG_NONE };
            let array_size = array.len() as u64;
            let digest = DigestAlgorithm::Sha256.digest(array);
            self.entry(toc::name::BLOB_META, flag, digest, offset, stored_size, array_size);
            let digest = DigestAlgorithm::Sha256.digest(header.as_bytes());
            let size = size_of::<ContextHeader>() as u64;
            self.entry(toc::name::BLOB_META_HEADER, toc::FLAG_NONE, digest, offset + stored_size, size, size);
        }
        Ok(stored)
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
        let offset = self.sink.len();
        let flag = if self.options.toc {
            self.compress(bytes).map_err(|e| Error::io("compress the bootstrap with zstd", e))?;
            toc::FLAG_ZSTD
        } else {
            self.sink.append(bytes)?;
            toc::FLAG_NONE
        };
        let size = self.sink.len() - offset;
        self.sink.append(&tar_header(toc::name::IMAGE_BOOT, size))?;
        let digest = DigestAlgorithm::Sha256.digest(bytes);
        self.entry(toc::name::IMAGE_BOOT, flag, digest, offset, size, bytes.len() as u64);
        Ok(())
    }

    /// Appends `bytes` compressed, piece by piece.
    fn compress(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut encoder = zstd::Encoder::new(&mut self.sink, ZSTD_LEVEL)?;
        encoder.set_pledged_src_size(Some(bytes.len() as u64))?;
        encoder.write_all(bytes)?;
        encoder.finish()?;
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
