//! The mounts, and the daemon's own directories that lead to them.
//!
//! Every name on the way to a mountpoint is a directory here, with a number that is never given
//! again. What the kernel is shown for it depends on what lies there:
//!
//! | there | shown |
//! |---|---|
//! | a mountpoint | the root of what is mounted |
//! | below an image that has a directory of that name | that directory, our names added to its own |
//! | else, also below a directory of the host | an empty directory of ours |
//!
//! FUSE's root keeps its node id 1 whatever is mounted there.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use rafs::bootstrap::{FileType, Nid};

use super::mounted::{Mounted, WeakMounted};
use super::path::VfsPath;
use super::place::{LookupCount, Place};
use super::stale::Stale;
use crate::node::{MAX_INDEX, MountIndex, NodeId};

/// Number of the daemon's root directory.
pub(super) const ROOT: u64 = 1;

/// First number of other directories: above all inode numbers of images, so that they can not be taken
/// for those of the image at `/`, and all cursors of directories.
pub(super) const FIRST_DIRECTORY: u64 = 1 << 39;

/// One directory of the daemon's own.
#[derive(Debug)]
pub(super) struct Directory {
    pub parent: u64,
    pub name: String,
    pub children: BTreeMap<String, u64>,
    /// What is mounted on it.
    pub mount: Option<MountIndex>,
    /// The directory of an image that is shown for it.
    pub shows: Option<(MountIndex, Nid)>,
}

impl Directory {
    fn new(parent: u64, name: String) -> Self {
        Self { parent, name, children: BTreeMap::new(), mount: None, shows: None }
    }
}

/// One index of node ids.
#[derive(Debug)]
pub(super) struct Slot {
    /// What nodes of this index belong to, also after it was taken out of the tree, while the kernel
    /// holds some.
    pub mount: Option<Mounted>,
    /// The last one that was here; others may be at work on it.
    last: Option<WeakMounted>,
    /// It is in the tree.
    pub attached: bool,
    pub generation: u64,
    pub lookups: Arc<LookupCount>,
    /// All references were counted: false for what a predecessor has handed out.
    pub counted: bool,
    /// Its directories that our directories are shown as.
    pub covers: HashMap<Nid, u64>,
}

impl Slot {
    fn new() -> Self {
        Self {
            mount: None,
            last: None,
            attached: false,
            generation: 0,
            lookups: Arc::default(),
            counted: true,
            covers: HashMap::new(),
        }
    }

    /// Nobody can come upon its mount any more. Of what a predecessor has handed out that is never known: such a
    /// mount stays, as there are no more of them than were taken over.
    pub fn is_over(&self) -> bool {
        !self.attached && self.mount.is_some() && self.counted && self.lookups.held() == 0
    }

    /// Nor is anybody about to give the kernel a node of this index: that takes the mount.
    fn is_free(&self) -> bool {
        let unused = self.mount.is_none() && !self.last.as_ref().is_some_and(WeakMounted::is_held);
        unused && self.counted && self.lookups.held() == 0
    }
}

/// All of it. Changes keep this: `shows` and `covers` follow from the rest ([`State::rebuild`]).
#[derive(Debug)]
pub(super) struct State {
    /// Slot `i` is index `i + 1`.
    pub slots: Vec<Slot>,
    pub directories: HashMap<u64, Directory>,
    pub next_directory: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            directories: HashMap::from([(ROOT, Directory::new(ROOT, String::new()))]),
            next_directory: FIRST_DIRECTORY,
        }
    }
}

impl State {
    pub fn slot(&self, index: MountIndex) -> Option<&Slot> {
        self.slots.get((index.0 as usize).checked_sub(1)?)
    }

    pub fn slot_mut(&mut self, index: MountIndex) -> Option<&mut Slot> {
        self.slots.get_mut((index.0 as usize).checked_sub(1)?)
    }

    pub fn mount(&self, index: MountIndex) -> Option<&Mounted> {
        self.slot(index)?.mount.as_ref()
    }

    /// What is mounted at `path`.
    pub fn mounted(&self, path: &VfsPath) -> Option<MountIndex> {
        self.directories[&self.find(path)?].mount
    }

