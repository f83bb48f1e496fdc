//! A tree and its chunks in, the bytes of a bootstrap out.
//!
//! ```text
//! 0        1024       1152        1408                         meta_blkaddr·4096
//! | zeros  | superblk | extended  | device slots | pad | blob table | prefetch | pad
//! | unused block | inodes, xattrs, chunk indexes, directory and symlink blocks | pad | chunk-info table | pad |
//! ```
//!
//! Blobs are numbered in the order in which the tree first uses them; a blob that nothing
//! uses any more does not appear.

use rafs::bootstrap::Buffer;
use rafs::format::blob_table::BlobRecord;
use rafs::format::chunk::ChunkInfo;
use rafs::format::dirent::{self, Dirent};
use rafs::format::features::{BlobFeatures, ImageFlags};
use rafs::format::inode::{self, ChunkIndexRecord, ExtendedInode};
use rafs::format::limits;
use rafs::format::superblock::{self, DeviceSlot, ExtSuperblock, Superblock};
use rafs::format::xattr::{self, XattrEntry, XattrHeader};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::content::{ChunkId, ChunkSource};
use crate::layout::{self, Entry, Geometry, Layout};
use crate::tree::{Children, Content, Inode, InodeId, Tree, split_xattr};
use crate::{Error, Result};

const BLOCK: u64 = limits::BLOCK_SIZE;

/// Everything a bootstrap is made of.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    /// The tree.
    pub tree: &'a Tree,
    /// Chunks of its files.
    pub chunks: &'a dyn ChunkSource,
    /// The blobs that [`crate::content::ChunkRow::blob`] counts in, `blob_index` not yet set.
    pub blobs: &'a [BlobRecord],
    /// Chunk size.
    pub chunk_size: u32,
    /// Default compressor, a superblock flag.
    pub codec: Codec,
    /// Digest algorithm, a superblock flag.
    pub digester: DigestAlgorithm,
    /// False if owners are meaningless and stored as 0 (`--repeatable`).
    pub explicit_ids: bool,
    /// The data is a plain tar: blocks of 512 bytes.
    pub tarfs: bool,
    /// Set the xattr flag even if no inode has any, as merged bootstraps do.
    pub force_xattr_flag: bool,
    /// Places of the blobs that are listed first, in this order, whether files use them or not.
    pub kept: &'a [usize],
    /// Inodes of the prefetch table, in order.
    pub prefetch: &'a [InodeId],
    /// RAFS v5: stored bytes of prefetch files at the start of each of [`Image::blobs`]; 0 where there
    /// is none.
    pub prefetch_sizes: &'a [u32],
}

impl Image<'_> {
    fn block_bits(&self) -> u8 {
        if self.tarfs { limits::TARFS_BLOCK_BITS } else { limits::BLOCK_BITS }
    }

    fn block_size(&self) -> u64 {
        1 << self.block_bits()
    }
}

/// A finished bootstrap.
#[derive(Debug)]
pub struct Bootstrap {
    /// Its bytes, a multiple of 4096.
    pub bytes: Buffer,
    /// Row of the blob table → place in [`Image::blobs`].
    pub blobs: Vec<usize>,
    /// Directory entries with root, hard links counted each.
    pub entry_count: u64,
}

