//! Images built from the golden sources against what the reference builder made of them.

use crate::common::{assert_same, build, golden, options, sections, unpacked};
use builder::create::{LayerOptions, LayerSource, build_layer_upon};
use builder::layered::{Below, Common};
use builder::merge::{MergeSource, OwnBlob, merge};
use builder::overlay::WhiteoutSpec;
use builder::pipeline::DataOptions;
use builder::prefetch::Patterns;
use builder::sink::BlobSink;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Bootstrap, OpenOptions};
use rafs::format::blob_context::Entry;
use rafs::format::features::EntryFlags;
use storage::cipher::XtsKey;
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::ChunkIndex;

#[test]
fn uncompressed_images_are_byte_for_byte_the_reference() {
    let Some(tree) = unpacked("tree") else { return };
    for (variant, chunk_size) in [("none-4k", 0x1000), ("none-1m", 0x10_0000)] {
        let (built, blob) = build(LayerSource::Directory(tree.path()), &options(Codec::None, chunk_size));
        assert_same(variant, &blob, &std::fs::read(golden(&format!("{variant}/image.blob"))).unwrap());
        assert_same(
            variant,
            &built.bootstrap,
            &std::fs::read(golden(&format!("{variant}/image.boot"))).unwrap(),
        );
    }
}

/// Sets everything to zero that follows from how well a codec library compresses.
fn without_stored_sizes(boot: &[u8]) -> Vec<u8> {
    let mut out = boot.to_vec();
    let number = |at: usize, len: usize| {
        boot[at..at + len].iter().rev().fold(0usize, |value, &byte| value << 8 | usize::from(byte))
    };
    let (table, rows) = (number(1160, 8), number(1168, 4) / 256);
    for row in 0..rows {
        // Device slot: tag. Blob record: id, compressed_size, blob_toc_digest, context sizes.
        out[1408 + 128 * row..][..64].fill(0);
        let record = &mut out[table + 256 * row..][..256];
        record[..64].fill(0);
        record[88..96].fill(0);
        record[112..128].fill(0);
        record[136..168].fill(0);
    }
    let (chunks, size) = (number(1176, 8), number(1184, 8));
    for record in out[chunks..chunks + size].chunks_exact_mut(80) {
        // Whether it got shorter at all.
        record[36] &= !1;
        record[40..44].fill(0);
        record[48..56].fill(0);
    }
    out
}

#[test]
fn compressed_images_differ_in_stored_sizes_only() {
    let Some(tree) = unpacked("tree") else { return };
    let plain = |codec, chunk_size| options(codec, chunk_size);
    let prefetch = Patterns::read(&b"/files/one_byte\n/dirs\n/no/such\n/files/exact_4k\n"[..]).unwrap();
    for (variant, options) in [
        ("default", plain(Codec::Zstd, 0x10_0000)),
        ("zstd-4k", plain(Codec::Zstd, 0x1000)),
        ("lz4-1m", plain(Codec::Lz4Block, 0x10_0000)),
        ("lz4-4k", plain(Codec::Lz4Block, 0x1000)),
        ("prefetch", LayerOptions { prefetch, ..plain(Codec::Zstd, 0x10_0000) }),
        ("toc-sha256", {
            let mut options = LayerOptions { toc: true, ..plain(Codec::Zstd, 0x10_0000) };
            options.data.digester = DigestAlgorithm::Sha256;
            options
        }),
    ] {
        let (built, _) = build(LayerSource::Directory(tree.path()), &options);
        let reference = std::fs::read(golden(&format!("{variant}/image.boot"))).unwrap();
        assert_same(variant, &without_stored_sizes(&built.bootstrap), &without_stored_sizes(&reference));
    }
}

