//! Sources and disks that fail: readers get right bytes or an error, and the next read
//! starts afresh.

use std::io;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use super::*;
use crate::backend::{ByteStream, ReadContext, Sender, Supplier};
use crate::prefetch::{Class, PrefetchOptions};

#[test]
fn failures_are_not_kept() {
    let (engine, sample, dir) = (engine(), Sample::new(4), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let cases = [
        (Fault::Fail(ErrorKind::Unavailable), 1, ErrorKind::Unavailable),
        (Fault::Fail(ErrorKind::NotFound), 1, ErrorKind::NotFound),
        (Fault::Shorten(1), 2, ErrorKind::Corrupt),
        (Fault::Lengthen(1), 2, ErrorKind::Corrupt),
        (Fault::Panic, 1, ErrorKind::Cancelled),
    ];
    for (fault, times, kind) in cases {
        let shown = format!("{fault:?}");
        backend.inner().fault(sample.range(1), fault, times);
        let error = sample.read(&reader, 1).unwrap_err();
        assert_eq!(error.kind(), kind, "{shown}: {error}");
    }
    sample.read(&reader, 1).unwrap();
    assert_eq!(reader.blobs()[0].metrics().snapshot().read_errors, 5);
}

/// A blob with three ways before its source, all of which lie.
#[derive(Debug)]
struct Liars {
    blob: Bytes,
    caught: AtomicUsize,
}

impl Liars {
    const WAYS: usize = 3;
}

impl Backend for Liars {
    fn size<'a>(&'a self, _: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        async { Ok(self.blob.len() as u64) }.boxed()
    }

    fn open<'a>(&'a self, range: ByteRange, _: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        async move {
            let (way, supplier) = match self.caught.load(SeqCst) {
                Self::WAYS => (0, Supplier::Origin),
                caught => (caught + 1, Supplier::Mirror),
            };
            let lie = if way > 0 { 1 } else { 0 };
            let place = range.start() as usize..range.end() as usize;
            let bytes: Bytes = self.blob[place].iter().map(|byte| byte ^ lie).collect();
            let sender = Arc::new(std::sync::Mutex::new(Sender { supplier, way }));
            Ok(ByteStream::changing(sender, futures_util::stream::iter([Ok(bytes)])))
        }
        .boxed()
    }

    fn distrust(&self, sender: Sender) -> bool {
        // Each of them once.
        sender.way > 0 && self.caught.fetch_max(sender.way, SeqCst) < sender.way
    }
}

/// Two lies made an error, whoever told them, and the source that had the right bytes was not asked.
#[test]
fn bytes_that_somebody_has_right_are_found() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = Arc::new(Liars { blob: sample.stored.clone().into(), caught: AtomicUsize::new(0) });
    let cache = BlobCache::open(&engine, sample.config(&dir), backend).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    sample.read(&reader, 0).unwrap();
    assert_eq!(reader.blobs()[0].metrics().snapshot().verification_failures, Liars::WAYS as u64);
}

#[test]
fn what_arrived_before_a_fault_is_kept() {
    let (engine, sample, dir) = (engine(), Sample::new(4), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    backend.inner().fault(sample.range(3), Fault::Shorten(1), 2);
    let slices: Vec<_> = (0..4).map(|i| sample.slice(i)).collect();
    let error = reader.read(&slices, &mut vec![0; 4 * LEN as usize]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    settle(&reader);
    assert!((0..3).all(|i| sample.try_read(&reader, i)));
    assert!(!sample.try_read(&reader, 3));
}

#[test]
fn an_outage_fails_after_the_deadline_or_is_waited_out() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let gate = Gate::default();
    backend.inner().fault(sample.range(0), Fault::Stall(gate), 1);
    let hasty = open(&engine, &sample, &dir, &backend, OutagePolicy::FailAfter(Duration::from_millis(20)));
    let error = sample.read(&hasty, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("blob sample"), "{error}");
    let waiting = BlobSet::new(&engine, hasty.blobs().to_vec(), OutagePolicy::Wait);
    backend.inner().fault(sample.range(0), Fault::Fail(ErrorKind::Unavailable), 2);
    sample.read(&waiting, 0).unwrap();
    // What waiting can not mend is told at once.
    backend.inner().fault(sample.range(1), Fault::Fail(ErrorKind::Denied), 1);
    assert_eq!(sample.read(&waiting, 1).unwrap_err().kind(), ErrorKind::Denied);
}

/// A file whose disk is full.
struct Full(File);

impl Storage for Full {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// A file whose data can not be made durable.
struct Unsynced(File);

impl Storage for Unsynced {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::Other.into())
    }
}

