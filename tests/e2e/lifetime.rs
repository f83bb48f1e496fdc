//! How a daemon ends, what it tells about itself, and what a mounted tree shows.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::Journey;
use tests::mount::{connection_file, mounted};
use tests::{Result, binaries, command, ensure, needs_mounts, recipes};

/// SIGTERM: exit 0, unmounted, the API socket gone.
#[test]
fn sigterm_unmounts() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let mut daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
    // Busy: a lazy unmount works all the same.
    let open = fs::File::open(daemon.root().join("etc/hostname"))?;
    let status = daemon.terminate()?;
    ensure!(status.code() == Some(0), "{status}: {}", daemon.log());
    ensure!(!mounted(daemon.root()), "still mounted");
    ensure!(!daemon.socket().exists(), "the API socket is left");
    drop(open);
    Ok(())
}

/// What a start lacks is told with what to do, and what has no effect is warned of.
#[test]
fn mistakes_at_the_start_are_told_with_their_remedy() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let dir = scratch.path().to_string_lossy().into_owned();
    let (short, noise) = (scratch.path().join("short"), scratch.path().join("noise"));
    fs::write(&short, "short")?;
    fs::write(&noise, recipes::noise(7, 8192))?;
    let blobs = |bootstrap: &std::path::Path| {
        DaemonOptions::empty().flag("--bootstrap", bootstrap).flag("--localfs-dir", scratch.path())
    };
    for (options, words) in [
        (DaemonOptions::empty().flag("--image", format!("oci:{dir}")), "skopeo copy"),
        (blobs(&short), "nydus-image create"),
        (blobs(&noise), "nydus-image create"),
    ] {
        let (code, log) = options.refused()?;
        ensure!(code == Some(1) && log.contains(words), "{code:?} {log}");
    }
    let socket = scratch.path().join("none/api.sock");
    let mountpoint = scratch.path().join("mount");
    fs::create_dir(&mountpoint)?;
    let started =
        command::finish(Command::new(binaries::nydusd()).arg("-M").arg(&mountpoint).arg("-A").arg(&socket))?;
    ensure!(started.code == Some(1) && started.stderr.contains("mkdir -p"), "{started:?}");
    ensure!(!mounted(&mountpoint), "still mounted");

    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache"));
    let daemon = options.switch("--writable").flag("--admit", "/no/such").start()?;
    let log = daemon.log();
    ensure!(log.contains("--writable does not make the image writable"), "{log}");
    ensure!(log.contains("--admit /no/such: No such file"), "{log}");
    Ok(())
}

/// An unmount from outside ends the daemon with 0.
#[test]
fn external_unmount_ends_the_daemon() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    for flags in [MntFlags::empty(), MntFlags::MNT_DETACH, MntFlags::MNT_FORCE] {
        let mut daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
        umount2(daemon.root(), flags)?;
        let status = daemon.wait_ended()?;
        ensure!(status.code() == Some(0), "{status}: {}", daemon.log());
    }
    Ok(())
}

/// The kernel's number of the daemon's FUSE connection.
pub fn connection(daemon: &Daemon) -> Result<u64> {
    Ok(nix::sys::stat::minor(fs::metadata(daemon.root())?.dev()))
}

/// Aborts a FUSE connection, as an operator can.
pub fn abort(connection: u64) -> Result<()> {
    Ok(fs::write(connection_file(connection, "abort")?, "1")?)
}

/// A connection that is aborted leaves no dead mount; the daemon ends with 1 and says why, once.
#[test]
fn an_aborted_connection_is_a_failure_without_a_dead_mount() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache"));
    let mut daemon = options.start()?;
    abort(connection(&daemon)?)?;
    let status = daemon.wait_ended()?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(!mounted(daemon.root()), "a dead mount is left");
    let told: Vec<_> =
        daemon.log().lines().filter(|line| line.contains("aborted")).map(str::to_owned).collect();
    ensure!(matches!(&told[..], [line] if line.starts_with("Error:")), "{told:?}");

    // What others mounted over ours stays.
    let mut daemon = options.start()?;
    let connection = connection(&daemon)?;
    mount(None::<&str>, daemon.root(), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    fs::write(daemon.root().join("theirs"), "")?;
    abort(connection)?;
    let status = daemon.wait_ended()?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(daemon.root().join("theirs").exists(), "another mount was taken away");
    Ok(())
}

/// A bad start ends with 1 and a line that begins with `Error:`; a bad command line with 2.
#[test]
fn refusals_have_their_exit_codes() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let cache = scratch.path().join("cache");
    let missing = format!("oci:{}:latest", scratch.path().join("nowhere").display());
    let (code, log) = DaemonOptions::image(&missing, &cache).refused()?;
    ensure!(code == Some(1), "{code:?}: {log}");
    ensure!(log.lines().any(|line| line.starts_with("Error:")) && log.contains("nowhere"), "{log}");
    let finished = command::finish(Command::new(binaries::nydusd()).args(["fuse", "--no-such-flag"]))?;
    ensure!(finished.code == Some(2), "{finished:?}");
    Ok(())
}

