//! Monitors and daemons that come and go.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tests::guest::fuse::{Driver, GETATTR, INIT, READ, init, read};
use tests::guest::monitor::Monitor;
use tests::image::Entry;
use tests::relay::Rule;
use tests::scene::Scene;
use tests::{needs_mounts, needs_programs, recipes};

use super::*;

/// Rings of the guests here: one for what must not wait, one for requests.
const RINGS: usize = 2;
/// All that a driver may ask for.
const ALL: u64 = u64::MAX;
/// VIRTIO_F_IN_ORDER.
const IN_ORDER: u64 = 1 << 35;

fn driver() -> Result<Driver> {
    Driver::new(RINGS)
}

/// Signals end a daemon, whether or not a monitor ever came, and leave no sockets.
#[test]
fn a_device_ends_when_it_is_told_to() -> Result<()> {
    needs_mounts!();
    for connects in [false, true] {
        for exits in [false, true] {
            let began = Instant::now();
            let mut device = Device::start::<&str>("virtiofs", &[])?;
            eprintln!("RUNNING after {:?}", began.elapsed());
            let driver = driver()?;
            let monitor = connects.then(|| Monitor::connect(&device.socket(), RINGS, ALL)).transpose()?;
            if let Some(mut monitor) = monitor {
                monitor.start(&driver.guest)?;
            }
            let status = match exits {
                true => {
                    device.process().put("/api/v1/daemon/exit")?;
                    device.wait()?
                }
                false => device.end(Signal::SIGTERM)?,
            };
            ensure!(status.code() == Some(0), "{status}: {}", device.log());
            ensure!(!device.socket().exists() && !device.process().socket().exists(), "{}", device.log());
        }
    }
    Ok(())
}

/// One monitor leaves and another one comes; the guest of the same one boots again; what the last one held is let go.
#[test]
fn guests_come_and_go() -> Result<()> {
    needs_mounts!();
    let shared = tempfile::tempdir()?;
    for number in 0..50 {
        std::fs::write(shared.path().join(format!("file-{number}")), format!("content {number}"))?;
    }
    let device = Device::start("virtiofs", &["--shared-dir", &text(shared.path())?])?;
    let descriptors = || -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", device.process().pid()))?.count())
    };
    let mut before = None;
    for round in 0..6 {
        let mut driver = driver()?;
        let mut monitor = Monitor::connect(&device.socket(), RINGS, ALL & !IN_ORDER)?;
        monitor.start(&driver.guest)?;
        for boot in 0..2 {
            let answer = driver.ask(INIT, 0, &init(), 64)?;
            ensure!(answer.error == 0 && answer.data.len() == 64, "{answer:?}");
            for number in 0..50 {
                let node = driver.lookup(1, &format!("file-{number}"))?;
                let answer = driver.ask(READ, node, &read(0, 4096), 4096)?;
                ensure!(answer.data == format!("content {number}").as_bytes(), "{answer:?}");
            }
            if boot == 0 {
                for ring in 0..RINGS {
                    monitor.stop_ring(ring)?;
                }
                driver.guest.reboot()?;
                monitor.start(&driver.guest)?;
            }
        }
        drop(monitor);
        device.wait_for_log("the monitor has left", round + 1)?;
        let now = descriptors()?;
        let first = *before.get_or_insert(now);
        ensure!(round == 0 || now <= first, "{now} descriptors after round {round}, {first} after the first");
    }
    Ok(())
}

/// A registry that does not answer delays neither what is cached nor metadata, and a ring that stops waits only so long.
#[test]
fn a_stalled_registry_delays_nobody_else() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = [recipes::noise(1, 100_000), recipes::noise(2, 3 << 20)];
    // Nobody fetches so far ahead.
    const FAR: usize = 2 << 20;
    let entries = vec![Entry::dir("./"), Entry::file("a", &bytes[0][..]), Entry::file("b", &bytes[1][..])];
    let scene = Scene::set(&Image::new(vec![entries]), &["--chunk-size", "0x10000"])?;
    let (image, cache) = (scene.reference(), text(&scene.cache())?);
    let device = Device::start("virtiofs", &["--image", &image, "--cache-dir", &cache, "--prefer", "bytes"])?;
    let mut driver = driver()?;
    let mut monitor = Monitor::connect(&device.socket(), RINGS, ALL & !IN_ORDER)?;
    monitor.start(&driver.guest)?;
    driver.ask(INIT, 0, &init(), 64)?;
    let (a, b) = (driver.lookup(1, "a")?, driver.lookup(1, "b")?);
    let answer = driver.ask(READ, a, &read(0, 50_000), 50_000)?;
    ensure!(answer.data == bytes[0][..50_000]);
    scene.relay.set(Rule::Stall);
    let stalled = driver.send(READ, b, &read(FAR as u64, 50_000), 50_000)?;
    scene.relay.wait_stalled(1)?;
    let answer = driver.ask(READ, a, &read(0, 50_000), 50_000)?;
    ensure!(answer.data == bytes[0][..50_000], "{answer:?}");
    ensure!(driver.ask(GETATTR, b, &[0; 16], 104)?.error == 0);
    // Then the guest is paused: what is under way ends with an error, and the ring stops.
    let began = Instant::now();
    monitor.stop_ring(1)?;
    ensure!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let answer = driver.receive()?;
    ensure!((answer.unique, answer.error) == (stalled, -libc::EIO), "{answer:?}");
    scene.relay.set(Rule::Pass);
    monitor.start_ring(&driver.guest, 1)?;
    let answer = driver.ask(READ, b, &read(FAR as u64, 50_000), 50_000)?;
    ensure!(answer.error == 0 && answer.data == bytes[1][FAR..FAR + 50_000], "{}", answer.error);
    Ok(())
}

