//! `nydus-image compact`: whatever becomes of the blobs, the tree stays as it is.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rafs::format::features::BlobFeatures;

use crate::common::golden;
use crate::layers::{File, Workshop, done, nydus_image, piece, random_layer, refused};
use crate::random::Dice;

/// Compacts the image `boot` into `out`; true if there was something to do.
fn compact(shop: &Workshop, boot: &str, out: &str, flags: &[&str]) -> bool {
    let (boot, out_path, blobs) = (shop.at(boot), shop.at(out), shop.at("blobs"));
    let json = shop.at("out.json");
    let before = shop.count("blobs");
    let _ = std::fs::remove_file(&json);
    let fixed = ["compact", "--bootstrap", &boot, "--blob-dir", &blobs, "-O", &out_path, "-J", &json];
    done(&[&fixed[..], flags, &["--log-level", "warn"]].concat());
    let changed = Path::new(&out_path).exists();
    assert_eq!(changed, Path::new(&json).exists());
    if changed {
        let told: Vec<String> = serde_json::from_value(shop.json("out.json")["blobs"].clone()).unwrap();
        assert_eq!(told, shop.blobs(out));
    } else {
        assert_eq!(shop.count("blobs"), before, "nothing to do, but a blob was written");
    }
    changed
}

/// Files of `count` pieces each from `first` on.
fn files(dir: &str, first: u32, count: u32) -> Vec<File> {
    (first..first + count).map(|n| (format!("{dir}/{n}"), piece(n))).collect()
}

#[test]
fn any_image_survives_any_settings() {
    let mut changed = 0;
    for seed in 0..24 {
        let mut dice = Dice::new(seed);
        let shop = Workshop::open();
        let mut flags = vec!["--chunk-size", "0x1000", "--compressor"];
        flags.push(["zstd", "lz4_block", "none"][dice.roll(3) as usize]);
        if dice.roll(4) == 0 {
            flags.extend(["--fs-version", "5"]);
            flags.extend(["--aligned-chunk"].iter().filter(|_| dice.roll(2) == 0));
        } else {
            flags.extend(["--batch-size", "0x1000"].iter().filter(|_| seed % 3 == 0));
            flags.extend(["--encrypt"].iter().filter(|_| seed % 4 == 1));
            flags.extend(["--features", "blob-toc"].iter().filter(|_| seed % 5 == 2));
        }
        let layers: Vec<_> = (0..2 + dice.roll(4)).map(|_| random_layer(&mut dice)).collect();
        shop.image("boot", &layers, &flags);
        let ratio = ["0", "40", "70", "99"][dice.roll(4) as usize];
        let small = ["0", "20000", "0x100000"][dice.roll(3) as usize];
        let max = ["30000", "104857600"][dice.roll(2) as usize];
        let settings = ["--min-used-ratio", ratio, "--compact-blob-size", small, "--max-compact-size", max];
        if !compact(&shop, "boot", "new", &settings) {
            continue;
        }
        changed += 1;
        assert!(shop.blobs("new").len() <= shop.blobs("boot").len(), "seed {seed}");
        assert!(shop.archive("new") == shop.archive("boot"), "seed {seed}, {flags:?}, {settings:?}");
        let root = |name: &str| rafs::merkle::image_root(&*shop.opened(name)).unwrap();
        assert_eq!(root("new"), root("boot"));
        let count = shop.count("blobs");
        assert!(compact(&shop, "boot", "again", &settings));
        assert_eq!(std::fs::read(shop.path("new")).unwrap(), std::fs::read(shop.path("again")).unwrap());
        assert_eq!(count, shop.count("blobs"), "the same input gave another blob");
    }
    assert!(changed > 10, "{changed} images changed: the settings are too tame");
}

#[test]
fn small_blobs_become_one_and_stay() {
    let shop = Workshop::open();
    let layers: Vec<_> = (0..4).map(|n| files("d", n * 10, 12)).collect();
    shop.image("boot", &layers, &["--chunk-size", "0x1000"]);
    assert_eq!(shop.blobs("boot").len(), 4);
    assert!(compact(&shop, "boot", "new", &[]));
    let blobs = shop.opened("new").blobs().to_vec();
    // Each piece once, although layers have some in common.
    assert_eq!((blobs.len(), blobs[0].chunk_count), (1, 42));
    assert!(!blobs[0].features.contains(BlobFeatures::CHUNK_INFO_V2));
    let bytes = std::fs::read(shop.path("blobs").join(blobs[0].id.as_str())).unwrap();
    let name = storage::digest::DigestAlgorithm::Sha256.digest(&bytes);
    assert_eq!(name.to_string(), blobs[0].id.as_str());
    assert_eq!(shop.archive("new"), shop.archive("boot"));
    assert!(!compact(&shop, "new", "third", &["--min-used-ratio", "99"]), "what is compact is left alone");
    // Without -O beside the bootstrap.
    done(&["compact", "--log-level", "warn", "-B", &shop.at("boot"), "-D", &shop.at("blobs")]);
    assert_eq!(std::fs::read(shop.path("boot.compact")).unwrap(), std::fs::read(shop.path("new")).unwrap());
}