/// Writes the bootstrap of `image`.
///
/// # Errors
/// `Limit`: more than 254 blobs, or an address does not fit its field. `Corrupt`: a file has
/// not as many chunks as its size says. `Invalid`: hard links of the tree are not resolved.
pub fn write(image: &Image<'_>) -> Result<Bootstrap> {
    if image.tree.has_open_links() {
        return Err(Error::invalid(
            "hard links to layers below are to be resolved before a bootstrap is written",
        ));
    }
    let numbering = Numbering::of(image)?;
    let table_offset =
        (superblock::DEVICE_TABLE_OFFSET as u64 + 128 * numbering.order.len() as u64).next_multiple_of(BLOCK);
    let table_size = 256 * numbering.order.len() as u64;
    let prefetch_offset = table_offset + table_size;
    let prefetch_size = 4 * image.prefetch.len() as u64;
    let meta_offset = if table_size + prefetch_size == 0 {
        0
    } else {
        (prefetch_offset + prefetch_size).next_multiple_of(BLOCK)
    };
    let block = image.block_size();
    let geometry = Geometry { block_size: block, chunk_size: image.chunk_size, meta_offset };
    let layout = layout::lay_out(image.tree, &geometry)?;

    let chunk_table_offset = (meta_offset + layout.area_size).next_multiple_of(BLOCK);
    let chunk_table_size = (size_of::<ChunkInfo>() * numbering.used().count()) as u64;
    let end = (chunk_table_offset + chunk_table_size).next_multiple_of(BLOCK);
    if end > limits::MAX_BOOTSTRAP_SIZE {
        return Err(Error::limit(format!(
            "a bootstrap of {end} bytes, readers accept {}; use a larger chunk size",
            limits::MAX_BOOTSTRAP_SIZE
        )));
    }
    let mut out = Output { bytes: Buffer::zeroed(end as usize) };

    let mut features = BlobFeatures::INLINED_CHUNK_DIGEST.bits();
    let (mut blocks, mut device_position) = (0u64, end);
    for (row, &source) in numbering.order.iter().enumerate() {
        let mut record = image.blobs[source];
        record.blob_index = U32::new(row as u32);
        features &= record.features.get();
        let blob_blocks = record.uncompressed_size.get() / block;
        let mapped = device_position.next_multiple_of(limits::MAPPED_ALIGNMENT) / block;
        device_position = (mapped + blob_blocks) * block;
        blocks += blob_blocks;
        let mut slot = DeviceSlot::new_zeroed();
        slot.tag = record.blob_id;
        slot.blocks = block_number(blob_blocks)?;
        slot.mapped_blkaddr = block_number(mapped)?;
        out.put(superblock::DEVICE_TABLE_OFFSET as u64 + 128 * row as u64, &slot);
        out.put(table_offset + 256 * row as u64, &record);
    }
    for (n, &id) in image.prefetch.iter().enumerate() {
        let nid = layout.place(id).slot;
        out.put(prefetch_offset + 4 * n as u64, &U32::new(nid));
    }

    let mut sb = Superblock::new_zeroed();
    sb.magic = U32::new(superblock::EROFS_MAGIC);
    sb.feature_compat = U32::new(superblock::COMPAT_RAFS_V6);
    sb.blkszbits = image.block_bits();
    sb.root_nid = U16::new(limits::ROOT_NID as u16);
    sb.inos = U64::new(u64::from(layout.entry_count));
    sb.blocks = block_number(blocks)?;
    sb.meta_blkaddr = block_number(meta_offset / block)?;
    sb.feature_incompat = U32::new(superblock::INCOMPAT);
    sb.extra_devices = U16::new(numbering.order.len() as u16);
    sb.devt_slotoff = U16::new(superblock::DEVT_SLOTOFF);
    out.put(superblock::SUPERBLOCK_OFFSET as u64, &sb);

    let digests_inline = features & BlobFeatures::INLINED_CHUNK_DIGEST.bits() != 0;
    let is_encrypted = |&blob: &usize| image.blobs[blob].features.get() & BlobFeatures::ENCRYPTED.bits() != 0;
    let encrypted = numbering.order.iter().any(is_encrypted);
    let mut ext = ExtSuperblock::new_zeroed();
    ext.flags = U64::new(flags(image, digests_inline, encrypted).bits());
    ext.blob_table_offset = U64::new(table_offset);
    ext.blob_table_size = U32::new(table_size as u32);
    ext.chunk_size = U32::new(image.chunk_size);
    ext.chunk_table_offset = U64::new(chunk_table_offset);
    ext.chunk_table_size = U64::new(chunk_table_size);
    if prefetch_size > 0 {
        ext.prefetch_table_offset = U64::new(prefetch_offset);
        ext.prefetch_table_size = U32::new(prefetch_size as u32);
    }
    out.put(superblock::EXT_SUPERBLOCK_OFFSET as u64, &ext);

    InodeWriter { image, layout: &layout, numbering: &numbering, meta_offset, out: &mut out }.run()?;
    numbering.fill(image, &mut out.bytes[chunk_table_offset as usize..][..chunk_table_size as usize]);
    Ok(Bootstrap { bytes: out.bytes, blobs: numbering.order, entry_count: u64::from(layout.entry_count) })
}

/// A blob id, at most 64 bytes, as records hold it.
pub fn padded_id(id: &str) -> [u8; 64] {
    let mut out = [0; 64];
    let len = id.len().min(out.len());
    out[..len].copy_from_slice(&id.as_bytes()[..len]);
    out
}

fn block_number(blocks: u64) -> Result<U32> {
    u32::try_from(blocks).map(U32::new).map_err(|_| {
        Error::limit(format!("{blocks} blocks of file data in one image, 2^32 - 1 can be addressed"))
    })
}

