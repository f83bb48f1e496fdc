//! `nydus-image optimize`: what a start reads lies in one blob, in its order, and all else as before.

use rafs::format::features::BlobFeatures;
use serde_json::json;

use crate::common::golden;
use crate::layers::{File, Workshop, done, piece, random_layer, refused};
use crate::random::Dice;

const MARK: BlobFeatures = BlobFeatures::IS_SEPARATED_WITH_PREFETCH_FILES;

/// Optimizes `boot` into `new` as nydusify does, word for word; false if there was nothing to do.
fn optimize(shop: &Workshop, boot: &str, list: &str) -> bool {
    let (path, json) = (shop.at("list.json"), shop.at("out.json"));
    std::fs::write(&path, list).unwrap();
    let (boot, new, blobs) = (shop.at(boot), shop.at("new"), shop.at("blobs"));
    for stale in [&new, &json] {
        let _ = std::fs::remove_file(stale);
    }
    done(&[
        "optimize",
        "--log-level",
        "warn",
        "--prefetch-files",
        &path,
        "--bootstrap",
        &boot,
        "--output-blob-dir",
        &blobs,
        "--output-bootstrap",
        &new,
        "--output-json",
        &json,
        "--blob-dir",
        &blobs,
    ]);
    let changed = shop.path("new").exists();
    assert_eq!(changed, shop.path("out.json").exists());
    if changed {
        let told: Vec<String> = serde_json::from_value(shop.json("out.json")["blobs"].clone()).unwrap();
        assert_eq!(told, shop.blobs("new"));
    }
    changed
}

fn list(files: &[(&str, &[(u64, u64)])]) -> String {
    let files: Vec<_> = files
        .iter()
        .map(|(path, ranges)| match ranges {
            [] => json!({ "path": path }),
            _ => json!({ "path": path, "ranges": ranges }),
        })
        .collect();
    json!({ "version": "v1", "files": files }).to_string()
}

/// Pieces in the order of the new blob, and the number of its chunks.
fn hot(shop: &Workshop) -> Vec<[u8; 32]> {
    let opened = shop.opened("new");
    let last = opened.blobs().len() as u32 - 1;
    let blob = &opened.blobs()[last as usize];
    let digest = |n| opened.chunk_info(last, storage::ids::ChunkIndex(n)).unwrap().digest;
    (0..blob.chunk_count).map(digest).collect()
}

fn digests(pieces: &[Vec<u8>]) -> Vec<[u8; 32]> {
    pieces.iter().map(|bytes| storage::digest::DigestAlgorithm::Blake3.digest(bytes).0).collect()
}

#[test]
fn hot_chunks_come_in_the_order_of_the_list() {
    let shop = Workshop::open();
    let joined = |numbers: &[u32]| numbers.iter().flat_map(|&n| piece(n)).collect::<Vec<u8>>();
    let lower: Vec<File> = vec![("a".into(), joined(&[0, 1, 2, 3])), ("b".into(), joined(&[4, 5]))];
    let upper: Vec<File> =
        vec![("d/c".into(), joined(&[6, 1, 7])), ("d/e".into(), joined(&[8])), ("f".into(), joined(&[9]))];
    shop.image("boot", &[lower, upper], &["--chunk-size", "0x1000"]);
    let old = shop.blobs("boot");
    let wanted = list(&[
        ("/d/c", &[(0x1000, 1), (0, 0), (1 << 40, 5)]),
        ("/a", &[(0x2fff, 2)]),
        ("/nowhere", &[]),
        ("/d", &[]),
        ("/a", &[(0x3000, u64::MAX)]),
    ]);
    assert!(optimize(&shop, "boot", &wanted));
    let new = shop.blobs("new");
    assert_eq!((&new[..2], new.len()), (&old[..], 3), "the old blobs, then the new one");
    assert_eq!(hot(&shop), digests(&[1, 2, 3, 6, 7, 8].map(piece)));
    let opened = shop.opened("new");
    let marked: Vec<bool> = opened.blobs().iter().map(|blob| blob.features.contains(MARK)).collect();
    assert_eq!(marked, [false, false, true]);
    assert_eq!(shop.archive("new"), shop.archive("boot"));
    // Piece 1 is in two files, and both use it in the new blob.
    let places = |dir: &[u8], name: &[u8]| -> Vec<u32> {
        let child = |dir, name: &[u8]| opened.lookup(dir, name).unwrap().unwrap().nid;
        let dir = if dir.is_empty() { opened.root() } else { child(opened.root(), dir) };
        let nid = child(dir, name);
        let count = opened.attr(nid).unwrap().size.div_ceil(0x1000) as u32;
        (0..count).map(|position| opened.chunk(nid, position).unwrap().blob).collect()
    };
    assert_eq!((places(b"", b"a"), places(b"", b"b")), (vec![0, 2, 2, 2], vec![0, 0]));
    assert_eq!((places(b"d", b"c"), places(b"", b"f")), (vec![2, 2, 2], vec![1]));
}

