//! The dedup database: which cache file of this node has which chunk.
//!
//! Images share chunks, and blobs do not: the same bytes in a blob of another image would be
//! fetched again. The database is a SQLite file that names, for the digest of a chunk, cache files
//! that have it. Daemons with their own cache directories share it.
//!
//! ```text
//!  opener ──ready chunks──▶ queue ──one thread, batches──▶ database.rs
//!  local  ◀──────────── rows of digests ── its own connection ──┘
//! ```
//!
//! # Invariants
//!
//! - A row is a hint. What it leads to is compared with the digest that the reader's image
//!   demands, with that image's algorithm and length, before anybody sees it: a row that is old,
//!   forged or of another algorithm costs time, never a wrong byte.
//! - Whoever mounts an image that names a digest gets bytes that match it, whichever image brought
//!   them here. The same holds for one cache directory: who shares the database shares what is in
//!   its files.
//! - Only chunks that are stored in clear have rows, and are looked up: the cache file of an
//!   encrypted one would give its content to whoever names its digest.
//! - Nobody waits for the database to be written, and a lookup has a limit. Rows are lost when
//!   the queue is full, when another process holds the file for too long, and with a crash: that
//!   costs a later fetch.
//! - A file that can not be used is warned of once, and done without; one that is busy is tried again.
//!
//! The file is as private as the cache: who can write it could have a daemon open other files, or
//! end it by cutting what SQLite has mapped. So it must belong to us,
//! and nobody else may write it or its directory.

mod database;
mod files;
mod writer;

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};
use tracing::{debug, warn};

pub(super) use self::database::Row;
use self::database::{Database, Trouble};
pub use self::files::open_cache_file;
use self::files::{is_closed, is_gone};
use crate::digest::Digest;
use crate::engine::Handle;
use crate::extent::{ChunkExtent, Cipher};
use crate::{Error, Result};

/// Rows that wait for the writer at most, about 1 MiB.
const QUEUE: usize = 16_384;

/// Rows that are worth a transaction of their own.
const BATCH: usize = 1024;

/// How long rows wait for more: a start makes thousands of chunks ready.
const GATHER: Duration = Duration::from_millis(100);

/// Time between attempts to open a file that another process has to itself.
const REOPEN: Duration = Duration::from_secs(10);

/// How long nothing is looked up after a lookup has failed.
const REST: Duration = Duration::from_secs(1);

/// Files remembered as closed to us, or as missing.
const MAX_FILES: usize = 1024;

/// How long a search takes at most, for chunks that a reader waits for and for others. A chunk
/// takes some microseconds; what is not found by then is fetched.
const LIMITS: Limits = Limits {
    demand: Duration::from_millis(5),
    ahead: Duration::from_millis(50),
    grace: Duration::from_millis(20),
    line: Duration::from_millis(200),
};

/// How long is waited for a search.
#[derive(Clone, Copy)]
struct Limits {
    demand: Duration,
    ahead: Duration,
    /// Beyond that: the disk, or all threads, may be busy.
    grace: Duration,
    /// How long a search for what nobody waits for waits for its turn; others wait for `grace`.
    line: Duration,
}

/// Opens a cache file for reading: how that is done where the file system is not seen as it is
/// by those who wrote the rows. `NotFound` says that the file is gone.
pub type OpenFile = Arc<dyn Fn(&Path) -> io::Result<File> + Send + Sync>;

/// A database, and the thread that writes it. Dropping it ends the thread; what has not been written
/// by then is lost ([`DedupDb::flush`]).
pub struct DedupDb {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    open_file: OpenFile,
    limits: Limits,
    /// Nothing blocks under it.
    queue: Mutex<Queue>,
    wake: Condvar,
    /// For chunks that a reader waits for: no other search is in its way.
    demand: Lane,
    ahead: Lane,
    /// Files that are there and can not be opened. Nothing blocks under it.
    barred: Mutex<HashSet<Arc<str>>>,
    warned: AtomicBool,
}

