//! Somebody mounts over the live mount: what is on top is not ours to take away, and what is below is served on.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tests::journey::within;
use tests::mount::Cover;
use tests::successor::{Place, Process, Supervisor};
use tests::{Result, ensure, needs_mounts, needs_programs};

use super::PATIENCE;

/// A directory with one file, and its text.
fn source(at: &Path) -> Result<PathBuf> {
    fs::write(at.join("file"), "of the host")?;
    Ok(at.canonicalize()?)
}

fn share(daemon: &Process, at: &str, source: &Path) -> Result<()> {
    let body = json!({"fs_type": "passthroughfs", "source": source, "config": ""}).to_string();
    daemon.expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &body, 204, "")
}

/// Saved, taken over twice and left, all with another mount in sight.
#[test]
fn a_supervised_mount_goes_on_below_another() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let source = source(scratch.path())?;
    let place = Place::new::<&str>(&[])?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT"])?;
    share(&holder, "/one", &source)?;
    let root = File::open(place.root())?;
    let below = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let read = |path: PathBuf| -> Result<()> {
        let text = within(PATIENCE, "a read of the covered mount", move || Ok(fs::read(path.join("file"))?))?;
        ensure!(text == b"of the host");
        Ok(())
    };

    let cover = Cover::over(place.root())?;
    // Every change is saved.
    share(&holder, "/two", &source)?;
    kill(place.wait_child(1)?, Signal::SIGKILL)?;
    place.wait_child(2)?;
    read(below.join("two"))?;
    holder.wait_state("RUNNING", &["INIT", "READY"])?;
    share(&holder, "/three", &source)?;
    ensure!(cover.is_there());
    drop(cover);
    kill(place.wait_child(2)?, Signal::SIGKILL)?;
    place.wait_child(3)?;
    read(place.root().join("three"))?;
    holder.wait_state("RUNNING", &["INIT", "READY"])?;

    let cover = Cover::over(place.root())?;
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(1) && cover.is_there(), "{status}: {}", place.log());
    ensure!(place.log().contains("another mount covers it"), "{}", place.log());
    drop(cover);
    let left = fs::metadata(place.root().join("one"));
    ensure!(left.is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN)), "the mount has another end");
    Ok(())
}

/// A snapshotter keeps the connection: who has files open below the other mount does not wait for ever.
#[test]
fn who_uses_a_covered_mount_hears_of_its_end() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let scratch = tempfile::tempdir()?;
    let directory = scratch.path().join("source");
    fs::create_dir(&directory)?;
    let source = source(&directory)?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    let place = Place::new(&supervisor.arguments())?;
    let mut daemon = place.start("api.sock", &[])?;
    daemon.wait_state("RUNNING", &["INIT"])?;
    share(&daemon, "/one", &source)?;
    supervisor.save(&daemon)?;
    let mut file = File::open(place.root().join("one/file"))?;
    let cover = Cover::over(place.root())?;
    daemon.signal(Signal::SIGTERM)?;
    daemon.wait()?;
    let read = within(PATIENCE, "a read that nobody answers", move || {
        Ok(file.read(&mut [0; 100]).map_err(|e| e.raw_os_error()))
    })?;
    ensure!(read.is_err() && cover.is_there(), "{read:?}: {}", place.log());
    Ok(())
}