/// Entries of both contexts, but for stored places.
fn same_entries(ours: (&[u8], &[u8]), theirs: &str) -> usize {
    let open = |boot: &[u8]| rafs::bootstrap::from_bytes(boot.to_vec(), &OpenOptions::default()).unwrap();
    let context = |boot: &dyn Bootstrap, blob: &[u8]| {
        let range = stored_range(&boot.blobs()[0]).unwrap();
        let stored = &blob[range.start() as usize..range.end() as usize];
        BlobContext::from_stored(&boot.blobs()[0], stored).unwrap()
    };
    let (boot, reference) =
        (open(ours.0), open(&std::fs::read(golden(&format!("{theirs}/image.boot"))).unwrap()));
    let reference_blob = std::fs::read(golden(&format!("{theirs}/image.blob"))).unwrap();
    assert_eq!(boot.blobs()[0].features, reference.blobs()[0].features);
    assert_eq!(boot.summary().flags, reference.summary().flags);
    let (ours, theirs) = (context(&*boot, ours.1), context(&*reference, &reference_blob));
    assert_eq!(ours.chunk_count(), theirs.chunk_count());
    let mut members = 0;
    for index in (0..ours.chunk_count()).map(ChunkIndex) {
        let (a, b) = (ours.entry(index).unwrap(), theirs.entry(index).unwrap());
        let place = |e: &Entry| (e.uncompressed_offset, e.uncompressed_size, e.flags, e.data);
        assert_eq!(place(&a), place(&b), "chunk {index}");
        members += usize::from(a.flags.contains(EntryFlags::BATCH));
        let (a, b) = (boot.chunk_info(0, index).unwrap(), reference.chunk_info(0, index).unwrap());
        assert_eq!((a.digest, a.flags.get(), a.crc32), (b.digest, b.flags.get(), b.crc32), "chunk {index}");
    }
    members
}

#[test]
fn small_chunks_share_units_as_in_the_reference() {
    let Some(tree) = unpacked("tree") else { return };
    for threads in [1, 2] {
        let mut options = options(Codec::Zstd, 0x10_0000);
        (options.data.batch_size, options.data.threads) = (0x1_0000, threads);
        let (built, blob) = build(LayerSource::Directory(tree.path()), &options);
        assert!(same_entries((&built.bootstrap, &blob), "batch") > 50);
        let reference = std::fs::read(golden("batch/image.boot")).unwrap();
        assert_same("batch", &without_stored_sizes(&built.bootstrap), &without_stored_sizes(&reference));
    }
}

/// The key is random and the order of one file's xattrs, so no byte of the blob is the same.
#[test]
fn encrypted_images_are_as_in_the_reference() {
    let Some(tree) = unpacked("mini") else { return };
    let mut options = options(Codec::Zstd, 0x10_0000);
    options.data.cipher = Some(XtsKey::random().unwrap());
    let (built, blob) = build(LayerSource::Directory(tree.path()), &options);
    assert_eq!(same_entries((&built.bootstrap, &blob), "encrypt"), 0);
    for batch_size in [0, 0x1000] {
        for codec in [Codec::None, Codec::Lz4Block, Codec::Zstd] {
            options.data = DataOptions { codec, chunk_size: 0x1000, batch_size, ..options.data };
            let (built, blob) = build(LayerSource::Directory(tree.path()), &options);
            let plain = DataOptions { cipher: None, ..options.data };
            let clear = LayerOptions { data: plain, ..options.clone() };
            let (unencrypted, _) = build(LayerSource::Directory(tree.path()), &clear);
            assert_eq!(built.root, unencrypted.root);
            crate::common::verify(&built.bootstrap, &blob);
        }
    }
}

/// Layers upon what is there already.
#[test]
fn chunks_below_are_not_stored_again() {
    let Some(upper) = unpacked("upper") else { return };
    let open = |variant: &str| {
        rafs::bootstrap::open(&golden(&format!("{variant}/image.boot")), &OpenOptions::default()).unwrap()
    };
    for (variant, chunk_size, parent, own) in
        [("parent", 0x10_0000, true, 1), ("chunkdict", 0x1000, false, 0)]
    {
        let options = options(Codec::Zstd, chunk_size);
        let common =
            Common { fs_version: 6, chunk_size, digester: options.data.digester, explicit_ids: true };
        let image = open(if parent { "default" } else { "zstd-4k" });
        let below = match parent {
            true => Below::load(None, Some(&*image), &common),
            false => Below::load(Some(&*image), None, &common),
        };
        let sink = BlobSink::new("nowhere", std::io::sink());
        let source = LayerSource::Directory(upper.path());
        let built = build_layer_upon(source, &options, Some(below.unwrap()), sink).unwrap();
        let reference = std::fs::read(golden(&format!("{variant}/image.boot"))).unwrap();
        assert_same(variant, &without_stored_sizes(&built.bootstrap), &without_stored_sizes(&reference));
        let named: Vec<_> = built.blobs.iter().map(Option::is_none).collect();
        assert_eq!(named, [own == 0, own == 1]);
        assert_eq!(built.blobs[1 - own].as_deref(), Some(image.blobs()[0].id.as_str()));
        let opened = rafs::bootstrap::from_bytes(built.bootstrap, &OpenOptions::default()).unwrap();
        assert_eq!(rafs::merkle::image_root(&*opened).unwrap(), built.root);
    }
    let other =
        Common { fs_version: 6, chunk_size: 0x1000, digester: DigestAlgorithm::Blake3, explicit_ids: true };
    let error = Below::load(None, Some(&*open("default")), &other).err().unwrap();
    assert_eq!(error.kind(), builder::ErrorKind::Inconsistent);
    let other = Common {
        fs_version: 6,
        chunk_size: 0x10_0000,
        digester: DigestAlgorithm::Sha256,
        explicit_ids: true,
    };
    assert!(Below::load(None, Some(&*open("default")), &other).is_err());
    assert!(Below::load(Some(&*open("default")), None, &other).is_ok(), "of no use, but no harm");
}

