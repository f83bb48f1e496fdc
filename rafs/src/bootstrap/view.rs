//! Inodes, directories, xattrs and chunk indexes in place.
//!
//! Every answer is checked against the bytes on its own, so any nid may be asked; what
//! needs the whole tree (order, cycles, `..`) is [`mod@super::validate`]'s.

use std::ops::Range;

use zerocopy::FromBytes;

use super::bytes::{record, records, slice};
use super::header::Header;
use super::{Attr, FileType, Nid, Xattr};
use crate::format::dirent::{self, Dirent};
use crate::format::inode::{
    CHUNK_FORMAT_BITS, CHUNK_FORMAT_INDEXES, ChunkIndexRecord, CompactInode, ExtendedInode, FORMAT_EXTENDED,
    LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN,
};
use crate::format::limits::{MAX_SYMLINK_LEN, SLOT_SIZE};
use crate::format::xattr::{PREFIXES, XattrEntry, XattrHeader, area_size, entry_size};
use crate::{Error, ErrorKind, Result};

/// The bytes of a bootstrap with its checked header.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The whole file.
    pub bytes: &'a [u8],
    /// Its header.
    pub header: &'a Header,
}

/// A decoded inode whose own fields make sense.
#[derive(Clone, Copy, Debug)]
pub struct Inode {
    /// Attributes.
    pub attr: Attr,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes of the inode itself: 32 or 64.
    pub inode_size: u64,
    /// Bytes of its xattr area.
    pub xattr_size: u64,
    /// Data layout.
    layout: u16,
    /// Chunk format, first block or rdev.
    i_u: u32,
}

impl Inode {
    /// Byte behind inode and xattr area.
    fn body(&self) -> u64 {
        self.offset + self.inode_size + self.xattr_size
    }

    /// Bytes of file data or chunk indexes that this inode claims for itself.
    pub fn claimed(&self, chunk_size: u32) -> u64 {
        let data = match self.attr.file_type {
            FileType::Regular => chunk_count(self.attr.size, chunk_size).saturating_mul(8),
            _ => self.attr.size,
        };
        (self.inode_size + self.xattr_size).saturating_add(data)
    }
}

/// Chunks of a file of `size` bytes.
pub fn chunk_count(size: u64, chunk_size: u32) -> u64 {
    size.div_ceil(u64::from(chunk_size))
}

/// The dirent type of a file type.
pub fn dirent_type(file_type: FileType) -> u8 {
    match file_type {
        FileType::Regular => dirent::FT_REGULAR,
        FileType::Directory => dirent::FT_DIRECTORY,
        FileType::Symlink => dirent::FT_SYMLINK,
        FileType::CharDevice => dirent::FT_CHAR,
        FileType::BlockDevice => dirent::FT_BLOCK,
        FileType::Fifo => dirent::FT_FIFO,
        FileType::Socket => dirent::FT_SOCKET,
    }
}

/// The file type of a dirent type.
pub fn file_type(code: u8) -> Option<FileType> {
    use FileType as F;
    [F::Regular, F::Directory, F::Symlink, F::CharDevice, F::BlockDevice, F::Fifo, F::Socket]
        .into_iter()
        .find(|&t| dirent_type(t) == code)
}

impl<'a> View<'a> {
    /// Bytes of an EROFS block: 4096, 512 in tarfs.
    fn block_size(self) -> u64 {
        self.header.summary.block_size.into()
    }

