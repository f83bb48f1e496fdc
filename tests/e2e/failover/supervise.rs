//! `nydusd supervise`: no snapshotter, and a mount that survives its daemon all the same.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};
use serde_json::json;
use tests::daemon::DaemonOptions;
use tests::mount::{abort, mounted};
use tests::relay::Rule;
use tests::successor::{Place, Process};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

use super::{Noise, PATIENCE, Random, report, stalls};

/// Kills on one cache directory before it is read whole, and replaced by an empty one.
const KILLS_A_CACHE: usize = 10;

/// A registry at some distance: while readers meet chunks that are not cached, one is in flight.
const FAR: Rule = Rule::Slow(Duration::from_millis(5));

/// kill -9 at random moments under readers: 30 kills, or as many as `NYDUS_TEST_SUPERVISED_KILLS` says
/// (`make soak`: 1000). Nobody sees an error or a wrong byte.
#[test]
fn kills_are_not_noticed() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let kills = super::kills("NYDUS_TEST_SUPERVISED_KILLS", 30)?;
    let noise = Noise::set()?;
    let relay = &noise.scene.relay;
    let seed = RandomState::new().hash_one(kills);
    eprintln!("seed {seed:#x}");
    let mut random = Random::new(seed);
    let (mut done, mut in_flight, mut reads, mut felt) = (0, 0, 0, Vec::new());
    while done < kills {
        let round = KILLS_A_CACHE.min(kills - done);
        let place = noise.place(&format!("cache-{done}"), None)?;
        relay.set(FAR);
        let mut holder = place.supervise("api.sock")?;
        holder.wait_state("RUNNING", &["INIT"])?;
        let mut moments = Vec::new();
        let answered = noise.under_readers(place.root(), &mut random, |random, progress| {
            for number in 1..=round {
                let child = place.wait_child(number)?;
                // One in ten perhaps before it has begun to serve.
                if number % 10 != 5 {
                    progress.wait(1 + usize::try_from(random.next() % 12)?)?;
                    let moment = Instant::now() + Duration::from_micros(random.next() % 8_000);
                    // Or when next it fetches something, if it does.
                    let latest = moment + Duration::from_millis(200);
                    while Instant::now() < moment || (relay.active() == 0 && Instant::now() < latest) {
                        std::hint::spin_loop();
                    }
                }
                in_flight += usize::from(relay.active() > 0);
                moments.push(Instant::now());
                kill(child, Signal::SIGKILL)?;
            }
            place.wait_child(round + 1).map(drop)
        });
        let answered = answered.with_context(|| format!("seed {seed:#x}\n{}", place.log()))?;
        felt.extend(stalls(&answered, &moments));
        reads += answered.iter().map(Vec::len).sum::<usize>();
        done += round;
        relay.set(Rule::Pass);
        noise.read_all(place.root()).with_context(|| place.log())?;
        holder.signal(Signal::SIGTERM)?;
        let status = holder.wait()?;
        ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    }
    report(&format!("{kills} kills, {in_flight} with an uncached chunk in flight"), reads, felt);
    ensure!(in_flight * 10 >= kills * 8, "only {in_flight} of {kills} kills hit a chunk in flight");
    Ok(())
}

/// What ends a supervised daemon, and what does not.
#[test]
fn supervise_ends_with_the_mount() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let noise = Noise::set()?;
    let place = noise.place("cache", None)?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT"])?;
    // An exit leaves the mount, so another daemon takes it over: that is an upgrade.
    holder.put("/api/v1/daemon/exit")?;
    place.wait_child(2)?;
    noise.read_one(place.root(), &mut Random::new(3))?;
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    // So is a signal, which needs no client.
    holder.signal(Signal::SIGHUP)?;
    let child = place.wait_child(3)?;
    noise.read_one(place.root(), &mut Random::new(5))?;
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    // A child that is told to end unmounts; its parent has nothing left to do.
    kill(child, Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());

    // A start that fails is the end, with its exit code.
    let broken = Place::new(&["--image", "oci:/nowhere", "--cache-dir", "/nowhere/cache"])?;
    let mut holder = broken.supervise("api.sock")?;
    ensure!(holder.wait()?.code() == Some(1), "{}", broken.log());
    ensure!(broken.children().len() == 1, "{}", broken.log());
    Ok(())
}

/// The broker of a daemon.
fn broker(daemon: Pid) -> Result<Pid> {
    let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"))?;
    let is_broker = |child: &&str| {
        fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|comm| comm.trim() == "nydusd-broker")
    };
    let broker = children.split_whitespace().find(is_broker).context("there is no broker")?;
    Ok(Pid::from_raw(broker.parse()?))
}

/// A daemon without its broker can not do all that it should: another one, with a broker, does.
#[test]
fn a_daemon_whose_broker_ends_is_replaced() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    fs::write(scratch.path().join("file"), "of the host")?;
    let place = Place::new::<&str>(&[])?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT"])?;
    let share = |daemon: &Process, at: &str| {
        let body = json!({"fs_type": "passthroughfs", "source": scratch.path(), "config": ""}).to_string();
        daemon.expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &body, 204, "")
    };
    share(&holder, "/one")?;
    let child = place.wait_child(1)?;
    kill(broker(child)?, Signal::SIGKILL)?;
    let next = place.wait_child(2)?;
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    broker(next)?;
    share(&holder, "/two")?;
    for name in ["one", "two"] {
        ensure!(fs::read(place.root().join(name).join("file"))? == b"of the host", "{name}: {}", place.log());
    }
    ensure!(place.log().contains("the broker has ended"), "{}", place.log());
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}