/// Less than a cipher block alone in a unit, before and behind files that share none.
#[test]
fn short_units_are_encrypted() {
    let dir = tempfile::tempdir().unwrap();
    for (name, len) in [("a", 5), ("b", 100_000), ("c", 15), ("d", 16), ("e", 70_000), ("f", 1)] {
        std::fs::write(dir.path().join(name), name.repeat(len)).unwrap();
    }
    for codec in [Codec::None, Codec::Zstd] {
        let mut options = options(codec, 0x1_0000);
        options.data.batch_size = 0x1_0000;
        options.data.cipher = Some(XtsKey::random().unwrap());
        let (built, blob) = build(LayerSource::Directory(dir.path()), &options);
        crate::common::verify(&built.bootstrap, &blob);
    }
}

#[test]
fn inlined_bootstraps_are_the_reference() {
    let with_toc = |source| (source, true, WhiteoutSpec::None, Patterns::everything());
    for (variant, (source, toc, whiteouts, prefetch)) in [
        ("inline-toc", with_toc("tree")),
        ("upper-inline-toc", with_toc("upper")),
        ("inline-old", ("upper", false, WhiteoutSpec::Oci, Patterns::default())),
    ] {
        let Some(tree) = unpacked(source) else { return };
        let plain = options(Codec::Zstd, 0x10_0000);
        let options = LayerOptions { toc, inline_bootstrap: true, whiteouts, prefetch, ..plain };
        let (_, blob) = build(LayerSource::Directory(tree.path()), &options);
        let reference = std::fs::read(golden(&format!("{variant}/layer.blob"))).unwrap();
        let (ours, theirs) = (sections(&blob), sections(&reference));
        assert_eq!(ours.len(), theirs.len());
        for ((name, ours), (want, theirs)) in ours.into_iter().zip(theirs) {
            assert_eq!(name, want);
            match name.as_str() {
                "blob.digest" => assert_same(variant, ours, theirs),
                "image.boot" => {
                    let decode = |bytes: &[u8]| match toc {
                        true => zstd::decode_all(bytes).unwrap(),
                        false => bytes.to_vec(),
                    };
                    let plain = |bytes: &[u8]| without_stored_sizes(&decode(bytes));
                    assert_same(variant, &plain(ours), &plain(theirs));
                }
                _ => {}
            }
        }
    }
}

/// The bootstrap in a golden layer, opened under the name of its blob.
fn layer_source(variant: &str) -> MergeSource {
    let blob = std::fs::read(golden(&format!("{variant}/layer.blob"))).unwrap();
    let id = DigestAlgorithm::Sha256.digest(&blob).to_string();
    let inlined_blob_id = Some(storage::ids::BlobId::new(&id).unwrap());
    let (_, boot) = sections(&blob).into_iter().find(|(name, _)| name == "image.boot").unwrap();
    let boot = zstd::decode_all(boot).unwrap();
    let bootstrap = rafs::bootstrap::from_bytes(boot, &OpenOptions { inlined_blob_id }).unwrap();
    MergeSource { name: variant.into(), bootstrap: bootstrap.into(), own: OwnBlob::default() }
}

#[test]
fn merged_bootstraps_are_byte_for_byte_the_reference() {
    let sources = [layer_source("inline-toc"), layer_source("upper-inline-toc")];
    let merged = merge(&sources, None, &Patterns::everything()).unwrap();
    let opened = rafs::bootstrap::from_bytes(merged.bootstrap.clone(), &OpenOptions::default()).unwrap();
    assert_eq!(Some(rafs::merkle::image_root(&*opened).unwrap()), merged.root);
    assert_same("merged", &merged.bootstrap, &std::fs::read(golden("merged/image.boot")).unwrap());
}