    /// Decodes inode `nid`.
    ///
    /// # Errors
    /// `NotFound`: no inode can lie there. `Corrupt`: a field breaks a rule.
    pub fn inode(self, nid: Nid) -> Result<Inode> {
        let offset = nid
            .0
            .checked_mul(SLOT_SIZE)
            .and_then(|o| o.checked_add(self.header.meta_offset))
            .filter(|&o| nid.0 != 0 && o + 32 <= self.bytes.len() as u64)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("inode {nid} lies outside the image")))?;
        let compact: &CompactInode = record(self.bytes, offset, "inode")?;
        let format = compact.i_format.get();
        let mut inode = if format & FORMAT_EXTENDED != 0 {
            extended(record(self.bytes, offset, "inode")?, nid, offset)
        } else {
            compact_inode(compact, nid, offset, self.header.build_time)
        }
        .and_then(|inode| check_fields(inode, format))
        .ok_or_else(|| {
            Error::corrupt(format!(
                "inode {nid} at {offset}: format {format:#x}, mode {:#o} and its other fields are not those of an inode",
                compact.i_mode
            ))
        })?;
        if matches!(inode.attr.file_type, FileType::CharDevice | FileType::BlockDevice) {
            inode.attr.rdev = inode.i_u;
        }
        if inode.body() > self.bytes.len() as u64 {
            return Err(Error::corrupt(format!("inode {nid} at {offset} reaches beyond the file")));
        }
        Ok(inode)
    }

    /// Byte range of the data behind `inode` that lies in the file, and whether it is one piece.
    ///
    /// The first range is whole blocks at `i_u` (may be empty), the second the inline tail.
    pub fn data_ranges(self, inode: &Inode) -> Result<(Range<u64>, Range<u64>)> {
        let (size, block) = (inode.attr.size, self.block_size());
        let fail =
            |why: &str| Err(Error::corrupt(format!("inode {} at {}: {why}", inode.attr.nid, inode.offset)));
        let tail = match inode.layout {
            LAYOUT_FLAT_PLAIN => 0,
            LAYOUT_FLAT_INLINE if !size.is_multiple_of(block) => size % block,
            LAYOUT_FLAT_INLINE => return fail("inline data without a tail"),
            _ => return fail("has no data blocks"),
        };
        let start = u64::from(inode.i_u) * block;
        let blocks = if size == tail { 0..0 } else { start..start.saturating_add(size - tail) };
        let inline = inode.body()..inode.body() + tail;
        let len = self.bytes.len() as u64;
        if blocks.end > len || inline.end > len {
            return fail("data reaches beyond the file");
        }
        if tail != 0 && inline.start / block != (inline.end - 1) / block {
            return fail("inline data crosses a block boundary");
        }
        Ok((blocks, inline))
    }

    /// Target of a symlink.
    pub fn link_target(self, inode: &Inode) -> Result<&'a [u8]> {
        let (blocks, inline) = self.data_ranges(inode)?;
        let range = if blocks.is_empty() { inline } else { blocks };
        slice(self.bytes, range.start, range.end - range.start, "symlink target")
    }

    /// Directory blocks of `inode`.
    pub fn dir_block_count(self, inode: &Inode) -> u64 {
        inode.attr.size.div_ceil(self.block_size())
    }

    /// Block `index` of directory `inode`.
    pub fn dir_block(self, inode: &Inode, index: u64) -> Result<DirBlock<'a>> {
        let (blocks, inline) = self.data_ranges(inode)?;
        let (whole, block) = (blocks.end - blocks.start, self.block_size());
        let range = match index.checked_mul(block) {
            Some(at) if at < whole => blocks.start + at..blocks.end.min(blocks.start + at + block),
            Some(at) if at == whole && !inline.is_empty() => inline,
            _ => return Err(Error::corrupt(format!("directory {} has no block {index}", inode.attr.nid))),
        };
        let bytes = slice(self.bytes, range.start, range.end - range.start, "directory block")?;
        DirBlock::parse(bytes).ok_or_else(|| {
            Error::corrupt(format!("directory {}, block {index}: bad first entry", inode.attr.nid))
        })
    }

    /// Chunk indexes of regular file `inode`, one per chunk of the image's chunk size.
    pub fn chunk_indexes(self, inode: &Inode) -> Result<&'a [ChunkIndexRecord]> {
        let count = chunk_count(inode.attr.size, self.header.summary.chunk_size);
        if count > u64::from(u32::MAX) {
            return Err(Error::corrupt(format!("inode {}: {count} chunks", inode.attr.nid)));
        }
        if count == 0 {
            return Ok(&[]);
        }
        records(self.bytes, inode.body().next_multiple_of(8), count, "chunk indexes")
    }

    /// The xattrs of `inode`.
    pub fn xattrs(self, inode: &Inode) -> Result<Xattrs<'a>> {
        let header_size = size_of::<XattrHeader>() as u64;
        if inode.xattr_size <= header_size {
            return Ok(Xattrs { area: &[] });
        }
        let start = inode.offset + inode.inode_size;
        let header: &XattrHeader = record(self.bytes, start, "xattr header")?;
        if header.shared_count != 0 {
            return Err(Error::corrupt(format!("inode {}: shared xattrs", inode.attr.nid)));
        }
        let area = slice(self.bytes, start + header_size, inode.xattr_size - header_size, "xattrs")?;
        Ok(Xattrs { area })
    }
}

fn extended(raw: &ExtendedInode, nid: Nid, offset: u64) -> Option<Inode> {
    // Newer kernels read the upper bits of a block address from the reserved field.
    if raw.reserved.get() != 0 {
        return None;
    }
    let mode = u32::from(raw.i_mode.get());
    Some(Inode {
        attr: Attr {
            nid,
            file_type: FileType::from_mode(mode)?,
            mode,
            uid: raw.i_uid.get(),
            gid: raw.i_gid.get(),
            size: raw.i_size.get(),
            nlink: raw.i_nlink.get(),
            mtime: raw.i_mtime.get() as i64,
            mtime_nsec: raw.i_mtime_nsec.get(),
            rdev: 0,
        },
        offset,
        inode_size: size_of::<ExtendedInode>() as u64,
        xattr_size: area_size(raw.i_xattr_icount.get()) as u64,
        layout: 0,
        i_u: raw.i_u.get(),
    })
}

