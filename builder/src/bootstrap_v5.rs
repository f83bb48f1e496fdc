//! A tree and its chunks in, the bytes of a RAFS v5 bootstrap out.
//!
//! ```text
//! 0            8192
//! | superblock | inode table | prefetch table | blob table | extended blob table | inode records … |
//! ```
//!
//! Every *name* has a slot and a whole record in it, a hard link too. Slots are given out as in
//! v6 inodes are numbered; the records lie in another order, each directory directly before all
//! that is below it.

use rafs::bootstrap::Buffer;
use rafs::format::chunk::ChunkInfo;
use rafs::format::features::{ChunkFlags, ImageFlags};
use rafs::format::limits::{MAX_BOOTSTRAP_SIZE, MAX_DEPTH};
use rafs::format::v5::{
    ALIGNMENT, ExtendedBlob, FLAG_SYMLINK, FLAG_XATTR, Inode as Record, MAGIC, SUPERBLOCK_SIZE, Superblock,
    VERSION,
};
use storage::codec::Codec;
use storage::digest::Digest;
use zerocopy::FromZeros;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use crate::bootstrap_writer::{Bootstrap, Image, Numbering, Output, flags};
use crate::layout;
use crate::tree::{Content, Inode, InodeId, Tree, Xattrs};
use crate::{Error, ErrorKind, Result};

/// Bytes of directory entries are counted in these.
const PAGE: u64 = 4096;

/// Writes the bootstrap of `image`, whose blobs are described as far as v5 goes.
///
/// # Errors
/// `Limit`: it would be larger than readers accept, or directories are nested too deep.
/// `Inconsistent`: compressed chunks of several compressors, for which v5 has one word.
/// `Corrupt`, `Invalid`: as [`crate::bootstrap_writer::write`].
pub fn write(image: &Image<'_>) -> Result<Bootstrap> {
    if image.tree.has_open_links() {
        return Err(Error::invalid(
            "hard links to layers below are to be resolved before a bootstrap is written",
        ));
    }
    let numbering = Numbering::of(image)?;
    let slots = Slots::of(image.tree)?;
    let (names, rows) = blob_tables(&numbering, image);
    let count = slots.by_slot.len() as u64;
    let prefetch_table = SUPERBLOCK_SIZE + a8(4 * count);
    let blob_table = prefetch_table + a8(4 * image.prefetch.len() as u64);
    let extended_table = blob_table + names.len() as u64;
    let first = extended_table + size_of_val(&rows[..]) as u64;
    let (offsets, end) = places(image, &slots, first)?;

    let mut out = Output { bytes: Buffer::zeroed(end as usize) };
    let mut sb = Superblock::new_zeroed();
    sb.magic = U32::new(MAGIC);
    sb.version = U32::new(VERSION);
    sb.sb_size = U32::new(SUPERBLOCK_SIZE as u32);
    sb.chunk_size = U32::new(image.chunk_size);
    let codec = one_codec(image, &numbering)?;
    let flags = flags(&Image { codec, force_xattr_flag: false, ..*image }, false, false);
    sb.flags = U64::new((flags - ImageFlags::ENCRYPTION_NONE).bits());
    sb.inodes_count = U64::new(slots.inodes);
    sb.inode_table_offset = U64::new(SUPERBLOCK_SIZE);
    sb.prefetch_table_offset = U64::new(prefetch_table);
    sb.blob_table_offset = U64::new(blob_table);
    sb.inode_table_entries = U32::new(count as u32);
    sb.prefetch_table_entries = U32::new(image.prefetch.len() as u32);
    sb.blob_table_size = U32::new(names.len() as u32);
    sb.extended_blob_table_entries = U32::new(rows.len() as u32);
    sb.extended_blob_table_offset = U64::new(extended_table);
    out.put(0, &sb);
    for (n, &offset) in offsets.iter().enumerate() {
        // Below 2^31, the largest bootstrap.
        out.put(SUPERBLOCK_SIZE + 4 * n as u64, &U32::new((offset / ALIGNMENT) as u32));
    }
    for (n, &id) in image.prefetch.iter().enumerate() {
        out.put(prefetch_table + 4 * n as u64, &U32::new(slots.numbers[id.0 as usize].ino));
    }
    out.put(blob_table, &names[..]);
    out.put(extended_table, &rows[..]);
    digests(image, &slots, &offsets, &mut out.bytes);
    Writer { image, slots: &slots, offsets: &offsets, numbering: &numbering, out: &mut out }.run();
    Ok(Bootstrap { bytes: out.bytes, blobs: numbering.order, entry_count: count })
}

