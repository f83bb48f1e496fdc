//! Caches that share a dedup database.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::time::Instant;

use rusqlite::Connection;

use super::*;
use crate::cache::dedup::open_cache_file;
use crate::digest::DigestAlgorithm;

const PATIENCE: Duration = Duration::from_secs(60);

/// A database, and caches with directories of their own.
struct Node {
    engine: Arc<Engine>,
    dir: TempDir,
    database: Arc<DedupDb>,
}

/// The cache of a blob that holds the chunks of a sample.
struct Blob {
    backend: Arc<CountingBackend<FaultyBackend>>,
    reader: BlobSet,
    dir: TempDir,
}

impl Node {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let database = DedupDb::patient(dir.path().join("cas.db"), Arc::new(open_cache_file)).unwrap();
        assert!(database.flush(PATIENCE));
        Self { engine: engine(), dir, database }
    }

    fn blob(&self, name: &str, sample: &Sample) -> Blob {
        let (dir, backend) = (TempDir::new().unwrap(), sample.backend());
        let config = BlobCacheConfig {
            id: BlobId::new(name).unwrap(),
            dedup: Some(Arc::clone(&self.database)),
            ..sample.config(&dir)
        };
        let cache = BlobCache::open(&self.engine, config, backend.clone()).unwrap();
        Blob { backend, reader: BlobSet::new(&self.engine, vec![cache], PATIENT), dir }
    }

    /// A blob of which everything was read.
    fn full(&self, name: &str, sample: &Sample) -> Blob {
        let blob = self.blob(name, sample);
        read_all(sample, &blob);
        assert!(self.database.flush(PATIENCE));
        blob
    }

    fn count(&self, table: &str) -> u32 {
        let connection = Connection::open(self.dir.path().join("cas.db")).unwrap();
        connection.query_row(&format!("SELECT COUNT(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    }
}

impl Blob {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.blob.data"))
    }

    fn counts(&self) -> (u64, u64) {
        let counts = self.reader.blobs()[0].metrics().snapshot();
        (counts.deduplicated_chunks, counts.fetched_chunks)
    }
}

/// Reads all chunks with one call; what was read is written when this returns.
fn read_all(sample: &Sample, blob: &Blob) {
    let slices: Vec<_> = (0..sample.extents.len()).map(|index| sample.slice(index)).collect();
    let mut out = vec![0; slices.len() * LEN as usize];
    blob.reader.read(&slices, &mut out).unwrap();
    let want: Vec<_> = (0..slices.len()).flat_map(|index| sample.bytes(index)).copied().collect();
    assert!(out == want);
    settle(&blob.reader);
    flush(&blob.reader);
}

/// Chunks of a blob lie elsewhere in another one: only their digests are the same.
fn shuffled(sample: &Sample) -> Sample {
    let mut other = Sample { stored: Vec::new(), decoded: Vec::new(), extents: Vec::new() };
    for (index, extent) in sample.extents.iter().rev().enumerate() {
        let bytes = sample.bytes(extent.index.0 as usize);
        let range = ByteRange::new(other.stored.len() as u64, u64::from(LEN)).unwrap();
        other.extents.push(ChunkExtent {
            index: ChunkIndex(index as u32),
            unit: FetchUnit { compressed: range, codec: Codec::None, ..extent.unit.clone() },
            decoded_offset: other.decoded.len() as u64,
            ..*extent
        });
        other.stored.extend(bytes);
        other.decoded.extend(bytes);
        other.decoded.resize(other.decoded.len().next_multiple_of(4096), 0);
    }
    other
}

#[test]
fn what_another_cache_has_is_not_fetched() {
    let (node, sample) = (Node::new(), Sample::new(20));
    let first = node.full("first", &sample);
    assert_eq!(first.counts(), (0, 20));
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (1, 20));
    let other = shuffled(&sample);
    let second = node.full("second", &other);
    assert_eq!((second.counts(), second.backend.requests().len()), ((20, 0), 0));
    let stored: u64 = other.extents.iter().map(|extent| extent.stored_share()).sum();
    assert_eq!(second.reader.blobs()[0].metrics().snapshot().deduplicated_bytes, stored);
    assert_eq!(second.reader.blobs()[0].ready_count(), 20);
    // It offers them in its turn.
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (2, 40));
    drop(first);
    let third = node.blob("third", &sample);
    read_all(&sample, &third);
    assert_eq!(third.counts(), (20, 0));
}