fn compact_inode(raw: &CompactInode, nid: Nid, offset: u64, build_time: (i64, u32)) -> Option<Inode> {
    let mode = u32::from(raw.i_mode.get());
    Some(Inode {
        attr: Attr {
            nid,
            file_type: FileType::from_mode(mode)?,
            mode,
            uid: raw.i_uid.get().into(),
            gid: raw.i_gid.get().into(),
            size: raw.i_size.get().into(),
            nlink: raw.i_nlink.get().into(),
            mtime: build_time.0,
            mtime_nsec: build_time.1,
            rdev: 0,
        },
        offset,
        inode_size: size_of::<CompactInode>() as u64,
        xattr_size: area_size(raw.i_xattr_icount.get()) as u64,
        layout: 0,
        i_u: raw.i_u.get(),
    })
}

/// Format, layout, size and the rest must fit the type.
fn check_fields(mut inode: Inode, format: u16) -> Option<Inode> {
    inode.layout = format >> 1;
    let attr = &inode.attr;
    let layout_fits = match attr.file_type {
        FileType::Regular => {
            let chunk_format = CHUNK_FORMAT_INDEXES | CHUNK_FORMAT_BITS;
            inode.layout == LAYOUT_CHUNK_BASED
                && inode.i_u & !u32::from(chunk_format) == 0
                && inode.i_u & u32::from(CHUNK_FORMAT_INDEXES) != 0
        }
        FileType::Directory => matches!(inode.layout, LAYOUT_FLAT_PLAIN | LAYOUT_FLAT_INLINE),
        FileType::Symlink => {
            matches!(inode.layout, LAYOUT_FLAT_PLAIN | LAYOUT_FLAT_INLINE)
                && (1..=MAX_SYMLINK_LEN as u64).contains(&attr.size)
        }
        _ => inode.layout == LAYOUT_FLAT_PLAIN && attr.size == 0,
    };
    (layout_fits && attr.nlink >= 1 && attr.mtime_nsec < 1_000_000_000).then_some(inode)
}

/// One block of a directory: entries, then their names.
#[derive(Clone, Copy)]
pub struct DirBlock<'a> {
    entries: &'a [Dirent],
    bytes: &'a [u8],
}

impl<'a> DirBlock<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (first, _) = Dirent::ref_from_prefix(bytes).ok()?;
        let names = usize::from(first.nameoff.get());
        if names < size_of::<Dirent>() || !names.is_multiple_of(size_of::<Dirent>()) || names >= bytes.len() {
            return None;
        }
        let entries = <[Dirent]>::ref_from_bytes(bytes.get(..names)?).ok()?;
        Some(Self { entries, bytes })
    }

    /// Number of entries, at least 1.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Entry `index` and its name.
    pub fn entry(&self, index: usize) -> Result<(&'a Dirent, &'a [u8])> {
        self.get(index).ok_or_else(|| Error::corrupt(format!("directory entry {index}: bad name offset")))
    }

    fn get(&self, index: usize) -> Option<(&'a Dirent, &'a [u8])> {
        let entry = self.entries.get(index)?;
        let start = usize::from(entry.nameoff.get());
        let name = match self.entries.get(index + 1) {
            Some(next) => self.bytes.get(start..usize::from(next.nameoff.get()))?,
            None => {
                let rest = self.bytes.get(start..)?;
                rest.split(|&b| b == 0).next()?
            }
        };
        (start >= size_of_val(self.entries) && !name.is_empty()).then_some((entry, name))
    }
}

/// Iterator over the xattrs of an inode, in stored order.
pub struct Xattrs<'a> {
    area: &'a [u8],
}

impl<'a> Xattrs<'a> {
    fn parse(area: &'a [u8]) -> Option<(Xattr<'a>, &'a [u8])> {
        let (entry, rest) = XattrEntry::ref_from_prefix(area).ok()?;
        let (name_len, value_len) = (usize::from(entry.name_len), usize::from(entry.value_size.get()));
        let (suffix, rest) = rest.split_at_checked(name_len)?;
        let value = rest.get(..value_len)?;
        let (_, prefix) = PREFIXES.iter().find(|(index, _)| *index == entry.name_index)?;
        // A prefix that ends in a dot wants a name behind it, the ACL names want none.
        let whole = !prefix.ends_with(b".");
        if whole != suffix.is_empty() || prefix.len() + name_len > 255 || suffix.contains(&0) {
            return None;
        }
        Some((Xattr { prefix, suffix, value }, area.get(entry_size(name_len, value_len)..)?))
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<Xattr<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.area.is_empty() {
            return None;
        }
        Some(match Self::parse(self.area) {
            Some((xattr, rest)) => {
                self.area = rest;
                Ok(xattr)
            }
            None => {
                self.area = &[];
                Err(Error::corrupt("xattr entry: unknown prefix, or it reaches beyond its area"))
            }
        })
    }
}
