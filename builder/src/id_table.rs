//! Chunks by what they are: five bytes each, for the keys stay where they are.

use std::hash::{BuildHasher as _, Hash, RandomState};

use hashbrown::HashTable;

use crate::content::ChunkId;

/// A map from keys to chunks that does not hold the keys: whoever asks says what the key of a chunk
/// is. Keys may be chosen by an attacker.
#[derive(Default)]
pub(crate) struct IdTable {
    table: HashTable<u32>,
    state: RandomState,
}

impl IdTable {
    /// The chunk with the key `key`.
    pub fn find<K: Hash + Eq>(&self, key: &K, key_of: impl Fn(ChunkId) -> K) -> Option<ChunkId> {
        let hash = self.state.hash_one(key);
        self.table.find(hash, |&id| key_of(ChunkId(id)) == *key).copied().map(ChunkId)
    }

    /// Adds a chunk whose key [`Self::find`] did not find; `key_of` knows those before it.
    pub fn insert<K: Hash + Eq>(&mut self, key: &K, id: ChunkId, key_of: impl Fn(ChunkId) -> K) {
        let Self { table, state } = self;
        table.insert_unique(state.hash_one(key), id.0, |&other| state.hash_one(key_of(ChunkId(other))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_found_and_nothing_else() {
        let keys: Vec<u64> = (0..5000).map(|n| n * n).collect();
        let of = |id: ChunkId| keys[id.0 as usize];
        let mut table = IdTable::default();
        for (id, key) in (0..).map(ChunkId).zip(&keys) {
            assert_eq!(table.find(key, of), None);
            table.insert(key, id, of);
        }
        for (id, key) in (0..).map(ChunkId).zip(&keys) {
            assert_eq!(table.find(key, of), Some(id));
            assert!(table.find(&(key + 2), of).is_none_or(|found| of(found) == key + 2));
        }
    }
}
