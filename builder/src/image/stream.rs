//! Chunks in the order they are wanted, fetched and decoded ahead.
//!
//! Windows of chunks are worked on at the same time: each fetches its units with few requests,
//! decodes them and compares every wanted chunk with its digest. What comes out is in order.

use std::collections::VecDeque;
use std::iter::Peekable;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use storage::backend::{Backend, Priority};
use storage::engine::{self, Handle};
use storage::extent::ChunkExtent;
use storage::ids::{BlobId, ByteRange};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::data::{ImageData, read_context};
use super::plan::{Place, RangePlan, UnitPlan, Window};
use crate::{Error, ErrorKind, Result};

/// Bytes, stored and decoded together, that windows under way may take; one window may be more.
const AHEAD: u64 = 20 << 20;

/// Requests of one window at a time.
const REQUESTS: usize = 8;

/// A chunk and the unit that it came in.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The chunk's bytes, verified.
    pub bytes: Bytes,
    /// The unit as it is stored; empty unless the stream keeps that.
    pub stored: Bytes,
}

/// A unit that has been read.
#[derive(Clone, Default)]
struct Unit {
    decoded: Bytes,
    /// Empty unless it is kept.
    stored: Bytes,
}

/// A window under way.
struct Job {
    places: VecDeque<Place>,
    weight: u64,
    task: JoinHandle<Result<Vec<Unit>>>,
}

/// See [`ImageData::stream`].
pub struct ChunkStream<'a, I: Iterator> {
    image: &'a ImageData,
    chunks: Peekable<I>,
    /// A window that is not full when the chunks end is the last.
    ended: bool,
    jobs: VecDeque<Job>,
    ahead: u64,
    /// Units of the window at hand, and what is still wanted of them.
    units: Vec<Unit>,
    places: VecDeque<Place>,
    keep_stored: bool,
    /// Stops the windows that nobody will ask for.
    cancel: CancellationToken,
}

