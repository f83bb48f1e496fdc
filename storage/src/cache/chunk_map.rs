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
//! - Set records lie in the data file in the order of their indexes and do not overlap,
//!   whatever the images that made them claim. A chunk that has no room between its
//!   neighbours is not cached.
//! - Records that are in the way go, durably, before data is written, and only while no
//!   other cache has the map open: others may be reading what they vouch for. Readers of
//!   this process look at the record before and after they read.
//! - A map that is malformed or belongs to another file is replaced, never repaired:
//!   whoever has it open keeps it.
//!
//! Byte locks on the map: byte 0 is held shared while the cache is open (an evictor asks
//! for it exclusively); byte 1 while records are set; bytes 2 and 3 by whoever has a
//! [`Duty`](super::duty::Duty); the chunk's decoded range, moved by `LOCK_BASE`, by whoever fetches the chunk.

mod records;

use std::collections::BTreeMap;
use std::fs::{File, FileTimes};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use zerocopy::{FromZeros as _, IntoBytes as _};

use self::records::{BATCH, HEADER_SIZE, Header, MAGIC, RECORD_SIZE, VERSION, fits, load_records, offset};
pub(super) use self::records::{Record, Wanted, count_ready, runs};
use super::data_file::{Storage, open_own, replace};
use super::duty::Duties;
use super::lock::{self, Kind};
use super::mirror::Mirror;
use crate::ids::{BlobId, ByteRange, ChunkIndex};
use crate::{Error, ErrorKind, Result};

/// Where chunk locks begin: behind any possible record (2^24 chunks of 32 bytes).
pub(super) const LOCK_BASE: u64 = 1 << 40;

/// Byte that an open cache holds shared.
const USE_LOCK: u64 = 0;

/// Byte that whoever sets records holds.
const SET_LOCK: u64 = 1;

/// How long that lock is waited for: what is not set is fetched again, and whoever waits for the disk goes on.
const SET_PATIENCE: Duration = Duration::from_secs(5);

/// First of the bytes that the holders of duties hold.
const DUTY_LOCKS: u64 = 2;

/// Longest decoded space, so that its locks fit behind `LOCK_BASE`.
pub(super) const MAX_DECODED_SIZE: u64 = 1 << 62;

/// Looks at a map that somebody holds exclusively, and the pause between them: its holder
/// writes and syncs one record, so two seconds are ample.
const USE_TRIES: u32 = 200;
const USE_PAUSE: Duration = Duration::from_millis(10);

/// The map of one blob.
pub(super) struct ChunkMap {
    storage: Arc<dyn Storage>,
    /// The same file, for locks. Closing it frees them all.
    file: Arc<File>,
    /// Per chunk a mark of its record once this process knows it ready, else 0. Set after
    /// the data was written, read before it is read.
    mirror: Mirror,
    /// Makes marks that an image's author can not foresee.
    marks: RandomState,
    /// Held while the use lock is exclusive: taken before `clearing`.
    upgrade: Mutex<()>,
    /// Held to write while records are cleared and until that is durable: who finds a
    /// place empty may write its data at once.
    clearing: RwLock<()>,
    held: Arc<Held>,
    /// What one of all that have the map open does.
    pub(super) duties: Duties,
}

/// Where the runs of chunks lie that this process has locked, by first index; in order and
/// apart like the records. The system's locks only tell processes apart. Nothing blocks
/// under it.
#[derive(Default)]
struct Held(Mutex<BTreeMap<u32, HeldRun>>);

