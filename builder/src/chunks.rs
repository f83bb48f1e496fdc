//! Every distinct chunk of a build, and which chunks each file is made of.
//!
//! A build of millions of chunks must stay small, so a row is 56 bytes: the chunk's number in its
//! blob follows from its id, since the chunks of one blob have consecutive ids, and decoded
//! offsets are kept in blocks. Rows live in segments, so that growing never copies them.

use rafs::format::features::ChunkFlags;
use rafs::format::limits::{BLOCK_SIZE, MAX_BLOB_COMPRESSED, MAX_BLOB_DECODED, MAX_CHUNKS};
use storage::cipher::XtsKey;
use storage::digest::Digest;
use storage::ids::ChunkIndex;

use crate::content::{ChunkId, ChunkRow, ChunkSource};
use crate::tree::{FileId, LayerIndex};
use crate::{Error, ErrorKind, Result};

/// All that is known of a stored chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Digest of the decoded bytes.
    pub digest: Digest,
    /// CRC-32C of the decoded bytes; 0 means "none" in the format, so a CRC that happens to be 0
    /// is written without its flag.
    pub crc32: u32,
    /// The layer whose blob holds it.
    pub layer: LayerIndex,
    /// Its number in that blob.
    pub index: ChunkIndex,
    /// First stored byte in the blob.
    pub compressed_offset: u64,
    /// Stored bytes; equal to `uncompressed_size` if the chunk is stored as it is.
    pub compressed_size: u32,
    /// First byte in the blob's decoded space, a multiple of 4096.
    pub uncompressed_offset: u64,
    /// Decoded bytes, 1 to the chunk size.
    pub uncompressed_size: u32,
}

impl Chunk {
    /// True if the stored bytes are compressed.
    pub fn is_compressed(&self) -> bool {
        self.compressed_size != self.uncompressed_size
    }
}

/// What has to be decoded to have a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredUnit {
    /// The layer whose blob holds it.
    pub layer: LayerIndex,
    /// Where it begins in the blob.
    pub start: u64,
    /// Stored and decoded bytes; equal if it is stored as it is.
    pub stored: u32,
    pub decoded: u32,
    /// Where the chunk begins in the decoded unit, and its bytes.
    pub offset: u32,
    pub len: u32,
}

struct Row {
    digest: Digest,
    crc32: u32,
    compressed_size: u32,
    uncompressed_size: u32,
    /// In units of 4096 bytes, or of 512 where the source is the decoded space.
    uncompressed_block: u32,
    compressed_offset: u64,
}
const _: () = assert!(size_of::<Row>() == 56);

/// Bytes of a block of a tar.
const TAR_BLOCK: u64 = 512;

/// Rows in one segment: 8192 × 56 bytes, just under half a MiB.
const SEGMENT_ROWS: usize = 1 << 13;

/// What the store knows of one layer's blob.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    first: u32,
    count: u32,
    /// Place of its blob among the blobs of the build, if it has one.
    blob: u32,
    decoded_end: u64,
    stored_end: u64,
    /// Units of several chunks so far.
    units: u32,
}

/// A chunk that shares its unit with others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub id: ChunkId,
    /// Number of its unit in the blob.
    pub unit: u32,
    /// Stored and decoded bytes of the unit.
    pub stored: u32,
    pub decoded: u32,
    /// Where the unit begins in the blob.
    pub start: u64,
    /// Where the chunk begins in the decoded unit.
    pub offset: u32,
}

/// Every distinct chunk of the build, ordered by layer, then by place in the layer's blob.
#[derive(Default)]
pub struct ChunkStore {
    /// Chunks lie at multiples of 512 bytes of a plain tar.
    in_tar: bool,
    /// Chunks lie in a gzip file: in slices of it, or in members of their own.
    in_gzip: bool,
    /// Stored bytes are encrypted, which makes less than a cipher block longer.
    is_encrypted: bool,
    /// By layer: small chunks that share units, in order of their numbers.
    members: Vec<Vec<Member>>,
    /// The number of the first chunk: those below have the numbers before.
    base: u32,
    segments: Vec<Vec<Row>>,
    len: u32,
    spans: Vec<Span>,
}

