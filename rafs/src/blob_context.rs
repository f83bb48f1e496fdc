//! The compression context of a blob: where each chunk lies, by chunk number.
//!
//! A blob stores it behind its chunk data: an array of entries (and of batch units, or of slices
//! of a gzip file), compressed, then a header of 4096 bytes. It is needed for members of batch
//! units and of slices, whose place no chunk record knows, and for chunks without a record;
//! nothing else waits for it. For data that is an original layer it lies in a blob of its own.
//! The local copy beside the cache (`<id>.blob.meta`) holds it decoded.

use std::ops::DerefMut;
use std::sync::Arc;

use bytes::Bytes;
use storage::codec::{Codec, decompress};
use storage::extent::{Cipher, FetchUnit};
use storage::ids::{ByteRange, ChunkIndex};
use storage::inflate::{MAX_DICTIONARY, Window};
use zerocopy::FromBytes;

use crate::bootstrap::{Blob, codec_of_context, stored_size};
use crate::format::blob_context::{
    BatchUnit, CONTEXT_MAGIC, ContextHeader, Entry, EntryV1, EntryV2, HEADER_SIZE, ZranSlice,
};
use crate::format::features::{BlobFeatures, EntryFlags};
use crate::format::limits::{BLOCK_SIZE, MAX_CHUNK_SIZE};
use crate::{Error, ErrorKind, Result};

/// Features that say how the context is to be read; the header must agree with the record.
const LAYOUT_FEATURES: BlobFeatures = BlobFeatures::CHUNK_INFO_V2
    .union(BlobFeatures::BATCH)
    .union(BlobFeatures::ZRAN)
    .union(BlobFeatures::ENCRYPTED)
    .union(BlobFeatures::TARFS);

/// Where the stored context lies in the blob that holds it: array and header in one piece.
///
/// # Errors
/// `Storage`: the sum overflows, which a checked [`Blob`] excludes.
pub fn stored_range(blob: &Blob) -> Result<ByteRange> {
    let record = &blob.record;
    Ok(ByteRange::new(
        record.ci_offset.get(),
        record.ci_compressed_size.get().saturating_add(HEADER_SIZE as u64),
    )?)
}

/// A checked context: every entry lies inside its blob, in order and without overlap.
#[derive(Clone)]
pub struct BlobContext {
    /// Entries, then batch units or slices with their dictionaries, decoded.
    array: Bytes,
    header: Box<[u8; HEADER_SIZE]>,
    v2: bool,
    codec: Codec,
    cipher: Cipher,
    data_size: u64,
    chunk_count: u32,
    unit_count: u32,
    slices: Vec<Slice>,
}

/// A stretch of a gzip file that can be decoded without what precedes it.
#[derive(Clone)]
struct Slice {
    stored: ByteRange,
    decoded_len: u32,
    window: Arc<Window>,
}

impl std::fmt::Debug for BlobContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobContext")
            .field("chunks", &self.chunk_count)
            .field("units", &self.unit_count)
            .finish_non_exhaustive()
    }
}

impl BlobContext {
    /// Decodes `stored`, the bytes of [`stored_range`].
    ///
    /// # Errors
    /// `Corrupt`: it does not decode, contradicts the blob record, or an entry is bad.
    pub fn from_stored(blob: &Blob, stored: &[u8]) -> Result<Self> {
        Self::from_stored_in(blob, stored, |len| vec![0; len])
    }

    /// [`Self::from_stored`] in memory that `room` gives: as many bytes as asked for.
    ///
    /// # Errors
    /// As [`Self::from_stored`].
    pub fn from_stored_in<R>(blob: &Blob, stored: &[u8], room: impl FnOnce(usize) -> R) -> Result<Self>
    where
        R: AsRef<[u8]> + DerefMut<Target = [u8]> + Send + 'static,
    {
        let name = |e: Error| e.context(format_args!("context of blob {}", blob.id));
        let Some((array, header)) = stored.split_last_chunk::<HEADER_SIZE>() else {
            return Err(name(Error::corrupt(format!("{} bytes are too few", stored.len()))));
        };
        // The record's size was capped when the blob table was checked.
        let mut decoded = room(blob.record.ci_uncompressed_size.get() as usize);
        let codec = codec_of_context(&blob.record).map_err(name)?;
        let mut header = *header;
        match &blob.cipher {
            Cipher::None => decompress(codec, array, &mut decoded),
            Cipher::Aes128Xts(key) => {
                key.open(array, |plain| decompress(codec, plain, &mut decoded)).and_then(|()| {
                    key.open(&header.clone(), |plain| {
                        header.copy_from_slice(plain);
                        Ok(())
                    })
                })
            }
        }
        .map_err(|e| name(Error::corrupt("the array does not decode").with_source(e)))?;
        Self::new(blob, Bytes::from_owner(decoded), &header).map_err(name)
    }

