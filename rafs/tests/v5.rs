//! Every golden v5 image opens and lists exactly as expected, and all content decodes.

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;

use rafs::blob_file::BlobFile;
use rafs::bootstrap::{Bootstrap, DirEntry, FileType, Nid, OpenOptions, Step, Walk, from_bytes};
use rafs::check::structure;
use storage::ids::BlobId;
use support::{GoldenImage, expected, golden_bytes, open_bytes};

/// A listing with the sizes of directories left out: `list` has those of v6.
fn without_directory_sizes(listing: &str) -> String {
    let line = |line: &str| {
        let mut fields: Vec<&str> = line.split('\t').collect();
        if fields[1] == "d" {
            fields[5] = "-";
        }
        fields.join("\t") + "\n"
    };
    listing.lines().map(line).collect()
}

/// The blob of a variant that is a beginning of another file.
fn start_of(name: &str, len: usize) -> Vec<u8> {
    let mut bytes = golden_bytes(name);
    bytes.truncate(len);
    bytes
}

fn check(bootstrap: Arc<dyn Bootstrap>, blobs: Vec<Vec<u8>>, list: &str) {
    check_listing(bootstrap, blobs, &expected(list));
}

fn check_listing(bootstrap: Arc<dyn Bootstrap>, blobs: Vec<Vec<u8>>, want: &str) {
    let image = GoldenImage::new(bootstrap, blobs);
    let (have, want) = (without_directory_sizes(&image.list()), without_directory_sizes(want));
    for (have, want) in have.lines().zip(want.lines()) {
        assert_eq!(have, want);
    }
    assert_eq!(have.lines().count(), want.lines().count());
    for number in 0..image.blobs.len() {
        let blob = &image.blobs[number];
        let report = rafs::check::data(&image.rafs, number as u32, &mut |range| {
            Ok(blob[range.start() as usize..range.end() as usize].to_vec())
        });
        let report = report.unwrap();
        assert!(report.faults.is_empty() && report.unverified == 0 && report.verified > 0, "{report:?}");
    }
}

fn boot(variant: &str) -> Vec<u8> {
    golden_bytes(&format!("v5-{variant}/image.boot"))
}

#[test]
fn native_images_list_and_decode() {
    let own = |variant: &str| golden_bytes(&format!("v5-{variant}/image.blob"));
    for (variant, blob) in [
        ("default", own("default")),
        ("zstd-4k", start_of("zstd-4k/image.blob", 62276)),
        ("lz4-4k", own("lz4-4k")),
        ("lz4-1m", start_of("lz4-1m/image.blob", 86439)),
        ("none-4k", own("none-4k")),
        ("none-1m", start_of("none-1m/image.blob", 1_320_245)),
        ("sha256", own("default")),
        ("aligned", own("lz4-4k")),
        ("prefetch", own("prefetch")),
        ("prefetch-blob", own("prefetch")),
    ] {
        check(open_bytes(boot(variant)), vec![blob], "tree");
        let report = structure(boot(variant), &OpenOptions::default()).unwrap();
        assert!(report.is_clean(), "{variant}: {report:?}");
        assert_eq!((report.counts.directories, report.counts.regular > 100), (40, true), "{variant}");
    }
    check(open_bytes(boot("tar")), vec![own("tar")], "mini");
    // Made from the directory, whose builder sets the root's time to 0.
    let want = expected("mini").replacen("1700200000", "0", 1);
    check_listing(open_bytes(golden_bytes("v5/image.boot")), vec![golden_bytes("v5/image.blob")], &want);
}

#[test]
fn layered_images_list_and_decode() {
    let blobs = ["v5-default/image.blob", "v5-parent/image.blob"].map(golden_bytes).to_vec();
    check(open_bytes(boot("parent")), blobs, "merged");
    let blobs = ["v5-upper-inline/layer.blob", "v5-inline/layer.blob"].map(golden_bytes).to_vec();
    check(open_bytes(boot("merged")), blobs, "merged");
}

#[test]
fn inlined_bootstraps_list_and_decode() {
    for (variant, list) in [("v5-inline", "tree"), ("v5-upper-inline", "upper")] {
        let layer = golden_bytes(&format!("{variant}/layer.blob"));
        let mut read =
            |range: storage::ids::ByteRange| Ok(layer[range.start() as usize..range.end() as usize].to_vec());
        let file = BlobFile::read(layer.len() as u64, &mut read).unwrap();
        let bytes = file.bootstrap(&mut read).unwrap();
        assert_eq!(open_bytes(bytes.to_vec()).blobs()[0].id.as_str(), "x".repeat(64));
        let inlined_blob_id = Some(BlobId::new("layer").unwrap());
        let bootstrap = from_bytes(bytes, &OpenOptions { inlined_blob_id }).unwrap();
        assert_eq!(bootstrap.blobs()[0].id.as_str(), "layer");
        check(Arc::from(bootstrap), vec![layer], list);
    }
}

