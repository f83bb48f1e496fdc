//! `nydus-image` as its clients run it: arguments, streams, exit codes, files.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::golden;

fn nydus_image(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    command.current_dir(dir).args(arguments).stdin(Stdio::null());
    command
}

fn run(dir: &Path, arguments: &[&str]) -> Output {
    nydus_image(dir, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

/// A small source directory.
fn source() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("src/sub")).unwrap();
    std::fs::write(dir.path().join("src/a"), vec![b'a'; 10_000]).unwrap();
    std::fs::write(dir.path().join("src/sub/b"), "b").unwrap();
    dir
}

#[test]
fn create_check_and_inspect_agree() {
    agree("6");
}

#[test]
fn create_check_and_inspect_agree_about_v5() {
    agree("5");
}

fn agree(version: &str) {
    let dir = source();
    let at = dir.path();
    let made = [
        "create",
        "--log-level",
        "warn",
        "-B",
        "boot",
        "-D",
        "blobs",
        "-J",
        "out.json",
        "-v",
        version,
        "src",
    ];
    let made = run(at, &made);
    assert_eq!((code(&made), text(&made.stderr)), (0, String::new()));
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(at.join("out.json")).unwrap()).unwrap();
    let blob = json["blobs"][0].as_str().unwrap();
    assert!(at.join("blobs").join(blob).exists());
    assert_eq!(json["bootstrap"], "boot");
    assert_eq!((&json["fs_version"], &json["compressor"]), (&version.into(), &"zstd".into()));
    let root = json["root"].as_str().unwrap();

    let checked = run(at, &["check", "-B", "boot", "-D", "blobs", "--source", "src", "--expect-root", root]);
    assert_eq!((code(&checked), text(&checked.stderr)), (0, String::new()));
    assert!(text(&checked.stdout).contains(blob));

    for request in ["-R blobs", "--request=blobs"] {
        let asked = run(at, &["inspect", request, "boot"]);
        assert_eq!(text(&asked.stderr), "");
        let json: serde_json::Value = serde_json::from_slice(&asked.stdout).unwrap();
        assert_eq!(json[0]["blob_id"], blob);
    }
    assert_eq!(text(&run(at, &["inspect", "boot", "-R", "stats"]).stdout), r#"{"inodes_count":4}"#);
    assert_eq!(code(&run(at, &["inspect", "boot", "-R", "nonsense"])), 1);

    // One changed file, one changed byte of the blob, another root: each is a no.
    std::fs::write(at.join("src/sub/b"), "c").unwrap();
    let compared = run(at, &["check", "boot", "--source", "src"]);
    assert_eq!(code(&compared), 1);
    assert!(text(&compared.stderr).contains("\"sub/b\": bytes 0 to 1 differ"));
    let other = root.replace(&root[10..14], "0000");
    assert_eq!(code(&run(at, &["check", "boot", "--expect-root", &other])), 1);
    let path = at.join("blobs").join(blob);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[3] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = run(at, &["check", "boot", "-D", "blobs"]);
    assert_eq!(code(&damaged), 1);
    assert!(text(&damaged.stderr).contains("chunk 0"), "{}", text(&damaged.stderr));
}

#[test]
fn a_proof_holds_without_the_image() {
    let dir = source();
    assert_eq!(
        code(&run(dir.path(), &["create", "-l", "warn", "-B", "boot", "-b", "blob", "-J", "j", "src"])),
        0
    );
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("j")).unwrap()).unwrap();
    let root = json["root"].as_str().unwrap().parse().unwrap();
    let proven = run(dir.path(), &["check", "boot", "--prove", "/sub/b"]);
    let proof: rafs::merkle::Proof = serde_json::from_slice(&proven.stdout).unwrap();
    assert_eq!(proof.path(), "sub/b");
    proof.verify(&root).unwrap();
    assert_eq!(code(&run(dir.path(), &["check", "boot", "--prove", "/none"])), 1);
}

