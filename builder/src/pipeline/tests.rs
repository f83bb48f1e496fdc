use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use storage::codec::{Codec, decompress};
use storage::digest::DigestAlgorithm;

use super::*;
use crate::content::ChunkId;
use crate::tree::FileId;

/// A writer whose bytes can be looked at afterwards.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn options(codec: Codec, chunk_size: u32, threads: usize) -> DataOptions {
    DataOptions {
        codec,
        digester: DigestAlgorithm::Blake3,
        chunk_size,
        threads,
        placement: Placement::Blob,
        batch_size: 0,
        cipher: None,
    }
}

/// Bytes that look random or compress well, depending on `seed`.
fn bytes(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if seed.is_multiple_of(3) { (i / 64) as u8 ^ seed as u8 } else { (state >> 24) as u8 }
        })
        .collect()
}

struct Built {
    output: Output,
    blobs: Vec<Vec<u8>>,
    files: Vec<Vec<FileId>>,
}

/// Builds `layers` of files, each layer from a thread of its own.
fn build(options: DataOptions, layers: &[Vec<Vec<u8>>]) -> Built {
    let session = Session::new(options).unwrap();
    let sinks: Vec<Memory> = layers.iter().map(|_| Memory::default()).collect();
    let handles: Vec<Layer> =
        sinks.iter().map(|s| session.layer(BlobSink::new("test", s.clone())).unwrap()).collect();
    let files = std::thread::scope(|scope| {
        let threads: Vec<_> = handles
            .into_iter()
            .zip(layers)
            .map(|(mut layer, files)| {
                scope.spawn(move || {
                    let ids = files
                        .iter()
                        .map(|f| layer.add_file(&mut f.as_slice(), f.len() as u64).unwrap())
                        .collect::<Vec<_>>();
                    layer.finish().unwrap();
                    ids
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let output = session.finish().unwrap();
    let blobs = sinks.into_iter().map(|s| s.0.lock().unwrap().clone()).collect();
    Built { output, blobs, files }
}

impl Built {
    fn read(&self, codec: Codec, id: FileId) -> Vec<u8> {
        let mut data = Vec::new();
        for &chunk in self.output.content.files.chunks(id) {
            let chunk = self.output.content.chunks.get(chunk);
            let stored = &self.blobs[usize::from(chunk.layer.0)][chunk.compressed_offset as usize..]
                [..chunk.compressed_size as usize];
            let mut plain = vec![0; chunk.uncompressed_size as usize];
            let codec = if chunk.is_compressed() { codec } else { Codec::None };
            decompress(codec, stored, &mut plain).unwrap();
            assert_eq!(DigestAlgorithm::Blake3.digest(&plain), chunk.digest);
            assert_eq!(crc32c::crc32c(&plain), chunk.crc32);
            data.extend_from_slice(&plain);
        }
        data
    }
}

fn sample_layers() -> Vec<Vec<Vec<u8>>> {
    let small: Vec<Vec<u8>> = (0..3000).map(|i| bytes(i % 1500, (i as usize * 37) % 5000)).collect();
    let big = vec![bytes(3, 3 << 20), bytes(7, (2 << 20) + 1), vec![], bytes(3, 3 << 20)];
    let again = vec![bytes(7, (2 << 20) + 1), bytes(8, 100), bytes(1499, 1499 * 37 % 5000)];
    vec![small, vec![], big, again]
}

#[test]
fn files_come_back_at_every_codec_and_chunk_size() {
    let layers = sample_layers();
    for (codec, chunk_size) in [
        (Codec::None, 0x1000),
        (Codec::Zstd, 0x1000),
        (Codec::Zstd, 0x10_0000),
        (Codec::Lz4Block, 0x2_0000),
        (Codec::Zstd, 0x100_0000),
    ] {
        let built = build(options(codec, chunk_size, 2), &layers);
        for (ids, files) in built.files.iter().zip(&layers) {
            for (&id, file) in ids.iter().zip(files) {
                assert_eq!(built.output.content.files.size(id), file.len() as u64);
                assert!(built.read(codec, id) == *file, "{codec} {chunk_size:#x} {id:?}");
            }
        }
        for (layer, blob) in built.output.layers.iter().zip(&built.blobs) {
            assert_eq!(layer.sink.digest(), DigestAlgorithm::Sha256.digest(blob));
            assert_eq!(built.output.content.chunks.stored_size(layer.layer), blob.len() as u64);
        }
        // Layer 1 has no file, and all of layer 3 but one chunk is known from the layers below.
        assert_eq!(built.output.content.chunks.of_layer(LayerIndex(1)).len(), 0);
        assert_eq!(built.blobs[3].len(), 100, "{codec} {chunk_size:#x}");
    }
}

#[test]
fn output_does_not_depend_on_threads() {
    let layers = sample_layers();
    let make = |threads| {
        let built = build(options(Codec::Zstd, 0x4000, threads), &layers);
        let rows: Vec<_> = (0..built.output.content.chunks.len())
            .map(|i| built.output.content.chunks.get(ChunkId(i as u32)))
            .collect();
        let refs: Vec<Vec<ChunkId>> =
            built.files.iter().flatten().map(|&f| built.output.content.files.chunks(f).to_vec()).collect();
        (built.blobs, rows, refs)
    };
    let one = make(1);
    for threads in [2, 4, 16] {
        assert!(make(threads) == one, "{threads} threads");
    }
}

#[test]
fn more_data_than_buffers_passes_through_waiting_layers() {
    // Each layer is larger than all buffers together, so every one but the first must wait.
    let layer: Vec<Vec<u8>> = (0..20).map(|i| bytes(i * 3 + 1, 4 << 20)).collect();
    let built = build(options(Codec::Lz4Block, 0x10_0000, 2), &[layer.clone(), layer.clone(), layer]);
    assert_eq!(built.blobs[0].len(), 80 << 20);
    assert!(built.blobs[1].is_empty() && built.blobs[2].is_empty());
}

#[test]
fn sparse_files_read_as_their_dense_form() {
    let chunk = 0x1000u64;
    let extents = [
        Extent { offset: 5, len: 10 },
        Extent { offset: chunk * 3 - 1, len: 2 },
        Extent { offset: chunk * 8, len: chunk },
        Extent { offset: chunk * 9 + 7, len: 0 },
        Extent { offset: chunk * 9 + 7, len: 100 },
    ];
    let size = chunk * 20 + 17;
    let data = bytes(4, extents.iter().map(|e| e.len as usize).sum());
    let mut dense = vec![0; size as usize];
    let mut rest = data.as_slice();
    for e in extents {
        rest.read_exact(&mut dense[e.offset as usize..][..e.len as usize]).unwrap();
    }

    let session = Session::new(options(Codec::Zstd, 0x1000, 2)).unwrap();
    let sink = Memory::default();
    let mut layer = session.layer(BlobSink::new("test", sink.clone())).unwrap();
    let id = layer.add_sparse_file(&mut data.as_slice(), size, &extents).unwrap();
    let plain = layer.add_file(&mut dense.as_slice(), size).unwrap();
    layer.finish().unwrap();
    let output = session.finish().unwrap();
    assert_eq!(output.content.files.chunks(id), output.content.files.chunks(plain));
    let built = Built { output, blobs: vec![sink.0.lock().unwrap().clone()], files: vec![] };
    assert!(built.read(Codec::Zstd, id) == dense);
    // Four chunks with data, one of zeros, one short one of zeros.
    assert_eq!(built.output.content.chunks.len(), 7);
}

#[test]
fn a_terabyte_of_holes_is_cheap() {
    let session = Session::new(options(Codec::Zstd, 0x10_0000, 1)).unwrap();
    let mut layer = session.layer(BlobSink::new("test", std::io::sink())).unwrap();
    let id = layer.add_sparse_file(&mut std::io::empty(), 1 << 40, &[]).unwrap();
    layer.finish().unwrap();
    let output = session.finish().unwrap();
    assert_eq!((output.content.files.chunks(id).len(), output.content.chunks.len()), (1 << 20, 1));
}

#[test]
fn bad_extents_and_sizes_are_refused() {
    let one = |size, extents: &[Extent]| {
        let session = Session::new(options(Codec::None, 0x1000, 1)).unwrap();
        let mut layer = session.layer(BlobSink::new("test", std::io::sink())).unwrap();
        let error = layer.add_sparse_file(&mut [1u8; 64].as_slice(), size, extents).unwrap_err();
        assert_eq!(layer.finish().unwrap_err().kind(), error.kind());
        assert_eq!(session.finish().err().map(|e| e.kind()), Some(error.kind()));
        error.kind()
    };
    let extent = |offset, len| Extent { offset, len };
    assert_eq!(one(100, &[extent(0, 32), extent(31, 32)]), ErrorKind::Corrupt);
    assert_eq!(one(100, &[extent(32, 32), extent(0, 32)]), ErrorKind::Corrupt);
    assert_eq!(one(100, &[extent(40, 64)]), ErrorKind::Corrupt);
    assert_eq!(one(100, &[extent(u64::MAX, 64)]), ErrorKind::Corrupt);
    assert_eq!(one(100, &[extent(0, 63)]), ErrorKind::Mismatch);
    assert_eq!(one(100, &[extent(0, 65)]), ErrorKind::Mismatch);
    assert_eq!(one(u64::MAX, &[]), ErrorKind::Limit);
}

/// Succeeds for `left` bytes, then fails as a full disk does, or panics.
struct Full {
    left: usize,
    panic: bool,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.left.checked_sub(bytes.len()) {
            Some(left) => {
                self.left = left;
                Ok(bytes.len())
            }
            None if self.panic => panic!("a sink that panics"),
            None => Err(std::io::ErrorKind::StorageFull.into()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn failing_sinks_stop_every_layer() {
    for panic in [false, true] {
        let session = Session::new(options(Codec::None, 0x10_0000, 2)).unwrap();
        let layers = [
            session.layer(BlobSink::new("full", Full { left: 5 << 20, panic })).unwrap(),
            session.layer(BlobSink::new("ahead", std::io::sink())).unwrap(),
        ];
        let kind = if panic { ErrorKind::Cancelled } else { ErrorKind::Io };
        std::thread::scope(|scope| {
            for (seed, mut layer) in layers.into_iter().enumerate() {
                scope.spawn(move || {
                    // Endless: only the failure ends it.
                    let error = (0..)
                        .find_map(|i| {
                            let data = bytes(i * 6 + seed as u32 + 1, 1 << 20);
                            layer.add_file(&mut data.as_slice(), 1 << 20).err()
                        })
                        .unwrap();
                    assert_eq!(error.kind(), kind);
                });
            }
        });
        let error = session.finish().err().unwrap();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains(if panic { "a sink that panics" } else { "full" }), "{error}");
    }
}

#[test]
fn failing_sources_and_abandoned_layers_fail_the_build() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("a broken disk"))
        }
    }
    let session = Session::new(options(Codec::None, 0x1000, 2)).unwrap();
    let mut layer = session.layer(BlobSink::new("test", std::io::sink())).unwrap();
    assert_eq!(layer.add_file(&mut Broken, 10).unwrap_err().kind(), ErrorKind::Io);
    drop(layer);
    assert_eq!(session.finish().err().unwrap().kind(), ErrorKind::Io);

    let session = Session::new(options(Codec::None, 0x1000, 2)).unwrap();
    drop(session.layer(BlobSink::new("test", std::io::sink())).unwrap());
    assert!(session.finish().err().unwrap().to_string().contains("layer 0 was given up"));

    let session = Session::new(options(Codec::None, 0x1000, 2)).unwrap();
    let layer = session.layer(BlobSink::new("test", std::io::sink())).unwrap();
    assert!(session.finish().err().unwrap().to_string().contains("layer 0 was still open"));
    drop(layer);

    // Given up as a whole, with data on the way.
    let session = Session::new(options(Codec::Zstd, 0x1000, 2)).unwrap();
    let mut layer = session.layer(BlobSink::new("test", std::io::sink())).unwrap();
    layer.add_file(&mut bytes(1, 8 << 20).as_slice(), 8 << 20).unwrap();
    drop(session);
    assert_eq!(layer.finish().unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn bad_options_are_refused() {
    for (codec, chunk_size) in [
        (Codec::Gzip, 0x1000),
        (Codec::None, 0),
        (Codec::None, 0x800),
        (Codec::None, 0x1800),
        (Codec::None, 1 << 25),
    ] {
        assert_eq!(Session::new(options(codec, chunk_size, 1)).err().unwrap().kind(), ErrorKind::Invalid);
    }
}