struct HeldRun {
    last: u32,
    place: (u64, u64),
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, HeldRun>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to fetch a run of chunks, in this process and among processes. Given back on
/// drop.
pub(super) struct ChunkLock {
    file: Arc<File>,
    held: Arc<Held>,
    first: ChunkIndex,
    /// `None`: only held in this process so far.
    range: Option<ByteRange>,
}

impl Drop for ChunkLock {
    fn drop(&mut self) {
        if let Some(range) = self.range {
            // Can only fail for a bad descriptor; closing frees the lock as well.
            let _ = lock::unlock(&self.file, range);
        }
        self.held.lock().remove(&self.first.0);
    }
}

/// One byte of the map file, for a lock.
fn byte(offset: u64) -> io::Result<ByteRange> {
    ByteRange::new(offset, 1).map_err(io::Error::other)
}

/// Sets the access time, which says when the blob was used last: the file system may not.
fn touch(map: &File) {
    // Known a little less well then, and nothing else depends on it.
    let _ = map.set_times(FileTimes::new().set_accessed(SystemTime::now()));
}

/// True if a cache has the map open through another description; `None` if that can not be told.
pub(super) fn is_open_elsewhere(map: &File) -> io::Result<Option<bool>> {
    lock::is_locked(map, byte(USE_LOCK)?)
}

/// Keeps every cache from opening the map while `map` is open; false if one has it open, `None` if
/// that can not be told.
pub(super) fn try_hold_alone(map: &File) -> io::Result<Option<bool>> {
    lock::try_lock_strictly(map, byte(USE_LOCK)?)
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
        while !byte(USE_LOCK)
            .and_then(|byte| lock::try_lock(&file, Kind::Shared, byte))
            .map_err(|e| failed("lock it", e))?
        {
            tries -= 1;
            if tries == 0 {
                let what = format!("chunk map {}: in exclusive use; retry later", path.display());
                return Err(Error::new(ErrorKind::Unavailable, what));
            }
            std::thread::sleep(USE_PAUSE);
        }
        touch(&file);
        let storage = file.try_clone().and_then(wrap).map_err(|e| failed("duplicate the descriptor", e))?;
        let file = Arc::new(file);
        Ok(Self {
            storage,
            duties: Duties::new(Arc::clone(&file), DUTY_LOCKS),
            file,
            mirror: Mirror::new(chunk_count),
            marks: RandomState::new(),
            upgrade: Mutex::default(),
            clearing: RwLock::default(),
            held: Arc::default(),
        })
    }

    /// True if the data file holds the chunk of `record`, written by whichever process.
    ///
    /// Bytes read after a true answer are the chunk's if a second answer, after reading
    /// them, is true as well.
    pub(super) fn is_ready(&self, index: ChunkIndex, record: &Record) -> bool {
        if index.0 >= self.mirror.count() {
            return false;
        }
        if self.mirror.get(index) == self.mark_of(record) {
            return true;
        }
        if self.load(index) != *record {
            return false;
        }
        self.mark(index, record);
        // Whoever clears it writes the record first and the mark second, so one of us
        // sees the other.
        let ready = self.load(index) == *record;
        if !ready {
            self.unmark(index);
        }
        ready
    }

    fn mark_of(&self, record: &Record) -> u64 {
        self.marks.hash_one(record).max(1)
    }

    /// The record on disk; one that can not be read counts as empty.
    fn load(&self, index: ChunkIndex) -> Record {
        let mut record = Record::new_zeroed();
        match self.storage.read_at(record.as_mut_bytes(), offset(index.0)) {
            Ok(()) => record,
            Err(_) => Record::new_zeroed(),
        }
    }

    /// Tells this process that the chunk's data is in the file.
    pub(super) fn mark(&self, index: ChunkIndex, record: &Record) {
        self.mirror.set(index, self.mark_of(record));
    }

    /// Takes back [`ChunkMap::mark`].
    pub(super) fn unmark(&self, index: ChunkIndex) {
        self.mirror.clear(index);
    }

    /// True for each chunk of a run whose record is set.
    pub(super) fn are_ready(&self, run: &[Wanted]) -> Vec<bool> {
        let (Some((first, _)), Some((last, _))) = (run.first(), run.last()) else { return Vec::new() };
        if last.0 >= self.mirror.count() {
            return run.iter().map(|(index, record)| self.is_ready(*index, record)).collect();
        }
        let mut found = Vec::new();
        if self.load_batch(first.0, last.0 + 1, &mut found).is_err() {
            // Not ready is always safe to say.
            found.clear();
        }
        // Who is found unset may be marked in the mirror; who is found set must be looked at
        // in the order of `is_ready`.
        let set = |place: usize| found.get(place).is_some_and(|record| !record.is_empty());
        run.iter()
            .enumerate()
            .map(|(place, (index, record))| {
                (set(place) || self.mirror.get(*index) != 0) && self.is_ready(*index, record)
            })
            .collect()
    }

