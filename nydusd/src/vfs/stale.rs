//! What the kernel must not believe any longer.

use serde::{Deserialize, Serialize};

use crate::node::NodeId;

/// One thing that the kernel may have cached and that has changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stale {
    /// The name in this directory, that it is there or that it is not, and all below it.
    Entry {
        /// The directory.
        parent: NodeId,
        /// The name.
        name: Vec<u8>,
    },
    /// Attributes and listing of this directory.
    Node(NodeId),
    /// Every name there is: nobody can say which.
    Names,
}
