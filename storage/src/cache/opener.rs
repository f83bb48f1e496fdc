//! On the CPU pool: decode units, verify their chunks, answer readers, fill the cache.

use std::io;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;

use super::chunk_map::{ChunkLock, Record, Wanted, runs};
use super::fetch::{Claimed, Failure, Work};
use super::inflight::{Lead, Outcome};
use super::syncer::Written;
use super::{Files, Inner, meta};
use crate::budget::Permit;
use crate::extent::FetchUnit;
use crate::ids::ChunkIndex;
use crate::metrics::{CacheMetrics, cpu_timed};
use crate::{Error, ErrorKind, Result};

/// Decoded offsets of neighbours are apart by less than a block of the image's; the bytes
/// between them belong to nobody.
pub(super) const BLOCK: u64 = 4096;

/// Small chunks that lie together are written together, up to this many bytes.
const MAX_WRITE: u64 = 1 << 20;

/// A unit all of whose stored bytes are there.
pub(super) struct Received {
    pub(super) work: Work,
    pub(super) stored: Bytes,
    /// Its share of memory.
    pub(super) _permit: Permit,
}

/// A verified chunk on its way to the cache.
pub(super) struct Fresh {
    index: ChunkIndex,
    record: Record,
    at: u64,
    bytes: Bytes,
    lock: Arc<ChunkLock>,
    /// Who asks for the chunk meanwhile waits for this, not for another fetch.
    lead: Lead,
}

/// Decodes units, verifies the chunks wanted of them and hands out those that are right.
/// Answers the units that have others.
pub(super) fn open_units(inner: &Arc<Inner>, units: Vec<Received>) -> Vec<Failure> {
    // Before the first answer: whoever flushes after it must find its bytes written.
    let _storing = inner.storing.read().unwrap_or_else(PoisonError::into_inner);
    let (mut fresh, mut failures) = (Vec::new(), Vec::new());
    // The permits are given back last: until then the bytes are held.
    let mut permits = Vec::with_capacity(units.len());
    for Received { work, stored, _permit } in units {
        permits.push(_permit);
        failures.extend(open_unit(inner, work, stored, &mut fresh));
    }
    inner.keep(fresh);
    drop(permits);
    failures
}

fn open_unit(inner: &Inner, mut work: Work, stored: Bytes, fresh: &mut Vec<Fresh>) -> Option<Failure> {
    let decoded = match cpu_timed(&inner.metrics.decode_cpu_ns, || decode(&work.unit, stored)) {
        Ok(decoded) => decoded,
        Err(e) => {
            let chunk = work.chunks.first().map_or(0, |c| c.lead.extent().index.0);
            let name = format!("blob {}, chunk {chunk}, bytes {}", inner.id, work.unit.compressed);
            return Some((work, e.context(name)));
        }
    };
    let mut wrong = Vec::new();
    let mut error = None;
    for claimed in std::mem::take(&mut work.chunks) {
        let extent = claimed.lead.extent();
        let start = extent.offset_in_unit as usize;
        let bytes = decoded.slice(start..start + extent.len as usize);
        let found = extent.digest.map(|expected| {
            let digest = || expected.algorithm.digest(&bytes);
            (expected, cpu_timed(&inner.metrics.verify_cpu_ns, digest))
        });
        match found {
            Some((expected, found)) if expected.digest != found => {
                let what = format!(
                    "blob {}, chunk {}, bytes {}: digest is {}:{found}, the image says {}",
                    inner.id, extent.index, work.unit.compressed, expected.algorithm, expected.digest
                );
                error.get_or_insert(Error::new(ErrorKind::Corrupt, what));
                wrong.push(claimed);
            }
            _ => {
                inner.observe(&claimed.lead, &work, None);
                // First: whoever has the bytes must find them counted.
                CacheMetrics::tick(&inner.metrics.fetched_chunks);
                inner.acquit(&claimed);
                fresh.extend(publish(claimed, bytes));
            }
        }
    }
    work.chunks = wrong;
    error.map(|error| (work, error))
}

fn decode(unit: &FetchUnit, stored: Bytes) -> Result<Bytes> {
    if unit.is_plain() && stored.len() == unit.decoded_len as usize {
        return Ok(stored);
    }
    let mut decoded = vec![0; unit.decoded_len as usize];
    unit.decode(&stored, &mut decoded)?;
    Ok(decoded.into())
}