#[test]
fn a_failing_disk_fails_no_read() {
    let (engine, sample) = (engine(), Sample::new(3));
    let wraps: [fn(File) -> Arc<dyn Storage>; 2] = [|f| Arc::new(Full(f)), |f| Arc::new(Unsynced(f))];
    for wrap in wraps {
        let (backend, dir) = (sample.backend(), TempDir::new().unwrap());
        let through = |role, file| match role {
            Role::Data => Ok(wrap(file)),
            Role::Map => Ok(Arc::new(file) as Arc<dyn Storage>),
        };
        let cache = BlobCache::open_through(&engine, sample.config(&dir), backend.clone(), through).unwrap();
        let reader = BlobSet::new(&engine, vec![cache], PATIENT);
        for index in [0, 1, 2, 0, 1, 2] {
            sample.read(&reader, index).unwrap();
        }
        settle(&reader);
        // A failed sync is told to whoever asked for it, or was met in the background.
        let _ = reader.blobs()[0].flush();
        assert_eq!(reader.blobs()[0].ready_count(), 0);
        assert!((0..3).all(|i| !sample.try_read(&reader, i)));
        // An order of what can not be kept has failed.
        let order: Vec<_> = sample.extents.iter().map(|extent| (0, extent.clone())).collect();
        let options = PrefetchOptions::of(Class::Preheat);
        let prefetch = reader.prefetch(Box::new(order.into_iter()), options);
        engine.block_on(prefetch.wait());
        assert_eq!(prefetch.progress().failed_chunks, 3);
    }
}

/// A file whose first sync fails, when the test lets it.
struct FailsOnce {
    file: File,
    begun: std::sync::mpsc::SyncSender<()>,
    go_on: std::sync::Mutex<Option<std::sync::mpsc::Receiver<()>>>,
}

impl Storage for FailsOnce {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        match self.go_on.lock().unwrap().take() {
            Some(go_on) => {
                self.begun.send(()).unwrap();
                go_on.recv().unwrap();
                Err(io::ErrorKind::Other.into())
            }
            None => self.file.sync(),
        }
    }
}

#[test]
fn what_was_written_before_a_failed_sync_is_not_trusted_after_a_good_one() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let (begun, has_begun) = std::sync::mpsc::sync_channel(1);
    let (let_go, go_on) = std::sync::mpsc::sync_channel(1);
    let go_on = std::sync::Mutex::new(Some(go_on));
    let wrapped = std::sync::Mutex::new(Some((begun, go_on)));
    let through = |role, file| match role {
        Role::Data => {
            let (begun, go_on) = wrapped.lock().unwrap().take().unwrap();
            Ok(Arc::new(FailsOnce { file, begun, go_on }) as Arc<dyn Storage>)
        }
        Role::Map => Ok(Arc::new(file) as Arc<dyn Storage>),
    };
    let cache = BlobCache::open_through(&engine, sample.config(&dir), sample.backend(), through).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    sample.read(&reader, 0).unwrap();
    has_begun.recv().unwrap();
    // Written while the sync that will fail is under way: the kernel tells of lost pages
    // once, and the next sync knows nothing of them.
    sample.read(&reader, 1).unwrap();
    settle(&reader);
    let_go.send(()).unwrap();
    let _ = reader.blobs()[0].flush();
    assert_eq!(reader.blobs()[0].ready_count(), 0);
    assert!((0..2).all(|i| !sample.try_read(&reader, i)));
    // What is written from now on is good again.
    (0..2).for_each(|i| sample.read(&reader, i).unwrap());
    flush(&reader);
    assert_eq!(reader.blobs()[0].ready_count(), 2);
}

/// A file that can not be read.
struct Unreadable(File);

impl Storage for Unreadable {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Other.into())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

#[test]
fn a_map_that_can_not_be_read_has_no_room() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    // Its first chunk is recorded, and lies there.
    let reader = open(&engine, &sample, &dir, &sample.backend(), PATIENT);
    sample.read(&reader, 0).unwrap();
    flush(&reader);
    drop(reader);
    let through = |role, file| match role {
        Role::Data => Ok(Arc::new(file) as Arc<dyn Storage>),
        Role::Map => Ok(Arc::new(Unreadable(file)) as Arc<dyn Storage>),
    };
    let cache = BlobCache::open_through(&engine, sample.config(&dir), sample.backend(), through).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    // Readers are served; the cache takes nothing, for it might lie over the first chunk.
    (0..2).for_each(|index| sample.read(&reader, index).unwrap());
    settle(&reader);
    assert!(!sample.try_read(&reader, 1));
    let data = std::fs::read(dir.path().join("sample.blob.data")).unwrap();
    assert!(data[sample.extents[1].decoded_offset as usize..].iter().all(|byte| *byte == 0));
}