#[test]
fn settings_say_what_is_done() {
    let shop = Workshop::open();
    // Of the first blob one file of ten is left, of the second all.
    let hidden = (1..10).map(|n| (format!("d/{n}"), Vec::new()));
    let layers = [files("d", 0, 10), files("e", 20, 10).into_iter().chain(hidden).collect()];
    shop.image("boot", &layers, &["--chunk-size", "0x1000", "--compressor", "none"]);
    let of = |flags: &[&str]| {
        let _ = std::fs::remove_file(shop.path("new"));
        compact(&shop, "boot", "new", flags).then(|| shop.blobs("new"))
    };
    let old = shop.blobs("boot");
    let apart = ["--compact-blob-size", "0"];
    assert_eq!(of(&apart), None);
    assert_eq!(of(&[&apart[..], &["--min-used-ratio", "10"]].concat()), None, "ten percent are used");
    let sparse = of(&[&apart[..], &["--min-used-ratio", "11"]].concat()).unwrap();
    assert!(sparse.len() == 2 && sparse[0] != old[0] && sparse[1] == old[1]);
    assert_eq!(of(&["--layers-to-compact", "3"]), None);
    assert_eq!(of(&["--layers-to-compact", "2"]).unwrap().len(), 1);
    assert_eq!(of(&["--max-compact-size", "45055"]), None, "both are small, but do not fit together");
    assert_eq!(of(&["--max-compact-size", "45056"]).unwrap().len(), 1);
    // The second blob is a dictionary's: it stays, and the first is alone.
    let dictionary = shop.at("boot-1");
    assert_eq!(of(&["--chunk-dict", &dictionary]), None);
    let kept = of(&["--chunk-dict", &format!("bootstrap={dictionary}"), "--min-used-ratio", "50"]);
    assert_eq!(kept.unwrap()[1], old[1]);
}

#[test]
fn the_prefetch_table_is_kept() {
    let shop = Workshop::open();
    for (n, version) in ["6", "5"].into_iter().enumerate() {
        let names = [format!("a{n}"), format!("b{n}")];
        shop.layer(&names[0], &files("d", 0, 9), &["--fs-version", version]);
        shop.layer(&names[1], &files("e", 5, 9), &["--fs-version", version]);
        let (boot, new) = (format!("boot{n}"), format!("new{n}"));
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nydus-image"));
        let merge = ["merge", "--log-level", "warn", "--prefetch-policy", "fs", "-B", &shop.at(&boot)];
        command.args(merge).args(names.map(|name| shop.at(&name)));
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        use std::io::Write as _;
        child.stdin.take().unwrap().write_all(b"/e/7\n/d\n").unwrap();
        assert!(child.wait().unwrap().success());
        assert!(compact(&shop, &boot, &new, &[]));
        let prefetch = |name: &str| done(&["inspect", &shop.at(name), "--request", "prefetch"]);
        assert!(prefetch(&new).windows(4).any(|part| part == b"/e/7"));
        let paths = |name: &str| -> Vec<serde_json::Value> {
            let list: Vec<serde_json::Value> = serde_json::from_slice(&prefetch(name)).unwrap();
            list.into_iter().map(|entry| entry["path"].clone()).collect()
        };
        assert_eq!(paths(&new), paths(&boot));
        assert_eq!(paths(&new).len(), 2);
    }
}

