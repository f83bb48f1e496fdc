//! Many images in one daemon.
//!
//! ```text
//!  API, command line ──▶ control ──▶ mount::open ──▶ Vfs::attach ──▶ transport::notify ──▶ kernel
//!                        (command)     (known)        (tree, place)     (stale)
//! ```
//!
//! - [`command`]: what to mount, as clients say it and as saved state keeps it.
//! - [`control`]: mount, remount and unmount while the daemon serves.
//! - [`known`]: images that this process has validated.
//! - [`mounted`]: what can be mounted: an image, or a directory of the host.
//! - [`tree`]: which of them, or which directory of the daemon's own, is where.
//!
//! An index is a part of every node id the kernel holds, so it is free again only when its
//! mount is out of the tree *and* the kernel has forgotten every node of it; then its generation
//! rises. Until then the mount answers for what is open of it.

pub mod command;
mod control;
pub mod error;
pub mod known;
pub mod mounted;
pub mod path;
pub mod place;
mod restore;
pub mod stale;
#[cfg(test)]
mod tests;
mod tree;
pub mod turns;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use rafs::bootstrap::Nid;

use self::mounted::Mounted;
use self::path::VfsPath;
use self::place::Place;
use self::stale::Stale;
use self::tree::State;
use crate::mount::Mount;
use crate::node::{MountIndex, NodeId};
use crate::passthrough::{Held, HostMount};

/// Above all cursors of images' directories, and all inode numbers of images.
pub(crate) const FIRST_DIRECTORY: u64 = tree::FIRST_DIRECTORY;

/// What a node id stands for.
#[derive(Clone, Debug)]
pub enum Node {
    /// A directory of the daemon's own.
    Own(u64),
    /// An inode of an image.
    Image {
        /// The image.
        mount: Arc<Mount>,
        /// The inode.
        nid: Nid,
        /// Our directory at the same place, if it is in the tree and on the way to a mountpoint.
        own: Option<u64>,
    },
    /// A file of the host.
    Host {
        /// The directory that it is in.
        host: Arc<HostMount>,
        /// Its number there.
        nid: Nid,
        /// Our directory at the same place, if it is in the tree and on the way to a mountpoint.
        own: Option<u64>,
        /// Keeps it known until the kernel holds it.
        held: Option<Arc<Held>>,
    },
}

impl Node {
    fn of(mounted: &Mounted, nid: Nid, own: Option<u64>) -> Self {
        match mounted {
            Mounted::Image(mount) => Self::Image { mount: Arc::clone(mount), nid, own },
            Mounted::Host(host) => Self::Host { host: Arc::clone(host), nid, own, held: None },
        }
    }

    /// Our directory that this is, or that is at the same place.
    pub fn own(&self) -> Option<u64> {
        match self {
            Self::Own(number) => Some(*number),
            Self::Image { own, .. } | Self::Host { own, .. } => *own,
        }
    }
}

/// An entry of a directory of ours.
#[derive(Clone, Debug)]
pub struct Child {
    /// Number of our directory.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// What is shown for it.
    pub node: Node,
}

/// One mount in the place of another.
#[derive(Debug)]
pub struct Replaced {
    /// What is mounted now.
    pub new: Mounted,
    /// What was.
    pub old: Mounted,
}

/// Why nothing could be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachError {
    /// Something is mounted there.
    Occupied,
    /// Nothing is mounted there.
    Vacant,
    /// 2^24 indexes are in use.
    Full,
}

/// The tree of all mounts.
#[derive(Debug)]
pub struct Vfs {
    /// Written only by attach and detach; readers hold it for a look-up, never while anything is waited
    /// for. Mounts are dropped without it.
    state: RwLock<State>,
    /// The command line's image is at the root.
    dedicated: AtomicBool,
    /// See [`SHARED`], [`ALONE`], [`TOLD`].
    xattrs: AtomicU8,
    /// There are directories of the host that a predecessor served.
    inherits: AtomicBool,
    /// What the kernel may believe and is not so: names that the last change concerned; in a successor, all that are
    /// not as its predecessor's tree had them. Locked last.
    outdated: Mutex<Vec<Stale>>,
    /// When the tree was last changed, in nanoseconds since 1970.
    changed: AtomicU64,
}

impl Default for Vfs {
    fn default() -> Self {
        Self {
            state: RwLock::default(),
            dedicated: AtomicBool::default(),
            xattrs: AtomicU8::default(),
            inherits: AtomicBool::default(),
            outdated: Mutex::default(),
            changed: AtomicU64::new(now()),
        }
    }
}

/// The time, in nanoseconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Images come and go: each is asked for its extended attributes.
const SHARED: u8 = 0;
/// There is one image, the command line's: if it has none, the kernel may be told that there are none at
/// all, which it believes for the connection's life.
const ALONE: u8 = 1;
/// The kernel was told.
const TOLD: u8 = 2;

