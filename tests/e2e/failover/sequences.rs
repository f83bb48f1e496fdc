//! nydus-snapshotter's sequences, step by step: it is the supervisor, and drives both daemons.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;
use serde_json::json;
use storage::digest::DigestAlgorithm;
use tests::journey::{Journey, within};
use tests::mount::mounted;
use tests::relay::Rule;
use tests::successor::{Place, Process, Supervisor};
use tests::{Context, Result, bail, ensure, needs_mounts, needs_programs, recipes};

use super::{Noise, PATIENCE, READERS, Random, report, stalls};

const EXIT: &str = "/api/v1/daemon/exit";
const SENDFD: &str = "/api/v1/daemon/fuse/sendfd";
const START: &str = "/api/v1/daemon/start";
const TAKEOVER: &str = "/api/v1/daemon/fuse/takeover";

const NO_START: &str =
    r#"{"code":"UNDEFINED","message":"Configure(DaemonAbnormal(UnexpectedEvent(\"Start\")))"}"#;
const NO_TAKEOVER: &str =
    r#"{"code":"UNDEFINED","message":"Upgrade(DaemonAbnormal(UnexpectedEvent(\"Takeover\")))"}"#;
const NOT_READY: &str = r#"{"code":"UNDEFINED","message":"Upgrade(DaemonAbnormal(NotReady))"}"#;
const NO_SUPERVISOR: &str =
    r#"{"code":"UNDEFINED","message":"Upgrade(DaemonAbnormal(UpgradeManager(\"MissingSupervisorPath\")))"}"#;

/// Steps 2 to 8 of an upgrade: `old` is replaced by a daemon on `socket`; when it was told to end.
pub(super) fn upgrade(
    place: &Place,
    supervisor: &Supervisor,
    mut old: Process,
    socket: &str,
) -> Result<(Process, Instant)> {
    let mut new = place.start(socket, &["--upgrade"])?;
    new.wait_state("INIT", &[])?;
    let (status, body) = supervisor.restore(&new)?;
    ensure!(status == 204, "takeover: {status} {body}");
    ensure!(new.state().as_deref() == Some("READY"), "{:?} after the takeover", new.state());
    let moment = Instant::now();
    old.put(EXIT)?;
    let status = old.wait()?;
    ensure!(status.code() == Some(0), "the old daemon ended with {status}");
    new.put(START)?;
    new.wait_state("RUNNING", &["READY"])?;
    Ok((new, moment))
}

/// Closes a file once, after which the kernel asks no daemon about that any more. A child of ours that
/// becomes a daemon closes what our readers have open, and would have to wait for itself.
fn settle(place: &Place) -> Result<()> {
    drop(File::open(place.root().join("0"))?);
    Ok(())
}

/// Copies of bootstraps in a cache directory, and which files they are.
fn copies(cache: &Path) -> Result<BTreeSet<(String, u64, i64)>> {
    let mut copies = BTreeSet::new();
    for name in names(cache)?.into_iter().filter(|name| name.ends_with(".boot")) {
        let meta = fs::metadata(cache.join(&name))?;
        copies.insert((name, meta.ino(), meta.ctime_nsec()));
    }
    Ok(copies)
}

/// What a directory lists.
fn names(directory: &Path) -> Result<BTreeSet<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    fs::read_dir(directory)?.map(name).collect()
}

/// Has `daemon` end like a service does.
pub(super) fn terminate(place: &Place, mut daemon: Process) -> Result<()> {
    daemon.signal(Signal::SIGTERM)?;
    let status = daemon.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}

