//! What is found in a cache directory, and what of it is trusted.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Mutex;

use super::*;

/// A directory with a full cache of `sample`.
fn filled(engine: &Engine, sample: &Sample) -> TempDir {
    let dir = TempDir::new().unwrap();
    let reader = open(engine, sample, &dir, &sample.backend(), PATIENT);
    for index in 0..sample.extents.len() {
        sample.read(&reader, index).unwrap();
    }
    flush(&reader);
    dir
}

/// Chunks that a new process finds ready; all are readable, whatever was found.
fn trusted(engine: &Engine, sample: &Sample, dir: &TempDir) -> usize {
    let reader = open(engine, sample, dir, &sample.backend(), PATIENT);
    let ready = (0..sample.extents.len()).filter(|i| sample.try_read(&reader, *i)).count();
    for index in 0..sample.extents.len() {
        sample.read(&reader, index).unwrap();
    }
    ready
}

#[test]
fn foreign_and_malformed_files_vouch_for_nothing() {
    let (engine, sample) = (engine(), Sample::new(4));
    type Change = fn(&Path, &Path);
    let changes: [(&str, Change, usize); 11] = [
        ("nothing", |_, _| {}, 4),
        ("map gone", |_, map| std::fs::remove_file(map).unwrap(), 0),
        ("data gone, its inode free", |data, _| std::fs::remove_file(data).unwrap(), 0),
        ("data cut", |data, _| File::options().write(true).open(data).unwrap().set_len(5).unwrap(), 0),
        ("map cut", |_, map| File::options().write(true).open(map).unwrap().set_len(4100).unwrap(), 0),
        ("upstream's map", |_, map| std::fs::write(map, [0xff; 4097]).unwrap(), 0),
        ("map of ones", |_, map| std::fs::write(map, [0xff; 4096 + 4 * 32]).unwrap(), 0),
        (
            "one record torn",
            |_, map| {
                let file = File::options().write(true).open(map).unwrap();
                file.write_at(&[0xaa; 3], 4096 + 32 + 20).unwrap();
            },
            3,
        ),
        (
            "data copied",
            |data, _| {
                let bytes = std::fs::read(data).unwrap();
                std::fs::rename(data, data.with_extension("old")).unwrap();
                std::fs::write(data, bytes).unwrap();
            },
            0,
        ),
        (
            "others may write the map",
            |_, map| std::fs::set_permissions(map, std::fs::Permissions::from_mode(0o666)).unwrap(),
            0,
        ),
        (
            "data behind a link",
            |data, _| {
                let target = data.with_extension("target");
                std::fs::rename(data, &target).unwrap();
                std::os::unix::fs::symlink(target, data).unwrap();
            },
            0,
        ),
    ];
    for (name, change, want) in changes {
        let dir = filled(&engine, &sample);
        let data = dir.path().join("sample.blob.data");
        change(&data, &dir.path().join("sample.blob.data.chunk_map"));
        assert_eq!(trusted(&engine, &sample, &dir), want, "{name}");
        assert!(std::fs::symlink_metadata(&data).unwrap().is_file(), "{name}");
    }
}

#[test]
fn another_shape_of_the_blob_leaves_the_files_in_use_alone() {
    let (engine, sample) = (engine(), Sample::new(4));
    let dir = filled(&engine, &sample);
    let reader = open(&engine, &sample, &dir, &sample.backend(), PATIENT);
    for other in [Sample::new(3), Sample::new(5)] {
        assert_eq!(trusted(&engine, &other, &dir), 0);
        assert!((0..4).all(|i| sample.try_read(&reader, i)));
    }
}

/// `sample` with other bytes in the same places.
pub(super) fn changed(sample: &Sample) -> Sample {
    let mut other = Sample::new(sample.extents.len() as u32);
    for (index, extent) in other.extents.iter_mut().enumerate() {
        let start = extent.decoded_offset as usize;
        let bytes = &mut other.decoded[start..start + LEN as usize];
        bytes.fill(index as u8 + 1);
        let algorithm = DigestAlgorithm::Blake3;
        extent.digest = Some(ExpectedDigest { algorithm, digest: algorithm.digest(bytes) });
        extent.unit.codec = Codec::None;
        extent.unit.compressed = ByteRange::new(extent.decoded_offset, u64::from(LEN)).unwrap();
    }
    other.stored = other.decoded.clone();
    other
}

