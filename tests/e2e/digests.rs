//! The image root digest: one value however the image is stored, agreed by another implementation,
//! and another value for every change.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use tests::command::run;
use tests::daemon::DaemonOptions;
use tests::image::{Entry, Image};
use tests::journey::{Journey, try_nydus_image};
use tests::{Result, bail, ensure, needs_mounts, needs_programs, recipes};

/// zstd, lz4 and none, with 1 and 2 threads: one root digest, and Python finds it in umoci's tree.
#[test]
fn one_image_has_one_root_digest() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "python3");
    let journey = Journey::start(&recipes::tiny())?;
    let mut digests = Vec::new();
    for compressor in ["zstd", "lz4_block", "none"] {
        for threads in ["1", "2"] {
            let flags = ["--compressor", compressor, "--threads", threads, "--chunk-size", "0x100000"];
            let nydus = journey.convert(&format!("{compressor}-{threads}"), &flags)?;
            digests.push((compressor, threads, nydus.root_digest()?));
        }
    }
    let (_, _, first) = &digests[0];
    assert!(digests.iter().all(|(_, _, digest)| digest == first), "{digests:#?}");
    let tree = journey.reference()?;
    let python = python_digest(&tree, 1 << 20)?;
    if &python != first {
        let bootstrap = journey.path("image.boot");
        journey.convert("compared", &[])?.save_bootstrap(&bootstrap)?;
        let found = try_nydus_image(
            "check",
            ["--bootstrap".as_ref(), bootstrap.as_os_str(), "--source".as_ref(), tree.as_os_str()],
        )?;
        bail!("tests/root_digest.py finds {python}, the builder {first}; entry by entry: {found:?}");
    }

    // The manifest repeats it, and the daemon holds an image to it.
    let nydus = journey.convert("annotated", &["--chunk-size", "0x100000"])?;
    let manifest = nydus.manifest()?.to_string();
    assert!(manifest.contains(first.as_str()), "the manifest does not name the root digest: {manifest}");
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache"));
    options.clone().flag("--expect-root", first).start()?;
    let other = format!("sha256:{}", "0".repeat(64));
    let (code, log) = options.flag("--expect-root", &other).refused()?;
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("root"), "{log}");
    Ok(())
}

/// One byte, mode, owner, xattr, name, hard link, device number, time or target: another digest.
#[test]
fn every_change_changes_the_root_digest() -> Result<()> {
    let file = || Entry::file("d/file", "content\n").xattr("user.a", "1");
    let rest = || vec![Entry::dir("./"), Entry::dir("d"), Entry::symlink("s", "d/file")];
    let with = |changed: Entry| {
        let mut entries = rest();
        entries.extend([changed, Entry::file("d/other", "content\n").xattr("user.a", "1")]);
        entries
    };
    let mut linked = rest();
    linked.extend([file(), Entry::hard_link("d/other", "d/file")]);
    let mut renamed = with(file());
    renamed[3].path = b"d/fild".to_vec();
    let mut pointed = with(file());
    pointed[2] = Entry::symlink("s", "d/files");
    let variants = [
        ("nothing", with(file())),
        ("one byte", with(Entry::file("d/file", "Content\n").xattr("user.a", "1"))),
        ("mode", with(file().mode(0o645))),
        ("uid", with(file().owner(1, 0))),
        ("gid", with(file().owner(0, 1))),
        ("xattr value", with(Entry::file("d/file", "content\n").xattr("user.a", "2"))),
        ("xattr name", with(Entry::file("d/file", "content\n").xattr("user.b", "1"))),
        ("no xattr", with(Entry::file("d/file", "content\n"))),
        ("nanoseconds", with(file().mtime(tests::image::MTIME, 1))),
        ("name", renamed),
        ("target", pointed),
        ("hard link", linked),
    ];
    let mut seen = std::collections::BTreeMap::new();
    for (name, entries) in variants {
        let journey = Journey::start(&Image::new(vec![entries]))?;
        let digest = journey.convert("nydus", &[])?.root_digest()?;
        if let Some(other) = seen.insert(digest, name) {
            panic!("{name} and {other} have one root digest");
        }
    }
    Ok(())
}

/// `check` recomputes the root digest, compares the image with its source, and refuses another
/// expectation.
#[test]
fn check_recomputes_the_root_digest() -> Result<()> {
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let bootstrap = journey.path("image.boot");
    nydus.save_bootstrap(&bootstrap)?;
    let check = |flags: &[&str]| {
        let mut arguments = vec!["--bootstrap".into(), bootstrap.clone().into_os_string()];
        arguments.extend(flags.iter().map(|flag| flag.into()));
        try_nydus_image("check", arguments)
    };
    let (root, source) = (nydus.root_digest()?, journey.source.reference());
    let blobs = nydus.path().join("blobs/sha256").display().to_string();
    let finished = check(&["--expect-root", &root, "--source", &source, "--blob-dir", &blobs])?;
    ensure!(finished.code == Some(0) && finished.stdout.contains(&root), "{finished:?}");
    let finished = check(&["--prove", "/etc/added"])?;
    ensure!(finished.code == Some(0) && finished.stdout.contains(&root), "{finished:?}");

    let other = format!("sha256:{}", "0".repeat(64));
    let finished = check(&["--expect-root", &other])?;
    ensure!(finished.code == Some(1) && finished.stderr.contains(&root), "{finished:?}");
    let another = Journey::start(&Image::new(vec![vec![Entry::dir("./"), Entry::file("etc", "")]]))?;
    let finished = check(&["--source", &another.source.reference()])?;
    ensure!(finished.code == Some(1), "{finished:?}");
    let said = format!("{}{}", finished.stdout, finished.stderr);
    ensure!(said.contains("etc"), "the first differences are not named: {said}");
    Ok(())
}

fn python_digest(root: &Path, chunk_size: u32) -> Result<String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/root_digest.py");
    assert!(root.symlink_metadata()?.mtime() > 0);
    let printed =
        run(Command::new("python3").arg(script).arg("--chunk-size").arg(chunk_size.to_string()).arg(root))?;
    Ok(printed.trim().to_owned())
}
