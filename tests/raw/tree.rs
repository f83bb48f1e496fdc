//! A directory as it was when the server started; files are opened when they are first read, and stay open as far
//! as the limit on descriptors allows.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tests::{Context, Result};

use crate::wire::{Attr, ByteValued as _, Dirent, EntryOut};

/// Answers hold for ever.
pub const FOR_EVER: u64 = 1 << 32;

pub struct Node {
    path: PathBuf,
    pub attr: Attr,
    parent: usize,
    /// In the order of their names.
    children: Vec<(Vec<u8>, usize)>,
    by_name: HashMap<Vec<u8>, usize>,
    file: OnceLock<Arc<File>>,
    /// What passthrough knows the file by.
    pub backing: OnceLock<i32>,
}

pub struct Tree {
    /// Place 0 is the root, and FUSE's node 1.
    nodes: Vec<Node>,
    /// How many more files may stay open.
    open: AtomicU64,
}

impl Tree {
    pub fn read(root: &Path) -> Result<Self> {
        let mut nodes = vec![Node::new(root.to_owned(), 0, &std::fs::metadata(root)?)];
        let mut next = 0;
        while next < nodes.len() {
            if nodes[next].attr.mode & libc::S_IFMT == libc::S_IFDIR {
                let path = nodes[next].path.clone();
                let mut names: Vec<_> = std::fs::read_dir(&path)
                    .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
                    .with_context(|| path.display().to_string())?;
                names.sort_by_key(std::fs::DirEntry::file_name);
                for name in names {
                    let place = nodes.len();
                    nodes.push(Node::new(name.path(), next, &name.metadata()?));
                    let name = name.file_name().as_bytes().to_owned();
                    nodes[next].children.push((name.clone(), place));
                    nodes[next].by_name.insert(name, place);
                }
            }
            next += 1;
        }
        let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
        Ok(Self { nodes, open: AtomicU64::new(limit / 2) })
    }

    pub fn node(&self, id: u64) -> Option<&Node> {
        self.nodes.get(usize::try_from(id).ok()?.checked_sub(1)?)
    }

    fn entry(&self, place: usize) -> EntryOut {
        let node = place as u64 + 1;
        EntryOut {
            nodeid: node,
            entry_valid: FOR_EVER,
            attr_valid: FOR_EVER,
            attr: self.nodes[place].attr,
            ..EntryOut::default()
        }
    }

    /// Node 0, to be remembered, if there is no such name.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Option<EntryOut> {
        let found = self.node(parent)?.by_name.get(name);
        let none = EntryOut { entry_valid: FOR_EVER, ..EntryOut::default() };
        Some(found.map_or(none, |place| self.entry(*place)))
    }

    /// The file of a node.
    pub fn file(&self, node: &Node) -> std::io::Result<Arc<File>> {
        if let Some(file) = node.file.get() {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(File::open(&node.path)?);
        if self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| open.checked_sub(1)).is_ok() {
            // Another thread may have been faster.
            return Ok(Arc::clone(node.file.get_or_init(|| file)));
        }
        Ok(file)
    }

    /// Entries from `offset` on that fit `size` bytes, with attributes if `plus`.
    pub fn list(&self, id: u64, offset: u64, size: usize, plus: bool, out: &mut Vec<u8>) -> Option<()> {
        let node = self.node(id)?;
        let this = usize::try_from(id).ok()? - 1;
        let dots = [(&b"."[..], this), (&b".."[..], node.parent)];
        let names = node.children.iter().map(|(name, place)| (name.as_slice(), *place));
        let all = dots.into_iter().chain(names).enumerate();
        for (number, (name, place)) in all.skip(usize::try_from(offset).ok()?) {
            let attr = &self.nodes[place].attr;
            let before = out.len();
            if plus {
                let entry = if number < 2 { EntryOut::default() } else { self.entry(place) };
                out.extend_from_slice(entry.as_slice());
            }
            let dirent = Dirent {
                ino: attr.ino,
                off: number as u64 + 1,
                namelen: u32::try_from(name.len()).ok()?,
                type_: (attr.mode & libc::S_IFMT) >> 12,
            };
            out.extend_from_slice(dirent.as_slice());
            out.extend_from_slice(name);
            out.resize(out.len().next_multiple_of(8), 0);
            if out.len() > size {
                out.truncate(before);
                break;
            }
        }
        Some(())
    }
}

impl Node {
    fn new(path: PathBuf, parent: usize, status: &Metadata) -> Self {
        let attr = Attr {
            ino: status.ino(),
            size: status.size(),
            blocks: status.blocks(),
            atime: status.mtime().cast_unsigned(),
            mtime: status.mtime().cast_unsigned(),
            ctime: status.mtime().cast_unsigned(),
            mode: status.mode(),
            nlink: status.nlink() as u32,
            uid: status.uid(),
            gid: status.gid(),
            rdev: status.rdev() as u32,
            blksize: 4096,
            ..Attr::default()
        };
        let (children, by_name) = (Vec::new(), HashMap::new());
        Self { path, attr, parent, children, by_name, file: OnceLock::new(), backing: OnceLock::new() }
    }

    pub fn link(&self) -> std::io::Result<Vec<u8>> {
        Ok(std::fs::read_link(&self.path)?.as_os_str().as_bytes().to_owned())
    }
}