impl ChunkStore {
    /// Number of distinct chunks.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// True if no file had data.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of layers, those without chunks included.
    pub fn layer_count(&self) -> usize {
        self.spans.len()
    }

    /// The chunk `id`, which came from this store.
    pub fn get(&self, id: ChunkId) -> Chunk {
        let row = self.row(id);
        // The last layer that starts at or before the id; layers without chunks start where the
        // next one does and are passed over.
        let layer = self.spans.partition_point(|span| span.first <= id.0) - 1;
        Chunk {
            digest: row.digest,
            crc32: row.crc32,
            layer: LayerIndex(layer as u16),
            index: ChunkIndex(id.0 - self.spans[layer].first),
            compressed_offset: row.compressed_offset,
            compressed_size: row.compressed_size,
            uncompressed_offset: u64::from(row.uncompressed_block)
                * if self.in_tar { TAR_BLOCK } else { BLOCK_SIZE },
            uncompressed_size: row.uncompressed_size,
        }
    }

    /// Digest of the chunk `id`, without the rest.
    pub fn digest(&self, id: ChunkId) -> &Digest {
        &self.row(id).digest
    }

    /// The chunks of one layer's blob, in blob order.
    pub fn of_layer(&self, layer: LayerIndex) -> impl ExactSizeIterator<Item = ChunkId> + Clone + use<> {
        let span = self.span(layer);
        (span.first..span.first + span.count).map(ChunkId)
    }

    /// Place of a layer's blob among the blobs of the build; `None` if the layer stores no chunk.
    pub fn blob_index(&self, layer: LayerIndex) -> Option<u32> {
        let span = self.span(layer);
        (span.count > 0).then_some(span.blob)
    }

    /// Length of the decoded space of one layer's blob, a multiple of 4096.
    pub fn decoded_size(&self, layer: LayerIndex) -> u64 {
        self.span(layer).decoded_end
    }

    /// Where the chunk data of one layer's blob ends in the file that holds it.
    pub fn stored_size(&self, layer: LayerIndex) -> u64 {
        self.span(layer).stored_end
    }

    /// Opens the next layer: chunks pushed from now on belong to its blob.
    /// The data of that blob begins at byte `start` of the file that holds it.
    pub(crate) fn open_layer(&mut self, start: u64) {
        let blob = self.spans.last().map_or(0, |last| last.blob + u32::from(last.count > 0));
        self.spans.push(Span { first: self.base + self.len, blob, stored_end: start, ..Span::default() });
    }

    /// Adds a chunk to the blob of the layer opened last and gives it its place in the decoded
    /// space; where it is stored follows with [`Self::set_stored`].
    pub(crate) fn push(&mut self, digest: Digest, crc32: u32, uncompressed_size: u32) -> Result<ChunkId> {
        let limit = |what: String| Error::new(ErrorKind::Limit, what);
        if self.base.checked_add(self.len).is_none_or(|next| next == u32::MAX) {
            return Err(limit("more than 2^32 distinct chunks; use a larger chunk size".into()));
        }
        let span = self.spans.last_mut().expect("a layer is opened before chunks are pushed");
        if span.count >= MAX_CHUNKS {
            return Err(limit(format!("a blob of more than {MAX_CHUNKS} chunks; use a larger chunk size")));
        }
        let start = span.decoded_end;
        let end = (start + u64::from(uncompressed_size)).next_multiple_of(BLOCK_SIZE);
        if end > MAX_BLOB_DECODED {
            return Err(limit("a blob of more than 2^44 decoded bytes; split the layer".into()));
        }
        span.decoded_end = end;
        span.count += 1;
        let id = ChunkId(self.base + self.len);
        if (self.len as usize).is_multiple_of(SEGMENT_ROWS) {
            self.segments.push(Vec::with_capacity(SEGMENT_ROWS));
        }
        self.segments.last_mut().expect("pushed above").push(Row {
            digest,
            crc32,
            compressed_size: 0,
            uncompressed_size,
            // Below 2^44 / 2^12.
            uncompressed_block: (start / BLOCK_SIZE) as u32,
            compressed_offset: 0,
        });
        self.len += 1;
        Ok(id)
    }

