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

/// A pass over the directory. It is made to its end for the first number that is asked for, as two files may have
/// the same; and serves all others.
#[derive(Debug)]
struct Pass {
    /// Directories to be read.
    pending: Vec<PathBuf>,
    /// Entries that may still be looked at.
    left: usize,
    /// Directories that were read.
    read: Vec<PathBuf>,
    /// Every number that was seen.
    seen: HashMap<u64, Seen>,
}

/// A number in a directory.
#[derive(Debug)]
struct Seen {
    generation: u64,
    /// Where the file is: index in [`Pass::read`], and name. `None` for two files of one number: nobody knows which one
    /// the kernel holds.
    place: Option<(usize, CString)>,
}

impl Default for Pass {
    fn default() -> Self {
        Self { pending: vec![PathBuf::new()], left: SEARCHED, read: Vec::new(), seen: HashMap::new() }
    }
}

impl Pass {
    fn see(&mut self, number: Nid, generation: u64, place: (usize, CString)) {
        let seen = self.seen.entry(number.0).or_insert(Seen { generation, place: Some(place) });
        if seen.generation != generation {
            seen.place = None;
        }
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
        // Once more for a file that was moved since. One that was removed is not seen again, and no third pass is for
        // it.
        for _ in 0..2 {
            self.complete(pass, &root);
            let seen = pass.seen.get(&nid.0)?;
            let Some((dir, name)) = &seen.place else {
                tracing::warn!(
                    "two files below {} have the number of one that is open ({:#x}): that one fails from now on",
                    self.source().display(),
                    nid.0
                );
                return None;
            };
            let found = open_below(&root, &pass.read[*dir]).ok().and_then(|dir| self.look_at(&dir, name));
            let is_it = |found: &Found| {
                found.id.number(self.home) == nid && found.id.generation(self.home) == seen.generation
            };
            if let Some(found) = found.filter(is_it) {
                return Some(found);
            }
            *pass = Pass::default();
        }
        None
    }

    /// Looks at everything that was not looked at yet.
    fn complete(&self, pass: &mut Pass, root: &Node) {
        while let Some(path) = pass.pending.pop() {
            // What can not be looked at is passed over: nobody can have got it from there.
            let Ok(dir) = open_below(root, &path) else { continue };
            let place = pass.read.len();
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
                let id = &found.id;
                pass.see(id.number(self.home), id.generation(self.home), (place, name.to_owned()));
            }
            pass.read.push(path);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_files_with_one_number_neither_is_taken() {
        let mut pass = Pass::default();
        let place = |name: &CStr| (0, name.to_owned());
        pass.see(Nid(7), 1, place(c"file"));
        pass.see(Nid(7), 1, place(c"another name of it"));
        pass.see(Nid(8), 1, place(c"other"));
        assert_eq!(pass.seen[&7].place, Some(place(c"file")));
        pass.see(Nid(7), 2, place(c"another file"));
        pass.see(Nid(7), 1, place(c"file"));
        assert_eq!(pass.seen[&7].place, None);
        assert!(pass.seen[&8].place.is_some());
    }
}