/// kill -9 with reads under way. A front end that comes back goes on at the index that was used: with answers in order,
/// none is lost, none is wrong.
#[test]
fn a_front_end_that_reconnects_goes_on() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = recipes::noise(7, 1 << 20);
    let entries = vec![Entry::dir("./"), Entry::file("file", &bytes[..])];
    let scene = Scene::set(&Image::new(vec![entries]), &["--chunk-size", "0x10000"])?;
    let (image, cache) = (scene.reference(), text(&scene.cache())?);
    let arguments = ["--image", &image, "--cache-dir", &cache, "--in-order"];
    let mut device = Device::start("virtiofs", &arguments)?;
    let mut driver = driver()?;
    let mut monitor = Monitor::connect(&device.socket(), RINGS, ALL)?;
    ensure!(monitor.features & IN_ORDER != 0, "{:#x}", monitor.features);
    monitor.start(&driver.guest)?;
    driver.ask(INIT, 0, &init(), 64)?;
    let node = driver.lookup(1, "file")?;
    scene.relay.set(Rule::Slow(Duration::from_millis(3)));
    let mut asked = std::collections::VecDeque::new();
    let (mut next, mut done, mut kills) = (0_u64, 0_u64, 0);
    while done < 400 {
        while asked.len() < 12 {
            // Here and there, so that some is cached and some is not.
            let offset = next * 0x9_7000 % (1 << 20);
            asked.push_back((driver.send(READ, node, &read(offset, 4096), 4096)?, offset));
            next += 1;
        }
        if done == 40 * (kills + 1) && kills < 8 {
            kills += 1;
            device.end(Signal::SIGKILL)?;
            drop(monitor);
            device.restart()?;
            monitor = Monitor::connect(&device.socket(), RINGS, ALL)?;
            monitor.start(&driver.guest)?;
            // What was there before the kick of the new connection.
            driver.guest.kick(1)?;
        }
        let answer = driver.receive().with_context(|| device.log())?;
        let (unique, offset) = asked.pop_front().context("an answer to nothing")?;
        ensure!(answer.unique == unique && answer.error == 0, "{unique}: {} {}", answer.unique, answer.error);
        let offset = usize::try_from(offset)?;
        ensure!(answer.data == bytes[offset..offset + 4096], "wrong bytes at {offset}");
        done += 1;
    }
    ensure!(kills == 8);
    Ok(())
}

/// The memory goes away with the monitor in the middle of reads: nothing is written anywhere, and the next one is served.
#[test]
fn a_monitor_that_dies_leaves_nothing_behind() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = recipes::noise(9, 600_000);
    let entries = vec![Entry::dir("./"), Entry::file("file", &bytes[..])];
    let scene = Scene::set(&Image::new(vec![entries]), &["--chunk-size", "0x10000"])?;
    let (image, cache) = (scene.reference(), text(&scene.cache())?);
    let device = Device::start("virtiofs", &["--image", &image, "--cache-dir", &cache])?;
    scene.relay.set(Rule::Stall);
    for round in 0..3_u64 {
        let mut driver = driver()?;
        let mut monitor = Monitor::connect(&device.socket(), RINGS, ALL)?;
        monitor.start(&driver.guest)?;
        driver.ask(INIT, 0, &init(), 64)?;
        let node = driver.lookup(1, "file")?;
        driver.send(READ, node, &read(round * 131_072, 65_536), 65_536)?;
        scene.relay.wait_stalled(1)?;
        drop(monitor);
        device.wait_for_log("the monitor has left", usize::try_from(round)? + 1)?;
        ensure!(driver.guest.used(1)? == 2, "an answer after the end: {}", device.log());
    }
    scene.relay.set(Rule::Pass);
    let mut driver = driver()?;
    let mut monitor = Monitor::connect(&device.socket(), RINGS, ALL)?;
    monitor.start(&driver.guest)?;
    driver.ask(INIT, 0, &init(), 64)?;
    let node = driver.lookup(1, "file")?;
    let answer = driver.ask(READ, node, &read(65_536, 65_536), 65_536)?;
    ensure!(answer.error == 0 && answer.data == bytes[65_536..131_072], "{}", answer.error);
    Ok(())
}
