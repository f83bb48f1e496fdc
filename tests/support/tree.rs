//! Two trees, entry by entry: every byte, attribute, xattr and hard link.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// What one name of a tree shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Device number of device nodes, otherwise 0.
    pub rdev: u64,
    /// Length of regular files and symlinks, otherwise 0.
    pub size: u64,
    /// Links; directories are not compared across file systems by it, so they have 0.
    pub nlink: u64,
    /// Attributes by full name.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// SHA-256 of a regular file, target of a symlink.
    pub content: Vec<u8>,
    /// The first name of the same inode in path order, for names with siblings.
    pub first_link: Option<OsString>,
}

/// A tree by relative path; the root itself is the empty path.
pub type Tree = BTreeMap<OsString, Entry>;

/// Reads the whole tree below `root`, data included.
///
/// # Errors
/// Something cannot be read, or a listing repeats a name, or lists `.` or `..` away.
pub fn scan(root: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut links = HashMap::new();
    visit(root, &mut PathBuf::new(), &mut tree, &mut links)?;
    name_links(&mut tree, &links);
    Ok(tree)
}

/// Inode of each non-directory path.
type Links = HashMap<OsString, (u64, u64)>;

fn visit(root: &Path, relative: &mut PathBuf, tree: &mut Tree, links: &mut Links) -> Result<()> {
    let path = if relative.as_os_str().is_empty() { root.to_owned() } else { root.join(&relative) };
    let metadata = fs::symlink_metadata(&path).with_context(|| format!("lstat {}", path.display()))?;
    let key = relative.clone().into_os_string();
    if !metadata.is_dir() && metadata.nlink() > 1 {
        links.insert(key.clone(), (metadata.dev(), metadata.ino()));
    }
    let entry = read_entry(&path, &metadata).with_context(|| format!("read {}", path.display()))?;
    if tree.insert(key, entry).is_some() {
        bail!("{} is listed twice", path.display());
    }
    if !metadata.is_dir() {
        return Ok(());
    }
    for child in fs::read_dir(&path).with_context(|| format!("list {}", path.display()))? {
        let child = child?;
        let listed = child.file_type()?;
        relative.push(child.file_name());
        visit(root, relative, tree, links)?;
        let found = tree[relative.as_os_str()].mode & libc::S_IFMT;
        if type_bits(listed) != found {
            bail!("{} is listed with another type than it has", relative.display());
        }
        relative.pop();
    }
    Ok(())
}

fn type_bits(kind: fs::FileType) -> u32 {
    match () {
        () if kind.is_dir() => libc::S_IFDIR,
        () if kind.is_file() => libc::S_IFREG,
        () if kind.is_symlink() => libc::S_IFLNK,
        () if kind.is_char_device() => libc::S_IFCHR,
        () if kind.is_block_device() => libc::S_IFBLK,
        () if kind.is_fifo() => libc::S_IFIFO,
        () => libc::S_IFSOCK,
    }
}

fn read_entry(path: &Path, metadata: &fs::Metadata) -> Result<Entry> {
    let kind = metadata.file_type();
    let sized = kind.is_file() || kind.is_symlink();
    let content = if kind.is_file() {
        file_digest(path)?
    } else if kind.is_symlink() {
        fs::read_link(path)?.into_os_string().into_vec()
    } else {
        Vec::new()
    };
    let xattrs = read_xattrs(path)?;
    Ok(Entry {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        rdev: if kind.is_char_device() || kind.is_block_device() { metadata.rdev() } else { 0 },
        size: if sized { metadata.size() } else { 0 },
        nlink: if kind.is_dir() { 0 } else { metadata.nlink() },
        xattrs,
        content,
        first_link: None,
    })
}

/// The attributes of `path` itself. A file system without attributes has none: a daemon that
/// serves an image without any says so once, and the kernel never asks again.
fn read_xattrs(path: &Path) -> Result<BTreeMap<OsString, Vec<u8>>> {
    let names = match xattr::list(path) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(BTreeMap::new()),
        names => names?,
    };
    names
        .map(|name| {
            let value = xattr::get(path, &name)?
                .with_context(|| format!("{} is listed but has no value", name.display()))?;
            Ok((name, value))
        })
        .collect()
}

/// The SHA-256 of a file's bytes.
///
/// # Errors
/// It cannot be read.
pub fn file_digest(path: &Path) -> Result<Vec<u8>> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = std::io::Read::read(&mut file, &mut buffer)?;
        if count == 0 {
            return Ok(hasher.finalize().to_vec());
        }
        hasher.update(&buffer[..count]);
    }
}

