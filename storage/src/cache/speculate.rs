//! What to read ahead of readers that follow no recorded order.
//!
//! Each miss plants a *seed* where it was: files that are read one after another lie together
//! in a blob, so the chunks behind it (and, less so, before it) are the best guess. Seeds grow
//! in steps, the ones that last proved right first. Each step is twice the one before, or half
//! of what the seed has proved right.
//! Seeds that meet become one, so a reader of everything ends up with one long run through
//! the blob.
//!
//! What it may cost is a *credit* in bytes, earned by what readers turn out to need: a miss,
//! or the first touch of what was read ahead. Reading ahead that helps pays for more of it;
//! once readers fall silent or the guesses are wrong it runs dry.
//!
//! An order that tells what readers will want (a trace, an image's hints) leaves little to
//! guess. While it is under way, and as long as it is trusted then, guesses stay close to misses; what
//! readers need beside it uses the trust up. So they do while somebody finds out what will be wanted.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::ahead::cost;
use super::duty::HeldDuty;
use super::set::{Look, Shared};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::extent::ChunkExtent;
use crate::ids::ChunkIndex;
use crate::link::Link;
use crate::prefetch::{Class, Prefer, ReadAhead};

/// Bytes that a byte needed by a reader earns when time counts: a start that reads a third of
/// what surrounds its accesses is served from what was read ahead.
const TIME_GAIN: f64 = 3.0;

/// The same when bytes count, or an order is trusted: what is fetched stays below twice what is
/// read.
const BYTES_GAIN: f64 = 0.8;

/// Bytes that a miss earns when time counts, in multiples of what could have come while its
/// reader waited.
const MISS_GAIN: f64 = 2.0;

/// Most credit.
const MAX_CREDIT: f64 = (32 << 20) as f64;

/// Most credit while an order tells what is wanted: guesses fill no link for it.
const GUIDED_CREDIT: f64 = (1 << 20) as f64;

/// Bytes that an order must name for each byte needed beside it, or before it came to that, to
/// stay trusted.
const TRUST_COST: f64 = 8.0;

/// A source that answers faster than this is not worth guessing for: bytes count.
const NEAR: Duration = Duration::from_millis(1);

/// First step of a seed, and what a first miss is widened by before anything is known.
const FIRST_STEP: u64 = 256 << 10;

/// Largest step: a reader who wants its last chunk waits for the rest of it.
const MAX_STEP: u64 = 4 << 20;

/// When bytes count, steps and widened reads stay this small.
const CAREFUL_STEP: u64 = 128 << 10;

/// Credit that a step wants: less is not worth a request.
const LEAST_CREDIT: f64 = CAREFUL_STEP as f64;

/// Seeds that are remembered.
const MAX_SEEDS: usize = 128;

/// Chunks that are looked at for one step: ready ones cost a look, too.
const MAX_LOOK: u32 = 1024;

/// Seeds that one step takes from.
const MAX_SEEDS_A_STEP: usize = 16;

/// One step in this many goes backward.
const BACKWARD: u32 = 4;

/// The duty to guess is kept for this long after the last miss or hit: a program that starts
/// computes for a second between its reads.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// After this long the duty goes to whoever misses next, so that a process that reads on and on
/// does not keep it for good.
const TERM: Duration = Duration::from_secs(30);

/// What one image's readers did, and what follows.
#[derive(Debug)]
pub(super) struct Speculator {
    read_ahead: ReadAhead,
    /// Nothing blocks under it.
    state: Mutex<State>,
    /// Told of each miss and hit under the lock; closed with the image.
    news: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    credit: f64,
    /// Bytes that orders have named, less what misses cost.
    trust: f64,
    /// Orders under way that name what readers will want.
    orders: usize,
    /// Until then somebody finds out what readers will want.
    guided: Option<Instant>,
    /// Most recently proved right first.
    seeds: VecDeque<Seed>,
    /// A task works on them, or waits for news of them.
    running: bool,
}

/// A part of a blob that has been read, or read ahead.
#[derive(Debug)]
struct Seed {
    blob: u32,
    /// Chunks `low..high`.
    low: u32,
    high: u32,
    /// Steps since a reader last proved it right.
    steps: u32,
    /// Stored bytes of it that readers have needed after they were read ahead.
    proved: u64,
    /// Nothing is left behind it, or before it.
    ended: bool,
    begun: bool,
}