    /// True if the records of a run are set or may be: nothing else is set there, or
    /// overlaps them.
    ///
    /// # Errors
    /// The map can not be read: nobody knows what lies there.
    pub(super) fn has_room(&self, run: &[Wanted]) -> io::Result<bool> {
        let (Some((first, from)), Some((last, to))) = (run.first(), run.last()) else { return Ok(true) };
        let Some(end) = last.0.checked_add(1).filter(|end| *end <= self.mirror.count()) else {
            return Ok(false);
        };
        let _settled = self.clearing.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        self.load_batch(first.0, end, &mut found)?;
        let fit = |place: usize, record: &Record| {
            found.get(place).is_none_or(|found| found.is_empty() || found == record)
        };
        if !run.iter().enumerate().all(|(place, (_, record))| fit(place, record)) {
            return Ok(false);
        }
        let all_set = found.len() == run.len() && found.iter().all(|record| !record.is_empty());
        if all_set {
            return Ok(true);
        }
        let before = self.neighbour(*first, false)?.map(|r| r.place());
        let behind = self.neighbour(*last, true)?.map(|r| r.place());
        Ok(fits(before, (from.place().0, to.place().1), behind))
    }

    /// The nearest set record before or behind an index.
    fn neighbour(&self, index: ChunkIndex, behind: bool) -> io::Result<Option<Record>> {
        let count = self.mirror.count();
        let mut batch = Vec::new();
        let (mut first, mut last) = if behind { (index.0.saturating_add(1), count) } else { (0, index.0) };
        while first < last {
            let (from, to) = if behind {
                (first, last.min(first.saturating_add(BATCH)))
            } else {
                (last.saturating_sub(BATCH).max(first), last)
            };
            self.load_batch(from, to, &mut batch)?;
            let mut set = batch.iter().filter(|r| !r.is_empty());
            if let Some(record) = if behind { set.next() } else { set.next_back() } {
                return Ok(Some(*record));
            }
            (first, last) = if behind { (to, last) } else { (first, from) };
        }
        Ok(None)
    }

    /// Reads the records `from..to`; none if they were never written.
    fn load_batch(&self, from: u32, to: u32, batch: &mut Vec<Record>) -> io::Result<()> {
        load_records(&self.file, &*self.storage, from, to, batch)
    }

    /// Sets records whose data is durable, neighbours with one write. Leaves out, and
    /// answers, those that others have taken the room of.
    pub(super) fn set(&self, records: &mut [Wanted]) -> io::Result<Vec<ChunkIndex>> {
        records.sort_by_key(|(index, _)| *index);
        let byte = byte(SET_LOCK)?;
        lock::lock_within(&self.file, byte, SET_PATIENCE)?;
        let mut refused = Vec::new();
        let written = runs(records).try_for_each(|run| self.set_run(run, &mut refused));
        lock::unlock(&self.file, byte)?;
        written.map(|()| refused)
    }

    fn set_run(&self, run: &[Wanted], refused: &mut Vec<ChunkIndex>) -> io::Result<()> {
        if !self.has_room(run)? {
            if let [(index, _)] = run {
                refused.push(*index);
                return Ok(());
            }
            return run.iter().try_for_each(|one| self.set_run(std::slice::from_ref(one), refused));
        }
        let bytes: Vec<u8> = run.iter().flat_map(|(_, record)| record.as_bytes()).copied().collect();
        self.storage.write_at(&bytes, offset(run[0].0.0))
    }

    /// Runs `action` if no other cache has the map open, which none gets meanwhile.
    pub(super) fn alone<T>(&self, action: impl FnOnce() -> T) -> io::Result<Option<T>> {
        // Two threads share one description, hence one lock. Held during I/O, but only by
        // those who replace what another image left here.
        let _one = self.upgrade.lock().unwrap_or_else(PoisonError::into_inner);
        let byte = byte(USE_LOCK)?;
        if !lock::try_lock(&self.file, Kind::Exclusive, byte)? {
            return Ok(None);
        }
        let result = action();
        lock::try_lock(&self.file, Kind::Shared, byte)?;
        Ok(Some(result))
    }