#[test]
fn the_kernel_reads_hot_files() {
    let shop = Workshop::open();
    let files: Vec<File> = (0..20).map(|n| (format!("d/{n}"), piece(n))).collect();
    shop.image("boot", &[files], &["--chunk-size", "0x1000"]);
    assert!(optimize(&shop, "boot", &list(&[("/d/17", &[]), ("/d/3", &[])])));
    let paths: Vec<String> = (0..20).map(|n| format!("d/{n}")).collect();
    let Some(read) = shop.kernel_reads("new", &paths) else { return };
    for (n, bytes) in (0..).zip(read) {
        assert!(bytes == piece(n), "file {n}");
    }
}

#[test]
fn any_image_survives_any_list() {
    let (mut optimized, mut compacted) = (0, 0);
    for seed in 0..12 {
        let mut dice = Dice::new(seed);
        let shop = Workshop::open();
        let mut flags = vec!["--chunk-size", "0x1000", "--compressor"];
        flags.push(["zstd", "lz4_block", "none"][dice.roll(3) as usize]);
        match seed % 4 {
            0 => flags.extend(["--fs-version", "5"]),
            1 => flags.extend(["--batch-size", "0x1000"]),
            2 => flags.extend(["--encrypt", "--batch-size", "0x1000"]),
            _ => {}
        }
        let layers: Vec<_> = (0..1 + dice.roll(3)).map(|_| random_layer(&mut dice)).collect();
        shop.image("boot", &layers, &flags);
        let names: Vec<String> = layers.iter().flatten().map(|(path, _)| format!("/{path}")).collect();
        let mut chosen = Vec::new();
        for _ in 0..8 {
            let ranges: Vec<(u64, u64)> =
                (0..dice.roll(3)).map(|_| (dice.roll(9000).into(), dice.roll(9000).into())).collect();
            chosen.push((names[dice.roll(names.len() as u32) as usize].as_str(), ranges));
        }
        let chosen: Vec<(&str, &[(u64, u64)])> =
            chosen.iter().map(|(path, ranges)| (*path, &ranges[..])).collect();
        if !optimize(&shop, "boot", &list(&chosen)) {
            continue;
        }
        optimized += 1;
        assert_eq!(shop.archive("new"), shop.archive("boot"), "seed {seed}, {flags:?}");
        let opened = shop.opened("new");
        let last = opened.blobs().last().unwrap();
        assert!(last.features.contains(MARK));
        assert_eq!(last.cipher == storage::extent::Cipher::None, seed % 4 != 2, "seed {seed}");
        // The same again changes nothing, not even which files there are.
        let (first, count) = (std::fs::read(shop.path("new")).unwrap(), shop.count("blobs"));
        std::fs::rename(shop.path("new"), shop.path("once")).unwrap();
        assert!(optimize(&shop, "once", &list(&chosen)));
        assert!(std::fs::read(shop.path("new")).unwrap() == first, "seed {seed}, {flags:?}");
        assert_eq!(shop.count("blobs"), count, "seed {seed}");
        // Compacting leaves the new blob alone, whatever it does with the others.
        let (boot, blobs, third) = (shop.at("new"), shop.at("blobs"), shop.at("third"));
        let settings = ["--min-used-ratio", "99", "-O", &third, "-D", &blobs, "-B", &boot];
        done(&[&["compact", "--log-level", "warn"], &settings[..]].concat());
        if shop.path("third").exists() {
            compacted += 1;
            assert!(shop.blobs("third").contains(&last.id.to_string()));
            assert_eq!(shop.archive("third"), shop.archive("boot"), "seed {seed}");
        }
    }
    assert!(optimized > 8 && compacted > 3, "{optimized} optimized, {compacted} compacted: all too tame");
}

/// Which blobs of an image have the mark.
fn marks(shop: &Workshop, name: &str) -> Vec<bool> {
    shop.opened(name).blobs().iter().map(|blob| blob.features.contains(MARK)).collect()
}

