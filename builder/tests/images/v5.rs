//! RAFS v5 images built from the golden sources against what the reference builder made of them.

use builder::ErrorKind;
use builder::create::{LayerOptions, LayerSource, Version, build_layer_upon};
use builder::layered::{Below, Common};
use builder::merge::{MergeSource, OwnBlob, merge};
use builder::overlay::WhiteoutSpec;
use builder::prefetch::Patterns;
use builder::sink::BlobSink;
use rafs::bootstrap::{OpenOptions, from_bytes};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::BlobId;

use crate::common::{assert_same, build, golden, options, sections, unpacked};

fn v5(codec: Codec, chunk_size: u32) -> LayerOptions {
    LayerOptions { version: Version::V5 { aligned: false }, ..options(codec, chunk_size) }
}

fn read(path: &str) -> Vec<u8> {
    std::fs::read(golden(path)).unwrap()
}

#[test]
fn uncompressed_images_are_byte_for_byte_the_reference() {
    let Some(tree) = unpacked("tree") else { return };
    let (built, blob) = build(LayerSource::Directory(tree.path()), &v5(Codec::None, 0x1000));
    assert_same("v5-none-4k", &blob, &read("v5-none-4k/image.blob"));
    assert_same("v5-none-4k", &built.bootstrap, &read("v5-none-4k/image.boot"));
    let (built, blob) = build(LayerSource::Directory(tree.path()), &v5(Codec::None, 0x10_0000));
    assert_same("v5-none-1m", &blob, &read("none-1m/image.blob")[..1_320_245]);
    assert_same("v5-none-1m", &built.bootstrap, &read("v5-none-1m/image.boot"));
}

/// The table of blobs says how many bytes at the start are prefetch files'.
#[test]
fn prefetch_files_at_the_start_of_the_blob_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    for (name, len) in [("a", 5000), ("b", 700), ("c", 30)] {
        std::fs::write(dir.path().join(name), name.repeat(len)).unwrap();
    }
    let stated = |prefetch_table, version| {
        let prefetch = Patterns::read(&b"/c\n/b\n"[..]).unwrap();
        let options = LayerOptions { prefetch, prefetch_table, version, ..v5(Codec::None, 0x10_0000) };
        let (built, blob) = build(LayerSource::Directory(dir.path()), &options);
        assert!(blob.starts_with("c".repeat(30).as_bytes()) && blob[30..].starts_with(b"bbb"));
        let opened = from_bytes(built.bootstrap.clone(), &OpenOptions::default()).unwrap();
        assert_eq!(opened.prefetch().len(), if prefetch_table { 2 } else { 0 });
        let at = opened.summary().blob_table.0 as usize + 4;
        u32::from_le_bytes(built.bootstrap[at..at + 4].try_into().unwrap())
    };
    assert_eq!(stated(true, Version::V5 { aligned: false }), 0);
    assert_eq!(stated(false, Version::V5 { aligned: false }), 730);
    stated(false, Version::V6);
}

/// Sets everything to zero that follows from how well a codec library compresses.
fn without_stored_sizes(boot: &[u8]) -> Vec<u8> {
    let mut out = boot.to_vec();
    let number = |at: usize, len: usize| {
        boot[at..at + len].iter().rev().fold(0usize, |value, &byte| value << 8 | usize::from(byte))
    };
    let (names, size) = (number(48, 8), number(64, 4));
    out[names..names + size].fill(0);
    let (rows, count) = (number(72, 8), number(68, 4));
    for row in out[rows..rows + 64 * count].chunks_exact_mut(64) {
        row[16..24].fill(0);
    }
    let slots = number(56, 4);
    for slot in 0..slots {
        let at = number(8192 + 4 * slot, 4) * 8;
        if number(at + 60, 4) as u32 & libc::S_IFMT != libc::S_IFREG {
            continue;
        }
        let mut records = at + 128 + number(at + 100, 2).next_multiple_of(8);
        if number(at + 80, 1) & 4 != 0 {
            records += 8 + number(records, 8).next_multiple_of(8);
        }
        for record in out[records..records + 80 * number(at + 96, 4)].chunks_exact_mut(80) {
            record[40..44].fill(0);
            record[48..56].fill(0);
        }
    }
    out
}

