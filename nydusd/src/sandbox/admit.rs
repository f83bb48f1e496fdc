//! What of the host a daemon in a jail gets to see.
//!
//! A directory is admitted by a mount of its own, at the path that it has on the host, so that all that is named goes
//! by the same name on both sides. Such a mount ends where the directory does: `..` does not lead out of it. It can be
//! added while the daemon runs, as a Landlock rule can not: those of a process only ever become fewer.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, RawMode, mkdirat, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::own;
use super::place::Place;
use crate::sys;

/// The jail of a daemon, seen from outside.
#[derive(Debug)]
pub(super) struct Jail {
    namespace: OwnedFd,
    /// Its root directory, which can be written to from here.
    root: OwnedFd,
    /// Held while something is admitted. What a file server may take long to answer is asked before.
    admitted: Mutex<Table>,
    /// Connection of the daemon's own mount, which is not to be in here.
    own: Mutex<Option<u64>>,
}

/// How a directory is admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Access {
    /// To be written to, too.
    pub writable: bool,
    /// It is shown to others: what is mounted below it on the host later, shows there.
    pub shown: bool,
}

impl Access {
    fn covers(self, other: Self) -> bool {
        (self.writable || !other.writable) && (self.shown || !other.shown)
    }

    fn and(self, other: Self) -> Self {
        Self { writable: self.writable || other.writable, shown: self.shown || other.shown }
    }
}

/// What was admitted under a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Admitted {
    /// Device and inode.
    file: (u64, u64),
    access: Access,
}

/// What is to be admitted.
struct Wanted<'a> {
    place: &'a Place,
    /// Device and inode.
    file: (u64, u64),
    is_dir: bool,
    access: Access,
}

/// What was admitted, by the paths that the daemon sees it by.
#[derive(Debug, Default)]
struct Table(HashMap<PathBuf, Admitted>);

impl Table {
    /// True if it is at `path`, with all rights that are wanted.
    fn has(&self, path: &Path, wanted: &Wanted<'_>) -> bool {
        self.0.get(path).is_some_and(|has| has.file == wanted.file && has.access.covers(wanted.access))
    }

    /// The rights that are wanted, and those that it has.
    fn access(&self, wanted: &Wanted<'_>) -> Access {
        let had = self.0.get(wanted.place.real()).filter(|had| had.file == wanted.file);
        had.map_or(wanted.access, |had| had.access.and(wanted.access))
    }

    /// What is below `real` and has rights that are not among `access`, what is above others first.
    fn hidden(&self, real: &Path, access: Access) -> Vec<(PathBuf, Admitted)> {
        let is_hidden = |(path, had): &(&PathBuf, &Admitted)| {
            *path != real && path.starts_with(real) && !access.covers(had.access)
        };
        let mut below: Vec<_> =
            self.0.iter().filter(is_hidden).map(|(path, had)| (path.clone(), *had)).collect();
        below.sort_unstable_by(|one, other| one.0.cmp(&other.0));
        below
    }
}

impl Jail {
    /// # Errors
    /// The namespace can not be entered.
    pub fn new(namespace: OwnedFd, root: OwnedFd) -> anyhow::Result<Self> {
        let jail = Self { namespace, root, admitted: Mutex::default(), own: Mutex::default() };
        jail.inside(|_| Ok(()))?;
        Ok(jail)
    }

