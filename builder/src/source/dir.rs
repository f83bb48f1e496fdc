//! A directory as a source: what `lstat`, `readlink` and `l*xattr` say, names in byte order.
//!
//! Directories are opened one level at a time, so that paths may be longer than the kernel
//! takes in one call and nothing outside the tree is reached through a symlink. The root's
//! mtime is not part of the image (the reference directory builder forces it to 0), since
//! unpacking into a fresh directory changes it.
//!
//! Data is read in the order of inode numbers: the files of a directory, then its directories. So
//! one pass does, unless prefetch patterns put other files first.
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

use crate::overlay::WhiteoutSpec;
use crate::tree::{
    Children, Content, FileId, Inode, InodeId, LayerIndex, Metadata, Tree, Xattr, XattrPool, Xattrs,
};
use crate::{Error, ErrorKind, Result};

/// How directories are opened.
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// How files are opened; what has become a FIFO since it was listed does not block.
const FILE: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// A scanned directory tree whose file data is still on disk.
#[derive(Debug)]
pub struct Directory {
    root: OwnedFd,
    path: PathBuf,
    /// The tree. Regular files have placeholder [`FileId`]s until [`Directory::read_files`].
    pub tree: Tree,
}

/// Reads the metadata of the whole tree below `path`, but not the whiteouts of `spec`.
///
/// # Errors
/// `Io`: something can not be read. `Limit`: an xattr that the format can not store.
pub fn scan(path: &Path, spec: WhiteoutSpec) -> Result<Directory> {
    let root = open_root(path)?;
    let tree = Scan::new(path, spec, None).run(&root)?;
    Ok(Directory { root, path: path.to_owned(), tree })
}

/// Reads the whole tree below `path`, but not the whiteouts of `spec`, and hands its files to `add`
/// in the order of inode numbers. `add` gets a file's length by its metadata, and must refuse a
/// file that has another.
///
/// # Errors
/// As [`scan`]; the errors of `add`, with the path in front.
pub fn read(
    path: &Path,
    spec: WhiteoutSpec,
    mut add: impl FnMut(File, u64) -> Result<FileId>,
) -> Result<Tree> {
    Scan::new(path, spec, Some(&mut add)).run(&open_root(path)?)
}

fn open_root(path: &Path) -> Result<OwnedFd> {
    // The caller may name a symlink.
    rustix::fs::open(path, DIRECTORY.difference(OFlags::NOFOLLOW), Mode::empty())
        .map_err(|e| Error::io(format!("open source directory {}", path.display()), e.into()))
}

struct Scan<'a> {
    tree: Tree,
    spec: WhiteoutSpec,
    /// Takes the data of files, if that is read now.
    add: Option<&'a mut dyn FnMut(File, u64) -> Result<FileId>>,
    /// Regular files with several names, by device and inode number.
    links: HashMap<(u64, u64), InodeId>,
    pool: XattrPool,
    next_file: u32,
    /// Path of the entry at hand, for messages.
    path: Vec<u8>,
}

/// A directory whose entries have been read: its descriptor, and those of its directories that have
/// not (in reverse).
struct Level {
    fd: OwnedFd,
    below: Vec<(CString, InodeId)>,
    path_len: usize,
}

impl<'a> Scan<'a> {
    fn new(
        path: &Path,
        spec: WhiteoutSpec,
        add: Option<&'a mut dyn FnMut(File, u64) -> Result<FileId>>,
    ) -> Self {
        Self {
            tree: Tree::new(),
            spec,
            add,
            links: HashMap::new(),
            pool: XattrPool::default(),
            next_file: 0,
            path: path.as_os_str().as_bytes().to_vec(),
        }
    }

