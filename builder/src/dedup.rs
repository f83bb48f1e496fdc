//! Finds a chunk among those already stored.

use hashbrown::HashTable;
use storage::digest::Digest;

use crate::chunks::ChunkStore;
use crate::content::ChunkId;

/// Index of a [`ChunkStore`] by digest and length: four bytes a chunk beside the table's slack.
#[derive(Default)]
pub(crate) struct DedupIndex {
    table: HashTable<u32>,
}

/// The digest is already uniform: its first eight bytes are the hash. An attacker who finds many
/// digests with one prefix slows his own build down and nothing else.
fn hash(digest: &Digest) -> u64 {
    digest.0.first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

impl DedupIndex {
    /// The stored chunk with this digest and length.
    pub fn find(&self, store: &ChunkStore, digest: &Digest, len: u32) -> Option<ChunkId> {
        self.table.find(hash(digest), |&id| store.key(id) == (digest, len)).copied().map(ChunkId)
    }

    /// Adds a chunk that [`Self::find`] did not find.
    pub fn insert(&mut self, store: &ChunkStore, id: ChunkId) {
        let digest = store.key(id.0).0;
        self.table.insert_unique(hash(digest), id.0, |&other| hash(store.key(other).0));
    }
}