/// Searches, one at a time: should one not return, one thread is lost, not all.
struct Lane {
    turn: Arc<Semaphore>,
    /// Set once the file is open. Only who has the turn locks it.
    reader: OnceLock<Mutex<Database>>,
    /// No searches until then. Nothing blocks under it.
    rest: Mutex<Option<Instant>>,
    /// Who may read the files that were found.
    reads: Semaphore,
}

/// Files of other caches that are read at once, for readers and for others each: a disk that does
/// not answer holds as many threads.
const READS: usize = 4;

impl Lane {
    fn new() -> Self {
        Self {
            turn: Arc::new(Semaphore::new(1)),
            reader: OnceLock::new(),
            rest: Mutex::default(),
            reads: Semaphore::new(READS),
        }
    }

    fn is_resting(&self) -> bool {
        let until = *self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn rest(&self) {
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now().checked_add(REST);
    }
}

/// The database is done without.
struct GivenUp;

/// What the writer is to do.
#[derive(Default)]
struct Queue {
    fresh: Vec<Row>,
    wrong: Vec<Row>,
    /// Files that could not be found.
    missing: HashSet<Arc<str>>,
    /// Look for all files.
    collect: bool,
    /// Told when all of the above is done.
    waiting: Vec<SyncSender<()>>,
    /// There is no writer any more.
    closed: bool,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.wrong.is_empty() && self.missing.is_empty() && !self.is_urgent()
    }

    fn is_urgent(&self) -> bool {
        self.closed || !self.waiting.is_empty() || self.fresh.len() >= BATCH
    }
}

impl DedupDb {
    /// Uses the database at `path`, made if absent. Returns at once: the file is opened by the
    /// thread that writes it, and what is wrong with it is logged.
    ///
    /// # Errors
    /// `Io`: the system refuses a thread.
    pub fn open(path: impl Into<PathBuf>, open_file: OpenFile) -> Result<Arc<Self>> {
        Self::with_limits(path.into(), open_file, LIMITS)
    }

    /// Whose searches end only with what they look for.
    #[cfg(test)]
    pub(super) fn patient(path: impl Into<PathBuf>, open_file: OpenFile) -> Result<Arc<Self>> {
        let long = Duration::from_secs(60);
        let limits = Limits { demand: long, ahead: long, grace: long, line: long };
        Self::with_limits(path.into(), open_file, limits)
    }

    fn with_limits(path: PathBuf, open_file: OpenFile, limits: Limits) -> Result<Arc<Self>> {
        let failed = |e| Error::io("start the writer of the dedup database", e);
        let shared = Arc::new(Shared::new(std::path::absolute(&path).unwrap_or(path), open_file, limits));
        let writer = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("dedup".to_owned())
            .spawn(move || writer.write_all())
            .map_err(failed)?;
        Ok(Arc::new(Self { shared }))
    }

    /// Waits until what is known so far is written, for `patience` at most. True if it is.
    pub fn flush(&self, patience: Duration) -> bool {
        self.wait(patience, false)
    }

    /// Removes the rows of cache files that do not exist any more, and waits for that, for
    /// `patience` at most. True if it is done.
    pub fn collect_garbage(&self, patience: Duration) -> bool {
        self.wait(patience, true)
    }

    fn wait(&self, patience: Duration, collect: bool) -> bool {
        let (done, waiter) = sync_channel(1);
        {
            let mut queue = self.shared.queue();
            if queue.closed {
                return false;
            }
            queue.collect |= collect;
            queue.waiting.push(done);
        }
        self.shared.wake.notify_one();
        waiter.recv_timeout(patience).is_ok()
    }

