//! Exported disks before their judges: the format's own rule, the kernel, and veritysetup.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rafs::bootstrap::Bootstrap;
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::ChunkIndex;

use crate::common::{golden, options};
use builder::create::{LayerSource, read_layers};
use builder::overlay::WhiteoutSpec;
use builder::root::{RootOptions, image_root};
use rafs::format::features::ImageFlags;

fn export(arguments: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    command.args(["export", "--block", "--log-level", "warn"]).args(arguments);
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A directory with the one blob of a golden image under its id, not in /tmp: the kernel mounts a disk there.
fn blob_dir(bootstrap: &dyn Bootstrap, blob: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let id = bootstrap.blobs()[0].id.to_string();
    std::fs::copy(golden(blob), dir.path().join(id)).unwrap();
    dir
}

/// What the format says a flat disk is: the bootstrap, and each blob decoded where its slot says.
fn flat(boot: &[u8], bootstrap: &dyn Bootstrap, blob: &[u8]) -> Vec<u8> {
    let info = &bootstrap.blobs()[0];
    let number = |at: usize| u32::from_le_bytes(boot[at..at + 4].try_into().unwrap()) as usize;
    let (blocks, mapped) = (number(1408 + 64), number(1408 + 68));
    let mut disk = boot.to_vec();
    disk.resize((mapped + blocks) * 4096, 0);
    for index in (0..info.chunk_count).map(ChunkIndex) {
        let chunk = bootstrap.chunk_info(0, index).unwrap();
        let stored = &blob[chunk.compressed_offset.get() as usize..][..chunk.compressed_size.get() as usize];
        let codec = if chunk.flags.get() & 1 == 1 { info.codec } else { Codec::None };
        let to = mapped * 4096 + chunk.uncompressed_offset.get() as usize;
        let to = &mut disk[to..][..chunk.uncompressed_size.get() as usize];
        storage::codec::decompress(codec, stored, to).unwrap();
    }
    disk
}

#[test]
fn a_disk_is_what_the_format_says() {
    for variant in ["zstd-4k", "default", "lz4-1m"] {
        let boot = golden(&format!("{variant}/image.boot"));
        let blob = format!("{variant}/image.blob");
        let opened = builder::image::open(&boot).unwrap().bootstrap;
        let dir = blob_dir(&*opened, &blob);
        let done = export(&[Path::new("-B"), &boot, Path::new("-D"), dir.path()]);
        assert_eq!(
            (done.status.code(), text(&done.stdout), text(&done.stderr)),
            (Some(0), "".into(), "".into())
        );
        let want = flat(&std::fs::read(&boot).unwrap(), &*opened, &std::fs::read(golden(&blob)).unwrap());
        let found = std::fs::read(dir.path().join("image.boot.disk")).unwrap();
        let differs = found.iter().zip(&want).position(|(a, b)| a != b);
        assert!(
            differs.is_none() && found.len() == want.len(),
            "{variant}: {differs:?}, {} bytes",
            found.len()
        );
    }
}

/// A mount that ends with the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn the_kernel_mounts_a_disk_and_sees_the_tree() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    for (image, blob) in [("zstd-4k/image.boot", "zstd-4k/image.blob"), ("tarfs/image.boot", "src/mini.tar")]
    {
        let boot = golden(image);
        let opened = builder::image::open(&boot).unwrap().bootstrap;
        let dir = blob_dir(&*opened, blob);
        let disk = dir.path().join("disk");
        let done = export(&[Path::new("-B"), &boot, Path::new("-D"), dir.path(), Path::new("-O"), &disk]);
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
        let target = dir.path().join("mnt");
        std::fs::create_dir(&target).unwrap();
        let status =
            Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).args([&disk, &target]).status();
        if !status.unwrap().success() {
            eprintln!("skipped: no loop device, or a kernel without erofs");
            continue;
        }
        let mounted = Mounted(&target);
        let summary = opened.summary();
        let data = storage_options(summary.chunk_size, summary.digester);
        let root = |source| {
            let (tree, content) = read_layers(vec![source], data, WhiteoutSpec::None).unwrap();
            let explicit_ids = summary.flags.contains(ImageFlags::EXPLICIT_UID_GID);
            let options = RootOptions { digester: data.digester, chunk_size: data.chunk_size, explicit_ids };
            image_root(&tree, &content, options).unwrap()
        };
        let seen = root(LayerSource::Directory(&target));
        match opened.blobs()[0].unverified_chunks {
            0 => assert_eq!(seen, rafs::merkle::image_root(&*opened).unwrap()),
            // A tar that is a blob has no chunk digests: compared with the tar itself.
            _ => {
                let out = dir.path().join("out");
                std::fs::create_dir(&out).unwrap();
                let tar = ["--xattrs", "--xattrs-include=*", "-xpf"];
                let status = Command::new("tar").args(tar).arg(golden(blob)).arg("-C").arg(&out).status();
                assert!(status.unwrap().success());
                assert_eq!(seen, root(LayerSource::Directory(&out)));
            }
        }
        drop(mounted);
    }
}

