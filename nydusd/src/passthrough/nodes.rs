//! The files that the kernel holds, by the numbers it knows them under.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::sys::resource::{Resource, getrlimit};
use rafs::bootstrap::Nid;
use rustix::fs::{FileType, Mode, OFlags};

use super::file_id::{FileId, Found, next};
use super::{ROOT, path_of};

/// Descriptors of all nodes of this process.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Least number of descriptors that nodes leave to the rest of the daemon.
const RESERVED: usize = 256;

/// Most descriptors that nodes may have: images are read, and the API answers, whatever is held of directories.
fn most() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    limit.saturating_sub((limit / 4).max(RESERVED))
}

/// One file.
#[derive(Debug)]
pub(super) struct Node {
    /// Names the file, and keeps it from being taken for another one that gets its inode number.
    file: OwnedFd,
    id: FileId,
    kind: FileType,
    /// References of the kernel. Rises while there is a [`super::Held`], falls with the table locked for writing.
    given: AtomicU64,
    /// Number of [`super::Held`]. Rises with the table locked for reading, falls with it locked for
    /// writing: who finds a node may hold it.
    held: AtomicU64,
}

impl Node {
    pub fn new(found: Found) -> Self {
        OPEN.fetch_add(1, Ordering::Relaxed);
        let (given, held) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { file: found.file, id: found.id, kind: found.kind, given, held }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// See [`FileId::generation`].
    pub fn generation(&self, home: u64) -> u64 {
        self.id.generation(home)
    }

    /// The kernel has one reference more. Somebody must hold the node.
    pub fn give(&self) {
        self.given.fetch_add(1, Ordering::Relaxed);
    }

    /// It is held once more. The table must be locked.
    fn hold(&self) {
        self.held.fetch_add(1, Ordering::Relaxed);
    }

    /// Opens its content. Devices, pipes and sockets of the host have none here: to open one may have
    /// effects, and may wait.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        match self.kind {
            FileType::RegularFile | FileType::Directory => {
                let path = path_of(&self.file);
                Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
            }
            FileType::Symlink => Err(io::Error::from_raw_os_error(libc::ELOOP)),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug, Default)]
struct Table {
    by_number: HashMap<u64, Arc<Node>>,
    by_file: HashMap<FileId, u64>,
}

/// All of them. The root is always among them.
#[derive(Debug)]
pub(super) struct Nodes {
    /// Held for a look-up or a change of the maps; files are opened and closed without it.
    table: RwLock<Table>,
    /// Descriptors of all nodes of the process above which there is no new one.
    most: usize,
}

