//! RAFS v5 answered in place. A `Nid` is an inode number, which is the slot of its first name.

mod blobs;
mod chunks;
mod header;
mod validate;
mod view;

use std::borrow::Cow;
use std::ops::ControlFlow;

use storage::ids::ChunkIndex;
use zerocopy::byteorder::little_endian::U32;

use super::buffer::Buffer;
use super::bytes::{Image, records};
use super::faults::Faults;
use super::open::OpenOptions;
use super::{Attr, Blob, Bootstrap, ChunkRef, DirEntry, FileType, Nid, Summary, Xattr};
use crate::format::chunk::ChunkInfo;
use crate::format::v5::ROOT_INO;
use crate::{Error, ErrorKind, Result};

use validate::Validated;
pub(crate) use validate::validate;
pub use view::Record;
use view::{View, Xattrs};

/// A validated RAFS v5 bootstrap.
#[derive(Debug)]
pub struct V5 {
    image: Image,
    validated: Validated,
}

impl V5 {
    /// Validates `image`, then gives back the memory that took.
    ///
    /// # Errors
    /// `Unsupported`: a kind of image that is not read. `Corrupt`: a broken rule.
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

    /// Slots: names with the root's.
    pub fn slots(&self) -> u32 {
        self.validated.header.entries
    }

    /// The record in `slot`, 1 to [`V5::slots`].
    ///
    /// # Errors
    /// `NotFound`: there is no such slot.
    pub fn record(&self, slot: u32) -> Result<Record<'_>> {
        self.view().record(slot)
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

    /// The first record of an inode.
    fn inode(&self, nid: Nid) -> Result<Record<'_>> {
        let none = || Error::new(ErrorKind::NotFound, format!("{nid} is not an inode of this image"));
        let record = self.view().record(u32::try_from(nid.0).map_err(|_| none())?)?;
        if record.nid() == nid { Ok(record) } else { Err(none()) }
    }

    fn typed(&self, nid: Nid, want: FileType) -> Result<Record<'_>> {
        let record = self.inode(nid)?;
        if record.file_type != want {
            return Err(Error::new(
                ErrorKind::WrongType,
                format!("inode {nid} is a {:?}, not a {want:?}", record.file_type),
            ));
        }
        Ok(record)
    }

    /// First slot of a directory's children, and the slot behind the last.
    fn child_slots(&self, dir: Nid) -> Result<(u32, u32)> {
        let raw = self.typed(dir, FileType::Directory)?.raw;
        // The door has checked their sum unless there are none.
        let (first, count) = (raw.i_child_index.get(), raw.i_child_count.get());
        Ok((first, first.saturating_add(count)))
    }

    /// The place among the children of the first that is not below `name`, and the entry if it
    /// has that name.
    fn search(&self, dir: Nid, name: &[u8]) -> Result<(u64, Option<DirEntry<'_>>)> {
        let (first, end) = self.child_slots(dir)?;
        let (mut low, mut high) = (first, end);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.view().record(middle)?.name < name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let place = u64::from(low - first);
        if low == end {
            return Ok((place, None));
        }
        let record = self.view().record(low)?;
        Ok((place, (record.name == name).then(|| entry(&record, place))))
    }
}

fn entry<'a>(record: &Record<'a>, place: u64) -> DirEntry<'a> {
    DirEntry { name: record.name, nid: record.nid(), file_type: record.file_type, next: place + 1 }
}

impl Bootstrap for V5 {
    fn summary(&self) -> &Summary {
        &self.validated.header.summary
    }

    fn blobs(&self) -> &[Blob] {
        &self.validated.blobs
    }

    fn root(&self) -> Nid {
        Nid(ROOT_INO)
    }

    fn attr(&self, nid: Nid) -> Result<Attr> {
        Ok(self.inode(nid)?.attr())
    }

    fn parent(&self, dir: Nid) -> Result<Nid> {
        let record = self.typed(dir, FileType::Directory)?;
        Ok(if dir.0 == ROOT_INO { dir } else { Nid(record.raw.i_parent.get()) })
    }

    fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<DirEntry<'_>>> {
        self.search(dir, name).map(|(_, found)| found)
    }

    fn cursor_at(&self, dir: Nid, name: &[u8]) -> Result<u64> {
        self.search(dir, name).map(|(place, _)| place)
    }

    fn children<'a>(
        &'a self,
        dir: Nid,
        cursor: u64,
        visit: &mut dyn FnMut(DirEntry<'a>) -> ControlFlow<()>,
    ) -> Result<()> {
        let (first, end) = self.child_slots(dir)?;
        for place in cursor..u64::from(end - first) {
            // Below 2^32 as the bounds are.
            let record = self.view().record(first + place as u32)?;
            if visit(entry(&record, place)).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn read_link(&self, nid: Nid) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(self.typed(nid, FileType::Symlink)?.target))
    }

    fn xattrs<'a>(&'a self, nid: Nid, visit: &mut dyn FnMut(Xattr<'a>) -> ControlFlow<()>) -> Result<()> {
        for xattr in Xattrs(self.inode(nid)?.xattrs) {
            if visit(xattr?).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn chunk(&self, nid: Nid, position: u32) -> Result<ChunkRef> {
        let record = self.typed(nid, FileType::Regular)?;
        let chunk = record
            .chunks
            .get(position as usize)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("inode {nid} has no chunk {position}")))?;
        Ok(ChunkRef {
            blob: chunk.blob_index.get(),
            index: ChunkIndex(chunk.index.get()),
            decoded_offset: chunk.uncompressed_offset.get(),
        })
    }

    fn chunk_info(&self, blob: u32, index: ChunkIndex) -> Option<&ChunkInfo> {
        chunks::find(&self.image, &self.validated.rows, blob, index)
    }

    fn prefetch(&self) -> Vec<Nid> {
        // A hint: numbers that name no inode are passed over.
        let numbers = self.prefetch_table().iter().map(|ino| Nid(ino.get().into()));
        numbers.take_while(|nid| nid.0 != 0).filter(|&nid| self.inode(nid).is_ok()).collect()
    }
}
