//! Every golden v6 image opens and lists exactly as expected, and all content decodes.

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use rafs::ErrorKind;
use rafs::blob_file::BlobFile;
use rafs::bootstrap::{DirEntry, FileType, Nid, OpenOptions, Step, Walk, adopt, adopt_own, from_bytes, open};
use rafs::fs::{Rafs, RafsOptions};
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::{BlobId, ByteRange};
use support::{GoldenImage, expected, golden, golden_bytes, open_bytes};

fn compare(listed: &str, list: &str) {
    let want = expected(list);
    for (have, want) in listed.lines().zip(want.lines()) {
        assert_eq!(have, want);
    }
    assert_eq!(listed.lines().count(), want.lines().count());
}

fn check(variant: &str, blobs: &[&str], list: &str) {
    let bootstrap = open_bytes(golden_bytes(&format!("{variant}/image.boot")));
    let blobs = blobs.iter().map(|name| golden_bytes(name)).collect();
    compare(&GoldenImage::new(bootstrap, blobs).list(), list);
}

#[test]
fn native_images_list_and_decode() {
    for variant in
        ["default", "zstd-4k", "lz4-4k", "lz4-1m", "none-4k", "none-1m", "toc-sha256", "batch", "prefetch"]
    {
        check(variant, &[&format!("{variant}/image.blob")], "tree");
    }
    check("tar-rafs", &["tar-rafs/image.blob"], "mini");
}

#[test]
fn layered_images_list_and_decode() {
    check("parent", &["default/image.blob", "parent/image.blob"], "merged");
    check("merged", &["upper-inline-toc/layer.blob", "inline-toc/layer.blob"], "merged");
}

#[test]
fn encrypted_images_list_and_decode() {
    // Built from a directory, so the root has no time.
    let bootstrap = open_bytes(golden_bytes("encrypt/image.boot"));
    let image = GoldenImage::new(bootstrap, vec![golden_bytes("encrypt/image.blob")]);
    let (listed, want) = (image.list(), expected("mini"));
    assert_eq!(listed.lines().skip(1).collect::<Vec<_>>(), want.lines().skip(1).collect::<Vec<_>>());
}

#[test]
fn slices_of_gzip_files_list_and_decode() {
    let layer = || vec![golden_bytes("src/mini.tar.gz")];
    let bootstrap = open_bytes(golden_bytes("zran/image.boot"));
    let context_id = bootstrap.blobs()[0].context_id.clone().unwrap();
    let meta = golden_bytes("zran/rafs.blob");
    assert_eq!(context_id.as_str(), DigestAlgorithm::Sha256.digest(&meta).to_string());
    compare(&GoldenImage::separate(bootstrap, layer(), vec![meta]).list(), "mini");

    let meta = golden_bytes("zran-inline/layer.blob");
    let mut read = |range: ByteRange| Ok(meta[range.start() as usize..range.end() as usize].to_vec());
    let file = BlobFile::read(meta.len() as u64, &mut read).unwrap();
    let bytes = file.bootstrap(&mut read).unwrap();
    let id = BlobId::new(&DigestAlgorithm::Sha256.digest(&meta).to_string()).unwrap();
    let options = OpenOptions { inlined_blob_id: Some(id.clone()) };
    let bootstrap: std::sync::Arc<dyn rafs::bootstrap::Bootstrap> =
        from_bytes(bytes, &options).unwrap().into();
    let blob = &bootstrap.blobs()[0];
    assert_eq!(blob.context_id.as_ref(), Some(&id));
    assert_eq!(blob.id.as_str(), DigestAlgorithm::Sha256.digest(&layer()[0]).to_string());
    compare(&GoldenImage::separate(bootstrap, layer(), vec![meta.clone()]).list(), "mini");
}

