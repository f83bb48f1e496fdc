//! Orders that are worked off ahead of readers.

use super::*;
use crate::cache::duty::Duty;
use crate::prefetch::{Class, Order, Prefer, PrefetchOptions, ReadAhead};

const OPTIONS: PrefetchOptions =
    PrefetchOptions { class: Class::Preheat, bandwidth: None, until_stored: false };

fn order(sample: &Sample) -> Order {
    let extents: Vec<_> = sample.extents.iter().map(|extent| (0, extent.clone())).collect();
    Box::new(extents.into_iter())
}

/// An order of all chunks whose first one never comes.
struct Stalled {
    sample: Sample,
    prefetch: crate::prefetch::Prefetch,
    reader: BlobSet,
    engine: Arc<Engine>,
    _dir: TempDir,
}

impl Stalled {
    fn new(chunks: u32) -> Self {
        let (engine, sample, dir) = (engine(), Sample::new(chunks), TempDir::new().unwrap());
        let backend = sample.backend();
        let gate = Gate::default();
        backend.inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
        let reader = open(&engine, &sample, &dir, &backend, PATIENT);
        let prefetch = reader.prefetch(order(&sample), OPTIONS);
        engine.block_on(gate.arrivals(1));
        Self { sample, prefetch, reader, engine, _dir: dir }
    }
}

#[test]
fn an_order_is_worked_off_and_skips_what_is_there() {
    let (engine, sample, dir) = (engine(), Sample::new(8), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    sample.read(&reader, 3).unwrap();
    settle(&reader);
    let prefetch = reader.prefetch(order(&sample), OPTIONS);
    engine.block_on(prefetch.wait());
    settle(&reader);
    assert!((0..8).all(|index| sample.try_read(&reader, index)));
    let progress = prefetch.progress();
    assert!(progress.finished && progress.error.is_none(), "{progress:?}");
    assert_eq!((progress.chunks, progress.present_chunks, progress.failed_chunks), (8, 1, 0));
    let bytes: u64 = (0..8).filter(|index| *index != 3).map(|index| sample.range(index).len()).sum();
    assert_eq!(progress.bytes, bytes);
}

#[test]
fn what_comes_while_a_part_waits_is_not_fetched_again() {
    let (engine, sample) = (engine(), Sample::new(1));
    let (dirs, backends) = ([(); 2].map(|()| TempDir::new().unwrap()), [(); 2].map(|()| sample.backend()));
    let gate = Gate::default();
    backends[0].inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
    let open = |at: usize| BlobCache::open(&engine, sample.config(&dirs[at]), backends[at].clone()).unwrap();
    let reader = BlobSet::new(&engine, vec![open(0), open(1)], PATIENT);
    // With the first part, the link has all that it takes.
    let rest = engine.block_on(engine.handle().link().admit(Class::Trace, 1 << 30));
    let both = [(0, sample.extents[0].clone()), (1, sample.extents[0].clone())];
    let prefetch = reader.prefetch(Box::new(both.into_iter()), OPTIONS);
    engine.block_on(gate.arrivals(1));
    let slice = ReadSlice { blob: 1, extent: sample.extents[0].clone(), offset: 0, len: 1 };
    let (sender, answer) = std::sync::mpsc::channel();
    let completion = Box::new(move |result| drop(sender.send(result)));
    reader.submit(vec![slice], crate::backend::Priority::OnDemand, completion);
    answer.recv().unwrap().unwrap();
    // Readers have their answer before it is stored.
    settle_blob(&reader.blobs()[1]);
    gate.open();
    drop(rest);
    engine.block_on(prefetch.wait());
    let progress = prefetch.progress();
    assert_eq!((progress.bytes, progress.chunks), (sample.range(0).len(), 2));
    assert_eq!(backends[1].requests(), [sample.range(0)]);
}

#[test]
fn an_order_may_wait_for_what_others_fetch() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let gate = Gate::default();
    backend.inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let first = reader.prefetch(Box::new([(0, sample.extents[0].clone())].into_iter()), OPTIONS);
    engine.block_on(gate.arrivals(1));
    // Its first chunk is on its way already.
    let options = PrefetchOptions { until_stored: true, ..PrefetchOptions::of(Class::Trace) };
    let second = reader.prefetch(order(&sample), options);
    while second.progress().chunks < 2 {
        std::thread::yield_now();
    }
    gate.open();
    engine.block_on(second.wait());
    let mut bytes = vec![0; sample.extents[0].len as usize];
    let slice =
        ReadSlice { blob: 0, extent: sample.extents[0].clone(), offset: 0, len: sample.extents[0].len };
    assert!(reader.peek(&[slice], &mut bytes).unwrap());
    engine.block_on(first.wait());
    assert_eq!(backend.requests().len(), 2);
}

