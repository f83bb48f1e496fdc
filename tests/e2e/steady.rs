//! A daemon under load: what it holds does not grow.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::recipes::{noise, prose};
use tests::{Context, Result, ensure, needs_mounts};

use crate::mounts::{Ready, call, delete, memory};

/// Cycles without `NYDUS_TEST_MINUTES`.
const CYCLES: usize = 60;
/// Readers of the image that stays, beside the one that comes and goes.
const READERS: usize = 3;
/// Most kB that the line through the samples may rise by: what is kept for `why`, a few thousand reads
/// and fetches, fills slowly, and the heap has holes.
const TOLERANCE: f64 = 2048.0;

/// Descriptors that it may come to need beside the images', once.
const SPARE: usize = 4;

/// What the daemon holds after a cycle.
struct Sample {
    at: Duration,
    memory: u64,
    descriptors: usize,
}

/// For some cycles, or for as many minutes as `NYDUS_TEST_MINUTES` says (`make soak`: 20): an image is
/// mounted with an empty cache, read whole, replaced by another under the same name, looked at through
/// the API and unmounted, while another is read by several readers that drop its pages. Memory and
/// descriptors are those of the beginning at the end.
#[test]
fn nothing_grows_under_load() -> Result<()> {
    needs_mounts!();
    let limit = match std::env::var("NYDUS_TEST_MINUTES") {
        Ok(text) => Some(Duration::from_secs(60 * text.parse::<u64>().context("NYDUS_TEST_MINUTES")?)),
        Err(_) => None,
    };
    let stays = Ready::new(&image(1))?;
    let (comes, other) = (Ready::new(&image(2))?, Ready::new(&image(3))?);
    let daemon = DaemonOptions::empty().flag("--log-level", "warn").start()?;
    stays.post(&daemon, "/stays")?;
    let stays_at = daemon.root().join("stays");
    let expected = contents(&stays_at)?;
    ensure!(expected == files(1), "the image that stays has other contents");
    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let samples = thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let (daemon, expected, over, reads, root) = (&daemon, &expected, &over, &reads, &stays_at);
                scope.spawn(move || -> Result<()> {
                    for (path, bytes) in expected.iter().cycle().skip(reader * 7) {
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                        let file = root.join(path);
                        ensure!(fs::read(&file)? == *bytes, "{} has other bytes", file.display());
                        daemon.drop_pages(&file)?;
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let result = cycles(&daemon, &comes, &other, limit);
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader does not panic")?;
        }
        result
    })?;
    let settled = &samples[samples.len() / 3..];
    let growth = slope(settled) * settled.last().map_or(0.0, |last| (last.at - settled[0].at).as_secs_f64());
    let (first, last) = (&settled[0], &settled[settled.len() - 1]);
    eprintln!(
        "{} cycles in {:.0?}, {} reads beside them: memory {} kB and {} descriptors after a third, {} kB and {} at \
         the end; the line through all of them rises by {growth:.0} kB",
        samples.len(),
        last.at,
        reads.load(Ordering::Relaxed),
        first.memory,
        first.descriptors,
        last.memory,
        last.descriptors,
    );
    ensure!(growth < TOLERANCE, "memory grew by {growth:.0} kB: {:?}", memories(settled));
    Ok(())
}

/// Mounts, reads, replaces and unmounts, and samples what the daemon holds after each round.
fn cycles(daemon: &Daemon, comes: &Ready, other: &Ready, limit: Option<Duration>) -> Result<Vec<Sample>> {
    let began = Instant::now();
    let at = daemon.root().join("c/image");
    let (first, second) = (files(2), files(3));
    let descriptors = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?.count()) };
    let bound = descriptors()? + SPARE;
    let mut samples = Vec::new();
    while limit.map_or(samples.len() < CYCLES, |limit| began.elapsed() < limit) {
        for image in [comes, other] {
            // What an unmount leaves to the background may still be written there.
            daemon.wait_until("the cache directory is left alone", |_| Ok(image.forget_cache().ok()))?;
        }
        comes.post(daemon, "/c/image")?;
        ensure!(contents(&at)? == first, "the first image has other contents");
        other.put(daemon, "/c/image")?;
        ensure!(contents(&at)? == second, "the second image has other contents");
        for path in ["/api/v1/metrics?id=/c/image", "/api/v1/metrics/blobcache?id=/c/image", "/api/v1/daemon"]
        {
            daemon.get(path)?;
        }
        let (status, _) = call(daemon, "DELETE", "/c/none", "")?;
        ensure!(status == 500, "an unmount of nothing: {status}");
        delete(daemon, "/c/image")?;
        // What nobody has read has nothing to wait for.
        comes.post(daemon, "/c/unread")?;
        delete(daemon, "/c/unread")?;
        // What was unmounted is closed when the kernel has forgotten its last node.
        let open = daemon.wait_until("the descriptors of unmounted images are closed", |_| {
            let open = descriptors()?;
            Ok((open <= bound).then_some(open))
        })?;
        samples.push(Sample { at: began.elapsed(), memory: memory(daemon)?, descriptors: open });
    }
    Ok(samples)
}

/// Kilobytes a second: the line with the least squares.
fn slope(samples: &[Sample]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, memory) = (mean(&|s| s.at.as_secs_f64()), mean(&|s| s.memory as f64));
    let (mut together, mut alone) = (0.0, 0.0);
    for sample in samples {
        let from_mean = sample.at.as_secs_f64() - time;
        together += from_mean * (sample.memory as f64 - memory);
        alone += from_mean * from_mean;
    }
    together / alone
}

fn memories(samples: &[Sample]) -> Vec<u64> {
    samples.iter().map(|sample| sample.memory).collect()
}

/// Small files and a few of several chunks, all of them other ones for another `seed`.
fn files(seed: u64) -> BTreeMap<PathBuf, Vec<u8>> {
    let small =
        (0..120).map(|n| (format!("d{}/small-{n}", n % 5), prose(seed * 1000 + n, 700 + 31 * n as usize)));
    let large = (0..3).map(|n| (format!("large-{n}"), noise(seed * 1000 + 500 + n, 1 << 20)));
    small.chain(large).map(|(path, bytes)| (path.into(), bytes)).collect()
}

fn image(seed: u64) -> Image {
    let dirs = (0..5).map(|n| Entry::dir(format!("d{n}")));
    let files =
        files(seed).into_iter().map(|(path, bytes)| Entry::file(path.to_string_lossy().as_bytes(), bytes));
    Image::new(vec![std::iter::once(Entry::dir("./")).chain(dirs).chain(files).collect()])
}

/// What the files below `root` hold.
fn contents(root: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                found.insert(path.strip_prefix(root)?.to_owned(), bytes);
            }
        }
    }
    Ok(found)
}
