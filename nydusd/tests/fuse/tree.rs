//! Golden images through a real mount: every attribute, xattr and byte of their listings.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::common::{Daemon, Site};
use storage::digest::DigestAlgorithm;

/// Bytes of a percent-encoded field.
fn decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let hex = std::str::from_utf8(&tail[..2]).unwrap();
            bytes.push(u8::from_str_radix(hex, 16).unwrap());
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// The xattrs of `path` as the listing writes them.
fn xattrs(path: &Path) -> String {
    let mut all: Vec<String> = xattr::list(path)
        .unwrap()
        .map(|name| {
            let value = xattr::get(path, &name).unwrap().unwrap_or_default();
            format!("{}={}", name.to_str().unwrap(), hex(&value))
        })
        .collect();
    all.sort();
    if all.is_empty() { "-".to_owned() } else { all.join(";") }
}

fn sorted(list: &str) -> String {
    let mut parts: Vec<_> = list.split(';').collect();
    parts.sort_unstable();
    parts.join(";")
}

/// Compares the mounted tree with a listing; answers the number of entries.
fn compare(root: &Path, listing: &str) -> usize {
    compare_from(root, listing, None)
}

/// The same for an image whose root has another time than the listing says.
fn compare_from(root: &Path, listing: &str, root_mtime: Option<&str>) -> usize {
    compare_but(root, listing, root_mtime, false)
}

/// The same; with `any_directory_size` directories may have any, for the listings have those of v6.
fn compare_but(root: &Path, listing: &str, root_mtime: Option<&str>, any_directory_size: bool) -> usize {
    let text = std::fs::read_to_string(crate::common::golden(listing)).unwrap();
    let mut count = 0;
    let mut names: HashMap<u64, Vec<String>> = HashMap::new();
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        let [name, kind, mode, uid, gid, size, mtime, nsec, nlink, rdev, target, sha256, attributes] =
            fields[..]
        else {
            panic!("{line}");
        };
        let mtime = root_mtime.filter(|_| name == "/").unwrap_or(mtime);
        let relative = decode(name);
        let path = root.join(OsStr::from_bytes(&relative[1..]));
        let meta = std::fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let found_kind = match meta.mode() & libc::S_IFMT {
            libc::S_IFREG => "f",
            libc::S_IFDIR => "d",
            libc::S_IFLNK => "l",
            libc::S_IFCHR => "c",
            libc::S_IFBLK => "b",
            libc::S_IFIFO => "p",
            _ => "?",
        };
        let device = match kind {
            "c" | "b" => format!("{}:{}", libc::major(meta.rdev()), libc::minor(meta.rdev())),
            _ => "-".to_owned(),
        };
        let size = match kind {
            "d" if any_directory_size => meta.size().to_string(),
            _ => size.to_owned(),
        };
        let link = std::fs::read_link(&path).map(|target| target.as_os_str().as_bytes().to_owned());
        assert_eq!(
            (
                found_kind,
                format!("{:o}", meta.mode() & 0o7777),
                meta.uid().to_string(),
                meta.gid().to_string(),
                meta.size().to_string(),
                meta.mtime().to_string(),
                meta.mtime_nsec().to_string(),
                meta.nlink().to_string(),
                device,
                link.unwrap_or_else(|_| b"-".to_vec()),
                xattrs(&path)
            ),
            (
                kind,
                mode.to_owned(),
                uid.to_owned(),
                gid.to_owned(),
                size,
                mtime.to_owned(),
                nsec.to_owned(),
                nlink.to_owned(),
                rdev.to_owned(),
                decode(target),
                sorted(attributes)
            ),
            "{name}"
        );
        if kind == "f" {
            let content = std::fs::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(DigestAlgorithm::Sha256.digest(&content).to_string(), sha256, "{name}");
            names.entry(meta.ino()).or_default().push(name.to_owned());
        }
        count += 1;
    }
    // One inode number for all names of a file, and no other.
    for (ino, names) in names {
        let path = root.join(OsStr::from_bytes(&decode(&names[0])[1..]));
        assert_eq!(std::fs::metadata(path).unwrap().nlink() as usize, names.len(), "inode {ino}: {names:?}");
    }
    count
}

/// Entries found by walking, with `.` and `..` as the kernel lists them left to it.
fn walk(dir: &Path) -> usize {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            1 + if entry.file_type().unwrap().is_dir() { walk(&entry.path()) } else { 0 }
        })
        .sum()
}

/// Ends `daemon` in order, which makes the cache durable; the next one has the cache alone.
fn again_without_blobs(site: &Site, daemon: &mut Daemon) -> Daemon {
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    for blob in std::fs::read_dir(site.path("blobs")).unwrap() {
        std::fs::remove_file(blob.unwrap().path()).unwrap();
    }
    site.start(&[])
}

#[test]
fn golden_images_are_shown_as_listed() {
    if !crate::common::can_mount() {
        return;
    }
    for (variant, listing) in [
        ("none-4k", "list/tree.tsv"),
        ("none-1m", "list/tree.tsv"),
        ("lz4-4k", "list/tree.tsv"),
        ("lz4-1m", "list/tree.tsv"),
        ("zstd-4k", "list/tree.tsv"),
        ("default", "list/tree.tsv"),
        ("toc-sha256", "list/tree.tsv"),
        ("batch", "list/tree.tsv"),
    ] {
        eprintln!("variant {variant}");
        let site = Site::new(&format!("{variant}/image.boot"), &[&format!("{variant}/image.blob")]);
        let mut daemon = site.start(&[]);
        assert_eq!(walk(&site.mount()) + 1, compare(&site.mount(), listing), "{variant}");
        let cache = daemon.get("/api/v1/metrics/blobcache");
        assert_eq!(cache["fetched_chunks"], cache["chunks_total"], "{variant}: each chunk once");
        let _daemon = again_without_blobs(&site, &mut daemon);
        compare(&site.mount(), listing);
    }
}