/// `size` with the padding behind it.
fn a8(size: u64) -> u64 {
    size.next_multiple_of(ALIGNMENT)
}

/// Bytes of the pairs of an xattr area.
fn xattr_size(xattrs: &Xattrs) -> u64 {
    xattrs.iter().map(|x| 4 + x.name.len() as u64 + 1 + x.value.len() as u64).sum()
}

/// Bytes of the record of `inode` under a name of `name` bytes.
fn record_size(inode: &Inode, name: usize, chunk_size: u32) -> u64 {
    let xattrs = match xattr_size(&inode.metadata.xattrs) {
        0 => 0,
        size => 8 + a8(size),
    };
    let rest = match &inode.content {
        Content::Regular { size, .. } => {
            layout::chunk_count(*size, chunk_size).saturating_mul(size_of::<ChunkInfo>() as u64)
        }
        Content::Symlink(target) => a8(target.len() as u64),
        _ => 0,
    };
    (size_of::<Record>() as u64 + a8(name as u64) + xattrs).saturating_add(rest)
}

/// Blob table with its padding, and extended blob table.
fn blob_tables(numbering: &Numbering, image: &Image<'_>) -> (Vec<u8>, Vec<ExtendedBlob>) {
    let (mut names, mut rows) = (Vec::new(), Vec::with_capacity(numbering.order.len()));
    for &source in &numbering.order {
        let record = &image.blobs[source];
        if !names.is_empty() {
            names.push(0);
        }
        // Where prefetch files lie in the blob: from its start.
        names.extend_from_slice(&[0; 4]);
        names.extend_from_slice(&image.prefetch_sizes.get(source).copied().unwrap_or(0).to_le_bytes());
        names.extend(record.blob_id.iter().take_while(|&&byte| byte != 0));
        rows.push(ExtendedBlob {
            chunk_count: record.chunk_count,
            features: record.features,
            uncompressed_size: record.uncompressed_size,
            compressed_size: record.compressed_size,
            reserved: [0; 40],
        });
    }
    names.resize(names.len().next_multiple_of(ALIGNMENT as usize), 0);
    (names, rows)
}

/// The one compressor of all compressed chunks; the image's if there are none.
fn one_codec(image: &Image<'_>, numbering: &Numbering) -> Result<Codec> {
    let mut found: Option<Codec> = None;
    for (id, _) in numbering.used() {
        let row = image.chunks.row(id);
        if !ChunkFlags::from_bits_retain(row.flags).contains(ChunkFlags::COMPRESSED) {
            continue;
        }
        let blob = &image.blobs[row.blob as usize];
        let codec = rafs::bootstrap::codec(blob.compression_algo.get())?;
        if let Some(other) = found.filter(|&other| other != codec) {
            return Err(Error::new(
                ErrorKind::Inconsistent,
                format!(
                    "chunks compressed with {} and with {}: a RAFS v5 image has one compressor; build its layers with \
                     the same one, or use RAFS v6",
                    other.name(),
                    codec.name()
                ),
            ));
        }
        found = Some(codec);
    }
    Ok(found.unwrap_or(image.codec))
}

/// What is counted about an inode.
#[derive(Clone, Copy, Default)]
struct Number {
    /// Slot of its first name; 0 for inodes that the root does not reach.
    ino: u32,
    /// Link count.
    nlink: u32,
    /// Directories: slot of the first child.
    child_index: u32,
}

/// The numbering of a tree.
struct Slots {
    /// By [`InodeId`].
    numbers: Vec<Number>,
    /// The inode in slot n + 1.
    by_slot: Vec<InodeId>,
    /// Distinct inodes.
    inodes: u64,
}

