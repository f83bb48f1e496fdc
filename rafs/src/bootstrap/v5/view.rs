//! Slots and inode records in place.
//!
//! Every answer is checked against the bytes on its own, so any slot may be asked; what
//! needs more than one record is [`mod@super::validate`]'s.

use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::{U32, U64};

use super::super::bytes::{record, records, slice};
use super::super::{Attr, FileType, Nid, Xattr};
use super::header::Header;
use crate::format::chunk::ChunkInfo;
use crate::format::limits::{MAX_NAME_LEN, MAX_SYMLINK_LEN};
use crate::format::v5::{ALIGNMENT, FLAG_XATTR, Inode, MAX_XATTR_VALUE, SUPERBLOCK_SIZE};
use crate::format::xattr::PREFIXES;
use crate::{Error, ErrorKind, Result};

/// The bytes of a bootstrap with its checked header.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The whole file.
    pub bytes: &'a [u8],
    /// Its header.
    pub header: &'a Header,
}

/// The record of one name, its parts inside the file and its own fields sensible.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    /// Where the inode table has it.
    pub slot: u32,
    /// First byte in the file.
    pub offset: u64,
    /// Byte behind its last part.
    pub end: u64,
    /// Fixed part.
    pub raw: &'a Inode,
    /// Type of the inode.
    pub file_type: FileType,
    /// Name in its directory; the root's says nothing.
    pub name: &'a [u8],
    /// Symlink target, empty for other types.
    pub target: &'a [u8],
    /// Pairs of the xattr area.
    pub xattrs: &'a [u8],
    /// Chunk records of a regular file, in order, one per chunk of the image's chunk size.
    pub chunks: &'a [ChunkInfo],
    /// Where they start.
    pub chunks_at: u64,
}

impl Record<'_> {
    /// Its inode number.
    pub fn ino(&self) -> u64 {
        self.raw.i_ino.get()
    }

    /// Its inode as other crates know it.
    pub fn nid(&self) -> Nid {
        Nid(self.ino())
    }

    /// Its attributes.
    pub fn attr(&self) -> Attr {
        let device = matches!(self.file_type, FileType::CharDevice | FileType::BlockDevice);
        Attr {
            nid: self.nid(),
            file_type: self.file_type,
            mode: self.raw.i_mode.get(),
            uid: self.raw.i_uid.get(),
            gid: self.raw.i_gid.get(),
            size: match self.file_type {
                FileType::Regular | FileType::Directory => self.raw.i_size.get(),
                _ => self.target.len() as u64,
            },
            nlink: self.raw.i_nlink.get(),
            mtime: self.raw.i_mtime.get() as i64,
            mtime_nsec: self.raw.i_mtime_nsec.get(),
            rdev: if device { self.raw.i_rdev.get() } else { 0 },
        }
    }
}

