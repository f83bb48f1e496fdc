//! The cache on backends that lie: single flight, wake-ups, faults, crashes.

mod ahead;
mod crash;
mod dedup;
mod faults;
mod files;
mod sharing;

use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::codec::{Codec, Compressor};
use crate::digest::DigestAlgorithm;
use crate::engine::EngineConfig;
use crate::extent::{Cipher, ExpectedDigest, FetchUnit};
use crate::read::{OutagePolicy, ReadSlice, Reader};
use crate::testing::{CountingBackend, Fault, FaultyBackend, Gate};

/// A blob of `count` chunks of 4000 bytes, zstd or stored, one unit each, with holes
/// between them that merging may skip.
pub(super) struct Sample {
    pub(super) stored: Vec<u8>,
    pub(super) decoded: Vec<u8>,
    pub(super) extents: Vec<ChunkExtent>,
}

pub(super) const LEN: u32 = 4000;

impl Sample {
    pub(super) fn new(count: u32) -> Self {
        let mut sample = Self { stored: Vec::new(), decoded: Vec::new(), extents: Vec::new() };
        let mut zstd = Compressor::new(Codec::Zstd).unwrap();
        for index in 0..count {
            let chunk: Vec<u8> = (0..LEN).map(|i| ((i / 8) ^ (index * 37)) as u8).collect();
            let packed = if index % 2 == 0 { zstd.compress(&chunk).unwrap() } else { None };
            let codec = if packed.is_some() { Codec::Zstd } else { Codec::None };
            let bytes = packed.unwrap_or_else(|| chunk.clone());
            let algorithm = DigestAlgorithm::Sha256;
            sample.extents.push(ChunkExtent {
                index: ChunkIndex(index),
                unit: FetchUnit {
                    compressed: ByteRange::new(sample.stored.len() as u64, bytes.len() as u64).unwrap(),
                    codec,
                    cipher: Cipher::None,
                    window: None,
                    decoded_len: LEN,
                },
                offset_in_unit: 0,
                len: LEN,
                decoded_offset: sample.decoded.len() as u64,
                digest: Some(ExpectedDigest { algorithm, digest: algorithm.digest(&chunk) }),
            });
            sample.decoded.extend(&chunk);
            sample.decoded.resize(sample.decoded.len().next_multiple_of(4096), 0);
            sample.stored.extend(&bytes);
            sample.stored.extend([0xee; 5]);
        }
        sample
    }

    pub(super) fn backend(&self) -> Arc<CountingBackend<FaultyBackend>> {
        CountingBackend::new(FaultyBackend::new(self.stored.clone()))
    }

    pub(super) fn config(&self, dir: &TempDir) -> BlobCacheConfig {
        let id = BlobId::new("sample").unwrap();
        BlobCacheConfig::new(dir.path(), id, self.decoded.len() as u64, self.extents.len() as u32)
    }

    pub(super) fn slice(&self, index: usize) -> ReadSlice {
        ReadSlice { blob: 0, extent: self.extents[index].clone(), offset: 0, len: LEN }
    }

    pub(super) fn range(&self, index: usize) -> ByteRange {
        self.extents[index].unit.compressed
    }

    pub(super) fn bytes(&self, index: usize) -> &[u8] {
        let start = self.extents[index].decoded_offset as usize;
        &self.decoded[start..start + LEN as usize]
    }

    pub(super) fn read(&self, reader: &BlobSet, index: usize) -> Result<()> {
        let mut out = vec![0; LEN as usize];
        reader.read(&[self.slice(index)], &mut out)?;
        assert!(out == self.bytes(index), "wrong bytes in chunk {index}");
        Ok(())
    }

    pub(super) fn try_read(&self, reader: &BlobSet, index: usize) -> bool {
        let mut out = vec![0; LEN as usize];
        let ready = reader.try_read(&[self.slice(index)], &mut out).unwrap();
        assert!(!ready || out == self.bytes(index), "wrong bytes in chunk {index}");
        ready
    }
}

pub(super) fn engine() -> Arc<Engine> {
    Engine::new(EngineConfig::default()).unwrap()
}

pub(super) fn open(
    engine: &Engine,
    sample: &Sample,
    dir: &TempDir,
    backend: &Arc<CountingBackend<FaultyBackend>>,
    policy: OutagePolicy,
) -> BlobSet {
    let cache = BlobCache::open(engine, sample.config(dir), backend.clone()).unwrap();
    BlobSet::new(engine, vec![cache], policy)
}

/// Waits until what was answered is also written: readers are answered first.
pub(super) fn settle(reader: &BlobSet) {
    reader.blobs().iter().for_each(|blob| settle_blob(blob));
}

/// The same for one of them.
pub(super) fn settle_blob(blob: &BlobCache) {
    while !blob.inner.inflight.is_idle() {
        std::thread::yield_now();
    }
}

/// Makes all that was read ready for others.
pub(super) fn flush(reader: &BlobSet) {
    reader.blobs().iter().for_each(|blob| blob.flush().unwrap());
}

/// Long enough for a loaded machine; tests that pass never wait for it.
pub(super) const PATIENT: OutagePolicy = OutagePolicy::FailAfter(Duration::from_secs(60));

#[test]
fn misses_are_fetched_together_and_then_read_locally() {
    let (engine, sample, dir) = (engine(), Sample::new(8), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    let mut slices: Vec<_> = (2..6).map(|i| sample.slice(i)).collect();
    slices[0].offset = 100;
    slices[0].len -= 100;
    slices[3].len = 7;
    let want = [&sample.bytes(2)[100..], sample.bytes(3), sample.bytes(4), &sample.bytes(5)[..7]].concat();
    let mut out = vec![0; want.len()];
    assert!(!reader.try_read(&slices, &mut out).unwrap());
    reader.read(&slices, &mut out).unwrap();
    assert!(out == want);
    assert_eq!(backend.requests().len(), 1);
    flush(&reader);
    assert!(reader.try_read(&slices, &mut out).unwrap());
    assert!(out == want);
    assert_eq!(reader.blobs()[0].ready_count(), 4);
    let counts = reader.blobs()[0].metrics().snapshot();
    assert_eq!((counts.total, counts.whole_hits, counts.misses, counts.fetched_chunks), (2, 1, 1, 4));

    // The next process asks the backend for nothing.
    drop(reader);
    let again = open(&engine, &sample, &dir, &backend, PATIENT);
    assert!((2..6).all(|i| sample.try_read(&again, i)));
    assert!(!sample.try_read(&again, 1));
    let file = std::fs::metadata(dir.path().join("sample.blob.data")).unwrap();
    assert_eq!((file.len(), file.mode() & 0o777), (sample.decoded.len() as u64, 0o600));
}

#[test]
fn corrupt_bytes_reach_nobody_and_are_forgotten() {
    let (engine, sample, dir) = (engine(), Sample::new(6), TempDir::new().unwrap());
    let backend = sample.backend();
    let reader = open(&engine, &sample, &dir, &backend, PATIENT);
    for index in [2, 3] {
        let range = sample.range(index);
        backend.inner().fault(range, Fault::Corrupt(range.start() + 9), 2);
        let error = sample.read(&reader, index).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let text = error.to_string();
        assert!(text.contains("blob sample") && text.contains(&format!("chunk {index}")), "{text}");
        assert!(!sample.try_read(&reader, index));
        sample.read(&reader, index).unwrap();
    }
    // One lie is forgiven within the read.
    backend.inner().fault(sample.range(4), Fault::Corrupt(sample.range(4).start()), 1);
    sample.read(&reader, 4).unwrap();
}