/// Shared mode: a daemon without an image of its own, whose mounts come through the API, is replaced
/// by another one. All that a client may get wrong on the way changes nothing.
#[test]
fn a_shared_daemon_is_upgraded_step_by_step() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let journey = Journey::start(&recipes::tiny())?;
    let layout = journey.convert("nydus", &[])?;
    layout.save_bootstrap(&journey.path("image.boot"))?;
    // As the snapshotter writes it.
    let config = json!({
        "device": {
            "id": "/1",
            "backend": { "type": "localfs", "config": { "dir": layout.path().join("blobs/sha256") } },
            "cache": { "type": "blobcache", "config": { "work_dir": journey.path("cache") } },
        },
        "mode": "direct", "digest_validate": false,
    });
    let mount = json!({
        "fs_type": "rafs", "source": journey.path("image.boot"), "config": config.to_string(),
    })
    .to_string();
    let scratch = tempfile::tempdir()?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    let place = Place::new(&supervisor.arguments())?;
    let mut old = place.start("api.sock", &["--failover-policy", "resend"])?;
    old.wait_state("RUNNING", &[])?;
    let (_, info) = old.send("GET", "/api/v1/daemon", "")?;
    ensure!(info.contains(r#""id":"d1""#) && info.contains("d1.sock"), "{info}");

    // It saves as often as it is told to, before mounts and after each.
    let empty = supervisor.save(&old)?;
    for mountpoint in ["/1", "/2", "/deep/er/3"] {
        old.expect("POST", &format!("/api/v1/mount?mountpoint={mountpoint}"), &mount, 204, "")?;
    }
    old.expect("DELETE", "/api/v1/mount?mountpoint=/2", "", 204, "")?;
    let renewed = r#"{"registry_auth":"dXNlcjpyZW5ld2Vk"}"#;
    old.expect("PUT", "/api/v1/config?id=/1", renewed, 204, "")?;
    // A directory of the host is no image, and comes along.
    fs::write(scratch.path().join("file"), "of the host")?;
    let host = json!({ "fs_type": "passthroughfs", "source": scratch.path(), "config": "" }).to_string();
    old.expect("POST", "/api/v1/mount?mountpoint=/host", &host, 204, "")?;
    // This one will be gone when a successor looks for it.
    let lost = tempfile::tempdir()?;
    fs::write(lost.path().join("file"), "never read")?;
    let host = json!({ "fs_type": "passthroughfs", "source": lost.path(), "config": "" }).to_string();
    old.expect("POST", "/api/v1/mount?mountpoint=/lost", &host, 204, "")?;
    ensure!(supervisor.save(&old)? > empty, "the mounts are not in the state");
    old.expect("PUT", START, "", 400, NO_START)?;
    old.expect("PUT", TAKEOVER, "", 400, NO_TAKEOVER)?;
    // Nobody listens: an error, and the daemon serves on.
    let (status, body) = old.send("PUT", SENDFD, "")?;
    ensure!(status == 500 && body.contains("Upgrade(DaemonAbnormal(UpgradeManager("), "{status} {body}");

    let copied = copies(&journey.path("cache"))?;
    ensure!(names(place.root())?.contains("lost") && !copied.is_empty(), "{copied:?}");
    let path = place.root().join("1/data/one-chunk");
    let content = fs::read(&path)?;
    let of_lost = File::open(place.root().join("lost/file"))?;
    lost.close()?;
    let (held, root) = (File::open(&path)?, fs::metadata(place.root().join("1"))?);
    let mut new = place.start("api1.sock", &["--upgrade"])?;
    new.wait_state("INIT", &[])?;
    new.expect("PUT", SENDFD, "", 503, NOT_READY)?;
    new.expect("PUT", START, "", 400, NO_START)?;
    // A mount that a client posts too early does not stand in the way of those to come.
    let (status, body) = new.send("POST", "/api/v1/mount?mountpoint=/", &mount)?;
    ensure!(status == 503, "mounted in INIT: {status} {body}");
    let (status, body) = supervisor.offer(&new, b"no state at all", true)?;
    ensure!(status == 500 && body.contains("no state of nydusd"), "{status} {body}");
    let (status, body) = supervisor.offer(&new, b"no descriptor", false)?;
    ensure!(status == 500 && body.contains("without a descriptor"), "{status} {body}");
    ensure!(new.state().as_deref() == Some("INIT"), "{:?}", new.state());

    ensure!(supervisor.restore(&new)? == (204, String::new()), "no takeover: {}", place.log());
    ensure!(new.state().as_deref() == Some("READY"), "{:?} after the takeover", new.state());
    new.expect("PUT", TAKEOVER, "", 400, NO_TAKEOVER)?;
    // Until it is told to end the old daemon serves.
    ensure!(fs::read_dir(place.root().join("deep/er/3"))?.count() > 0, "the old daemon shows nothing");
    let (mut silent, mut old) = (old.watch()?, old);
    old.put(EXIT)?;
    ensure!(old.wait()?.code() == Some(0), "the old daemon failed: {}", place.log());
    ensure!(silent.read(&mut [0])? == 0, "the silent connection does not tell of the end");
    ensure!(mounted(place.root()) && !old.socket().exists(), "the mount went, or the socket stayed");
    new.put(START)?;
    ensure!(new.state().as_deref() == Some("RUNNING"), "{:?} after the start", new.state());
    new.expect("PUT", START, "", 400, NO_START)?;

    // What was open, known or set is so still.
    let mut found = vec![0; content.len()];
    held.read_exact_at(&mut found, 0)?;
    ensure!(found == content, "wrong bytes through a file that was open all the time");
    ensure!(fs::metadata(place.root().join("1"))?.ino() == root.ino(), "another inode");
    ensure!(fs::read(place.root().join("deep/er/3/data/one-chunk"))? == content, "another file");
    ensure!(!place.root().join("2").exists(), "what was unmounted is back");
    ensure!(fs::read(place.root().join("host/file"))? == b"of the host", "another directory");
    // What is mounted is known by its copy in the cache, which nobody writes again.
    ensure!(copies(&journey.path("cache"))? == copied, "bootstraps were copied again");
    // One that can not be restored keeps no other one away, and what was open of it fails. Its name is gone.
    ensure!(place.log().contains("restore the mount at /lost"), "{}", place.log());
    let error = of_lost.read_exact_at(&mut [0], 0).expect_err("the file is gone");
    ensure!(error.raw_os_error() == Some(libc::ESTALE), "{error}");
    ensure!(!place.root().join("lost").exists(), "the name of what could not be restored means something");
    ensure!(!names(place.root())?.contains("lost"), "{:?}", names(place.root())?);
    new.expect("GET", "/api/v1/config?id=/1", "", 200, renewed)?;
    // The snapshotter posts all mounts again, once: they are there. Anything else is refused.
    let (one, other) = ("/api/v1/mount?mountpoint=/1", mount.replace("image.boot", "other.boot"));
    let (status, body) = new.send("POST", one, &other)?;
    ensure!(status == 500 && body.contains("already exists"), "{status} {body}");
    new.expect("POST", one, &mount, 204, "")?;
    let (status, body) = new.send("POST", one, &mount)?;
    ensure!(status == 500 && body.contains("already exists"), "{status} {body}");
    // Life goes on, for another successor, too.
    new.expect("DELETE", one, "", 204, "")?;
    ensure!(!place.root().join("1").exists(), "unmounted and still there");
    // What is open of it is served on, by the daemon and not out of the kernel's memory.
    posix_fadvise(&held, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    found.fill(0);
    held.read_exact_at(&mut found, 0)?;
    ensure!(found == content, "wrong bytes through a file that is open across the end of its mount");
    drop(held);
    new.expect("POST", "/api/v1/mount?mountpoint=/4", &mount, 204, "")?;
    supervisor.save(&new)?;
    let (last, _) = upgrade(&place, &supervisor, new, "api2.sock")?;
    ensure!(fs::read(place.root().join("4/data/one-chunk"))? == content, "another file");
    terminate(&place, last)
}

/// The image at the root can not be restored: its names are gone, and what is mounted below it is served on.
#[test]
fn names_of_a_lost_root_are_gone() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let journey = Journey::start(&recipes::tiny())?;
    let layout = journey.convert("nydus", &[])?;
    let bootstrap = journey.path("image.boot");
    layout.save_bootstrap(&bootstrap)?;
    let config = json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": layout.path().join("blobs/sha256") } },
        "cache": { "type": "filecache", "filecache": { "work_dir": journey.path("cache") } },
    });
    let scratch = tempfile::tempdir()?;
    fs::write(scratch.path().join("file"), "of the host")?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    let place = Place::new(&supervisor.arguments())?;
    let mut old = place.start("api.sock", &[])?;
    old.wait_state("RUNNING", &[])?;
    for (at, kind, source, config) in [
        ("/", "rafs", bootstrap.as_path(), config.to_string()),
        ("/etc/host", "passthroughfs", scratch.path(), String::new()),
        ("/own/host", "passthroughfs", scratch.path(), String::new()),
    ] {
        let body = json!({ "fs_type": kind, "source": source, "config": config }).to_string();
        old.expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &body, 204, "")?;
    }
    supervisor.save(&old)?;
    let root = place.root();
    ensure!(root.join("data/one-chunk").exists() && root.join("etc/hostname").exists());
    ensure!(!root.join("nothing").exists(), "the kernel remembers that, too");
    fs::remove_file(&bootstrap)?;
    for name in names(&journey.path("cache"))?.into_iter().filter(|name| name.ends_with(".boot")) {
        fs::remove_file(journey.path("cache").join(name))?;
    }
    let (new, _) = upgrade(&place, &supervisor, old, "api1.sock")?;
    ensure!(names(root)? == BTreeSet::from(["etc", "own"].map(str::to_owned)), "{:?}", names(root)?);
    ensure!(!root.join("data").exists() && !root.join("etc/hostname").exists(), "names of what is gone");
    for at in ["etc/host/file", "own/host/file"] {
        ensure!(fs::read(root.join(at))? == b"of the host", "{at} differs");
    }
    terminate(&place, new)
}