#[test]
fn what_can_not_be_had_is_counted_and_left_to_readers() {
    let (engine, sample, dir) = (engine(), Sample::new(4), TempDir::new().unwrap());
    let backend = sample.backend();
    backend.inner().fault(sample.range(2), Fault::Corrupt(sample.range(2).start()), 2);
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let prefetch = reader.prefetch(order(&sample), OPTIONS);
    engine.block_on(prefetch.wait());
    let progress = prefetch.progress();
    assert_eq!((progress.failed_chunks, progress.finished), (1, true));
    assert!(progress.error.is_some_and(|error| error.contains("chunk 2")));
    sample.read(&reader, 2).unwrap();
}

#[test]
fn a_cancelled_order_ends_although_its_source_stalls() {
    let stalled = Stalled::new(2);
    stalled.prefetch.cancel();
    stalled.engine.block_on(stalled.prefetch.wait());
}

#[test]
fn a_reader_overtakes_a_fetch_ahead_that_does_not_get_on() {
    let stalled = Stalled::new(1);
    stalled.sample.read(&stalled.reader, 0).unwrap();
    stalled.prefetch.cancel();
}

#[test]
fn a_reader_goes_on_where_a_part_of_an_order_fails() {
    // Two requests of one run of chunks: the second one fails, the first one stalls.
    let (engine, dir) = (engine(), TempDir::new().unwrap());
    let mut sample = Sample::new(2);
    let far = plan::MAX_GAP + 1;
    let second = sample.range(1);
    let tail = sample.stored.split_off(second.start() as usize);
    sample.stored.resize(second.start() as usize + far as usize, 0);
    sample.stored.extend(tail);
    sample.extents[1].unit.compressed = ByteRange::new(second.start() + far, second.len()).unwrap();
    let backend = sample.backend();
    let gate = Gate::default();
    backend.inner().fault(sample.range(0), Fault::Stall(gate.clone()), 1);
    backend.inner().fault(sample.range(1), Fault::Fail(ErrorKind::Unavailable), 1);
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let prefetch = reader.prefetch(order(&sample), OPTIONS);
    engine.block_on(gate.arrivals(1));
    while prefetch.progress().failed_chunks == 0 {
        std::thread::yield_now();
    }
    sample.read(&reader, 1).unwrap();
    assert!(!prefetch.progress().finished);
    gate.open();
}

#[test]
fn nothing_is_read_ahead_that_is_not_kept() {
    let (engine, sample, dir) = (engine(), Sample::new(4), TempDir::new().unwrap());
    let backend = sample.backend();
    let extents = sample.extents.clone();
    let table: ChunkTable = Arc::new(move |index| extents.get(index.0 as usize).cloned());
    let config = BlobCacheConfig { work_dir: None, chunks: Some(table), ..sample.config(&dir) };
    let cache = BlobCache::open(&engine, config, backend.clone()).unwrap();
    let reader = BlobSet::reading_ahead(&engine, vec![cache], PATIENT, ReadAhead::default());
    sample.read(&reader, 1).unwrap();
    engine.block_on(reader.prefetch(order(&sample), OPTIONS).wait());
    settle(&reader);
    assert_eq!(backend.requests(), [sample.range(1)]);
}

fn reading_ahead(
    engine: &Engine,
    sample: &Sample,
    dir: &TempDir,
    backend: &Arc<CountingBackend<FaultyBackend>>,
    read_ahead: ReadAhead,
) -> BlobSet {
    let extents = sample.extents.clone();
    let table: ChunkTable = Arc::new(move |index| extents.get(index.0 as usize).cloned());
    let config = BlobCacheConfig { chunks: Some(table), ..sample.config(dir) };
    let cache = BlobCache::open(engine, config, backend.clone()).unwrap();
    BlobSet::reading_ahead(engine, vec![cache], PATIENT, read_ahead)
}