#[test]
fn a_row_that_leads_to_other_bytes_costs_a_fetch_and_goes() {
    let (node, sample) = (Node::new(), Sample::new(6));
    let first = node.full("first", &sample);
    let file = File::options().write(true).open(first.file("first")).unwrap();
    file.write_all_at(b"other", sample.extents[2].decoded_offset + 17).unwrap();
    // Behind the end of the file that is left.
    file.set_len(sample.extents[5].decoded_offset + 3).unwrap();
    let second = node.blob("second", &sample);
    read_all(&sample, &second);
    assert_eq!(second.counts(), (4, 2));
    assert!(node.database.flush(PATIENCE));
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (2, 4 + 6));
}

/// An image that names a digest with another length or algorithm takes no row from others.
#[test]
fn an_image_that_lies_gets_nothing_and_removes_nothing() {
    let (node, sample) = (Node::new(), Sample::new(3));
    let _first = node.full("first", &sample);
    let mut lies = Sample::new(3);
    lies.extents[0].len -= 1;
    let expected = lies.extents[1].digest.as_mut().unwrap();
    expected.algorithm = DigestAlgorithm::Blake3;
    let second = node.blob("second", &lies);
    for index in [0, 1] {
        let mut slice = lies.slice(index);
        slice.len = 10;
        let error = second.reader.read(&[slice], &mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    lies.read(&second.reader, 2).unwrap();
    assert_eq!(second.counts(), (1, 0));
    settle(&second.reader);
    assert!(node.database.flush(PATIENCE));
    assert_eq!(node.count("Chunks"), 3 + 1);
}

#[test]
fn rows_of_files_that_are_gone_go() {
    let (node, sample) = (Node::new(), Sample::new(4));
    let first = node.full("first", &sample);
    let second = node.full("second", &shuffled(&sample));
    std::fs::remove_file(first.file("first")).unwrap();
    assert!(node.database.collect_garbage(PATIENCE));
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (1, 4));
    // Without anybody collecting: whoever looks for the file finds out.
    drop(second);
    let third = node.blob("third", &sample);
    read_all(&sample, &third);
    assert_eq!((third.counts(), third.backend.requests().len()), ((0, 4), 1));
    assert!(node.database.flush(PATIENCE));
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (1, 4));
    // What is ready in a file that is gone is not offered.
    std::fs::remove_file(third.file("third")).unwrap();
    assert!(node.database.collect_garbage(PATIENCE));
    third.reader.blobs()[0].clear_ready(&[ChunkIndex(0)]).unwrap();
    sample.read(&third.reader, 0).unwrap();
    settle(&third.reader);
    assert!(node.database.flush(PATIENCE));
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (0, 0));
}

/// What is at the ends of a request makes it shorter; what is in its middle does not make it two.
#[test]
fn a_request_is_not_cut_for_a_few_chunks() {
    let (node, sample) = (Node::new(), Sample::new(9));
    let first = node.blob("first", &sample);
    for index in [0, 4, 8] {
        sample.read(&first.reader, index).unwrap();
    }
    settle(&first.reader);
    assert!(node.database.flush(PATIENCE));
    let second = node.blob("second", &sample);
    read_all(&sample, &second);
    let (start, end) = (sample.range(1).start(), sample.range(7).end());
    assert_eq!(second.backend.requests(), [ByteRange::new(start, end - start).unwrap()]);
    assert_eq!(second.counts(), (2, 7));
}

/// Chunks without a digest are nobody's but their image's.
#[test]
fn what_can_not_be_verified_is_not_shared() {
    let (node, mut sample) = (Node::new(), Sample::new(2));
    sample.extents.iter_mut().for_each(|extent| extent.digest = None);
    let (dir, backend) = (TempDir::new().unwrap(), sample.backend());
    let config = BlobCacheConfig {
        dedup: Some(Arc::clone(&node.database)),
        allow_unverified: true,
        ..sample.config(&dir)
    };
    let cache = BlobCache::open(&node.engine, config, backend).unwrap();
    let reader = BlobSet::new(&node.engine, vec![cache], PATIENT);
    sample.read(&reader, 0).unwrap();
    settle(&reader);
    assert!(node.database.flush(PATIENCE));
    assert_eq!(node.count("Chunks"), 0);
}

