//! Power cuts: in every image of the disk that a crash can leave, what a ready record
//! vouches for is what the chunk's digest says.
//!
//! All writes and syncs of a busy cache are recorded. A crash keeps the writes that a
//! completed sync covers and any part of the later ones, in any order, torn between
//! sectors.

use std::io;
use std::sync::Mutex;

use proptest::prelude::*;

use super::files::changed;
use super::*;

/// Unit in which a disk writes or does not.
const SECTOR: usize = 512;

enum Event {
    Write {
        role: Role,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Covers the writes to its file before the place where it began.
    Sync {
        role: Role,
        began: usize,
    },
}

type Log = Arc<Mutex<Vec<Event>>>;

struct Recorder {
    role: Role,
    file: File,
    log: Log,
}

impl Storage for Recorder {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // Under the lock, so that the log has the order of the writes.
        let mut log = self.log.lock().unwrap();
        log.push(Event::Write { role: self.role, offset, bytes: bytes.to_vec() });
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        let began = self.log.lock().unwrap().len();
        // Lets others write while the sync is under way.
        std::thread::yield_now();
        self.log.lock().unwrap().push(Event::Sync { role: self.role, began });
        Ok(())
    }
}

/// What a run left: the files it began with and everything it did to them.
struct Run {
    data_len: usize,
    map: Vec<u8>,
    events: Vec<Event>,
    versions: [Sample; 2],
}

/// Fills a cache from four threads, forgets some chunks, then lets other content take
/// their places.
fn run() -> Run {
    let (engine, dir) = (engine(), TempDir::new().unwrap());
    let first = Sample::new(48);
    let versions = [changed(&first), first];
    let log = Log::default();
    let mut map = Vec::new();
    for sample in &versions {
        let through =
            |role, file| Ok(Arc::new(Recorder { role, file, log: log.clone() }) as Arc<dyn Storage>);
        let cache = BlobCache::open_through(&engine, sample.config(&dir), sample.backend(), through).unwrap();
        if map.is_empty() {
            map = std::fs::read(dir.path().join("sample.blob.data.chunk_map")).unwrap();
        }
        let reader = BlobSet::new(&engine, vec![cache], PATIENT);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let reader = &reader;
                scope.spawn(move || {
                    for i in 0..12 {
                        sample.read(reader, thread * 12 + i).unwrap();
                        if i == 5 {
                            reader.blobs()[0].clear_ready(&[ChunkIndex(thread as u32 * 12)]).unwrap();
                        }
                    }
                });
            }
        });
        flush(&reader);
    }
    drop(engine);
    let data_len = versions[0].decoded.len();
    let events = std::mem::take(&mut *log.lock().unwrap());
    Run { data_len, map, events, versions }
}

/// The files after a crash behind `cut` events; `keep` decides over sectors not synced.
fn crash(run: &Run, cut: usize, mut keep: impl FnMut() -> bool) -> (Vec<u8>, Vec<u8>) {
    let (mut data, mut map) = (vec![0; run.data_len], run.map.clone());
    let happened = &run.events[..cut];
    let durable = |wanted: Role| {
        let covered = happened.iter().filter_map(|event| match event {
            Event::Sync { role, began } if *role == wanted => Some(*began),
            _ => None,
        });
        covered.max().unwrap_or(0)
    };
    let durable = [durable(Role::Data), durable(Role::Map)];
    for (place, event) in happened.iter().enumerate() {
        let Event::Write { role, offset, bytes } = event else { continue };
        let (file, durable) = match role {
            Role::Data => (&mut data, durable[0]),
            Role::Map => (&mut map, durable[1]),
        };
        let (mut at, mut rest) = (*offset as usize, bytes.as_slice());
        while !rest.is_empty() {
            let part = rest.len().min(SECTOR - at % SECTOR);
            if place < durable || keep() {
                file[at..at + part].copy_from_slice(&rest[..part]);
            }
            (at, rest) = (at + part, &rest[part..]);
        }
    }
    (data, map)
}

/// Checks every record of a crash image; answers how many are set.
fn check(run: &Run, data: &[u8], map: &[u8]) -> usize {
    let mut set = 0;
    for extent in run.versions.iter().flat_map(|sample| &sample.extents) {
        let at = 4096 + extent.index.0 as usize * 32;
        if zerocopy::IntoBytes::as_bytes(&Record::of(extent)) != &map[at..at + 32] {
            continue;
        }
        set += 1;
        let start = extent.decoded_offset as usize;
        let expected = extent.digest.unwrap();
        let found = expected.algorithm.digest(&data[start..start + extent.len as usize]);
        assert!(found == expected.digest, "record {} vouches for other bytes", extent.index);
    }
    set
}

#[test]
fn no_crash_leaves_a_record_without_its_data() {
    let run = run();
    let syncs = run.events.iter().filter(|e| matches!(e, Event::Sync { .. })).count();
    assert!(syncs >= 8, "{syncs} syncs");
    // The worst orders at every point: nothing unsynced survives; all; only the map's.
    let mut most = 0;
    for cut in 0..=run.events.len() {
        for keep in [false, true] {
            let (data, map) = crash(&run, cut, || keep);
            most = most.max(check(&run, &data, &map));
            let (lost, _) = crash(&run, cut, || false);
            check(&run, &lost, &map);
        }
    }
    assert!(most >= 40, "the check saw only {most} records");
    // And random ones.
    let cases = (0..=run.events.len(), any::<u64>());
    proptest!(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() }, |((cut, seed) in cases)| {
        let mut state = seed | 1;
        let (data, map) = crash(&run, cut, || {
            // xorshift: one bit a sector.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state & 1 == 1
        });
        check(&run, &data, &map);
    });
}