#[test]
fn a_miss_fetches_what_follows_with_the_same_request() {
    let (engine, sample, dir) = (engine(), Sample::new(8), TempDir::new().unwrap());
    let backend = sample.backend();
    let amplify = (sample.range(4).end() - sample.range(1).end()) as u32;
    let read_ahead = ReadAhead { amplify, prefer: Prefer::Bytes };
    let reader = reading_ahead(&engine, &sample, &dir, &backend, read_ahead);
    sample.read(&reader, 1).unwrap();
    let whole = ByteRange::new(sample.range(1).start(), sample.range(4).end() - sample.range(1).start());
    assert!(backend.requests().contains(&whole.unwrap()));
    settle(&reader);
    assert!((1..=4).all(|index| sample.try_read(&reader, index)));
}

#[test]
fn without_amplification_nothing_is_read_ahead() {
    let (engine, sample, dir) = (engine(), Sample::new(8), TempDir::new().unwrap());
    let backend = sample.backend();
    let read_ahead = ReadAhead { amplify: 0, prefer: Prefer::Time };
    let reader = reading_ahead(&engine, &sample, &dir, &backend, read_ahead);
    sample.read(&reader, 1).unwrap();
    settle(&reader);
    assert_eq!(backend.requests(), [sample.range(1)]);
}

#[test]
fn a_corrupt_chunk_read_ahead_fails_nobody_but_its_reader() {
    let (engine, sample, dir) = (engine(), Sample::new(4), TempDir::new().unwrap());
    let backend = sample.backend();
    let whole = ByteRange::new(sample.range(0).start(), sample.range(3).end()).unwrap();
    backend.inner().fault(whole, Fault::Corrupt(sample.range(2).start() + 3), 1);
    backend.inner().fault(sample.range(2), Fault::Corrupt(sample.range(2).start() + 3), 1);
    let reader = reading_ahead(&engine, &sample, &dir, &backend, ReadAhead::default());
    sample.read(&reader, 0).unwrap();
    settle(&reader);
    assert!([0, 1, 3].iter().all(|index| sample.try_read(&reader, *index)));
    assert!(!sample.try_read(&reader, 2));
    sample.read(&reader, 2).unwrap();
}

#[test]
fn one_process_guesses_at_a_time() {
    let (engine, sample, dir) = (engine(), Sample::new(512), TempDir::new().unwrap());
    let backend = sample.backend();
    // Another cache on the same files, as another process has it.
    let other = BlobCache::open(&engine, sample.config(&dir), sample.backend()).unwrap();
    let theirs = || other.inner.files().unwrap().map.duties.try_take(Duty::Guess).unwrap();
    let duty = theirs().unwrap();
    let reader = reading_ahead(&engine, &sample, &dir, &backend, ReadAhead::default());
    sample.read(&reader, 1).unwrap();
    settle(&reader);
    assert_eq!(backend.requests(), [sample.range(1)]);
    // Who has the duty shares it, and it ends with its last holder.
    let ours = || reader.blobs()[0].inner.files().unwrap().map.duties.try_take(Duty::Guess).unwrap();
    let shared = theirs();
    drop(duty);
    assert!(ours().is_none());
    drop(shared);
    assert!(ours().is_some());
    let began = std::time::Instant::now();
    sample.read(&reader, 300).unwrap();
    assert!(backend.requests()[1].len() > sample.range(300).len());
    // Whoever has guessed goes on with it, as long as its image is there.
    assert!(theirs().is_none() || began.elapsed() >= speculate::LINGER);
    drop(reader);
    while theirs().is_none() {
        std::thread::yield_now();
    }
}