#[test]
fn other_content_under_the_same_name_is_neither_trusted_nor_overwritten_in_use() {
    let (engine, sample) = (engine(), Sample::new(4));
    let dir = filled(&engine, &sample);
    let other = changed(&sample);
    let backend = other.backend();
    let reader = open(&engine, &sample, &dir, &sample.backend(), PATIENT);
    let hostile = open(&engine, &other, &dir, &backend, PATIENT);
    for _ in 0..2 {
        for index in 0..4 {
            assert!(!other.try_read(&hostile, index));
            other.read(&hostile, index).unwrap();
            settle(&hostile);
            assert!(sample.try_read(&reader, index));
        }
    }
    assert_eq!(backend.requests().len(), 8, "nothing of it was cached");
    // Alone, it may have the place: once the last task of the others has let go.
    drop(reader);
    while !other.try_read(&hostile, 2) {
        other.read(&hostile, 2).unwrap();
        settle(&hostile);
    }
    flush(&hostile);
    drop(hostile);
    assert_eq!(trusted(&engine, &sample, &dir), 0);
}

/// `sample` whose chunk 2 claims the middle of what chunks 0 and 1 fill.
fn overlapping(sample: &Sample) -> Sample {
    let mut other = Sample::new(sample.extents.len() as u32);
    other.extents[2].decoded_offset = 2000;
    other
}

/// Reads a chunk of [`overlapping`], whose place in `decoded` is not its bytes.
fn read_overlapping(honest: &Sample, other: &Sample, reader: &BlobSet, index: usize) {
    let mut out = vec![0; LEN as usize];
    reader.read(&[other.slice(index)], &mut out).unwrap();
    assert!(out == honest.bytes(index), "wrong bytes in chunk {index}");
}

#[test]
fn chunks_that_claim_the_place_of_others_change_nothing() {
    let (engine, sample) = (engine(), Sample::new(4));
    let hostile = overlapping(&sample);
    // Among images: the honest one is in use.
    let dir = filled(&engine, &sample);
    let reader = open(&engine, &sample, &dir, &sample.backend(), PATIENT);
    let intruder = open(&engine, &hostile, &dir, &hostile.backend(), PATIENT);
    for index in [2, 0, 1, 3, 2] {
        read_overlapping(&sample, &hostile, &intruder, index);
        settle(&intruder);
        assert!((0..4).all(|i| sample.try_read(&reader, i)));
    }
    // Within one image: whoever comes, all read right.
    let dir = TempDir::new().unwrap();
    let reader = open(&engine, &hostile, &dir, &hostile.backend(), PATIENT);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (reader, sample, hostile) = (&reader, &sample, &hostile);
            scope.spawn(move || {
                for round in 0..50 {
                    read_overlapping(sample, hostile, reader, (thread + round) % 4);
                }
            });
        }
    });
}

#[test]
fn records_keep_order_and_distance() {
    let (sample, dir) = (Sample::new(3000), TempDir::new().unwrap());
    let engine = engine();
    let cache = BlobCache::open(&engine, sample.config(&dir), sample.backend()).unwrap();
    let map = &cache.inner.files.as_ref().unwrap().map;
    let record = |index: u32, offset| {
        let extent = ChunkExtent { decoded_offset: offset, ..sample.extents[index as usize].clone() };
        (ChunkIndex(index), Record::of(&extent))
    };
    let place = |index: u32| sample.extents[index as usize].decoded_offset;
    let far = [record(5, place(5)), record(2990, place(2990))];
    assert!(map.set(&mut far.to_vec()).unwrap().is_empty());
    assert_eq!(map.ready_count(), 2);
    // (index, offset, has room)
    let cases = [
        (5, place(5), true),
        (5, place(6), false),
        (4, place(4), true),
        (4, place(5) - 1, false),
        (6, place(5) + 1, false),
        (6, 0, false),
        (1500, place(1500), true),
        (1500, place(2990), false),
        (2999, place(2989), false),
        (2999, place(2999), true),
        (0, place(2999), false),
    ];
    for (index, offset, room) in cases {
        let (index, record) = record(index, offset);
        assert_eq!(map.has_room(&[(index, record)]).unwrap(), room, "chunk {index} at {offset}");
        let refused = map.set(&mut [(index, record)]).unwrap();
        assert_eq!(refused.is_empty(), room, "chunk {index} at {offset}");
    }
    // The same holds for what is only locked so far.
    let lock = |index, offset| {
        let (index, record) = record(index, offset);
        map.try_lock(&[(index, record)]).unwrap()
    };
    let held = lock(10, place(10));
    assert!(held.is_some() && lock(10, place(10)).is_none() && lock(11, place(10)).is_none());
    assert!(lock(9, place(11)).is_none() && lock(11, place(11)).is_some());
    drop(held);
    assert!(lock(10, place(10)).is_some());
    map.clear_all().unwrap();
    assert_eq!(map.ready_count(), 0);
}

