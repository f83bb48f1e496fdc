//! What is recorded while readers wait.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rafs::bootstrap::Nid;
use storage::backend::Supplier;
use storage::ids::{BlobId, ChunkIndex};
use storage::observe::{Fetched, Observer};
use tokio::sync::Notify;

use super::events::Events;
use super::processes::{Process, ProcessIndex, Processes, Thread};

/// Files whose reads are counted; those of more are counted together. As many as 8192 places
/// of a hash table hold.
const FILES: usize = 7168;

/// A read from the cache that takes longer has waited for the disk. In the page cache it
/// takes microseconds.
const SLOW_HIT: Duration = Duration::from_millis(1);

/// A copy from the data file that takes less is not worth remembering.
const NOTED_COPY: Duration = Duration::from_micros(100);

/// How a read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its bytes came.
    Done,
    /// Its bytes came from the cache, slowly.
    SlowHit,
    /// It failed.
    Failed,
    /// It has not ended.
    Waiting,
}

/// A read that waited. Microseconds count from the mount.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadEvent {
    pub nid: Nid,
    pub offset: u64,
    pub began_us: u64,
    pub took_us: u32,
    pub len: u32,
    pub process: ProcessIndex,
    pub end: End,
}

/// A chunk whose fetch ended. Microseconds count from the mount, and then from one moment
/// to the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct FetchEvent {
    pub wanted_us: u64,
    pub queue_us: u32,
    pub answer_us: u32,
    pub transfer_us: u32,
    pub decode_us: u32,
    pub blob: u32,
    pub chunk: u32,
    pub stored: u32,
    pub supplier: Option<Supplier>,
    pub demanded: bool,
    pub failed: bool,
}

/// A copy from the cache's data file for a reader that had waited.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyEvent {
    pub began_us: u64,
    pub took_us: u32,
    pub blob: u32,
    pub chunk: u32,
}

// What the bounds promise of memory.
const _: () = assert!(size_of::<ReadEvent>() <= 48 && size_of::<FetchEvent>() <= 48);
const _: () = assert!(size_of::<CopyEvent>() <= 24);

/// Reads of one file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FileUse {
    pub reads: u32,
    pub bytes: u64,
}

/// Reads of a mount.
#[derive(Debug, Default)]
struct Reads {
    events: Events<ReadEvent>,
    /// Reads that wait now, by the number of their [`Wait`].
    waiting: BTreeMap<u64, ReadEvent>,
    waits_begun: u64,
    files: HashMap<Nid, FileUse>,
    other_files: FileUse,
    processes: Processes,
    totals: ReadTotals,
}

/// What all reads come to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReadTotals {
    /// Reads that have ended.
    pub reads: u64,
    /// Of these, reads that waited.
    pub waited: u64,
    /// Of these, reads that failed.
    pub failed: u64,
    /// Time they waited, summed.
    pub waited_us: u64,
    /// The longest wait.
    pub longest_us: u32,
    /// When the first read came.
    pub first_us: Option<u64>,
    /// When the last wait ended.
    pub last_wait_us: u64,
}

#[derive(Debug, Default)]
struct Fetches {
    events: Events<FetchEvent>,
    copies: Events<CopyEvent>,
    /// Stored bytes that came before anybody had read anything.
    before_first_read: u64,
    /// Set with the first read.
    reads_begun: bool,
}

/// Everything recorded, at one moment.
pub(super) struct Recorded {
    /// Those that wait now are the last.
    pub reads: Vec<ReadEvent>,
    pub dropped_reads: u64,
    pub fetches: Vec<FetchEvent>,
    pub dropped_fetches: u64,
    pub copies: Vec<CopyEvent>,
    pub files: HashMap<Nid, FileUse>,
    pub other_files: FileUse,
    pub processes: Vec<Process>,
    pub totals: ReadTotals,
    pub before_first_read: u64,
    pub age_us: u64,
}

/// Records reads and fetches of one mount.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    blobs: HashMap<BlobId, u32>,
    /// Held for a few additions, never during I/O but the first look at a process.
    reads: Mutex<Reads>,
    fetches: Mutex<Fetches>,
    /// Told of the first read, and of the end.
    first_read: Arc<Notify>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic can only come from the allocator; counters and lists stay whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn short(us: u64) -> u32 {
    u32::try_from(us).unwrap_or(u32::MAX)
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.first_read.notify_one();
    }
}

