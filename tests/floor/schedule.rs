//! The work of a plan on all cores: whoever is free packs what is decoded, or else inflates a piece of the
//! layer that has most left. Layers are decoded into memory of their own, so nobody waits for room.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flate2::bufread::MultiGzDecoder;
use storage::codec::{Codec, Compressor};
use storage::digest::{Digest, DigestAlgorithm, Hasher};
use tests::{Result, ensure};

use crate::plan::{Layer, Step};

/// A layer that is being inflated.
struct Inflating<'a> {
    layer: usize,
    stored: &'a [u8],
    decoder: MultiGzDecoder<&'a [u8]>,
    /// Of the stored bytes, and of the tar.
    hashers: (Hasher, Hasher),
    steps: std::slice::Iter<'a, Step>,
    number: usize,
    /// Memory for what is still to come.
    room: &'a mut [u8],
}

/// A decoded stretch.
struct Decoded<'a> {
    layer: usize,
    number: usize,
    step: &'a Step,
    bytes: &'a [u8],
}

/// A blob: its parts, as they come, are hashed in order.
struct Blob {
    parts: Vec<Option<Vec<u8>>>,
    hashed: usize,
    hasher: Hasher,
}

#[derive(Default)]
struct State<'a> {
    idle: Vec<Inflating<'a>>,
    decoded: VecDeque<Decoded<'a>>,
    /// Layers that are not inflated to their end.
    open: usize,
    failed: bool,
    /// All digests that were computed; somebody has to look at them.
    digests: Vec<Digest>,
}

struct Shared<'a> {
    state: Mutex<State<'a>>,
    news: Condvar,
    blobs: Vec<Mutex<Blob>>,
    codec: Codec,
}

/// How long the work took.
pub(crate) fn run(files: &[Vec<u8>], plans: &[Layer], codec: Codec) -> Result<Duration> {
    // Written, so that it is there before the clock runs.
    let mut memory: Vec<Vec<u8>> = plans.iter().map(|plan| vec![1; plan.decoded_size]).collect();
    let new = || DigestAlgorithm::Sha256.hasher();
    let idle = files.iter().zip(plans).zip(&mut memory).enumerate().map(|(layer, ((stored, plan), room))| {
        let decoder = MultiGzDecoder::new(&stored[..]);
        Inflating {
            layer,
            stored,
            decoder,
            hashers: (new(), new()),
            steps: plan.steps.iter(),
            number: 0,
            room,
        }
    });
    let state = State { idle: idle.collect(), open: plans.len(), ..State::default() };
    let blob =
        |plan: &Layer| Blob { parts: plan.steps.iter().map(|_| None).collect(), hashed: 0, hasher: new() };
    let shared = Shared {
        state: Mutex::new(state),
        news: Condvar::new(),
        blobs: plans.iter().map(|plan| Mutex::new(blob(plan))).collect(),
        codec,
    };
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| shared.work())).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
    })?;
    let took = start.elapsed();
    for blob in shared.blobs {
        let blob = blob.into_inner().unwrap_or_else(PoisonError::into_inner);
        ensure!(blob.hashed == blob.parts.len(), "a blob was not hashed to its end");
    }
    Ok(took)
}

enum Job<'a> {
    Inflate(Box<Inflating<'a>>),
    Pack(Decoded<'a>),
}

impl<'a> Shared<'a> {
    fn work(&self) -> Result<()> {
        let mut compressor = Compressor::for_chunks(self.codec)?;
        let (mut digests, mut scratch) = (Vec::new(), Vec::new());
        while let Some(job) = self.next() {
            let done = match job {
                Job::Inflate(layer) => self.inflate(layer),
                Job::Pack(decoded) => self.pack(&decoded, &mut compressor, &mut digests, &mut scratch),
            };
            if done.is_err() {
                self.state().failed = true;
                self.news.notify_all();
                return done;
            }
        }
        self.state().digests.append(&mut digests);
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Job<'a>> {
        let waiting =
            |s: &mut State<'a>| !s.failed && s.decoded.is_empty() && s.idle.is_empty() && s.open > 0;
        let mut state = self.news.wait_while(self.state(), waiting).unwrap_or_else(PoisonError::into_inner);
        if state.failed {
            return None;
        }
        if let Some(decoded) = state.decoded.pop_front() {
            return Some(Job::Pack(decoded));
        }
        let most = (0..state.idle.len()).max_by_key(|&place| state.idle[place].room.len())?;
        Some(Job::Inflate(Box::new(state.idle.swap_remove(most))))
    }

    fn inflate(&self, mut layer: Box<Inflating<'a>>) -> Result<()> {
        let rest = |layer: &Inflating<'a>| layer.stored.len() - layer.decoder.get_ref().len();
        let from = rest(&layer);
        let decoded = layer.steps.next().map(|step| {
            let (bytes, room) = std::mem::take(&mut layer.room).split_at_mut(step.len);
            layer.room = room;
            layer.decoder.read_exact(bytes)?;
            layer.hashers.1.update(bytes);
            layer.number += 1;
            Ok::<_, std::io::Error>(Decoded { layer: layer.layer, number: layer.number - 1, step, bytes })
        });
        let decoded = decoded.transpose()?;
        let ended = decoded.is_none();
        if ended {
            ensure!(layer.decoder.read(&mut [0])? == 0, "a layer goes on behind its end");
        }
        let to = if ended { layer.stored.len() } else { rest(&layer) };
        layer.hashers.0.update(&layer.stored[from..to]);
        let digests = ended.then(|| [layer.hashers.0.clone().finish(), layer.hashers.1.clone().finish()]);
        let mut state = self.state();
        state.decoded.extend(decoded);
        match digests {
            Some(digests) => {
                state.digests.extend(digests);
                state.open -= 1;
            }
            None => state.idle.push(*layer),
        }
        drop(state);
        self.news.notify_all();
        Ok(())
    }

    fn pack(
        &self,
        decoded: &Decoded<'a>,
        compressor: &mut Compressor,
        digests: &mut Vec<Digest>,
        scratch: &mut Vec<u8>,
    ) -> Result<()> {
        let Decoded { layer, number, step, bytes } = *decoded;
        digests.extend(step.chunks.iter().map(|chunk| DigestAlgorithm::Sha256.digest(&bytes[chunk.clone()])));
        let mut packed = Vec::new();
        for unit in &step.units {
            let unit = match &unit[..] {
                [chunk] => &bytes[chunk.clone()],
                chunks => {
                    scratch.clear();
                    chunks.iter().for_each(|chunk| scratch.extend_from_slice(&bytes[chunk.clone()]));
                    &scratch[..]
                }
            };
            packed.extend_from_slice(compressor.compress_borrowed(unit)?.unwrap_or(unit));
        }
        let blob = &mut *self.blobs[layer].lock().unwrap_or_else(PoisonError::into_inner);
        blob.parts[number] = Some(packed);
        while let Some(part) = blob.parts.get_mut(blob.hashed).and_then(Option::take) {
            blob.hasher.update(&part);
            blob.hashed += 1;
        }
        if blob.hashed == blob.parts.len() {
            digests.push(blob.hasher.clone().finish());
        }
        Ok(())
    }
}