    /// Has the daemon see `place` by its path, and by `named`, unless it does.
    ///
    /// # Errors
    /// It is neither a directory nor a file, or the system refuses.
    pub fn admit(&self, named: &Path, place: &Place, access: Access) -> anyhow::Result<()> {
        let (real, meta) = (place.real(), place.metadata()?);
        let kind = meta.file_type();
        if !(kind.is_dir() || kind.is_file()) {
            bail!("{} is neither a directory nor a file", real.display());
        }
        let wanted = Wanted { place, file: (meta.dev(), meta.ino()), is_dir: kind.is_dir(), access };
        let named = std::path::absolute(named)?;
        {
            let mut admitted = self.lock();
            if admitted.has(&named, &wanted) {
                return Ok(());
            }
            self.forget_other(real, &wanted, &mut admitted)?;
            self.forget_other(&named, &wanted, &mut admitted)?;
        }
        self.admit_real(&wanted)?;
        // A link on the way may be inside of what is admitted: then it leads there.
        let leads_there = named == real
            || self
                .inside(|_| Ok(named.metadata().is_ok_and(|meta| (meta.dev(), meta.ino()) == wanted.file)))?;
        let mut admitted = self.lock();
        if admitted.has(&named, &wanted) {
            return Ok(());
        }
        let access = admitted.access(&wanted);
        if !leads_there {
            self.put(place, &named, wanted.is_dir, access)?;
        }
        admitted.0.insert(named, Admitted { file: wanted.file, access });
        Ok(())
    }

    /// Has the daemon see it by its own path.
    fn admit_real(&self, wanted: &Wanted<'_>) -> anyhow::Result<()> {
        let real = wanted.place.real();
        // Whoever looks for them may have to wait for a file server, and nobody else for them.
        let mut found = HashMap::new();
        let mut admitted = loop {
            let admitted = self.lock();
            if admitted.has(real, wanted) {
                return Ok(());
            }
            let below = admitted.hidden(real, admitted.access(wanted));
            let unknown = |(path, had): &(PathBuf, Admitted)| !found.contains_key(&(path.clone(), had.file));
            let Some((path, had)) = below.into_iter().find(unknown) else { break admitted };
            drop(admitted);
            let still =
                |place: &Place| place.metadata().is_ok_and(|meta| (meta.dev(), meta.ino()) == had.file);
            let place = Place::find(&path).ok().filter(still);
            let is_dir = place.as_ref().is_some_and(|place| place.metadata().is_ok_and(|meta| meta.is_dir()));
            found.insert((path, had.file), place.map(|place| (place, is_dir)));
        };
        // Who was admitted with other rights keeps those.
        let access = admitted.access(wanted);
        self.put(wanted.place, real, wanted.is_dir, access)?;
        let rights = if access.writable { ", writable" } else { "" };
        tracing::info!("admitted {}{rights}", real.display());
        admitted.0.insert(real.to_owned(), Admitted { file: wanted.file, access });
        // So has what was admitted below it before.
        for (path, had) in admitted.hidden(real, access) {
            let key = (path, had.file);
            match found.get(&key) {
                Some(Some((place, is_dir))) => self.put(place, &key.0, *is_dir, had.access)?,
                // Whoever wants it asks again.
                _ => drop(admitted.0.remove(&key.0)),
            }
        }
        Ok(())
    }

    /// What `path` named before may have been removed: nothing can be mounted on that.
    fn forget_other(&self, path: &Path, wanted: &Wanted<'_>, admitted: &mut Table) -> anyhow::Result<()> {
        if admitted.0.get(path).is_some_and(|had| had.file != wanted.file) {
            self.take_away(path)?;
            admitted.0.retain(|other, _| !other.starts_with(path));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts `place` where the daemon sees `path`.
    fn put(&self, place: &Place, path: &Path, is_dir: bool, access: Access) -> anyhow::Result<()> {
        let tree = clone_mount(place, is_dir, access).context("clone its mount")?;
        let own = *self.own.lock().unwrap_or_else(PoisonError::into_inner);
        self.inside(|process| {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let at = match openat(CWD, path, flags, Mode::empty()) {
                Ok(at) => at,
                Err(Errno::NOENT) => {
                    make_place(&self.root, path, is_dir).context("make its place")?;
                    openat(CWD, path, flags, Mode::empty())?
                }
                Err(e) => return Err(e.into()),
            };
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&tree, "", &at, "", flags).context("mount it")?;
            // It may have come along, and is found before something else hides it.
            let cleaned = own.map_or(Ok(()), |number| own::take_away(process, number));
            cleaned.inspect_err(|_| {
                let _ = detach(path);
            })
        })
    }

    /// Takes the mounts of connection `number`, which is the daemon's own, out of the jail, now and from now on.
    ///
    /// # Errors
    /// The system's.
    pub fn take_own(&self, number: u64) -> anyhow::Result<()> {
        let _admitted = self.lock();
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = Some(number);
        self.inside(|process| own::take_away(process, number))
    }

    /// Takes away what the daemon sees at `path`, and all below it. What it has open of that stays open.
    fn take_away(&self, path: &Path) -> anyhow::Result<()> {
        self.inside(|_| match detach(path) {
            // The kernel takes a mount away itself if what it covers is removed.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
            Err(e) => Err(e).context("take away what it was"),
        })
    }

    /// Runs `work` in the jail's mount namespace, in a thread of its own: nobody comes back from there. It gets that
    /// thread's directory in `/proc`, for the jail has no such thing.
    fn inside<T: Send>(&self, work: impl FnOnce(&OwnedFd) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("admit".to_owned()).spawn_scoped(scope, || {
                // Threads share root and working directory, which the namespace changes.
                unshare(CloneFlags::CLONE_FS)?;
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let process = openat(CWD, "/proc/thread-self", flags, Mode::empty()).context("/proc")?;
                setns(&self.namespace, CloneFlags::CLONE_NEWNS).context("enter the jail")?;
                work(&process)
            });
            let result = thread.context("start a thread")?.join();
            result.unwrap_or_else(|_| bail!("the thread in the jail panicked"))
        })
    }
}