/// A file that writes when the test lets it.
struct Late(File, std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

impl Storage for Late {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.1.lock().unwrap().recv().unwrap();
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// A reader of a cache that stores a chunk for each message.
fn late(engine: &Engine, sample: &Sample, dir: &TempDir) -> (BlobSet, std::sync::mpsc::SyncSender<()>) {
    let (let_go, go_on) = std::sync::mpsc::sync_channel(1);
    let go_on = std::sync::Mutex::new(Some(go_on));
    let through = |role, file| match role {
        Role::Data => {
            let go_on = std::sync::Mutex::new(go_on.lock().unwrap().take().unwrap());
            Ok(Arc::new(Late(file, go_on)) as Arc<dyn Storage>)
        }
        Role::Map => Ok(Arc::new(file) as Arc<dyn Storage>),
    };
    let cache = BlobCache::open_through(engine, sample.config(dir), sample.backend(), through).unwrap();
    (BlobSet::new(engine, vec![cache], PATIENT), let_go)
}

/// Its readers have had it long before.
#[test]
fn an_order_ends_when_its_chunks_are_stored_if_it_is_told_so() {
    let (engine, sample, dir) = (engine(), Sample::new(1), TempDir::new().unwrap());
    let (reader, let_go) = late(&engine, &sample, &dir);
    let options = PrefetchOptions { until_stored: true, ..PrefetchOptions::of(Class::Trace) };
    let order = reader.prefetch(Box::new([(0, sample.extents[0].clone())].into_iter()), options);
    for _ in 0..100 {
        sample.read(&reader, 0).unwrap();
        assert!(!order.progress().finished);
    }
    let_go.send(()).unwrap();
    engine.block_on(order.wait());
    assert!(sample.try_read(&reader, 0));
}

#[test]
fn a_flush_waits_for_all_that_readers_were_given() {
    let (engine, sample, dir) = (engine(), Sample::new(1), TempDir::new().unwrap());
    let (reader, let_go) = late(&engine, &sample, &dir);
    let cache = Arc::clone(&reader.blobs()[0]);
    sample.read(&reader, 0).unwrap();
    let flushed = std::thread::spawn(move || {
        cache.flush().unwrap();
        cache.ready_count()
    });
    let_go.send(()).unwrap();
    assert_eq!(flushed.join().unwrap(), 1);
}

#[test]
fn an_unreadable_cache_file_fails_no_read() {
    let (engine, sample, dir) = (engine(), Sample::new(3), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    for index in 0..3 {
        sample.read(&reader, index).unwrap();
    }
    flush(&reader);
    assert!(sample.try_read(&reader, 2));
    File::options().write(true).open(dir.path().join("sample.blob.data")).unwrap().set_len(5000).unwrap();
    // Together, so that a part that is still there meets one that is gone.
    let slices: Vec<_> = (0..3).map(|i| sample.slice(i)).collect();
    let mut out = vec![0; 3 * LEN as usize];
    reader.read(&slices, &mut out).unwrap();
    assert!(out == [sample.bytes(0), sample.bytes(1), sample.bytes(2)].concat());
    // The next start does not trust the file.
    drop(reader);
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    assert!((0..3).all(|i| !sample.try_read(&reader, i)));
    sample.read(&reader, 2).unwrap();
}

#[test]
fn without_a_directory_every_read_fetches() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let config = BlobCacheConfig { work_dir: None, ..sample.config(&dir) };
    let cache = BlobCache::open(&engine, config, backend.clone()).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    for _ in 0..3 {
        sample.read(&reader, 1).unwrap();
        settle(&reader);
    }
    assert_eq!(backend.requests().len(), 3);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn impossible_extents_are_refused_before_any_fetch() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let good = sample.slice(1);
    let range = |start, len| ByteRange::new(start, len).unwrap();
    let changes: [fn(&mut ReadSlice); 9] = [
        |s| s.blob = 1,
        |s| s.offset = 1,
        |s| s.extent.index = ChunkIndex(2),
        |s| s.extent.offset_in_unit = 1,
        |s| s.extent.offset_in_unit = u32::MAX,
        |s| s.extent.decoded_offset = u64::MAX - 1,
        |s| s.extent.decoded_offset = 4097 + 96,
        |s| s.extent.unit.decoded_len = u32::MAX,
        |s| s.extent.digest = None,
    ];
    let mut bad: Vec<ReadSlice> = Vec::new();
    for change in changes {
        let mut slice = good.clone();
        change(&mut slice);
        bad.push(slice);
    }
    for compressed in [range(0, 0), range(0, 1 << 40)] {
        let mut slice = good.clone();
        slice.extent.unit.compressed = compressed;
        bad.push(slice);
    }
    for slice in bad {
        let mut out = vec![0; slice.len as usize];
        let error = reader.try_read(std::slice::from_ref(&slice), &mut out).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange | ErrorKind::Corrupt), "{slice:?}: {error}");
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let completion = Box::new(move |result: Result<Vec<u8>>| sender.send(result.is_err()).unwrap());
        reader.submit(vec![slice], crate::backend::Priority::OnDemand, completion);
        assert!(receiver.recv().unwrap());
    }
    assert!(backend.requests().is_empty());
}