impl Vfs {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the tree at `path`; answers what the kernel must be told, too.
    fn change<T, E>(
        &self,
        path: &VfsPath,
        change: impl FnOnce(&mut State) -> Result<T, E>,
    ) -> Result<(T, Vec<Stale>), E> {
        let names = |state: &State| match path.names().is_empty() {
            true => state.root_names(),
            false => BTreeMap::new(),
        };
        let mut state = self.write();
        let over = state.sweep();
        let before = (state.chain(path), names(&state));
        let result = change(&mut state);
        let after = (state.chain(path), names(&state));
        // Never the same as before: who has listed a directory tells by that whether to do it again.
        let later = |before: u64| Some(now().max(before + 1));
        let _ = self.changed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        let stale = tree::changed(path, (&before.0, &before.1), (&after.0, &after.1));
        // Whoever is told of the tree is told of that.
        self.outdated().clone_from(&stale);
        drop(state);
        drop(over);
        result.map(|result| (result, stale))
    }

    /// Mounts at `path` what `build` makes for the place it is given, under the lock: it does no I/O.
    ///
    /// # Errors
    /// `Occupied`, `Full`.
    pub fn attach<T: Into<Mounted>>(
        &self,
        path: &VfsPath,
        build: impl FnOnce(Place) -> T,
    ) -> Result<(Mounted, Vec<Stale>), AttachError> {
        self.change(path, |state| {
            if state.mounted(path).is_some() {
                return Err(AttachError::Occupied);
            }
            let mount: Mounted = build(state.reserve().ok_or(AttachError::Full)?).into();
            let number = state.make(path);
            state.put(number, mount.clone());
            Ok(mount)
        })
    }

    /// The same in place of what is mounted at `path`.
    ///
    /// # Errors
    /// `Vacant`, `Full`.
    pub fn replace<T: Into<Mounted>>(
        &self,
        path: &VfsPath,
        build: impl FnOnce(Place) -> T,
    ) -> Result<(Replaced, Vec<Stale>), AttachError> {
        self.change(path, |state| {
            if state.mounted(path).is_none() {
                return Err(AttachError::Vacant);
            }
            let new: Mounted = build(state.reserve().ok_or(AttachError::Full)?).into();
            let (number, old) = state.take(path).ok_or(AttachError::Vacant)?;
            state.put(number, new.clone());
            Ok(Replaced { new, old })
        })
    }

    /// Takes what is mounted at `path` out of the tree, and directories that lead nowhere then.
    ///
    /// # Errors
    /// `Vacant`.
    pub fn detach(&self, path: &VfsPath) -> Result<(Mounted, Vec<Stale>), AttachError> {
        self.change(path, |state| {
            let (number, mount) = state.take(path).ok_or(AttachError::Vacant)?;
            state.prune(number);
            Ok(mount)
        })
    }

    /// When directories of ours last changed, since 1970.
    pub fn changed(&self) -> Duration {
        Duration::from_nanos(self.changed.load(Ordering::Relaxed))
    }

    /// The mountpoint of the image that something mounted at `path` would be inside of, if it is no directory of ours
    /// yet that leads there, nor in FUSE's root.
    pub fn inside(&self, path: &VfsPath) -> Option<String> {
        let state = self.read();
        let mut at = tree::ROOT;
        for name in path.names() {
            let directory = &state.directories[&at];
            match directory.children.get(name) {
                Some(child) => at = *child,
                None if at == tree::ROOT => return None,
                None => return Some(state.mount(directory.shows?.0)?.image()?.mountpoint().to_owned()),
            }
        }
        None
    }

    /// What is mounted at `path`.
    pub fn mounted(&self, path: &VfsPath) -> Option<Mounted> {
        let state = self.read();
        state.mount(state.mounted(path)?).cloned()
    }

    /// All mounts of the tree, in the order of their indexes.
    pub fn all(&self) -> Vec<Mounted> {
        let state = self.read();
        state.slots.iter().filter(|slot| slot.attached).filter_map(|slot| slot.mount.clone()).collect()
    }

    /// The images among them.
    pub fn mounts(&self) -> Vec<Arc<Mount>> {
        self.all().iter().filter_map(Mounted::image).cloned().collect()
    }

    /// Images that are out of the tree, and that the kernel has nodes of.
    pub fn retired(&self) -> Vec<Arc<Mount>> {
        let state = self.read();
        let retired = state.slots.iter().filter(|slot| !slot.attached);
        retired.filter_map(|slot| slot.mount.as_ref()?.image().cloned()).collect()
    }

    /// What `node` stands for; `None` if it is gone.
    pub fn resolve(&self, node: NodeId) -> Option<Node> {
        let state = self.read();
        match node.index() {
            MountIndex(0) => {
                let number = node.0;
                let directory = state.directories.get(&number)?;
                match directory.shows.filter(|_| node == NodeId::ROOT) {
                    Some((index, nid)) => Some(Node::of(state.mount(index)?, nid, Some(number))),
                    None => Some(Node::Own(number)),
                }
            }
            index => {
                let slot = state.slot(index)?;
                let nid = node.nid();
                let own = slot.covers.get(&nid).copied();
                Some(Node::of(slot.mount.as_ref()?, nid, own))
            }
        }
    }

