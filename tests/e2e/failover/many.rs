//! Kills of a daemon with many mounts, directories of the host among them, while all of it is in use and changes.

use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::BuildHasher;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tests::journey::Journey;
use tests::mount::{abort, mounted};
use tests::successor::{Place, Process};
use tests::{Context, Result, bail, ensure, needs_mounts, recipes};

use super::{PATIENCE, Random};

const IMAGES: usize = 12;

/// Makes, renames, links and removes names. Each step has to succeed once and only once, whoever answers.
fn change_names(root: &Path, round: usize) -> Result<()> {
    let dir = root.join(format!("d-{round}"));
    let at = |name: &str| dir.join(name);
    fs::create_dir(&dir).context("mkdir")?;
    fs::write(at("file"), round.to_string()).context("make a file")?;
    fs::rename(at("file"), at("renamed")).context("rename")?;
    fs::hard_link(at("renamed"), at("linked")).context("link")?;
    symlink("renamed", at("symbolic")).context("symlink")?;
    xattr::set(at("renamed"), "user.round", round.to_string().as_bytes()).context("setxattr")?;
    ensure!(fs::read_to_string(at("symbolic"))? == round.to_string(), "another content");
    let mut names: Vec<_> = fs::read_dir(&dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()
        .context("list")?;
    names.sort_unstable();
    ensure!(names == ["linked", "renamed", "symbolic"], "{names:?}");
    xattr::remove(at("renamed"), "user.round").context("removexattr")?;
    for name in names {
        fs::remove_file(at(&name)).context("unlink")?;
    }
    fs::remove_dir(&dir).context("rmdir")
}

/// Reads a file of some image past the kernel's memory.
fn read_image(root: &Path, content: &[u8], random: &mut Random) -> Result<()> {
    let number = usize::try_from(random.next())? % IMAGES;
    let path = root.join(format!("images/{number}/data/one-chunk"));
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    ensure!(
        fs::read(&path).with_context(|| path.display().to_string())? == content,
        "{} differs",
        path.display()
    );
    Ok(())
}

/// Runs `work` while each of `users` is called again and again; none of them may fail.
fn in_use<'a>(
    root: &Path,
    users: Vec<Box<dyn FnMut() -> Result<()> + Send + 'a>>,
    work: impl FnOnce(&AtomicUsize) -> Result<()>,
) -> Result<()> {
    let (done, steps) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let (done, steps) = (&done, &steps);
        let run = |mut user: Box<dyn FnMut() -> Result<()> + Send + 'a>| {
            move || -> Result<()> {
                while !done.load(Ordering::SeqCst) {
                    user()?;
                    steps.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            }
        };
        let threads: Vec<_> = users.into_iter().map(|user| scope.spawn(run(user))).collect();
        let worked = work(steps);
        done.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + if worked.is_ok() { PATIENCE } else { Duration::ZERO };
        while threads.iter().any(|user| !user.is_finished()) {
            if Instant::now() > deadline {
                // Nobody answers them any more.
                abort(root)?;
                break;
            }
            // There is nothing to wait on that could be given up.
            thread::sleep(Duration::from_millis(1));
        }
        let users: Vec<_> =
            threads.into_iter().map(|user| user.join().expect("users do not panic")).collect();
        worked?;
        users.into_iter().collect::<Result<()>>().context("a user saw an error")
    })
}

