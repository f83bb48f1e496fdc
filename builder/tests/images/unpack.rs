//! Images unpacked: the archive holds the image's tree and nothing else.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use builder::create::{LayerSource, read_layers};
use builder::overlay::WhiteoutSpec;
use builder::pipeline::DataOptions;
use builder::root::{RootOptions, image_root};
use rafs::bootstrap::Bootstrap;
use rafs::format::features::ImageFlags;
use storage::codec::Codec;
use storage::digest::{DigestAlgorithm, TaggedDigest};

use crate::common::{build, golden, options, unpacked};

/// Blobs of golden images under the names that bootstraps know.
fn blobs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for variant in std::fs::read_dir(golden("")).unwrap() {
        for file in ["image.blob", "layer.blob", "rafs.blob", "mini.tar", "mini.tar.gz"] {
            let path = variant.as_ref().unwrap().path().join(file);
            let Ok(bytes) = std::fs::read(&path) else { continue };
            let name = DigestAlgorithm::Sha256.digest(&bytes).to_string();
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
    }
    dir
}

fn unpack(arguments: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    command.args(["unpack", "--log-level", "warn", "--output", "-"]).args(arguments);
    command.stdin(Stdio::null()).output().unwrap()
}

fn archive(arguments: &[&Path]) -> Vec<u8> {
    let output = unpack(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The root digest of what `source` holds, as an image like `bootstrap` would have it.
fn root_like(bootstrap: &dyn Bootstrap, source: LayerSource<'_>) -> TaggedDigest {
    let summary = bootstrap.summary();
    let (digester, chunk_size) = (summary.digester, summary.chunk_size);
    let data = DataOptions { digester, ..options(Codec::None, chunk_size).data };
    let (tree, content) = read_layers(vec![source], data, WhiteoutSpec::None).unwrap();
    let explicit_ids = summary.flags.contains(ImageFlags::EXPLICIT_UID_GID);
    image_root(&tree, &content, RootOptions { digester, chunk_size, explicit_ids }).unwrap()
}

fn tar_source(archive: &[u8]) -> LayerSource<'static> {
    LayerSource::Tar { name: "unpacked".into(), input: Box::new(std::io::Cursor::new(archive.to_vec())) }
}

#[test]
fn every_kind_of_image_unpacks_to_its_tree() {
    let blobs = blobs();
    for variant in [
        "default/image.boot",
        "zstd-4k/image.boot",
        "lz4-1m/image.boot",
        "lz4-4k/image.boot",
        "none-4k/image.boot",
        "none-1m/image.boot",
        "toc-sha256/image.boot",
        "batch/image.boot",
        "prefetch/image.boot",
        "parent/image.boot",
        "merged/image.boot",
        "chunkdict/image.boot",
        "tar-rafs/image.boot",
        "empty/image.boot",
        "inline-toc/layer.blob",
        "upper-inline-toc/layer.blob",
        "inline-old/layer.blob",
        "encrypt/image.boot",
        "zran/image.boot",
        "v5/image.boot",
        "v5-inline/layer.blob",
    ] {
        let path = golden(variant);
        let opened = builder::image::open(&path).unwrap();
        // A blob with a table of content is not named by all of its bytes.
        let own = path.with_file_name("image.blob");
        let archive = match opened.bootstrap.blobs().len() {
            1 if own.exists() => archive(&[&path, Path::new("--blob"), &own]),
            _ => archive(&[&path, Path::new("--blob-dir"), blobs.path()]),
        };
        let root = rafs::merkle::image_root(&*opened.bootstrap).unwrap();
        assert_eq!(root_like(&*opened.bootstrap, tar_source(&archive)), root, "{variant}");
    }
}

#[test]
fn tar_extracts_what_the_image_was_made_from() {
    let Some(tree) = unpacked("tree") else { return };
    let (boot, blob) = (golden("lz4-4k/image.boot"), golden("lz4-4k/image.blob"));
    let dir = tempfile::tempdir().unwrap();
    let (archived, out) = (dir.path().join("archive.tar"), dir.path().join("out"));
    std::fs::write(&archived, archive(&[&boot, Path::new("--blob"), &blob])).unwrap();
    std::fs::create_dir(&out).unwrap();
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-xpf"])
        .args([&archived, Path::new("-C"), &out])
        .status();
    assert!(status.unwrap().success());
    let opened = builder::image::open(&boot).unwrap();
    let root = |path: &Path| root_like(&*opened.bootstrap, LayerSource::Directory(path));
    assert_eq!(root(&out), root(tree.path()));
    let names = String::from_utf8(Command::new("tar").arg("-tf").arg(&archived).output().unwrap().stdout);
    assert!(names.unwrap().lines().all(|name| !name.starts_with("./") && !name.starts_with('/')));
}

/// An archive from the tar crate, which knows nothing of ours: numbers at their limits, names of
/// every length, many small files, large ones, hard links.
fn wild_archive() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, data: &[u8], tweak: &dyn Fn(&mut tar::Header)| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(data.len() as u64);
        tweak(&mut header);
        tar.append_data(&mut header, path, data).unwrap();
    };
    let file = tar::EntryType::Regular;
    for length in [1, 98, 99, 100, 101, 155, 200, 255] {
        add(&"n".repeat(length), file, &[7; 3], &|_| {});
        add(
            &format!("{}/{}", "d".repeat(length), "f".repeat(length)),
            file,
            &vec![length as u8; 5000],
            &|_| {},
        );
    }
    for uid in [0o7_777_777u64, 0o10_000_000, u64::from(u32::MAX) - 1] {
        add(&format!("owner{uid}"), file, b"", &|header| {
            header.set_uid(uid);
            header.set_gid(uid - 1);
        });
    }
    for mtime in [0, 0o77_777_777_777, 0o100_000_000_000u64] {
        add(&format!("time{mtime}"), file, b"", &|header| header.set_mtime(mtime));
    }
    add("ümlaut", file, b"x", &|_| {});
    add("null", tar::EntryType::Char, b"", &|header| {
        header.set_device_major(4095).unwrap();
        header.set_device_minor(1_048_575).unwrap();
    });
    add("fifo", tar::EntryType::Fifo, b"", &|_| {});
    let large: Vec<u8> = (0..9_000_001u32).map(|i| (i >> 9) as u8 ^ (i % 251) as u8).collect();
    for n in 0..3 {
        add(&format!("large{n}"), file, &large[n..], &|_| {});
    }
    for n in 0..2000u32 {
        add(&format!("small/{n}"), file, &n.to_le_bytes().repeat(n as usize % 7 * 100), &|_| {});
    }
    for (name, target) in [("large0.link", "large0"), ("a-link", "small/7")] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Link);
        header.set_size(0);
        tar.append_link(&mut header, name, target).unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn a_wild_tree_comes_back() {
    let wild = wild_archive();
    for (codec, chunk_size) in [(Codec::Zstd, 0x1000), (Codec::Lz4Block, 0x10_0000)] {
        let (built, blob) = build(tar_source(&wild), &options(codec, chunk_size));
        let dir = tempfile::tempdir().unwrap();
        let (boot, data) = (dir.path().join("boot"), dir.path().join("blob"));
        std::fs::write(&boot, &built.bootstrap).unwrap();
        std::fs::write(&data, &blob).unwrap();
        let opened = builder::image::open(&boot).unwrap();
        let first = archive(&[&boot, Path::new("--blob"), &data]);
        assert_eq!(root_like(&*opened.bootstrap, tar_source(&first)), built.root);
        assert_eq!(first, archive(&[&boot, Path::new("--blob"), &data]), "twice, two archives");

        // A flipped bit anywhere is found before it leaves, and named.
        let mut damaged = blob.clone();
        let middle = opened.bootstrap.blobs()[0].data_size as usize / 2;
        damaged[middle] ^= 1;
        std::fs::write(&data, damaged).unwrap();
        let output = unpack(&[&boot, Path::new("--blob"), &data]);
        assert_eq!(output.status.code(), Some(1));
        assert!(first.starts_with(&output.stdout) && output.stdout.len() < first.len());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("blob"), "{said}");
    }
}

#[test]
fn what_can_not_be_unpacked_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let boot = golden("merged/image.boot");
    let out = dir.path().join("out.tar");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
        command.arg("unpack").args(arguments).arg(&boot).stdin(Stdio::null());
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let to = out.to_str().unwrap();
    for (arguments, code, said) in [
        (&["--output", to][..], 1, "--blob-dir"),
        (&["--output", to, "--blob", "x"], 1, "2 blobs"),
        (&["--output", to, "--blob-dir", "/nonexistent"], 1, "/nonexistent"),
        (&[], 2, "--output"),
        (&["--output", to, "--backend-type", "carrier-pigeon"], 2, "http-proxy"),
        (&["--output", to, "--backend-type", "localfs"], 1, "--backend-config"),
        (&["--output", to, "--backend-type", "localfs", "--backend-config", "{}"], 1, "blob_file"),
        (&["--output", to, "--backend-type", "localfs", "--backend-config", "{"], 1, "JSON"),
        (&["--output", to, "--backend-config", "{}"], 2, "--backend-type"),
    ] {
        let (found, text) = run(arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {text}");
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something half-written is left");
}
