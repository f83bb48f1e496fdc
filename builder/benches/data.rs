//! Throughput of the data path: files in memory → chunk data of a blob that goes nowhere.
//!
//! `small` is what trees of sources look like (the cost per file), `large` what libraries and
//! models look like (hashing and compressing); `known` is all duplicates (no compression).

#![allow(missing_docs)]

use builder::pipeline::{DataOptions, Session};
use builder::sink::BlobSink;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;

const MIB: usize = 1 << 20;

/// Bytes that zstd halves: words from a small vocabulary between random ones.
fn file(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let word = if state & 0x8000 == 0 { (state >> 24) * 0x0101_0101 } else { state };
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(len);
    out
}

fn build(codec: Codec, files: &[Vec<u8>]) -> u64 {
    let options = DataOptions {
        codec,
        digester: DigestAlgorithm::Blake3,
        chunk_size: 0x10_0000,
        threads: 0,
        placement: builder::pipeline::Placement::Blob,
        batch_size: 0,
        cipher: None,
    };
    let session = Session::new(options).expect("the options are valid");
    let mut layer = session.layer(BlobSink::new("nowhere", std::io::sink())).expect("a first layer");
    for file in files {
        layer.add_file(&mut file.as_slice(), file.len() as u64).expect("memory can be read");
    }
    layer.finish().expect("nothing fails");
    session.finish().expect("nothing fails").layers[0].sink.len()
}

fn data(c: &mut Criterion) {
    let sets = [
        ("small", (0..3200).map(|i| file(i, 10 * 1024)).collect::<Vec<_>>()),
        ("large", (0..8).map(|i| file(i, 4 * MIB)).collect()),
        ("known", vec![file(1, MIB); 32]),
    ];
    let mut group = c.benchmark_group("data");
    group.sample_size(10);
    for (name, files) in &sets {
        group.throughput(Throughput::Bytes(files.iter().map(|f| f.len() as u64).sum()));
        for codec in [Codec::None, Codec::Lz4Block, Codec::Zstd] {
            group.bench_with_input(BenchmarkId::new(*name, codec), files, |b, files| {
                b.iter(|| build(codec, files));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, data);
criterion_main!(benches);