fn name_links(tree: &mut Tree, links: &Links) {
    let mut first: HashMap<(u64, u64), OsString> = HashMap::new();
    let mut sorted: Vec<_> = links.iter().collect();
    sorted.sort();
    for (path, inode) in sorted {
        let name = first.entry(*inode).or_insert_with(|| path.clone());
        if let Some(entry) = tree.get_mut(path) {
            entry.first_link = Some(name.clone());
        }
    }
}

/// What to overlook when two trees are compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overlook {
    /// The modification time of the root: images need not carry one.
    pub root_mtime: bool,
}

/// The differences between what is wanted and what is there, one line each; empty when equal.
pub fn differences(wanted: &Tree, found: &Tree, overlook: Overlook) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, entry) in wanted {
        let Some(other) = found.get(path) else {
            lines.push(format!("/{} is missing", path.display()));
            continue;
        };
        let mut line = String::new();
        compare(entry, other, overlook.root_mtime && path.is_empty(), &mut line);
        if !line.is_empty() {
            lines.push(format!("/{}:{line}", path.display()));
        }
    }
    lines.extend(
        found
            .keys()
            .filter(|path| !wanted.contains_key(*path))
            .map(|path| format!("/{} is too many", path.display())),
    );
    lines
}

fn compare(wanted: &Entry, found: &Entry, skip_mtime: bool, line: &mut String) {
    let mut differ = |name: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        let _ = write!(line, " {name} is {b:?}, wanted {a:?};");
    };
    if wanted.mode != found.mode {
        differ("mode", &format_args!("{:o}", wanted.mode), &format_args!("{:o}", found.mode));
    }
    if (wanted.uid, wanted.gid) != (found.uid, found.gid) {
        differ("owner", &(wanted.uid, wanted.gid), &(found.uid, found.gid));
    }
    if wanted.mtime != found.mtime && !skip_mtime {
        differ("mtime", &wanted.mtime, &found.mtime);
    }
    if wanted.rdev != found.rdev {
        differ("rdev", &wanted.rdev, &found.rdev);
    }
    if wanted.size != found.size {
        differ("size", &wanted.size, &found.size);
    }
    if wanted.nlink != found.nlink {
        differ("nlink", &wanted.nlink, &found.nlink);
    }
    if wanted.xattrs != found.xattrs {
        differ("xattrs", &wanted.xattrs, &found.xattrs);
    }
    if wanted.content != found.content {
        differ(
            "content",
            &wanted.content.escape_ascii().to_string(),
            &found.content.escape_ascii().to_string(),
        );
    }
    if wanted.first_link != found.first_link {
        differ("hard link", &wanted.first_link, &found.first_link);
    }
}

/// Fails with the first differences between the trees below two directories.
///
/// # Errors
/// They differ, or one cannot be read.
pub fn assert_same(wanted: &Path, found: &Path, overlook: Overlook) -> Result<()> {
    let lines = differences(&scan(wanted)?, &scan(found)?, overlook);
    if lines.is_empty() {
        return Ok(());
    }
    bail!(
        "{} differs from {} in {} places:\n{}",
        found.display(),
        wanted.display(),
        lines.len(),
        lines[..lines.len().min(20)].join("\n")
    )
}

/// Every regular file of a scanned tree, as paths below `root`.
pub fn regular_files(tree: &Tree, root: &Path) -> Vec<PathBuf> {
    tree.iter()
        .filter(|(_, entry)| entry.mode & libc::S_IFMT == libc::S_IFREG)
        .map(|(path, _)| root.join(std::ffi::OsStr::from_bytes(path.as_bytes())))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn every_kind_of_difference_is_named() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let root = directory.path();
        fs::write(root.join("a"), "one")?;
        fs::hard_link(root.join("a"), root.join("b"))?;
        symlink("a", root.join("s"))?;
        let wanted = scan(root)?;
        assert!(differences(&wanted, &scan(root)?, Overlook::default()).is_empty());

        fs::remove_file(root.join("b"))?;
        fs::write(root.join("b"), "two")?;
        fs::remove_file(root.join("s"))?;
        fs::write(root.join("new"), "")?;
        fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o600))?;
        let text = differences(&wanted, &scan(root)?, Overlook { root_mtime: true }).join("\n");
        for part in ["/a: mode", "nlink", "hard link", "/b:", "content", "/s is missing", "/new is too many"]
        {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        Ok(())
    }
}