#[test]
fn a_blob_of_the_same_bytes_is_the_same_blob() {
    for flags in [&["--chunk-size", "0x1000"][..], &["--fs-version", "5"], &["--batch-size", "0x4000"]] {
        let shop = Workshop::open();
        let files: Vec<File> = (0..9).map(|n| (format!("d/{n}"), piece(n))).collect();
        shop.layer("boot", &files, flags);
        let old = shop.blobs("boot");
        // All of it, in the order in which it lies.
        assert!(optimize(&shop, "boot", &list(&[("/", &[])])), "{flags:?}");
        assert_eq!((shop.blobs("new"), shop.count("blobs")), (old.clone(), 1), "{flags:?}");
        assert_eq!(marks(&shop, "new"), [true]);
        assert_eq!(shop.archive("new"), shop.archive("boot"));

        // A layer among others goes to the end of the table.
        shop.image("both", &[files.clone(), vec![("e".into(), piece(20))]], flags);
        let other = shop.blobs("both-1").remove(0);
        assert!(optimize(&shop, "both", &list(&[("/d", &[])])), "{flags:?}");
        assert_eq!(shop.blobs("new"), [other, old[0].clone()], "{flags:?}");
        assert_eq!(marks(&shop, "new"), [false, true]);
        assert_eq!(shop.archive("new"), shop.archive("both"));
    }
}

#[test]
fn only_the_newest_blob_is_marked() {
    for version in ["6", "5"] {
        let shop = Workshop::open();
        let files: Vec<File> = (0..9).map(|n| (format!("{n}"), piece(n))).collect();
        shop.layer("boot", &files, &["--fs-version", version]);
        let mut history = vec![shop.blobs("boot")[0].clone()];
        let mut step = |wanted: &[&str], from: &[usize]| {
            let wanted: Vec<(&str, &[(u64, u64)])> = wanted.iter().map(|&path| (path, &[][..])).collect();
            assert!(optimize(&shop, "boot", &list(&wanted)));
            assert_eq!(shop.archive("new"), shop.archive("boot"));
            let blobs = shop.blobs("new");
            history.push(blobs[blobs.len() - 1].clone());
            let expected: Vec<String> = from.iter().map(|&n| history[n].clone()).collect();
            assert_eq!(blobs, expected, "version {version}, {wanted:?}");
            assert!(marks(&shop, "new").iter().rev().enumerate().all(|(n, &mark)| mark == (n == 0)));
            std::fs::rename(shop.path("new"), shop.path("boot")).unwrap();
        };
        step(&["/1", "/2"], &[0, 1]);
        // A chunk of the older one is still in use: it stays, without the mark.
        step(&["/2", "/3"], &[0, 1, 2]);
        // Nothing is: it goes. What has lost the mark stays like any other blob.
        step(&["/3", "/2", "/1", "/4"], &[0, 1, 3]);
        step(&["/5"], &[0, 1, 3, 4]);
    }
}

/// The compressor is that of the image, whatever the first hot file happens to lie in.
#[test]
fn the_image_says_how_chunks_are_compressed() {
    use storage::codec::Codec;
    let shop = Workshop::open();
    let text = |n: u8| vec![b'a' + n; 0x1000];
    let layer = |name: &str, n: u8, compressor: &str| {
        shop.layer(name, &[(name.into(), text(n))], &["--digester", "sha256", "--compressor", compressor]);
    };
    layer("plain", 0, "none");
    layer("packed", 1, "zstd");
    layer("other", 2, "none");
    std::fs::write(shop.path("tar"), crate::layers::tar_of(&[("tarred".into(), text(3))])).unwrap();
    let (tar, boot, blobs) = (shop.at("tar"), shop.at("tarred"), shop.at("blobs"));
    done(&["create", "--log-level", "warn", "--type", "targz-ref", "-B", &boot, "-D", &blobs, &tar]);
    let bytes = std::fs::read(&tar).unwrap();
    let name = storage::digest::DigestAlgorithm::Sha256.digest(&bytes).to_string();
    std::fs::write(shop.path("blobs").join(name), bytes).unwrap();
    let archive = |name: &str| {
        done(&["unpack", "--log-level", "warn", "-B", &shop.at(name), "-D", &blobs, "--output", "-"])
    };
    for (layers, hot, codec) in [
        (&["plain", "packed"][..], &["/plain", "/packed"][..], Codec::Zstd),
        (&["packed", "plain"], &["/plain", "/packed"], Codec::Zstd),
        (&["plain", "other"], &["/plain", "/other"], Codec::None),
        (&["packed", "plain"], &["/plain"], Codec::None),
        (&["tarred", "packed"], &["/tarred", "/packed"], Codec::Zstd),
        (&["packed", "tarred"], &["/packed"], Codec::Zstd),
        (&["tarred", "plain"], &["/tarred"], Codec::Zstd),
        (&["tarred", "plain"], &["/tarred", "/plain"], Codec::None),
    ] {
        shop.merge("boot", layers, &[]);
        let hot: Vec<(&str, &[(u64, u64)])> = hot.iter().map(|&path| (path, &[][..])).collect();
        assert!(optimize(&shop, "boot", &list(&hot)));
        assert_eq!(shop.opened("new").blobs().last().unwrap().codec, codec, "{layers:?} {hot:?}");
        assert_eq!(archive("new"), archive("boot"));
    }
}