impl Slots {
    fn of(tree: &Tree) -> Result<Self> {
        let mut this = Self {
            numbers: vec![Number::default(); tree.inode_count()],
            by_slot: vec![tree.root()],
            inodes: 1,
        };
        this.numbers[tree.root().0 as usize].ino = 1;
        let mut stack = vec![(tree.root(), 0)];
        while let Some((dir, depth)) = stack.pop() {
            if depth >= MAX_DEPTH {
                return Err(Error::limit(format!("directories nested deeper than {}", MAX_DEPTH - 1)));
            }
            let Some(children) = tree.inode(dir).children() else { continue };
            this.numbers[dir.0 as usize].child_index = this.by_slot.len() as u32 + 1;
            let mut directories = 0;
            for &id in children.values() {
                if this.by_slot.len() >= i32::MAX as usize {
                    return Err(Error::limit("more than 2147483647 directory entries in one image"));
                }
                this.by_slot.push(id);
                let number = &mut this.numbers[id.0 as usize];
                if number.ino == 0 {
                    number.ino = this.by_slot.len() as u32;
                    this.inodes += 1;
                }
                number.nlink += 1;
                directories += u32::from(tree.inode(id).is_dir());
            }
            this.numbers[dir.0 as usize].nlink = 2 + directories;
            let below = children.values().rev().filter(|&&id| tree.inode(id).is_dir());
            stack.extend(below.map(|&id| (id, depth + 1)));
        }
        Ok(this)
    }

    /// Calls `visit` with slot, name, inode and parent of every entry in the order of records: a
    /// directory directly before all that is below it.
    fn in_record_order(
        &self,
        tree: &Tree,
        mut visit: impl FnMut(u32, &[u8], InodeId, InodeId) -> Result<()>,
    ) -> Result<()> {
        visit(1, b"/", tree.root(), tree.root())?;
        let mut stack = Vec::new();
        let enter = |dir: InodeId, stack: &mut Vec<_>| {
            if let Some(children) = tree.inode(dir).children() {
                stack.push((dir, (self.numbers[dir.0 as usize].child_index..).zip(children.iter())));
            }
        };
        enter(tree.root(), &mut stack);
        while let Some((dir, rest)) = stack.last_mut() {
            let dir = *dir;
            let Some((slot, (name, &id))) = rest.next() else {
                stack.pop();
                continue;
            };
            visit(slot, name, id, dir)?;
            enter(id, &mut stack);
        }
        Ok(())
    }
}

/// The byte of the record in each slot, and the end of the file.
fn places(image: &Image<'_>, slots: &Slots, first: u64) -> Result<(Vec<u64>, u64)> {
    let mut offsets = vec![0; slots.by_slot.len()];
    let mut at = first;
    slots.in_record_order(image.tree, |slot, name, id, _| {
        offsets[slot as usize - 1] = at;
        at = at
            .checked_add(record_size(image.tree.inode(id), name.len(), image.chunk_size))
            .filter(|&end| end <= MAX_BOOTSTRAP_SIZE)
            .ok_or_else(|| {
                Error::limit(format!(
                    "the bootstrap would exceed {MAX_BOOTSTRAP_SIZE} bytes; use a larger chunk size or fewer files"
                ))
            })?;
        Ok(())
    })?;
    Ok((offsets, at))
}

/// Writes the digest of the inode in each slot into its record; children have higher slots than their
/// directory.
fn digests(image: &Image<'_>, slots: &Slots, offsets: &[u64], out: &mut [u8]) {
    let place = |slot: usize| {
        let start = offsets[slot] as usize + std::mem::offset_of!(Record, i_digest);
        start..start + size_of::<Digest>()
    };
    for (at, &id) in slots.by_slot.iter().enumerate().rev() {
        let mut hasher = image.digester.hasher();
        match &image.tree.inode(id).content {
            Content::Regular { file, .. } => {
                let chunks = image.chunks.file_chunks(*file);
                chunks.iter().for_each(|&chunk| hasher.update(&image.chunks.row(chunk).digest.0));
            }
            Content::Directory(children) => {
                let first = slots.numbers[id.0 as usize].child_index as usize - 1;
                (first..first + children.len()).for_each(|slot| hasher.update(&out[place(slot)]));
            }
            Content::Symlink(target) => hasher.update(target),
            _ => {}
        }
        out[place(at)].copy_from_slice(&hasher.finish().0);
    }
}

struct Writer<'a> {
    image: &'a Image<'a>,
    slots: &'a Slots,
    offsets: &'a [u64],
    numbering: &'a Numbering,
    out: &'a mut Output,
}