/// Takes what is on top at `path` away.
fn detach(path: &Path) -> nix::Result<()> {
    umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
}

/// The same file or directory through a mount of its own, which is read-only and ends there.
///
/// # Errors
/// The system's.
pub(super) fn clone_of(place: &Place) -> io::Result<Place> {
    Ok(Place::at(clone_mount(place, false, Access::default())?, place.real()))
}

/// A mount of `place`, with `all` of those below it.
fn clone_mount(place: &Place, all: bool, access: Access) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let below = if all { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let tree = open_tree(place, "", flags | below)?;
    sys::confine_mount(tree.as_fd(), access.writable, access.shown)?;
    Ok(tree)
}

/// Makes an empty directory or file at `path` below `root`, and the directories that lead there.
pub(super) fn make_place(root: &OwnedFd, path: &Path, is_dir: bool) -> io::Result<()> {
    let names: Vec<_> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(Ok(name)),
            // `/a/../b` leads to `/b` where nothing is a link.
            Component::ParentDir => Some(Err(())),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
        })
        .collect();
    let mut chain = vec![root.try_clone()?];
    for (number, name) in names.iter().enumerate() {
        let Ok(name) = name else {
            if chain.len() > 1 {
                chain.pop();
            }
            continue;
        };
        let Some(at) = chain.last() else { break };
        let is_last = number + 1 == names.len();
        let made = match is_last && !is_dir {
            true => mknodat(
                at,
                *name,
                rustix::fs::FileType::RegularFile,
                Mode::from_raw_mode(0o600 as RawMode),
                0,
            ),
            false => mkdirat(at, *name, Mode::from_raw_mode(0o755)),
        };
        match made {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        if !is_last {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            chain.push(openat(at, *name, flags, Mode::empty())?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn places_are_made_below_the_root_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let root: OwnedFd = File::open(dir.path()).unwrap().into();
        make_place(&root, Path::new("/a/b/../c/./d"), true).unwrap();
        assert!(dir.path().join("a/c/d").is_dir());
        make_place(&root, Path::new("/a/c/file"), false).unwrap();
        assert!(dir.path().join("a/c/file").is_file());
        make_place(&root, Path::new("/../../../x"), true).unwrap();
        assert!(dir.path().join("x").is_dir());
        // Again is fine; what is in the way is not.
        make_place(&root, Path::new("/a/c/d"), true).unwrap();
        std::os::unix::fs::symlink("/tmp", dir.path().join("link")).unwrap();
        assert!(make_place(&root, Path::new("/link/y"), true).is_err());
        assert!(make_place(&root, Path::new("/a/c/file/y"), true).is_err());
    }
}