    /// For each digest a file other than `own` that may have its chunk, and where. `demanded` says
    /// that a reader waits. Looks, and waits, for no longer than [`Limits`]: late or broken, it has
    /// found nothing.
    pub(super) async fn find(
        &self,
        engine: &Handle,
        digests: Vec<Digest>,
        own: Option<Arc<str>>,
        demanded: bool,
    ) -> Option<Vec<Option<Place>>> {
        let Limits { demand, ahead, grace, line } = self.shared.limits;
        let (limit, line) = if demanded { (demand, grace) } else { (ahead, line) };
        let lane = self.shared.lane(demanded);
        if lane.reader.get().is_none() || lane.is_resting() {
            return None;
        }
        let search = async {
            let turn = tokio::time::timeout(line, Arc::clone(&lane.turn).acquire_owned()).await?;
            let shared = Arc::clone(&self.shared);
            let search = engine.blocking(move || {
                // Returned only when the search has, whoever still waits for it.
                let _turn = turn;
                shared.find(&digests, own.as_deref(), demanded, limit)
            });
            tokio::time::timeout(limit + grace, search).await
        };
        match search.await {
            Ok(found) => found.ok().flatten(),
            Err(_) => {
                lane.rest();
                None
            }
        }
    }

    /// Waits for the right to read what was found.
    pub(super) async fn reading(&self, demanded: bool) -> Option<SemaphorePermit<'_>> {
        // Nobody closes it.
        self.shared.lane(demanded).reads.acquire().await.ok()
    }

    /// Removes a row that led to other bytes.
    pub(super) fn remove(&self, row: Row) {
        self.shared.push(|queue| queue.wrong.push(row));
    }
}

impl Drop for DedupDb {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
    }
}

impl fmt::Debug for DedupDb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DedupDb").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

/// A cache file of somebody else.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: Arc<str>,
    pub(super) file: File,
}

/// Where a chunk may be.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) source: Arc<Source>,
    /// First byte in the file.
    pub(super) offset: u64,
}

impl Place {
    /// What the database says.
    pub(super) fn row(&self, digest: Digest) -> Row {
        Row { digest, file: Arc::clone(&self.source.name), offset: self.offset }
    }
}

/// A cache file whose chunks are offered to others.
pub(super) struct Member {
    pub(super) database: Arc<DedupDb>,
    /// Its absolute path; `None` if that is no text, or not known: then nothing is offered.
    pub(super) file: Option<Arc<str>>,
}

impl Member {
    /// The data file at `path`, which is there.
    pub(super) fn new(database: Arc<DedupDb>, path: Option<&Path>) -> Self {
        // By one name, whatever names it was given.
        let path = path.and_then(|path| path.canonicalize().ok());
        Self { database, file: path.and_then(|path| path.to_str().map(Arc::from)) }
    }

    /// Notes that chunks are in the file. Never waits; what finds no room in the queue is left out.
    pub(super) fn offer<'a>(&self, chunks: impl Iterator<Item = &'a ChunkExtent>) {
        let Some(file) = &self.file else { return };
        let rows = chunks.filter_map(|chunk| {
            Some(Row { digest: key(chunk)?, file: Arc::clone(file), offset: chunk.decoded_offset })
        });
        self.database.shared.push(|queue| {
            let room = QUEUE.saturating_sub(queue.fresh.len());
            queue.fresh.extend(rows.take(room));
        });
    }
}

/// What a chunk is looked up by. `None`: it is not shared.
pub(super) fn key(chunk: &ChunkExtent) -> Option<Digest> {
    // What is encrypted in its blob is for those who read that image.
    if chunk.unit.cipher != Cipher::None {
        return None;
    }
    chunk.digest.map(|expected| expected.digest)
}