/// What nydusify runs, word for word: blobs in a backend, new ones in a directory.
#[test]
fn the_converter_of_nydusify_is_served() {
    let shop = Workshop::open();
    shop.image("boot", &[files("d", 0, 9), files("e", 5, 9)], &["--chunk-size", "0x1000"]);
    std::fs::rename(shop.path("blobs"), shop.path("store")).unwrap();
    std::fs::create_dir(shop.path("blobs")).unwrap();
    let backend = serde_json::json!({ "dir": shop.at("store") });
    std::fs::write(shop.path("backend.json"), backend.to_string()).unwrap();
    let (boot, blobs, config) = (shop.at("boot"), shop.at("blobs"), shop.at("backend.json"));
    let (json, out) = (shop.at("out.json"), shop.at("new"));
    let fixed = [
        "compact",
        "--bootstrap",
        &boot,
        "--blob-dir",
        &blobs,
        "--min-used-ratio",
        "5",
        "--compact-blob-size",
        "10485760",
        "--max-compact-size",
        "104857600",
        "--layers-to-compact",
        "0",
        "--backend-type",
        "localfs",
        "--backend-config-file",
        &config,
        "--log-level",
        "info",
        "--output-json",
        &json,
    ];
    done(&[&fixed[..], &["--output-bootstrap", &out]].concat());
    assert_eq!(shop.count("blobs"), 1);
    assert_eq!(shop.json("out.json")["blobs"].as_array().unwrap().len(), 1);
    let new = shop.archive("new");
    std::fs::rename(shop.path("blobs"), shop.path("fresh")).unwrap();
    std::fs::rename(shop.path("store"), shop.path("blobs")).unwrap();
    assert_eq!(new, shop.archive("boot"));
}

#[test]
fn golden_images_survive() {
    let shop = Workshop::open();
    std::fs::create_dir(shop.path("blobs")).unwrap();
    for variant in std::fs::read_dir(golden("")).unwrap() {
        for file in ["image.blob", "layer.blob", "rafs.blob", "mini.tar.gz"] {
            let Ok(bytes) = std::fs::read(variant.as_ref().unwrap().path().join(file)) else { continue };
            let name = storage::digest::DigestAlgorithm::Sha256.digest(&bytes).to_string();
            std::fs::write(shop.path("blobs").join(name), bytes).unwrap();
        }
    }
    for (variant, blobs) in [("merged", 1), ("parent", 1), ("chunkdict", 1), ("v5-parent", 1)] {
        std::fs::copy(golden(&format!("{variant}/image.boot")), shop.path(variant)).unwrap();
        if shop.blobs(variant).iter().any(|blob| !shop.path("blobs").join(blob).exists()) {
            // Blobs of v5 are the starts of others.
            continue;
        }
        let new = format!("{variant}.new");
        assert!(compact(&shop, variant, &new, &[]), "{variant}");
        assert_eq!(shop.blobs(&new).len(), blobs, "{variant}");
        assert_eq!(shop.archive(&new), shop.archive(variant), "{variant}");
    }
    for variant in ["zran", "tarfs", "default", "empty"] {
        std::fs::copy(golden(&format!("{variant}/image.boot")), shop.path(variant)).unwrap();
        assert!(!compact(&shop, variant, "none", &["--min-used-ratio", "99"]), "{variant}");
    }
}

#[test]
fn the_kernel_reads_the_new_blobs() {
    let shop = Workshop::open();
    shop.image("boot", &[files("d", 0, 20), files("d", 15, 20)], &["--chunk-size", "0x1000"]);
    assert!(compact(&shop, "boot", "new", &[]));
    let paths: Vec<String> = (0..35).map(|n| format!("d/{n}")).collect();
    let Some(read) = shop.kernel_reads("new", &paths) else { return };
    for (n, bytes) in (0..).zip(read) {
        assert!(bytes == piece(n), "file {n}");
    }
}

#[test]
fn nothing_half_written_is_left() {
    let shop = Workshop::open();
    shop.image("boot", &[files("d", 0, 20), files("e", 20, 20)], &["--chunk-size", "0x1000"]);
    let (boot, blobs, out) = (shop.at("boot"), shop.at("blobs"), shop.at("new"));
    let arguments = ["compact", "--log-level", "warn", "-B", &boot, "-D", &blobs, "-O", &out];
    let victim = shop.path("blobs").join(&shop.blobs("boot")[1]);
    let whole = std::fs::read(&victim).unwrap();
    let half = whole[..whole.len() / 2].to_vec();
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 1;
    for (bytes, said) in [(Some(half), "bytes"), (Some(flipped), "digest"), (None, "No such file")] {
        match bytes {
            Some(bytes) => std::fs::write(&victim, bytes).unwrap(),
            None => std::fs::remove_file(&victim).unwrap(),
        }
        let left = shop.count("blobs");
        let text = refused(&arguments);
        assert!(
            text.contains(said) && text.contains(victim.file_name().unwrap().to_str().unwrap()),
            "{text}"
        );
        assert_eq!(shop.count("blobs"), left);
        assert!(!Path::new(&out).exists());
    }
    std::fs::write(&victim, whole).unwrap();

    let small = shop.path("small");
    std::fs::create_dir(&small).unwrap();
    let store = serde_json::json!({ "dir": blobs }).to_string();
    match mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k")) {
        Ok(()) => {}
        Err(error) => {
            eprintln!("full disk skipped: {error}");
            return;
        }
    }
    let full = shop.at("small");
    let output = nydus_image(&[
        "compact",
        "--log-level",
        "warn",
        "-B",
        &boot,
        "-D",
        &full,
        "-O",
        &out,
        "--backend-type",
        "localfs",
        "--backend-config",
        &store,
    ]);
    let left = shop.count("small");
    umount2(&small, MntFlags::MNT_DETACH).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("No space left"), "{said}");
    assert_eq!((left, Path::new(&out).exists()), (0, false));
}