impl Recorder {
    /// Records from now on, for an image with `blobs` in this order.
    pub fn new<'a>(blobs: impl IntoIterator<Item = &'a BlobId>) -> Self {
        Self {
            began: Instant::now(),
            blobs: (0..).zip(blobs).map(|(place, id)| (id.clone(), place)).collect(),
            reads: Mutex::default(),
            fetches: Mutex::default(),
            first_read: Arc::default(),
        }
    }

    /// Notes a read of `nid` by thread `tid` that was answered from the cache.
    pub fn hit(&self, nid: Nid, offset: u64, len: u32, tid: u32, elapsed: Duration) {
        let thread = (elapsed >= SLOW_HIT).then(|| Thread::look_up(tid));
        let began_us = self.now_us().saturating_sub(micros(elapsed));
        let mut reads = lock(&self.reads);
        self.begin(&mut reads, began_us);
        reads.count(nid, len);
        if let Some(thread) = thread {
            let process = reads.processes.index(thread);
            let took_us = short(micros(elapsed));
            reads.end(ReadEvent { nid, offset, began_us, took_us, len, process, end: End::SlowHit });
        }
    }

    /// Notes a read that has to wait; its end is what becomes of the answer.
    pub fn wait(self: &Arc<Self>, nid: Nid, offset: u64, len: u32, tid: u32, began: Instant) -> Wait {
        let thread = Thread::look_up(tid);
        let began_us = micros(began.saturating_duration_since(self.began));
        let mut reads = lock(&self.reads);
        self.begin(&mut reads, began_us);
        let process = reads.processes.index(thread);
        let number = reads.waits_begun;
        reads.waits_begun += 1;
        let event = ReadEvent { nid, offset, began_us, took_us: 0, len, process, end: End::Waiting };
        reads.waiting.insert(number, event);
        Wait { recorder: Arc::clone(self), number, end: End::Failed }
    }

    /// Is told once there is a read, or that there will be none.
    pub(super) fn first_read(&self) -> Arc<Notify> {
        Arc::clone(&self.first_read)
    }

    pub(super) fn totals(&self) -> ReadTotals {
        lock(&self.reads).totals
    }

    /// True while a read waits.
    pub(super) fn is_waited_for(&self) -> bool {
        !lock(&self.reads).waiting.is_empty()
    }

    /// Microseconds since the mount.
    pub(super) fn now_us(&self) -> u64 {
        micros(self.began.elapsed())
    }

    pub(super) fn recorded(&self) -> Recorded {
        let age_us = self.now_us();
        let (mut events, dropped_reads, files, other_files, processes, totals) = {
            let reads = lock(&self.reads);
            let (mut events, dropped) = reads.events.all();
            events.extend(reads.waiting.values());
            let processes = reads.processes.all().to_vec();
            (events, dropped, reads.files.clone(), reads.other_files, processes, reads.totals)
        };
        for event in events.iter_mut().filter(|event| event.end == End::Waiting) {
            event.took_us = short(age_us.saturating_sub(event.began_us));
        }
        let fetches = lock(&self.fetches);
        let before_first_read = fetches.before_first_read;
        let (copies, _) = fetches.copies.all();
        let (fetches, dropped_fetches) = fetches.events.all();
        Recorded {
            reads: events,
            dropped_reads,
            fetches,
            dropped_fetches,
            copies,
            files,
            other_files,
            processes,
            totals,
            before_first_read,
            age_us,
        }
    }

    /// The first read ends the time before it.
    fn begin(&self, reads: &mut Reads, began_us: u64) {
        if reads.totals.first_us.is_none() {
            reads.totals.first_us = Some(began_us);
            lock(&self.fetches).reads_begun = true;
            self.first_read.notify_one();
        }
    }
}

impl Reads {
    fn count(&mut self, nid: Nid, len: u32) {
        self.totals.reads += 1;
        let room = self.files.len() < FILES;
        let file = match self.files.get_mut(&nid) {
            Some(file) => file,
            None if room => self.files.entry(nid).or_default(),
            None => &mut self.other_files,
        };
        file.reads = file.reads.saturating_add(1);
        file.bytes += u64::from(len);
    }

    /// A wait is over.
    fn end(&mut self, event: ReadEvent) {
        let totals = &mut self.totals;
        totals.waited += 1;
        totals.failed += u64::from(event.end == End::Failed);
        totals.waited_us += u64::from(event.took_us);
        totals.longest_us = totals.longest_us.max(event.took_us);
        totals.last_wait_us = totals.last_wait_us.max(event.began_us + u64::from(event.took_us));
        self.events.push(event);
    }
}

/// A read that waits. It counts as failed unless told otherwise before it is dropped.
#[derive(Debug)]
pub struct Wait {
    recorder: Arc<Recorder>,
    number: u64,
    end: End,
}