impl Nodes {
    pub fn new(root: Node) -> Self {
        let mut table = Table::default();
        table.by_file.insert(root.id, ROOT.0);
        table.by_number.insert(ROOT.0, Arc::new(root));
        Self { table: RwLock::new(table), most: most() }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file under a number.
    pub fn get(&self, nid: Nid) -> Option<Arc<Node>> {
        self.read().by_number.get(&nid.0).cloned()
    }

    /// The number of a file that is known.
    pub fn number(&self, id: &FileId) -> Option<Nid> {
        self.read().by_file.get(id).copied().map(Nid)
    }

    /// The file under a number, held once more.
    pub fn again(&self, nid: Nid) -> Option<Arc<Node>> {
        let table = self.read();
        let node = table.by_number.get(&nid.0)?;
        node.hold();
        Some(Arc::clone(node))
    }

    /// The node of a file, held once more; a new one gets number `first`, or the next that is free.
    ///
    /// # Errors
    /// ENFILE: there are too many.
    pub fn intern(&self, first: Nid, found: Found) -> io::Result<(Nid, Arc<Node>)> {
        let known = |table: &Table| {
            let number = *table.by_file.get(&found.id)?;
            let node = Arc::clone(table.by_number.get(&number)?);
            node.hold();
            Some((Nid(number), node))
        };
        if let Some(known) = known(&self.read()) {
            return Ok(known);
        }
        let mut table = self.write();
        // Another thread may have been faster.
        if let Some(known) = known(&table) {
            return Ok(known);
        }
        if OPEN.load(Ordering::Relaxed) >= self.most {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let mut nid = first;
        while table.by_number.contains_key(&nid.0) {
            nid = next(nid);
            if nid == first {
                return Err(io::Error::from_raw_os_error(libc::ENFILE));
            }
        }
        let node = Arc::new(Node::new(found));
        node.hold();
        table.by_file.insert(node.id, nid.0);
        table.by_number.insert(nid.0, Arc::clone(&node));
        Ok((nid, node))
    }

    /// The kernel gives `count` references back, those of a predecessor among them. A node that nobody needs any
    /// more is answered, to be closed without the lock.
    pub fn forget(&self, nid: Nid, count: u64) -> Option<Arc<Node>> {
        self.fall(nid, |node| {
            let fallen = |given: u64| Some(given.saturating_sub(count));
            // It is never refused.
            let _ = node.given.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fallen);
        })
    }

    /// The kernel gives back all that it has. Those that nobody needs any more are answered, to be closed without the lock.
    pub fn forget_all(&self) -> Vec<Arc<Node>> {
        let mut table = self.write();
        let mut over = Vec::new();
        let Table { by_number, by_file } = &mut *table;
        by_number.retain(|number, node| {
            node.given.store(0, Ordering::Relaxed);
            let stays = *number == ROOT.0 || node.held.load(Ordering::Relaxed) > 0;
            if !stays {
                by_file.remove(&node.id);
                over.push(Arc::clone(node));
            }
            stays
        });
        over
    }

    /// It is held once less. Answers as [`Nodes::forget`].
    pub fn release(&self, nid: Nid) -> Option<Arc<Node>> {
        self.fall(nid, |node| {
            node.held.fetch_sub(1, Ordering::Relaxed);
        })
    }

    fn fall(&self, nid: Nid, lower: impl FnOnce(&Node)) -> Option<Arc<Node>> {
        let mut table = self.write();
        let node = table.by_number.get(&nid.0)?;
        lower(node);
        // Who holds it may give it to the kernel without the lock: that counter is looked at last.
        if nid == ROOT || node.held.load(Ordering::Relaxed) > 0 || node.given.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let node = table.by_number.remove(&nid.0)?;
        table.by_file.remove(&node.id);
        Some(node)
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.read().by_number.len()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{OwnDevice, look};
    use super::*;

    fn found(path: &Path) -> Found {
        let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        look(file, &OwnDevice::default()).unwrap()
    }

    #[test]
    fn what_the_kernel_forgets_is_not_what_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let nodes = Nodes::new(Node::new(found(dir.path())));
        let (nid, node) = nodes.intern(Nid(5), found(&path)).unwrap();
        assert_eq!(nid, Nid(5));
        node.give();
        assert!(nodes.release(nid).is_none(), "the kernel has it");
        // A look-up of the same file, met by the kernel's word that it does not need it any more; some of what it
        // gives back is a predecessor's.
        let (again, node) = nodes.intern(Nid(9), found(&path)).unwrap();
        assert_eq!(again, nid);
        assert!(nodes.forget(nid, 100).is_none(), "it is held");
        node.give();
        assert!(nodes.release(nid).is_none(), "the kernel has it again");
        assert!(nodes.get(nid).is_some());
        assert!(nodes.forget(nid, 1).is_some());
        assert!(nodes.get(nid).is_none() && nodes.len() == 1);
        assert!(nodes.forget(ROOT, 7).is_none() && nodes.len() == 1, "the root stays");

        let (nid, node) = nodes.intern(Nid(5), found(&path)).unwrap();
        node.give();
        assert!(nodes.forget_all().is_empty(), "it is held");
        assert!(nodes.release(nid).is_some(), "the kernel has it no more");
        let (nid, node) = nodes.intern(Nid(5), found(&path)).unwrap();
        node.give();
        assert!(nodes.release(nid).is_none());
        assert!(nodes.forget_all().len() == 1 && nodes.len() == 1 && nodes.number(&node.id).is_none());
    }

    #[test]
    fn nodes_leave_descriptors_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let root = Nodes::new(Node::new(found(dir.path())));
        let full = Nodes { most: 0, ..root };
        let refused = full.intern(Nid(5), found(&path)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENFILE));
        assert_eq!(full.intern(Nid(5), found(dir.path())).unwrap().0, ROOT, "what is known is answered");
        let limit = getrlimit(Resource::RLIMIT_NOFILE).unwrap().0;
        assert!(most() as u64 <= limit.saturating_sub(256) && most() as u64 <= limit - limit / 4);
    }
}