#[test]
fn compressed_images_differ_in_stored_sizes_only() {
    let Some(tree) = unpacked("tree") else { return };
    let prefetch = Patterns::read(&b"/files/one_byte\n/dirs\n/no/such\n/files/exact_4k\n"[..]).unwrap();
    for (variant, options) in [
        ("v5-default", v5(Codec::Zstd, 0x10_0000)),
        ("v5-zstd-4k", v5(Codec::Zstd, 0x1000)),
        ("v5-lz4-1m", v5(Codec::Lz4Block, 0x10_0000)),
        ("v5-lz4-4k", v5(Codec::Lz4Block, 0x1000)),
        ("v5-prefetch", LayerOptions { prefetch: prefetch.clone(), ..v5(Codec::Zstd, 0x10_0000) }),
        ("v5-prefetch-blob", LayerOptions { prefetch, prefetch_table: false, ..v5(Codec::Zstd, 0x10_0000) }),
        ("v5-aligned", {
            let version = Version::V5 { aligned: true };
            LayerOptions { version, ..options(Codec::Lz4Block, 0x1000) }
        }),
        ("v5-sha256", {
            let mut options = v5(Codec::Zstd, 0x10_0000);
            options.data.digester = DigestAlgorithm::Sha256;
            options
        }),
    ] {
        let (built, _) = build(LayerSource::Directory(tree.path()), &options);
        let reference = read(&format!("{variant}/image.boot"));
        assert_same(variant, &without_stored_sizes(&built.bootstrap), &without_stored_sizes(&reference));
    }
}

#[test]
fn inlined_bootstraps_are_the_reference() {
    for (variant, source) in [("v5-inline", "tree"), ("v5-upper-inline", "upper")] {
        let Some(tree) = unpacked(source) else { return };
        let options = LayerOptions {
            inline_bootstrap: true,
            whiteouts: WhiteoutSpec::None,
            prefetch: Patterns::everything(),
            ..v5(Codec::Zstd, 0x10_0000)
        };
        let (_, blob) = build(LayerSource::Directory(tree.path()), &options);
        let reference = read(&format!("{variant}/layer.blob"));
        let (ours, theirs) = (sections(&blob), sections(&reference));
        let names = |sections: &[(String, &[u8])]| sections.iter().map(|s| s.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&ours), ["image.boot", "image.blob"]);
        assert_eq!(names(&ours), names(&theirs));
        assert_same(variant, &without_stored_sizes(ours[0].1), &without_stored_sizes(theirs[0].1));
    }
}

#[test]
fn a_tree_without_files_is_the_reference() {
    let empty = tempfile::tempdir().unwrap();
    let built = build(LayerSource::Directory(empty.path()), &v5(Codec::Zstd, 0x10_0000)).0;
    let opened = from_bytes(built.bootstrap.clone(), &OpenOptions::default()).unwrap();
    assert_eq!((opened.summary().inode_count, opened.blobs().len(), built.has_data), (1, 0, false));
    // Owner and permissions are those of the directory.
    let (ours, theirs) = (built.bootstrap, read("v5-empty/image.boot"));
    assert_same("superblock", &ours[..8200], &theirs[..8200]);
    assert_eq!(ours.len(), theirs.len());
}

fn layer_source(variant: &str) -> MergeSource {
    let blob = read(&format!("{variant}/layer.blob"));
    let id = DigestAlgorithm::Sha256.digest(&blob).to_string();
    let inlined_blob_id = Some(BlobId::new(&id).unwrap());
    let (_, boot) = sections(&blob).into_iter().find(|(name, _)| name == "image.boot").unwrap();
    let bootstrap = from_bytes(boot.to_vec(), &OpenOptions { inlined_blob_id }).unwrap();
    MergeSource { name: variant.into(), bootstrap: bootstrap.into(), own: OwnBlob::default() }
}

