//! One leader a chunk: among threads, among processes, and after its death.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use super::*;
use crate::backend::Priority;

/// Submits a read of one chunk and answers where its result arrives.
pub(super) fn submit(sample: &Sample, reader: &BlobSet, index: usize) -> mpsc::Receiver<Result<Vec<u8>>> {
    submit_as(Priority::OnDemand, sample, reader, index)
}

fn submit_as(
    priority: Priority,
    sample: &Sample,
    reader: &BlobSet,
    index: usize,
) -> mpsc::Receiver<Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let completion = Box::new(move |result| sender.send(result).unwrap());
    reader.submit(vec![sample.slice(index)], priority, completion);
    receiver
}

#[test]
fn many_readers_of_one_chunk_are_one_request() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let gate = Gate::default();
    backend.inner().fault(sample.range(1), Fault::Stall(gate.clone()), 1);
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let waiting: Vec<_> = (0..32).map(|_| submit(&sample, &reader, 1)).collect();
    engine.block_on(gate.arrivals(1));
    gate.open();
    for receiver in waiting {
        assert!(receiver.recv().unwrap().unwrap() == sample.bytes(1));
    }
    assert_eq!(backend.requests().len(), 1);
}

#[test]
fn two_processes_on_one_directory_fetch_each_chunk_once() {
    let (sample, dir) = (Sample::new(64), TempDir::new().unwrap());
    let backend = sample.backend();
    // Two engines and two opens share nothing but files.
    std::thread::scope(|scope| {
        for process in 0..2 {
            let (sample, dir, backend) = (&sample, &dir, &backend);
            scope.spawn(move || {
                let engine = engine();
                let reader = open(&engine, sample, dir, backend, PATIENT);
                std::thread::scope(|scope| {
                    for thread in 0..4 {
                        let reader = &reader;
                        scope.spawn(move || {
                            for i in 0..64 {
                                sample.read(reader, (i + thread * 7 + process) % 64).unwrap();
                            }
                        });
                    }
                });
            });
        }
    });
    let mut fetched = vec![0; 64];
    for request in backend.requests() {
        for (index, count) in fetched.iter_mut().enumerate() {
            *count += u32::from(request.contains(sample.range(index)));
        }
    }
    assert_eq!(fetched, vec![1; 64]);
}

/// What another process holds that leads chunk 0, until it is dropped.
pub(super) fn leads_chunk_0(dir: &TempDir) -> File {
    let path = dir.path().join("sample.blob.data.chunk_map");
    let other = File::options().read(true).write(true).open(path).unwrap();
    let range = ByteRange::new(chunk_map::LOCK_BASE, 1).unwrap();
    assert!(lock::try_lock(&other, lock::Kind::Exclusive, range).unwrap());
    other
}

#[test]
fn a_dead_leaders_chunk_is_free() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    // Another process leads chunk 0 and gets nowhere.
    let other = leads_chunk_0(&dir);
    let waiting = submit(&sample, &reader, 0);
    // Chunk 1 is nobody's: it is read meanwhile. A hasty reader of chunk 0 gives up.
    sample.read(&reader, 1).unwrap();
    let blobs = reader.blobs().to_vec();
    let hasty = BlobSet::new(&engine, blobs, OutagePolicy::FailAfter(Duration::from_millis(20)));
    assert_eq!(sample.read(&hasty, 0).unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(waiting.try_recv().is_err());
    assert_eq!(backend.requests(), [sample.range(1)]);
    // Death closes descriptors and gives nothing back in order.
    drop(other);
    assert!(waiting.recv().unwrap().unwrap() == sample.bytes(0));
}

#[test]
fn a_reader_goes_on_where_prefetch_gives_up() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    // Prefetch repeats little, and reports what the source said last.
    let gate = Gate::default();
    let late = Fault::FailLate(gate.clone(), ErrorKind::Unavailable);
    backend.inner().fault(sample.range(0), late, 1);
    let prefetch = submit_as(Priority::Prefetch, &sample, &reader, 0);
    engine.block_on(gate.arrivals(1));
    let waiting = submit(&sample, &reader, 0);
    // Tasks begin in order: after this read the follower has joined.
    sample.read(&reader, 1).unwrap();
    gate.open();
    assert_eq!(prefetch.recv().unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(waiting.recv().unwrap().unwrap() == sample.bytes(0));
}

