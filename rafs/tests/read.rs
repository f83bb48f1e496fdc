//! From file ranges to slices, at the edges; images without digests; damaged contexts.

mod support;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rafs::ErrorKind;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{FileType, Nid, Step, Walk};
use rafs::fs::{Rafs, RafsOptions, SeekKind};
use storage::ids::ChunkIndex;
use support::{GoldenImage, golden_bytes, open_bytes};

fn image(variant: &str) -> GoldenImage {
    GoldenImage::new(
        open_bytes(golden_bytes(&format!("{variant}/image.boot"))),
        vec![golden_bytes(&format!("{variant}/image.blob"))],
    )
}

fn find(image: &GoldenImage, path: &str) -> Nid {
    let bootstrap = image.rafs.bootstrap();
    path.split('/')
        .fold(bootstrap.root(), |dir, name| bootstrap.lookup(dir, name.as_bytes()).unwrap().unwrap().nid)
}

#[test]
fn reads_end_with_the_file() {
    let image = image("zstd-4k");
    let nid = find(&image, "files/exact_4k");
    let size = image.rafs.bootstrap().attr(nid).unwrap().size;
    assert_eq!(size, 4096);
    let read = |offset, len| {
        let mut slices = Vec::new();
        let n = image.rafs.read(nid, offset, len, &mut slices).unwrap();
        assert_eq!(slices.iter().map(|s| s.len).sum::<u32>(), n);
        (n, slices.len())
    };
    assert_eq!(read(0, 4096), (4096, 1));
    assert_eq!(read(0, u32::MAX), (4096, 1));
    assert_eq!(read(4095, 2), (1, 1));
    assert_eq!(read(4096, 1), (0, 0));
    assert_eq!(read(u64::MAX, u32::MAX), (0, 0));
    assert_eq!(read(0, 0), (0, 0));

    let seek = |offset, kind| image.rafs.seek(nid, offset, kind).unwrap();
    assert_eq!(seek(5, SeekKind::Data), Some(5));
    assert_eq!(seek(5, SeekKind::Hole), Some(4096));
    assert_eq!(seek(4096, SeekKind::Hole), None);
    assert_eq!(seek(u64::MAX, SeekKind::Data), None);
    let root = image.rafs.bootstrap().root();
    assert_eq!(image.rafs.seek(root, 0, SeekKind::Data).unwrap_err().kind(), ErrorKind::WrongType);
    assert_eq!(image.rafs.read(root, 0, 1, &mut Vec::new()).unwrap_err().kind(), ErrorKind::WrongType);
}

/// Odd steps cross chunk borders at every place.
#[test]
fn any_step_reads_the_same_bytes() {
    for variant in ["lz4-4k", "batch"] {
        let image = image(variant);
        for path in ["files/exact_4k", "files/one_byte"] {
            let nid = find(&image, path);
            let whole = image.read_file(nid, u32::MAX);
            for step in [1000, 4095, 4097] {
                assert_eq!(image.read_file(nid, step), whole);
            }
        }
    }
}

#[test]
fn the_file_system_has_its_numbers() {
    let statfs = image("default").rafs.statfs();
    assert_eq!((statfs.block_size, statfs.files, statfs.name_max), (4096, 417, 255));
    assert_eq!(statfs.blocks, 479 + 86016 / 4096);
}

#[test]
fn an_image_without_digests_is_refused_unless_allowed() {
    let mut bytes = golden_bytes("default/image.boot");
    // No chunk table: size 0 in the extended superblock.
    bytes[1152 + 32..1152 + 40].fill(0);
    let bootstrap = open_bytes(bytes);
    assert!(bootstrap.blobs()[0].unverified_chunks > 0);
    assert_eq!(Rafs::needs_context(&*bootstrap), [true]);
    let error = Rafs::new(bootstrap.clone(), vec![None], RafsOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("--allow-unverified"), "{error}");

    let allowed = RafsOptions { allow_unverified: true };
    let missing = Rafs::new(bootstrap.clone(), vec![None], allowed).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Invalid);
    let blob = golden_bytes("default/image.blob");
    let range = stored_range(&bootstrap.blobs()[0]).unwrap();
    let context =
        BlobContext::from_stored(&bootstrap.blobs()[0], &blob[range.start() as usize..range.end() as usize]);
    let rafs = Rafs::new(bootstrap, vec![Some(context.unwrap())], allowed).unwrap();
    assert!(rafs.is_unverified());
    // The location is the same as with records, the digest is absent.
    let verified = image("default");
    for index in (0..163).map(ChunkIndex) {
        let (a, b) = (rafs.chunk_extent(0, index).unwrap(), verified.rafs.chunk_extent(0, index).unwrap());
        assert_eq!((a.unit, a.len, a.decoded_offset, a.digest), (b.unit, b.len, b.decoded_offset, None));
    }
}