    /// Adds a chunk that stays at byte `origin` of the plain tar that is the decoded space.
    pub(crate) fn push_at(&mut self, digest: Digest, crc32: u32, len: u32, origin: u64) -> Result<ChunkId> {
        let block = u32::try_from(origin / TAR_BLOCK).ok().filter(|_| origin.is_multiple_of(TAR_BLOCK));
        let block = block.ok_or_else(|| {
            Error::new(
                ErrorKind::Limit,
                format!("data at byte {origin}: only 2^32 blocks of 512 bytes can be referred to"),
            )
        })?;
        let id = self.push(digest, crc32, len)?;
        self.in_tar = true;
        self.set_origin(id, origin);
        self.row_mut(id).uncompressed_block = block;
        Ok(id)
    }

    /// Records that chunk `id` stays at byte `origin` of the decoded source.
    pub(crate) fn set_origin(&mut self, id: ChunkId, origin: u64) {
        let row = self.row_mut(id);
        row.compressed_offset = origin;
        row.compressed_size = row.uncompressed_size;
    }

    /// Replaces the place of every chunk in the decoded source by what `place` makes of place and
    /// length: about where it lies in the gzip file, and how long that is.
    pub(crate) fn place_in_slices(&mut self, place: impl Fn(u64, u32) -> (u64, u32)) {
        self.in_gzip = true;
        for row in self.segments.iter_mut().flatten() {
            (row.compressed_offset, row.compressed_size) =
                place(row.compressed_offset, row.uncompressed_size);
        }
    }

    /// Records that chunk `id` is the beginning of a member of a gzip file.
    pub(crate) fn set_member(&mut self, id: ChunkId, offset: u64, stored: u32) {
        self.in_gzip = true;
        let row = self.row_mut(id);
        row.compressed_offset = offset;
        row.compressed_size = stored;
    }

    /// Records that `id`, the next chunk of `layer` to be stored, takes `compressed_size` bytes.
    pub(crate) fn set_stored(&mut self, layer: LayerIndex, id: ChunkId, compressed_size: u32) -> Result<()> {
        let span = &mut self.spans[usize::from(layer.0)];
        let offset = span.stored_end;
        span.stored_end += u64::from(compressed_size);
        if span.stored_end > MAX_BLOB_COMPRESSED {
            return Err(Error::new(ErrorKind::Limit, "a blob of more than 2^40 bytes; split the layer"));
        }
        let row = self.row_mut(id);
        row.compressed_offset = offset;
        row.compressed_size = compressed_size;
        Ok(())
    }

    /// Records that the next stored bytes of `layer` are a unit that several chunks share.
    pub(crate) fn set_unit(
        &mut self,
        layer: LayerIndex,
        stored: u32,
        decoded: u32,
        members: &[(ChunkId, u32)],
    ) -> Result<()> {
        let span = &mut self.spans[usize::from(layer.0)];
        let (start, unit) = (span.stored_end, span.units);
        span.units += 1;
        span.stored_end += u64::from(stored);
        if span.stored_end > MAX_BLOB_COMPRESSED {
            return Err(Error::new(ErrorKind::Limit, "a blob of more than 2^40 bytes; split the layer"));
        }
        let layer = usize::from(layer.0);
        if self.members.len() <= layer {
            self.members.resize_with(layer + 1, Vec::new);
        }
        self.members[layer].extend(members.iter().map(|&(id, offset)| Member {
            id,
            unit,
            stored,
            decoded,
            start,
            offset,
        }));
        Ok(())
    }