impl Shared {
    fn new(path: PathBuf, open_file: OpenFile, limits: Limits) -> Self {
        Self {
            path,
            open_file,
            limits,
            queue: Mutex::default(),
            wake: Condvar::new(),
            demand: Lane::new(),
            ahead: Lane::new(),
            barred: Mutex::default(),
            warned: AtomicBool::new(false),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn barred(&self) -> MutexGuard<'_, HashSet<Arc<str>>> {
        self.barred.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lane(&self, demanded: bool) -> &Lane {
        if demanded { &self.demand } else { &self.ahead }
    }

    /// Changes the queue and has the writer look at it.
    fn push(&self, change: impl FnOnce(&mut Queue)) {
        let mut queue = self.queue();
        if queue.closed {
            return;
        }
        let (was_empty, was_urgent) = (queue.is_empty(), queue.is_urgent());
        change(&mut queue);
        // Lookups are bounded, but nothing bounds how many of them fail.
        queue.wrong.truncate(QUEUE);
        if was_empty || (queue.is_urgent() && !was_urgent) {
            drop(queue);
            self.wake.notify_one();
        }
    }

    fn find(
        &self,
        digests: &[Digest],
        own: Option<&str>,
        demanded: bool,
        limit: Duration,
    ) -> Option<Vec<Option<Place>>> {
        let lane = self.lane(demanded);
        let reader = lane.reader.get()?;
        if self.queue().closed || lane.is_resting() {
            return None;
        }
        let deadline = Instant::now() + limit;
        let open = |name: &str| if own == Some(name) { None } else { self.open(name) };
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        match reader.find(digests, open, deadline) {
            Ok(found) => {
                let place = |(source, offset)| Place { source, offset };
                Some(found.into_iter().map(|found| found.map(place)).collect())
            }
            Err(trouble) => {
                drop(reader);
                match &trouble {
                    Trouble::Busy(error) => debug!(%error, "nothing is looked up in the dedup database"),
                    Trouble::Other(_) => self.warn(&trouble),
                    Trouble::Broken(_) => self.give_up(&trouble),
                }
                lane.rest();
                None
            }
        }
    }

    /// Opens a file that a row names. What is gone is removed from the database.
    fn open(&self, name: &str) -> Option<Arc<Source>> {
        if self.barred().contains(name) {
            return None;
        }
        match (self.open_file)(Path::new(name)) {
            Ok(file) => Some(Arc::new(Source { name: name.into(), file })),
            Err(e) if is_gone(&e) => {
                self.push(|queue| {
                    if queue.missing.len() < MAX_FILES {
                        queue.missing.insert(name.into());
                    }
                });
                None
            }
            Err(error) => {
                debug!(file = name, %error, "a cache file of the dedup database can not be used");
                let mut barred = self.barred();
                // What is short now may be there again.
                if is_closed(&error) && barred.len() < MAX_FILES {
                    barred.insert(name.into());
                }
                None
            }
        }
    }

    fn warn(&self, trouble: &dyn fmt::Display) {
        if !self.warned.swap(true, Relaxed) {
            warn!(
                "the dedup database {} can not be used, and chunks of other caches are fetched again: {trouble}; \
                 if it is damaged, remove it while no daemon uses it",
                self.path.display()
            );
        }
    }

    /// Does without the database from now on.
    fn give_up(&self, trouble: &dyn fmt::Display) {
        self.warn(trouble);
        *self.queue() = Queue { closed: true, ..Queue::default() };
        self.wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestAlgorithm;

    #[test]
    fn the_queue_has_a_bound() {
        let shared = Shared::new("/nowhere/cas.db".into(), Arc::new(open_cache_file), LIMITS);
        let database = Arc::new(DedupDb { shared: Arc::new(shared) });
        let member = Member { database: Arc::clone(&database), file: Some("/a.blob.data".into()) };
        let sample = crate::cache::tests::Sample::new(1);
        member.offer(std::iter::repeat_n(&sample.extents[0], QUEUE + 7));
        assert_eq!(database.shared.queue().fresh.len(), QUEUE);
        let digest = DigestAlgorithm::Sha256.digest(b"");
        for offset in 0..QUEUE as u64 + 7 {
            database.remove(Row { digest, file: "/a".into(), offset });
        }
        assert_eq!(database.shared.queue().wrong.len(), QUEUE);
    }
}