/// A golden bootstrap, changed at byte `at`.
fn changed(at: impl Fn(&dyn Bootstrap) -> usize, value: u8) -> MergeSource {
    let mut bytes = std::fs::read(golden("default/image.boot")).unwrap();
    let opened = rafs::bootstrap::from_bytes(bytes.clone(), &OpenOptions::default()).unwrap();
    bytes[at(&*opened)] = value;
    let bootstrap = rafs::bootstrap::from_bytes(bytes, &OpenOptions::default()).unwrap();
    MergeSource { name: "changed".into(), bootstrap: bootstrap.into(), own: OwnBlob::default() }
}

#[test]
fn links_are_the_names_there_are_whatever_their_count_says() {
    let intact = changed(|_| 0, 0);
    // The link count of the first file that has several names.
    let lying = changed(
        |bootstrap| {
            let mut walk = rafs::bootstrap::Walk::new(bootstrap, bootstrap.root());
            while let Some(step) = walk.step().unwrap() {
                let rafs::bootstrap::Step::Leaf(entry) = step else { continue };
                if bootstrap.attr(entry.nid).unwrap().nlink > 1 {
                    let area = bootstrap.summary().meta_blkaddr as usize * 4096;
                    return area + entry.nid.0 as usize * 32 + 44;
                }
            }
            panic!("the image has hard links");
        },
        1,
    );
    let root = |source| merge(&[source], None, &Patterns::default()).unwrap().root;
    assert_eq!(root(lying), root(intact));
}

/// What `--blob-digests` says of a layer without data of its own is not said of the lower layer's
/// blob, which is the only one it names.
#[test]
fn a_lower_layers_blob_keeps_its_name() {
    let named = |byte: u8| {
        let digest = Some(storage::digest::Digest([byte; 32]));
        MergeSource { own: OwnBlob { digest, ..OwnBlob::default() }, ..changed(|_| 0, 0) }
    };
    let merged = merge(&[named(1), named(2)], None, &Patterns::default()).unwrap();
    assert_eq!(merged.blobs, ["01".repeat(32)]);
}

#[test]
fn one_chunk_with_two_digests_is_refused() {
    let other = changed(|bootstrap| bootstrap.summary().chunk_table.0 as usize, 0xaa);
    let error = merge(&[changed(|_| 0, 0), other], None, &Patterns::default()).err().unwrap();
    assert_eq!(error.kind(), builder::ErrorKind::Corrupt);
    assert!(error.to_string().contains("another one than a lower bootstrap says"), "{error}");
}

#[test]
fn a_tar_becomes_the_tree_the_reference_makes_of_it() {
    let want = std::fs::read(golden("tar-rafs/image.boot")).unwrap();
    let want = rafs::bootstrap::from_bytes(want, &OpenOptions::default()).unwrap();
    for name in ["src/mini.tar", "src/mini.tar.gz"] {
        let input = Box::new(std::fs::File::open(golden(name)).unwrap());
        let source = LayerSource::Tar { name: name.into(), input };
        let (built, _) = build(source, &options(Codec::Zstd, 0x1000));
        // Not the bytes: the reference stores the five xattrs of one file in random order.
        assert_eq!(built.root, rafs::merkle::image_root(&*want).unwrap());
        let ours = rafs::bootstrap::from_bytes(built.bootstrap, &OpenOptions::default()).unwrap();
        assert_eq!(ours.blobs()[0].record.uncompressed_size, want.blobs()[0].record.uncompressed_size);
    }
}

#[test]
fn the_root_digest_ignores_compressor_and_threads() {
    let Some(tree) = unpacked("tree") else { return };
    let mut roots = std::collections::HashSet::new();
    for codec in [Codec::None, Codec::Lz4Block, Codec::Zstd] {
        for threads in [1, 3] {
            let mut options = options(codec, 0x1000);
            options.data.threads = threads;
            roots.insert(build(LayerSource::Directory(tree.path()), &options).0.root.to_string());
        }
    }
    assert_eq!(roots.len(), 1);
}

#[test]
fn more_files_than_are_hashed_at_once_have_the_same_root() {
    let tree = tempfile::tempdir().unwrap();
    std::fs::write(tree.path().join("0"), "first").unwrap();
    for dir in 0..5 {
        let dir = tree.path().join(format!("d{dir}"));
        std::fs::create_dir(&dir).unwrap();
        for file in 0..2000 {
            let path = dir.join(format!("{file}"));
            if file % 10 == 0 {
                std::fs::hard_link(tree.path().join("0"), path).unwrap();
            } else {
                std::fs::write(path, format!("{}", file % 7)).unwrap();
            }
        }
    }
    // Compares the root digest of the tree with that of the bootstrap.
    build(LayerSource::Directory(tree.path()), &options(Codec::None, 0x1000));
}
