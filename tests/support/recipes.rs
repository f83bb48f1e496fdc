//! Images that tests use, made without a network.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::image::{Entry, Image, Kind, MTIME};

/// Bytes that do not compress and depend on `seed` alone.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Text that compresses well and depends on `seed` alone.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 64);
    let mut line = 0_u64;
    while bytes.len() < len {
        bytes.extend_from_slice(format!("{seed:x}: line {line} of a text that repeats itself\n").as_bytes());
        line += 1;
    }
    bytes.truncate(len);
    bytes
}

/// `security.capability` with `cap_net_bind_service+ep`, revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// `system.posix_acl_access`: owner rw-, user 1000 r--, group r--, mask r--, other ---.
fn acl() -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    let anyone = u32::MAX;
    for (tag, permission, id) in
        [(0x01_u16, 6_u16, anyone), (0x02, 4, 1000), (0x04, 4, anyone), (0x10, 4, anyone), (0x20, 0, anyone)]
    {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permission.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// Paths of [`tiny`] that tests name: each holds several chunks of 1 MiB.
pub const BIG_FILES: [&str; 3] = ["data/noise-a", "data/noise-b", "data/prose"];

/// Three layers of a few MB with everything that a converter must cope with: whiteouts, an opaque
/// directory, replaced types, hard links, symlinks, setuid, capabilities, an ACL, a fifo, devices,
/// long runs of zeros, empty files, UTF-8 and other names, names of 255 bytes, metadata-only changes,
/// large owners, negative and nanosecond times.
pub fn tiny() -> Image {
    Image::new(vec![tiny_base(), tiny_odd(), tiny_top()])
}

fn tiny_base() -> Vec<Entry> {
    let mut zeros = vec![0; 6 << 20];
    zeros.extend_from_slice(b"tail");
    let mut entries = vec![
        Entry::dir("./").mode(0o755).mtime(MTIME, 5),
        Entry::dir("etc"),
        Entry::file("etc/hostname", "tiny\n"),
        Entry::file("etc/removed-later", "gone in the top layer\n"),
        Entry::dir("data"),
        Entry::file(BIG_FILES[0], noise(1, (3 << 20) + 17)),
        Entry::file(BIG_FILES[1], noise(2, 2 << 20)),
        Entry::file(BIG_FILES[2], prose(3, (2 << 20) + 4095)),
        Entry::file("data/one-chunk", noise(4, 1 << 20)),
        Entry::file("data/zeros", zeros),
        Entry::file("data/same-as-noise-b", noise(2, 2 << 20)),
        Entry::file("data/empty", ""),
        Entry::file("data/one-byte", "x"),
        Entry::dir("opaque"),
        Entry::file("opaque/below", "hidden by the opaque marker\n"),
        Entry::dir("opaque/deep"),
        Entry::file("opaque/deep/file", "hidden too\n"),
        Entry::dir("was-directory"),
        Entry::file("was-directory/inside", "goes with its directory\n"),
        Entry::file("was-file", "becomes a directory\n"),
        Entry::dir("many"),
    ];
    entries.extend(
        (0..400).map(|n| Entry::file(format!("many/{n:04}-{}", "n".repeat(n % 60)), format!("{n}\n"))),
    );
    entries
}

fn tiny_odd() -> Vec<Entry> {
    vec![
        Entry::dir("odd").mode(0o1777).mtime(MTIME, 123_456_789),
        Entry::file("odd/linked-a", "three names, one inode\n").mtime(MTIME, 1),
        Entry::hard_link("odd/linked-b", "odd/linked-a"),
        Entry::hard_link("linked-c", "odd/linked-a"),
        Entry::symlink("odd/to-file", "linked-a"),
        Entry::symlink("odd/dangling", "/nowhere/at/all"),
        Entry::symlink("odd/long-target", format!("/{}", "t".repeat(1000))),
        Entry::file("odd/setuid", "#!/bin/true\n").mode(0o4755),
        Entry::file("odd/setgid", "#!/bin/true\n").mode(0o2755),
        Entry::file("odd/capable", "#!/bin/true\n").mode(0o755).xattr("security.capability", CAPABILITY),
        Entry::file("odd/acl", "acl\n").mode(0o640).xattr("system.posix_acl_access", acl()),
        Entry::file("odd/noted", "noted\n")
            .xattr("user.note", vec![b'v'; 3000])
            .xattr("user.binary", [0_u8, 0xff, b'\n', 0x80]),
        Entry::dir("odd/noted-directory").xattr("user.dir", "yes").xattr("trusted.tests", "root only"),
        Entry::new("odd/fifo", Kind::Fifo).mode(0o600),
        Entry::new("odd/null", Kind::CharDevice(1, 3)).mode(0o666),
        Entry::new("odd/large-device", Kind::CharDevice(2047, 70_000)),
        Entry::new("odd/block", Kind::BlockDevice(7, 200)).owner(0, 6),
        Entry::file("odd/largest-owner", "").owner(u64::from(u32::MAX) - 1, u64::from(u32::MAX) - 1),
        Entry::file("odd/old", "before the epoch\n").mtime(-86_400 * 365, 0),
        Entry::file("odd/older", "before the epoch, in between\n").mtime(-2, 750_000_000),
        Entry::file("odd/no-permission", "secret\n").mode(0o000),
        Entry::dir("odd/空 dir"),
        Entry::file("odd/空 dir/ünïcode", "named in UTF-8\n"),
        Entry::file(b"odd/bytes-\xff\xfe\x80".as_slice(), "named in no encoding\n"),
        Entry::file(format!("odd/{}", "n".repeat(255)), "the longest name\n"),
        Entry::dir("odd/deep/"),
        Entry::dir(format!("odd/deep/{}", "d".repeat(200))),
        Entry::file(format!("odd/deep/{}/file", "d".repeat(200)), "a long path\n"),
    ]
}

fn tiny_top() -> Vec<Entry> {
    vec![
        Entry::dir("etc").mode(0o755).mtime(MTIME + 10, 0),
        Entry::file("etc/.wh.removed-later", ""),
        Entry::file("etc/added", "from the top layer\n"),
        Entry::dir("opaque").mode(0o711).mtime(MTIME + 11, 0),
        Entry::file("opaque/.wh..wh..opq", ""),
        Entry::file("opaque/above", "all there is\n"),
        Entry::file("was-directory", "now a file\n"),
        Entry::dir("was-file"),
        Entry::file("was-file/inside", "now below a directory\n"),
        // Metadata-only changes come as whole entries.
        Entry::file("data/one-chunk", noise(4, 1 << 20)).mode(0o600).owner(1000, 1000),
        Entry::dir("odd/noted-directory").mode(0o700).owner(12, 34),
        Entry::dir("./").mode(0o755).mtime(MTIME + 12, 0),
    ]
}

/// A base layer with a shell, and a layer with its script: a program that runs in a chroot and
/// prints `ready`.
///
/// # Errors
/// This machine lacks one of the programs.
pub fn shell() -> Result<Image> {
    let mut base = vec![Entry::dir("./"), Entry::dir("proc"), Entry::dir("tmp").mode(0o1777)];
    base.extend(host_programs(&["sh", "cat", "sha256sum", "ls"])?);
    let script = "#!/bin/sh\nset -e\ncat /srv/message\nsha256sum /srv/payload\necho written >/tmp/out\n";
    let application = vec![
        Entry::dir("srv"),
        Entry::file("srv/main.sh", script).mode(0o755),
        Entry::file("srv/message", "ready\n"),
        Entry::file("srv/payload", noise(10, 300_000)),
        Entry::file("srv/never-read", noise(11, 4 << 20)),
    ];
    Ok(Image::new(vec![base, application]))
}

/// A base layer, this machine's Python with its standard library, and an application at
/// `/srv/app/main.py` that prints `ready`.
///
/// # Errors
/// This machine has no Debian `python3`.
pub fn python() -> Result<Image> {
    let mut base = vec![Entry::dir("./"), Entry::dir("proc"), Entry::dir("tmp").mode(0o1777)];
    base.extend(host_programs(&["sh"])?);
    let mut interpreter = host_programs(&["python3"])?;
    let version = run(Command::new("python3")
        .args(["-c", "import sys; print('python%d.%d' % sys.version_info[:2], end='')"]))?;
    let library = PathBuf::from("/usr/lib").join(version);
    let mut files = Vec::new();
    host_tree(&library, &mut files)?;
    interpreter.extend(parents(files.iter().map(PathBuf::as_path), &interpreter)?);
    for file in &files {
        interpreter.push(host_entry(file)?);
    }
    let script =
        "import json, decimal, email, sys\nprint('ready', json.dumps([1, 2]), decimal.Decimal('0.5'))\n";
    let application = vec![Entry::dir("srv"), Entry::dir("srv/app"), Entry::file("srv/app/main.py", script)];
    Ok(Image::new(vec![base, interpreter, application]))
}

/// Programs of this machine with their libraries and the directories above them.
fn host_programs(names: &[&str]) -> Result<Vec<Entry>> {
    let mut files = BTreeSet::new();
    for name in names {
        let program = ["/usr/bin", "/bin"]
            .iter()
            .map(|directory| Path::new(directory).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("there is no {name} in /usr/bin"))?;
        let listing = run(Command::new("ldd").arg(&program))?;
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`
        files.extend(
            listing
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(|word| usr_path(Path::new(word))),
        );
        files.insert(usr_path(&program));
    }
    let mut entries: Vec<Entry> = ["bin", "lib", "lib64", "sbin"]
        .iter()
        .map(|name| Entry::symlink(name, format!("usr/{name}")))
        .collect();
    entries.extend(parents(files.iter().map(PathBuf::as_path), &[])?);
    for file in &files {
        entries.push(if fs::symlink_metadata(file)?.is_symlink() {
            // Kept whole: the target may lie anywhere.
            let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
            Entry::file(relative(file), bytes).mode(0o755)
        } else {
            host_entry(file)?
        });
    }
    Ok(entries)
}

/// `/lib/x` and `/bin/x` as they stand below `/usr`: the images follow Debian's merged layout.
fn usr_path(path: &Path) -> PathBuf {
    if path.starts_with("/usr") { path.to_owned() } else { Path::new("/usr").join(relative_path(path)) }
}

fn relative_path(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn relative(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    relative_path(path).as_os_str().as_bytes().to_vec()
}

/// The directories above `files`, parents first, without those that `present` already holds.
fn parents<'a>(files: impl Iterator<Item = &'a Path>, present: &[Entry]) -> Result<Vec<Entry>> {
    let known: BTreeSet<Vec<u8>> = present.iter().map(|entry| entry.path.clone()).collect();
    let directories: BTreeSet<&Path> =
        files.flat_map(|file| file.ancestors().skip(1)).filter(|path| *path != Path::new("/")).collect();
    Ok(directories
        .into_iter()
        .map(|path| Entry::dir(relative(path)))
        .filter(|entry| !known.contains(&entry.path))
        .collect())
}

/// Everything below `directory` but compiled Python and packages that are not the standard library.
fn host_tree(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut children: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(|| format!("list {}", directory.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    children.sort();
    for child in children {
        let name = child.file_name().unwrap_or_default();
        if name == "__pycache__" || name == "dist-packages" || name == "site-packages" {
            continue;
        }
        let metadata = fs::symlink_metadata(&child)?;
        if metadata.is_dir() {
            host_tree(&child, files)?;
        } else if metadata.is_file() || metadata.is_symlink() {
            files.push(child);
        }
    }
    Ok(())
}

fn host_entry(path: &Path) -> Result<Entry> {
    use std::os::unix::ffi::OsStrExt;
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        return Ok(Entry::symlink(relative(path), fs::read_link(path)?.as_os_str().as_bytes()));
    }
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(Entry::file(relative(path), bytes).mode(metadata.permissions().mode() & 0o7777))
}
