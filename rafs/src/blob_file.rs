//! Reading a blob file from its end: its sections, and the bootstrap inside.
//!
//! ```text
//! | chunk data | H | context | header | H | digests | H | bootstrap | H | TOC entries | H |
//!              image.blob     blob.meta      blob.digest   image.boot     rafs.blob.toc
//! ```
//!
//! `H` is a tar header of 512 bytes behind its section. With a table of content the last
//! one says how long that table is. Older blobs end with the header of their bootstrap and
//! are read header by header. A plain blob has neither and ends with the context header.

use storage::codec::{Codec, decompress};
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::ByteRange;
use zerocopy::FromBytes;

use crate::bootstrap::Buffer;
use crate::format::blob_context::{CONTEXT_MAGIC, ContextHeader, HEADER_SIZE};
use crate::format::limits::{MAX_BOOTSTRAP_SIZE, MAX_TOC_SIZE};
use crate::format::tar_header;
use crate::format::toc::{FLAG_LZ4, FLAG_NONE, FLAG_ZSTD, TocEntry, name};
use crate::{Error, ErrorKind, Result};

const TAR: u64 = tar_header::SIZE as u64;

/// Names a reader knows, in the order of a file.
const NAMES: [&str; 5] =
    [name::IMAGE_BLOB, name::BLOB_META, name::BLOB_META_HEADER, name::BLOB_DIGEST, name::IMAGE_BOOT];

/// Supplies the bytes of a range, exactly as many.
pub type ReadAt<'r> = dyn FnMut(ByteRange) -> Result<Vec<u8>> + 'r;

/// One section of a blob file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// One of [`name`].
    pub name: &'static str,
    /// Where its stored bytes lie.
    pub stored: ByteRange,
    /// Compression of the section as a whole.
    pub codec: Codec,
    /// Length once decoded.
    pub decoded_size: u64,
    /// SHA-256 of the decoded bytes; `None` without a table of content, and for the chunk
    /// data, whose entry covers the tar header too.
    pub digest: Option<Digest>,
}

/// The sections of a blob file.
#[derive(Clone, Debug)]
pub struct BlobFile {
    sections: Vec<Section>,
    toc: Option<(u32, Digest)>,
}

impl BlobFile {
    /// Finds the sections of a file of `size` bytes.
    ///
    /// # Errors
    /// `Corrupt`: neither a table of content, nor tar headers, nor a context header at the
    /// end, or they contradict the file. Those of `read`.
    pub fn read(size: u64, read: &mut ReadAt<'_>) -> Result<Self> {
        let Some(tail_at) = size.checked_sub(TAR) else {
            return Err(Error::corrupt(format!("blob file of {size} bytes: too short")));
        };
        match tar_header::parse(&read_header(tail_at, read)?) {
            Ok((name, len)) if name == name::TOC => Self::from_toc(size, len, read),
            Ok(_) => Self::from_headers(size, read),
            Err(_) => Self::plain(size, read),
        }
    }

