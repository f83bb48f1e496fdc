//! Where a mount is in the node ids that the kernel holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::MountIndex;

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

impl Place {
    /// The place of an image that no kernel sees.
    pub fn unseen() -> Self {
        Self { index: MountIndex(1), generation: 0, lookups: Arc::default() }
    }
}
