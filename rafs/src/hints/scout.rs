//! A second look at an image, from the other end, so that two processors share the reading and parsing.
//!
//! A look goes through modules depth first, and what comes next is known only when a text was parsed. A scout takes
//! the same way with the lists of each text backwards and leaves what it parsed; where the two meet, the look finds
//! the rest done. What a look answers does not depend on it: a file says the same to both.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::files::Inode;
use super::finder::Parsed;

/// What was parsed: of a file, from a byte on, and what it was made into.
pub(super) type Key = (Inode, u64, TypeId);

/// What a look and its scout leave for each other.
pub(super) struct Exchange {
    parsed: Mutex<HashMap<Key, Arc<dyn Any + Send + Sync>>>,
    over: AtomicBool,
}

impl Exchange {
    pub fn new() -> Self {
        Self { parsed: Mutex::default(), over: AtomicBool::new(false) }
    }

    /// What the other one has parsed.
    pub fn find<T: Parsed>(&self, key: &Key) -> Option<Arc<T>> {
        let parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(parsed.get(key)?).downcast().ok()
    }

    /// Leaves what is kept anyway.
    pub fn leave<T: Parsed>(&self, key: Key, parsed: &Arc<T>) {
        let parsed: Arc<dyn Any + Send + Sync> = parsed.clone();
        self.parsed.lock().unwrap_or_else(PoisonError::into_inner).insert(key, parsed);
    }

    /// Ends the scout at its next step.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}