/// Superblock flags of `image`.
pub(crate) fn flags(image: &Image<'_>, digests_inline: bool, encrypted: bool) -> ImageFlags {
    let mut flags = match encrypted {
        true => ImageFlags::ENCRYPTION_AES_128_XTS,
        false => ImageFlags::ENCRYPTION_NONE,
    };
    flags |= match image.codec {
        Codec::None => ImageFlags::COMPRESSION_NONE,
        Codec::Lz4Block => ImageFlags::COMPRESSION_LZ4,
        Codec::Gzip => ImageFlags::COMPRESSION_GZIP,
        Codec::Zstd => ImageFlags::COMPRESSION_ZSTD,
    };
    flags |= match image.digester {
        DigestAlgorithm::Blake3 => ImageFlags::HASH_BLAKE3,
        DigestAlgorithm::Sha256 => ImageFlags::HASH_SHA256,
    };
    flags.set(ImageFlags::TARFS_MODE, image.tarfs);
    flags.set(ImageFlags::EXPLICIT_UID_GID, image.explicit_ids);
    flags.set(ImageFlags::INLINED_CHUNK_DIGEST, digests_inline);
    let mut has_xattr = image.force_xattr_flag;
    // The visitor never fails, so neither does the walk.
    let _ = layout::in_number_order(image.tree, |id| {
        has_xattr |= !image.tree.inode(id).metadata.xattrs.is_empty();
        Ok(())
    });
    flags.set(ImageFlags::HAS_XATTR, has_xattr);
    flags
}

/// Numbers of blobs in this image, and which chunks it uses.
pub(crate) struct Numbering {
    /// Row of the table → place in `Image::blobs`.
    pub(crate) order: Vec<usize>,
    /// The reverse; `u32::MAX` for unused blobs.
    rows: Vec<u32>,
    /// By chunk: offset in the last file that uses it; `u64::MAX` for unused chunks.
    file_offsets: Vec<u64>,
}

impl Numbering {
    pub(crate) fn of(image: &Image<'_>) -> Result<Self> {
        let mut this = Self {
            order: Vec::new(),
            rows: vec![u32::MAX; image.blobs.len()],
            file_offsets: vec![u64::MAX; image.chunks.chunk_count()],
        };
        for &blob in image.kept {
            this.list(blob, image.blobs.len())?;
        }
        layout::in_number_order(image.tree, |id| this.file(image, image.tree.inode(id)))?;
        Ok(this)
    }

    fn file(&mut self, image: &Image<'_>, inode: &Inode) -> Result<()> {
        let Content::Regular { file, size } = inode.content else { return Ok(()) };
        let chunks = image.chunks.file_chunks(file);
        if chunks.len() as u64 != layout::chunk_count(size, image.chunk_size) {
            return Err(Error::bad_source(format!(
                "a file of {size} bytes came with {} chunks of {}",
                chunks.len(),
                image.chunk_size
            )));
        }
        for (position, &chunk) in chunks.iter().enumerate() {
            self.file_offsets[chunk.0 as usize] = position as u64 * u64::from(image.chunk_size);
            let blob = image.chunks.row(chunk).blob as usize;
            self.list(blob, image.blobs.len())?;
        }
        Ok(())
    }

    /// Gives a blob the next row, unless it has one.
    fn list(&mut self, blob: usize, count: usize) -> Result<()> {
        let row = self
            .rows
            .get_mut(blob)
            .ok_or_else(|| Error::bad_source(format!("a chunk names blob {blob} of {count}")))?;
        if *row == u32::MAX {
            if self.order.len() == limits::MAX_BLOBS {
                return Err(Error::limit(format!(
                    "more than {} blobs in one image; merge layers first",
                    limits::MAX_BLOBS
                )));
            }
            *row = self.order.len() as u32;
            self.order.push(blob);
        }
        Ok(())
    }

    /// Chunks that files use, with the offset in the last file that does.
    pub(crate) fn used(&self) -> impl Iterator<Item = (ChunkId, u64)> {
        let all = (0u32..).map(ChunkId).zip(self.file_offsets.iter().copied());
        all.filter(|&(_, offset)| offset != u64::MAX)
    }

    /// The record of a used chunk, for byte `file_offset` of a file.
    pub(crate) fn record(&self, image: &Image<'_>, id: ChunkId, file_offset: u64) -> ChunkInfo {
        let row = image.chunks.row(id);
        ChunkInfo {
            digest: row.digest.0,
            blob_index: U32::new(self.rows[row.blob as usize]),
            flags: U32::new(row.flags),
            compressed_size: U32::new(row.compressed_size),
            uncompressed_size: U32::new(row.uncompressed_size),
            compressed_offset: U64::new(row.compressed_offset),
            uncompressed_offset: U64::new(row.uncompressed_offset),
            file_offset: U64::new(file_offset),
            index: U32::new(row.index),
            crc32: U32::new(row.crc32),
        }
    }