impl Writer<'_> {
    fn run(mut self) {
        let (slots, tree) = (self.slots, self.image.tree);
        // The visitor never fails, so neither does the walk.
        let _ = slots.in_record_order(tree, |slot, name, id, parent| {
            self.record(slot, name, id, parent);
            Ok(())
        });
    }

    fn record(&mut self, slot: u32, name: &[u8], id: InodeId, parent: InodeId) {
        let inode = self.image.tree.inode(id);
        let (meta, number) = (&inode.metadata, self.slots.numbers[id.0 as usize]);
        let xattrs = xattr_size(&meta.xattrs);
        let mut at = self.offsets[slot as usize - 1];
        let mut record = Record::new_zeroed();
        // Written before.
        let digest = at as usize + std::mem::offset_of!(Record, i_digest);
        record.i_digest.copy_from_slice(&self.out.bytes[digest..][..size_of::<Digest>()]);
        if id != parent {
            record.i_parent = U64::new(self.slots.numbers[parent.0 as usize].ino.into());
        }
        record.i_ino = U64::new(number.ino.into());
        if self.image.explicit_ids {
            record.i_uid = U32::new(meta.uid);
            record.i_gid = U32::new(meta.gid);
        }
        record.i_mode = U32::new(inode.mode());
        let size = size(inode);
        record.i_size = U64::new(size);
        record.i_blocks = U64::new((size + a8(xattrs)).div_ceil(512));
        let mut flags = if xattrs > 0 { FLAG_XATTR } else { 0 };
        record.i_nlink = U32::new(number.nlink);
        // Names and targets were checked when they came into the tree.
        record.i_name_size = U16::new(name.len() as u16);
        record.i_rdev = U32::new(inode.content.rdev());
        record.i_mtime_nsec = U32::new(meta.mtime_nsec);
        // Two's complement, so that times before 1970 survive.
        record.i_mtime = U64::new(meta.mtime.cast_unsigned());
        match &inode.content {
            Content::Directory(children) => {
                record.i_child_index = U32::new(number.child_index);
                record.i_child_count = U32::new(children.len() as u32);
            }
            Content::Regular { size, .. } => {
                record.i_child_count = U32::new(layout::chunk_count(*size, self.image.chunk_size) as u32);
            }
            Content::Symlink(target) => {
                flags |= FLAG_SYMLINK;
                record.i_symlink_size = U16::new(target.len() as u16);
            }
            _ => {}
        }
        record.i_flags = U64::new(flags);
        self.out.put(at, &record);
        at += size_of::<Record>() as u64;
        self.out.put(at, name);
        at += a8(name.len() as u64);
        if let Content::Symlink(target) = &inode.content {
            self.out.put(at, &target[..]);
            at += a8(target.len() as u64);
        }
        if xattrs > 0 {
            self.out.put(at, &U64::new(xattrs));
            self.xattrs(at + 8, &meta.xattrs);
            at += 8 + a8(xattrs);
        }
        if let Content::Regular { file, .. } = inode.content {
            self.chunks(at, file);
        }
    }

    fn xattrs(&mut self, mut at: u64, xattrs: &Xattrs) {
        for x in xattrs.iter() {
            // Names and values are below 2^17 together.
            let len = x.name.len() + 1 + x.value.len();
            self.out.put(at, &U32::new(len as u32));
            self.out.put(at + 4, &*x.name);
            self.out.put(at + 4 + x.name.len() as u64 + 1, &*x.value);
            at += 4 + len as u64;
        }
    }

    fn chunks(&mut self, at: u64, file: crate::tree::FileId) {
        for (position, &id) in (0u64..).zip(self.image.chunks.file_chunks(file)) {
            let offset = position * u64::from(self.image.chunk_size);
            let record = self.numbering.record(self.image, id, offset);
            self.out.put(at + position * size_of::<ChunkInfo>() as u64, &record);
        }
    }
}

/// What `i_size` states. A directory that was read back keeps what was stated there.
fn size(inode: &Inode) -> u64 {
    match &inode.content {
        Content::Directory(_) if inode.metadata.directory_size != 0 => inode.metadata.directory_size,
        Content::Directory(children) => {
            let sum: u64 = children.keys().map(|name| name.len() as u64 + 8).sum();
            sum.next_multiple_of(PAGE).max(PAGE)
        }
        Content::Regular { size, .. } => *size,
        Content::Symlink(target) => target.len() as u64,
        _ => 0,
    }
}