/// The reference builder gives the chunks of a plain tar no digests.
#[test]
fn plain_tars_list_and_decode() {
    let bootstrap = open_bytes(golden_bytes("tarfs/image.boot"));
    assert_eq!((bootstrap.summary().block_size, bootstrap.blobs()[0].unverified_chunks), (512, 7));
    let refused = Rafs::new(bootstrap.clone(), Vec::new(), RafsOptions::default()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let rafs = Rafs::new(bootstrap.clone(), Vec::new(), RafsOptions { allow_unverified: true }).unwrap();
    let tar = golden_bytes("src/mini.tar");
    let mut walk = Walk::new(&*bootstrap, bootstrap.root());
    let (mut files, listing) = (0, expected("mini"));
    while let Some(step) = walk.step().unwrap() {
        let Step::Leaf(entry) = step else { continue };
        if entry.file_type != FileType::Regular {
            continue;
        }
        let mut content = Vec::new();
        rafs.file_extents(entry.nid, &mut |_, extent| {
            let range = extent.unit.compressed;
            content.extend_from_slice(&tar[range.start() as usize..range.end() as usize]);
            Ok(())
        })
        .unwrap();
        let digest = DigestAlgorithm::Sha256.digest(&content).to_string();
        let path = format!("/{}\t", String::from_utf8_lossy(walk.path()));
        let line = listing.lines().find(|line| line.starts_with(&path)).unwrap();
        assert!(line.contains(&digest), "{line}");
        files += 1;
    }
    assert!(files >= 7);
}

#[test]
fn the_empty_image_has_a_root_and_nothing_else() {
    let image = GoldenImage::new(open_bytes(golden_bytes("empty/image.boot")), Vec::new());
    assert_eq!(image.list().lines().count(), 1);
    assert_eq!(image.rafs.bootstrap().summary().inode_count, 1);
}

/// Flags, entries, chunk records, prefetch inodes, and id, features, chunks and sizes of blobs.
#[test]
fn tables_hold_the_published_values() {
    type Blob = (&'static str, u32, u32, u64, u64);
    let rows: [(&str, u64, u64, u64, &[Blob]); 8] = [
        ("batch", 0x10000b4, 417, 163, &[("32d94a952a77", 0x40000085, 163, 1961984, 75131)]),
        (
            "chunkdict",
            0x1000094,
            13,
            6,
            &[("d20ae4f1e6ea", 0x40000001, 4, 16384, 4209), ("641d0d3e47fc", 0x40000001, 197, 806912, 67305)],
        ),
        ("default", 0x10000b4, 417, 163, &[("cdab75e10644", 0x40000001, 163, 1961984, 75110)]),
        ("empty", 0x10001b4, 1, 0, &[]),
        ("lz4-4k", 0x1000036, 417, 197, &[("7778a961c40a", 0x40000001, 197, 806912, 79540)]),
        (
            "merged",
            0x10001b4,
            264,
            42,
            &[
                ("d38d9ed0dfeb", 0x70000021, 5, 24576, 10504),
                ("bb67c6a54ec8", 0x70000021, 163, 1961984, 81862),
            ],
        ),
        ("none-1m", 0x1000035, 417, 163, &[("027f76c19289", 0x40000001, 163, 1961984, 1326949)]),
        ("toc-sha256", 0x10001b8, 417, 163, &[("03ca1b268d85", 0x70000021, 163, 1961984, 82886)]),
    ];
    for (variant, flags, entries, records, blobs) in rows {
        let bootstrap = open_bytes(golden_bytes(&format!("{variant}/image.boot")));
        let summary = bootstrap.summary();
        assert_eq!(summary.flags.bits(), flags, "{variant}");
        assert_eq!((summary.inode_count, summary.chunk_table.1), (entries, records), "{variant}");
        assert_eq!(bootstrap.root(), Nid(128));
        assert_eq!(bootstrap.blobs().len(), blobs.len());
        for (blob, (id, features, chunks, decoded, stored)) in bootstrap.blobs().iter().zip(blobs) {
            assert!(blob.id.as_str().starts_with(id));
            assert_eq!(blob.features.bits(), *features);
            assert_eq!(
                (blob.chunk_count, blob.decoded_size, blob.compressed_size),
                (*chunks, *decoded, *stored)
            );
            assert_eq!(blob.unverified_chunks, 0);
        }
    }
}

#[test]
fn prefetch_tables_name_their_inodes() {
    let bootstrap = open_bytes(golden_bytes("prefetch/image.boot"));
    let find = |path: &str| {
        path.split('/').fold(bootstrap.root(), |dir, name| {
            bootstrap.lookup(dir, name.as_bytes()).unwrap().unwrap_or_else(|| panic!("{path}")).nid
        })
    };
    assert_eq!(bootstrap.prefetch(), ["files/one_byte", "dirs", "files/exact_4k"].map(find));
    assert_eq!(open_bytes(golden_bytes("merged/image.boot")).prefetch(), [Nid(128)]);
    assert_eq!(open_bytes(golden_bytes("default/image.boot")).prefetch(), []);
}

/// Of every directory, some larger than a block: a cursor stands before the first name that is not below.
#[test]
fn cursors_are_found_by_name() {
    let bootstrap = open_bytes(golden_bytes("default/image.boot"));
    let from = |dir: Nid, name: &[u8]| {
        let mut names = Vec::new();
        let cursor = bootstrap.cursor_at(dir, name).unwrap();
        let visit = &mut |entry: DirEntry<'_>| {
            names.push(entry.name.to_vec());
            ControlFlow::Continue(())
        };
        bootstrap.children(dir, cursor, visit).unwrap();
        names
    };
    let (mut walk, mut looked) = (Walk::new(&*bootstrap, bootstrap.root()), 0);
    while let Some(step) = walk.step().unwrap() {
        let Step::Enter(dir) = step else { continue };
        let all = from(dir.nid, b"");
        assert!(all.is_sorted());
        for (at, name) in all.iter().enumerate() {
            assert_eq!(from(dir.nid, name), all[at..]);
            assert_eq!(from(dir.nid, &[name.as_slice(), b"\x01"].concat()), all[at + 1..]);
            looked += 1;
        }
        assert!(from(dir.nid, b"\xff\xff").is_empty());
    }
    assert_eq!(looked, 416);
}

#[test]
fn a_bootstrap_is_adopted_under_its_digest() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let source = golden("default/image.boot");
    let digest = DigestAlgorithm::Sha256.digest(&golden_bytes("default/image.boot"));
    let (adopted, found) = adopt(&source, dir.path(), Some(digest)).unwrap();
    assert_eq!(found, digest);
    assert_eq!(adopted.summary().inode_count, 417);
    let path = dir.path().join(format!("{digest}.boot"));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(open(&path, &OpenOptions::default()).unwrap().summary().inode_count, 417);

    // The copy itself is not written again, unless others could change it.
    let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
    let first = inode();
    let (again, found) = adopt(&path, dir.path(), Some(digest)).unwrap();
    assert_eq!((again.summary().inode_count, found, inode()), (417, digest, first));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(adopt(&path, dir.path(), Some(digest)).unwrap().1, digest);
    assert_ne!(inode(), first);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let other = dir.path().join(format!("{}.boot", Digest([7; 32])));
    std::fs::rename(&path, &other).unwrap();
    let error = adopt(&other, dir.path(), Some(Digest([7; 32]))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    std::fs::rename(&other, &path).unwrap();

    // One's own file is not copied, unless others could change it.
    let own = dir.path().join("own");
    for (mode, stays) in [(0o600, false), (0o644, true)] {
        std::fs::copy(&source, &own).unwrap();
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(mode)).unwrap();
        let own_inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&own).unwrap());
        assert_eq!(adopt_own(&own, dir.path(), None).unwrap().1, digest);
        assert_eq!((own.exists(), own_inode != inode()), (stays, stays));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    }
    std::fs::write(&own, [7; 8192]).unwrap();
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(adopt_own(&own, dir.path(), None).is_err());
    std::fs::remove_file(&own).unwrap();

    let broken = dir.path().join("broken");
    std::fs::write(&broken, [7; 8192]).unwrap();
    let error = adopt(&broken, dir.path(), None).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().starts_with(broken.to_str().unwrap()), "{error}");
    std::fs::remove_file(&broken).unwrap();
    let error = adopt(&source, dir.path(), Some(Digest([7; 32]))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    for bad in [Path::new("/dev/null"), Path::new("/"), Path::new("/no/such/file")] {
        assert!(open(bad, &OpenOptions::default()).is_err());
    }
}