/// A directory of the host comes along, named from wherever, and is the same one whatever its name means since.
#[test]
fn the_shared_directory_is_the_one_that_was() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    for name in ["one", "two"] {
        fs::create_dir(scratch.path().join(name))?;
        fs::write(scratch.path().join(name).join("file"), name)?;
    }
    let link = scratch.path().join("link");
    std::os::unix::fs::symlink("one", &link)?;
    // Relative to where the daemons start, which is where we are.
    let here = std::env::current_dir()?;
    let up = "../".repeat(here.components().count() - 1);
    let relative = format!("{up}{}", link.strip_prefix("/")?.display());
    let mut arguments = supervisor.arguments().to_vec();
    arguments.extend(["--shared-dir".to_owned(), relative]);
    let place = Place::new(&arguments)?;
    let mut old = place.start("api.sock", &[])?;
    old.wait_state("RUNNING", &[])?;
    // The same by the API, and one that is replaced.
    fs::create_dir(scratch.path().join("three"))?;
    for (at, source) in [("/linked", &link), ("/replaced", &scratch.path().join("three"))] {
        let body = json!({ "fs_type": "passthroughfs", "source": source, "config": "" }).to_string();
        old.expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &body, 204, "")?;
    }
    supervisor.save(&old)?;
    fs::rename(scratch.path().join("three"), scratch.path().join("moved"))?;
    fs::create_dir(scratch.path().join("three"))?;
    fs::remove_file(&link)?;
    std::os::unix::fs::symlink("two", &link)?;
    let (new, _) = upgrade(&place, &supervisor, old, "api1.sock")?;
    for at in ["file", "linked/file"] {
        ensure!(fs::read(place.root().join(at))? == b"one", "another directory: {at}");
    }
    ensure!(!place.root().join("replaced").exists(), "another directory under the same name");
    ensure!(place.log().contains("is another directory than the one that was served"), "{}", place.log());
    terminate(&place, new)
}

