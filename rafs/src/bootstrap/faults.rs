//! Where broken rules go: the door stops at the first, a check collects them.

use crate::{Error, Result};

/// Receives every broken rule that validation finds.
#[derive(Debug, Default)]
pub struct Faults {
    /// Faults to keep before only counting; `None` stops at the first.
    limit: Option<usize>,
    found: Vec<Error>,
    suppressed: u64,
}

impl Faults {
    /// Stops at the first fault: the door.
    pub fn stop_at_first() -> Self {
        Self::default()
    }

    /// Keeps up to `limit` faults and counts the rest.
    pub fn collect(limit: usize) -> Self {
        Self { limit: Some(limit), ..Self::default() }
    }

    /// Takes a fault. Answers it back as the error of the whole validation at the door.
    pub fn report(&mut self, fault: Error) -> Result<()> {
        match self.limit {
            None => return Err(fault),
            Some(limit) if self.found.len() < limit => self.found.push(fault),
            Some(_) => self.suppressed += 1,
        }
        Ok(())
    }

    /// Reports a `Corrupt` fault unless `rule` holds.
    pub fn require(&mut self, rule: bool, context: impl FnOnce() -> String) -> Result<()> {
        if rule { Ok(()) } else { self.report(Error::corrupt(context())) }
    }

    /// True if nothing was reported.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Faults found, and the number of those beyond the limit.
    pub fn into_parts(self) -> (Vec<Error>, u64) {
        (self.found, self.suppressed)
    }
}
