//! A registry that stalls, refuses, cuts and lies: readers wait or get EIO, never wrong bytes, and
//! nobody else notices.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tests::daemon::Daemon;
use tests::image::{Entry, Image};
use tests::journey::within;
use tests::mount::{connection_file, mounted};
use tests::recipes::noise;
use tests::relay::Rule;
use tests::scene::Scene;
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// Readers that hang in the test of a stalled registry.
pub const READERS: u64 = 64;

/// Chunks that reading another file may have fetched ahead.
pub const BROUGHT_ALONG: u64 = 8;

/// The part of the file that each of them reads: one chunk.
pub const CHUNK: u64 = 64 << 10;
/// What `ls`, stat and cached reads may take on a loaded machine with two cores. Behind a stalled
/// registry they would take the read timeout, 60 seconds.
pub const AT_ONCE: Duration = Duration::from_secs(3);

/// An image of one layer, in chunks of 64 KiB.
pub fn scene(entries: Vec<Entry>) -> Result<Scene> {
    Scene::set(&Image::new(vec![entries]), &["--chunk-size", "0x10000"])
}

/// 64 readers wait on a stalled registry behind 4 threads; `ls`, stat and cached reads answer at once.
#[test]
fn a_stalled_registry_delays_nobody_else() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let big = Arc::new(noise(1, usize::try_from(READERS * CHUNK)?));
    let cached = noise(2, 100_000);
    let scene = scene(vec![
        Entry::dir("./"),
        Entry::dir("d"),
        Entry::file("d/big", big.as_slice()),
        Entry::file("d/cached", cached.as_slice()),
        Entry::file("d/unseen", "never looked at before\n"),
    ])?;
    // What one read brings along is not waited for later.
    let daemon = scene.options().flag("--fuse-threads", "4").flag("--prefer", "bytes").start()?;
    let root = daemon.root().to_owned();
    ensure!(fs::read(root.join("d/cached"))? == cached, "wrong bytes before the outage");
    // The bytes go out of the page cache and stay in the daemon's.
    daemon.drop_pages(&root.join("d/cached"))?;

    scene.relay.set(Rule::Stall);
    let readers = spawn_readers(&root, &big);
    scene.relay.wait_stalled(1)?;
    wait_for_requests(&root, READERS - BROUGHT_ALONG)?;

    let started = Instant::now();
    let path = root.clone();
    within(AT_ONCE, "ls", move || Ok(fs::read_dir(path.join("d"))?.count()))?;
    let path = root.clone();
    let metadata = within(AT_ONCE, "stat", move || Ok(fs::symlink_metadata(path.join("d/unseen"))?))?;
    let path = root.join("d/cached");
    let bytes = within(AT_ONCE, "a cached read", move || Ok(fs::read(path)?))?;
    let elapsed = started.elapsed();
    ensure!(metadata.len() == 23 && bytes == cached, "wrong answers during the outage");
    eprintln!("ls, stat and a cached read beside {READERS} stalled readers: {elapsed:?}");

    scene.relay.set(Rule::Pass);
    for reader in readers {
        reader.join().expect("readers do not panic")?;
    }
    Ok(())
}

/// SIGTERM ends a daemon whose readers all wait for a registry, and them with it.
#[test]
fn sigterm_ends_readers_that_wait() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let big = Arc::new(noise(6, usize::try_from(READERS * CHUNK)?));
    let scene = scene(vec![Entry::dir("./"), Entry::dir("d"), Entry::file("d/big", big.as_slice())])?;
    // They would wait for ever.
    let mut daemon = scene.options().flag("--on-outage", "wait").start()?;
    let root = daemon.root().to_owned();
    scene.relay.set(Rule::Stall);
    let readers = spawn_readers(&root, &big);
    scene.relay.wait_stalled(1)?;
    wait_for_requests(&root, READERS)?;
    let status = daemon.terminate()?;
    ensure!(status.code() == Some(0), "{status}");
    ensure!(!mounted(&root), "still mounted");
    for reader in readers {
        let ended =
            within(AT_ONCE, "the end of a reader", move || Ok(reader.join().expect("readers do not panic")))?;
        ensure!(ended.is_err(), "a reader got bytes from a registry that sent none");
    }
    Ok(())
}

