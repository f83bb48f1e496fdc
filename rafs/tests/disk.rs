//! An image as disks: what a kernel finds where the bootstrap says it is, and any range of it.

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rafs::ErrorKind;
use rafs::bootstrap::{FileType, Step, Walk};
use rafs::disk::{Disks, Part, Piece};
use storage::extent::ChunkExtent;
use support::{GoldenImage, golden_bytes, open_bytes};

const VARIANTS: [&str; 3] = ["default", "lz4-4k", "batch"];

/// The disks of a golden image, and what decodes its chunks.
fn image(variant: &str) -> (Disks, GoldenImage) {
    let golden = || {
        let blob = golden_bytes(&format!("{variant}/image.blob"));
        GoldenImage::new(open_bytes(golden_bytes(&format!("{variant}/image.boot"))), vec![blob])
    };
    (Disks::new(&Arc::new(golden().rafs)).unwrap(), golden())
}

/// Bytes of a disk, which come in pieces that leave no gap.
fn read(disks: &Disks, golden: &GoldenImage, part: Part, range: std::ops::Range<u64>) -> Vec<u8> {
    let mut pieces = Vec::new();
    disks.read(part, range.clone(), &mut pieces).unwrap();
    assert_eq!(pieces.iter().map(Piece::len).sum::<u64>(), range.end - range.start);
    let mut bytes = Vec::new();
    for piece in pieces {
        assert!(!piece.is_empty());
        match piece {
            Piece::Metadata(range) => {
                bytes.extend_from_slice(&disks.metadata()[range.start as usize..range.end as usize]);
            }
            Piece::Chunk(slice) => {
                let chunk = golden.chunk(slice.blob, &slice.extent);
                bytes.extend_from_slice(&chunk[slice.offset as usize..][..slice.len as usize]);
            }
            Piece::Zeros(len) => bytes.resize(bytes.len() + len as usize, 0),
        }
    }
    bytes
}

/// Every chunk of every file.
fn chunks(golden: &GoldenImage) -> Vec<(u32, ChunkExtent)> {
    let bootstrap = &**golden.rafs.bootstrap();
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    let mut found = Vec::new();
    while let Some(step) = walk.step().unwrap() {
        let Step::Leaf(entry) = step else { continue };
        let attr = bootstrap.attr(entry.nid).unwrap();
        if attr.file_type == FileType::Regular {
            let mut slices = Vec::new();
            golden.rafs.read(entry.nid, 0, u32::MAX, &mut slices).unwrap();
            found.extend(slices.into_iter().map(|slice| (slice.blob, slice.extent)));
        }
    }
    found
}

#[test]
fn chunks_are_where_the_bootstrap_says() {
    for variant in VARIANTS {
        let (disks, golden) = image(variant);
        let chunks = chunks(&golden);
        assert!(chunks.len() > 100);
        for (blob, extent) in chunks {
            let want = golden.chunk(blob, &extent);
            let end = extent.decoded_offset + u64::from(extent.len);
            assert_eq!(read(&disks, &golden, Part::Blob(blob), extent.decoded_offset..end), want);
            let flat = golden.rafs.bootstrap().blobs()[blob as usize].flat_offset.unwrap();
            let range = flat + extent.decoded_offset..flat + end;
            assert_eq!(read(&disks, &golden, Part::Flat, range), want);
        }
    }
}

#[test]
fn disks_end_with_a_block_and_nothing_is_behind() {
    for variant in VARIANTS {
        let (disks, golden) = image(variant);
        assert_eq!(disks.parts().collect::<Vec<_>>(), [Part::Metadata, Part::Blob(0)]);
        for part in [Part::Flat, Part::Metadata, Part::Blob(0)] {
            let size = disks.size(part);
            assert!(size > 0 && size.is_multiple_of(4096), "{part:?}: {size}");
            assert_eq!(read(&disks, &golden, part, size - 1..size).len(), 1);
            assert!(read(&disks, &golden, part, size..size).is_empty());
            for range in [size..size + 1, size - 1..size + 1, 0..u64::MAX, u64::MAX..u64::MAX] {
                let refused = disks.read(part, range, &mut Vec::new()).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Invalid);
            }
        }
        assert_eq!(disks.size(Part::Blob(1)), 0);
        let boot = golden_bytes(&format!("{variant}/image.boot"));
        assert!(read(&disks, &golden, Part::Metadata, 0..disks.size(Part::Metadata)).starts_with(&boot));
        assert!(read(&disks, &golden, Part::Flat, 0..boot.len() as u64) == boot);
    }
}

#[test]
fn any_range_is_that_of_the_whole() {
    for variant in VARIANTS {
        let (disks, golden) = image(variant);
        for part in [Part::Flat, Part::Blob(0)] {
            let whole = read(&disks, &golden, part, 0..disks.size(part));
            let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
            let ranges = (0..=whole.len(), 0..300_000_usize);
            TestRunner::new(config)
                .run(&ranges, |(start, len)| {
                    let end = whole.len().min(start + len);
                    let bytes = read(&disks, &golden, part, start as u64..end as u64);
                    prop_assert!(bytes == whole[start..end]);
                    Ok(())
                })
                .unwrap();
        }
    }
}