#[test]
fn images_that_refer_to_a_layer_or_are_encrypted_read_the_same() {
    if !crate::common::can_mount() {
        return;
    }
    // What was built from a directory has no time at its root.
    for (variant, blob, root_mtime) in [
        ("zran", "src/mini.tar.gz", None),
        ("encrypt", "encrypt/image.blob", Some("0")),
        ("tarfs", "src/mini.tar", None),
    ] {
        eprintln!("variant {variant}");
        let site = Site::new(&format!("{variant}/image.boot"), &[blob]);
        // The reference builder gives the chunks of a plain tar no digests.
        if variant == "tarfs" {
            let refused = site.command(&[]).output().unwrap();
            assert!(!refused.status.success(), "unverified data unasked for");
            site.configure("allow_unverified = true");
        }
        let mut daemon = site.start(&[]);
        compare_from(&site.mount(), "list/mini.tsv", root_mtime);
        let cache = daemon.get("/api/v1/metrics/blobcache");
        assert_eq!(cache["fetched_chunks"], cache["chunks_total"], "{variant}: each chunk once");
        let _daemon = again_without_blobs(&site, &mut daemon);
        compare_from(&site.mount(), "list/mini.tsv", root_mtime);
    }
}

#[test]
fn a_merged_image_reads_from_both_layers() {
    if !crate::common::can_mount() {
        return;
    }
    let site = Site::new("merged/image.boot", &["upper-inline-toc/layer.blob", "inline-toc/layer.blob"]);
    let _daemon = site.start(&[]);
    compare(&site.mount(), "list/merged.tsv");
}

/// RAFS v5: unaligned chunks, SHA-256, two layers, and a bootstrap that does not say how large its blob is.
#[test]
fn v5_images_are_shown_as_listed() {
    if !crate::common::can_mount() {
        return;
    }
    let layers = ["v5-upper-inline/layer.blob", "v5-inline/layer.blob"];
    for (variant, blobs, listing) in [
        ("v5-default", &["v5-default/image.blob"][..], "list/tree.tsv"),
        ("v5-none-4k", &["v5-none-4k/image.blob"], "list/tree.tsv"),
        ("v5-aligned", &["v5-lz4-4k/image.blob"], "list/tree.tsv"),
        ("v5-sha256", &["v5-default/image.blob"], "list/tree.tsv"),
        ("v5-prefetch", &["v5-prefetch/image.blob"], "list/tree.tsv"),
        ("v5-merged", &layers, "list/merged.tsv"),
        ("v5-tar", &["v5-tar/image.blob"], "list/mini.tsv"),
        ("without sizes", &["v5-default/image.blob"], "list/tree.tsv"),
    ] {
        eprintln!("variant {variant}");
        let sized = variant != "without sizes";
        let name = if sized { variant } else { "v5-default" };
        let mut site = Site::new(&format!("{name}/image.boot"), blobs);
        if !sized {
            let mut bytes = std::fs::read(&site.bootstrap).unwrap();
            bytes[68..80].fill(0);
            site.bootstrap = site.path("unsized.boot");
            std::fs::write(&site.bootstrap, bytes).unwrap();
        }
        site.configure("validate = true");
        let mut daemon = site.start(&[]);
        assert_eq!(walk(&site.mount()) + 1, compare_but(&site.mount(), listing, None, true), "{variant}");
        let cache = daemon.get("/api/v1/metrics/blobcache");
        let backend = daemon.get("/api/v1/daemon/backend?mountpoint=/");
        assert_eq!((&backend["magic"], &backend["version"]), (&0x5241_4653.into(), &0x500.into()));
        assert_eq!(backend["inode_table_offset"], 8192);
        if blobs.len() == 1 {
            assert_eq!(cache["fetched_chunks"], cache["chunks_total"], "{variant}: each chunk once");
        }
        let _daemon = again_without_blobs(&site, &mut daemon);
        compare_but(&site.mount(), listing, None, true);
    }
}

/// A blob that changed under its image: each file is an error or what it was.
#[test]
fn damage_in_a_v5_blob_is_never_shown() {
    if !crate::common::can_mount() {
        return;
    }
    let site = Site::new("v5-none-4k/image.boot", &["v5-none-4k/image.blob"]);
    let blob = std::fs::read_dir(site.path("blobs")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes.iter_mut().step_by(30_000).for_each(|byte| *byte ^= 0x10);
    std::fs::write(&blob, bytes).unwrap();
    let _daemon = site.start(&[]);
    let text = std::fs::read_to_string(crate::common::golden("list/tree.tsv")).unwrap();
    let (mut equal, mut refused) = (0, 0);
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        if fields[1] != "f" {
            continue;
        }
        let path = site.mount().join(OsStr::from_bytes(&decode(fields[0])[1..]));
        match std::fs::read(&path) {
            Ok(content) => {
                assert_eq!(DigestAlgorithm::Sha256.digest(&content).to_string(), fields[11], "{line}");
                equal += 1;
            }
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EIO), "{line}");
                refused += 1;
            }
        }
    }
    assert!(equal > 10 && refused > 0, "{equal} files are equal, {refused} refused");
}
