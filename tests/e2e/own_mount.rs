//! A daemon's own mount in what it is shown of the host: it does not serve it, nor does it keep it alive.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::within;
use tests::mount::{Cover, Mount};
use tests::successor::{Place, Supervisor};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// Longer than anything here takes, shorter than a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has the directory that the mountpoint is in propagate what is mounted there, as systemd has all of them, and shows it.
const PROPAGATE: &str = r#"
for word; do
    [ "$before" = --mountpoint ] && directory=${word%/*}
    before=$word
done
mount --bind "$directory" "$directory" && mount --make-shared "$directory" && exec "$@" --shared-dir "$directory"
"#;

fn post(daemon: &Daemon, mountpoint: &str, source: &Path) -> Result<()> {
    let body = json!({"fs_type": "passthrough_fs", "source": source, "config": ""});
    let (status, answer) =
        daemon.request("POST", &format!("/api/v1/mount?mountpoint={mountpoint}"), &body)?;
    ensure!(status == 204, "{status}: {answer}");
    Ok(())
}

/// What is in a directory. An answer that nobody gives is an error.
fn names(directory: PathBuf) -> Result<Vec<String>> {
    within(PATIENCE, "list a directory", move || {
        let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    })
}

/// Unmounts, which has to end the daemon.
fn ends_with_its_mount(mut daemon: Daemon) -> Result<()> {
    umount2(daemon.root(), MntFlags::MNT_DETACH)?;
    let status = daemon.wait_ended()?;
    ensure!(status.code() == Some(0), "{status}: {}", daemon.log());
    Ok(())
}

#[test]
fn the_directory_of_the_mountpoint_is_shown_without_the_mount() -> Result<()> {
    needs_mounts!();
    let daemon = DaemonOptions::empty().through(&["sh", "-c", PROPAGATE, "sh"]).start()?;
    let root = daemon.root().to_owned();
    let above = Mount::guard(root.parent().context("a parent")?);
    ensure!(names(root.clone())?.contains(&"mount".to_owned()));
    // What the mount covers.
    ensure!(names(root.join("mount"))?.is_empty());
    ends_with_its_mount(daemon)?;
    drop(above);
    Ok(())
}

/// By whatever way the mount gets into the jail.
#[test]
fn no_directory_that_is_shown_keeps_the_mount() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let daemon = DaemonOptions::empty().start()?;
    let root = daemon.root().to_owned();
    let above = root.parent().context("a parent")?;
    // Through a link, and at another place.
    let link = scratch.path().join("link");
    std::os::unix::fs::symlink(above, &link)?;
    post(&daemon, "/link", &link)?;
    let elsewhere = Mount::guard(scratch.path().join("elsewhere"));
    fs::create_dir(elsewhere.path())?;
    mount(Some(above), elsewhere.path(), None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    post(&daemon, "/scratch", scratch.path())?;
    for copy in ["link/mount", "scratch/elsewhere/mount"] {
        ensure!(names(root.join(copy))?.is_empty(), "{copy}");
    }
    drop(elsewhere);
    ends_with_its_mount(daemon)
}

/// What somebody mounts over the mount is theirs, and shown like anything else.
#[test]
fn what_covers_the_mount_is_shown() -> Result<()> {
    needs_mounts!();
    let daemon = DaemonOptions::empty().start()?;
    let root = daemon.root().to_owned();
    let inside = File::open(&root)?;
    let below = PathBuf::from(format!("/proc/self/fd/{}", inside.as_raw_fd()));
    let cover = Cover::over(&root)?;
    let above = root.parent().context("a parent")?;
    post(&daemon, "/above", above)?;
    // The second time it is admitted already.
    for mountpoint in ["/one", "/two"] {
        post(&daemon, mountpoint, &root)?;
    }
    for shown in ["above/mount", "one", "two"] {
        ensure!(names(below.join(shown))?.len() == 1 && cover.is_at(&below.join(shown)), "{shown}");
    }
    ensure!(cover.is_there());
    drop((inside, cover));
    ends_with_its_mount(daemon)
}

/// Nor is anything kept or looked for in it.
#[test]
fn nothing_of_the_mount_is_used_to_serve_it() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    fs::write(scratch.path().join("boot"), "")?;
    for own in ["--no-jail", "--core-dumps"] {
        let daemon = DaemonOptions::empty().switch("--writable").switch(own).start()?;
        let root = daemon.root().to_owned();
        post(&daemon, "/host", scratch.path())?;
        let config = |cache: &Path| {
            let backend = json!({"type": "localfs", "config": {"dir": scratch.path()}});
            let cache = json!({"type": "blobcache", "config": {"work_dir": cache}});
            json!({"device": {"backend": backend, "cache": cache}}).to_string()
        };
        let host = root.join("host");
        for (source, cache) in [
            (host.join("boot"), scratch.path().join("cache")),
            (scratch.path().join("boot"), host.join("other")),
        ] {
            let body = json!({"fs_type": "rafs", "source": source, "config": config(&cache)});
            let (status, answer) = daemon.request("POST", "/api/v1/mount?mountpoint=/image", &body)?;
            let text = "this daemon serves it itself";
            ensure!(status == 500 && answer.to_string().contains(text), "{own}: {status} {answer}");
        }
        ensure!(!scratch.path().join("other").exists(), "{own}: it was made");
        ends_with_its_mount(daemon)?;
    }
    Ok(())
}

/// A successor finds the mount in what it is given before it knows which one is its own.
#[test]
fn no_successor_keeps_the_mount() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let scratch = tempfile::tempdir()?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    let place = Place::new(&supervisor.arguments())?;
    let database = place.path("chunks.db").to_string_lossy().into_owned();
    let beside = ["--dedup-db", &database];
    let mut old = place.start("api.sock", &beside)?;
    old.wait_state("RUNNING", &["INIT"])?;
    supervisor.save(&old)?;
    let mut new = place.start("new.sock", &[&beside[..], &["--upgrade"]].concat())?;
    new.wait_state("INIT", &[])?;
    ensure!(supervisor.restore(&new)?.0 == 204, "no takeover: {}", place.log());
    old.put("/api/v1/daemon/exit")?;
    old.wait()?;
    new.put("/api/v1/daemon/start")?;
    new.wait_state("RUNNING", &["READY"])?;
    umount2(place.root(), MntFlags::MNT_DETACH)?;
    let status = new.wait()?;
    ensure!(status.code() == Some(0), "{status}: {}", place.log());
    Ok(())
}