#[test]
fn converters_build_and_merge_through_fifos() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for name in ["in", "out"] {
        nix::unistd::mkfifo(&at.join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let arguments = [
        "create",
        "--log-level",
        "warn",
        "--prefetch-policy",
        "fs",
        "--blob",
        "out",
        "--whiteout-spec",
        "none",
        "--fs-version",
        "6",
        "--type",
        "tar-rafs",
        "--blob-inline-meta",
        "--features",
        "blob-toc",
        "in",
    ];
    let mut child = nydus_image(at, &arguments).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"/\n").unwrap();
    let (tar, to) = (golden("src/mini.tar.gz"), at.join("in"));
    let feeder = std::thread::spawn(move || std::fs::copy(tar, to).unwrap());
    let layer = std::fs::read(at.join("out")).unwrap();
    feeder.join().unwrap();
    assert!(child.wait().unwrap().success());

    let digest = storage::digest::DigestAlgorithm::Sha256.digest(&layer).to_string();
    let sections = crate::common::sections(&layer);
    assert_eq!(sections[0].0, "rafs.blob.toc");
    let (_, boot) = sections.iter().find(|(name, _)| name == "image.boot").unwrap();
    std::fs::write(at.join(&digest), zstd::decode_all(*boot).unwrap()).unwrap();
    let merged = run(at, &["merge", "-l", "warn", "-B", "merged", "-J", "j", &digest]);
    assert_eq!((code(&merged), text(&merged.stderr)), (0, String::new()));
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(at.join("j")).unwrap()).unwrap();
    assert_eq!(json["blobs"], serde_json::json!([digest]));

    // The merged bootstrap finds its data in the layer's file.
    std::fs::create_dir(at.join("blobs")).unwrap();
    std::fs::write(at.join("blobs").join(&digest), &layer).unwrap();
    let tar = golden("src/mini.tar");
    let arguments = ["check", "merged", "-D", "blobs", "--source", tar.to_str().unwrap()];
    let checked = run(at, &arguments);
    assert_eq!((code(&checked), text(&checked.stderr)), (0, String::new()));
}

