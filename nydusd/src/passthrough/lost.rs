//! Nodes that a predecessor gave the kernel. Paths are looked up anew and give the same numbers; what the kernel
//! asks for by number alone is open, or is somebody's working directory, and is searched for.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
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

/// Entries that a pass over the directory looks at.
const SEARCHED: usize = 1 << 20;
/// Bytes of a directory that are asked for at once.
const LISTING: usize = 32 << 10;

/// A pass over the directory, as far as somebody needed it: it goes on where it stopped, so that however many
/// numbers are asked for, every directory is read once.
#[derive(Debug)]
struct Pass {
    /// Directories to be read.
    pending: Vec<PathBuf>,
    /// Entries that may still be looked at.
    left: usize,
    /// Directories that were read.
    read: Vec<PathBuf>,
    /// Where every file that was seen is: index in `read`, and name.
    seen: HashMap<u64, (usize, CString)>,
}

impl Default for Pass {
    fn default() -> Self {
        Self { pending: vec![PathBuf::new()], left: SEARCHED, read: Vec::new(), seen: HashMap::new() }
    }
}

/// Locked during a search, so that there is one at a time.
#[derive(Debug, Default)]
pub(super) struct Searches(Mutex<Pass>);

impl HostMount {
    /// Searches the directory for the file with this number.
    ///
    /// # Errors
    /// ESTALE: it is not there any more, or among so many that it is not found.
    pub(super) fn find_lost(&self, nid: Nid) -> io::Result<Arc<Node>> {
        let mut pass = self.searches.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have found it meanwhile.
        if let Some(node) = self.nodes.get(nid) {
            return Ok(node);
        }
        if let Some(found) = self.search(&mut pass, nid) {
            let (number, node) = self.nodes.intern(nid, found)?;
            if number == nid {
                // The predecessor gave it to the kernel.
                node.give();
            }
            drop(self.nodes.release(number));
            if number == nid {
                return Ok(node);
            }
        }
        Err(io::Error::from_raw_os_error(libc::ESTALE))
    }

    fn search(&self, pass: &mut Pass, nid: Nid) -> Option<Found> {
        let root = self.nodes.get(ROOT)?;
        if let Some((dir, name)) = pass.seen.remove(&nid.0) {
            let dir = open_below(&root, &pass.read[dir]).ok();
            if let Some(found) = dir.and_then(|dir| self.look_at(&dir, &name))
                && found.id.number(self.home) == nid
            {
                return Some(found);
            }
            // It was moved since, or removed. It is not seen twice then: no third pass is for it.
            *pass = Pass::default();
        }
        while let Some(path) = pass.pending.pop() {
            // What can not be looked at is passed over: nobody can have got it from there.
            let Ok(dir) = open_below(&root, &path) else { continue };
            let place = pass.read.len();
            let mut wanted = None;
            let mut buffer = Vec::with_capacity(LISTING);
            let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
            while let Some(Ok(entry)) = entries.next() {
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                let Some(left) = pass.left.checked_sub(1) else {
                    pass.pending.clear();
                    break;
                };
                pass.left = left;
                let Some(found) = self.look_at(&dir, name) else { continue };
                if found.kind == FileType::Directory {
                    pass.pending.push(path.join(OsStr::from_bytes(name.to_bytes())));
                }
                let number = found.id.number(self.home);
                if number == nid {
                    wanted = Some(found);
                } else {
                    pass.seen.insert(number.0, (place, name.to_owned()));
                }
            }
            pass.read.push(path);
            if wanted.is_some() {
                return wanted;
            }
        }
        None
    }

    fn look_at(&self, dir: &OwnedFd, name: &CStr) -> Option<Found> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, Mode::empty()).ok()?;
        look(file, &self.own).ok()
    }
}

/// A directory that was seen below `root`. If somebody has put a link in its place, that is not followed.
fn open_below(root: &Node, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)
}