    /// Reads a local `<id>.blob.meta` file.
    ///
    /// # Errors
    /// `Corrupt`: as [`BlobContext::from_stored`].
    pub fn from_cache_file(blob: &Blob, file: &[u8]) -> Result<Self> {
        let name = |e: Error| e.context(format_args!("local context of blob {}", blob.id));
        let len = blob.record.ci_uncompressed_size.get() as usize;
        match file.split_last_chunk::<HEADER_SIZE>() {
            Some((array, header)) if array.len() == len.next_multiple_of(HEADER_SIZE) => {
                Self::new(blob, Bytes::copy_from_slice(&array[..len]), header).map_err(name)
            }
            _ => Err(name(Error::corrupt(format!("{} bytes: want {len} padded and a header", file.len())))),
        }
    }

    /// The content of a local `<id>.blob.meta` file: the array padded to 4096, the header.
    pub fn to_cache_file(&self) -> Vec<u8> {
        let mut file = Vec::with_capacity(self.array.len().next_multiple_of(HEADER_SIZE) + HEADER_SIZE);
        file.extend_from_slice(&self.array);
        file.resize(self.array.len().next_multiple_of(HEADER_SIZE), 0);
        file.extend_from_slice(&self.header[..]);
        file
    }

    fn new(blob: &Blob, array: Bytes, header: &[u8; HEADER_SIZE]) -> Result<Self> {
        let fields = ContextHeader::ref_from_bytes(header).map_err(|_| Error::corrupt("header size"))?;
        let v2 = blob.features.contains(BlobFeatures::CHUNK_INFO_V2);
        let unit_count = check_header(blob, fields, array.len() as u64, v2)?;
        let slices = match blob.features.contains(BlobFeatures::ZRAN) {
            true => slices(blob, &array, unit_count)?,
            false => Vec::new(),
        };
        let context = Self {
            array,
            header: Box::new(*header),
            v2,
            codec: blob.codec,
            cipher: blob.cipher.clone(),
            data_size: blob.data_size,
            chunk_count: blob.chunk_count,
            unit_count,
            slices,
        };
        context.check_entries(blob)?;
        Ok(context)
    }

    /// Number of chunks.
    pub fn chunk_count(&self) -> u32 {
        self.chunk_count
    }

    /// The entry of a chunk.
    ///
    /// # Errors
    /// `NotFound`: the blob has no such chunk.
    pub fn entry(&self, index: ChunkIndex) -> Result<Entry> {
        let missing = || Error::new(ErrorKind::NotFound, format!("the blob has no chunk {index}"));
        if index.0 >= self.chunk_count {
            return Err(missing());
        }
        let at = index.0 as usize;
        Ok(if self.v2 {
            let rest = self.array.get(at * size_of::<EntryV2>()..).ok_or_else(missing)?;
            EntryV2::ref_from_prefix(rest).map_err(|_| missing())?.0.unpack()
        } else {
            let rest = self.array.get(at * size_of::<EntryV1>()..).ok_or_else(missing)?;
            EntryV1::ref_from_prefix(rest).map_err(|_| missing())?.0.unpack()
        })
    }

