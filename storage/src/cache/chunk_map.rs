//! Which chunks are in the data file: ready records on disk, a mirror in memory.
//!
//! ```text
//!  0       magic, version, chunk count, decoded size, inode of the data file, blob id
//!  4096    record of chunk 0    32 bytes: decoded offset, length, start of the digest
//!  4128    record of chunk 1
//!  …
//! ```
//!
//! A record vouches for one very chunk: it counts only for a reader that expects the
//! same place, length and digest. Another image's idea of the blob, a blob that changed
//! under its name, or bytes cached without a digest never pass for the verified chunk.
//! All zero means not ready.
//!
//! A record is set with one `pwrite` of 32 aligned bytes, so that processes need no map
//! in common memory and no read-modify-write; a torn one matches nothing and is not
//! ready. Invariants:
//! - A record reaches the file only after the data it vouches for is durable.
//! - Data under a record is replaced only after the record was cleared and synced, and
//!   only while no other cache has the map open: others may be reading it.
//! - A map that is malformed or belongs to another file is replaced, never repaired:
//!   whoever has it open keeps it.
//!
//! Byte locks on the map: byte 0 is held shared while the cache is open (an evictor asks
//! for it exclusively), `LOCK_BASE + index` by the process that fetches that chunk.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::data_file::{Storage, open_own, replace};
use super::lock::{self, Kind};
use crate::extent::ChunkExtent;
use crate::ids::{BlobId, ChunkIndex};
use crate::{Error, ErrorKind, Result};

/// First bytes of our maps; a foreign map has others.
const MAGIC: [u8; 8] = *b"rdychnks";

/// Version of the layout above.
const VERSION: u32 = 1;

/// Bytes before the first record: one page, so that records never share one with it.
const HEADER_SIZE: u64 = 4096;

/// Where chunk locks begin: behind any possible record (2^24 chunks of 32 bytes).
pub(super) const LOCK_BASE: u64 = 1 << 40;

/// Byte that an open cache holds shared.
const USE_LOCK: u64 = 0;

/// Looks at a map that somebody holds exclusively, and the pause between them: its holder
/// writes and syncs one record, so two seconds are ample.
const USE_TRIES: u32 = 200;
const USE_PAUSE: Duration = Duration::from_millis(10);

/// Start of a map file; zeros follow up to 4096 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Header {
    magic: [u8; 8],    //  0  "rdychnks"
    version: U32,      //  8  1
    chunk_count: U32,  // 12  records that follow
    decoded_size: U64, // 16  bytes of the data file
    data_inode: U64,   // 24  of the data file; a copy or a new file is another one
    blob_id: [u8; 64], // 32  padded with zeros
}
const _: () = assert!(size_of::<Header>() == 96);

/// What vouches for one chunk in the data file.
#[derive(
    FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug, PartialEq, Eq, Hash,
)]
#[repr(C)]
pub(super) struct Record {
    decoded_offset: U64, //  0  bytes from the start of the data file
    len: U32,            //  8  bytes, never 0 in a set record
    digest: [u8; 20],    // 12  first 160 bits; all zero for a chunk without a digest
}
const RECORD_SIZE: u64 = size_of::<Record>() as u64;
const _: () = assert!(RECORD_SIZE == 32 && HEADER_SIZE.is_multiple_of(RECORD_SIZE));

impl Record {
    /// The record that makes `extent` ready.
    pub(super) fn of(extent: &ChunkExtent) -> Self {
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

    /// 32 bits of the record for the mirror, never 0. Chunks of one image that share an
    /// index and these bits would have to be made on purpose, by the image's own author.
    fn fold(&self) -> u32 {
        let words = self.as_bytes().chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        words.fold(0u32, |sum, word| sum.rotate_left(5) ^ word).max(1)
    }
}

/// The map of one blob.
pub(super) struct ChunkMap {
    storage: Arc<dyn Storage>,
    /// The same file, for locks. Closing it frees them all.
    file: Arc<File>,
    /// Per chunk the fold of its record once this process knows it ready, else 0. Set
    /// after the data was written (`Release`), read before it is read (`Acquire`).
    mirror: Box<[AtomicU32]>,
    /// Held while the use lock is exclusive.
    upgrade: Mutex<()>,
}

/// The right to fetch one chunk, across processes. Given back on drop.
pub(super) struct ChunkLock {
    file: Arc<File>,
    offset: u64,
}

impl Drop for ChunkLock {
    fn drop(&mut self) {
        // Can only fail for a bad descriptor; closing frees the lock as well.
        let _ = lock::unlock(&self.file, self.offset);
    }
}

impl ChunkMap {
    /// Opens the map at `path` if it belongs to this blob and `data`, else makes a new one.
    /// The caller holds the directory.
    pub(super) fn open(
        path: &Path,
        id: &BlobId,
        chunk_count: u32,
        data: &File,
        wrap: impl FnOnce(File) -> io::Result<Arc<dyn Storage>>,
    ) -> Result<Self> {
        let failed = |what: &str, e| Error::io(format!("chunk map {}: {what}", path.display()), e);
        let metadata = data.metadata().map_err(|e| failed("stat the data file", e))?;
        let mut blob_id = [0; 64];
        for (to, from) in blob_id.iter_mut().zip(id.as_str().bytes()) {
            *to = from;
        }
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            chunk_count: chunk_count.into(),
            decoded_size: metadata.len().into(),
            data_inode: metadata.ino().into(),
            blob_id,
        };
        let mut page = [0; HEADER_SIZE as usize];
        page[..size_of::<Header>()].copy_from_slice(header.as_bytes());
        let size = HEADER_SIZE + u64::from(chunk_count) * RECORD_SIZE;