impl Wait {
    /// Its bytes came.
    pub fn succeed(&mut self) {
        self.end = End::Done;
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let now_us = self.recorder.now_us();
        let mut reads = lock(&self.recorder.reads);
        let Some(event) = reads.waiting.remove(&self.number) else { return };
        reads.count(event.nid, if self.end == End::Done { event.len } else { 0 });
        let took_us = short(now_us.saturating_sub(event.began_us));
        reads.end(ReadEvent { took_us, end: self.end, ..event });
    }
}

impl Observer for Recorder {
    fn fetched(&self, event: &Fetched<'_>) {
        let Some(blob) = self.blobs.get(event.blob) else { return };
        let between = |from: Instant, to: Instant| short(micros(to.saturating_duration_since(from)));
        let record = FetchEvent {
            wanted_us: micros(event.wanted.saturating_duration_since(self.began)),
            queue_us: between(event.wanted, event.requested),
            answer_us: between(event.requested, event.answered),
            transfer_us: between(event.answered, event.received),
            decode_us: between(event.received, event.verified),
            blob: *blob,
            chunk: event.chunk.0,
            stored: short(event.stored),
            supplier: event.supplier,
            demanded: event.demanded,
            failed: event.error.is_some(),
        };
        let mut fetches = lock(&self.fetches);
        if !fetches.reads_begun && !record.failed {
            fetches.before_first_read += event.stored;
        }
        fetches.events.push(record);
    }

    fn copied(&self, blob: &BlobId, chunk: ChunkIndex, began: Instant, ended: Instant) {
        let took = ended.saturating_duration_since(began);
        let Some(blob) = self.blobs.get(blob).filter(|_| took >= NOTED_COPY) else { return };
        let began_us = micros(began.saturating_duration_since(self.began));
        let copy = CopyEvent { began_us, took_us: short(micros(took)), blob: *blob, chunk: chunk.0 };
        lock(&self.fetches).copies.push(copy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder() -> (BlobId, Arc<Recorder>) {
        let blob = BlobId::new("b").unwrap();
        (blob.clone(), Arc::new(Recorder::new([&blob])))
    }

    fn fetched(recorder: &Recorder, blob: &BlobId, stored: u64) {
        let now = Instant::now();
        recorder.fetched(&Fetched {
            blob,
            chunk: ChunkIndex(3),
            stored,
            demanded: false,
            supplier: Some(Supplier::Origin),
            wanted: now,
            requested: now,
            answered: now,
            received: now,
            verified: now,
            error: None,
        });
    }

    #[test]
    fn waits_count_as_what_became_of_them() {
        let (_, recorder) = recorder();
        let tid = nix::unistd::gettid().as_raw().cast_unsigned();
        let begin = |nid| recorder.wait(Nid(nid), 0, 10, tid, Instant::now());
        let (mut good, bad, open) = (begin(1), begin(2), begin(3));
        good.succeed();
        drop((good, bad));
        recorder.hit(Nid(1), 0, 5, tid, Duration::ZERO);
        recorder.hit(Nid(1), 0, 5, tid, SLOW_HIT);
        let recorded = recorder.recorded();
        let ends: Vec<End> = recorded.reads.iter().map(|read| read.end).collect();
        assert_eq!(ends, [End::Done, End::Failed, End::SlowHit, End::Waiting]);
        let totals = recorded.totals;
        assert_eq!((totals.reads, totals.waited, totals.failed), (4, 3, 1));
        assert_eq!((recorded.files[&Nid(1)].reads, recorded.files[&Nid(1)].bytes), (3, 20));
        assert_eq!(recorded.files[&Nid(2)].bytes, 0);
        assert!(recorder.is_waited_for());
        drop(open);
        assert!(!recorder.is_waited_for());
    }

    #[test]
    fn bytes_before_the_first_read_are_told_apart() {
        let (blob, recorder) = recorder();
        fetched(&recorder, &blob, 70);
        recorder.hit(Nid(1), 0, 5, 0, Duration::ZERO);
        fetched(&recorder, &blob, 30);
        let began = Instant::now();
        recorder.copied(&blob, ChunkIndex(9), began, began + NOTED_COPY);
        recorder.copied(&blob, ChunkIndex(9), began, began);
        let recorded = recorder.recorded();
        assert_eq!((recorded.before_first_read, recorded.fetches.len(), recorded.copies.len()), (70, 2, 1));
    }

    #[test]
    fn files_are_bounded() {
        let (_, recorder) = recorder();
        for nid in 0..2 * FILES as u64 {
            recorder.hit(Nid(nid), 0, 1, 0, Duration::ZERO);
        }
        let recorded = recorder.recorded();
        assert_eq!((recorded.files.len(), recorded.other_files.reads), (FILES, FILES as u32));
    }
}