/// Whatever is wrong with the database, readers get their bytes.
#[test]
fn without_the_database_everything_is_fetched() {
    let sample = Sample::new(4);
    // `prepare` answers what is to live as long as the database is used.
    let check = |prepare: &dyn Fn(&Path) -> Option<Connection>| {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("cas.db");
        let _held = prepare(&path);
        let database = DedupDb::open(&path, Arc::new(open_cache_file)).unwrap();
        assert!(!database.flush(PATIENCE));
        let node = Node { engine: engine(), dir, database };
        let blob = node.blob("first", &sample);
        read_all(&sample, &blob);
        assert_eq!(blob.counts(), (0, 4));
        assert!(!node.database.collect_garbage(PATIENCE));
    };
    check(&|path| {
        std::fs::write(path, [b'x'; 9000]).unwrap();
        None
    });
    check(&|path| {
        std::fs::create_dir(path).unwrap();
        None
    });
    check(&|path| {
        std::fs::remove_dir(path.parent().unwrap()).unwrap();
        None
    });
    // Others could write it.
    check(&|path| {
        std::fs::write(path, "").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
        None
    });
    // Somebody has it to himself.
    check(&|path| {
        std::fs::write(path, "").unwrap();
        let other = Connection::open(path).unwrap();
        other.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE t (x)").unwrap();
        Some(other)
    });
}

/// Tables of another program that has taken the names.
#[test]
fn a_database_of_something_else_is_left_alone() {
    let (dir, sample) = (TempDir::new().unwrap(), Sample::new(4));
    let path = dir.path().join("cas.db");
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE Blobs (Name TEXT, FilePath TEXT)").unwrap();
    let database = DedupDb::open(&path, Arc::new(open_cache_file)).unwrap();
    let node = Node { engine: engine(), dir, database };
    let blob = node.blob("first", &sample);
    read_all(&sample, &blob);
    assert!(!node.database.flush(PATIENCE));
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (0, 0));
    let other = node.blob("second", &sample);
    read_all(&sample, &other);
    assert_eq!(other.counts(), (0, 4));
}

/// While somebody else writes, chunks are looked up, and rows are lost.
#[test]
fn another_writer_holds_nobody_up() {
    let (node, sample) = (Node::new(), Sample::new(4));
    let _first = node.full("first", &sample);
    let other = Connection::open(node.dir.path().join("cas.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let second = node.blob("second", &sample);
    sample.read(&second.reader, 1).unwrap();
    assert_eq!(second.counts(), (1, 0));
    settle(&second.reader);
    assert!(!node.database.flush(PATIENCE));
    other.execute_batch("ROLLBACK").unwrap();
    sample.read(&second.reader, 2).unwrap();
    settle(&second.reader);
    assert!(node.database.flush(PATIENCE));
    assert_eq!(node.count("Chunks"), 4 + 1);
}

/// Two that write at once, as two daemons do.
#[test]
fn several_write_one_database() {
    let (node, sample) = (Node::new(), Sample::new(40));
    let path = node.dir.path().join("cas.db");
    std::thread::scope(|scope| {
        for name in ["a", "b", "c"] {
            let (path, sample, dir) = (&path, &sample, &node.dir);
            scope.spawn(move || {
                let database = DedupDb::open(path, Arc::new(open_cache_file)).unwrap();
                let until = Instant::now() + PATIENCE;
                let file = dir.path().join(format!("{name}.blob.data"));
                std::fs::write(&file, "").unwrap();
                let member = Member::new(Arc::clone(&database), Some(&file));
                for extent in &sample.extents {
                    // The others may have the file for longer than a writer waits.
                    loop {
                        member.offer([extent].into_iter());
                        if database.flush(PATIENCE) {
                            break;
                        }
                        assert!(Instant::now() < until, "the rows are never written");
                    }
                }
            });
        }
    });
    assert_eq!((node.count("Blobs"), node.count("Chunks")), (3, 120));
}