/// Data in an original layer: what is hot no longer needs the layer.
#[test]
fn hot_chunks_leave_the_original_layer() {
    let shop = Workshop::open();
    std::fs::create_dir(shop.path("blobs")).unwrap();
    std::fs::copy(golden("zran/image.boot"), shop.path("boot")).unwrap();
    for file in ["zran/rafs.blob", "src/mini.tar.gz", "zran/mini.tar.gz"] {
        let Ok(bytes) = std::fs::read(golden(file)) else { continue };
        let name = storage::digest::DigestAlgorithm::Sha256.digest(&bytes).to_string();
        std::fs::write(shop.path("blobs").join(name), bytes).unwrap();
    }
    assert!(optimize(&shop, "boot", &list(&[("/", &[])])));
    let opened = shop.opened("new");
    let last = opened.blobs().last().unwrap();
    assert!(!last.features.intersects(BlobFeatures::ZRAN | BlobFeatures::SEPARATE));
    assert_eq!(last.codec, storage::codec::Codec::Zstd);
    let (boot, new, blobs) = (shop.at("boot"), shop.at("new"), shop.at("blobs"));
    let archive = |boot: &str| done(&["unpack", "-B", boot, "-D", &blobs, "--output", "-"]);
    assert_eq!(archive(&new), archive(&boot));
}

#[test]
fn nothing_to_do_leaves_nothing() {
    let shop = Workshop::open();
    shop.layer("boot", &[("a".into(), piece(0)), ("empty".into(), Vec::new())], &[]);
    for text in
        ["", "\n", r#"{"version": "v1", "files": []}"#, &list(&[("/none", &[])]), &list(&[("/empty", &[])])]
    {
        assert!(!optimize(&shop, "boot", text), "{text:?}");
        assert_eq!(shop.count("blobs"), 1);
    }
    let (boot, blobs, path, out) = (shop.at("boot"), shop.at("blobs"), shop.at("list.json"), shop.at("out"));
    let arguments = ["optimize", "-p", &path, "-B", &boot, "-D", &blobs, "-O", &out];
    std::fs::write(&path, r#"{"version": "v2", "files": [{"path": "/a"}]}"#).unwrap();
    assert!(refused(&arguments).contains("v2"));
    std::fs::write(&path, "/a\n").unwrap();
    assert!(refused(&arguments).contains("list.json"));
    std::fs::write(&path, list(&[("/a", &[])])).unwrap();
    let victim = shop.path("blobs").join(&shop.blobs("boot")[0]);
    let mut bytes = std::fs::read(&victim).unwrap();
    bytes[5] ^= 1;
    std::fs::write(&victim, &bytes).unwrap();
    let said = refused(&arguments);
    assert!(said.contains(&shop.blobs("boot")[0]), "{said}");
    assert_eq!(shop.count("blobs"), 1);
    assert!(!shop.path("out").exists());
    assert!(refused(&arguments[..5]).contains("--output-blob-dir"));
}

#[test]
fn plain_tars_are_refused() {
    let shop = Workshop::open();
    std::fs::write(shop.path("list.json"), list(&[("/", &[])])).unwrap();
    std::fs::write(shop.path("tar"), crate::layers::tar_of(&[("a".into(), piece(0))])).unwrap();
    let (list, tar, boot, blobs) = (shop.at("list.json"), shop.at("tar"), shop.at("boot"), shop.at("blobs"));
    done(&["create", "--type", "tar-tarfs", "-B", &boot, "--blob-id", &"1".repeat(64), &tar]);
    assert!(refused(&["optimize", "-p", &list, "-B", &boot, "-D", &blobs]).contains("plain tar"));
}
