//! RAFS v6 answered in place.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::ControlFlow;

use storage::ids::ChunkIndex;
use zerocopy::byteorder::little_endian::U32;

use super::buffer::Buffer;
use super::bytes::{Image, records};
use super::faults::Faults;
use super::open::OpenOptions;
use super::validate::{Validated, validate};
use super::view::{DirBlock, Inode, View, file_type};
use super::{Attr, Blob, Bootstrap, ChunkRef, DirEntry, FileType, Nid, Summary, Xattr};
use crate::format::chunk::ChunkInfo;
use crate::format::dirent::Dirent;
use crate::{Error, ErrorKind, Result};

/// Entries of a directory block: at most 4096 / 12, so 9 bits of a cursor hold the place.
const CURSOR_BITS: u32 = 9;

/// A validated RAFS v6 bootstrap.
#[derive(Debug)]
pub struct V6 {
    image: Image,
    validated: Validated,
}

impl V6 {
    /// Validates `image`, then gives back the memory that took.
    ///
    /// # Errors
    /// `Unsupported`: an image of a kind not read yet, by name. `Corrupt`: a broken rule.
    pub(super) fn new(image: Image, options: &OpenOptions) -> Result<Self> {
        let validated = validate(&image, options.inlined_blob_id.as_ref(), &mut Faults::stop_at_first())?;
        image.release_pages();
        Ok(Self { image, validated })
    }

    /// Validates a bootstrap in memory.
    ///
    /// # Errors
    /// As [`super::from_bytes`].
    pub(crate) fn from_buffer(bytes: Buffer, options: &OpenOptions) -> Result<Self> {
        Self::new(Image::Owned(bytes), options)
    }

    /// All chunk-info records, in stored order.
    pub fn chunk_table(&self) -> &[ChunkInfo] {
        let (offset, count) = self.summary().chunk_table;
        // The door has checked the table's bounds.
        records(&self.image, offset, count, "chunk table").unwrap_or(&[])
    }

    /// Row of a chunk's record in [`V6::chunk_table`].
    pub fn chunk_row(&self, blob: u32, index: ChunkIndex) -> Option<usize> {
        self.validated.rows.get(blob, index.0)
    }

    /// The prefetch table as stored.
    pub fn prefetch_table(&self) -> &[U32] {
        let (offset, count) = self.summary().prefetch_table;
        // The door has checked the table's bounds.
        records(&self.image, offset, count.into(), "prefetch table").unwrap_or(&[])
    }

