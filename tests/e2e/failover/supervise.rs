//! `nydusd supervise`: no snapshotter, and a mount that survives its daemon all the same.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use tests::mount::mounted;
use tests::relay::Rule;
use tests::successor::Place;
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

use super::{Noise, Random, report, stalls};

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
