//! One command at a time for each mountpoint.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::path::VfsPath;

/// Mountpoints that a command works on.
#[derive(Debug, Default)]
pub struct Turns {
    /// Held for look-ups only.
    taken: Mutex<HashSet<VfsPath>>,
    /// Held while the tree changes and the kernel is told.
    change: Mutex<()>,
}

/// The right to work on a mountpoint. Given back when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    path: &'a VfsPath,
}

impl Turns {
    /// The right to work on `path`; `None` while somebody else has it.
    pub fn take<'a>(&'a self, path: &'a VfsPath) -> Option<Turn<'a>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(path.clone()).then_some(Turn { turns: self, path })
    }
}

impl Turns {
    /// The right to change the tree, until the kernel knows: directories that one change makes are
    /// part of the next one's path, and its client may look at once. For threads that run commands.
    pub fn change(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(self.path);
    }
}
