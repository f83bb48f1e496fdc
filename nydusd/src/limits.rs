//! Limits of the process: open files, and memory that is held without need.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors left to the rest of the system (contract 1.2).
const RESERVED: u64 = 16_384;
/// Most that is asked for without the user's word.
const MOST: u64 = 1_000_000;
/// Fetched bytes between two looks at what the heap can give back, which take about a millisecond.
const TRIM_EVERY: u64 = 4 << 20;
/// Least time between them while an image starts, when somebody waits for the processor.
const TRIM_PAUSE: Duration = Duration::from_millis(50);
/// Least time between them once the daemon has seen [`STREAMED`] bytes: its first start is over, or whole images
/// are being read, and what the heap holds without need grows with what comes in between.
const TRIM_PAUSE_STREAMING: Duration = Duration::from_millis(25);
/// More than nearly all starts read.
const STREAMED: u64 = 64 << 20;

/// Keeps memory that was freed from staying with the process. To be called before threads are
/// started.
pub fn keep_heap_small() {
    storage::heap::keep_small();
}

/// Notes that `bytes` of fetched data went through the heap; now and then gives its free pages
/// back.
///
/// Pieces of streams leave holes between what stays: after reading a whole image 8 of 10 MB of the
/// heap were free.
pub fn passed_through(bytes: u64) {
    static SINCE: AtomicU64 = AtomicU64::new(0);
    static ALL: AtomicU64 = AtomicU64::new(0);
    let streams = ALL.fetch_add(bytes, Relaxed) >= STREAMED;
    if SINCE.fetch_add(bytes, Relaxed) + bytes < TRIM_EVERY {
        return;
    }
    let pause = if streams { TRIM_PAUSE_STREAMING } else { TRIM_PAUSE };
    if trim(pause) {
        SINCE.store(0, Relaxed);
    }
}

/// Notes that an image was given up, and gives the pages that it had back.
///
/// Without that, what comes between two images keeps the heap from being used again: a little more of it
/// with each of the first thousands.
pub fn has_given_up() {
    trim(Duration::ZERO);
}

/// Gives back free pages of the heap, unless that was done within `pause`.
fn trim(pause: Duration) -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    // Whoever finds it taken leaves it to the holder.
    let Ok(mut last) = LAST.try_lock() else { return false };
    if last.is_some_and(|last| last.elapsed() < pause) {
        return false;
    }
    storage::heap::trim();
    *last = Some(Instant::now());
    true
}

/// Raises the limit of open files towards `wanted`; 0 leaves it. What the system refuses is
/// logged and lived with.
pub fn raise_nofile(wanted: u64) {
    if wanted == 0 {
        return;
    }
    let system =
        std::fs::read_to_string("/proc/sys/fs/file-max").ok().and_then(|text| text.trim().parse().ok());
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(e) => return tracing::warn!("the limit of open files is unknown and left alone: {e}"),
    };
    let target = target(wanted, soft, system.unwrap_or(MOST));
    if target != soft
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, target, target)
            .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, target.min(hard), hard))
    {
        tracing::warn!("the limit of open files stays {soft} instead of {target}: {e}");
    }
}

/// min(wanted, max(soft, min(system − reserve, 10^6))).
fn target(wanted: u64, soft: u64, system: u64) -> u64 {
    wanted.min(soft.max(system.saturating_sub(RESERVED).min(MOST)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_target_follows_the_contract() {
        for (wanted, soft, system, target) in [
            (1_000_000, 1024, u64::MAX, 1_000_000),
            (4096, 1024, u64::MAX, 4096),
            (1_000_000, 1024, 40_000, 23_616),
            (1_000_000, 50_000, 40_000, 50_000),
        ] {
            assert_eq!(super::target(wanted, soft, system), target);
        }
    }
}