/// A mount point that another daemon serves is refused, and that one serves on; a directory inside is not.
#[test]
fn a_served_mountpoint_is_not_covered() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let options = DaemonOptions::image(&nydus.reference(), &journey.path("cache"));
    let daemon = options.start()?;
    let (reference, cache) = (nydus.reference(), journey.path("cache"));
    let mut second = Command::new(binaries::nydusd());
    second.args(["fuse", "--image", &reference, "--cache-dir"]).arg(cache);
    let finished = command::finish(second.arg("--mountpoint").arg(daemon.root()))?;
    ensure!(finished.code == Some(1) && finished.stderr.contains("served by another nydusd"), "{finished:?}");
    ensure!(fs::read(daemon.root().join("etc/hostname")).is_ok(), "the first mount is gone");
    // The mount point is looked at first: whoever is refused for the image's sake has passed that.
    let (inside, another) = (daemon.root().join("etc"), format!("sha256:{}", "0".repeat(64)));
    let mut third = Command::new(binaries::nydusd());
    third.args(["fuse", "--image", &reference, "--expect-root", &another, "--mountpoint"]).arg(inside);
    let finished = command::finish(third.arg("--cache-dir").arg(journey.path("cache")))?;
    ensure!(finished.code == Some(1) && finished.stderr.contains(&"0".repeat(64)), "{finished:?}");
    Ok(())
}

/// An image that was never converted is refused by name, with the remedy.
#[test]
fn an_ordinary_image_is_refused_by_name() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let (code, log) = DaemonOptions::image(&journey.source.reference(), &journey.path("cache")).refused()?;
    ensure!(code == Some(1) && log.contains("convert"), "{code:?}: {log}");
    Ok(())
}

/// `nydusctl info` and `nydusctl metrics` answer, and a full read counts exactly its length.
#[test]
fn nydusctl_answers() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
    let length = fs::read(daemon.root().join("data/noise-b"))?.len();
    let ctl = |arguments: &[&str]| {
        command::run(Command::new(binaries::nydusctl()).arg("-S").arg(daemon.socket()).args(arguments))
    };
    ensure!(ctl(&["info"])?.contains("RUNNING"), "no state in info");
    let metrics: serde_json::Value = serde_json::from_str(&ctl(&["--raw", "metrics", "fsstats"])?)?;
    ensure!(metrics["data_read"] == length, "{metrics}");
    let backend: serde_json::Value = serde_json::from_str(&ctl(&["--raw", "metrics", "backend"])?)?;
    ensure!(backend["read_amount_total"].as_u64() >= Some(length as u64 / 2), "{backend}");
    for kind in ["backend", "cache", "fsstats"] {
        ensure!(!ctl(&["metrics", kind])?.trim().is_empty(), "metrics {kind} prints nothing");
    }
    Ok(())
}

/// A daemon that does not answer ends `nydusctl` with 1, not never.
#[test]
fn nydusctl_does_not_wait_for_ever() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("api.sock");
    // The kernel accepts connections for it; nobody answers.
    let _silent = std::os::unix::net::UnixListener::bind(&socket)?;
    let mut ctl = Command::new(binaries::nydusctl());
    let finished = command::finish(ctl.arg("-S").arg(&socket).args(["--timeout", "1", "info"]))?;
    ensure!(finished.code == Some(1) && finished.stderr.contains("--timeout"), "{finished:?}");
    Ok(())
}

/// Inode numbers are those of the listing, one for hard links; `.` and `..` are there; the tree is
/// read-only.
#[test]
fn the_tree_is_a_read_only_file_system() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
    let root = daemon.root();
    for entry in fs::read_dir(root.join("odd"))? {
        let entry = entry?;
        let found = fs::symlink_metadata(entry.path())?;
        ensure!(entry.ino() == found.ino(), "{} is listed with another number", entry.path().display());
    }
    let numbers: BTreeSet<u64> = ["odd/linked-a", "odd/linked-b", "linked-c"]
        .map(|name| fs::metadata(root.join(name)).map(|found| found.ino()))
        .into_iter()
        .collect::<std::io::Result<_>>()?;
    ensure!(numbers.len() == 1, "hard links have the numbers {numbers:?}");

    let mut listing =
        nix::dir::Dir::open(&root.join("many"), nix::fcntl::OFlag::O_RDONLY, nix::sys::stat::Mode::empty())?;
    let names: Vec<Vec<u8>> =
        listing.iter().map(|entry| Ok(entry?.file_name().to_bytes().to_vec())).collect::<nix::Result<_>>()?;
    ensure!(names.len() == 402, "{} names of 402", names.len());
    ensure!(names.contains(&b".".to_vec()) && names.contains(&b"..".to_vec()), "`.` and `..` are not listed");
    ensure!(fs::metadata(root.join("many"))?.nlink() == 2, "nlink of an only child");

    for result in [
        fs::write(root.join("new"), "").err(),
        fs::remove_file(root.join("etc/hostname")).err(),
        fs::create_dir(root.join("directory")).err(),
        fs::rename(root.join("etc"), root.join("cte")).err(),
        fs::OpenOptions::new().write(true).open(root.join("etc/hostname")).err(),
    ] {
        let code = result.and_then(|error| error.raw_os_error());
        ensure!(code == Some(libc::EROFS), "a change ended with {code:?} instead of EROFS");
    }
    let found = fs::symlink_metadata(root.join("odd/large-device"))?;
    ensure!(
        (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev())) == (2047, 70_000),
        "rdev"
    );
    Ok(())
}