    /// The fetch unit that holds a chunk, and where in the decoded unit the chunk starts.
    ///
    /// # Errors
    /// `NotFound`: the blob has no such chunk. `Corrupt`: it lies outside its unit.
    pub fn unit(&self, entry: &Entry) -> Result<(FetchUnit, u32)> {
        let fail = |why: &str| Error::corrupt(format!("context entry {entry:?}: {why}"));
        if entry.flags.contains(EntryFlags::ZRAN) {
            let (offset, index) = (entry.data as u32, (entry.data >> 32) as usize);
            let slice = self.slices.get(index).ok_or_else(|| fail("no such slice"))?;
            if u64::from(offset) + u64::from(entry.uncompressed_size) > slice.decoded_len.into() {
                return Err(fail("lies outside its slice"));
            }
            let unit = FetchUnit {
                compressed: slice.stored,
                codec: self.codec,
                cipher: Cipher::None,
                window: Some(Arc::clone(&slice.window)),
                decoded_len: slice.decoded_len,
            };
            return Ok((unit, offset));
        }
        let (stored, decoded_len, offset) = if entry.flags.contains(EntryFlags::BATCH) {
            let (offset, index) = (entry.data as u32, (entry.data >> 32) as u32);
            let unit = self.batch_unit(index).ok_or_else(|| fail("no such batch unit"))?;
            (unit.compressed_size.get(), unit.uncompressed_size.get(), offset)
        } else {
            (entry.compressed_size, entry.uncompressed_size, 0)
        };
        let compressed = ByteRange::new(entry.compressed_offset, stored.into())?;
        if stored == 0
            || stored > MAX_CHUNK_SIZE
            || decoded_len > MAX_CHUNK_SIZE
            || compressed.end() > self.data_size
            || u64::from(offset) + u64::from(entry.uncompressed_size) > decoded_len.into()
        {
            return Err(fail("lies outside its unit, or the unit outside the blob"));
        }
        let plain = stored_size(decoded_len, &self.cipher);
        let raw = if entry.flags.contains(EntryFlags::BATCH) {
            stored == plain
        } else {
            !entry.flags.contains(EntryFlags::COMPRESSED)
        };
        if raw && stored != plain || stored > plain && entry.flags.contains(EntryFlags::BATCH) {
            return Err(fail("sizes contradict each other"));
        }
        let codec = if raw { Codec::None } else { self.codec };
        let cipher = self.cipher.clone();
        Ok((FetchUnit { compressed, codec, cipher, window: None, decoded_len }, offset))
    }

    fn batch_unit(&self, index: u32) -> Option<&BatchUnit> {
        if index >= self.unit_count {
            return None;
        }
        let start =
            self.chunk_count as usize * size_of::<EntryV2>() + index as usize * size_of::<BatchUnit>();
        Some(BatchUnit::ref_from_prefix(self.array.get(start..)?).ok()?.0)
    }

    fn check_entries(&self, blob: &Blob) -> Result<()> {
        let allowed = [
            (EntryFlags::ZRAN, blob.features.contains(BlobFeatures::ZRAN)),
            (EntryFlags::BATCH, blob.features.contains(BlobFeatures::BATCH)),
            (EntryFlags::ENCRYPTED, blob.cipher != Cipher::None),
        ];
        let mut end = 0;
        // The last unit, and where its last chunk ends.
        let mut last: Option<(ByteRange, u64)> = None;
        for index in 0..self.chunk_count {
            let entry = self.entry(ChunkIndex(index))?;
            let fail = |why: &str| Err(Error::corrupt(format!("chunk {index} ({entry:?}): {why}")));
            if allowed.iter().any(|&(flag, allowed)| entry.flags.contains(flag) && !allowed) {
                return fail("flags that the blob's features exclude");
            }
            let uses = EntryFlags::HAS_CRC32 | EntryFlags::BATCH | EntryFlags::ZRAN;
            if (entry.flags & uses).bits().count_ones() > 1 {
                return fail("more than one of CRC, batch unit and slice");
            }
            let start = entry.uncompressed_offset;
            let stop = start + u64::from(entry.uncompressed_size);
            if !start.is_multiple_of(BLOCK_SIZE) || start < end || stop > blob.decoded_size {
                return fail("out of order, overlapping, or outside the decoded space");
            }
            end = stop;
            let (unit, offset) = self.unit(&entry).map_err(|e| e.context(format_args!("chunk {index}")))?;
            // Whoever fetches a unit has the work for all of its chunks.
            if last.is_some_and(|(range, end)| range == unit.compressed && u64::from(offset) < end) {
                return fail("overlaps the chunk before it in their unit");
            }
            last = Some((unit.compressed, u64::from(offset) + u64::from(entry.uncompressed_size)));
        }
        Ok(())
    }
}