    /// Forgets chunks, durably: their data may be overwritten or punched out afterwards.
    pub(super) fn clear(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
        let _clearing = self.clearing.write().unwrap_or_else(PoisonError::into_inner);
        for index in chunks {
            if index.0 >= self.mirror.count() {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.storage.write_at(Record::new_zeroed().as_bytes(), offset(index.0))?;
            self.unmark(*index);
        }
        self.storage.sync()
    }

    /// Forgets all chunks, durably.
    pub(super) fn clear_all(&self) -> io::Result<()> {
        let _clearing = self.clearing.write().unwrap_or_else(PoisonError::into_inner);
        let count = self.mirror.count();
        let mut batch = Vec::new();
        for from in (0..count).step_by(BATCH as usize) {
            self.load_batch(from, count.min(from.saturating_add(BATCH)), &mut batch)?;
            if batch.iter().any(|r| !r.is_empty()) {
                batch.fill(Record::new_zeroed());
                self.storage.write_at(batch.as_slice().as_bytes(), offset(from))?;
            }
        }
        self.mirror.clear_all();
        self.storage.sync()
    }

    /// Notes on disk that the blob is in use now.
    pub(super) fn touch(&self) {
        touch(&self.file);
    }

    /// Number of records set on disk.
    pub(super) fn ready_count(&self) -> u32 {
        let count = self.mirror.count();
        let (mut ready, mut batch) = (0, Vec::new());
        for from in (0..count).step_by(BATCH as usize) {
            if self.load_batch(from, count.min(from.saturating_add(BATCH)), &mut batch).is_err() {
                continue;
            }
            ready += batch.iter().filter(|r| !r.is_empty()).count();
        }
        u32::try_from(ready).unwrap_or(u32::MAX)
    }

    /// True if this process holds the right to a run with this chunk.
    pub(super) fn is_held_here(&self, index: ChunkIndex) -> bool {
        let held = self.held.lock();
        held.range(..=index.0).next_back().is_some_and(|(_, run)| run.last >= index.0)
    }

    /// True if another open map holds the right to fetch the chunk of `record`, as far as that can
    /// be told.
    pub(super) fn is_led_elsewhere(&self, record: &Record) -> bool {
        let (start, end) = record.place();
        let range = ByteRange::new(start.saturating_add(LOCK_BASE), end - start).map_err(io::Error::other);
        range.and_then(|range| lock::is_locked(&self.file, range)).is_ok_and(|locked| locked == Some(true))
    }

    /// Asks for the right to fetch the chunks of a run; `None` if somebody works on one of
    /// them, or on one that is in their way.
    pub(super) fn try_lock(&self, run: &[Wanted]) -> io::Result<Option<ChunkLock>> {
        let (Some((first, from)), Some((last, to))) = (run.first(), run.last()) else { return Ok(None) };
        let place = (from.place().0, to.place().1);
        let range = place.1.checked_sub(place.0).ok_or(io::ErrorKind::InvalidInput)?;
        let range = ByteRange::new(place.0.saturating_add(LOCK_BASE), range).map_err(io::Error::other)?;
        {
            let mut held = self.held.lock();
            let before = held.range(..first.0).next_back();
            let behind = held.range(first.0..).next();
            let apart = before.is_none_or(|(_, before)| before.last < first.0)
                && behind.is_none_or(|(next, _)| *next > last.0);
            if !apart || !fits(before.map(|(_, b)| b.place), place, behind.map(|(_, b)| b.place)) {
                return Ok(None);
            }
            held.insert(first.0, HeldRun { last: last.0, place });
        }
        let (file, held) = (Arc::clone(&self.file), Arc::clone(&self.held));
        let mut lock = ChunkLock { file, held, first: *first, range: None };
        if !lock::try_lock(&self.file, Kind::Exclusive, range)? {
            return Ok(None);
        }
        lock.range = Some(range);
        Ok(Some(lock))
    }
}