        let present = open_own(path)?.filter(|file| {
            let mut found = [0; HEADER_SIZE as usize];
            file.metadata().is_ok_and(|m| m.len() == size)
                && file.read_at(&mut found, 0).is_ok()
                && found == page
        });
        let file = match present {
            Some(file) => file,
            None => replace(path, |file| {
                file.write_at(&page, 0)?;
                file.set_len(size)
            })
            .map_err(|e| failed("create it", e))?,
        };
        let mut tries = USE_TRIES;
        while !lock::try_lock(&file, Kind::Shared, USE_LOCK).map_err(|e| failed("lock it", e))? {
            tries -= 1;
            if tries == 0 {
                let what = format!("chunk map {}: in exclusive use; retry later", path.display());
                return Err(Error::new(ErrorKind::Unavailable, what));
            }
            std::thread::sleep(USE_PAUSE);
        }
        let storage = file.try_clone().and_then(wrap).map_err(|e| failed("duplicate the descriptor", e))?;
        let mirror = (0..chunk_count).map(|_| AtomicU32::new(0)).collect();
        Ok(Self { storage, file: Arc::new(file), mirror, upgrade: Mutex::default() })
    }

    /// True if the data file holds the chunk of `record`, written by whichever process.
    pub(super) fn is_ready(&self, index: ChunkIndex, record: &Record) -> bool {
        let Some(mark) = self.mirror.get(index.0 as usize) else { return false };
        if mark.load(Ordering::Acquire) == record.fold() {
            return true;
        }
        let ready = self.load(index) == *record;
        if ready {
            mark.store(record.fold(), Ordering::Release);
        }
        ready
    }

    /// The record on disk; one that can not be read counts as empty.
    pub(super) fn load(&self, index: ChunkIndex) -> Record {
        let mut record = Record::new_zeroed();
        match self.storage.read_at(record.as_mut_bytes(), offset(index)) {
            Ok(()) => record,
            Err(_) => Record::new_zeroed(),
        }
    }

    /// Tells this process that the chunk's data is in the file.
    pub(super) fn mark(&self, index: ChunkIndex, record: &Record) {
        if let Some(mark) = self.mirror.get(index.0 as usize) {
            mark.store(record.fold(), Ordering::Release);
        }
    }

    /// Takes back [`ChunkMap::mark`].
    pub(super) fn unmark(&self, index: ChunkIndex) {
        if let Some(mark) = self.mirror.get(index.0 as usize) {
            mark.store(0, Ordering::Release);
        }
    }

    /// Writes records whose data is durable, neighbours with one write.
    pub(super) fn set(&self, records: &mut [(ChunkIndex, Record)]) -> io::Result<()> {
        records.sort_by_key(|(index, _)| *index);
        for run in records.chunk_by(|(a, _), (b, _)| a.0.checked_add(1) == Some(b.0)) {
            let bytes: Vec<u8> = run.iter().flat_map(|(_, record)| record.as_bytes()).copied().collect();
            self.storage.write_at(&bytes, offset(run[0].0))?;
        }
        Ok(())
    }

    /// Runs `action` if no other cache has the map open, which none gets meanwhile.
    pub(super) fn alone<T>(&self, action: impl FnOnce() -> T) -> io::Result<Option<T>> {
        // Two threads share one description, hence one lock. Held during I/O, but only by
        // those who replace what another image left here.
        let _one = self.upgrade.lock().unwrap_or_else(PoisonError::into_inner);
        if !lock::try_lock(&self.file, Kind::Exclusive, USE_LOCK)? {
            return Ok(None);
        }
        let result = action();
        lock::try_lock(&self.file, Kind::Shared, USE_LOCK)?;
        Ok(Some(result))
    }

    /// Forgets chunks, durably: their data may be overwritten or punched out afterwards.
    pub(super) fn clear(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
        for index in chunks {
            if index.0 as usize >= self.mirror.len() {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.unmark(*index);
            self.storage.write_at(Record::new_zeroed().as_bytes(), offset(*index))?;
        }
        self.storage.sync()
    }

    /// Number of records set on disk.
    pub(super) fn ready_count(&self) -> u32 {
        const BATCH: usize = 1024;
        let mut buffer = vec![Record::new_zeroed(); BATCH.min(self.mirror.len())];
        let mut count = 0;
        for first in (0..self.mirror.len()).step_by(BATCH) {
            let batch = &mut buffer[..BATCH.min(self.mirror.len() - first)];
            let start = HEADER_SIZE + first as u64 * RECORD_SIZE;
            if self.storage.read_at(batch.as_mut_bytes(), start).is_ok() {
                count += batch.iter().filter(|r| !r.is_empty()).count();
            }
        }
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Asks for the right to fetch a chunk; `None` if another open cache has it.
    pub(super) fn try_lock(&self, index: ChunkIndex) -> io::Result<Option<ChunkLock>> {
        let offset = LOCK_BASE + u64::from(index.0);
        let held = lock::try_lock(&self.file, Kind::Exclusive, offset)?;
        Ok(held.then(|| ChunkLock { file: Arc::clone(&self.file), offset }))
    }
}

fn offset(index: ChunkIndex) -> u64 {
    HEADER_SIZE + u64::from(index.0) * RECORD_SIZE
}