    fn run(mut self, root: &OwnedFd) -> Result<Tree> {
        let id = self.tree.root();
        let fd = root.try_clone().map_err(|e| Error::io("duplicate a descriptor", e))?;
        let mut stack = vec![self.directory(fd, id)?];
        let metadata = &mut self.tree.inode_mut(id).metadata;
        (metadata.mtime, metadata.mtime_nsec) = (0, 0);
        while let Some(level) = stack.last_mut() {
            self.path.truncate(level.path_len);
            let Some((name, id)) = level.below.pop() else {
                stack.pop();
                continue;
            };
            self.push(&name);
            let fd = rustix::fs::openat(&level.fd, &name, DIRECTORY, Mode::empty())
                .map_err(|e| self.failed("open directory", e))?;
            stack.push(self.directory(fd, id)?);
        }
        Ok(self.tree)
    }

    /// Fills in the directory `id` and reads its entries.
    fn directory(&mut self, fd: OwnedFd, id: InodeId) -> Result<Level> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("stat", e))?;
        let metadata = metadata(&stat, self.xattrs_of(&fd)?);
        *self.tree.inode_mut(id) = Inode::new(metadata, Content::Directory(Children::new()));
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd).map_err(|e| self.failed("read directory", e))? {
            let entry = entry.map_err(|e| self.failed("read directory", e))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push((entry.file_name().to_owned(), entry.file_type()));
            }
        }
        names.sort_unstable_by(|(a, _), (b, _)| a.to_bytes().cmp(b.to_bytes()));
        let path_len = self.path.len();
        let mut below = Vec::new();
        for (name, listed) in names {
            self.push(&name);
            if let Some(id) = self.entry(&fd, id, &name, listed)? {
                below.push((name, id));
            }
            self.path.truncate(path_len);
        }
        below.reverse();
        Ok(Level { fd, below, path_len })
    }

    fn push(&mut self, name: &CStr) {
        self.path.push(b'/');
        self.path.extend_from_slice(name.to_bytes());
    }

    /// Adds one entry of `parent`; that of a directory is answered, to be filled in. `listed` is its
    /// type as the directory has it, which may be unknown.
    fn entry(
        &mut self,
        dir: &OwnedFd,
        parent: InodeId,
        name: &CStr,
        listed: FileType,
    ) -> Result<Option<InodeId>> {
        let file_type = |stat: &Stat| FileType::from_raw_mode(stat.st_mode);
        let reads = self.add.is_some();
        let by_name = match listed {
            FileType::RegularFile if reads => None,
            _ => Some(
                rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| self.failed("stat", e))?,
            ),
        };
        let (stat, fd) = match by_name {
            Some(stat) if !reads || file_type(&stat) != FileType::RegularFile => (stat, None),
            // It is opened anyway, and a descriptor tells the rest at less cost than a name.
            _ => {
                let fd =
                    rustix::fs::openat(dir, name, FILE, Mode::empty()).map_err(|e| self.failed("open", e))?;
                (rustix::fs::fstat(&fd).map_err(|e| self.failed("stat", e))?, Some(fd))
            }
        };
        let mut content = self.content(dir, name, &stat)?;
        if self.spec.is_marker(name.to_bytes(), &content) {
            return Ok(None);
        }
        let link = match content {
            Content::Directory(_) => {
                let id = self.add_inode(Inode::new(Metadata::implied_directory(), content))?;
                self.tree.set_child(parent, name.to_bytes(), id);
                return Ok(Some(id));
            }
            Content::Regular { .. } if stat.st_nlink > 1 => Some((stat.st_dev, stat.st_ino)),
            _ => None,
        };
        if let Some(&first) = link.as_ref().and_then(|link| self.links.get(link)) {
            self.tree.set_child(parent, name.to_bytes(), first);
            return Ok(None);
        }
        let xattrs = match &fd {
            Some(fd) => self.xattrs_of(fd)?,
            None => self.xattrs_by_name(dir, name)?,
        };
        if let Content::Regular { file, size } = &mut content {
            match (fd, &mut self.add) {
                (Some(fd), Some(add)) => {
                    *file = add(File::from(fd), *size)
                        .map_err(|e| e.context(format!("read {}", crate::tree::shown(&self.path))))?;
                }
                _ => self.next_file += 1,
            }
        }
        let id = self.add_inode(Inode::new(metadata(&stat, xattrs), content))?;
        self.tree.set_child(parent, name.to_bytes(), id);
        if let Some(link) = link {
            self.links.insert(link, id);
        }
        Ok(None)
    }

    fn add_inode(&mut self, inode: Inode) -> Result<InodeId> {
        self.tree.add(inode).map_err(|e| e.context(self.shown()))
    }

    fn content(&self, dir: &OwnedFd, name: &CStr, stat: &Stat) -> Result<Content> {
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Content::Directory(Children::new()),
            FileType::RegularFile => Content::Regular {
                file: FileId { layer: LayerIndex(0), index: self.next_file },
                size: stat.st_size.cast_unsigned(),
            },
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
        })
    }

    fn xattrs_of(&mut self, fd: &OwnedFd) -> Result<Xattrs> {
        self.xattrs(
            |list| rustix::fs::flistxattr(fd, list),
            |name, value| rustix::fs::fgetxattr(fd, name, value),
        )
    }

    fn xattrs_by_name(&mut self, dir: &OwnedFd, name: &CStr) -> Result<Xattrs> {
        // The only way to reach an entry's xattrs from its directory, symlinks included.
        let mut by_fd = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        by_fd.extend_from_slice(name.to_bytes());
        let by_fd = Path::new(OsStr::from_bytes(&by_fd));
        self.xattrs(
            |list| rustix::fs::llistxattr(by_fd, list),
            |name, value| rustix::fs::lgetxattr(by_fd, name, value),
        )
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
        if names.is_empty() {
            return Ok(Xattrs::default());
        }
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
            let file = rustix::fs::openat(&at, OsStr::from_bytes(name), FILE, Mode::empty())
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
            fd = rustix::fs::openat(&fd, OsStr::from_bytes(name), DIRECTORY, Mode::empty()).map_err(|e| {
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

        let mut scanned = scan(dir.path(), WhiteoutSpec::None).unwrap();
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

    #[test]
    fn one_pass_reads_in_the_order_of_inode_numbers() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["b/x/deep", "b/y", "a/.wh.gone/below", "a/z", "c", ".wh.c", "a/.wh..wh..opq"] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, path.file_name().unwrap().as_bytes()).unwrap();
        }
        std::fs::hard_link(dir.path().join("b/y"), dir.path().join("a/link")).unwrap();
        std::fs::hard_link(dir.path().join("c"), dir.path().join("a/.wh.link")).unwrap();
        let oci: &[&str] = &["c", "y", "z", "deep"];
        let all: &[&str] = &[".wh.c", "c", ".wh..wh..opq", "y", "z", "below", "deep"];
        for (spec, want) in [(WhiteoutSpec::Oci, oci), (WhiteoutSpec::Overlayfs, all)] {
            let taken = std::cell::RefCell::new(Vec::new());
            let add = |mut file: File, size| {
                let mut text = String::new();
                std::io::Read::read_to_string(&mut file, &mut text).unwrap();
                assert_eq!(text.len() as u64, size);
                taken.borrow_mut().push(text);
                Ok(FileId { layer: LayerIndex(0), index: taken.borrow().len() as u32 })
            };
            let entries = |tree: &Tree| {
                let mut entries = Vec::new();
                tree.walk(|path, id| {
                    entries.push((path.to_vec(), tree.inode(id).clone()));
                    Ok(())
                })
                .unwrap();
                entries
            };
            let tree = read(dir.path(), spec, add).unwrap();
            assert_eq!(taken.take(), want, "{spec}");

            let mut scanned = scan(dir.path(), spec).unwrap();
            let order = crate::prefetch::file_order(&scanned.tree, &[]);
            scanned.read_files(&order, add).unwrap();
            assert_eq!(taken.take(), want, "{spec}");
            assert_eq!(entries(&tree), entries(&scanned.tree), "{spec}");
        }
    }
}