    /// What directory `number` shows under `name`, if that is on the way to a mountpoint.
    pub fn child(&self, number: u64, name: &[u8]) -> Option<Child> {
        let state = self.read();
        let name = std::str::from_utf8(name).ok()?;
        let child = *state.directories.get(&number)?.children.get(name)?;
        Some(show(&state, child))
    }

    /// The children of directory `number` behind cursor `after`, which is one's number, in the order of
    /// their numbers.
    pub fn children(&self, number: u64, after: u64) -> Vec<Child> {
        let state = self.read();
        let Some(directory) = state.directories.get(&number) else { return Vec::new() };
        let mut numbers: Vec<u64> =
            directory.children.values().copied().filter(|child| *child > after).collect();
        numbers.sort_unstable();
        numbers.into_iter().map(|child| show(&state, child)).collect()
    }

    /// Where directory `number` is in; the root is in itself. `None` if it is gone.
    pub fn parent(&self, number: u64) -> Option<Node> {
        let state = self.read();
        Some(show(&state, state.directories.get(&number)?.parent).node)
    }

    /// How many directories of ours are in directory `number`; `None` if it is gone.
    pub fn count(&self, number: u64) -> Option<usize> {
        Some(self.read().directories.get(&number)?.children.len())
    }

    /// The kernel gave back `count` references to `node`.
    pub fn forget(&self, node: NodeId, count: u64) {
        let (last, host) = {
            let state = self.read();
            let Some(slot) = state.slot(node.index()) else { return };
            slot.lookups.give_back(count);
            (slot.is_over(), slot.mount.as_ref().and_then(Mounted::host).cloned())
        };
        if let Some(host) = host {
            host.forget(node.nid(), count);
        }
        if last {
            self.sweep();
        }
    }

    /// The kernel has begun anew, and knows no node.
    pub fn forget_all(&self) {
        let hosts: Vec<_> = {
            let state = self.read();
            state.slots.iter().for_each(|slot| slot.lookups.give_back(u64::MAX));
            let mounts = state.slots.iter().filter_map(|slot| slot.mount.as_ref());
            mounts.filter_map(Mounted::host).cloned().collect()
        };
        hosts.iter().for_each(|host| host.forget_all());
        self.sweep();
    }

    /// Drops mounts that are out of the tree and that the kernel has forgotten.
    pub fn sweep(&self) {
        let over = self.write().sweep();
        drop(over);
    }

    fn outdated(&self) -> MutexGuard<'_, Vec<Stale>> {
        self.outdated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the kernel must be told once this tree is served, as a predecessor's was another one or had no time to
    /// tell.
    pub fn take_outdated(&self) -> Vec<Stale> {
        std::mem::take(&mut *self.outdated())
    }

    /// Says that one image is what this daemon is for.
    pub fn dedicate(&self) {
        self.dedicated.store(true, Ordering::Relaxed);
        self.xattrs.store(ALONE, Ordering::Relaxed);
    }

    /// The same in a successor, whose kernel goes on believing what it was told: others have come in the meantime if
    /// it `shares`, else it may know that an image without any extended attributes has none.
    pub fn dedicate_again(&self, shares: bool, has_xattrs: bool) {
        self.dedicate();
        let said = match (shares, has_xattrs) {
            (true, _) => SHARED,
            (false, true) => ALONE,
            (false, false) => TOLD,
        };
        self.xattrs.store(said, Ordering::Relaxed);
    }

    /// True if a request may be for a file of the host that a predecessor gave the kernel.
    pub fn inherits(&self) -> bool {
        self.inherits.load(Ordering::Relaxed)
    }

    /// True if one image is what this daemon is for. Others may come all the same.
    pub fn is_dedicated(&self) -> bool {
        self.dedicated.load(Ordering::Relaxed)
    }

    /// Says that images will come and go; false if the kernel was told before that there are no extended
    /// attributes.
    pub fn share(&self) -> bool {
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.xattrs.compare_exchange(ALONE, SHARED, set, fetch) != Err(TOLD)
    }

    /// True if each image is asked for its extended attributes, and the kernel was not told that there are none.
    pub fn shares_xattrs(&self) -> bool {
        self.xattrs.load(Ordering::Relaxed) == SHARED
    }

    /// True if the kernel is to be told that there are no extended attributes, as it is from then on.
    /// For images that have none.
    pub fn refuse_xattrs(&self) -> bool {
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.xattrs.compare_exchange(ALONE, TOLD, set, fetch) != Err(SHARED)
    }
}

/// What is shown for directory `number`, which there is.
fn show(state: &State, number: u64) -> Child {
    let directory = &state.directories[&number];
    let shown =
        directory.shows.and_then(|(index, nid)| Some(Node::of(state.mount(index)?, nid, Some(number))));
    Child { number, name: directory.name.clone(), node: shown.unwrap_or(Node::Own(number)) }
}