/// One reader a chunk of `d/big`, which holds `bytes`.
pub fn spawn_readers(root: &Path, bytes: &Arc<Vec<u8>>) -> Vec<thread::JoinHandle<Result<()>>> {
    (0..READERS)
        .map(|number| {
            let (path, bytes) = (root.join("d/big"), Arc::clone(bytes));
            thread::spawn(move || -> Result<()> {
                let file = File::open(path)?;
                // No readahead, or one reader would wait for the chunks of all.
                nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
                let mut found = [0; 4096];
                file.read_exact_at(&mut found, number * CHUNK)?;
                let start = usize::try_from(number * CHUNK)?;
                ensure!(found == bytes[start..start + 4096], "reader {number} got wrong bytes");
                Ok(())
            })
        })
        .collect()
}

/// Waits until the kernel has `count` requests waiting for the daemon of this mount.
pub fn wait_for_requests(root: &Path, count: u64) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    // The connection is named by the minor number of the mount's anonymous device.
    let minor = nix::sys::stat::minor(fs::metadata(root)?.dev());
    let file = connection_file(minor, "waiting")?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let waiting: u64 =
            fs::read_to_string(&file).with_context(|| file.display().to_string())?.trim().parse()?;
        if waiting >= count {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "only {waiting} of {count} requests wait in the kernel");
        // The kernel's counter can only be asked.
        thread::sleep(Duration::from_millis(5));
    }
}

/// A read that misses fails with EIO after the timeout; after the outage the next one succeeds.
#[test]
fn an_outage_ends_with_recovery() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = noise(3, 300_000);
    let scene = scene(vec![Entry::dir("./"), Entry::file("file", bytes.as_slice())])?;
    let daemon = scene.options().flag("--read-timeout", "2").start()?;
    for rule in [Rule::Stall, Rule::Refuse(503), Rule::Refuse(403), Rule::FlipFirstBit, Rule::CutAfter(10)] {
        scene.relay.set(rule);
        let error = read(&daemon, "file").err().with_context(|| format!("{rule:?}: the read should fail"))?;
        ensure!(error.raw_os_error() == Some(libc::EIO), "{rule:?}: {error}");
        ensure!(fs::read_dir(daemon.root())?.count() == 1, "{rule:?}: the listing is wrong");
    }
    scene.relay.set(Rule::Pass);
    ensure!(read(&daemon, "file")? == bytes, "wrong bytes after the outage");
    Ok(())
}

/// A registry that ignores `Range` sends its blob once, and right bytes come of it.
#[test]
fn a_registry_without_ranges_serves_right_bytes() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = noise(4, 300_000);
    let scene = scene(vec![Entry::dir("./"), Entry::file("file", bytes.as_slice())])?;
    let daemon = scene.options().flag("--read-timeout", "5").start()?;
    scene.relay.set(Rule::IgnoreRange);
    ensure!(read(&daemon, "file")? == bytes, "wrong bytes from a registry without ranges");
    scene.relay.set(Rule::Pass);
    ensure!(read(&daemon, "file")? == bytes, "wrong bytes after recovery");
    Ok(())
}

/// With `--on-outage wait` a read outlives its timeout and ends well.
#[test]
fn a_patient_read_waits_for_the_registry() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = noise(5, 100_000);
    let scene = scene(vec![Entry::dir("./"), Entry::file("file", bytes.as_slice())])?;
    let daemon = scene.options().flag("--read-timeout", "1").flag("--on-outage", "wait").start()?;
    scene.relay.set(Rule::Refuse(503));
    let path = daemon.root().join("file");
    let reader = thread::spawn(move || fs::read(path));
    // Three refusals: the read has survived at least two of them.
    scene.relay.wait_arrived(3)?;
    ensure!(!reader.is_finished(), "a patient read ended during the outage");
    scene.relay.set(Rule::Pass);
    let found = reader.join().expect("the reader does not panic")?;
    ensure!(found == bytes, "wrong bytes after the outage");
    Ok(())
}

fn read(daemon: &Daemon, name: &str) -> std::io::Result<Vec<u8>> {
    fs::read(daemon.root().join(name))
}
