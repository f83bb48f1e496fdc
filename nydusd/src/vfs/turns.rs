//! One command at a time for each mountpoint.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::path::VfsPath;

/// Mountpoints that a command works on.
#[derive(Debug, Default)]
pub struct Turns {
    /// Held for look-ups only.
    taken: Mutex<HashSet<VfsPath>>,
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

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(self.path);
    }
}