#[test]
fn unverified_bytes_never_pass_for_verified_ones() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let mut bare = Sample::new(2);
    bare.extents.iter_mut().for_each(|e| e.digest = None);
    let config = BlobCacheConfig { allow_unverified: true, ..bare.config(&dir) };
    let cache = BlobCache::open(&engine, config, bare.backend()).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    bare.read(&reader, 0).unwrap();
    flush(&reader);
    assert!(bare.try_read(&reader, 0));
    drop(reader);
    assert_eq!(trusted(&engine, &sample, &dir), 0);
}

#[test]
fn cleared_chunks_are_fetched_again() {
    let (engine, sample) = (engine(), Sample::new(4));
    let dir = filled(&engine, &sample);
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let cache = &reader.blobs()[0];
    assert!(sample.try_read(&reader, 1));
    assert_eq!(cache.clear_ready(&[ChunkIndex(4)]).unwrap_err().kind(), ErrorKind::OutOfRange);
    cache.clear_ready(&[ChunkIndex(1), ChunkIndex(2)]).unwrap();
    assert!(!sample.try_read(&reader, 1));
    assert_eq!(cache.ready_count(), 2);
    sample.read(&reader, 1).unwrap();
    assert_eq!(backend.requests(), [sample.range(1)]);
}

#[test]
fn a_callers_data_file_is_used() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let file = tempfile::tempfile().unwrap();
    let open = |file: File| {
        let config = BlobCacheConfig { data_file: Some(file.into()), ..sample.config(&dir) };
        BlobCache::open(&engine, config, sample.backend())
    };
    let reader = BlobSet::new(&engine, vec![open(file.try_clone().unwrap()).unwrap()], PATIENT);
    sample.read(&reader, 1).unwrap();
    flush(&reader);
    let mut found = vec![0; LEN as usize];
    Storage::read_at(&file, &mut found, sample.extents[1].decoded_offset).unwrap();
    assert!(found == sample.bytes(1));
    assert!(!dir.path().join("sample.blob.data").exists());
    drop(reader);
    let again = BlobSet::new(&engine, vec![open(file.try_clone().unwrap()).unwrap()], PATIENT);
    assert!(sample.try_read(&again, 1) && !sample.try_read(&again, 0));
    file.set_len(77).unwrap();
    assert_eq!(open(file).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn the_context_file_is_kept_once() {
    let (engine, sample, dir) = (engine(), Sample::new(2), TempDir::new().unwrap());
    let backend = sample.backend();
    let gate = Gate::default();
    let told = gate.clone();
    let to_cache_file: ToCacheFile = Arc::new(move |stored| {
        told.open();
        Some(stored.to_ascii_uppercase())
    });
    let meta = Some(MetaSpec { range: ByteRange::new(3, 9).unwrap(), to_cache_file });
    let config = BlobCacheConfig { meta, ..sample.config(&dir) };
    let cache = BlobCache::open(&engine, config, backend).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    sample.read(&reader, 1).unwrap();
    engine.block_on(gate.passed());
    // Joins the thread that writes the file.
    drop(engine);
    let kept = std::fs::read(dir.path().join("sample.blob.meta")).unwrap();
    assert_eq!(kept, sample.stored[3..12].to_ascii_uppercase());
}

/// A file that notes what it is to read ahead.
struct Advised {
    file: File,
    advice: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Storage for Advised {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn will_need(&self, offset: u64, len: u64) {
        self.advice.lock().unwrap().push((offset, len));
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

#[test]
fn only_what_is_local_is_read_ahead_from_the_disk() {
    let (engine, sample, dir) = (engine(), Sample::new(6), TempDir::new().unwrap());
    let advice = Arc::new(Mutex::new(Vec::new()));
    let through = |_, file| Ok(Arc::new(Advised { file, advice: Arc::clone(&advice) }) as Arc<dyn Storage>);
    let cache = BlobCache::open_through(&engine, sample.config(&dir), sample.backend(), through).unwrap();
    let reader = BlobSet::new(&engine, vec![cache], PATIENT);
    for index in [0, 1, 2, 4] {
        sample.read(&reader, index).unwrap();
    }
    settle(&reader);
    flush(&reader);
    let slices: Vec<_> = (0..6).map(|index| sample.slice(index)).collect();
    reader.will_need(&slices);
    // Up to the first gap, of which there is one behind each chunk here.
    let at = |index: usize| (sample.extents[index].decoded_offset, u64::from(LEN));
    assert_eq!(*advice.lock().unwrap(), [at(0), at(1), at(2)]);
    // Two halves of a chunk are one piece.
    let (mut first, mut second) = (sample.slice(4), sample.slice(4));
    (first.len, second.offset, second.len) = (1000, 1000, 3000);
    reader.will_need(&[first, second.clone()]);
    assert_eq!(advice.lock().unwrap().last(), Some(&at(4)));
    // Nonsense is no advice.
    second.len += 1;
    reader.will_need(&[second]);
    assert_eq!(advice.lock().unwrap().len(), 4);
}
