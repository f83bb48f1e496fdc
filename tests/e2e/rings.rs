//! FUSE over io_uring: what holds through `/dev/fuse` holds through rings.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::mount::{MntFlags, umount2};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::Entry;
use tests::journey::{Journey, within};
use tests::mount::mounted;
use tests::recipes::{self, noise};
use tests::relay::Rule;
use tests::tree::{Overlook, assert_same};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

use crate::lifetime::{abort, connection};
use crate::outages::{AT_ONCE, BROUGHT_ALONG, CHUNK, READERS, scene, spawn_readers, wait_for_requests};

/// Whether the kernel offers rings.
const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// What a daemon logs that is served by rings.
const THROUGH_RINGS: &str = "FUSE requests come through io_uring";

/// The kernel's setting is as a test wants it, for one test at a time; then as it was.
struct Setting {
    was: String,
    _turn: MutexGuard<'static, ()>,
}

impl Setting {
    fn set(value: &str) -> Result<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let was = fs::read_to_string(PARAMETER).context("Linux 6.14 or later is needed")?;
        fs::write(PARAMETER, value).context(PARAMETER)?;
        Ok(Self { was, _turn: turn })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(PARAMETER, &self.was);
    }
}

/// Prints why and ends the test where the kernel has no rings.
macro_rules! needs_rings {
    () => {
        needs_mounts!();
        if !Path::new(PARAMETER).exists() {
            eprintln!("skipped {}: the kernel has no FUSE over io_uring ({PARAMETER})", module_path!());
            return Ok(());
        }
    };
}

/// Starts a daemon and checks that it has rings.
fn start(options: &DaemonOptions) -> Result<Daemon> {
    let daemon = options.clone().switch("--fuse-io-uring").start()?;
    daemon.wait_for_log(THROUGH_RINGS)?;
    Ok(daemon)
}

/// Binds the calling thread to the first CPU that it may run on.
fn bind() -> Result<()> {
    let usable = sched_getaffinity(Pid::from_raw(0))?;
    let mut set = CpuSet::new();
    set.set((0..CpuSet::count()).find(|&cpu| usable.is_set(cpu) == Ok(true)).context("no CPU")?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Four readers at once find the whole tree as it was, uncached and cached.
#[test]
fn the_tree_is_the_same() -> Result<()> {
    needs_rings!();
    needs_programs!("umoci");
    let _setting = Setting::set("Y")?;
    let journey = Journey::start(&recipes::shell()?)?;
    let nydus = journey.convert("nydus", &["--chunk-size", "0x10000"])?;
    let wanted = journey.reference()?;
    let daemon = start(&DaemonOptions::image(&nydus.reference(), &journey.path("cache")))?;
    for _ in 0..2 {
        thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| assert_same(&wanted, daemon.root(), Overlook::default())))
                .collect();
            readers.into_iter().try_for_each(|reader| reader.join().expect("readers do not panic"))
        })?;
        // The next time from the cache of the daemon, not the kernel's.
        for file in ["bin/sh", "bin/busybox"].map(|name| daemon.root().join(name)) {
            if file.exists() {
                daemon.drop_pages(&file)?;
            }
        }
    }
    Ok(())
}

/// 64 readers on one CPU, more than a queue has entries, wait on a stalled registry; whoever asks for what is
/// there, from any CPU, has it at once. Then all have their bytes.
#[test]
fn a_stalled_registry_delays_nobody_else() -> Result<()> {
    needs_rings!();
    needs_programs!("docker-registry");
    let _setting = Setting::set("Y")?;
    let big = Arc::new(noise(1, usize::try_from(READERS * CHUNK)?));
    let cached = noise(2, 100_000);
    let scene = scene(vec![
        Entry::dir("./"),
        Entry::dir("d"),
        Entry::file("d/big", big.as_slice()),
        Entry::file("d/cached", cached.as_slice()),
        Entry::file("d/unseen", "never looked at before\n"),
        Entry::file("d/unseen-2", "never looked at before\n"),
    ])?;
    let daemon = start(&scene.options().flag("--prefer", "bytes"))?;
    let root = daemon.root().to_owned();
    ensure!(fs::read(root.join("d/cached"))? == cached, "wrong bytes before the outage");
    daemon.drop_pages(&root.join("d/cached"))?;

    scene.relay.set(Rule::Stall);
    // Threads inherit where they run.
    let (path, bytes) = (root.clone(), Arc::clone(&big));
    let readers = thread::spawn(move || bind().map(|()| spawn_readers(&path, &bytes)));
    let readers = readers.join().expect("it does not panic")?;
    scene.relay.wait_stalled(1)?;
    wait_for_requests(&root, READERS - BROUGHT_ALONG)?;

    for (name, bound) in [("d/unseen", true), ("d/unseen-2", false)] {
        let path = root.clone();
        let (names, metadata, bytes) = within(AT_ONCE, "ls, stat and a cached read", move || {
            if bound {
                bind()?;
            }
            let names = fs::read_dir(path.join("d"))?.count();
            let bytes = fs::read(path.join("d/cached"))?;
            Ok((names, fs::symlink_metadata(path.join(name))?, bytes))
        })?;
        ensure!(names == 4 && metadata.len() == 23 && bytes == cached, "wrong answers during the outage");
        daemon.drop_pages(&root.join("d/cached"))?;
    }

    scene.relay.set(Rule::Pass);
    for reader in readers {
        reader.join().expect("readers do not panic")?;
    }
    Ok(())
}