/// An order under way.
pub(super) struct Telling<'a>(&'a Speculator);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.0.lock().orders -= 1;
    }
}

/// How far guesses go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    /// Bytes count.
    Careful,
    /// Time counts, and an order is trusted.
    Guided,
    /// Time counts, and nothing but the accesses is known.
    Free,
}

impl Mood {
    /// Bytes that a needed byte earns.
    fn gain(self) -> f64 {
        match self {
            Self::Careful | Self::Guided => BYTES_GAIN,
            Self::Free => TIME_GAIN,
        }
    }
}

/// Whether a seed can grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Growth {
    Open,
    Ended,
}

/// The next step of a seed.
struct Step {
    blob: u32,
    chunks: Vec<ChunkExtent>,
    bytes: u64,
}

impl Step {
    fn cost(&self) -> u64 {
        cost(self.chunks.len(), self.bytes)
    }
}

impl Speculator {
    pub(super) fn new(read_ahead: ReadAhead) -> Self {
        let state = State { credit: CAREFUL_STEP as f64, ..State::default() };
        Self { read_ahead, state: Mutex::new(state), news: watch::Sender::new(()) }
    }

    /// Stored bytes that a missing read of whoever has the duty to guess is widened by.
    pub(super) fn widening(&self, link: &Link) -> u64 {
        let most = u64::from(self.read_ahead.amplify);
        let state = self.lock();
        // When time counts, misses are widened on credit, too.
        let (step, least) = match self.mood(link, &state) {
            Mood::Careful => (CAREFUL_STEP, 0),
            Mood::Guided => (FIRST_STEP, FIRST_STEP / 2),
            Mood::Free => (link.held().map_or(FIRST_STEP, |held| (held / 2).max(FIRST_STEP)), FIRST_STEP / 2),
        };
        let credit = state.credit.max(0.0) as u64;
        step.min(most).min(credit.max(least))
    }

    /// Notes that an order names `bytes` that readers will want.
    pub(super) fn told(&self, bytes: u64) {
        self.lock().trust += bytes as f64;
    }