#[test]
fn merged_bootstraps_are_byte_for_byte_the_reference() {
    let sources = [layer_source("v5-inline"), layer_source("v5-upper-inline")];
    let merged = merge(&sources, None, &Patterns::everything()).unwrap();
    assert_eq!(merged.fs_version, 5);
    assert_same("v5-merged", &merged.bootstrap, &read("v5-merged/image.boot"));
}

fn opened(path: &str) -> MergeSource {
    let bootstrap = from_bytes(read(path), &OpenOptions::default()).unwrap();
    MergeSource { name: path.into(), bootstrap: bootstrap.into(), own: OwnBlob::default() }
}

#[test]
fn what_one_image_can_not_be_is_not_merged() {
    for (lower, upper, why) in [
        ("v5-default/image.boot", "v5-lz4-1m/image.boot", None),
        ("v5-default/image.boot", "v5-none-1m/image.boot", None),
        ("v5-default/image.boot", "v5-sha256/image.boot", Some("digester")),
        ("v5-default/image.boot", "v5-none-4k/image.boot", Some("chunk size")),
        ("v5-default/image.boot", "default/image.boot", Some("RAFS version")),
    ] {
        let merged = merge(&[opened(lower), opened(upper)], None, &Patterns::default());
        match why {
            // The upper tree hides the lower one: one compressor is left.
            None => assert_eq!(merged.unwrap().blobs.len(), 1),
            Some(why) => {
                let error = merged.err().unwrap();
                assert_eq!(error.kind(), ErrorKind::Inconsistent);
                assert!(error.to_string().contains(why), "{error}");
            }
        }
    }
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("new"), vec![b'n'; 5000]).unwrap();
    std::fs::write(other.path().join("raw"), b"x").unwrap();
    let layer = |codec| {
        let built = build(LayerSource::Directory(other.path()), &v5(codec, 0x10_0000)).0;
        let bootstrap = from_bytes(built.bootstrap, &OpenOptions::default()).unwrap();
        MergeSource { name: "new".into(), bootstrap: bootstrap.into(), own: OwnBlob::default() }
    };
    let error = merge(&[opened("v5-default/image.boot"), layer(Codec::Lz4Block)], None, &Patterns::default());
    let error = error.err().unwrap();
    assert!(error.kind() == ErrorKind::Inconsistent && error.to_string().contains("lz4_block"), "{error}");
    // Chunks stored as they are need no compressor, so the other layer's stays.
    let merged =
        merge(&[opened("v5-default/image.boot"), layer(Codec::None)], None, &Patterns::default()).unwrap();
    let image = from_bytes(merged.bootstrap, &OpenOptions::default()).unwrap();
    assert_eq!((image.summary().codec, image.blobs().len()), (Codec::Zstd, 2));
}

