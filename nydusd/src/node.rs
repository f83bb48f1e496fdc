//! Node ids: what the kernel calls an inode, as a pure function of the image.
//!
//! ```text
//! 63          40 39                    0
//! ├ mount index ─┼──────── nid ─────────┤
//! ```
//!
//! Index 0 belongs to the daemon itself: node 1 there is FUSE's root, which stands for the
//! root of the image mounted at `/`. Images get indexes from 1 on, so that an image's nid 1
//! is never taken for FUSE's root. A takeover needs no table: the same bootstrap at the same
//! index gives the same ids.

use rafs::bootstrap::Nid;
use serde::{Deserialize, Serialize};

/// Bits of the nid.
const NID_BITS: u32 = 40;
/// Largest mount index: 24 bits.
pub const MAX_INDEX: u32 = (1 << 24) - 1;

/// Place of a mount in the table; 0 is the daemon's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountIndex(pub u32);

/// A node id as it travels in FUSE messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

impl NodeId {
    /// FUSE's root.
    pub const ROOT: Self = Self(fuse_backend_rs::api::filesystem::ROOT_ID);

    /// The id of `nid` in the mount at `index`; `None` if either does not fit.
    pub fn new(index: MountIndex, nid: Nid) -> Option<Self> {
        (index.0 <= MAX_INDEX && nid.0 >> NID_BITS == 0)
            .then_some(Self(u64::from(index.0) << NID_BITS | nid.0))
    }

    /// The mount.
    pub fn index(self) -> MountIndex {
        // 24 bits remain.
        MountIndex((self.0 >> NID_BITS) as u32)
    }

    /// The inode in that mount.
    pub fn nid(self) -> Nid {
        Nid(self.0 & ((1 << NID_BITS) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_take_apart_as_they_were_put_together() {
        for (index, nid) in [(1, 36), (1, 1), (MAX_INDEX, (1 << 40) - 1), (0, 1)] {
            let id = NodeId::new(MountIndex(index), Nid(nid)).unwrap();
            assert_eq!((id.index(), id.nid()), (MountIndex(index), Nid(nid)));
        }
        assert_eq!(NodeId::new(MountIndex(0), Nid(1)), Some(NodeId::ROOT));
        assert_ne!(NodeId::new(MountIndex(1), Nid(1)), Some(NodeId::ROOT));
        assert_eq!(NodeId::new(MountIndex(1 << 24), Nid(1)), None);
        assert_eq!(NodeId::new(MountIndex(1), Nid(1 << 40)), None);
    }
}
