//! The files that the kernel holds, by the numbers it knows them under.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rafs::bootstrap::Nid;
use rustix::fs::{FileType, Mode, OFlags};

use super::file_id::{FileId, Found, next};
use super::{ROOT, path_of};

/// One file.
#[derive(Debug)]
pub(super) struct Node {
    /// Names the file, and keeps it from being taken for another one that gets its inode number.
    file: OwnedFd,
    id: FileId,
    kind: FileType,
    /// References of the kernel and of [`super::Held`]. Rises with the table locked for reading, falls with
    /// it locked for writing: who finds a node may hold it.
    references: AtomicU64,
}

impl Node {
    pub fn new(found: Found) -> Self {
        Self { file: found.file, id: found.id, kind: found.kind, references: AtomicU64::new(0) }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// `count` references more. There must be one already, or the table is locked.
    pub fn hold(&self, count: u64) {
        self.references.fetch_add(count, Ordering::Relaxed);
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
}

impl Nodes {
    pub fn new(root: Node) -> Self {
        let mut table = Table::default();
        table.by_file.insert(root.id, ROOT.0);
        table.by_number.insert(ROOT.0, Arc::new(root));
        Self { table: RwLock::new(table) }
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

    /// The file under a number, with one reference more.
    pub fn again(&self, nid: Nid) -> Option<Arc<Node>> {
        let table = self.read();
        let node = table.by_number.get(&nid.0)?;
        node.hold(1);
        Some(Arc::clone(node))
    }

    /// The node of a file with one reference more; a new one gets number `first`, or the next that is free.
    pub fn intern(&self, first: Nid, found: Found) -> io::Result<(Nid, Arc<Node>)> {
        let known = |table: &Table| {
            let number = *table.by_file.get(&found.id)?;
            let node = Arc::clone(table.by_number.get(&number)?);
            node.hold(1);
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
        let mut nid = first;
        while table.by_number.contains_key(&nid.0) {
            nid = next(nid);
            if nid == first {
                return Err(io::Error::from_raw_os_error(libc::ENFILE));
            }
        }
        let node = Arc::new(Node::new(found));
        node.hold(1);
        table.by_file.insert(node.id, nid.0);
        table.by_number.insert(nid.0, Arc::clone(&node));
        Ok((nid, node))
    }

    /// Takes `count` references back. A node without any is answered, to be closed without the lock.
    pub fn forget(&self, nid: Nid, count: u64) -> Option<Arc<Node>> {
        if nid == ROOT {
            return None;
        }
        let mut table = self.write();
        let node = table.by_number.get(&nid.0)?;
        let left = node.references.load(Ordering::Relaxed).saturating_sub(count);
        node.references.store(left, Ordering::Relaxed);
        if left > 0 {
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