fn storage_options(chunk_size: u32, digester: DigestAlgorithm) -> builder::pipeline::DataOptions {
    builder::pipeline::DataOptions { digester, ..options(Codec::None, chunk_size.max(0x1000)).data }
}

#[test]
fn veritysetup_accepts_the_hash_tree() {
    for (image, blob, block) in
        [("zstd-4k/image.boot", "zstd-4k/image.blob", 4096), ("tarfs/image.boot", "src/mini.tar", 512)]
    {
        let boot = golden(image);
        let opened = builder::image::open(&boot).unwrap().bootstrap;
        let dir = blob_dir(&*opened, blob);
        let disk = dir.path().join("disk");
        let place = [Path::new("-B"), &boot, Path::new("-D"), dir.path(), Path::new("-O"), &disk];
        let done = export(&[&place[..], &[Path::new("--verity")]].concat());
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
        let line = text(&done.stdout);
        let fixed = format!(
            "dm-verity options: --no-superblock --format=1 -s \"\" --hash=sha256 --data-block-size={block} \
             --hash-block-size=4096 --data-blocks "
        );
        let rest = line.strip_prefix(&fixed).and_then(|rest| rest.strip_suffix('\n')).unwrap();
        let [blocks, "--hash-offset", offset, root] = rest.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let verify = |disk: &Path| {
            Command::new("veritysetup")
                .args(["verify", "--no-superblock", "--format=1", "-s", "", "--hash=sha256"])
                .args([&format!("--data-block-size={block}"), "--hash-block-size=4096"])
                .args(["--data-blocks", blocks, "--hash-offset", offset])
                .args([disk, disk, Path::new(root)])
                .output()
        };
        let Ok(verified) = verify(&disk) else {
            eprintln!("skipped: no veritysetup");
            return;
        };
        assert!(verified.status.success(), "{image}: {}", text(&verified.stderr));
        let mut damaged = std::fs::read(&disk).unwrap();
        damaged[5000] ^= 1;
        std::fs::write(&disk, damaged).unwrap();
        assert!(!verify(&disk).unwrap().status.success());
    }
}

#[test]
fn an_entry_says_where_things_are_and_a_full_disk_leaves_nothing() {
    let boot = golden("zstd-4k/image.boot");
    let opened = builder::image::open(&boot).unwrap().bootstrap;
    let dir = blob_dir(&*opened, "zstd-4k/image.blob");
    let (entry, disk) = (dir.path().join("entry.json"), dir.path().join("disk"));
    let v1 = serde_json::json!({ "type": "bootstrap", "id": "x", "config": {
        "backend_type": "localfs", "backend_config": { "dir": dir.path() }, "metadata_path": boot } });
    let v2 = serde_json::json!({ "blobs": [{ "type": "bootstrap", "id": "x", "config_v2": { "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": dir.path() } }, "metadata_path": boot } }] });
    let mut disks = Vec::new();
    for document in [v1, v2] {
        std::fs::write(&entry, document.to_string()).unwrap();
        let done = export(&[Path::new("-C"), &entry, Path::new("-O"), &disk]);
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
        disks.push(std::fs::read(&disk).unwrap());
    }
    assert!(disks[0] == disks[1]);
    assert_eq!(export(&[Path::new("-B"), &boot]).status.code(), Some(2));

    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
    let mounted = Mounted(&small);
    let full = small.join("disk");
    let done = export(&[Path::new("-B"), &boot, Path::new("-D"), dir.path(), Path::new("-O"), &full]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("No space left"), "{}", text(&done.stderr));
    assert_eq!(std::fs::read_dir(&small).unwrap().count(), 0, "something half-written is left");
    drop(mounted);
}
