//! What the threads of a build share: buffers, queues, and the first failure, under one lock.
//!
//! Work is handed over in batches of about a MiB, a few thousand a second at most, so one lock is
//! enough and makes the wake-up rule simple: whoever changes what a thread may wait for notifies
//! that condition, and a failure notifies all of them. Nothing blocks while holding the lock.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use storage::digest::Digest;

use super::DataOptions;
use super::batch::{Batch, Buffer};
use crate::chunks::FileRow;
use crate::layered::Below;
use crate::sink::BlobSink;
use crate::tree::LayerIndex;
use crate::{Error, ErrorKind, Result};

/// Bytes of a batch, unless a chunk is larger or many threads share the budget.
const BATCH_SIZE: usize = 1 << 20;
/// Bytes of batches that all threads together may have beyond their share, see [`Limits`].
const THREAD_BUDGET: usize = 16 << 20;
/// Bytes of batches that layers may read ahead of the one that is decided.
const AHEAD_BUDGET: usize = 24 << 20;
/// Bytes of batches that the layer being decided may have beside those; with half of it, workers that wait for
/// it cost the python image 6 % of its time.
const FRONT_BUDGET: usize = 24 << 20;
/// Layers of one build; far above the 254 blobs an image can hold, since empty layers have none.
const MAX_LAYERS: usize = 4096;

/// How many buffers of which size the build uses.
///
/// With `threads` workers and `c` the chunk size, the buffers take at most
/// `24 MiB + 24 MiB + k × threads × batch`, where `batch` is
/// `max(c, min(1 MiB, 16 MiB / (k × threads)))` and `k` is 1, or 2 if batches are not packed in place. The workers' compression output adds
/// `threads × c`. Both stay within the promise of `96 MiB + 3 × c × threads` for the whole builder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub buffer_size: usize,
    /// Buffers any layer may take.
    pub shared: usize,
    /// Buffers that the layer next to be decided may hold even if the shared ones are gone.
    pub reserve: usize,
}

impl Limits {
    fn new(options: &DataOptions) -> Self {
        let chunk = options.chunk_size as usize;
        let each = options.buffers_of_a_batch();
        let buffer_size =
            chunk.max(BATCH_SIZE.min(THREAD_BUDGET / (options.threads * each)).max((1 << 16) / each));
        let held = buffer_size * each;
        Self {
            buffer_size,
            shared: (AHEAD_BUDGET / held + options.threads).max(2),
            reserve: (FRONT_BUDGET / held).max(1),
        }
    }
}

/// What the committer is told.
pub(super) enum Event {
    /// The next layer exists and writes to this sink.
    Opened(BlobSink),
    /// The chunks of a batch are hashed.
    Hashed(Batch),
    /// The new chunks of a batch are compressed.
    Packed(Batch),
    /// A layer is complete: so many batches, these files.
    Closed { layer: LayerIndex, batches: u64, files: Vec<FileRow> },
    /// No more layers will come.
    Finish,
}

/// A job for the pool.
pub(super) enum Job {
    /// Digest and CRC of every chunk.
    Hash(Batch),
    /// Compress the new chunks.
    Pack(Batch),
}

#[derive(Default)]
struct State {
    /// Buffers nobody uses at the moment.
    idle: Vec<Buffer>,
    /// Buffers in use, all and by layer; `idle` and these never exceed shared + reserve.
    used: usize,
    used_by: Vec<usize>,
    /// The layer whose batches are decided now; only the committer advances it.
    front: usize,
    /// Jobs for the pool. Packing goes first: it is what frees buffers.
    to_pack: VecDeque<Batch>,
    to_hash: VecDeque<Batch>,
    /// For the committer; bounded, since every batch in it holds a buffer.
    events: VecDeque<Event>,
    /// The first failure. Once set, nothing is waited for any more.
    failure: Option<Error>,
    /// The build is over, well or not.
    closed: bool,
}

/// The shared state of a build.
pub(super) struct Hub {
    pub options: DataOptions,
    pub limits: Limits,
    /// Chunks that need not be stored.
    pub below: Option<Arc<Below>>,
    state: Mutex<State>,
    /// `to_pack` or `to_hash` grew.
    work: Condvar,
    /// A buffer was given back or the front moved on.
    room: Condvar,
    /// `events` grew.
    news: Condvar,
    /// Digest and CRC of a full chunk of zeros.
    zero: OnceLock<(Digest, u32)>,
}

impl Hub {
    pub fn new(options: DataOptions, below: Option<Arc<Below>>) -> Self {
        Self {
            below,
            limits: Limits::new(&options),
            options,
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            news: Condvar::new(),
            zero: OnceLock::new(),
        }
    }

    /// Digest and CRC of a chunk of zeros of full size, computed once.
    pub fn zero_chunk(&self) -> (Digest, u32) {
        *self.zero.get_or_init(|| {
            let zeros = vec![0; self.options.chunk_size as usize];
            (self.options.digester.digest(&zeros), crc32c::crc32c(&zeros))
        })
    }

    pub fn open_layer(&self, sink: BlobSink) -> Result<LayerIndex> {
        let mut state = self.lock();
        state.check()?;
        let index = state.used_by.len();
        if index >= MAX_LAYERS {
            return Err(Error::new(ErrorKind::Limit, format!("more than {MAX_LAYERS} layers")));
        }
        state.used_by.push(0);
        state.events.push_back(Event::Opened(sink));
        self.news.notify_one();
        Ok(LayerIndex(index as u16))
    }

