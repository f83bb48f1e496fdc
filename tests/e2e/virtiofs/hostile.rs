//! Guests that mean harm: whatever is in their memory, the daemon lives, and serves the next.

use std::os::unix::fs::symlink;

use tests::guest::fuse::{Driver, GETATTR, INIT, LOOKUP, READ, init, read, request};
use tests::guest::monitor::{Descriptor, ENTRIES, Guest, INDIRECT, Monitor, NEXT, WRITE};
use tests::needs_mounts;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;

const RINGS: usize = 2;
const NO_ORDER: u64 = !(1 << 35);

/// A connected driver that has said FUSE_INIT.
fn greeted(device: &Device) -> Result<(Driver, Monitor)> {
    let mut driver = Driver::new(RINGS)?;
    let mut monitor = Monitor::connect(&device.socket(), RINGS, NO_ORDER)?;
    monitor.start(&driver.guest)?;
    driver.ask(INIT, 0, &init(), 64)?;
    Ok((driver, monitor))
}

/// Chains that end nowhere, turn in circles, lie outside of the memory or are longer than anything: the ring's other
/// requests are answered, or it is left alone; the daemon and its other rings go on.
#[test]
fn broken_rings_harm_nobody() -> Result<()> {
    needs_mounts!();
    let shared = tempfile::tempdir()?;
    std::fs::write(shared.path().join("file"), "content")?;
    let device = Device::start("virtiofs", &["--shared-dir", &text(shared.path())?])?;
    type Break = Box<dyn Fn(&mut Guest) -> Result<()>>;
    let chain = |first: Descriptor, second: Descriptor| -> Break {
        Box::new(move |guest| {
            guest.describe(1, 0, first)?;
            guest.describe(1, 1, second)?;
            guest.offer(1, 0)
        })
    };
    let at = |address, len, flags, next| Descriptor { address, len, flags, next };
    let heap = Guest::new(RINGS)?.heap();
    let breaks: Vec<(&str, Break)> = vec![
        ("a circle", chain(at(heap, 40, NEXT, 1), at(heap, 40, NEXT, 0))),
        ("itself", chain(at(heap, 40, NEXT, 0), at(heap, 40, 0, 0))),
        ("no memory", chain(at(0x1000, 40, NEXT, 1), at(0x2000, 200, WRITE, 0))),
        (
            "the end of all addresses",
            chain(at(u64::MAX - 10, 40, NEXT, 1), at(u64::MAX - 100, 4096, WRITE, 0)),
        ),
        ("4 GiB", chain(at(heap, u32::MAX, NEXT, 1), at(heap, u32::MAX, WRITE, 0))),
        ("no length", chain(at(heap, 0, NEXT, 1), at(heap, 0, WRITE, 0))),
        ("beyond the table", chain(at(heap, 40, NEXT, ENTRIES + 5), at(heap, 0, 0, 0))),
        ("a table of nothing", chain(at(heap, 0, INDIRECT, 0), at(heap, 0, 0, 0))),
        ("a table outside", chain(at(0x100, 32, INDIRECT, 0), at(heap, 0, 0, 0))),
        ("an odd table", chain(at(heap, 33, INDIRECT, 0), at(heap, 0, 0, 0))),
        (
            "tables in tables",
            Box::new(move |guest| {
                guest.memory.write_slice(&at(heap, 16, INDIRECT, 0).bytes(), GuestAddress(heap))?;
                guest.describe(1, 0, at(heap, 16, INDIRECT, 0))?;
                guest.offer(1, 0)
            }),
        ),
        ("written before read", chain(at(heap + 4096, 200, WRITE | NEXT, 1), at(heap, 40, 0, 0))),
        ("a head outside of the table", Box::new(|guest| guest.offer(1, ENTRIES + 100))),
        ("more than there are", Box::new(|guest| guest.claim(1, 5000))),
        ("every flag", chain(at(heap, 40, u16::MAX, u16::MAX), at(heap, 40, u16::MAX, u16::MAX))),
    ];
    for (what, break_it) in &breaks {
        let (mut driver, mut monitor) =
            greeted(&device).with_context(|| format!("{what}: {}", device.log()))?;
        driver.guest.memory.write_slice(&request(GETATTR, 7, 1, &[0; 16]), GuestAddress(heap))?;
        break_it(&mut driver.guest)?;
        driver.guest.kick(1)?;
        // The monitor is answered: nothing hangs. Whatever was made of it is done then.
        monitor.stop_ring(1).with_context(|| format!("{what}: {}", device.log()))?;
        driver.guest.reboot()?;
        monitor.start_ring(&driver.guest, 1)?;
        driver.ask(INIT, 0, &init(), 64).with_context(|| format!("{what}: {}", device.log()))?;
        let node = driver.lookup(1, "file")?;
        ensure!(driver.ask(READ, node, &read(0, 100), 100)?.data == b"content", "{what}");
    }
    ensure!(!device.log().contains("panicked"), "{}", device.log());
    Ok(())
}