    fn view(&self) -> View<'_> {
        View { bytes: &self.image, header: &self.validated.header }
    }

    /// Decodes an inode of the tree.
    fn inode(&self, nid: Nid) -> Result<Inode> {
        if !self.validated.inodes.contains(nid) {
            return Err(Error::new(ErrorKind::NotFound, format!("{nid} is not an inode of this image")));
        }
        self.view().inode(nid)
    }

    fn typed(&self, nid: Nid, want: FileType) -> Result<Inode> {
        let inode = self.inode(nid)?;
        if inode.attr.file_type != want {
            return Err(Error::new(
                ErrorKind::WrongType,
                format!("inode {nid} is a {:?}, not a {want:?}", inode.attr.file_type),
            ));
        }
        Ok(inode)
    }

    /// Finds `name` among all entries of a directory, `.` and `..` included.
    fn find(&self, dir: Nid, name: &[u8]) -> Result<Option<DirEntry<'_>>> {
        self.search(dir, name).map(|(_, found)| found)
    }

    /// The cursor before the first entry that is not below `name`, and the entry if it has that name.
    fn search(&self, dir: Nid, name: &[u8]) -> Result<(u64, Option<DirEntry<'_>>)> {
        let inode = self.typed(dir, FileType::Directory)?;
        let view = self.view();
        // The block to look in is the last one whose first name is not greater.
        let (mut low, mut high) = (0, view.dir_block_count(&inode));
        let mut candidate = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = view.dir_block(&inode, middle)?;
            if block.entry(0)?.1 <= name {
                candidate = Some((middle, block));
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some((number, block)) = candidate else { return Ok((0, None)) };
        let (mut low, mut high) = (0, block.len());
        let cursor = |index: usize| number << CURSOR_BITS | index as u64;
        while low < high {
            let middle = low + (high - low) / 2;
            let (entry, found) = block.entry(middle)?;
            match found.cmp(name) {
                Ordering::Equal => {
                    return Ok((cursor(middle), Some(dir_entry(entry, found, number, middle)?)));
                }
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok((cursor(low), None))
    }

    fn visit_block<'a>(
        block: &DirBlock<'a>,
        number: u64,
        from: usize,
        visit: &mut dyn FnMut(DirEntry<'a>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        for index in from..block.len() {
            let (entry, name) = block.entry(index)?;
            if matches!(name, b"." | b"..") {
                continue;
            }
            if visit(dir_entry(entry, name, number, index)?).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

fn dir_entry<'a>(entry: &Dirent, name: &'a [u8], block: u64, index: usize) -> Result<DirEntry<'a>> {
    let file_type = file_type(entry.file_type)
        .ok_or_else(|| Error::corrupt(format!("entry type {} is unknown", entry.file_type)))?;
    let next = (block << CURSOR_BITS | index as u64) + 1;
    Ok(DirEntry { name, nid: Nid(entry.nid.get()), file_type, next })
}

impl Bootstrap for V6 {
    fn summary(&self) -> &Summary {
        &self.validated.header.summary
    }

    fn blobs(&self) -> &[Blob] {
        &self.validated.blobs
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(&self.image)
    }

    fn root(&self) -> Nid {
        self.validated.header.root
    }

    fn attr(&self, nid: Nid) -> Result<Attr> {
        Ok(self.inode(nid)?.attr)
    }

    fn parent(&self, dir: Nid) -> Result<Nid> {
        let entry = self.find(dir, b"..")?;
        entry.map(|e| e.nid).ok_or_else(|| Error::corrupt(format!("directory {dir} has no \"..\"")))
    }

    fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<DirEntry<'_>>> {
        let found = self.find(dir, name)?;
        Ok(found.filter(|_| !matches!(name, b"." | b"..")))
    }

    fn cursor_at(&self, dir: Nid, name: &[u8]) -> Result<u64> {
        self.search(dir, name).map(|(cursor, _)| cursor)
    }

    fn children<'a>(
        &'a self,
        dir: Nid,
        cursor: u64,
        visit: &mut dyn FnMut(DirEntry<'a>) -> ControlFlow<()>,
    ) -> Result<()> {
        let inode = self.typed(dir, FileType::Directory)?;
        let view = self.view();
        let mut from = (cursor & ((1 << CURSOR_BITS) - 1)) as usize;
        for number in cursor >> CURSOR_BITS..view.dir_block_count(&inode) {
            let block = view.dir_block(&inode, number)?;
            if Self::visit_block(&block, number, from, visit)?.is_break() {
                return Ok(());
            }
            from = 0;
        }
        Ok(())
    }

    fn read_link(&self, nid: Nid) -> Result<Cow<'_, [u8]>> {
        let inode = self.typed(nid, FileType::Symlink)?;
        self.view().link_target(&inode).map(Cow::Borrowed)
    }

    fn xattrs<'a>(&'a self, nid: Nid, visit: &mut dyn FnMut(Xattr<'a>) -> ControlFlow<()>) -> Result<()> {
        let inode = self.inode(nid)?;
        for xattr in self.view().xattrs(&inode)? {
            if visit(xattr?).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn chunk(&self, nid: Nid, position: u32) -> Result<ChunkRef> {
        let inode = self.typed(nid, FileType::Regular)?;
        let index =
            self.view().chunk_indexes(&inode)?.get(position as usize).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("inode {nid} has no chunk {position}"))
            })?;
        let blob = u32::from(index.device_id)
            .checked_sub(1)
            .filter(|&b| (b as usize) < self.validated.blobs.len())
            .ok_or_else(|| Error::corrupt(format!("inode {nid}, chunk {position}: no such blob")))?;
        Ok(ChunkRef {
            blob,
            index: ChunkIndex(index.chunk_index()),
            decoded_offset: u64::from(index.blkaddr.get()) * u64::from(self.summary().block_size),
        })
    }

    fn chunk_info(&self, blob: u32, index: ChunkIndex) -> Option<&ChunkInfo> {
        self.chunk_table().get(self.chunk_row(blob, index)?)
    }

    fn prefetch(&self) -> Vec<Nid> {
        // A hint: numbers that name no inode are passed over.
        let nids = self.prefetch_table().iter().map(|nid| Nid(nid.get().into())).take_while(|nid| nid.0 != 0);
        nids.filter(|&nid| self.validated.inodes.contains(nid)).collect()
    }
}
