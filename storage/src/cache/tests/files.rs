//! What is found in a cache directory, and what of it is trusted.

use std::os::unix::fs::PermissionsExt as _;

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
    // Alone, it may have the place.
    drop(reader);
    other.read(&hostile, 2).unwrap();
    settle(&hostile);
    assert!(other.try_read(&hostile, 2));
    flush(&hostile);
    drop(hostile);
    assert_eq!(trusted(&engine, &sample, &dir), 3);
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