impl<I: Iterator> Drop for ChunkStream<'_, I> {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl<'a, I> ChunkStream<'a, I>
where
    I: Iterator<Item = Result<(u32, ChunkExtent)>>,
{
    pub(super) fn new(image: &'a ImageData, chunks: I) -> Self {
        Self {
            image,
            chunks: chunks.peekable(),
            ended: false,
            jobs: VecDeque::new(),
            ahead: 0,
            units: Vec::new(),
            places: VecDeque::new(),
            keep_stored: false,
            cancel: image.options.cancel.child_token(),
        }
    }

    /// Keeps the stored form of units for [`Self::next_fetched`].
    #[must_use]
    pub fn keeping_stored(mut self) -> Self {
        self.keep_stored = true;
        self
    }

    /// The next chunk's bytes; `None` behind the last.
    ///
    /// # Errors
    /// As [`Self::next_fetched`].
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        Ok(self.next_fetched()?.map(|fetched| fetched.bytes))
    }

    /// The next chunk; `None` behind the last.
    ///
    /// # Errors
    /// What the iterator of chunks answers. `Mismatch`: a chunk is not what its digest says.
    /// `Corrupt`: stored bytes do not decode. Those of the source. No chunk comes after an error.
    pub fn next_fetched(&mut self) -> Result<Option<Fetched>> {
        loop {
            if let Some(place) = self.places.pop_front() {
                let start = place.offset as usize;
                // Checked where the unit was decoded.
                let unit = &self.units[place.unit];
                let bytes = unit.decoded.slice(start..start + place.len as usize);
                return Ok(Some(Fetched { bytes, stored: unit.stored.clone() }));
            }
            self.units.clear();
            if let Err(error) = self.look_ahead() {
                self.ended = true;
                self.jobs.clear();
                return Err(error);
            }
            let Some(job) = self.jobs.pop_front() else { return Ok(None) };
            self.ahead -= job.weight;
            let done = self.image.engine.block_on(job.task).unwrap_or_else(|e| {
                Err(Error::new(ErrorKind::Cancelled, "reading ahead was ended").with_source(e))
            });
            match done {
                Ok(units) => (self.units, self.places) = (units, job.places),
                Err(error) => {
                    self.ended = true;
                    self.jobs.clear();
                    return Err(error);
                }
            }
        }
    }

    /// Starts windows as far as memory allows, at least one.
    fn look_ahead(&mut self) -> Result<()> {
        // What is kept takes room beside what is decoded.
        let most = if self.keep_stored { AHEAD / 2 } else { AHEAD };
        while !self.ended && (self.jobs.is_empty() || self.ahead < most) {
            let mut window = Window::default();
            // An error ends it where it comes.
            while let Some(chunk) = self
                .chunks
                .next_if(|chunk| chunk.as_ref().map_or(true, |(blob, extent)| window.takes(*blob, extent)))
            {
                let (blob, extent) = chunk?;
                window.add(blob, extent);
            }
            self.ended = self.chunks.peek().is_none();
            if !window.places.is_empty() {
                self.start(window)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, mut window: Window) -> Result<()> {
        let ranges = window.ranges()?;
        let places = std::mem::take(&mut window.places).into();
        let weight = window.weight;
        let blobs = self.image.rafs().bootstrap().blobs();
        let mut count = 0;
        let mut units: Vec<Option<UnitPlan>> = window.units.into_iter().map(Some).collect();
        let mut works = Vec::with_capacity(ranges.len());
        for RangePlan { blob, range, units: numbers } in ranges {
            let number = blob as usize;
            let backend = self.image.backends.get(number).zip(blobs.get(number));
            let (backend, blob) = backend
                .ok_or_else(|| Error::bad_source(format!("a chunk names blob {blob}, which is not there")))?;
            let units: Vec<(usize, UnitPlan)> =
                numbers.into_iter().filter_map(|n| units[n].take().map(|unit| (n, unit))).collect();
            count += units.len();
            let (id, backend, keep_stored) = (blob.id.clone(), Arc::clone(backend), self.keep_stored);
            works.push(Work { id, backend, range, units, keep_stored });
        }
        let handle = self.image.engine.handle().clone();
        let cancel = self.cancel.clone();
        let task = self.image.engine.spawn(async move {
            let mut all = vec![Unit::default(); count];
            let mut done = stream::iter(works)
                .map(|work| work.run(handle.clone(), cancel.clone()))
                .buffer_unordered(REQUESTS);
            while let Some(units) = done.try_next().await? {
                for (number, unit) in units {
                    all[number] = unit;
                }
            }
            Ok(all)
        });
        self.ahead += weight;
        self.jobs.push_back(Job { places, weight, task });
        Ok(())
    }
}

/// One request and the units it brings.
struct Work {
    id: BlobId,
    backend: Arc<dyn Backend>,
    range: ByteRange,
    units: Vec<(usize, UnitPlan)>,
    keep_stored: bool,
}

impl Work {
    async fn run(self, handle: Handle, cancel: CancellationToken) -> Result<Vec<(usize, Unit)>> {
        let stored = engine::fetch(&*self.backend, self.range, &read_context(&cancel)).await;
        let stored = stored.map_err(|e| Error::from(e).context(format!("read blob {}", self.id)))?;
        handle.compute(Priority::OnDemand, move || self.open(&Bytes::from(stored))).await?
    }

    /// Decodes and verifies.
    fn open(self, stored: &Bytes) -> Result<Vec<(usize, Unit)>> {
        let mut opened = Vec::with_capacity(self.units.len());
        let wanted: u64 = self.units.iter().map(|(_, plan)| plan.unit.compressed.len()).sum();
        let has_gaps = wanted < self.range.len();
        for (number, plan) in self.units {
            // Units lie within their range, which has been read as a whole.
            let from = (plan.unit.compressed.start() - self.range.start()) as usize;
            let bytes = stored.slice(from..from + plan.unit.compressed.len() as usize);
            // A slice would keep all of the range, with what lies between the units.
            let kept = if self.keep_stored { Bytes::copy_from_slice(&bytes) } else { Bytes::new() };
            // So would a plain unit, which is not decoded into memory of its own.
            let bytes = match has_gaps && plan.unit.is_plain() {
                true => Bytes::copy_from_slice(&bytes),
                false => bytes,
            };
            let decoded = open_unit(&plan, bytes).map_err(|e| e.context(format!("blob {}", self.id)))?;
            opened.push((number, Unit { decoded, stored: kept }));
        }
        Ok(opened)
    }
}

/// Decodes a unit and compares its wanted chunks with their digests.
fn open_unit(plan: &UnitPlan, stored: Bytes) -> Result<Bytes> {
    let unit = &plan.unit;
    let decoded = if unit.is_plain() && stored.len() == unit.decoded_len as usize {
        stored
    } else {
        let mut decoded = vec![0; unit.decoded_len as usize];
        unit.decode(&stored, &mut decoded)
            .map_err(|e| Error::from(e).context(format!("bytes {}", unit.compressed)))?;
        Bytes::from(decoded)
    };
    for chunk in &plan.chunks {
        let start = chunk.offset as usize;
        let bytes = start.checked_add(chunk.len as usize).and_then(|end| decoded.get(start..end));
        let bytes = bytes.ok_or_else(|| {
            Error::bad_source(format!("chunk {} reaches beyond its unit at {}", chunk.index, unit.compressed))
        })?;
        if let Some(expected) = chunk.digest {
            let found = expected.algorithm.digest(bytes);
            if found != expected.digest {
                return Err(Error::new(
                    ErrorKind::Mismatch,
                    format!(
                        "chunk {} (bytes {}): its {} digest is {found}, the image says {}; the blob is damaged \
                         or another one",
                        chunk.index, unit.compressed, expected.algorithm, expected.digest
                    ),
                ));
            }
        }
    }
    Ok(decoded)
}