/// SIGTERM ends a daemon whose readers all wait for a registry, and them with it.
#[test]
fn sigterm_ends_readers_that_wait() -> Result<()> {
    needs_rings!();
    needs_programs!("docker-registry");
    let _setting = Setting::set("Y")?;
    let big = Arc::new(noise(6, usize::try_from(READERS * CHUNK)?));
    let scene = scene(vec![Entry::dir("./"), Entry::dir("d"), Entry::file("d/big", big.as_slice())])?;
    let mut daemon = start(&scene.options().flag("--on-outage", "wait"))?;
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

/// Killed, a daemon leaves nobody waiting: neither readers of its own nor those who come later.
#[test]
fn a_killed_daemon_leaves_nobody_waiting() -> Result<()> {
    needs_rings!();
    needs_programs!("docker-registry");
    let _setting = Setting::set("Y")?;
    let big = Arc::new(noise(7, usize::try_from(READERS * CHUNK)?));
    let scene = scene(vec![Entry::dir("./"), Entry::dir("d"), Entry::file("d/big", big.as_slice())])?;
    let mut daemon = start(&scene.options().flag("--on-outage", "wait"))?;
    let root = daemon.root().to_owned();
    scene.relay.set(Rule::Stall);
    let readers = spawn_readers(&root, &big);
    wait_for_requests(&root, READERS)?;
    daemon.kill()?;
    for reader in readers {
        let ended =
            within(AT_ONCE, "the end of a reader", move || Ok(reader.join().expect("readers do not panic")))?;
        ensure!(ended.is_err(), "a reader got bytes from a registry that sent none");
    }
    let later = within(AT_ONCE, "a later reader", move || Ok(fs::read_dir(root.join("d")).is_err()))?;
    ensure!(later, "a dead mount answers");
    Ok(())
}

/// Every way to end a mount ends the daemon as it does without rings.
#[test]
fn the_end_of_the_mount_ends_the_daemon() -> Result<()> {
    needs_rings!();
    let _setting = Setting::set("Y")?;
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache"));
    for flags in [MntFlags::empty(), MntFlags::MNT_DETACH, MntFlags::MNT_FORCE] {
        let mut daemon = start(&options)?;
        ensure!(fs::read_dir(daemon.root())?.count() > 0, "an empty tree");
        umount2(daemon.root(), flags)?;
        let status = daemon.wait_ended()?;
        ensure!(status.code() == Some(0), "{flags:?}: {status}");
    }
    let mut daemon = start(&options)?;
    let open = fs::File::open(daemon.root().join("etc/hostname"))?;
    let status = daemon.terminate()?;
    ensure!(status.code() == Some(0) && !mounted(daemon.root()), "busy: {status}");
    drop(open);
    let mut daemon = start(&options)?;
    abort(connection(&daemon)?)?;
    let status = daemon.wait_ended()?;
    ensure!(status.code() == Some(1) && !mounted(daemon.root()), "aborted: {status}");
    Ok(())
}

/// What may wait for the host's disk is not served by rings, and served.
#[test]
fn a_host_directory_is_served_without() -> Result<()> {
    needs_rings!();
    let _setting = Setting::set("Y")?;
    let host = tempfile::tempdir()?;
    let options = DaemonOptions::empty().flag("--shared-dir", host.path()).switch("--writable");
    let daemon = options.switch("--fuse-io-uring").start()?;
    daemon.wait_for_log("no FUSE over io_uring with --writable or --shared-dir")?;
    fs::write(daemon.root().join("file"), "bytes")?;
    ensure!(fs::read(host.path().join("file"))? == b"bytes", "other bytes");
    ensure!(!daemon.log().contains(THROUGH_RINGS), "rings all the same");
    Ok(())
}

/// A daemon that may not run on every CPU would leave requests from the others in line.
#[test]
fn a_daemon_on_some_cpus_serves_without() -> Result<()> {
    needs_rings!();
    let usable = sched_getaffinity(Pid::from_raw(0))?;
    if (0..CpuSet::count()).filter(|&cpu| usable.is_set(cpu) == Ok(true)).count() < 2 {
        eprintln!("skipped {}: two CPUs are needed", module_path!());
        return Ok(());
    }
    let _setting = Setting::set("Y")?;
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).switch("--fuse-io-uring");
    // Children inherit where they run.
    let daemon = thread::spawn(move || bind().and_then(|()| options.start()));
    let daemon = daemon.join().expect("it does not panic")?;
    let line = daemon.wait_for_log("no FUSE over io_uring")?;
    ensure!(line.contains("let it run on all CPUs"), "{line}");
    ensure!(fs::read(daemon.root().join("etc/hostname")).is_ok(), "it does not serve");
    ensure!(!daemon.log().contains(THROUGH_RINGS), "rings all the same");
    Ok(())
}

/// Where the kernel does not offer rings, the daemon says what to do and serves without.
#[test]
fn without_rings_there_is_a_remedy_and_a_mount() -> Result<()> {
    needs_rings!();
    let _setting = Setting::set("N")?;
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache"));
    let daemon = options.switch("--fuse-io-uring").start()?;
    let line = daemon.wait_for_log("no FUSE over io_uring")?;
    ensure!(line.contains(&format!("echo Y > {PARAMETER}")), "{line}");
    ensure!(fs::read(daemon.root().join("etc/hostname")).is_ok(), "it does not serve");
    ensure!(!daemon.log().contains(THROUGH_RINGS), "rings all the same");
    Ok(())
}
