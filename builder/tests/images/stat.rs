//! `nydus-image stat`: the numbers add up, and say what images share.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::golden;

fn stat(arguments: &[&Path]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("out.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    command.args(["stat", "--log-level", "warn", "-J"]).arg(&json).args(arguments);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

fn number(image: &Value, member: &str) -> u64 {
    image[member].as_u64().unwrap_or_else(|| panic!("{member} of {image}"))
}

#[test]
fn the_numbers_add_up() {
    let (boot, upper) = (golden("zstd-4k/image.boot"), golden("chunkdict/image.boot"));
    let found = stat(&[Path::new("-B"), &boot, Path::new("-T"), &upper]);
    assert_eq!((&found["dedup_enabled"], &found["target_enabled"]), (&false.into(), &true.into()));
    for name in ["base_image", "target_image"] {
        let image = &found[name];
        for member in ["chunks", "comp_size", "uncomp_size"] {
            let parts = ["own", "dedup", "ref"].map(|kind| number(image, &format!("{kind}_{member}")));
            assert_eq!(number(image, member), parts.iter().sum::<u64>(), "{member} of {name}");
        }
        assert_eq!(number(image, "uncomp_size"), number(image, "file_size"));
        let sum = |member: &str, len: usize| {
            let list = image[member].as_array().unwrap();
            assert_eq!(list.len(), len);
            list.iter().map(|n| n.as_u64().unwrap()).sum::<u64>()
        };
        assert_eq!(sum("chunk_sizes", 9), number(image, "chunks"));
        assert_eq!(sum("file_sizes", 45), number(image, "files"));
    }
    // The base stores each of its chunks once; the other image was built to use them.
    let opened = builder::image::open(&boot).unwrap().bootstrap;
    assert_eq!(number(&found["base_image"], "own_chunks"), u64::from(opened.blobs()[0].chunk_count));
    assert_eq!(number(&found["base_image"], "ref_chunks"), 0);
    assert!(number(&found["target_image"], "ref_chunks") > 0);
    // An image shares everything with itself.
    let same = stat(&[Path::new("-B"), &boot, Path::new("-T"), &boot]);
    assert_eq!(number(&same["target_image"], "ref_chunks"), number(&same["base_image"], "chunks"));
}

#[test]
fn a_directory_of_images_is_one_base() {
    let dir = tempfile::tempdir().unwrap();
    for (name, image) in
        [("a", "zstd-4k/image.boot"), ("b", "zstd-4k/image.boot"), ("c", "inline-toc/layer.blob")]
    {
        std::fs::copy(golden(image), dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join("d"), "no bootstrap").unwrap();
    let one = stat(&[Path::new("-B"), &golden("zstd-4k/image.boot")]);
    let all = stat(&[Path::new("-D"), dir.path()]);
    assert_eq!(all["dedup_enabled"], true);
    let (one, all) = (&one["base_image"], &all["base_image"]);
    assert_eq!(number(all, "files"), 3 * number(one, "files"));
    assert!(number(all, "ref_chunks") >= number(one, "chunks"), "the second adds nothing of its own");
}

/// A blob with its bootstrap inside is as good as the bootstrap.
#[test]
fn check_and_inspect_take_blobs() {
    let blob = golden("inline-toc/layer.blob");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
        command.args(arguments).arg(&blob).stdin(Stdio::null()).output().unwrap()
    };
    let count = builder::image::open(&blob).unwrap().bootstrap.summary().inode_count;
    let inspected = run(&["inspect", "-R", "stats"]);
    assert_eq!(String::from_utf8_lossy(&inspected.stdout), format!("{{\"inodes_count\":{count}}}"));
    let checked = run(&["check", "--log-level", "warn", "--blob", blob.to_str().unwrap()]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    assert!(String::from_utf8_lossy(&checked.stdout).contains("match their digests, 0 faults"));
}

/// Lines on a pipe are answered one by one; the prompt is for people only.
#[test]
fn the_shell_works_through_a_pipe() {
    use std::io::Write as _;
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    command.args(["inspect", "--log-level", "warn"]).arg(golden("zstd-4k/image.boot"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = b"cd files\nls\nnonsense\nstat one_byte\ncd nowhere\nexit\nstats\n";
    child.stdin.take().unwrap().write_all(lines).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("Inspecting"), "{text}");
    for part in ["one_byte", "icheck INODE", "size    1\n", "nowhere"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("inodes_count"), "exit leaves: {text}");
}