    /// Fills the chunk-info table: used chunks by digest, blob and number. Equal ones of a blob keep a
    /// record each, for a file refers to one of them. `table` has room for all of them.
    fn fill(&self, image: &Image<'_>, table: &mut [u8]) {
        // Records are made of bytes, so every length divides, and every place is aligned.
        let Ok(records) = <[ChunkInfo]>::mut_from_bytes(table) else { return };
        for (place, (id, file_offset)) in records.iter_mut().zip(self.used()) {
            *place = self.record(image, id, file_offset);
        }
        records.sort_unstable_by_key(|r| (r.digest, r.blob_index.get(), r.index.get()));
    }
}

/// A bootstrap of either version in the making. Positions were computed before and lie inside.
pub(crate) struct Output {
    pub bytes: Buffer,
}

impl Output {
    pub fn put(&mut self, offset: u64, record: &(impl IntoBytes + Immutable + ?Sized)) {
        let bytes = record.as_bytes();
        self.bytes[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }
}

struct InodeWriter<'a> {
    image: &'a Image<'a>,
    layout: &'a Layout,
    numbering: &'a Numbering,
    meta_offset: u64,
    out: &'a mut Output,
}

impl InodeWriter<'_> {
    fn run(mut self) -> Result<()> {
        let tree = self.image.tree;
        // Each directory with its parent; files are written when their directory is.
        let mut stack = vec![(tree.root(), tree.root())];
        while let Some((dir, parent)) = stack.pop() {
            let Some(children) = tree.inode(dir).children() else { continue };
            self.directory(dir, parent, children);
            for &id in children.values() {
                match &tree.inode(id).content {
                    Content::Directory(_) => stack.push((id, dir)),
                    Content::Regular { .. } => self.regular(id)?,
                    Content::Symlink(target) => self.with_data(id, target),
                    other => {
                        let rdev = other.rdev();
                        self.inode(id, inode::LAYOUT_FLAT_PLAIN, 0, rdev);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes inode and xattrs; returns the byte behind them.
    fn inode(&mut self, id: InodeId, data_layout: u16, size: u64, i_u: u32) -> u64 {
        let (source, place) = (self.image.tree.inode(id), self.layout.place(id));
        let meta = &source.metadata;
        let area = meta.xattrs.area_size();
        let mut record = ExtendedInode::new_zeroed();
        record.i_format = U16::new(inode::extended_format(data_layout));
        record.i_xattr_icount = U16::new(xattr::icount(area) as u16);
        record.i_mode = U16::new(source.mode() as u16);
        record.i_size = U64::new(size);
        record.i_u = U32::new(i_u);
        record.i_ino = U32::new(place.ino);
        if self.image.explicit_ids {
            record.i_uid = U32::new(meta.uid);
            record.i_gid = U32::new(meta.gid);
        }
        // Two's complement, so that times before 1970 survive.
        record.i_mtime = U64::new(meta.mtime.cast_unsigned());
        record.i_mtime_nsec = U32::new(meta.mtime_nsec);
        record.i_nlink = U32::new(place.nlink);
        let at = self.meta_offset + place.offset();
        self.out.put(at, &record);
        let mut at = at + size_of::<ExtendedInode>() as u64;
        if area > 0 {
            self.out.put(at, &XattrHeader::new_zeroed());
            at += size_of::<XattrHeader>() as u64;
            for x in meta.xattrs.iter() {
                // `Xattrs::new` let nothing else in.
                let Some((index, suffix)) = split_xattr(&x.name) else { continue };
                let entry = XattrEntry {
                    name_len: suffix.len() as u8,
                    name_index: index,
                    value_size: U16::new(x.value.len() as u16),
                };
                self.out.put(at, &entry);
                self.out.put(at + size_of::<XattrEntry>() as u64, suffix);
                self.out.put(at + (size_of::<XattrEntry>() + suffix.len()) as u64, &*x.value);
                at += xattr::entry_size(suffix.len(), x.value.len()) as u64;
            }
        }
        at
    }

    /// Writes an inode whose data (entries, target) lies in the bootstrap.
    fn with_data(&mut self, id: InodeId, data: &[u8]) {
        let place = *self.layout.place(id);
        let data_layout = if place.inline { inode::LAYOUT_FLAT_INLINE } else { inode::LAYOUT_FLAT_PLAIN };
        let tail_at = self.inode(id, data_layout, data.len() as u64, place.block);
        let block = self.image.block_size();
        let head = if place.inline { data.len() - data.len() % block as usize } else { data.len() };
        if head > 0 {
            self.out.put(u64::from(place.block) * block, &data[..head]);
        }
        self.out.put(tail_at, &data[head..]);
    }

    fn directory(&mut self, dir: InodeId, parent: InodeId, children: &Children) {
        let entries = layout::entries(children);
        let block_size = self.image.block_size();
        let (counts, size) = layout::directory_blocks(&entries, block_size);
        let mut data = vec![0u8; size as usize];
        let mut rest = &entries[..];
        for (block, count) in counts.into_iter().enumerate() {
            let (here, later) = rest.split_at(count);
            rest = later;
            let start = block * block_size as usize;
            let mut name_at = count * size_of::<Dirent>();
            for (n, (name, entry)) in here.iter().enumerate() {
                let id = match entry {
                    Entry::This => dir,
                    Entry::Parent => parent,
                    Entry::Child(id) => *id,
                };
                let record = Dirent {
                    nid: U64::new(self.layout.place(id).nid()),
                    nameoff: U16::new(name_at as u16),
                    file_type: file_type(&self.image.tree.inode(id).content),
                    reserved: 0,
                };
                let at = start + n * size_of::<Dirent>();
                data[at..at + size_of::<Dirent>()].copy_from_slice(record.as_bytes());
                data[start + name_at..start + name_at + name.len()].copy_from_slice(name);
                name_at += name.len();
            }
        }
        self.with_data(dir, &data);
    }

    fn regular(&mut self, id: InodeId) -> Result<()> {
        let source = self.image.tree.inode(id);
        let Content::Regular { file, size } = source.content else { return Ok(()) };
        let chunks = self.image.chunks.file_chunks(file);
        let behind = self.inode(id, inode::LAYOUT_CHUNK_BASED, size, self.chunk_format(size, chunks));
        let mut at = behind.next_multiple_of(size_of::<ChunkIndexRecord>() as u64);
        for &chunk in chunks {
            let row = self.image.chunks.row(chunk);
            if row.index >= limits::MAX_CHUNKS {
                return Err(Error::limit(format!(
                    "chunk {} of a blob, at most {} are possible",
                    row.index,
                    limits::MAX_CHUNKS
                )));
            }
            let record = ChunkIndexRecord {
                index_low: U16::new(row.index as u16),
                // Below 254, see `Numbering`.
                device_id: self.numbering.rows[row.blob as usize] as u8 + 1,
                index_high: (row.index >> 16) as u8,
                blkaddr: block_number(row.uncompressed_offset / self.image.block_size())?,
            };
            self.out.put(at, &record);
            at += size_of::<ChunkIndexRecord>() as u64;
        }
        Ok(())
    }

    /// Chunk format of a file. If all its chunks lie one behind the other the kernel may take
    /// it as a single chunk (rafs-v6 section 6.1).
    fn chunk_format(&self, size: u64, chunks: &[ChunkId]) -> u32 {
        let row = |id: &ChunkId| self.image.chunks.row(*id);
        let chunk_size = u64::from(self.image.chunk_size);
        // Five bits: 2^31 blocks at most.
        let contiguous = chunks.len() > 1
            && size <= self.image.block_size() << 31
            && chunks.windows(2).all(|pair| {
                let (a, b) = (row(&pair[0]), row(&pair[1]));
                a.blob == b.blob && a.uncompressed_offset + chunk_size == b.uncompressed_offset
            });
        let span = if contiguous { size.next_power_of_two() } else { chunk_size };
        u32::from(inode::CHUNK_FORMAT_INDEXES) | (span.trailing_zeros() - u32::from(self.image.block_bits()))
    }
}

fn file_type(content: &Content) -> u8 {
    match content {
        Content::Regular { .. } => dirent::FT_REGULAR,
        Content::Directory(_) => dirent::FT_DIRECTORY,
        Content::Symlink(_) => dirent::FT_SYMLINK,
        Content::CharDevice { .. } => dirent::FT_CHAR,
        Content::BlockDevice { .. } => dirent::FT_BLOCK,
        Content::Fifo => dirent::FT_FIFO,
        Content::Socket => dirent::FT_SOCKET,
    }
}