    /// A cleared buffer for `layer`; waits until it may have one.
    pub fn acquire(&self, layer: LayerIndex) -> Result<Buffer> {
        let layer = usize::from(layer.0);
        let limits = self.limits;
        let mut state = self
            .room
            .wait_while(self.lock(), |s| {
                let shared = s.used < limits.shared;
                let reserved = s.front == layer
                    && s.used_by[layer] < limits.reserve
                    && s.used < limits.shared + limits.reserve;
                s.check().is_ok() && !shared && !reserved
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.check()?;
        state.used += 1;
        state.used_by[layer] += 1;
        let idle = state.idle.pop();
        drop(state);
        Ok(idle.unwrap_or_else(|| Buffer::new(limits.buffer_size)))
    }

    /// Takes a buffer back.
    pub fn release(&self, layer: LayerIndex, mut buffer: Buffer) {
        buffer.clear();
        let mut state = self.lock();
        state.used -= 1;
        state.used_by[usize::from(layer.0)] -= 1;
        state.idle.push(buffer);
        // All: the one that is woken might not be the one that may have it.
        self.room.notify_all();
    }

    /// Says which layer is decided now.
    pub fn set_front(&self, front: usize) {
        self.lock().front = front;
        self.room.notify_all();
    }

    pub fn submit(&self, job: Job) {
        let mut state = self.lock();
        match job {
            Job::Hash(batch) => state.to_hash.push_back(batch),
            Job::Pack(batch) => state.to_pack.push_back(batch),
        }
        self.work.notify_one();
    }

    /// The next job, or `None` when the build is over.
    pub fn next_job(&self) -> Option<Job> {
        let mut state = self
            .work
            .wait_while(self.lock(), |s| !s.is_over() && s.to_pack.is_empty() && s.to_hash.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if state.is_over() {
            return None;
        }
        state.to_pack.pop_front().map(Job::Pack).or_else(|| state.to_hash.pop_front().map(Job::Hash))
    }

    pub fn post(&self, event: Event) {
        self.lock().events.push_back(event);
        self.news.notify_one();
    }

    /// The next event, or `None` when the build is over.
    pub fn next_event(&self) -> Option<Event> {
        let mut state = self
            .news
            .wait_while(self.lock(), |s| !s.is_over() && s.events.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if state.is_over() { None } else { state.events.pop_front() }
    }

    pub fn request_finish(&self) {
        self.post(Event::Finish);
    }

    /// Fails the build, unless it has failed or ended before, and wakes everybody.
    pub fn fail(&self, error: Error) {
        let mut state = self.lock();
        if !state.is_over() {
            state.failure = Some(error);
        }
        drop(state);
        self.wake_all();
    }

    /// Fails the build because `who` panicked.
    pub fn fail_panicked(&self, who: &str, panic: &(dyn Any + Send)) {
        let message = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        self.fail(Error::new(ErrorKind::Cancelled, format!("{who} panicked, a bug: {message}")));
    }

    pub fn failure(&self) -> Option<Error> {
        self.lock().failure.clone()
    }

    /// Whether the build still goes on.
    pub fn check(&self) -> Result<()> {
        self.lock().check()
    }

    /// Ends the build: jobs and events that are left are dropped.
    pub fn close(&self) {
        self.lock().closed = true;
        self.wake_all();
    }

    fn wake_all(&self) {
        self.work.notify_all();
        self.room.notify_all();
        self.news.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while holding the lock; a poisoned one is still consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_over(&self) -> bool {
        self.closed || self.failure.is_some()
    }

    /// The failure, if the build is over.
    fn check(&self) -> Result<()> {
        match &self.failure {
            Some(error) => Err(error.clone()),
            None if self.closed => Err(Error::new(ErrorKind::Cancelled, "the build was given up")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_THREADS, Placement};
    use super::*;
    use storage::codec::Codec;
    use storage::digest::DigestAlgorithm;

    #[test]
    fn buffers_stay_within_the_promised_memory() {
        for threads in [1, 2, 3, 8, 16, 31, 64, 200, MAX_THREADS] {
            // Batches need chunks below 16 MiB.
            for (batch_size, largest) in [(0, 24), (0x1000, 23)] {
                for chunk_bits in 12..=largest {
                    let chunk = 1usize << chunk_bits;
                    let options = DataOptions {
                        codec: Codec::Zstd,
                        digester: DigestAlgorithm::Blake3,
                        chunk_size: chunk as u32,
                        threads,
                        placement: Placement::Blob,
                        batch_size,
                        cipher: None,
                    };
                    let limits = Limits::new(&options);
                    assert!(limits.buffer_size >= chunk);
                    let each = options.buffers_of_a_batch();
                    let buffers = (limits.shared + limits.reserve) * limits.buffer_size * each;
                    // The rest, 32 MiB and a chunk a thread, is for decoders, contexts and tables.
                    let promise = (64 << 20) + chunk * threads * each;
                    assert!(buffers <= promise, "{threads} threads, {chunk:#x}: {buffers} > {promise}");
                }
            }
        }
    }
}
