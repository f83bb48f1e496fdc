//! Writable images: an overlay covers the FUSE mount, and outlives the daemon as that does.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use tests::mount::mounted;
use tests::successor::{Place, Supervisor};
use tests::{Result, ensure, needs_mounts, needs_programs};

use super::PATIENCE;
use super::sequences::{terminate, upgrade};
use crate::writable::Scene;

/// Waits until somebody has the lock of `directory`: a successor takes it when its predecessor has let go.
fn wait_locked(directory: &Path) -> Result<()> {
    let (directory, deadline) = (File::open(directory)?, Instant::now() + PATIENCE);
    while directory.try_lock().is_ok() {
        directory.unlock()?;
        ensure!(Instant::now() < deadline, "nobody keeps others from the upper directory");
        std::thread::yield_now();
    }
    Ok(())
}

/// Another daemon is kept from the upper directory, whoever serves the image by now: the first daemon, the one that
/// took over while the first lived, or the one that came after a crash.
#[test]
fn a_successor_keeps_others_from_the_upper_directory() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let scene = Scene::new()?;
    let refused = || -> Result<()> {
        let other = scene.options(&scene.upper(), &scene.journey.path("work2"))?.switch("--writable");
        let (code, log) = other.refused()?;
        ensure!(code == Some(1) && log.contains("in use by another daemon"), "{code:?} {log}");
        Ok(())
    };
    let scratch = tempfile::tempdir()?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    let mut arguments = scene.arguments()?;
    arguments.extend(supervisor.arguments());
    let place = Place::new(&arguments)?;
    let mut old = place.start("api.sock", &[])?;
    old.wait_state("RUNNING", &["READY"])?;
    supervisor.save(&old)?;
    fs::write(place.root().join("made"), "by the first")?;
    refused()?;
    let (new, _) = upgrade(&place, &supervisor, old, "api1.sock")?;
    wait_locked(&scene.upper())?;
    refused()?;
    supervisor.save(&new)?;
    ensure!(fs::read(place.root().join("made"))? == b"by the first", "another file");

    new.signal(Signal::SIGKILL)?;
    drop(new);
    let mut last = place.start("api1.sock", &[])?;
    last.wait_state("INIT", &[])?;
    ensure!(supervisor.restore(&last)?.0 == 204, "no takeover: {}", place.log());
    last.put("/api/v1/daemon/start")?;
    refused()?;
    fs::write(place.root().join("made"), "by the last")?;
    ensure!(fs::read(scene.upper().join("made"))? == b"by the last", "it went elsewhere");
    terminate(&place, last)
}

/// The same where `nydusd supervise` starts them: kills of the daemon are not noticed by who writes.
#[test]
fn kills_are_not_noticed_by_writers() -> Result<()> {
    const KILLS: usize = 5;
    needs_mounts!();
    let scene = Scene::new()?;
    let place = Place::new(&scene.arguments()?)?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT", "READY"])?;
    for number in 1..=super::kills("NYDUS_TEST_SUPERVISED_KILLS", KILLS)? {
        let name = place.root().join(format!("made-{number}"));
        kill(place.wait_child(number)?, Signal::SIGKILL)?;
        // What is copied up is read through the daemon that is not there yet.
        fs::write(&name, number.to_string())?;
        fs::OpenOptions::new().append(true).open(place.root().join("data/noise-a")).map(drop)?;
        ensure!(fs::read_to_string(&name)? == number.to_string(), "{} differs", name.display());
        place.wait_child(number + 1)?;
        wait_locked(&scene.upper())?;
    }
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}

/// An overlay whose daemon is gone answers much as if nothing had happened. Who is to mount there finds that out.
#[test]
fn a_dead_overlay_is_named_as_such() -> Result<()> {
    needs_mounts!();
    let scene = Scene::new()?;
    let place = Place::new(&scene.arguments()?)?;
    let mut old = place.start("api.sock", &[])?;
    old.wait_state("RUNNING", &["READY"])?;
    fs::write(place.root().join("made"), "by the first")?;
    let mut other = place.start("other.sock", &[])?;
    ensure!(
        other.wait()?.code() == Some(1) && place.log().contains("served by another nydusd"),
        "{}",
        place.log()
    );
    old.signal(Signal::SIGKILL)?;
    old.wait()?;
    ensure!(fs::read(place.root().join("made"))? == b"by the first", "the overlay tells");
    let mut next = place.start("api.sock", &[])?;
    ensure!(
        next.wait()?.code() == Some(1) && place.log().contains("overlay of a daemon that is gone"),
        "{}",
        place.log()
    );
    ensure!(place.log().contains("umount -l"), "{}", place.log());
    // As it says.
    umount2(place.root(), MntFlags::MNT_DETACH)?;
    let mut last = place.start("api.sock", &[])?;
    last.wait_state("RUNNING", &["READY"])?;
    ensure!(fs::read(place.root().join("made"))? == b"by the first", "changes are lost");
    terminate(&place, last)
}

/// SIGTERM while an overlay is being made, or just before or after: the daemon ends, and nothing stays mounted.
#[test]
fn an_end_while_the_overlay_is_made_leaves_nothing() -> Result<()> {
    needs_mounts!();
    let scene = Scene::new()?;
    let (mut moment, mut step) = (Duration::ZERO, Duration::from_micros(700));
    let mut near = false;
    // Up to the first that comes after the overlay; in smaller steps where it usually is made.
    for round in 0..24 {
        let place = Place::new(&scene.arguments()?)?;
        let mut daemon = place.start("api.sock", &[])?;
        let deadline = Instant::now() + PATIENCE;
        while !mounted(place.root()) {
            ensure!(Instant::now() < deadline, "no mount: {}", place.log());
            std::hint::spin_loop();
        }
        // From here on the overlay may come; that takes some milliseconds.
        let end = Instant::now() + moment;
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        daemon.signal(Signal::SIGTERM)?;
        let status = daemon.wait()?;
        let log = place.log();
        ensure!(status.code() == Some(0), "round {round}: {status}: {log}");
        ensure!(!mounted(place.root()), "round {round}: something stays mounted: {log}");
        near |= log.contains("stopped before the overlay");
        if log.contains("changes go to") {
            near = true;
            break;
        }
        moment += step;
        if round >= 12 {
            step *= 2;
        }
    }
    ensure!(near, "no end came near the overlay's making");
    // The upper directory is whole.
    let place = Place::new(&scene.arguments()?)?;
    let mut daemon = place.start("api.sock", &[])?;
    daemon.wait_state("RUNNING", &["READY"])?;
    ensure!(place.root().join("etc/hostname").exists());
    terminate(&place, daemon)
}
