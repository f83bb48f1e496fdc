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
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, RawMode, mkdirat, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::sys;

/// Never admitted to be written to, nor is anything below.
const SYSTEM: [&str; 10] =
    ["/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr"];
/// Not admitted to be written to themselves.
const SHARED: [&str; 7] = ["/home", "/opt", "/root", "/run", "/srv", "/tmp", "/var"];
/// Never opened: no image, login or certificate is there.
const SECRET: [&str; 8] = [
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/sudoers",
    "/etc/ssh",
    "/proc",
    "/sys",
];

/// True for files that no daemon needs.
fn is_secret(real: &Path) -> bool {
    SECRET.iter().any(|secret| real.starts_with(secret)) || real.components().any(|c| c.as_os_str() == ".ssh")
}

/// Why a daemon does not get to see what is really at `real`.
pub(super) fn refusal(real: &Path, writable: bool) -> Option<&'static str> {
    let below = |places: &[&str]| places.iter().any(|place| real.starts_with(place));
    let is = |places: &[&str]| places.iter().any(|place| real == Path::new(place));
    if real == Path::new("/") {
        return Some("all of the host");
    }
    if is_secret(real) || SECRET.iter().any(|secret| Path::new(secret).starts_with(real)) {
        return Some("nothing that an image needs");
    }
    (writable && (below(&SYSTEM) || is(&SHARED))).then_some("a directory of the system")
}

/// The jail of a daemon, seen from outside.
#[derive(Debug)]
pub(super) struct Jail {
    namespace: OwnedFd,
    /// Its root directory, which can be written to from here.
    root: OwnedFd,
    /// Held while something is admitted.
    admitted: Mutex<HashMap<PathBuf, Admitted>>,
}

/// What was admitted under a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Admitted {
    device: u64,
    inode: u64,
    writable: bool,
}

impl Jail {
    /// # Errors
    /// The namespace can not be entered.
    pub fn new(namespace: OwnedFd, root: OwnedFd) -> anyhow::Result<Self> {
        let jail = Self { namespace, root, admitted: Mutex::default() };
        jail.inside(|| Ok(()))?;
        Ok(jail)
    }

    /// Has the daemon see what is at `real`, a canonical path, by that name, and by `named`, unless it does.
    ///
    /// # Errors
    /// It is neither a directory nor a file, or the system refuses.
    pub fn admit(&self, named: &Path, real: &Path, writable: bool) -> anyhow::Result<()> {
        let meta = real.metadata()?;
        let kind = meta.file_type();
        if !(kind.is_dir() || kind.is_file()) {
            bail!("{} is neither a directory nor a file", real.display());
        }
        let wanted = Admitted { device: meta.dev(), inode: meta.ino(), writable };
        let named = std::path::absolute(named)?;
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |path: &Path, admitted: &HashMap<PathBuf, Admitted>| {
            admitted
                .get(path)
                .is_some_and(|has| *has == wanted || *has == Admitted { writable: true, ..wanted })
        };
        if has(&named, &admitted) {
            return Ok(());
        }
        // What it named before may have been removed: nothing can be mounted on that.
        for path in [real, &named] {
            let had = admitted.get(path).map(|had| (had.device, had.inode));
            if had.is_some_and(|had| had != (wanted.device, wanted.inode)) {
                self.take_away(path)?;
                admitted.retain(|other, _| !other.starts_with(path));
            }
        }
        if !has(real, &admitted) {
            self.put(real, real, kind.is_dir(), writable)?;
            tracing::info!("admitted {}{}", real.display(), if writable { ", writable" } else { "" });
            admitted.insert(real.to_owned(), wanted);
        }
        if named != real {
            // A link on the way may be inside of what was admitted before: then it leads there.
            let leads_there = self.inside(|| {
                Ok(named.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (wanted.device, wanted.inode)))
            })?;
            if !leads_there {
                self.put(real, &named, kind.is_dir(), writable)?;
            }
            admitted.insert(named, wanted);
        }
        Ok(())
    }

    /// Mounts what is at `real` where the daemon sees `path`.
    fn put(&self, real: &Path, path: &Path, is_dir: bool, writable: bool) -> anyhow::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let all = if is_dir { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
        let tree = open_tree(CWD, real, flags | all).context("clone its mount")?;
        sys::confine_mount(tree.as_fd(), writable).context("confine its mount")?;
        self.inside(|| {
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
            move_mount(&tree, "", &at, "", flags).context("mount it")
        })
    }

    /// Takes away what the daemon sees at `path`, and all below it. What it has open of that stays open.
    fn take_away(&self, path: &Path) -> anyhow::Result<()> {
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        self.inside(|| match umount2(path, flags) {
            // The kernel takes a mount away itself if what it covers is removed.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
            Err(e) => Err(e).context("take away what it was"),
        })
    }

    /// Runs `work` in the jail's mount namespace, in a thread of its own: nobody comes back from there.
    fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("admit".to_owned()).spawn_scoped(scope, || {
                // Threads share root and working directory, which the namespace changes.
                unshare(CloneFlags::CLONE_FS)?;
                setns(&self.namespace, CloneFlags::CLONE_NEWNS).context("enter the jail")?;
                work()
            });
            let result = thread.context("start a thread")?.join();
            result.unwrap_or_else(|_| bail!("the thread in the jail panicked"))
        })
    }
}

/// The same file or directory through a mount of its own, which is read-only and ends there.
///
/// # Errors
/// The system's.
pub(super) fn clone_of(place: &OwnedFd) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(place, "", flags)?;
    sys::confine_mount(tree.as_fd(), false)?;
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
    fn the_system_is_not_admitted() {
        for (path, readable, writable) in [
            ("/", false, false),
            ("/etc", false, false),
            ("/etc/nydus", true, false),
            ("/etc/ssh", false, false),
            ("/etc/shadow", false, false),
            ("/root/.ssh/id_ed25519", false, false),
            ("/proc/1/root/var", false, false),
            ("/sys/fs", false, false),
            ("/dev", true, false),
            ("/usr/share/images", true, false),
            ("/usrlocal", true, true),
            ("/run", true, false),
            ("/run/nydus", true, true),
            ("/var", true, false),
            ("/var/lib/nydus/cache", true, true),
            ("/tmp/x", true, true),
        ] {
            let path = Path::new(path);
            assert_eq!(refusal(path, false).is_none(), readable, "read {}", path.display());
            assert_eq!(refusal(path, true).is_none(), writable, "write {}", path.display());
        }
    }

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
