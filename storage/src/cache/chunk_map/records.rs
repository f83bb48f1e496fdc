//! The map file's bytes: its header, and a record a chunk.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::cache::data_file::Storage;
use crate::extent::ChunkExtent;
use crate::ids::ChunkIndex;

/// First bytes of our maps; a foreign map has others.
pub(super) const MAGIC: [u8; 8] = *b"rdychnks";

/// Version of the layout above.
pub(super) const VERSION: u32 = 1;

/// Bytes before the first record: one page, so that records never share one with it.
pub(super) const HEADER_SIZE: u64 = 4096;

/// Records read at once while looking for a neighbour.
pub(super) const BATCH: u32 = 1024;

/// Start of a map file; zeros follow up to 4096 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],    //  0  "rdychnks"
    pub(super) version: U32,      //  8  1
    pub(super) chunk_count: U32,  // 12  records that follow
    pub(super) decoded_size: U64, // 16  bytes of the data file
    pub(super) data_inode: U64,   // 24  of the data file; a copy or a new file is another one
    pub(super) blob_id: [u8; 64], // 32  padded with zeros
}
const _: () = assert!(size_of::<Header>() == 96);

/// What vouches for one chunk in the data file.
#[derive(
    FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug, PartialEq, Eq, Hash,
)]
#[repr(C)]
pub(in crate::cache) struct Record {
    decoded_offset: U64, //  0  bytes from the start of the data file
    len: U32,            //  8  bytes, never 0 in a set record
    digest: [u8; 20],    // 12  first 160 bits; all zero for a chunk without a digest
}
pub(super) const RECORD_SIZE: u64 = size_of::<Record>() as u64;
const _: () = assert!(RECORD_SIZE == 32 && HEADER_SIZE.is_multiple_of(RECORD_SIZE));

impl Record {
    /// The record that makes `extent` ready.
    pub(in crate::cache) fn of(extent: &ChunkExtent) -> Self {
        let mut digest = [0; 20];
        if let Some(expected) = extent.digest {
            digest.copy_from_slice(&expected.digest.as_bytes()[..20]);
        }
        Self { decoded_offset: extent.decoded_offset.into(), len: extent.len.into(), digest }
    }

    /// True for a record of no chunk.
    pub(super) fn is_empty(&self) -> bool {
        self.as_bytes().iter().all(|b| *b == 0)
    }

    /// First byte in the data file, and the one behind the last.
    pub(super) fn place(&self) -> (u64, u64) {
        let start = self.decoded_offset.get();
        (start, start.saturating_add(self.len.get().into()))
    }
}

/// True if a chunk has room between its neighbours.
pub(super) fn fits(before: Option<(u64, u64)>, place: (u64, u64), behind: Option<(u64, u64)>) -> bool {
    before.is_none_or(|(_, end)| end <= place.0) && behind.is_none_or(|(start, _)| place.1 <= start)
}

/// Ready chunks and all chunks of a map, whichever blob it is of. `None` if it is not one of ours.
pub(in crate::cache) fn count_ready(map: &File) -> Option<(u32, u32)> {
    let mut header = Header::new_zeroed();
    map.read_at(header.as_mut_bytes(), 0).ok()?;
    let count = header.chunk_count.get();
    let size = HEADER_SIZE + u64::from(count) * RECORD_SIZE;
    if header.magic != MAGIC || header.version.get() != VERSION || map.metadata().ok()?.len() != size {
        return None;
    }
    let (mut ready, mut batch) = (0, Vec::new());
    for from in (0..count).step_by(BATCH as usize) {
        load_records(map, map, from, count.min(from.saturating_add(BATCH)), &mut batch).ok()?;
        ready += batch.iter().filter(|r| !r.is_empty()).count();
    }
    Some((u32::try_from(ready).unwrap_or(u32::MAX), count))
}

/// Reads the records `from..to` of the map `file` through `storage`; none if they were never
/// written.
pub(super) fn load_records(
    file: &File,
    storage: &dyn Storage,
    from: u32,
    to: u32,
    batch: &mut Vec<Record>,
) -> io::Result<()> {
    batch.clear();
    // Most of a young map is a hole, which is cheaper to ask for than to read.
    let start = i64::try_from(offset(from)).unwrap_or(i64::MAX);
    match lseek(file, start, Whence::SeekData) {
        Err(Errno::ENXIO) => return Ok(()),
        Ok(data) if u64::try_from(data).is_ok_and(|data| data >= offset(to)) => return Ok(()),
        // Data, or a file system that can not tell.
        _ => {}
    }
    batch.resize((to - from) as usize, Record::new_zeroed());
    storage.read_at(batch.as_mut_slice().as_mut_bytes(), offset(from))
}

/// A chunk and the record that makes it ready. A *run* is a slice of them with consecutive
/// indexes.
pub(in crate::cache) type Wanted = (ChunkIndex, Record);

/// Cuts chunks in order of their indexes into runs.
pub(in crate::cache) fn runs(chunks: &[Wanted]) -> impl Iterator<Item = &[Wanted]> {
    chunks
        .chunk_by(|(a, one), (b, other)| a.0.checked_add(1) == Some(b.0) && one.place().1 <= other.place().0)
}

pub(super) fn offset(index: u32) -> u64 {
    HEADER_SIZE + u64::from(index) * RECORD_SIZE
}
