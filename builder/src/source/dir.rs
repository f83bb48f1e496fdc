//! A directory as a source: what `lstat`, `readlink` and `l*xattr` say, names in byte order.
//!
//! Directories are opened one level at a time, so that paths may be longer than the kernel
//! takes in one call and nothing outside the tree is reached through a symlink. The root's
//! mtime is not part of the image (the reference directory builder forces it to 0), since
//! unpacking into a fresh directory changes it.
//!
//! Sparse files are ordinary data: a hole reads as zeros and equal chunks are stored once.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::tree::{
    Children, Content, FileId, Inode, InodeId, LayerIndex, Metadata, Tree, Xattr, XattrPool, Xattrs,
};
use crate::{Error, ErrorKind, Result};

/// A scanned directory tree whose file data is still on disk.
#[derive(Debug)]
pub struct Directory {
    root: OwnedFd,
    path: PathBuf,
    /// The tree. Regular files have placeholder [`FileId`]s until [`Directory::read_files`].
    pub tree: Tree,
}

/// Reads the whole tree of metadata below `path`.
///
/// # Errors
/// `Io`: something can not be read. `Limit`: an xattr that the format can not store.
pub fn scan(path: &Path) -> Result<Directory> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|e| Error::io(format!("open source directory {}", path.display()), e.into()))?;
    let mut scan = Scan {
        tree: Tree::new(),
        links: HashMap::new(),
        pool: XattrPool::default(),
        next_file: 0,
        path: path.as_os_str().as_bytes().to_vec(),
    };
    scan.root(&root)?;
    Ok(Directory { root, path: path.to_owned(), tree: scan.tree })
}

struct Scan {
    tree: Tree,
    /// Regular files with several names, by device and inode number.
    links: HashMap<(u64, u64), InodeId>,
    pool: XattrPool,
    next_file: u32,
    /// Path of the entry at hand, for messages.
    path: Vec<u8>,
}

/// A directory being read: its descriptor, its inode, names yet to come (in reverse).
struct Level {
    fd: OwnedFd,
    id: InodeId,
    names: Vec<CString>,
    path_len: usize,
}

impl Scan {
    fn root(&mut self, root: &OwnedFd) -> Result<()> {
        let stat = rustix::fs::fstat(root).map_err(|e| self.failed("stat", e))?;
        let xattrs = self.xattrs(
            |list| rustix::fs::flistxattr(root, list),
            |name, value| rustix::fs::fgetxattr(root, name, value),
        )?;
        let id = self.tree.root();
        *self.tree.inode_mut(id) = Inode::new(
            Metadata { mtime: 0, mtime_nsec: 0, ..metadata(&stat, xattrs) },
            Content::Directory(Children::new()),
        );
        let fd = root.try_clone().map_err(|e| Error::io("duplicate a descriptor", e))?;
        let mut stack = vec![self.open_level(fd, id)?];
        while let Some(level) = stack.last_mut() {
            self.path.truncate(level.path_len);
            let Some(name) = level.names.pop() else {
                stack.pop();
                continue;
            };
            self.path.push(b'/');
            self.path.extend_from_slice(name.to_bytes());
            if let Some(below) = self.entry(level, &name)? {
                stack.push(below);
            }
        }
        Ok(())
    }