#[test]
fn prefetch_leaves_to_another_process_what_that_is_at() {
    let (engine, sample, dir) = (engine(), Sample::new(1), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let other = leads_chunk_0(&dir);
    let prefetch = submit_as(Priority::Prefetch, &sample, &reader, 0);
    assert_eq!(prefetch.recv().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    // A reader waits for it.
    let waiting = submit(&sample, &reader, 0);
    drop(other);
    assert!(waiting.recv().unwrap().unwrap() == sample.bytes(0));
}

/// Directory in which a copy of this test program leads chunk 0 and gets nowhere.
const HANG_IN: &str = "STORAGE_TEST_HANG_IN";

#[test]
fn a_killed_process_frees_its_chunk() {
    let (engine, sample) = (engine(), Sample::new(2));
    let backend = sample.backend();
    if let Some(dir) = std::env::var_os(HANG_IN) {
        let gate = Gate::default();
        backend.inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
        let id = BlobId::new("sample").unwrap();
        let config = BlobCacheConfig::new(dir, id, sample.decoded.len() as u64, 2);
        let cache = BlobCache::open(&engine, config, backend).unwrap();
        let reader = BlobSet::new(&engine, vec![cache], OutagePolicy::Wait);
        let waiting = submit(&sample, &reader, 0);
        engine.block_on(gate.arrivals(1));
        eprintln!("\nfetching");
        let _ = waiting.recv();
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cache::tests::sharing::a_killed_process_frees_its_chunk", "--nocapture"])
        .env(HANG_IN, dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "fetching"), "the child ended early");
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let waiting = submit(&sample, &reader, 0);
    sample.read(&reader, 1).unwrap();
    assert!(waiting.try_recv().is_err());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(waiting.recv().unwrap().unwrap() == sample.bytes(0));
    assert_eq!(backend.requests(), [sample.range(1), sample.range(0)]);
    settle(&reader);
    assert!(sample.try_read(&reader, 0));
}

#[test]
fn a_stopped_leader_costs_time_and_no_read() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let policy = OutagePolicy::FailAfter(Duration::from_secs(1));
    let reader = open(&engine, &sample, &dir, &backend, policy);
    let _other = leads_chunk_0(&dir);
    sample.read(&reader, 0).unwrap();
    settle(&reader);
    assert!(!sample.try_read(&reader, 0), "the place is the other's");
}

#[test]
fn a_follower_outlives_its_leader() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let gate = Gate::default();
    backend.inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
    let patient = open(&engine, &sample, &dir, &backend, PATIENT);
    let blobs = patient.blobs().to_vec();
    let hasty = BlobSet::new(&engine, blobs, OutagePolicy::FailAfter(Duration::from_millis(50)));
    let leader = submit(&sample, &hasty, 0);
    engine.block_on(gate.arrivals(1));
    let follower = submit(&sample, &patient, 0);
    assert_eq!(leader.recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(follower.recv().unwrap().unwrap() == sample.bytes(0));
    assert_eq!(backend.requests().len(), 2);
}

#[test]
fn a_stalled_source_delays_nothing_else() {
    let (engine, sample, dir) = (engine(), Sample::new(70), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    sample.read(&reader, 0).unwrap();
    settle(&reader);
    let gate = Gate::default();
    let waiting: Vec<_> = (2..66)
        .map(|index| {
            backend.inner().fault(sample.range(index), Fault::Stall(gate.clone()), 1);
            submit(&sample, &reader, index)
        })
        .collect();
    engine.block_on(gate.arrivals(64));
    assert!(sample.try_read(&reader, 0));
    sample.read(&reader, 68).unwrap();
    gate.open();
    for (receiver, index) in waiting.into_iter().zip(2..) {
        assert!(receiver.recv().unwrap().unwrap() == sample.bytes(index));
    }
}

#[test]
fn dropping_the_engine_answers_everybody() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let gate = Gate::default();
    backend.inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
    let reader = open(&engine, &sample, &dir, &backend, OutagePolicy::Wait);
    let waiting = submit(&sample, &reader, 0);
    engine.block_on(gate.arrivals(1));
    drop(engine);
    assert_eq!(waiting.recv().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    // And so does asking an engine that is gone.
    assert_eq!(sample.read(&reader, 1).unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn one_fetch_of_a_batch_caches_all_of_it() {
    let (engine, mut sample, dir) = (engine(), Sample::new(3), TempDir::new().unwrap());
    // Three chunks that lie in one unit.
    let unit_bytes = [sample.bytes(0), sample.bytes(1), sample.bytes(2)].concat();
    sample.stored = Compressor::new(Codec::Zstd).unwrap().compress(&unit_bytes).unwrap().unwrap();
    let unit = FetchUnit {
        compressed: ByteRange::new(0, sample.stored.len() as u64).unwrap(),
        codec: Codec::Zstd,
        cipher: Cipher::None,
        window: None,
        decoded_len: 3 * LEN,
    };
    for (extent, place) in sample.extents.iter_mut().zip(0..) {
        extent.unit = unit.clone();
        extent.offset_in_unit = place * LEN;
    }
    let backend = sample.backend();
    let members = sample.extents.clone();
    let table: ChunkTable = Arc::new(move |index| members.get(index.0 as usize).cloned());
    let config = BlobCacheConfig { chunks: Some(table), ..sample.config(&dir) };
    let cache = BlobCache::open(&engine, config, backend.clone()).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    for index in [1, 0, 2] {
        sample.read(&reader, index).unwrap();
        settle(&reader);
    }
    assert_eq!(backend.requests().len(), 1);
}

#[test]
fn a_source_that_stalls_within_a_unit_keeps_no_reader_from_memory() {
    // Room for one unit.
    let engine = Engine::new(EngineConfig { memory: 1, ..EngineConfig::default() }).unwrap();
    let (sample, dir) = (Sample::new(4), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let gate = Gate::default();
    backend.inner().fault(sample.range(1), Fault::StallWithin(gate.clone()), 1);
    let waiting = submit(&sample, &reader, 1);
    engine.block_on(gate.arrivals(1));
    assert!(reader.buffered() > 0);
    sample.read(&reader, 3).unwrap();
    assert!(waiting.try_recv().is_err());
    gate.open();
    assert!(waiting.recv().unwrap().unwrap() == sample.bytes(1));
}

#[test]
fn an_abandoned_read_asks_no_more() {
    let (engine, sample, dir) = (engine(), Sample::new(3), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, OutagePolicy::Wait);
    backend.inner().fault(sample.range(0), Fault::Fail(ErrorKind::Unavailable), usize::MAX);
    let waiting = submit(&sample, &reader, 0);
    while backend.requests().len() < 2 {
        std::thread::yield_now();
    }
    reader.abandon();
    assert_eq!(waiting.recv().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    // Its leader ends, too.
    settle(&reader);
    let asked = backend.requests().len();
    sample.read(&reader, 2).unwrap();
    assert_eq!(backend.requests().len(), asked + 1);
}