/// No tool writes compact inodes any more; this one is made by hand.
#[test]
fn compact_inodes_are_read() {
    let mut bytes = golden_bytes("default/image.boot");
    let golden = image("default");
    let nid = find(&golden, "files/one_byte");
    let want = golden.rafs.bootstrap().attr(nid).unwrap();
    let at = golden.rafs.bootstrap().summary().meta_blkaddr as usize * 4096 + nid.0 as usize * 32;
    let index = bytes[at + 64..at + 72].to_vec();
    let chunk_format = bytes[at + 16..at + 20].to_vec();
    let inode = &mut bytes[at..at + 72];
    inode.fill(0);
    inode[0] = 8;
    inode[4..6].copy_from_slice(&(want.mode as u16).to_le_bytes());
    inode[6..8].copy_from_slice(&(want.nlink as u16).to_le_bytes());
    inode[8..12].copy_from_slice(&(want.size as u32).to_le_bytes());
    inode[16..20].copy_from_slice(&chunk_format);
    inode[24..26].copy_from_slice(&7u16.to_le_bytes());
    inode[26..28].copy_from_slice(&8u16.to_le_bytes());
    inode[32..40].copy_from_slice(&index);
    // Compact inodes have the build time.
    bytes[1024 + 24..1024 + 32].copy_from_slice(&1_600_000_000u64.to_le_bytes());
    let image = GoldenImage::new(open_bytes(bytes), golden.blobs.clone());
    let attr = image.rafs.bootstrap().attr(nid).unwrap();
    assert_eq!((attr.file_type, attr.mode, attr.size), (FileType::Regular, want.mode, want.size));
    assert_eq!((attr.uid, attr.gid, attr.mtime, attr.nlink), (7, 8, 1_600_000_000, want.nlink));
    assert_eq!(image.read_file(nid, 10), golden.read_file(nid, 10));
}

/// The regular files of an image with their whole content: the model of reads.
fn files(image: &GoldenImage) -> Vec<(Nid, Vec<u8>)> {
    let bootstrap = &**image.rafs.bootstrap();
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    let mut files = Vec::new();
    while let Some(step) = walk.step().unwrap() {
        if let Step::Leaf(entry) = step
            && entry.file_type == FileType::Regular
        {
            files.push((entry.nid, image.read_file(entry.nid, u32::MAX)));
        }
    }
    files
}

/// What a reader sees of any range is what the model holds there.
#[test]
fn any_range_is_that_of_the_model() {
    for variant in ["lz4-4k", "batch"] {
        let image = image(variant);
        let files = files(&image);
        assert!(files.iter().any(|(_, content)| content.len() > 1 << 20));
        let range = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0u32..300_000);
        let mut runner = TestRunner::new(Config::with_cases(300));
        runner
            .run(&range, |(file, start, len)| {
                let (nid, content) = &files[file.index(files.len())];
                let offset = start.index(content.len() + 2);
                let mut slices = Vec::new();
                let n = image.rafs.read(*nid, offset as u64, len, &mut slices).unwrap() as usize;
                let mut seen = Vec::new();
                for slice in slices {
                    let chunk = image.chunk(slice.blob, &slice.extent);
                    seen.extend_from_slice(&chunk[slice.offset as usize..][..slice.len as usize]);
                }
                let from = offset.min(content.len());
                let to = (offset + len as usize).min(content.len()).max(from);
                prop_assert_eq!(seen.len(), n);
                prop_assert!(seen == content[from..to]);
                Ok(())
            })
            .unwrap();
    }
}

proptest! {
    /// A damaged context is refused, or all its extents stay inside the blob.
    #[test]
    fn damaged_contexts_are_refused_or_stay_inside(
        batch in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let variant = if batch { "batch" } else { "none-4k" };
        let bootstrap = open_bytes(golden_bytes(&format!("{variant}/image.boot")));
        let stored = golden_bytes(&format!("{variant}/image.blob"));
        let blob = &bootstrap.blobs()[0];
        let range = stored_range(blob).unwrap();
        let context =
            BlobContext::from_stored(blob, &stored[range.start() as usize..range.end() as usize]).unwrap();
        let mut file = context.to_cache_file();
        for (at, value) in edits {
            let at = at.index(blob.record.ci_uncompressed_size.get() as usize);
            file[at] = value;
        }
        if let Ok(context) = BlobContext::from_cache_file(blob, &file) {
            for index in (0..blob.chunk_count).map(ChunkIndex) {
                let entry = context.entry(index).unwrap();
                let (unit, offset) = context.unit(&entry).unwrap();
                prop_assert!(unit.compressed.end() <= blob.data_size);
                prop_assert!(u64::from(offset) + u64::from(entry.uncompressed_size) <= unit.decoded_len.into());
            }
            // Where it contradicts the records, it is refused; else every read gives extents.
            if let Ok(rafs) = Rafs::new(bootstrap.clone(), vec![Some(context)], RafsOptions::default()) {
                for index in (0..blob.chunk_count).map(ChunkIndex) {
                    rafs.chunk_extent(0, index).unwrap();
                }
            }
        }
    }
}