#[test]
fn nothing_is_guessed_from_what_another_process_is_at() {
    let (engine, sample, dir) = (engine(), Sample::new(8), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = reading_ahead(&engine, &sample, &dir, &backend, ReadAhead::default());
    let other = sharing::leads_chunk_0(&dir);
    let waiting = sharing::submit(&sample, &reader, 0);
    while !reader.blobs()[0].inner.inflight.contains(&sample.extents[0]) {
        std::thread::yield_now();
    }
    drop(other);
    assert!(waiting.recv().unwrap().unwrap() == sample.bytes(0));
    settle(&reader);
    assert_eq!(backend.requests(), [sample.range(0)]);
}

#[test]
fn small_gaps_are_filled_or_left_to_whoever_is_at_them() {
    let (engine, sample, dir) = (engine(), Sample::new(8), TempDir::new().unwrap());
    let backend = sample.backend();
    let read_ahead = ReadAhead { amplify: 0, prefer: Prefer::Time };
    let reader = reading_ahead(&engine, &sample, &dir, &backend, read_ahead);
    let read = |indexes: &[usize]| {
        let (sender, answer) = std::sync::mpsc::channel();
        let completion = Box::new(move |result| drop(sender.send(result)));
        let slices = indexes.iter().map(|index| sample.slice(*index)).collect();
        reader.submit(slices, crate::backend::Priority::OnDemand, completion);
        answer.recv().unwrap().unwrap();
        settle(&reader);
    };
    // What lies between comes, and is kept.
    read(&[0, 2]);
    let whole = ByteRange::new(0, sample.range(2).end()).unwrap();
    assert_eq!(backend.requests(), [whole]);
    assert!(sample.try_read(&reader, 1));
    // What is there, or on its way to another process, is not fetched again.
    read(&[4]);
    let other = BlobCache::open(&engine, sample.config(&dir), sample.backend()).unwrap();
    let wanted = (ChunkIndex(6), chunk_map::Record::of(&sample.extents[6]));
    let _theirs = other.inner.files().unwrap().map.try_lock(&[wanted]).unwrap().unwrap();
    read(&[3, 5, 7]);
    let mut requests = backend.requests();
    requests.sort_by_key(|range| range.start());
    assert_eq!(requests[1..], [3, 4, 5, 7].map(|index| sample.range(index)));
}

#[test]
fn an_order_that_alternates_asks_each_blob_once() {
    let (engine, sample) = (engine(), Sample::new(8));
    let (dirs, backends) = ([(); 2].map(|()| TempDir::new().unwrap()), [(); 2].map(|()| sample.backend()));
    let open = |at: usize| BlobCache::open(&engine, sample.config(&dirs[at]), backends[at].clone()).unwrap();
    let reader = BlobSet::new(&engine, vec![open(0), open(1)], PATIENT);
    let extents: Vec<_> =
        sample.extents.iter().flat_map(|extent| [(0, extent.clone()), (1, extent.clone())]).collect();
    let prefetch = reader.prefetch(Box::new(extents.into_iter()), OPTIONS);
    engine.block_on(prefetch.wait());
    let whole = ByteRange::new(0, sample.range(7).end()).unwrap();
    assert!(backends.iter().all(|backend| backend.requests() == [whole]));
    assert_eq!((prefetch.progress().chunks, prefetch.progress().failed_chunks), (16, 0));
}

#[test]
fn an_order_longer_than_the_sight_loses_nothing() {
    let (engine, sample) = (engine(), Sample::new(8200));
    let (dirs, backends) = ([(); 2].map(|()| TempDir::new().unwrap()), [(); 2].map(|()| sample.backend()));
    let open = |at: usize| BlobCache::open(&engine, sample.config(&dirs[at]), backends[at].clone()).unwrap();
    let reader = BlobSet::new(&engine, vec![open(0), open(1)], PATIENT);
    // What the first blob wants last lies behind all of the second one.
    let (first, last) = (sample.extents[0].clone(), sample.extents[1].clone());
    let other = sample.extents.iter().map(|extent| (1, extent.clone()));
    let extents: Vec<_> = [(0, first)].into_iter().chain(other).chain([(0, last)]).collect();
    let count = extents.len() as u64;
    let prefetch = reader.prefetch(Box::new(extents.into_iter()), OPTIONS);
    engine.block_on(prefetch.wait());
    let progress = prefetch.progress();
    assert_eq!((progress.chunks, progress.failed_chunks, progress.present_chunks), (count, 0, 0));
    settle(&reader);
    assert!(sample.try_read(&reader, 0) && sample.try_read(&reader, 1));
    reader.blobs()[1].settle().unwrap();
    assert_eq!(reader.blobs()[1].ready_count(), 8200);
}

#[test]
fn what_somebody_else_does_not_fetch_after_all_is_fetched() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let other = super::sharing::leads_chunk_0(&dir);
    let prefetch = reader.prefetch(order(&sample), OPTIONS);
    while !sample.try_read(&reader, 1) {
        std::thread::yield_now();
    }
    assert!(!prefetch.progress().finished);
    // The other ends, and leaves nothing.
    drop(other);
    engine.block_on(prefetch.wait());
    settle(&reader);
    assert!(sample.try_read(&reader, 0));
    let progress = prefetch.progress();
    assert!(progress.error.is_none() && progress.failed_chunks == 0, "{progress:?}");
}
