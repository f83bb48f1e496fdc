//! What is known of single files: counters, first accesses, files read lately. Each is kept
//! only if the configuration asks for it, and grows with the files that are touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rafs::bootstrap::Nid;
use serde::Serialize;

use super::{FOPS, Fop, size_class};

/// What to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Counters by file (`iostats_files`).
    pub counters: bool,
    /// When each file was read first, and how often (`access_pattern`).
    pub pattern: bool,
    /// Which files were read since somebody last asked (`latest_read_files`).
    pub latest: bool,
}

/// Counters of one file, as the API shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileCounters {
    /// Operations on it.
    pub total_fops: u64,
    /// Bytes of it given to readers.
    pub data_read: u64,
    /// Reads by size class.
    pub block_count_read: [u64; 8],
    /// Operations that succeeded.
    pub fop_hits: [u64; FOPS],
    /// Operations that failed.
    pub fop_errors: [u64; FOPS],
}

/// First access of one file, as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Access {
    /// The file.
    pub ino: u64,
    /// Reads of it.
    pub nr_read: u64,
    /// When it was read first, seconds since the epoch.
    pub first_access_time_secs: u64,
    /// Nanoseconds of that second.
    pub first_access_time_nanos: u32,
}

/// What one mount knows of its files.
#[derive(Debug)]
pub struct Files {
    options: FileOptions,
    /// Each held for one look-up and a few additions.
    counters: Mutex<BTreeMap<u64, Box<FileCounters>>>,
    pattern: Mutex<BTreeMap<u64, Access>>,
    latest: Mutex<BTreeSet<u64>>,
}

/// The maps stay whole whatever panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Files {
    pub(super) fn new(options: FileOptions) -> Self {
        Self { options, counters: Mutex::default(), pattern: Mutex::default(), latest: Mutex::default() }
    }

    /// What is kept.
    pub fn options(&self) -> FileOptions {
        self.options
    }

    /// Notes an operation on `nid`.
    pub(super) fn record(&self, nid: Nid, fop: Fop, ok: bool) {
        if self.options.counters {
            let mut counters = lock(&self.counters);
            count(counters.entry(nid.0).or_default(), fop, ok);
        }
    }

    /// Notes a read of `bytes`, or one that failed.
    pub(super) fn record_read(&self, nid: Nid, bytes: Option<u32>) {
        if self.options.counters {
            let mut counters = lock(&self.counters);
            let file = counters.entry(nid.0).or_default();
            count(file, Fop::Read, bytes.is_some());
            if let Some(bytes) = bytes.map(u64::from) {
                file.data_read += bytes;
                file.block_count_read[size_class(bytes)] += 1;
            }
        }
        if self.options.pattern {
            let mut pattern = lock(&self.pattern);
            let access = pattern.entry(nid.0).or_insert_with(|| {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Access {
                    ino: nid.0,
                    nr_read: 0,
                    first_access_time_secs: now.as_secs(),
                    first_access_time_nanos: now.subsec_nanos(),
                }
            });
            access.nr_read += 1;
        }
        if self.options.latest {
            lock(&self.latest).insert(nid.0);
        }
    }

    /// Counters by inode number.
    pub fn counters(&self) -> BTreeMap<u64, Box<FileCounters>> {
        lock(&self.counters).clone()
    }

    /// First accesses, earliest first.
    pub fn pattern(&self) -> Vec<Access> {
        let mut all: Vec<Access> = lock(&self.pattern).values().cloned().collect();
        all.sort_by_key(|access| (access.first_access_time_secs, access.first_access_time_nanos));
        all
    }

    /// Inode numbers read since the last call: `[ino]`, or `[first, last]` where several
    /// follow one another.
    pub fn take_latest(&self) -> Vec<Vec<u64>> {
        let numbers: Vec<u64> = std::mem::take(&mut *lock(&self.latest)).into_iter().collect();
        numbers
            .chunk_by(|a, b| a + 1 == *b)
            .filter_map(|run| match run {
                [] => None,
                [one] => Some(vec![*one]),
                [first, .., last] => Some(vec![*first, *last]),
            })
            .collect()
    }
}

fn count(file: &mut FileCounters, fop: Fop, ok: bool) {
    file.total_fops += 1;
    let counters = if ok { &mut file.fop_hits } else { &mut file.fop_errors };
    counters[fop as usize] += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_what_was_asked_for() {
        let all = Files::new(FileOptions { counters: true, pattern: true, latest: true });
        all.record(Nid(7), Fop::Getattr, true);
        for nid in [9, 7, 8, 20, 7] {
            all.record_read(Nid(nid), Some(6));
        }
        all.record_read(Nid(8), None);
        let seven = &all.counters()[&7];
        assert_eq!((seven.total_fops, seven.data_read, seven.block_count_read[0]), (3, 12, 2));
        assert_eq!((seven.fop_hits[0], seven.fop_hits[4], seven.fop_errors[4]), (1, 2, 0));
        assert_eq!(all.counters()[&8].fop_errors[4], 1);
        let order: Vec<_> = all.pattern().iter().map(|access| (access.ino, access.nr_read)).collect();
        assert_eq!(order, [(9, 1), (7, 2), (8, 2), (20, 1)]);
        assert_eq!(all.take_latest(), [vec![7, 9], vec![20]]);
        assert!(all.take_latest().is_empty());

        let none = Files::new(FileOptions::default());
        none.record(Nid(7), Fop::Getattr, true);
        none.record_read(Nid(7), Some(6));
        assert!(none.counters().is_empty() && none.pattern().is_empty() && none.take_latest().is_empty());
    }
}