    /// Notes that an order that names what readers will want is under way, until the answer goes: readers
    /// who are faster than it do not prove it wrong, and the link has enough to do.
    pub(super) fn telling(&self) -> Telling<'_> {
        self.lock().orders += 1;
        Telling(self)
    }

    /// Notes that what readers will want is being found out, and will be ordered, for so long from now.
    pub(super) fn guide(&self, time: Duration) {
        self.lock().guided = Instant::now().checked_add(time);
    }

    fn mood(&self, link: &Link, state: &State) -> Mood {
        if self.read_ahead.prefer == Prefer::Bytes || link.round_trip().is_some_and(|time| time < NEAR) {
            Mood::Careful
        } else if state.orders > 0
            || state.trust > 0.0
            || state.guided.is_some_and(|until| Instant::now() < until)
        {
            Mood::Guided
        } else {
            Mood::Free
        }
    }

    /// False if nothing is ever read ahead.
    pub(super) fn guesses(&self) -> bool {
        self.read_ahead.amplify > 0
    }

    /// Notes that a reader missed `needed` stored bytes, that chunks `low..high` of the blob
    /// are now fetched, `widened` bytes of them ahead, and starts reading ahead.
    pub(super) fn missed(
        shared: &Arc<Shared>,
        duty: HeldDuty,
        blob: u32,
        (low, high): (u32, u32),
        needed: u64,
        widened: u64,
    ) {
        let this = &shared.speculator;
        let link = shared.engine.link();
        let wait = link.held().unwrap_or(FIRST_STEP) as f64;
        let runs = {
            let mut state = this.lock();
            let mood = this.mood(link, &state);
            state.restrain(mood);
            state.earn(needed as f64 * mood.gain());
            if mood == Mood::Free {
                state.earn(wait * MISS_GAIN);
            }
            state.distrust(needed);
            state.credit -= widened as f64;
            state.plant(blob, low, high);
            this.news.send_replace(());
            std::mem::replace(&mut state.running, true)
        };
        if !runs {
            shared.engine.spawn(run(Arc::downgrade(shared), duty));
        }
    }

    /// Notes that a reader touched `needed` stored bytes that were read ahead, in chunk `index`.
    pub(super) fn hit(shared: &Arc<Shared>, blob: u32, index: ChunkIndex, needed: u64) {
        let this = &shared.speculator;
        let start = {
            let mut state = this.lock();
            let gain = this.mood(shared.engine.link(), &state).gain();
            let proof = state.proved_right(blob, index.0, needed);
            // What an order brought says nothing about the guesses.
            if proof.is_some() {
                this.news.send_replace(());
                state.earn(needed as f64 * gain);
                state.distrust(needed);
            }
            proof == Some(Growth::Open) && state.credit >= LEAST_CREDIT && !state.running
        };
        if start
            && let Some(duty) = shared.duty_to_guess()
            && !std::mem::replace(&mut this.lock().running, true)
        {
            shared.engine.spawn(run(Arc::downgrade(shared), duty));
        }
    }

    /// Largest step now.
    fn max_step(&self, link: &Link) -> u64 {
        let state = self.lock();
        match self.mood(link, &state) {
            Mood::Careful => CAREFUL_STEP,
            Mood::Guided => FIRST_STEP,
            Mood::Free => {
                let proved = state.seeds.front().map_or(0, |seed| seed.proved / 2);
                link.held().unwrap_or(0).max(proved).clamp(FIRST_STEP, MAX_STEP)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; a poisoned state would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads ahead, and gives the duty back some time after the credit or the guesses ran out: were it
/// handed on at each pause of a start, every process that starts the image would spend a credit of
/// its own.
async fn run(shared: Weak<Shared>, _duty: HeldDuty) {
    let Some(mut news) = shared.upgrade().map(|shared| shared.speculator.news.subscribe()) else { return };
    let term = Instant::now() + TERM;
    loop {
        let Some(alive) = shared.upgrade() else { return };
        let link = Arc::clone(alive.engine.link());
        let max_step = alive.speculator.max_step(&link);
        drop(alive);
        let admitted = timeout_at(term, link.admit(Class::Predicted, max_step)).await;
        let Some(alive) = shared.upgrade() else { return };
        let slot = match admitted {
            Ok(slot) if Instant::now() < term => slot,
            _ => {
                alive.speculator.lock().running = false;
                return;
            }
        };
        // Chosen only now: the last miss counts.
        news.mark_unchanged();
        if let Some(step) = next_step(&alive, max_step) {
            alive.speculator.lock().credit -= step.bytes as f64;
            slot.shrink(step.cost());
            alive.fetch_ahead(step.blob, &step.chunks, slot);
            continue;
        }
        drop((slot, alive));
        if timeout_at(term.min(Instant::now() + LINGER), news.changed()).await.is_ok_and(|told| told.is_ok())
        {
            continue;
        }
        let Some(alive) = shared.upgrade() else { return };
        let mut state = alive.speculator.lock();
        // Who came meanwhile found us running.
        if !news.has_changed().unwrap_or(false) || Instant::now() >= term {
            state.running = false;
            return;
        }
    }
}

/// Lets the best seeds of a blob grow, by about `max_step` stored bytes together. The lock is
/// held to take a seed and to put it back, not while chunks are looked at.
fn next_step(shared: &Shared, max_step: u64) -> Option<Step> {
    let mut all = Step { blob: 0, chunks: Vec::new(), bytes: 0 };
    for _ in 0..MAX_SEEDS_A_STEP {
        let blob = (!all.chunks.is_empty()).then_some(all.blob);
        let (mut seed, place, credit) = {
            let mut state = shared.speculator.lock();
            let mood = shared.speculator.mood(shared.engine.link(), &state);
            state.restrain(mood);
            let credit = state.credit - all.bytes as f64;
            let least = if all.chunks.is_empty() { LEAST_CREDIT } else { 1.0 };
            if credit < least || all.cost() >= max_step {
                break;
            }
            let Some((seed, place)) = state.take_best(blob) else { break };
            (seed, place, credit)
        };
        let step = (FIRST_STEP << seed.steps.min(8)).max(seed.proved / 2);
        let step = step.min(max_step - all.cost()).min(credit as u64);
        seed.steps += 1;
        let blob = seed.blob;
        let grown = seed.grow(shared, step);
        shared.speculator.lock().put_back(seed, place);
        if !grown.chunks.is_empty() {
            all.blob = blob;
            all.bytes += grown.bytes;
            all.chunks.extend(grown.chunks);
        }
    }
    (!all.chunks.is_empty()).then_some(all)
}

impl State {
    fn earn(&mut self, bytes: f64) {
        self.credit = (self.credit + bytes).min(MAX_CREDIT);
    }

    /// Forgets the credit of a time when nothing was told.
    fn restrain(&mut self, mood: Mood) {
        if mood == Mood::Guided {
            self.credit = self.credit.min(GUIDED_CREDIT);
        }
    }

    /// Notes that a reader needed `bytes` that no order had named.
    fn distrust(&mut self, bytes: u64) {
        self.trust = (self.trust - bytes as f64 * TRUST_COST).max(0.0);
    }

    /// Enters what a miss fetches: into the seed it continues, or as a new one.
    fn plant(&mut self, blob: u32, low: u32, high: u32) {
        let seed = Seed { blob, low, high, steps: 0, proved: 0, ended: false, begun: low == 0 };
        let seed = self.absorb(seed);
        self.seeds.push_front(seed);
        self.seeds.truncate(MAX_SEEDS);
    }

    /// Moves the seed that holds a chunk to the front, if there is one.
    fn proved_right(&mut self, blob: u32, index: u32, needed: u64) -> Option<Growth> {
        let holds = |seed: &Seed| seed.blob == blob && seed.low <= index && index < seed.high;
        let place = self.seeds.iter().position(holds);
        let mut seed = place.and_then(|place| self.seeds.remove(place))?;
        seed.steps = 0;
        seed.proved += needed;
        let growth = if seed.ended && seed.begun { Growth::Ended } else { Growth::Open };
        self.seeds.push_front(seed);
        Some(growth)
    }

    /// Takes the seed to grow next, of one blob if that is given, and its place: the first of
    /// those that have gone on for the shortest time without a proof.
    fn take_best(&mut self, blob: Option<u32>) -> Option<(Seed, usize)> {
        let growing = self.seeds.iter().enumerate().filter(|(_, seed)| !seed.ended || !seed.begun);
        let growing = growing.filter(|(_, seed)| blob.is_none_or(|blob| seed.blob == blob));
        let (place, _) = growing.min_by_key(|(_, seed)| seed.steps)?;
        Some((self.seeds.remove(place)?, place))
    }

    /// Puts a grown seed back.
    fn put_back(&mut self, seed: Seed, place: usize) {
        let seed = self.absorb(seed);
        self.seeds.insert(place.min(self.seeds.len()), seed);
    }

    /// Takes the seeds that this one has met, and makes them part of it.
    fn absorb(&mut self, mut seed: Seed) -> Seed {
        let (low, high) = (seed.low, seed.high);
        self.seeds.retain(|other| {
            let met = other.blob == seed.blob && other.low <= high && low <= other.high;
            if met {
                (seed.low, seed.high) = (seed.low.min(other.low), seed.high.max(other.high));
                (seed.begun, seed.ended) = (seed.begun || other.begun, seed.ended || other.ended);
                seed.steps = seed.steps.min(other.steps);
                seed.proved += other.proved;
            }
            !met
        });
        seed
    }
}

impl Seed {
    /// Takes missing chunks of about `step` stored bytes beside the seed.
    fn grow(&mut self, shared: &Shared, step: u64) -> Step {
        let backward = !self.begun && (self.ended || self.steps.is_multiple_of(BACKWARD));
        let mut grown = Step { blob: self.blob, chunks: Vec::new(), bytes: 0 };
        let mut unit = None;
        for _ in 0..MAX_LOOK {
            let index = if backward { self.low.checked_sub(1) } else { Some(self.high) };
            let found = index.filter(|index| *index < shared.chunk_count(self.blob));
            let Some(index) = found else {
                if backward {
                    self.begun = true
                } else {
                    self.ended = true
                }
                break;
            };
            if backward {
                self.low = index
            } else {
                self.high = index + 1
            }
            let extent = shared.chunk(self.blob, ChunkIndex(index));
            let Some(extent) = extent.filter(|extent| shared.look(self.blob, extent) == Look::Wanted) else {
                continue;
            };
            if unit.as_ref() != Some(&extent.unit) {
                unit = Some(extent.unit.clone());
                grown.bytes += extent.unit.compressed.len();
            }
            grown.chunks.push(extent);
            if grown.cost() >= step {
                return grown;
            }
        }
        if grown.chunks.is_empty() {
            // All of it is there, as far as is worth looking.
            if backward { self.begun = true } else { self.ended = true }
        }
        grown
    }
}

#[cfg(test)]
mod tests;