/// Has the daemon mount or unmount, as often as it takes to get an answer: it may be killed meanwhile.
fn set_mounted(daemon: &Process, wanted: bool, mount: &str) -> Result<()> {
    let (method, body, as_it_is) = match wanted {
        true => ("POST", mount, "already exists"),
        false => ("DELETE", "", "not found"),
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match daemon.send(method, "/api/v1/mount?mountpoint=/some/where", body) {
            Ok((204, _)) => return Ok(()),
            Ok((_, answer)) if answer.contains(as_it_is) => return Ok(()),
            // No daemon, or one that does not serve yet.
            Err(_) | Ok((503, _)) => {}
            Ok((status, answer)) => bail!("{method}: {status} {answer}"),
        }
        ensure!(Instant::now() < deadline, "no answer to {method}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// kill -9 while images are read, files of the host are written, and something is mounted or unmounted: 10 kills, or as
/// many as `NYDUS_TEST_SUPERVISED_KILLS` says. Nobody who uses the mounts sees an error, what was appended is there
/// once, and what the API has said is so. The source of one mount is gone: that one alone is lost.
#[test]
fn kills_with_many_mounts_are_not_noticed() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let layout = journey.convert("nydus", &[])?;
    let bootstrap = journey.path("image.boot");
    layout.save_bootstrap(&bootstrap)?;
    let config = json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": layout.path().join("blobs/sha256") } },
        "cache": { "type": "filecache", "filecache": { "work_dir": journey.path("cache") } },
    });
    let image = json!({ "fs_type": "rafs", "source": bootstrap, "config": config.to_string() }).to_string();
    let directory = |path: &Path| {
        fs::create_dir(path)?;
        fs::write(path.join("file"), "of the host")?;
        mount_of(path)
    };
    let (written, flipped, gone) = (journey.path("written"), journey.path("flipped"), journey.path("gone"));
    let place = Place::new(&["--writable"])?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT", "READY"])?;
    for number in 0..IMAGES {
        holder.expect("POST", &format!("/api/v1/mount?mountpoint=/images/{number}"), &image, 204, "")?;
    }
    for (at, path) in [("/host", &written), ("/gone", &gone)] {
        holder.expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &directory(path)?, 204, "")?;
    }
    let flipping = directory(&flipped)?;
    let root = place.root();
    ensure!(root.join("gone/file").exists() && !root.join("some").exists());
    fs::remove_dir_all(&gone)?;

    let content = fs::read(root.join("images/0/data/one-chunk"))?;
    let kills = super::kills("NYDUS_TEST_SUPERVISED_KILLS", 10)?;
    let seed = RandomState::new().hash_one(kills);
    eprintln!("seed {seed:#x}");
    let mut random = Random::new(seed);
    let mut of_reader = Random::new(random.next());
    let (mut rounds, lines) = (0, AtomicUsize::new(0));
    let mut log = File::options().append(true).create(true).open(root.join("host/log"))?;
    let users: Vec<Box<dyn FnMut() -> Result<()> + Send>> = vec![
        Box::new(|| {
            rounds += 1;
            change_names(&root.join("host"), rounds)
        }),
        Box::new(|| {
            let line = lines.fetch_add(1, Ordering::SeqCst);
            log.write_all(format!("{line}\n").as_bytes()).context("append")
        }),
        Box::new(|| read_image(root, &content, &mut of_reader)),
    ];
    let worked = in_use(root, users, |steps| {
        for number in 1..=kills {
            let child = place.wait_child(number)?;
            let (wanted, from) = (number % 2 == 1, steps.load(Ordering::SeqCst));
            let moment = Duration::from_micros(random.next() % 3_000);
            thread::scope(|scope| {
                let killer = scope.spawn(|| -> Result<()> {
                    let deadline = Instant::now() + PATIENCE;
                    // The one before serves again.
                    while steps.load(Ordering::SeqCst) < from + 20 {
                        ensure!(Instant::now() < deadline, "users do not get on");
                        thread::yield_now();
                    }
                    let moment = Instant::now() + moment;
                    while Instant::now() < moment {
                        std::hint::spin_loop();
                    }
                    Ok(kill(child, Signal::SIGKILL)?)
                });
                let mut flips = 0;
                while !killer.is_finished() || flips % 2 == 0 {
                    flips += 1;
                    let wanted = wanted == (flips % 2 == 1);
                    set_mounted(&holder, wanted, &flipping)?;
                    let is_there = root.join("some/where/file").exists();
                    ensure!(is_there == wanted, "mounted is {wanted}, and its file is there: {is_there}");
                    // The first daemon has it open.
                    ensure!(number == 1 || !root.join("gone").exists(), "the name of what is gone");
                }
                killer.join().expect("the killer does not panic")
            })?;
        }
        place.wait_child(kills + 1)?;
        set_mounted(&holder, false, &flipping)?;
        ensure!(!root.join("gone").exists(), "the name of what is gone");
        Ok(())
    });
    worked.with_context(|| format!("seed {seed:#x}\n{}", place.log()))?;
    let appended: String = (0..lines.into_inner()).map(|line| format!("{line}\n")).collect();
    ensure!(fs::read_to_string(written.join("log"))? == appended, "lines are missing, or there twice");
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(root), "{status}: {}", place.log());
    Ok(())
}

/// The body of a mount of the directory `path`.
fn mount_of(path: &Path) -> Result<String> {
    Ok(json!({ "fs_type": "passthroughfs", "source": path, "config": "" }).to_string())
}