#[test]
fn images_against_a_dictionary_and_without_files_open() {
    let image = open_bytes(boot("chunkdict"));
    assert_eq!(image.blobs().len(), 2);
    let blobs = vec![golden_bytes("v5-chunkdict/image.blob"), start_of("zstd-4k/image.blob", 62276)];
    assert_eq!(GoldenImage::new(image, blobs).list().lines().count(), 13);
    let image = GoldenImage::new(open_bytes(boot("empty")), Vec::new());
    assert_eq!(image.list().lines().count(), 1);
    assert_eq!(image.rafs.bootstrap().summary().inode_count, 1);
    for variant in ["chunkdict", "empty", "merged", "parent", "tar"] {
        let report = structure(boot(variant), &OpenOptions::default()).unwrap();
        assert!(report.is_clean(), "{variant}: {report:?}");
    }
}

/// Flags, slots, features, chunks and sizes as published with the images.
#[test]
fn tables_hold_the_published_values() {
    type Row = (&'static str, u64, u64, u32, u32, u64, u64);
    let rows: [Row; 5] = [
        ("default", 0xb4, 417, 0x4000_0000, 163, 1_320_245, 70276),
        ("sha256", 0xb8, 417, 0x4000_0000, 163, 1_320_245, 70276),
        ("aligned", 0x36, 417, 0x4000_0000, 197, 806_912, 73548),
        ("none-4k", 0x35, 417, 0x4000_0000, 197, 165_173, 165_173),
        ("merged", 0xb4, 264, 0x5000_0000, 5, 8245, 5145),
    ];
    for (variant, flags, slots, features, chunks, decoded, stored) in rows {
        let image = open_bytes(boot(variant));
        assert_eq!((image.summary().flags.bits(), image.summary().inode_count), (flags, slots), "{variant}");
        assert_eq!((image.summary().fs_version, image.root()), (5, Nid(1)));
        let blob = &image.blobs()[0];
        assert_eq!(
            (blob.features.bits(), blob.chunk_count, blob.decoded_size, blob.compressed_size),
            (features, chunks, decoded, stored),
            "{variant}"
        );
        assert!(!blob.needs_context() && !blob.has_context());
    }
    assert_eq!(open_bytes(boot("prefetch")).prefetch(), [361, 3, 359].map(Nid));
    assert_eq!(open_bytes(boot("merged")).prefetch(), [Nid(1)]);
}

/// What v5 says of a directory's size: names and 8 bytes for each, in pages.
#[test]
fn directories_have_the_size_of_their_names() {
    let image = open_bytes(boot("default"));
    let mut walk = Walk::new(&*image, image.root());
    while let Some(step) = walk.step().unwrap() {
        let Step::Enter(dir) = step else { continue };
        let mut sum = 0;
        image
            .children(dir.nid, 0, &mut |entry| {
                sum += entry.name.len() as u64 + 8;
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(image.attr(dir.nid).unwrap().size, sum.next_multiple_of(4096).max(4096));
    }
}

#[test]
fn names_and_cursors_are_found() {
    let image = open_bytes(boot("default"));
    let (mut walk, mut looked) = (Walk::new(&*image, image.root()), 0);
    while let Some(step) = walk.step().unwrap() {
        let Step::Enter(dir) = step else { continue };
        let mut names = Vec::new();
        let visit = &mut |entry: DirEntry<'_>| {
            names.push((entry.name.to_vec(), entry.nid));
            ControlFlow::Continue(())
        };
        image.children(dir.nid, 0, visit).unwrap();
        for (place, (name, nid)) in names.iter().enumerate() {
            let found = image.lookup(dir.nid, name).unwrap().unwrap();
            assert_eq!((found.nid, found.next), (*nid, place as u64 + 1));
            assert_eq!(image.cursor_at(dir.nid, name).unwrap(), place as u64);
            let after = [name.as_slice(), b"\x01"].concat();
            assert_eq!(image.cursor_at(dir.nid, &after).unwrap(), place as u64 + 1);
            assert!(image.lookup(dir.nid, &after).unwrap().is_none());
            if found.file_type == FileType::Directory {
                assert_eq!(image.parent(found.nid).unwrap(), dir.nid);
            }
            looked += 1;
        }
        for name in [&b"."[..], b"..", b"\xff\xff"] {
            assert!(image.lookup(dir.nid, name).unwrap().is_none());
        }
    }
    assert_eq!(looked, 416);
    assert_eq!(image.parent(image.root()).unwrap(), image.root());
}

/// Images of tools that did not write the extended table: the chunk records tell.
#[test]
fn images_without_an_extended_table_open() {
    let mut bytes = boot("default");
    bytes[68..80].fill(0);
    let image = open_bytes(bytes);
    let blob = &image.blobs()[0];
    assert_eq!((blob.chunk_count, blob.decoded_size, blob.data_size), (163, 1_320_245, 70276));
    check(image, vec![golden_bytes("v5-default/image.blob")], "tree");
}