#[test]
fn a_damaged_file_of_the_new_name_is_replaced() {
    let shop = Workshop::open();
    shop.image("boot", &[files("d", 0, 9), files("e", 5, 9)], &["--chunk-size", "0x1000"]);
    assert!(compact(&shop, "boot", "new", &[]));
    let path = shop.path("blobs").join(&shop.blobs("new")[0]);
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[100] ^= 1;
    for bytes in [&whole[..100], &flipped] {
        std::fs::write(&path, bytes).unwrap();
        assert!(compact(&shop, "boot", "new", &[]));
        assert!(std::fs::read(&path).unwrap() == whole);
        assert_eq!(shop.archive("new"), shop.archive("boot"));
    }
}

/// What stands for a chunk that is given up must be good itself.
#[test]
fn a_damaged_copy_stands_for_no_chunk() {
    let shop = Workshop::open();
    // Files of d and e have the same content; the first blob is sparse, the second one all in use.
    let hidden = (10..100).map(|n| (format!("d/{n}"), Vec::new()));
    let upper: Vec<File> = files("e", 0, 40).into_iter().chain(hidden).collect();
    let flags = ["--chunk-size", "0x1000", "--compressor", "none"];
    shop.image("boot", &[files("d", 0, 100), upper], &flags);
    let settings = ["--compact-blob-size", "0", "--min-used-ratio", "50"];
    assert!(compact(&shop, "boot", "new", &settings));
    let stays = shop.blobs("boot-1").remove(0);
    assert_eq!(shop.blobs("new"), std::slice::from_ref(&stays), "what is in both needs no new blob");
    let victim = shop.path("blobs").join(&stays);
    let whole = std::fs::read(&victim).unwrap();
    let mut flipped = whole.clone();
    flipped[5] ^= 1;
    for bytes in [Some(flipped), None] {
        match bytes {
            Some(bytes) => std::fs::write(&victim, bytes).unwrap(),
            None => std::fs::remove_file(&victim).unwrap(),
        }
        assert!(compact(&shop, "boot", "new", &settings));
        assert_eq!(shop.blobs("new").len(), 2);
        let used = shop.opened("new").blobs().iter().map(|blob| blob.id.to_string()).find(|id| *id != stays);
        let moved = shop.path("blobs").join(used.unwrap());
        let moved = std::fs::read(moved).unwrap();
        assert!((0..10).all(|n| moved.windows(0x1000).any(|bytes| bytes == piece(n))));
        std::fs::write(&victim, &whole).unwrap();
        assert_eq!(shop.archive("new"), shop.archive("boot"));
    }
}

/// A copy that was cut off does not hide the blob of the backend.
#[test]
fn a_short_file_is_passed_over_for_the_backend() {
    let shop = Workshop::open();
    shop.image("boot", &[files("d", 0, 9), files("e", 5, 9)], &["--chunk-size", "0x1000"]);
    std::fs::rename(shop.path("blobs"), shop.path("store")).unwrap();
    std::fs::create_dir(shop.path("blobs")).unwrap();
    let short = shop.path("blobs").join(&shop.blobs("boot")[0]);
    std::fs::write(&short, b"short").unwrap();
    let store = serde_json::json!({ "dir": shop.at("store") }).to_string();
    assert!(compact(&shop, "boot", "new", &["--backend-type", "localfs", "--backend-config", &store]));
    for blob in shop.blobs("boot") {
        std::fs::copy(shop.path("store").join(&blob), shop.path("blobs").join(&blob)).unwrap();
    }
    assert_eq!(shop.archive("new"), shop.archive("boot"));
    // Nothing else is the matter with what can not even be looked for.
    std::fs::remove_file(&short).unwrap();
    std::os::unix::fs::symlink(&short, &short).unwrap();
    let (boot, blobs) = (shop.at("boot"), shop.at("blobs"));
    let arguments = ["compact", "-B", &boot, "-D", &blobs, "--backend-type", "localfs"];
    let said = refused(&[&arguments[..], &["--backend-config", &store]].concat());
    assert!(said.contains(short.to_str().unwrap()), "{said}");
}