    /// Our directory at `path`.
    fn find(&self, path: &VfsPath) -> Option<u64> {
        path.names().iter().try_fold(ROOT, |at, name| self.directories[&at].children.get(name).copied())
    }

    /// Our directory at `path`, made with its parents if need be.
    pub fn make(&mut self, path: &VfsPath) -> u64 {
        let mut at = ROOT;
        for name in path.names() {
            at = match self.directories[&at].children.get(name) {
                Some(child) => *child,
                None => {
                    let number = self.next_directory;
                    self.next_directory += 1;
                    self.add(number, at, name);
                    number
                }
            };
        }
        at
    }

    /// Adds directory `number` called `name` to `parent`, both of which are right.
    pub fn add(&mut self, number: u64, parent: u64, name: &str) {
        self.directories.insert(number, Directory::new(parent, name.to_owned()));
        if let Some(parent) = self.directories.get_mut(&parent) {
            parent.children.insert(name.to_owned(), number);
        }
    }

    /// Removes directory `number` and its parents as long as nothing is mounted on or below them.
    pub fn prune(&mut self, mut number: u64) {
        while number != ROOT
            && let Some(directory) = self.directories.get(&number)
            && directory.children.is_empty()
            && directory.mount.is_none()
        {
            let Some(Directory { parent, name, .. }) = self.directories.remove(&number) else { return };
            if let Some(parent) = self.directories.get_mut(&parent) {
                parent.children.remove(&name);
            }
            number = parent;
        }
        self.rebuild();
    }

    /// A free index, and its slot ready for a mount; `None` if all are taken.
    pub fn reserve(&mut self) -> Option<Place> {
        let at = match self.slots.iter().position(Slot::is_free) {
            Some(at) => {
                self.slots[at].generation += 1;
                at
            }
            None => self.slots.len(),
        };
        let index = u32::try_from(at + 1).ok().filter(|index| *index <= MAX_INDEX)?;
        if at == self.slots.len() {
            self.slots.push(Slot::new());
        }
        let slot = &self.slots[at];
        Some(Place {
            index: MountIndex(index),
            generation: slot.generation,
            lookups: Arc::clone(&slot.lookups),
        })
    }

    /// Sees to it that indexes below `next` are not given to new mounts: a predecessor used them.
    pub fn reserve_past(&mut self, next: u32) {
        let count = next.saturating_sub(1) as usize;
        self.slots.resize_with(count, || Slot { counted: false, ..Slot::new() });
    }

    /// Makes `mount` what is mounted on directory `number`.
    pub fn put(&mut self, number: u64, mount: Mounted) {
        let index = mount.place().index;
        if let Some(slot) = self.slot_mut(index) {
            slot.attached = true;
            slot.last = Some(mount.downgrade());
            slot.mount = Some(mount);
        }
        if let Some(directory) = self.directories.get_mut(&number) {
            directory.mount = Some(index);
        }
        self.rebuild();
    }

    /// Takes out of the tree what is mounted at `path`: its directory and the mount, which answers for
    /// its nodes until the kernel has forgotten them. [`State::put`] or [`State::prune`] comes next.
    pub fn take(&mut self, path: &VfsPath) -> Option<(u64, Mounted)> {
        let number = self.find(path)?;
        let index = self.directories.get_mut(&number)?.mount.take()?;
        let slot = self.slot_mut(index)?;
        slot.attached = false;
        Some((number, slot.mount.clone()?))
    }

    /// Takes what is over; to be dropped without the lock.
    pub fn sweep(&mut self) -> Vec<Mounted> {
        let over = self.slots.iter_mut().filter(|slot| slot.is_over());
        over.filter_map(|slot| slot.mount.take()).collect()
    }