/// Replaces `old` by a daemon that is given `state` in place of what was saved.
fn upgrade_with(place: &Place, supervisor: &Supervisor, mut old: Process, state: &[u8]) -> Result<Process> {
    let socket = if old.socket().ends_with("one.sock") { "two.sock" } else { "one.sock" };
    let mut new = place.start(socket, &["--upgrade"])?;
    new.wait_state("INIT", &[])?;
    let (status, body) = supervisor.offer(&new, state, true)?;
    ensure!(status == 204, "takeover: {status} {body}");
    old.put(EXIT)?;
    old.wait()?;
    new.put(START)?;
    new.wait_state("RUNNING", &["READY"])?;
    Ok(new)
}

/// As a release wrote it that saved of host directories only what `--shared-dir` meant.
fn early_state(state: &[u8], shared_dir: &Path) -> Result<Vec<u8>> {
    let end = state.iter().position(|byte| *byte == b'\n').context("a state has a first line")?;
    let mut document: serde_json::Value = serde_json::from_slice(&state[end + 1..])?;
    let vfs = &mut document["vfs"];
    for mount in vfs["mounts"].as_array_mut().context("mounts")? {
        mount.as_object_mut().context("a mount")?.remove("host").context("a host directory")?;
    }
    vfs["shared_dir"] = json!(shared_dir);
    let body = document.to_string();
    Ok(format!("nydusd-state 1 {}\n{body}", DigestAlgorithm::Sha256.digest(body.as_bytes())).into_bytes())
}