    /// The chunks of `layer` that share units, in order of their numbers.
    pub(crate) fn members(&self, layer: LayerIndex) -> &[Member] {
        self.members.get(usize::from(layer.0)).map_or(&[], Vec::as_slice)
    }

    /// Where the bytes of chunk `id` are stored.
    pub(crate) fn stored_unit(&self, id: ChunkId) -> StoredUnit {
        let chunk = self.get(id);
        let members = self.members(chunk.layer);
        let (start, stored, decoded, offset) = match members.binary_search_by_key(&id.0, |member| member.id.0)
        {
            Ok(place) => {
                let Member { start, stored, decoded, offset, .. } = members[place];
                (start, stored, decoded, offset)
            }
            Err(_) => (chunk.compressed_offset, chunk.compressed_size, chunk.uncompressed_size, 0),
        };
        StoredUnit { layer: chunk.layer, start, stored, decoded, offset, len: chunk.uncompressed_size }
    }

    /// Numbers chunks from `base` on.
    pub(crate) fn number_from(&mut self, base: u32) {
        self.base = base;
    }

    /// Says that stored bytes are encrypted.
    pub(crate) fn encrypted(&mut self) {
        self.is_encrypted = true;
    }

    /// Digest and decoded length: what makes two chunks the same.
    pub(crate) fn key(&self, id: u32) -> (&Digest, u32) {
        let row = self.row(ChunkId(id));
        (&row.digest, row.uncompressed_size)
    }

    fn row_mut(&mut self, id: ChunkId) -> &mut Row {
        let place = (id.0 - self.base) as usize;
        &mut self.segments[place / SEGMENT_ROWS][place % SEGMENT_ROWS]
    }

    fn row(&self, id: ChunkId) -> &Row {
        let place = (id.0 - self.base) as usize;
        &self.segments[place / SEGMENT_ROWS][place % SEGMENT_ROWS]
    }

    fn span(&self, layer: LayerIndex) -> Span {
        self.spans.get(usize::from(layer.0)).copied().unwrap_or_default()
    }
}

/// One file of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileRow {
    /// First of its chunks among the layer's chunk references.
    pub first: u32,
    /// Bytes of the file.
    pub size: u64,
}

/// The files of one layer in stream order.
#[derive(Default)]
pub(crate) struct LayerFiles {
    pub files: Vec<FileRow>,
    pub refs: Vec<ChunkId>,
}

/// Which chunks each file is made of.
#[derive(Default)]
pub struct FileChunks {
    pub(crate) layers: Vec<LayerFiles>,
}

impl FileChunks {
    /// Bytes of the file `id`, which came from the same build.
    pub fn size(&self, id: FileId) -> u64 {
        self.layers[usize::from(id.layer.0)].files[id.index as usize].size
    }

    /// Its chunks in file order: `div_ceil(size, chunk size)` of them, none for an empty file.
    pub fn chunks(&self, id: FileId) -> &[ChunkId] {
        let layer = &self.layers[usize::from(id.layer.0)];
        let first = layer.files[id.index as usize].first as usize;
        let end = layer.files.get(id.index as usize + 1).map_or(layer.refs.len(), |next| next.first as usize);
        &layer.refs[first..end]
    }

    /// Number of files of one layer.
    pub fn file_count(&self, layer: LayerIndex) -> usize {
        self.layers.get(usize::from(layer.0)).map_or(0, |l| l.files.len())
    }
}

/// All content of a build, as the writers of bootstraps and blobs want it.
#[derive(Default)]
pub struct BuiltContent {
    /// Every distinct chunk and where it is stored.
    pub chunks: ChunkStore,
    /// Which chunks each file is made of.
    pub files: FileChunks,
}

impl ChunkSource for BuiltContent {
    fn file_chunks(&self, file: FileId) -> &[ChunkId] {
        self.files.chunks(file)
    }