    fn open_level(&self, fd: OwnedFd, id: InodeId) -> Result<Level> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd).map_err(|e| self.failed("read directory", e))? {
            let entry = entry.map_err(|e| self.failed("read directory", e))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable_by(|a, b| b.to_bytes().cmp(a.to_bytes()));
        Ok(Level { fd, id, names, path_len: self.path.len() })
    }

    /// Adds one entry; a directory is returned to be read next.
    fn entry(&mut self, level: &Level, name: &CStr) -> Result<Option<Level>> {
        let dir = &level.fd;
        let stat =
            rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| self.failed("stat", e))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let key = (stat.st_dev, stat.st_ino);
        if file_type == FileType::RegularFile
            && stat.st_nlink > 1
            && let Some(&first) = self.links.get(&key)
        {
            self.tree.set_child(level.id, name.to_bytes(), first);
            return Ok(None);
        }
        // The only way to reach an entry's xattrs from its directory, symlinks included.
        let mut by_fd = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        by_fd.extend_from_slice(name.to_bytes());
        let by_fd = Path::new(OsStr::from_bytes(&by_fd));
        let xattrs = self.xattrs(
            |list| rustix::fs::llistxattr(by_fd, list),
            |name, value| rustix::fs::lgetxattr(by_fd, name, value),
        )?;
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let content = match file_type {
            FileType::Directory => Content::Directory(Children::new()),
            FileType::RegularFile => {
                let file = FileId { layer: LayerIndex(0), index: self.next_file };
                self.next_file += 1;
                Content::Regular { file, size: stat.st_size.cast_unsigned() }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())
                    .map_err(|e| self.failed("read symlink", e))?;
                Content::Symlink(target.into_bytes().into())
            }
            FileType::CharacterDevice => Content::CharDevice { major, minor },
            FileType::BlockDevice => Content::BlockDevice { major, minor },
            FileType::Fifo => Content::Fifo,
            FileType::Socket => Content::Socket,
            FileType::Unknown => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{}: unknown file type in mode {:o}", self.shown(), stat.st_mode),
                ));
            }
        };
        let id = self
            .tree
            .add(Inode::new(metadata(&stat, xattrs), content))
            .map_err(|e| e.context(self.shown()))?;
        self.tree.set_child(level.id, name.to_bytes(), id);
        match file_type {
            FileType::RegularFile if stat.st_nlink > 1 => {
                self.links.insert(key, id);
                Ok(None)
            }
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(dir, name, flags, Mode::empty())
                    .map_err(|e| self.failed("open directory", e))?;
                Ok(Some(self.open_level(fd, id)?))
            }
            _ => Ok(None),
        }
    }

    fn xattrs(
        &mut self,
        list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
        get: impl Fn(&CStr, &mut [u8]) -> rustix::io::Result<usize>,
    ) -> Result<Xattrs> {
        let names = match grown(256, &list) {
            Ok(names) => names,
            Err(Errno::NOTSUP) => return Ok(Xattrs::default()),
            Err(e) => return Err(self.failed("list xattrs", e)),
        };
        let mut out = Vec::new();
        for name in names.split_inclusive(|&b| b == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            let value = match grown(256, |buffer| get(name, buffer)) {
                Ok(value) => value,
                // Removed since it was listed.
                Err(Errno::NODATA) => continue,
                Err(e) => return Err(self.failed(&format!("read xattr {name:?}"), e)),
            };
            out.push(Xattr { name: name.to_bytes().into(), value: value.into() });
        }
        let xattrs = Xattrs::new(out).map_err(|e| e.context(self.shown()))?;
        Ok(self.pool.intern(xattrs))
    }

    fn shown(&self) -> String {
        crate::tree::shown(&self.path)
    }

    fn failed(&self, what: &str, errno: Errno) -> Error {
        Error::io(format!("{what} of {}", self.shown()), errno.into())
    }
}

/// What `read` puts into a buffer that is large enough.
fn grown(start: usize, read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    // The kernel's limits of a value and of a list are 64 KiB.
    const MAX: usize = 64 << 10;
    let mut buffer = vec![0; start];
    loop {
        match read(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < MAX => buffer.resize(buffer.len() * 4, 0),
            Err(e) => return Err(e),
        }
    }
}

fn metadata(stat: &Stat, xattrs: Xattrs) -> Metadata {
    Metadata {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        // Below 10^9.
        mtime_nsec: stat.st_mtime_nsec as u32,
        mtime: stat.st_mtime,
        xattrs,
        directory_size: 0,
    }
}

impl Directory {
    /// Hands the files of the tree to `add`, in `order`, and puts the ids it returns into the
    /// tree. `add` gets a file's length as scanned and must refuse a file that has another now.
    ///
    /// # Errors
    /// `Io`: a file can not be opened; the errors of `add`, with the path in front.
    pub fn read_files(
        &mut self,
        order: &[InodeId],
        mut add: impl FnMut(File, u64) -> Result<FileId>,
    ) -> Result<()> {
        let names = self.names();
        let mut open_dir: Option<(InodeId, OwnedFd)> = None;
        for &id in order {
            let Content::Regular { size, .. } = self.tree.inode(id).content else { continue };
            let Some((parent, name)) = names.get(&id) else { continue };
            let at = match open_dir.take() {
                Some((dir, fd)) if dir == *parent => fd,
                _ => self.open_dir(&names, *parent)?,
            };
            let shown = |e: &dyn std::fmt::Display| format!("{e} {}", self.path_of(&names, id).display());
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = rustix::fs::openat(&at, OsStr::from_bytes(name), flags, Mode::empty())
                .map_err(|e| Error::io(shown(&"open"), e.into()))?;
            let file = add(File::from(file), size).map_err(|e| e.context(shown(&"read")))?;
            self.tree.inode_mut(id).content = Content::Regular { file, size };
            open_dir = Some((*parent, at));
        }
        Ok(())
    }