/// Hands verified bytes to the waiters. Answers what is to be cached.
pub(super) fn publish(claimed: Claimed, bytes: Bytes) -> Option<Fresh> {
    let Claimed { lead, lock, .. } = claimed;
    lead.answer(Outcome::Bytes(bytes.clone()));
    let extent = lead.extent();
    let (index, record, at) = (extent.index, Record::of(extent), extent.decoded_offset);
    Some(Fresh { index, record, at, bytes, lock: lock?, lead })
}

impl Inner {
    /// Has the row go that promised other bytes than the source gave, which are right.
    fn acquit(&self, claimed: &Claimed) {
        if let (Some(dedup), Some(row)) = (&self.dedup, &claimed.suspect) {
            dedup.database.remove(row.clone());
        }
    }

    /// Writes verified chunks to the cache. May wait for the disk.
    pub(super) fn keep(self: &Arc<Self>, mut fresh: Vec<Fresh>) {
        meta::keep(self);
        let Some(files) = self.files() else { return };
        fresh.sort_by_key(|chunk| chunk.index);
        let stored = files.store(&fresh);
        // Not durable yet: should it not become so, a row leads nowhere, which it may.
        if let (Some(dedup), Ok(_)) = (&self.dedup, &stored) {
            dedup.offer(fresh.iter().map(|chunk| chunk.lead.extent()));
        }
        match stored {
            Ok(false) => *self.write_failed() = None,
            Ok(true) => {
                *self.write_failed() = None;
                let inner = Arc::clone(self);
                let syncer = Arc::clone(&files.syncer);
                self.engine.spawn_blocking(move || {
                    if let Err(e) = syncer.run() {
                        inner.warn_of_write(&e);
                    }
                });
            }
            Err(e) => self.warn_of_write(&e),
        }
    }
}

impl Files {
    /// Writes verified chunks, which are in order, and makes them readable in this process;
    /// true if a sync run must be started.
    fn store(&self, fresh: &[Fresh]) -> io::Result<bool> {
        let wanted: Vec<Wanted> = fresh.iter().map(|chunk| (chunk.index, chunk.record)).collect();
        let mut rest = fresh;
        let (mut start_sync, mut result) = (false, Ok(()));
        for run in runs(&wanted) {
            let (chunks, others) = rest.split_at(run.len());
            rest = others;
            match self.store_run(run, chunks) {
                Ok(start) => start_sync |= start,
                Err(e) => result = result.and(Err(e)),
            }
        }
        // A sync that was promised must be run, whatever else failed; the failure comes back
        // with the next write.
        if start_sync { Ok(true) } else { result.map(|()| false) }
    }

    fn store_run(&self, run: &[Wanted], chunks: &[Fresh]) -> io::Result<bool> {
        if !self.map.has_room(run)? {
            if run.len() > 1 {
                let mut start_sync = false;
                for (one, chunk) in run.chunks(1).zip(chunks.chunks(1)) {
                    start_sync |= self.store_run(one, chunk)?;
                }
                return Ok(start_sync);
            }
            // What is in the way must not vouch for our bytes, and whoever reads it must not
            // see them.
            let cleared = self.map.alone(|| self.map.clear_all())?;
            cleared.unwrap_or_else(|| {
                Err(io::Error::other("another image in use has other content under this blob's name"))
            })?;
        }
        let epoch = self.syncer.epoch();
        self.write(chunks)?;
        run.iter().for_each(|(index, record)| self.map.mark(*index, record));
        Ok(self.syncer.push(chunks.iter().map(|chunk| Written {
            index: chunk.index,
            record: chunk.record,
            epoch,
            _lock: Arc::clone(&chunk.lock),
        })))
    }

    /// Writes the bytes of a run: small neighbours together.
    fn write(&self, chunks: &[Fresh]) -> io::Result<()> {
        let end = |chunk: &Fresh| chunk.at + chunk.bytes.len() as u64;
        let mut rest = chunks;
        while let Some(first) = rest.first() {
            let together = 1 + rest
                .windows(2)
                .take_while(|pair| {
                    pair[1].at - end(&pair[0]) < BLOCK && end(&pair[1]) - first.at <= MAX_WRITE
                })
                .count();
            let (now, later) = rest.split_at(together);
            rest = later;
            if let [one] = now {
                self.data.write_at(&one.bytes, one.at)?;
                continue;
            }
            let mut buffer = Vec::with_capacity(now.last().map_or(0, |last| (end(last) - first.at) as usize));
            for chunk in now {
                buffer.resize((chunk.at - first.at) as usize, 0);
                buffer.extend_from_slice(&chunk.bytes);
            }
            self.data.write_at(&buffer, first.at)?;
        }
        Ok(())
    }
}