/// Files of a host directory that an early release had opened stay open, in its successors and theirs.
#[test]
fn open_files_outlive_early_releases() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let scratch = tempfile::tempdir()?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    for name in ["one", "two"] {
        fs::create_dir(scratch.path().join(name))?;
        fs::write(scratch.path().join(name).join("file"), name)?;
    }
    let (one, link) = (scratch.path().canonicalize()?.join("one"), scratch.path().join("link"));
    std::os::unix::fs::symlink("one", &link)?;
    let mut arguments = supervisor.arguments().to_vec();
    arguments.extend(["--shared-dir".to_owned(), link.to_string_lossy().into_owned()]);
    let place = Place::new(&arguments)?;
    let mut first = place.start("api.sock", &[])?;
    first.wait_state("RUNNING", &[])?;
    supervisor.save(&first)?;
    let early = early_state(&supervisor.state()?, &one)?;
    fs::remove_file(&link)?;
    std::os::unix::fs::symlink("two", &link)?;
    // This one tells the kernel of files as the early release did, and so do all after it.
    let mut daemon = upgrade_with(&place, &supervisor, first, &early)?;
    let path = place.root().join("file");
    drop(File::open(&path)?);
    let file = File::open(&path)?;
    for is_early in [true, false, false] {
        supervisor.save(&daemon)?;
        let state = if is_early { early_state(&supervisor.state()?, &one)? } else { supervisor.state()? };
        daemon = upgrade_with(&place, &supervisor, daemon, &state)?;
        // The kernel is told of the file again, and compares.
        ensure!(fs::metadata(&path)?.ino() == file.metadata()?.ino(), "another file");
        let mut found = [0; 3];
        file.read_exact_at(&mut found, 0).with_context(|| place.log())?;
        ensure!(&found == b"one", "another file");
    }
    drop(file);
    terminate(&place, daemon)
}

/// A daemon dies with a read under way. The one that is started like it finds that out by itself,
/// takes over, and answers that read. With `flush` it fails it, with `none` it leaves it alone.
#[test]
fn a_crash_is_found_out_and_its_reads_are_answered() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry", "python3");
    let noise = Noise::set()?;
    for (policy, answer) in [("resend", Some(true)), ("flush", Some(false)), ("none", None)] {
        let scratch = tempfile::tempdir()?;
        let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
        let place = noise.place(&format!("cache-{policy}"), Some(&supervisor))?;
        noise.scene.relay.set(Rule::Pass);
        let mut old = place.start("api.sock", &["--failover-policy", policy])?;
        old.wait_state("RUNNING", &[])?;
        supervisor.save(&old)?;
        settle(&place)?;
        noise.scene.relay.set(Rule::Stall);
        let file = File::open(place.root().join("1"))?;
        let reader = thread::spawn(move || {
            let mut found = vec![0; 4096];
            file.read_exact_at(&mut found, 0).map(|()| found)
        });
        noise.scene.relay.wait_stalled(1)?;
        old.signal(Signal::SIGKILL)?;
        old.wait()?;
        ensure!(old.socket().exists() && mounted(place.root()), "nothing tells of the crash");
        noise.scene.relay.set(Rule::Pass);

        // Its successor may die as well: one save is good for any number of them.
        let mut second = place.start("api.sock", &["--failover-policy", policy])?;
        second.wait_state("INIT", &[])?;
        ensure!(supervisor.restore(&second)?.0 == 204, "no takeover: {}", place.log());
        second.signal(Signal::SIGKILL)?;
        second.wait()?;
        let mut new = place.start("api.sock", &["--failover-policy", policy])?;
        new.wait_state("INIT", &[])?;
        ensure!(supervisor.restore(&new)?.0 == 204, "no takeover: {}", place.log());
        new.put(START)?;
        let ended = |reader: thread::JoinHandle<_>| {
            within(PATIENCE, "the read that the dead daemon took", move || {
                Ok(reader.join().expect("the reader does not panic"))
            })
        };
        match answer {
            Some(right) => match ended(reader)? {
                // The kernel may ask again for what it has read ahead.
                Ok(found) => ensure!(found == noise.contents[1][..4096], "{policy}: wrong bytes"),
                Err(e) => ensure!(!right && e.raw_os_error() == Some(libc::EIO), "{policy}: {e}"),
            },
            // Others are served all the same. The end of the mount ends the wait, although its
            // descriptor is held.
            None => {
                ensure!(fs::read(place.root().join("2"))? == noise.contents[2], "file 2 differs");
                ensure!(!reader.is_finished(), "nobody could have answered that");
                terminate(&place, new)?;
                match ended(reader)? {
                    Ok(_) => bail!("nobody could have answered that"),
                    Err(e) => eprintln!("a read that nobody repeats, after the end of the mount: {e}"),
                }
                continue;
            }
        }
        terminate(&place, new)?;
    }
    Ok(())
}