/// A signal for the first child comes before that can handle it: it is kept for then.
#[test]
fn an_early_hangup_kills_nobody() -> Result<()> {
    needs_mounts!();
    let place = Place::new::<&str>(&[])?;
    let mut holder = place.supervise("api.sock")?;
    place.wait_child(1)?;
    holder.signal(Signal::SIGHUP)?;
    place.wait_child(2)?;
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    ensure!(!place.log().contains("killed by signal") && !place.log().contains("SIGHUP)"), "{}", place.log());
    // What was wanted is nothing to be warned of.
    ensure!(place.log().contains("another one takes its mount over"), "{}", place.log());
    ensure!(!place.log().contains(" WARN "), "{}", place.log());
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}

/// Successors that fail leave the mount alone, however many they are; the first that can goes on with it.
#[test]
fn failing_successors_keep_the_mount() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let noise = Noise::set()?;
    let place = noise.place("cache", None)?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT"])?;
    // No successor finds what is mounted, nor may it ask for it. One that has taken the connection gives it back.
    let cache = noise.scene.journey.path("cache");
    let aside = noise.scene.journey.path("aside");
    noise.scene.relay.set(Rule::Refuse(503));
    std::fs::rename(&cache, &aside)?;
    std::fs::write(&cache, "no directory")?;
    kill(place.wait_child(1)?, Signal::SIGKILL)?;
    place.wait_child(4)?;
    ensure!(mounted(place.root()), "the mount went: {}", place.log());
    std::fs::remove_file(&cache)?;
    std::fs::rename(&aside, &cache)?;
    noise.scene.relay.set(Rule::Pass);
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    noise.read_all(place.root())?;
    ensure!(place.log().contains("take over"), "nobody failed: {}", place.log());
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}

/// A daemon dies while it tells the kernel of a change, which waits for somebody whom that daemon owes an answer. What is
/// left of it can not be killed before another one has given that answer.
#[test]
fn a_daemon_that_can_not_die_is_replaced() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let source = scratch.path().join("source");
    std::fs::create_dir(&source)?;
    std::fs::write(source.join("file"), "of the host")?;
    // The directory that is served is another daemon's, which is slow at times.
    let slow = DaemonOptions::empty().flag("--shared-dir", &source).start()?;
    let place = Place::new::<&str>(&[])?;
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT"])?;
    let body = |path: &Path| json!({ "fs_type": "passthroughfs", "source": path, "config": "" }).to_string();
    holder.expect("POST", "/api/v1/mount?mountpoint=/host", &body(slow.root()), 204, "")?;
    let host = place.root().join("host");
    ensure!(std::fs::read(host.join("file"))? == b"of the host");
    let child = place.wait_child(1)?;

    let found = thread::scope(|scope| -> Result<std::io::Error> {
        let asked = loop {
            slow.freeze()?;
            let (sender, asking) = channel();
            let fresh = host.join("new");
            let asked = scope.spawn(move || -> Result<_> {
                sender.send(gettid())?;
                Ok(std::fs::metadata(fresh))
            });
            let asking = PathBuf::from(format!("/proc/self/task/{}", asking.recv()?));
            let waits = wait_in("request_wait_answer", || Ok(vec![asking.clone()]));
            // It holds the directory while it looks for the name, and not if it first asks again for what it knows
            // of the directory, which it believes for a second.
            match waits.and_then(|()| Ok(std::fs::read_to_string(asking.join("stack"))?)) {
                Ok(stack) if stack.contains("fuse_lookup") => break asked,
                waits => {
                    kill(slow.pid(), Signal::SIGCONT)?;
                    waits?;
                    drop(asked.join().expect("no panic")?);
                }
            }
        };
        let told = scope.spawn(|| {
            let below = "/api/v1/mount?mountpoint=/host/below";
            // Its answer dies with the daemon.
            let _ = holder.send("POST", below, &body(&source));
        });
        let told_the_kernel = wait_in("fuse_reverse_inval_entry", || {
            let tasks = std::fs::read_dir(format!("/proc/{child}/task"))?;
            tasks.map(|task| Ok(task?.path())).collect()
        });
        let replaced = told_the_kernel.and_then(|()| {
            kill(child, Signal::SIGKILL)?;
            place.wait_child(2)
        });
        kill(slow.pid(), Signal::SIGCONT)?;
        if replaced.is_err() {
            abort(place.root())?;
        }
        told.join().expect("no panic");
        let found = asked.join().expect("no panic")?;
        replaced.with_context(|| place.log())?;
        found.err().context("there is no such file")
    })?;
    ensure!(found.kind() == std::io::ErrorKind::NotFound, "{found}");
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    ensure!(std::fs::read(host.join("below/file"))? == b"of the host", "the change is lost");
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}

/// Waits until one of these threads is in this function of the kernel.
fn wait_in(function: &str, threads: impl Fn() -> Result<Vec<PathBuf>>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let is_there =
            |at: &PathBuf| std::fs::read_to_string(at.join("wchan")).is_ok_and(|at| at == function);
        if threads()?.iter().any(is_there) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no thread comes to {function}");
        thread::yield_now();
    }
}
