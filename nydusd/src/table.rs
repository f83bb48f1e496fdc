//! Which image is mounted at which index.
//!
//! An index is a part of every node id the kernel holds, so it is free again only when its
//! mount is gone *and* the kernel has forgotten every node below it; then its generation
//! rises. One image at `/` is served today; the table has the shape for more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::mount::Mount;
use crate::node::{MAX_INDEX, MountIndex, NodeId};

/// References of the kernel to the nodes of one index, over all its inodes.
#[derive(Debug, Default)]
pub struct LookupCount(AtomicU64);

impl LookupCount {
    /// The kernel was given `count` references.
    pub fn take(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The kernel gave `count` references back.
    pub fn give_back(&self, count: u64) {
        // A kernel that forgets more than it was given must not make the count wrap.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| Some(held.saturating_sub(count)));
    }

    /// References held.
    pub fn held(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where a new mount goes.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its index.
    pub index: MountIndex,
    /// How many mounts had this index before.
    pub generation: u64,
    /// The kernel's references to its nodes.
    pub lookups: Arc<LookupCount>,
}

#[derive(Debug)]
struct Slot {
    mount: Option<Arc<Mount>>,
    generation: u64,
    lookups: Arc<LookupCount>,
}

/// All mounts of the daemon.
#[derive(Debug, Default)]
pub struct MountTable {
    /// Slot `i` is index `i + 1`. Written only to attach and detach; readers clone one `Arc`.
    slots: RwLock<Vec<Slot>>,
}

impl MountTable {
    /// Puts a mount into a free index. `build` is given the place and runs under the lock;
    /// it does no I/O. `None` if no index is free.
    pub fn attach(&self, build: impl FnOnce(Place) -> Mount) -> Option<Arc<Mount>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let free = slots.iter().position(|slot| slot.mount.is_none() && slot.lookups.held() == 0);
        let at = match free {
            Some(at) => {
                slots[at].generation += 1;
                at
            }
            None => {
                slots.push(Slot { mount: None, generation: 0, lookups: Arc::default() });
                slots.len() - 1
            }
        };
        let index = u32::try_from(at + 1).ok().filter(|index| *index <= MAX_INDEX)?;
        let slot = &mut slots[at];
        let place = Place {
            index: MountIndex(index),
            generation: slot.generation,
            lookups: Arc::clone(&slot.lookups),
        };
        let mount = Arc::new(build(place));
        slot.mount = Some(Arc::clone(&mount));
        Some(mount)
    }

    /// Takes the mount at `index` out; its index stays taken while the kernel holds nodes.
    pub fn detach(&self, index: MountIndex) -> Option<Arc<Mount>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(index.0.checked_sub(1)?).ok()?;
        slots.get_mut(at)?.mount.take()
    }

    /// The mount that answers for `node`. FUSE's root belongs to the mount at `/`.
    pub fn mount_of(&self, node: NodeId) -> Option<Arc<Mount>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        match node.index() {
            MountIndex(0) if node == NodeId::ROOT => slots
                .iter()
                .find_map(|slot| slot.mount.as_ref().filter(|mount| mount.mountpoint() == "/"))
                .cloned(),
            MountIndex(0) => None,
            MountIndex(index) => slots.get(index as usize - 1)?.mount.clone(),
        }
    }

    /// The kernel gave back `count` references to `node`.
    pub fn forget(&self, node: NodeId, count: u64) {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let at = (node.index().0 as usize).checked_sub(1);
        if let Some(slot) = at.and_then(|at| slots.get(at)) {
            slot.lookups.give_back(count);
        }
    }

    /// All mounts, in the order of their indexes.
    pub fn mounts(&self) -> Vec<Arc<Mount>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().filter_map(|slot| slot.mount.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rafs::bootstrap::{Bootstrap, OpenOptions};
    use rafs::fs::{Rafs, RafsOptions};
    use storage::read::{Completion, ReadSlice, Reader};

    use super::*;

    struct NoData;

    impl Reader for NoData {
        fn try_read(&self, _: &[ReadSlice], _: &mut [u8]) -> storage::Result<bool> {
            Ok(false)
        }

        fn submit(&self, _: Vec<ReadSlice>, _: storage::backend::Priority, _: Completion) {}
    }

    fn attach(table: &MountTable) -> Arc<Mount> {
        let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/empty/image.boot"));
        let options = OpenOptions::default();
        let bootstrap: Arc<dyn Bootstrap> =
            Arc::from(rafs::bootstrap::from_bytes(bytes.unwrap(), &options).unwrap());
        let rafs = Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap());
        table.attach(|place| Mount::for_tests(place, rafs, Arc::new(NoData))).unwrap()
    }

    #[test]
    fn an_index_rests_until_the_kernel_has_forgotten_it() {
        let table = MountTable::default();
        let first = attach(&table);
        assert_eq!((first.place().index, first.place().generation), (MountIndex(1), 0));
        let root = first.rafs().bootstrap().root();
        assert_eq!(first.node(root), Some(NodeId::ROOT));
        assert!(Arc::ptr_eq(&table.mount_of(NodeId::ROOT).unwrap(), &first));

        first.place().lookups.take(3);
        let node = NodeId::new(MountIndex(1), rafs::bootstrap::Nid(77)).unwrap();
        assert!(table.detach(MountIndex(1)).is_some());
        assert!(table.mount_of(node).is_none() && table.mount_of(NodeId::ROOT).is_none());
        assert_eq!(attach(&table).place().index, MountIndex(2), "three nodes are still held");

        table.forget(node, 2);
        assert_eq!(attach(&table).place().index, MountIndex(3));
        table.forget(node, 1);
        let again = attach(&table);
        assert_eq!((again.place().index, again.place().generation), (MountIndex(1), 1));
        // More than was given: the count stays at zero.
        table.forget(node, 5);
        assert_eq!(again.place().lookups.held(), 0);
        table.forget(NodeId(u64::MAX), 1);
        assert!(table.detach(MountIndex(0)).is_none());
    }
}