    fn row(&self, id: ChunkId) -> ChunkRow {
        let chunk = self.chunks.get(id);
        let mut flags = ChunkFlags::empty();
        // A member of a unit has no place of its own, and its record says nothing of it.
        let is_member = chunk.compressed_size == 0;
        let plain = match self.chunks.is_encrypted {
            true => XtsKey::sealed_len(chunk.uncompressed_size as usize) as u32,
            false => chunk.uncompressed_size,
        };
        let compressed = self.chunks.in_gzip || chunk.compressed_size < plain;
        flags.set(ChunkFlags::COMPRESSED, !is_member && compressed);
        flags.set(ChunkFlags::ENCRYPTED, self.chunks.is_encrypted);
        flags.set(ChunkFlags::HAS_CRC32, chunk.crc32 != 0);
        ChunkRow {
            digest: chunk.digest,
            blob: self.chunks.span(chunk.layer).blob,
            index: chunk.index.0,
            flags: flags.bits(),
            compressed_offset: chunk.compressed_offset,
            compressed_size: chunk.compressed_size,
            uncompressed_size: chunk.uncompressed_size,
            uncompressed_offset: chunk.uncompressed_offset,
            crc32: chunk.crc32,
        }
    }

    fn chunk_count(&self) -> usize {
        self.chunks.len()
    }
}

/// The content of a single layer with its chunks one directly behind the other in the decoded
/// space, as RAFS v5 has them. 8 bytes a chunk.
pub struct PackedContent<'a> {
    content: &'a BuiltContent,
    /// Decoded offsets by chunk.
    offsets: Vec<u64>,
    /// Length of the decoded space.
    pub size: u64,
}

impl<'a> PackedContent<'a> {
    /// Packs `chunks`, which are all of `content` in blob order.
    pub fn new(content: &'a BuiltContent, chunks: impl ExactSizeIterator<Item = ChunkId>) -> Self {
        let mut size = 0;
        let mut offsets = Vec::with_capacity(chunks.len());
        for id in chunks {
            offsets.push(size);
            size += u64::from(content.row(id).uncompressed_size);
        }
        Self { content, offsets, size }
    }
}

impl ChunkSource for PackedContent<'_> {
    fn file_chunks(&self, file: FileId) -> &[ChunkId] {
        self.content.file_chunks(file)
    }

    fn row(&self, id: ChunkId) -> ChunkRow {
        let row = self.content.row(id);
        ChunkRow { uncompressed_offset: self.offsets[row.index as usize], ..row }
    }

    fn chunk_count(&self) -> usize {
        self.content.chunk_count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_know_their_layer_even_beside_empty_ones() {
        let mut store = ChunkStore::default();
        let mut want = Vec::new();
        for (layer, count) in [0u32, 3, 0, 0, 2, SEGMENT_ROWS as u32, 0].into_iter().enumerate() {
            store.open_layer(0);
            for index in 0..count {
                let id = store.push(Digest([layer as u8; 32]), 7, 4097).unwrap();
                store.set_stored(LayerIndex(layer as u16), id, 10).unwrap();
                want.push((layer as u16, index));
            }
        }
        assert_eq!((store.len(), store.layer_count()), (want.len(), 7));
        for (id, (layer, index)) in want.into_iter().enumerate() {
            let chunk = store.get(ChunkId(id as u32));
            assert_eq!((chunk.layer.0, chunk.index.0), (layer, index));
            assert_eq!(chunk.uncompressed_offset, u64::from(index) * 8192);
            assert_eq!(chunk.compressed_offset, u64::from(index) * 10);
            assert_eq!(chunk.digest.0[0], layer as u8);
        }
        assert_eq!(store.decoded_size(LayerIndex(4)), 2 * 8192);
        assert_eq!(store.of_layer(LayerIndex(4)).collect::<Vec<_>>(), [ChunkId(3), ChunkId(4)]);
        assert_eq!(store.of_layer(LayerIndex(6)).len(), 0);
        let blobs: Vec<_> = (0..7).map(|layer| store.blob_index(LayerIndex(layer))).collect();
        assert_eq!(blobs, [None, Some(0), None, None, Some(1), Some(2), None]);
    }
}