impl<'a> View<'a> {
    /// The record in `slot`.
    ///
    /// # Errors
    /// `NotFound`: there is no such slot. `Corrupt`: a field breaks a rule.
    pub fn record(self, slot: u32) -> Result<Record<'a>> {
        if slot == 0 || slot > self.header.entries {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no inode {slot}")));
        }
        let entry: &U32 =
            record(self.bytes, self.header.inode_table + u64::from(slot - 1) * 4, "inode table")?;
        let offset = u64::from(entry.get()) * ALIGNMENT;
        let named = |e: Error| e.context(format_args!("inode {slot} at {offset}"));
        if offset < SUPERBLOCK_SIZE {
            return Err(named(Error::corrupt("lies in the superblock")));
        }
        self.parts(slot, offset).map_err(named)
    }

    fn parts(self, slot: u32, offset: u64) -> Result<Record<'a>> {
        let raw: &Inode = record(self.bytes, offset, "inode")?;
        let fail = |why: String| Err(Error::corrupt(why));
        let mode = raw.i_mode.get();
        let Some(file_type) = FileType::from_mode(mode) else {
            return fail(format!("mode {mode:#o} is of no known type"));
        };
        if raw.i_nlink.get() == 0 || raw.i_mtime_nsec.get() >= 1_000_000_000 {
            return fail(format!("link count {}, {} nanoseconds", raw.i_nlink, raw.i_mtime_nsec));
        }
        let mut at = offset + size_of::<Inode>() as u64;
        let mut part = |len: u64, what: &str| {
            let bytes = slice(self.bytes, at, len, what)?;
            at = (at + len).next_multiple_of(ALIGNMENT);
            Ok::<_, Error>(bytes)
        };
        let name = part(raw.i_name_size.get().into(), "name")?;
        if !(1..=MAX_NAME_LEN).contains(&name.len()) {
            return fail(format!("name of {} bytes: want 1 to {MAX_NAME_LEN}", name.len()));
        }
        let target = part(raw.i_symlink_size.get().into(), "symlink target")?;
        let is_symlink = file_type == FileType::Symlink;
        let target_fits = if is_symlink {
            (1..=MAX_SYMLINK_LEN).contains(&target.len()) && raw.i_size.get() == target.len() as u64
        } else {
            target.is_empty()
        };
        if !target_fits {
            return fail(format!("symlink target of {} bytes in a {file_type:?}", target.len()));
        }
        let mut xattrs: &[u8] = &[];
        if raw.i_flags.get() & FLAG_XATTR != 0 {
            let size =
                U64::read_from_bytes(part(8, "xattr size")?).map_err(|_| Error::corrupt("xattr size"))?.get();
            // Bounded first: whatever is added to it must not wrap.
            if size > self.bytes.len() as u64 {
                return fail(format!("xattrs of {size} bytes"));
            }
            xattrs = part(size, "xattrs")?;
        }
        let chunks_at = at;
        let mut chunks: &[ChunkInfo] = &[];
        if file_type == FileType::Regular {
            let count = u64::from(raw.i_child_count.get());
            let size = raw.i_size.get();
            if size.div_ceil(self.header.summary.chunk_size.into()) != count {
                return fail(format!("{count} chunk records for {size} bytes"));
            }
            chunks = records(self.bytes, at, count, "chunk records")?;
            at += size_of_val(chunks) as u64;
        }
        if at > self.bytes.len() as u64 {
            return fail("reaches beyond the file".into());
        }
        Ok(Record { slot, offset, end: at, raw, file_type, name, target, xattrs, chunks, chunks_at })
    }
}

/// Iterator over the pairs of an xattr area, in stored order.
pub struct Xattrs<'a>(pub &'a [u8]);

impl<'a> Xattrs<'a> {
    fn parse(area: &'a [u8]) -> Option<(Xattr<'a>, &'a [u8])> {
        let (len, rest) = U32::ref_from_prefix(area).ok()?;
        let (pair, rest) = rest.split_at_checked(usize::try_from(len.get()).ok()?)?;
        let nul = pair.iter().position(|&b| b == 0)?;
        let (name, value) = (&pair[..nul], &pair[nul + 1..]);
        let (_, prefix) = PREFIXES.iter().find(|(_, prefix)| name.starts_with(prefix))?;
        let suffix = &name[prefix.len()..];
        // A prefix that ends in a dot wants a name behind it, the ACL names want none.
        let whole = !prefix.ends_with(b".");
        if whole != suffix.is_empty() || name.len() > MAX_NAME_LEN || value.len() > MAX_XATTR_VALUE {
            return None;
        }
        Some((Xattr { prefix, suffix, value }, rest))
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<Xattr<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        Some(match Self::parse(self.0) {
            Some((xattr, rest)) => {
                self.0 = rest;
                Ok(xattr)
            }
            None => {
                self.0 = &[];
                Err(Error::corrupt(
                    "xattr: unknown prefix, no NUL behind the name, or it reaches beyond its area",
                ))
            }
        })
    }
}