/// Compares the header with the blob record; answers the number of batch units.
fn check_header(blob: &Blob, header: &ContextHeader, array_len: u64, v2: bool) -> Result<u32> {
    let record = &blob.record;
    let features = BlobFeatures::from_bits_retain(header.features.get());
    let same = [
        ("magic", header.magic.get() == CONTEXT_MAGIC && header.magic2.get() == CONTEXT_MAGIC),
        ("features", (features ^ blob.features) & LAYOUT_FEATURES == BlobFeatures::empty()),
        ("compressor", header.ci_compressor == record.ci_compressor),
        ("entries", header.ci_entries == record.chunk_count),
        ("offset", header.ci_offset == record.ci_offset),
        ("stored size", header.ci_compressed_size == record.ci_compressed_size),
        ("decoded size", header.ci_uncompressed_size == record.ci_uncompressed_size),
    ];
    if let Some((field, _)) = same.iter().find(|(_, same)| !same) {
        return Err(Error::corrupt(format!("header and blob record differ in {field}")));
    }
    if !blob.has_units() {
        return Ok(0);
    }
    let units = header.unit_count.get();
    let start = u64::from(blob.chunk_count) * size_of::<EntryV2>() as u64;
    let least = u64::from(units) * size_of::<BatchUnit>() as u64;
    let size = header.unit_size.get();
    // Dictionaries follow slices; nothing follows batch units.
    let sized = if blob.features.contains(BlobFeatures::ZRAN) { size >= least } else { size == least };
    let placed = v2
        && units <= blob.chunk_count
        && header.unit_offset.get() == start
        && sized
        && start.checked_add(size).is_some_and(|end| end <= array_len);
    if !placed {
        return Err(Error::corrupt(format!(
            "{units} units of {} bytes at {}: want them behind the {start} bytes of entries",
            header.unit_size, header.unit_offset
        )));
    }
    Ok(units)
}

/// The slices of a gzip file: contexts, then the dictionaries that they name.
fn slices(blob: &Blob, array: &Bytes, count: u32) -> Result<Vec<Slice>> {
    let start = blob.chunk_count as usize * size_of::<EntryV2>();
    let fail = |index: usize, why: &str| Error::corrupt(format!("slice {index}: {why}"));
    let records = array
        .get(start..)
        .and_then(|rest| <[ZranSlice]>::ref_from_prefix_with_elems(rest, count as usize).ok())
        .ok_or_else(|| Error::corrupt(format!("{count} slices do not fit")))?
        .0;
    let dictionaries = array.slice(start + size_of_val(records)..);
    let mut slices = Vec::with_capacity(records.len());
    for (index, record) in records.iter().enumerate() {
        let (decoded_len, bits) = (record.out_len.get(), record.ctx_bits);
        let stored = ByteRange::new(record.in_offset.get(), record.in_len.get().into())?;
        if stored.is_empty() || stored.end() > blob.data_size || decoded_len == 0 {
            return Err(fail(index, "is empty or lies outside the file"));
        }
        if decoded_len > MAX_CHUNK_SIZE || record.in_len.get() > MAX_CHUNK_SIZE || bits > 7 {
            return Err(fail(index, "is larger than 16 MiB, or begins at an impossible bit"));
        }
        let size = record.dict_size.get() as usize;
        let dictionary = usize::try_from(record.dict_offset.get())
            .ok()
            .and_then(|from| Some(from..from.checked_add(size)?))
            .filter(|range| range.end <= dictionaries.len() && size <= MAX_DICTIONARY)
            .ok_or_else(|| fail(index, "its dictionary lies outside of them"))?;
        let window = Window { dictionary: dictionaries.slice(dictionary), bits, byte: record.ctx_byte };
        slices.push(Slice { stored, decoded_len, window: Arc::new(window) });
    }
    Ok(slices)
}
