//! Nodes that a predecessor gave the kernel. Paths are looked up anew and give the same numbers; what the kernel
//! asks for by number alone is open, or is somebody's working directory, and is searched for.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rafs::bootstrap::Nid;
use rustix::fs::{FileType, Mode, OFlags, RawDir, ResolveFlags};

use super::file_id::{Found, look};
use super::nodes::Node;
use super::{HostMount, ROOT};

/// Entries that one search looks at.
const SEARCHED: usize = 1 << 20;
/// Searches in vain that are remembered.
const REMEMBERED: usize = 4096;
/// Bytes of a directory that are asked for at once.
const LISTING: usize = 32 << 10;

/// Numbers that were searched for in vain: their files are gone. Held during a search, so that there is
/// one at a time.
#[derive(Debug, Default)]
pub(super) struct Searches(Mutex<HashSet<u64>>);

impl HostMount {
    /// Searches the directory for the file with this number.
    ///
    /// # Errors
    /// ESTALE: it is not there any more.
    pub(super) fn find_lost(&self, nid: Nid) -> io::Result<Arc<Node>> {
        let mut gone = self.searches.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have found it meanwhile.
        if let Some(node) = self.nodes.get(nid) {
            return Ok(node);
        }
        if !gone.contains(&nid.0)
            && let Some(found) = self.search(nid)
        {
            // The reference is the one that the predecessor gave the kernel.
            let (number, node) = self.nodes.intern(nid, found)?;
            if number == nid {
                return Ok(node);
            }
            drop(self.nodes.forget(number, 1));
        }
        if gone.len() < REMEMBERED {
            gone.insert(nid.0);
        }
        Err(io::Error::from_raw_os_error(libc::ESTALE))
    }

    fn search(&self, nid: Nid) -> Option<Found> {
        let root = self.nodes.get(ROOT)?;
        let mut left = SEARCHED;
        let mut pending = vec![PathBuf::new()];
        while let Some(path) = pending.pop() {
            // What can not be looked at is passed over: nobody can have got it from there.
            let Ok(dir) = open_below(&root, &path) else { continue };
            let mut buffer = Vec::with_capacity(LISTING);
            let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
            while let Some(Ok(entry)) = entries.next() {
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                left = left.checked_sub(1)?;
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&dir, name, flags, Mode::empty());
                let Some(found) = file.ok().and_then(|file| look(file, &self.own).ok()) else { continue };
                if found.id.number(self.home) == nid {
                    return Some(found);
                }
                if found.kind == FileType::Directory {
                    pending.push(path.join(OsStr::from_bytes(name.to_bytes())));
                }
            }
        }
        None
    }
}

/// A directory that was seen below `root`. If somebody has put a link in its place, that is not followed.
fn open_below(root: &Node, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)
}