#[test]
fn a_tar_becomes_the_tree_the_reference_makes_of_it() {
    let want = from_bytes(read("v5-tar/image.boot"), &OpenOptions::default()).unwrap();
    for name in ["src/mini.tar", "src/mini.tar.gz"] {
        let input = Box::new(std::fs::File::open(golden(name)).unwrap());
        let source = LayerSource::Tar { name: name.into(), input };
        let (built, blob) = build(source, &v5(Codec::Zstd, 0x1000));
        assert_eq!(built.root, rafs::merkle::image_root(&*want).unwrap());
        assert_eq!(blob.len() as u64, want.blobs()[0].compressed_size);
        let report = rafs::check::structure(built.bootstrap, &OpenOptions::default()).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

/// The reference builder forgets the flag that says so, and writes an image nobody can read.
#[test]
fn both_names_of_a_file_with_xattrs_have_them() {
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_pax_extensions([("SCHILY.xattr.user.x", &b"value"[..])]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(4);
    archive.append_data(&mut header, "first", &b"data"[..]).unwrap();
    let mut link = tar::Header::new_ustar();
    link.set_entry_type(tar::EntryType::Link);
    link.set_size(0);
    archive.append_link(&mut link, "second", "first").unwrap();
    let bytes = archive.into_inner().unwrap();
    let source = LayerSource::Tar { name: "tar".into(), input: Box::new(&bytes[..]) };
    let (built, _) = build(source, &v5(Codec::Zstd, 0x10_0000));
    let image = from_bytes(built.bootstrap, &OpenOptions::default()).unwrap();
    let image = rafs::fs::Rafs::new(std::sync::Arc::from(image), Vec::new(), Default::default()).unwrap();
    let tree = image.bootstrap();
    let find = |name: &[u8]| tree.lookup(tree.root(), name).unwrap().unwrap().nid;
    assert_eq!(find(b"first"), find(b"second"));
    assert_eq!(tree.attr(find(b"second")).unwrap().nlink, 2);
    assert_eq!(image.getxattr(find(b"second"), b"user.x").unwrap(), Some(&b"value"[..]));
}

/// The archive of an image says nothing of its version.
#[test]
fn both_versions_unpack_to_the_same_archive() {
    let dir = tempfile::tempdir().unwrap();
    let unpack = |arguments: &[&std::ffi::OsStr]| {
        let archive = dir.path().join("archive.tar");
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_nydus-image"))
            .args(["unpack", "--log-level", "warn", "--output"])
            .arg(&archive)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        DigestAlgorithm::Sha256.digest(&std::fs::read(&archive).unwrap())
    };
    let image = |variant: &str| {
        let file = |name: &str| golden(&format!("{variant}/{name}")).into_os_string();
        unpack(&["-B".as_ref(), &file("image.boot"), "--blob".as_ref(), &file("image.blob")])
    };
    let v6 = image("default");
    assert_eq!(image("v5-default"), v6);
    assert_eq!(image("v5-none-4k"), v6);
    assert_eq!(unpack(&[golden("v5-inline/layer.blob").as_os_str()]), v6);
}

#[test]
fn builds_upon_other_images_differ_in_stored_sizes_only() {
    let Some(upper) = unpacked("upper") else { return };
    let open =
        |variant: &str| from_bytes(read(&format!("{variant}/image.boot")), &OpenOptions::default()).unwrap();
    let build = |codec, chunk_size, below: &str, parent: bool| {
        let options = v5(codec, chunk_size);
        let common =
            Common { fs_version: 5, chunk_size, digester: options.data.digester, explicit_ids: true };
        let image = open(below);
        let (dictionary, parent) = if parent { (None, Some(&*image)) } else { (Some(&*image), None) };
        let below = Below::load(dictionary, parent, &common)?;
        let sink = BlobSink::new("nowhere", std::io::sink());
        build_layer_upon(LayerSource::Directory(upper.path()), &options, Some(below), sink)
    };
    for (variant, below, chunk_size, parent) in
        [("v5-parent", "v5-default", 0x10_0000, true), ("v5-chunkdict", "v5-zstd-4k", 0x1000, false)]
    {
        let built = build(Codec::Zstd, chunk_size, below, parent).unwrap();
        let reference = read(&format!("{variant}/image.boot"));
        assert_same(variant, &without_stored_sizes(&built.bootstrap), &without_stored_sizes(&reference));
        let opened = from_bytes(built.bootstrap, &OpenOptions::default()).unwrap();
        assert_eq!(rafs::merkle::image_root(&*opened).unwrap(), built.root);
    }
    // The reference builder writes an image that can not be read.
    let mixed = build(Codec::Lz4Block, 0x10_0000, "v5-default", true).err().unwrap();
    assert!(mixed.kind() == ErrorKind::Inconsistent && mixed.to_string().contains("lz4_block"), "{mixed}");
    let version = build(Codec::Zstd, 0x10_0000, "default", true).err().unwrap();
    assert!(version.to_string().contains("RAFS version 6"), "{version}");
}