#[test]
fn files_of_earlier_runs_are_told_apart() {
    let shop = Workshop::open();
    shop.layer("boot", &files("d", 0, 2), &[]);
    std::fs::write(shop.path("list"), r#"{"version": "v1", "files": []}"#).unwrap();
    let (boot, blobs, list) = (shop.at("boot"), shop.at("blobs"), shop.at("list"));
    let (out, json) = (shop.at("out"), shop.at("json"));
    for command in [&["compact"][..], &["optimize", "-p", &list]] {
        let flags = ["-B", &boot, "-D", &blobs, "-O", &out, "-J", &json, "--log-level", "warn"];
        let run = || {
            let output = nydus_image(&[command, &flags].concat());
            assert_eq!(output.status.code(), Some(0));
            String::from_utf8(output.stderr).unwrap()
        };
        for path in [&out, &json] {
            let _ = std::fs::remove_file(path);
        }
        assert_eq!(run(), "", "{command:?}");
        assert!(!Path::new(&out).exists() && !Path::new(&json).exists());
        for path in [&out, &json] {
            std::fs::write(path, b"old").unwrap();
        }
        let said = run();
        assert!([&out, &json].iter().all(|path| said.contains(*path)), "{command:?}: {said}");
        assert!([&out, &json].iter().all(|path| std::fs::read(path).unwrap() == b"old"));
    }
}

/// After a power cut a bootstrap never names a blob that has no name yet.
#[test]
fn blobs_are_durable_before_the_bootstrap_is_named() {
    let shop = Workshop::open();
    shop.image("boot", &[files("d", 0, 9), files("e", 5, 9)], &["--chunk-size", "0x1000"]);
    std::fs::create_dir(shop.path("out")).unwrap();
    let (boot, blobs, out, log) = (shop.at("boot"), shop.at("blobs"), shop.at("out/new"), shop.at("calls"));
    let calls = "trace=fsync,fdatasync,rename,renameat,renameat2,link,linkat";
    let traced = std::process::Command::new("strace")
        .args(["-f", "-y", "-e", calls, "-o", &log, env!("CARGO_BIN_EXE_nydus-image")])
        .args(["compact", "--log-level", "warn", "-B", &boot, "-D", &blobs, "-O", &out])
        .status();
    match traced {
        Ok(status) => assert!(status.success()),
        Err(error) => {
            eprintln!("skipped: strace: {error}");
            return;
        }
    }
    let log = std::fs::read_to_string(log).unwrap();
    let blob = shop.path("blobs").join(&shop.blobs("out/new")[0]);
    let at = |call: &str, what: String| {
        let line = log.lines().position(|line| line.contains(call) && line.contains(&what));
        line.unwrap_or_else(|| panic!("no {call} of {what}:\n{log}"))
    };
    let steps = [
        at("fdatasync", format!("{blobs}/.nydus-image-")),
        at("rename", format!("\"{}\"", blob.display())),
        at("fsync", format!("<{blobs}>")),
        at("rename", format!("\"{out}\"")),
        at("fsync", format!("<{}>", shop.at("out"))),
    ];
    assert!(steps.is_sorted(), "{steps:?}:\n{log}");
}

#[test]
fn misuse_is_named() {
    let shop = Workshop::open();
    shop.layer("boot", &files("d", 0, 2), &[]);
    let (boot, blobs) = (shop.at("boot"), shop.at("blobs"));
    for (flags, code, said) in [
        (&["--min-used-ratio", "100"][..], 2, "--min-used-ratio"),
        (&["--compact-blob-size", "many"], 1, "--compact-blob-size"),
        (&["--chunk-dict", "/nonexistent"], 1, "/nonexistent"),
        (&["--backend-type", "localfs"], 1, "--backend-config"),
    ] {
        let output = nydus_image(&[&["compact", "-B", &boot, "-D", &blobs], flags].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {text}");
        assert!(text.contains(said), "{flags:?}: {text}");
    }
    assert_eq!(nydus_image(&["compact", "-B", &boot]).status.code(), Some(2), "--blob-dir is needed");
}
