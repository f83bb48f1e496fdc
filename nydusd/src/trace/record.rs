//! Recording first touches of chunks on the path of every read.
//!
//! A touch that is not the first one costs one load of a bit that nobody writes any more.
//! First touches take a mutex for a push of 8 bytes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use storage::read::ReadSlice;
use tokio::sync::Notify;

use super::{Chunk, MAX_CHUNKS};

/// Words of bits in one piece: 4096 chunks.
const WORDS: usize = 64;
/// Bits of a word.
const BITS: usize = u64::BITS as usize;

type Piece = Box<[AtomicU64; WORDS]>;

/// A bit for each chunk of a blob, in pieces that are made when they are first needed: an image
/// may claim millions of chunks and use none.
struct Bits(Box<[OnceLock<Piece>]>);

impl Bits {
    fn new(count: u32) -> Self {
        let pieces = (count as usize).div_ceil(WORDS * BITS);
        Self(std::iter::repeat_with(OnceLock::new).take(pieces).collect())
    }

    /// Sets a bit; true if it was not set. False for what is behind the last piece.
    fn set(&self, index: u32) -> bool {
        let index = index as usize;
        let Some(piece) = self.0.get(index / (WORDS * BITS)) else { return false };
        let piece = piece.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        let word = &piece[index / BITS % WORDS];
        let bit = 1 << (index % BITS);
        word.load(Relaxed) & bit == 0 && word.fetch_or(bit, Relaxed) & bit == 0
    }
}

/// First touches, in order.
#[derive(Default)]
struct Touched {
    order: Vec<Chunk>,
    /// When the first and the last of them happened.
    span: Option<(Instant, Instant)>,
}

/// Records which chunks are touched, and in which order, until it is stopped or full.
pub(super) struct Recorder {
    /// Cleared for good at the end.
    on: AtomicBool,
    seen: Vec<Bits>,
    touched: Mutex<Touched>,
    /// Told of the first chunk and of the last one that there is room for.
    wake: Arc<Notify>,
}

impl Recorder {
    /// For blobs of so many chunks.
    pub fn new(chunk_counts: impl Iterator<Item = u32>, wake: Arc<Notify>) -> Self {
        Self {
            on: AtomicBool::new(true),
            seen: chunk_counts.map(Bits::new).collect(),
            touched: Mutex::default(),
            wake,
        }
    }

    /// One that never records.
    pub fn off() -> Self {
        Self { on: AtomicBool::new(false), seen: Vec::new(), touched: Mutex::default(), wake: Arc::default() }
    }

    /// Notes the chunks of a read.
    pub fn touch(&self, slices: &[ReadSlice]) {
        if !self.is_on() {
            return;
        }
        for slice in slices {
            let chunk = Chunk { blob: slice.blob, index: slice.extent.index.0 };
            if self.seen.get(chunk.blob as usize).is_some_and(|bits| bits.set(chunk.index)) {
                self.first_touch(chunk);
            }
        }
    }

    #[cold]
    fn first_touch(&self, chunk: Chunk) {
        let mut touched = self.touched();
        // Whoever stopped it has the list, or is about to take it.
        if !self.is_on() {
            return;
        }
        let now = Instant::now();
        let first = touched.span.map_or(now, |(first, _)| first);
        touched.span = Some((first, now));
        touched.order.push(chunk);
        let count = touched.order.len();
        if count >= MAX_CHUNKS {
            self.stop();
        }
        drop(touched);
        if count == 1 || count >= MAX_CHUNKS {
            self.wake.notify_one();
        }
    }

    /// True until it is stopped or full.
    pub fn is_on(&self) -> bool {
        self.on.load(Relaxed)
    }

    /// Ends it.
    pub fn stop(&self) {
        self.on.store(false, Relaxed);
    }

    /// When the first and the last chunk were first touched.
    pub fn span(&self) -> Option<(Instant, Instant)> {
        self.touched().span
    }

    /// What was touched so far.
    pub fn order(&self) -> Vec<Chunk> {
        self.touched().order.clone()
    }

    /// Takes what was touched; the next call finds nothing.
    pub fn take(&self) -> Vec<Chunk> {
        std::mem::take(&mut self.touched().order)
    }

    fn touched(&self) -> MutexGuard<'_, Touched> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