#[test]
fn usage_is_2_and_what_is_not_built_is_refused_by_name() {
    let dir = source();
    let at = dir.path();
    for (arguments, want, says) in [
        (
            &["create", "--blob-dir", "x", "--blob-cache-dir", "y", "src"][..],
            2,
            "argument '--blob-dir <blob-dir>' cannot be used with '--blob-cache-dir <blob-cache-dir>'",
        ),
        (&["create", "--blob-inline-meta", "-B", "x", "-b", "y", "src"], 2, "cannot be used with"),
        (&["create", "src"], 2, "--bootstrap"),
        (&["create", "-B", "x", "src"], 1, "--blob"),
        (&["create", "--type", "what", "-B", "x", "-b", "y", "src"], 2, "what"),
        (
            &["create", "--type", "tar-tarfs", "-B", "x", "--blob-cache-dir", "y", "src"],
            1,
            "conversion type `tar-tarfs` conflicts with `--blob-cache-dir`",
        ),
        (&["create", "--type", "estargztoc-ref", "-B", "x", "-D", "y", "src"], 1, "`--blob-id`"),
        (
            &["create", "--type", "targz-ref", "--encrypt", "-B", "x", "-D", "y", "src"],
            1,
            "conversion type `targz-ref` conflicts with `--encrypt`",
        ),
        (&["create", "--type", "targz-ref", "--blob-id", "a", "-B", "x", "-D", "y", "src"], 1, "`--blob-id`"),
        (&["create", "--type", "tar-tarfs", "-b", "z", "-B", "x", "-D", "y", "src"], 1, "`--blob`"),
        (&["create", "--chunk-size", "0x1800", "-B", "x", "-b", "y", "src"], 1, "power of two"),
        (&["create", "--batch-size", "0x1800", "-B", "x", "-b", "y", "src"], 1, "--batch-size"),
        (&["create", "--batch-size", "0x200000", "-B", "x", "-b", "y", "src"], 1, "--batch-size"),
        (
            &["create", "-v", "5", "--features", "blob-toc", "-B", "x", "-b", "y", "src"],
            1,
            "`--features blob-toc`",
        ),
        (
            &["create", "-v", "5", "--batch-size", "0x1000", "-B", "x", "-b", "y", "src"],
            1,
            "`--batch-size` needs",
        ),
        (&["create", "-v", "5", "--encrypt", "-B", "x", "-b", "y", "src"], 1, "`--encrypt` needs RAFS v6"),
        (
            &["create", "-v", "5", "--type", "targz-ref", "-B", "x", "-D", "y", "src"],
            1,
            "`targz-ref` needs RAFS v6",
        ),
        (
            &["create", "-v", "5", "--type", "tar-tarfs", "-B", "x", "-D", "y", "src"],
            1,
            "`tar-tarfs` needs RAFS v6",
        ),
        (&["create", "--chunk-dict", "bootstrap=z", "-B", "x", "-b", "y", "src"], 1, "--chunk-dict"),
        (&["create", "--chunk-dict", "what=z", "-B", "x", "-b", "y", "src"], 1, "only bootstrap=FILE"),
        (&["create", "-B", "x", "-b", "y", "nowhere"], 1, "nowhere"),
        (&["unpack", "-B", "x", "--output", "y"], 1, "open x"),
        (&["merge", "-B", "x", "--blob-sizes", "1,2", "src"], 1, "--blob-sizes"),
        (&["nonsense"], 2, "nonsense"),
    ] {
        let output = run(at, arguments);
        assert_eq!(code(&output), want, "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(says), "{arguments:?}: {}", text(&output.stderr));
    }
    // Nothing was left behind.
    assert_eq!(std::fs::read_dir(at).unwrap().count(), 1);

    let images = [golden("none-4k/image.boot"), golden("none-1m/image.boot")];
    let arguments = ["merge", "-B", "x", images[0].to_str().unwrap(), images[1].to_str().unwrap()];
    let output = run(at, &arguments);
    assert_eq!(code(&output), 2);
    assert!(text(&output.stderr).starts_with("Error: "));
}

#[test]
fn an_empty_tree_has_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    std::fs::create_dir(at.join("src")).unwrap();
    std::fs::write(at.join("blob"), "old").unwrap();
    assert_eq!(code(&run(at, &["create", "-l", "warn", "-B", "boot", "-b", "blob", "-J", "j", "src"])), 0);
    assert!(!at.join("blob").exists());
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(at.join("j")).unwrap()).unwrap();
    assert_eq!(json["blobs"], serde_json::json!([]));
    assert_eq!(code(&run(at, &["check", "boot"])), 0);
    // With everything in one file that file is made all the same.
    let arguments =
        ["create", "-l", "warn", "--blob-inline-meta", "--features", "blob-toc", "-b", "all", "src"];
    assert_eq!(code(&run(at, &arguments)), 0);
    let all = std::fs::read(at.join("all")).unwrap();
    let names: Vec<_> = crate::common::sections(&all).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["rafs.blob.toc", "image.boot"]);
}

#[test]
fn versions_and_help_are_what_clients_parse() {
    let at = Path::new("/");
    let version = text(&run(at, &["--version"]).stdout);
    let lines: Vec<_> = version.trim_start_matches('\r').lines().collect();
    for (line, label) in lines.iter().zip(["Version:", "Git Commit:", "Build Time:", "Profile:", "Rustc:"]) {
        let value = line.strip_prefix(label).unwrap_or_else(|| panic!("{line:?}"));
        assert!(!value.trim().is_empty());
    }
    assert_eq!(lines.len(), 5);
    let help = run(at, &["create", "-h"]);
    assert_eq!(code(&help), 0);
    for word in ["--type", "tar-rafs", "--batch-size", "--encrypt"] {
        assert!(text(&help.stdout).contains(word), "{word}");
    }
    assert_eq!(code(&run(at, &[])), 0);
}
