//! What one of all processes that serve a blob does for all of them.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::lock::{self, Kind};
use crate::ids::ByteRange;

/// What one at a time does of all that have a chunk map open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// Guesses what readers of the image want whose top blob this is.
    Guess,
    /// Fetches the blob context.
    Context,
}
const DUTIES: usize = 2;

/// The duties of one open map: byte locks on its file, from `first` on.
pub(super) struct Duties {
    file: Arc<File>,
    first: u64,
    /// Holders of this open map, by [`Duty`]: the system's locks only tell open maps apart.
    holders: [Arc<Mutex<u32>>; DUTIES],
}

impl Duties {
    /// The duties of whoever has opened `file`, at its bytes from `first` on.
    pub(super) fn new(file: Arc<File>, first: u64) -> Self {
        Self { file, first, holders: Default::default() }
    }

    /// Asks for a duty; `None` if another open map has it. Who asks this one again shares it.
    pub(super) fn try_take(&self, duty: Duty) -> io::Result<Option<HeldDuty>> {
        let holders = &self.holders[duty as usize];
        let range = ByteRange::new(self.first + duty as u64, 1).map_err(io::Error::other)?;
        let mut count = holders.lock().unwrap_or_else(PoisonError::into_inner);
        if *count == 0 && !lock::try_lock(&self.file, Kind::Exclusive, range)? {
            return Ok(None);
        }
        *count += 1;
        Ok(Some(HeldDuty { file: Arc::clone(&self.file), range, holders: Arc::clone(holders) }))
    }
}

/// A duty that this open map has. Given back on drop.
pub(super) struct HeldDuty {
    file: Arc<File>,
    range: ByteRange,
    holders: Arc<Mutex<u32>>,
}

impl Drop for HeldDuty {
    fn drop(&mut self) {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        *holders -= 1;
        if *holders == 0 {
            // Can only fail for a bad descriptor; closing frees the lock as well.
            let _ = lock::unlock(&self.file, self.range);
        }
    }
}