/// Without a supervisor there is nothing to send to, and nothing to take over from.
#[test]
fn without_a_supervisor_the_steps_are_refused() -> Result<()> {
    needs_mounts!();
    let place = Place::new::<&str>(&[])?;
    let mut daemon = place.start("api.sock", &[])?;
    daemon.wait_state("RUNNING", &[])?;
    daemon.expect("PUT", SENDFD, "", 500, NO_SUPERVISOR)?;
    let mut waiting = place.start("api1.sock", &["--upgrade"])?;
    waiting.wait_state("INIT", &[])?;
    waiting.expect("PUT", SENDFD, "", 503, NOT_READY)?;
    waiting.expect("PUT", TAKEOVER, "", 500, NO_SUPERVISOR)?;
    waiting.put(EXIT)?;
    ensure!(waiting.wait()?.code() == Some(0), "a waiting daemon does not end well: {}", place.log());
    ensure!(daemon.state().as_deref() == Some("RUNNING") && mounted(place.root()), "the other one suffered");

    // A dead mount that nobody holds is named as such.
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait()?;
    let mut next = place.start("api.sock", &[])?;
    ensure!(next.wait()?.code() == Some(1) && place.log().contains("umount -l"), "{}", place.log());
    Ok(())
}

/// Upgrades in a row under readers: none of them sees an error or a wrong byte.
#[test]
fn hot_upgrades_lose_no_request() -> Result<()> {
    const UPGRADES: usize = 20;
    needs_mounts!();
    needs_programs!("docker-registry", "python3");
    let noise = Noise::set()?;
    let scratch = tempfile::tempdir()?;
    let supervisor = Supervisor::new(scratch.path().join("d1.sock"))?;
    let place = noise.place("cache", Some(&supervisor))?;
    let mut first = place.start("api.sock", &[])?;
    first.wait_state("RUNNING", &[])?;
    supervisor.save(&first)?;
    settle(&place)?;
    // A registry at some distance, so that reads wait for it.
    noise.scene.relay.set(Rule::Slow(Duration::from_millis(5)));
    let (mut last, mut moments) = (None, Vec::new());
    let answered = noise.under_readers(place.root(), &mut Random::new(7), |_, progress| {
        let mut daemon = first;
        for number in 1..=UPGRADES {
            progress.wait(2 * READERS)?;
            let (next, moment) = upgrade(&place, &supervisor, daemon, &format!("api{number}.sock"))
                .with_context(|| format!("upgrade {number}"))?;
            supervisor.save(&next)?;
            moments.push(moment);
            daemon = next;
        }
        // It serves until the readers are done.
        last = Some(daemon);
        Ok(())
    });
    let answered = answered.with_context(|| place.log())?;
    let reads = answered.iter().map(Vec::len).sum();
    report(&format!("{UPGRADES} upgrades"), reads, stalls(&answered, &moments));
    terminate(&place, last.context("no daemon is left")?)
}