    /// The section called `name` (see [`name`]).
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }

    /// All sections, in file order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Length and SHA-256 of the table of content with its tar header, as a blob record
    /// states them (`blob_toc_size`, `blob_toc_digest`).
    pub fn toc(&self) -> Option<(u32, Digest)> {
        self.toc
    }

    /// The bootstrap that the file holds, decoded and compared with its digest.
    ///
    /// # Errors
    /// `NotFound`: the file holds none. `Corrupt`: larger than 2 GiB, or damaged.
    pub fn bootstrap(&self, read: &mut ReadAt<'_>) -> Result<Buffer> {
        self.decode(name::IMAGE_BOOT, MAX_BOOTSTRAP_SIZE, read)
    }

    /// A section's decoded bytes, compared with its digest where there is one.
    ///
    /// # Errors
    /// `NotFound`: the file has no such section. `Corrupt`: more than `cap` bytes, or damaged.
    pub fn decode(&self, name: &str, cap: u64, read: &mut ReadAt<'_>) -> Result<Buffer> {
        let section = self
            .section(name)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("the blob file has no section {name}")))?;
        let fail = |why: String| Error::corrupt(format!("section {name}: {why}"));
        if section.decoded_size > cap || section.stored.len() > cap {
            return Err(fail(format!("{} bytes, at most {cap} are accepted", section.decoded_size)));
        }
        let stored = read(section.stored)?;
        let decoded = if section.codec == Codec::None {
            stored.into()
        } else {
            let mut decoded = Buffer::zeroed(section.decoded_size as usize);
            decompress(section.codec, &stored, &mut decoded)
                .map_err(|e| fail("does not decode".into()).with_source(e))?;
            decoded
        };
        match section.digest {
            Some(digest) if DigestAlgorithm::Sha256.digest(&decoded) != digest => {
                Err(fail(format!("its SHA-256 is not {digest}")))
            }
            _ => Ok(decoded),
        }
    }

    fn from_toc(size: u64, len: u64, read: &mut ReadAt<'_>) -> Result<Self> {
        let entry_size = size_of::<TocEntry>() as u64;
        let end = size - TAR;
        let start = end.checked_sub(len).filter(|_| {
            len >= entry_size && len <= u64::from(MAX_TOC_SIZE) && len.is_multiple_of(entry_size)
        });
        let Some(start) = start else {
            return Err(Error::corrupt(format!("table of content of {len} bytes in a blob of {size}")));
        };
        let table = read(ByteRange::new(start, len + TAR)?)?;
        let entries = table.get(..len as usize).and_then(|t| <[TocEntry]>::ref_from_bytes(t).ok());
        let entries = entries.ok_or_else(|| Error::corrupt("the table of content came short"))?;
        let mut sections: Vec<Section> = Vec::new();
        for entry in entries {
            let section = toc_section(entry, start)?;
            if sections.iter().any(|s| s.name == section.name) {
                return Err(Error::corrupt(format!("two sections are called {}", section.name)));
            }
            sections.push(section);
        }
        // At most MAX_TOC_SIZE and a header.
        let toc = Some(((len + TAR) as u32, DigestAlgorithm::Sha256.digest(&table)));
        Ok(Self { sections, toc })
    }

    /// Walks the reverse tar from the end to the start.
    fn from_headers(size: u64, read: &mut ReadAt<'_>) -> Result<Self> {
        let mut sections: Vec<Section> = Vec::new();
        let mut end = size;
        while end > 0 {
            let fail = |why: &str| Error::corrupt(format!("section that ends at byte {end}: {why}"));
            let header_at = end.checked_sub(TAR).ok_or_else(|| fail("no room for its header"))?;
            let (found, len) = tar_header::parse(&read_header(header_at, read)?)?;
            let known = NAMES.into_iter().find(|&n| n == found && sections.iter().all(|s| s.name != n));
            let name = known.ok_or_else(|| fail("its name is unknown or repeated"))?;
            let start = header_at.checked_sub(len).ok_or_else(|| fail("starts before the file"))?;
            let stored = ByteRange::new(start, len)?;
            sections.push(Section { name, stored, codec: Codec::None, decoded_size: len, digest: None });
            end = start;
        }
        sections.reverse();
        Ok(Self { sections, toc: None })
    }

    /// A plain blob: chunk data, context array, context header.
    fn plain(size: u64, read: &mut ReadAt<'_>) -> Result<Self> {
        let fail =
            || Error::corrupt("not a RAFS blob file: no table of content, tar header or context at its end");
        let header_at = size.checked_sub(HEADER_SIZE as u64).ok_or_else(fail)?;
        let bytes = read(ByteRange::new(header_at, HEADER_SIZE as u64)?)?;
        let header = ContextHeader::ref_from_bytes(&bytes).map_err(|_| fail())?;
        let (start, stored) = (header.ci_offset.get(), header.ci_compressed_size.get());
        let sane = header.magic.get() == CONTEXT_MAGIC
            && header.magic2.get() == CONTEXT_MAGIC
            && start.checked_add(stored) == Some(header_at);
        if !sane {
            return Err(fail());
        }
        let section = |name, start, len| {
            Ok::<_, Error>(Section {
                name,
                stored: ByteRange::new(start, len)?,
                codec: Codec::None,
                decoded_size: len,
                digest: None,
            })
        };
        Ok(Self {
            sections: vec![
                section(name::IMAGE_BLOB, 0, start)?,
                section(name::BLOB_META, start, stored + HEADER_SIZE as u64)?,
            ],
            toc: None,
        })
    }
}

fn read_header(at: u64, read: &mut ReadAt<'_>) -> Result<[u8; tar_header::SIZE]> {
    let bytes = read(ByteRange::new(at, TAR)?)?;
    bytes.try_into().map_err(|_| Error::corrupt("a tar header came short"))
}

fn toc_section(entry: &TocEntry, toc_at: u64) -> Result<Section> {
    let end = entry.name.iter().position(|&b| b == 0).unwrap_or(entry.name.len());
    let found = entry.name[..end].escape_ascii().to_string();
    let fail = |why: &str| Error::corrupt(format!("section {found}: {why}"));
    let name = NAMES.into_iter().find(|&n| n == found).ok_or_else(|| fail("its name is unknown"))?;
    let codec = match entry.flags.get() & 0xf {
        FLAG_NONE => Codec::None,
        FLAG_ZSTD => Codec::Zstd,
        FLAG_LZ4 => Codec::Lz4Block,
        _ => return Err(fail("want exactly one compression flag")),
    };
    let stored = ByteRange::new(entry.offset.get(), entry.stored_size.get())?;
    if stored.end() > toc_at {
        return Err(fail("reaches into the table of content"));
    }
    let data = name == name::IMAGE_BLOB;
    let decoded_size = if data { stored.len() } else { entry.uncompressed_size.get() };
    if codec == Codec::None && decoded_size != stored.len() {
        return Err(fail("stored as it is, yet its two sizes differ"));
    }
    Ok(Section { name, stored, codec, decoded_size, digest: (!data).then_some(Digest(entry.digest)) })
}
