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
//! - A file that can not be used is warned of once, and done without.
//!
//! The file is as private as the cache: who can write it could have a daemon open other files, or
//! end it by cutting what SQLite has mapped. So it must belong to us, and nobody else may write it.

mod database;

use std::collections::HashSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

pub(super) use self::database::Row;
use self::database::{Database, Trouble};
use crate::digest::Digest;
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

/// Files remembered as closed to us.
const MAX_BARRED: usize = 1024;

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
    /// Nothing blocks under it.
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Set once the file is open. Held during a lookup.
    reader: OnceLock<Mutex<Database>>,
    /// Lookups and files that failed lately. Nothing blocks under it.
    failures: Mutex<Failures>,
    warned: AtomicBool,
}

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

#[derive(Default)]
struct Failures {
    /// No lookups until then.
    rest: Option<Instant>,
    /// Files that are there and can not be opened.
    barred: HashSet<Arc<str>>,
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
        let path = path.into();
        let failed = |e| Error::io("start the writer of the dedup database", e);
        let shared = Arc::new(Shared::new(std::path::absolute(&path).unwrap_or(path), open_file));
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

    /// For each digest a file other than `own` that may have its chunk, and where. Reads the disk;
    /// looks for no longer than `limit`.
    pub(super) fn find(&self, digests: &[Digest], own: Option<&str>, limit: Duration) -> Vec<Option<Place>> {
        let deadline = Instant::now() + limit;
        self.shared.find(digests, own, deadline).unwrap_or_else(|| vec![None; digests.len()])
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
    let Cipher::None = chunk.unit.cipher;
    chunk.digest.map(|expected| expected.digest)
}

/// Opens a cache file of this machine: a regular file that is named like one, through no link.
///
/// # Errors
/// The system's; `InvalidInput`: it is no such file.
pub fn open_cache_file(path: &Path) -> io::Result<File> {
    let is_named = path.is_absolute() && path.as_os_str().as_encoded_bytes().ends_with(b".blob.data");
    if !is_named {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // A pipe must not hold us up.
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let file = match crate::outside::get() {
        Some(outside) => outside.open(path, false)?,
        None => OpenOptions::new().read(true).custom_flags(flags).open(path)?,
    };
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

impl Shared {
    fn new(path: PathBuf, open_file: OpenFile) -> Self {
        Self {
            path,
            open_file,
            queue: Mutex::default(),
            wake: Condvar::new(),
            reader: OnceLock::new(),
            failures: Mutex::default(),
            warned: AtomicBool::new(false),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn find(&self, digests: &[Digest], own: Option<&str>, deadline: Instant) -> Option<Vec<Option<Place>>> {
        let reader = self.reader.get()?;
        if self.queue().closed || self.failures().rest.is_some_and(|until| Instant::now() < until) {
            return None;
        }
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
                self.failures().rest = Instant::now().checked_add(REST);
                None
            }
        }
    }

    /// Opens a file that a row names. What is gone is removed from the database.
    fn open(&self, name: &str) -> Option<Arc<Source>> {
        if self.failures().barred.contains(name) {
            return None;
        }
        match (self.open_file)(Path::new(name)) {
            Ok(file) => Some(Arc::new(Source { name: name.into(), file })),
            Err(e) if is_gone(&e) => {
                self.push(|queue| {
                    queue.missing.insert(name.into());
                });
                None
            }
            Err(error) => {
                debug!(file = name, %error, "a cache file of the dedup database can not be used");
                let mut failures = self.failures();
                if failures.barred.len() < MAX_BARRED {
                    failures.barred.insert(name.into());
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

    /// The writer's thread.
    fn write_all(&self) {
        let (mut database, mut tried) = (None, None);
        loop {
            if database.is_none() && tried.is_none_or(|at: Instant| at.elapsed() >= REOPEN) {
                tried = Some(Instant::now());
                match self.connect() {
                    Ok(connected) => database = Some(connected),
                    Err(trouble @ Trouble::Busy(_)) => self.warn(&trouble),
                    Err(trouble) => return self.give_up(&trouble),
                }
            }
            let work = {
                let queue = self.queue();
                let waited = self.wake.wait_while(queue, |queue| queue.is_empty());
                let queue = waited.unwrap_or_else(PoisonError::into_inner);
                let waited = self.wake.wait_timeout_while(queue, GATHER, |queue| !queue.is_urgent());
                let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
                if queue.closed {
                    return;
                }
                std::mem::take(&mut *queue)
            };
            // Whoever waits hears of a failure by the end of its channel.
            let Some(database) = &mut database else { continue };
            match self.carry_out(database, &work) {
                // Who has waited long enough is gone.
                Ok(()) => work.waiting.iter().for_each(|waiter| {
                    let _ = waiter.send(());
                }),
                Err(trouble @ Trouble::Broken(_)) => return self.give_up(&trouble),
                Err(Trouble::Busy(error)) => debug!(%error, rows = work.fresh.len(), "rows are lost"),
                Err(trouble) => self.warn(&trouble),
            }
        }
    }

    fn connect(&self) -> std::result::Result<Database, Trouble> {
        check_private(&self.path).map_err(|error| Trouble::Other(error.into()))?;
        let database = Database::create(&self.path)?;
        let reader = Database::attach(&self.path)?;
        // Only this thread sets it, once.
        let _ = self.reader.set(Mutex::new(reader));
        Ok(database)
    }

    fn carry_out(&self, database: &mut Database, work: &Queue) -> std::result::Result<(), Trouble> {
        let is_there = |file: &str| match (self.open_file)(Path::new(file)) {
            Ok(_) => true,
            Err(e) => !is_gone(&e),
        };
        // A chunk may have been ready, and its file gone since.
        let files: HashSet<&str> = work.fresh.iter().map(|row| &*row.file).collect();
        let gone: HashSet<&str> = files.into_iter().filter(|file| !is_there(file)).collect();
        let rows: Vec<&Row> = work.fresh.iter().filter(|row| !gone.contains(&*row.file)).collect();
        if !rows.is_empty() {
            database.add(rows)?;
        }
        if !work.wrong.is_empty() {
            database.remove(&work.wrong)?;
        }
        let mut files: Vec<String> = work.missing.iter().map(|file| file.to_string()).collect();
        if work.collect {
            files.extend(database.files()?);
        }
        files.retain(|file| !is_there(file));
        if !files.is_empty() {
            database.remove_files(files.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

/// Makes the file for us alone, or sees that nobody else can write it.
fn check_private(path: &Path) -> io::Result<()> {
    let made =
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(libc::O_CLOEXEC).open(path);
    match made {
        Ok(_) => return Ok(()),
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        // Not opened: closing it would give back the locks that this process has on it.
        Err(_) => {}
    }
    let metadata = path.metadata()?;
    let ours = metadata.is_file() && metadata.uid() == nix::unistd::geteuid().as_raw();
    if ours && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other("it must be a file of this user that nobody else can write"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestAlgorithm;

    #[test]
    fn the_queue_has_a_bound() {
        let shared = Shared::new("/nowhere/cas.db".into(), Arc::new(open_cache_file));
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

    #[test]
    fn only_files_of_a_cache_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a.blob.data"), dir.path().join("b.blob.data"));
        std::fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        std::fs::create_dir(dir.path().join("c.blob.data")).unwrap();
        let pipe = dir.path().join("d.blob.data");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        assert!(open_cache_file(&file).is_ok());
        for other in [&link, &dir.path().join("c.blob.data"), &pipe, &dir.path().join("secret")] {
            assert!(!is_gone(&open_cache_file(other).unwrap_err()), "{}", other.display());
        }
        assert!(is_gone(&open_cache_file(&dir.path().join("e.blob.data")).unwrap_err()));
        assert!(is_gone(&open_cache_file(&file.join("f.blob.data")).unwrap_err()));
    }
}