/// Requests that are none, or that name what the guest was never given.
#[test]
fn forged_requests_are_refused() -> Result<()> {
    needs_mounts!();
    let shared = tempfile::tempdir()?;
    let outside = tempfile::tempdir()?;
    std::fs::write(outside.path().join("secret"), "secret")?;
    std::fs::write(shared.path().join("file"), "content")?;
    std::fs::create_dir(shared.path().join("dir"))?;
    symlink(outside.path(), shared.path().join("out"))?;
    symlink(outside.path().join("secret"), shared.path().join("secret"))?;
    let device = Device::start("virtiofs", &["--shared-dir", &text(shared.path())?])?;
    let (mut driver, _monitor) = greeted(&device)?;
    let names = |name: &[u8]| [name, b"\0"].concat();
    // No way out: not up, not through links, not by a path.
    for name in [&b".."[..], b"../..", b"dir/../..", b"/etc/passwd", b"out/secret", b"", b"."] {
        let answer = driver.ask(LOOKUP, 1, &names(name), 128)?;
        let node = answer.data.get(..8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
        // The root is above itself.
        ensure!(answer.error != 0 || node.is_none_or(|node| node <= 1), "{name:?}: {answer:?}");
    }
    for link in ["out", "secret"] {
        let node = driver.lookup(1, link)?;
        ensure!(driver.ask(READ, node, &read(0, 100), 100)?.error != 0, "{link} was read");
        ensure!(driver.ask(LOOKUP, node, &names(b"secret"), 128)?.error != 0, "{link} was followed");
    }
    let dir = driver.lookup(1, "dir")?;
    let above = driver.ask(LOOKUP, dir, &names(b".."), 128)?;
    ensure!(above.error != 0 || above.data[..8] == 1_u64.to_le_bytes(), "{above:?}");
    // Nodes that nobody was given.
    for node in [0, 2, 77, u64::MAX, 1 << 40, (1 << 40) + 12_345, (5 << 40) + 1, 1 << 63] {
        for (opcode, body) in [(GETATTR, vec![0; 16]), (READ, read(0, 4096)), (LOOKUP, names(b"file"))] {
            let answer = driver.ask(opcode, node, &body, 4096)?;
            ensure!(answer.error < 0, "{opcode} of {node:#x}: {answer:?}");
        }
    }
    // Every opcode with nothing, too little and noise behind it.
    let noise = tests::recipes::noise(3, 4096);
    for opcode in (0..64).chain([100, 4095, 4096, u32::MAX]) {
        // FORGET, INTERRUPT, BATCH_FORGET and NOTIFY_REPLY have no answer, DESTROY an empty one.
        if [2, 36, 41, 42].contains(&opcode) {
            continue;
        }
        for body in [&noise[..0], &noise[..3], &noise[..64], &noise] {
            let unique = driver.send(opcode, 1, body, 4096)?;
            let (_, len) = driver.guest.take(1).with_context(|| format!("{opcode}: {}", device.log()))?;
            ensure!(len == 0 || len >= 16, "{len} bytes to {opcode}, request {unique}");
        }
    }
    // A length that is not that of the request, and no room for an answer.
    let heap = driver.guest.heap();
    for (len, given, room) in
        [(0_u32, 40_u32, 200_u32), (4096, 40, 200), (40, 20, 200), (56, 56, 0), (56, 56, 15)]
    {
        let mut bytes = request(GETATTR, 9, 1, &[0; 16]);
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        driver.guest.memory.write_slice(&bytes, GuestAddress(heap))?;
        driver.guest.describe(1, 0, Descriptor { address: heap, len: given, flags: NEXT, next: 1 })?;
        driver.guest.describe(1, 1, Descriptor { address: heap + 8192, len: room, flags: WRITE, next: 0 })?;
        driver.guest.offer(1, 0)?;
        driver.guest.kick(1)?;
        let (_, len) = driver.guest.take(1)?;
        ensure!(len == 0, "{len} bytes were written");
    }
    driver.ask(INIT, 0, &init(), 64)?;
    let node = driver.lookup(1, "file")?;
    ensure!(driver.ask(READ, node, &read(0, 100), 100)?.data == b"content");
    ensure!(!device.log().contains("panicked"), "{}", device.log());
    Ok(())
}

/// A guest that keeps all that it is shown is refused more at some point; others of the daemon's go on.
#[test]
fn held_files_have_a_limit() -> Result<()> {
    needs_mounts!();
    let shared = tempfile::tempdir()?;
    for number in 0..1500 {
        std::fs::write(shared.path().join(format!("{number}")), "")?;
    }
    let device =
        Device::start("virtiofs", &["--shared-dir", &text(shared.path())?, "--rlimit-nofile", "1024"])?;
    let (mut driver, monitor) = greeted(&device)?;
    let mut refused = 0;
    for number in 0..1500 {
        let answer = driver.ask(LOOKUP, 1, format!("{number}\0").as_bytes(), 128)?;
        refused += usize::from(answer.error == -libc::ENFILE);
        ensure!([0, -libc::ENFILE].contains(&answer.error), "{answer:?}");
    }
    ensure!((500..1500).contains(&refused), "{refused} were refused");
    ensure!(device.process().state().as_deref() == Some("RUNNING"), "{}", device.log());
    // Its end gives them back.
    drop((driver, monitor));
    let (mut driver, _monitor) = greeted(&device)?;
    for number in 0..300 {
        driver.lookup(1, &format!("{number}"))?;
    }
    Ok(())
}
