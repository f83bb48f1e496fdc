//! The parts of a read that every request pays for: the plan, the chunk map's answer (a
//! hit, a miss) and a read of cached data.
//!
//! `cargo bench -p storage --features testing`

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use storage::cache::plan::plan;
use storage::cache::{BlobCache, BlobCacheConfig, BlobSet};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::engine::{Engine, EngineConfig};
use storage::extent::{ChunkExtent, Cipher, ExpectedDigest, FetchUnit};
use storage::ids::{BlobId, ByteRange, ChunkIndex};
use storage::read::{OutagePolicy, ReadSlice, Reader as _};
use storage::testing::FaultyBackend;

/// Bytes of one chunk and of one read: the kernel's usual read-ahead.
const CHUNK: u32 = 128 << 10;
const CHUNKS: u32 = 64;

fn extents() -> Vec<ChunkExtent> {
    let algorithm = DigestAlgorithm::Sha256;
    let digest = algorithm.digest(&vec![0; CHUNK as usize]);
    (0..CHUNKS)
        .map(|index| {
            let at = u64::from(index) * u64::from(CHUNK);
            let compressed = ByteRange::new(at, u64::from(CHUNK)).expect("small");
            ChunkExtent {
                index: ChunkIndex(index),
                unit: FetchUnit { compressed, codec: Codec::None, cipher: Cipher::None, decoded_len: CHUNK },
                offset_in_unit: 0,
                len: CHUNK,
                decoded_offset: at,
                digest: Some(ExpectedDigest { algorithm, digest }),
            }
        })
        .collect()
}

fn benches(c: &mut Criterion) {
    let extents = extents();
    let units: Vec<_> = extents.iter().map(|e| e.unit).collect();
    c.bench_function("plan 64 units", |b| b.iter(|| plan(black_box(&units), |_| true)));

    let engine = Engine::new(EngineConfig::default()).expect("threads");
    let dir = tempfile::tempdir().expect("a directory");
    let size = u64::from(CHUNK) * u64::from(CHUNKS);
    let id = BlobId::new("bench").expect("a name");
    let config = BlobCacheConfig::new(dir.path(), id, size, CHUNKS);
    let backend = Arc::new(FaultyBackend::new(vec![0; size as usize]));
    let cache = BlobCache::open(&engine, config, backend).expect("a cache");
    let reader = BlobSet::new(&engine, vec![cache], OutagePolicy::DEFAULT);
    let slice = |index: usize| ReadSlice { blob: 0, extent: extents[index], offset: 0, len: CHUNK };
    let mut out = vec![0; CHUNK as usize];
    reader.read(&[slice(0)], &mut out).expect("a read");
    // Readers are answered before the cache is written.
    while !reader.blobs()[0].is_ready(&extents[0]) {
        std::thread::yield_now();
    }

    c.bench_function("chunk map hit", |b| b.iter(|| reader.blobs()[0].is_ready(black_box(&extents[0]))));
    c.bench_function("chunk map miss", |b| b.iter(|| reader.blobs()[0].is_ready(black_box(&extents[1]))));
    let mut group = c.benchmark_group("cached read");
    group.throughput(Throughput::Bytes(u64::from(CHUNK)));
    group.bench_function("128 KiB", |b| {
        b.iter(|| assert!(reader.try_read(&[slice(0)], &mut out).expect("a read")));
    });
    group.finish();
    sequential(c, &reader, &extents, dir.path());
}

/// A read of the whole blob, and of the sparse file that holds it: what the cache adds.
fn sequential(c: &mut Criterion, reader: &BlobSet, extents: &[ChunkExtent], dir: &Path) {
    let slice = |extent: &ChunkExtent| ReadSlice { blob: 0, extent: *extent, offset: 0, len: CHUNK };
    let mut out = vec![0; CHUNK as usize];
    for extent in extents {
        reader.read(&[slice(extent)], &mut out).expect("a read");
    }
    while !extents.iter().all(|extent| reader.blobs()[0].is_ready(extent)) {
        std::thread::yield_now();
    }
    let file = File::open(dir.join("bench.blob.data")).expect("the data file");
    let mut group = c.benchmark_group("sequential");
    group.throughput(Throughput::Bytes(u64::from(CHUNK) * u64::from(CHUNKS)));
    group.bench_function("through the cache", |b| {
        b.iter(|| {
            for extent in extents {
                assert!(reader.try_read(&[slice(extent)], &mut out).expect("a read"));
            }
        });
    });
    group.bench_function("the same sparse file", |b| {
        b.iter(|| {
            for extent in extents {
                file.read_exact_at(&mut out, extent.decoded_offset).expect("a read");
            }
        });
    });
    group.finish();
}

criterion_group!(cache, benches);
criterion_main!(cache);