    /// Finds out what is shown for each directory.
    pub fn rebuild(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.covers.clear());
        let mut pending = vec![(ROOT, None)];
        while let Some((number, below)) = pending.pop() {
            let Some(directory) = self.directories.get(&number) else { continue };
            let root = |index| Some((index, self.mount(index)?.root()));
            let shows = directory.mount.map_or(below, root);
            for (name, child) in &directory.children {
                let below = shows.and_then(|(index, dir)| {
                    let (nid, file_type) = self.look(index, dir, name)?;
                    (file_type == FileType::Directory).then_some((index, nid))
                });
                pending.push((*child, below));
            }
            if let Some((index, nid)) = shows
                && let Some(slot) = self.slot_mut(index)
            {
                slot.covers.insert(nid, number);
            }
            if let Some(directory) = self.directories.get_mut(&number) {
                directory.shows = shows;
            }
        }
    }

    /// The entry of an image's own directory. Directories of the host are not asked: names on the way to
    /// mountpoints below one cover what it has under them.
    fn look(&self, index: MountIndex, dir: Nid, name: &str) -> Option<(Nid, FileType)> {
        let found = self.mount(index)?.image()?.rafs().bootstrap().lookup(dir, name.as_bytes()).ok()??;
        Some((found.nid, found.file_type))
    }

    /// What the kernel is shown for directory `number`.
    fn shown(&self, number: u64) -> NodeId {
        let image = |(index, nid)| self.mount(index)?.node(nid);
        match self.directories.get(&number) {
            Some(directory) if number != ROOT => directory.shows.and_then(image).unwrap_or(NodeId(number)),
            _ => NodeId::ROOT,
        }
    }

    /// What the kernel is shown for each name of `path`, the root first; `None` where there is nothing.
    pub fn chain(&self, path: &VfsPath) -> Vec<Option<NodeId>> {
        let mut own = Some(ROOT);
        let mut image = self.directories[&ROOT].shows;
        let mut chain = vec![Some(NodeId::ROOT)];
        for name in path.names() {
            own = own.and_then(|number| self.directories[&number].children.get(name).copied());
            match own {
                Some(number) => {
                    image = self.directories[&number].shows;
                    chain.push(Some(self.shown(number)));
                }
                None => {
                    image = image.and_then(|(index, dir)| Some((index, self.look(index, dir, name)?.0)));
                    chain.push(image.and_then(|(index, nid)| self.mount(index)?.node(nid)));
                }
            }
        }
        chain
    }

    /// All that the kernel may be shown in the root directory; what it can not know, or does not believe, is
    /// left out.
    pub fn root_names(&self) -> BTreeMap<Vec<u8>, NodeId> {
        let root = &self.directories[&ROOT];
        let mut names = BTreeMap::new();
        if let Some((index, dir)) = root.shows
            && let Some(Mounted::Image(mount)) = self.mount(index)
        {
            // What can not be listed was never shown.
            let _ = mount.rafs().bootstrap().children(dir, 0, &mut |child| {
                if let Some(node) = mount.node(child.nid) {
                    names.insert(child.name.to_vec(), node);
                }
                ControlFlow::Continue(())
            });
        }
        names.extend(
            root.children.iter().map(|(name, number)| (name.clone().into_bytes(), self.shown(*number))),
        );
        names
    }
}

/// What the kernel has to look up again after a change at `path`: the topmost name that changed, and
/// all below it with it.
pub(super) fn changed(
    path: &VfsPath,
    before: (&[Option<NodeId>], &BTreeMap<Vec<u8>, NodeId>),
    after: (&[Option<NodeId>], &BTreeMap<Vec<u8>, NodeId>),
) -> Vec<Stale> {
    if path.names().is_empty() {
        // FUSE's root can not be looked up again, only what is in it.
        let names = before.1.keys().chain(after.1.keys());
        let mut stale: Vec<Stale> = names
            .filter(|name| before.1.get(*name) != after.1.get(*name))
            .map(|name| Stale::Entry { parent: NodeId::ROOT, name: name.clone() })
            .collect();
        stale.sort_unstable();
        stale.dedup();
        stale.push(Stale::Node(NodeId::ROOT));
        return stale;
    }
    let places = path.names().iter().zip(before.0.windows(2)).zip(after.0.windows(2));
    for ((name, before), after) in places {
        if let (Some(parent), true) = (before[0], before[1] != after[1]) {
            return vec![Stale::Entry { parent, name: name.clone().into_bytes() }, Stale::Node(parent)];
        }
    }
    Vec::new()
}
