//! Checks find nothing in golden images and every planted fault in damaged ones.

mod support;

use rafs::bootstrap::OpenOptions;
use rafs::check::{data, structure};
use rafs::{Error, ErrorKind};
use support::{GoldenImage, golden_bytes, open_bytes};

const NATIVE: [(&str, &[&str]); 13] = [
    ("default", &["default/image.blob"]),
    ("zstd-4k", &["zstd-4k/image.blob"]),
    ("lz4-4k", &["lz4-4k/image.blob"]),
    ("lz4-1m", &["lz4-1m/image.blob"]),
    ("none-4k", &["none-4k/image.blob"]),
    ("none-1m", &["none-1m/image.blob"]),
    ("toc-sha256", &["toc-sha256/image.blob"]),
    ("batch", &["batch/image.blob"]),
    ("prefetch", &["prefetch/image.blob"]),
    ("tar-rafs", &["tar-rafs/image.blob"]),
    ("parent", &["default/image.blob", "parent/image.blob"]),
    ("merged", &["upper-inline-toc/layer.blob", "inline-toc/layer.blob"]),
    ("chunkdict", &["chunkdict/image.blob", "zstd-4k/image.blob"]),
];

#[test]
fn golden_images_are_clean() {
    for (variant, blobs) in NATIVE {
        let bytes = golden_bytes(&format!("{variant}/image.boot"));
        let report = structure(bytes.clone(), &OpenOptions::default()).unwrap();
        assert!(report.is_clean(), "{variant}: {:?}", report.faults);
        let counts = report.counts;
        let entries = counts.directories + counts.regular + counts.symlinks + counts.special;
        assert_eq!(entries, open_bytes(bytes.clone()).summary().inode_count);

        let image = GoldenImage::new(open_bytes(bytes), blobs.iter().map(|b| golden_bytes(b)).collect());
        for (number, stored) in (0u32..).zip(&image.blobs) {
            let report = data(&image.rafs, number, &mut |range| {
                Ok(stored[range.start() as usize..range.end() as usize].to_vec())
            })
            .unwrap();
            assert!(report.faults.is_empty(), "{variant}: {:?}", report.faults);
            assert_eq!(report.unreferenced_bytes, 0, "{variant}");
            // Layers and dictionaries hold chunks that this image does not use.
            let partial = report.unverified > 0;
            assert_eq!(partial, number > 0 && variant != "parent" || variant == "parent" && number == 0);
        }
    }
    assert!(structure(golden_bytes("empty/image.boot"), &OpenOptions::default()).unwrap().is_clean());
}

#[test]
fn every_damaged_chunk_is_named() {
    let image = GoldenImage::new(
        open_bytes(golden_bytes("default/image.boot")),
        vec![golden_bytes("default/image.blob")],
    );
    let mut stored = image.blobs[0].clone();
    // One byte in the middle of each of three chunks.
    let chunks = [0u32, 50, 162].map(storage::ids::ChunkIndex);
    for index in chunks {
        let unit = image.rafs.chunk_extent(0, index).unwrap().unit.compressed;
        stored[(unit.start() + unit.len() / 2) as usize] ^= 0x20;
    }
    let report =
        data(&image.rafs, 0, &mut |range| Ok(stored[range.start() as usize..range.end() as usize].to_vec()))
            .unwrap();
    assert_eq!(report.faults.len(), 3);
    for (fault, index) in report.faults.iter().zip(chunks) {
        assert!(fault.to_string().contains(&format!("chunk {index}: ")), "{fault}");
    }
    let error = data(&image.rafs, 0, &mut |_| Err(Error::new(ErrorKind::Io, "gone"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn all_faults_are_reported_not_the_first() {
    let mut bytes = golden_bytes("default/image.boot");
    let bootstrap = open_bytes(bytes.clone());
    let meta = bootstrap.summary().meta_blkaddr as usize * 4096;
    let dir = bootstrap.lookup(bootstrap.root(), b"files").unwrap().unwrap().nid;
    for (name, offset) in [(&b"one_byte"[..], 4), (b"exact_4k", 6)] {
        let nid = bootstrap.lookup(dir, name).unwrap().unwrap().nid.0 as usize;
        bytes[meta + nid * 32 + offset] = 0xff;
        bytes[meta + nid * 32 + offset + 1] = 0xff;
    }
    bytes[1024 + 4] = 1;
    let report = structure(bytes, &OpenOptions::default()).unwrap();
    assert_eq!(report.faults.len(), 3, "{:?}", report.faults);
    assert!(report.faults[1].to_string().contains("/files/exact_4k"));
    assert!(report.faults[2].to_string().contains("/files/one_byte"));

    let mut links = golden_bytes("default/image.boot");
    links[meta + 128 * 32 + 44] += 1;
    links[1024 + 16] += 1;
    let report = structure(links, &OpenOptions::default()).unwrap();
    assert_eq!(report.faults.len(), 2, "{:?}", report.faults);
}