    /// One (directory, name) of every directory and regular file.
    fn names(&self) -> HashMap<InodeId, (InodeId, Box<[u8]>)> {
        let mut names = HashMap::new();
        let mut stack = vec![self.tree.root()];
        while let Some(dir) = stack.pop() {
            for (name, &id) in self.tree.inode(dir).children().into_iter().flatten() {
                let inode = self.tree.inode(id);
                if inode.is_dir() {
                    stack.push(id);
                }
                if inode.is_dir() || inode.is_regular() {
                    names.entry(id).or_insert_with(|| (dir, name.clone()));
                }
            }
        }
        names
    }

    fn components<'n>(
        &self,
        names: &'n HashMap<InodeId, (InodeId, Box<[u8]>)>,
        mut id: InodeId,
    ) -> Vec<&'n [u8]> {
        let mut components: Vec<&[u8]> = Vec::new();
        while let Some((parent, name)) = names.get(&id) {
            components.push(name);
            id = *parent;
        }
        components.reverse();
        components
    }

    fn path_of(&self, names: &HashMap<InodeId, (InodeId, Box<[u8]>)>, id: InodeId) -> PathBuf {
        let below = self.components(names, id).join(&b'/');
        self.path.join(std::ffi::OsString::from_vec(below))
    }

    fn open_dir(&self, names: &HashMap<InodeId, (InodeId, Box<[u8]>)>, id: InodeId) -> Result<OwnedFd> {
        let mut fd =
            self.root.as_fd().try_clone_to_owned().map_err(|e| Error::io("duplicate a descriptor", e))?;
        for name in self.components(names, id) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            fd = rustix::fs::openat(&fd, OsStr::from_bytes(name), flags, Mode::empty()).map_err(|e| {
                Error::io(format!("open directory {}", self.path_of(names, id).display()), e.into())
            })?;
        }
        Ok(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    #[test]
    fn a_directory_is_read_with_links_modes_and_odd_names() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &[u8]| dir.path().join(OsStr::from_bytes(name));
        std::fs::create_dir(at(b"sub")).unwrap();
        std::fs::write(at(b"sub/\xff\xfe"), b"content").unwrap();
        std::fs::hard_link(at(b"sub/\xff\xfe"), at(b"link")).unwrap();
        std::os::unix::fs::symlink("nowhere", at(b"sym")).unwrap();
        std::fs::set_permissions(at(b"link"), std::fs::Permissions::from_mode(0o4750)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at(b"sock")).unwrap();

        let mut scanned = scan(dir.path()).unwrap();
        let tree = &scanned.tree;
        assert_eq!(tree.lookup(b"link"), tree.lookup(b"sub/\xff\xfe"));
        let file = tree.inode(tree.lookup(b"link").unwrap());
        assert_eq!(file.mode(), 0o104750);
        assert_eq!(file.metadata.uid, std::fs::metadata(at(b"link")).unwrap().uid());
        assert_eq!(tree.inode(tree.lookup(b"sym").unwrap()).content, Content::Symlink((*b"nowhere").into()));
        assert_eq!(tree.inode(tree.lookup(b"sock").unwrap()).content, Content::Socket);
        assert_eq!(tree.inode(tree.root()).metadata.mtime, 0);

        let order = crate::prefetch::file_order(tree, &[]);
        let mut read = Vec::new();
        scanned
            .read_files(&order, |mut file, size| {
                use std::io::Read as _;
                let mut data = Vec::new();
                file.read_to_end(&mut data).unwrap();
                assert_eq!(data.len() as u64, size);
                read.push(data);
                Ok(FileId { layer: LayerIndex(3), index: 0 })
            })
            .unwrap();
        assert_eq!(read, [b"content"]);
        let id = scanned.tree.lookup(b"link").unwrap();
        assert!(matches!(scanned.tree.inode(id).content, Content::Regular { file, .. } if file.layer.0 == 3));
    }
}
