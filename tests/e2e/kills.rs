//! kill -9 at random moments under readers: whatever is in the cache afterwards is right.

use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::BuildHasher;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tests::daemon::DaemonOptions;
use tests::image::{Entry, Image};
use tests::journey::{Journey, convert};
use tests::recipes::noise;
use tests::registry::Registry;
use tests::relay::{Relay, Rule};
use tests::{Context, Result, bail, ensure, needs_mounts, needs_programs};

const FILES: u64 = 4;
const FILE_SIZE: u64 = 8 << 20;
const READERS: u64 = 4;
/// What one read asks for.
const PIECE: u64 = 64 << 10;
/// Kills on one cache directory before it is read whole, compared, and replaced by an empty one. After many more all is
/// there, and nothing is in flight.
const KILLS_A_CACHE: u32 = 5;

/// 30 kills, or as many as `NYDUS_TEST_KILLS` says (`make soak`: 500).
#[test]
fn a_killed_daemon_leaves_no_wrong_byte() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let kills: u32 = match std::env::var("NYDUS_TEST_KILLS") {
        Ok(text) => text.parse().context("NYDUS_TEST_KILLS")?,
        Err(_) => 30,
    };
    let contents: Vec<Vec<u8>> =
        (0..FILES).map(|file| Ok(noise(100 + file, usize::try_from(FILE_SIZE)?))).collect::<Result<_>>()?;
    let mut entries = vec![Entry::dir("./")];
    entries.extend(
        (0..FILES).zip(&contents).map(|(file, bytes)| Entry::file(format!("{file}"), bytes.as_slice())),
    );
    let journey = Journey::start(&Image::new(vec![entries]))?;
    let registry = Registry::open()?;
    let relay = Relay::start(registry.address())?;
    convert(&journey.source.reference(), &registry.reference("killed"), &["--chunk-size", "0x4000"])?;

    let seed = RandomState::new().hash_one(kills);
    eprintln!("seed {seed:#x}");
    let mut random = Random(seed | 1);
    let (mut in_flight, mut right_reads) = (0, 0);
    let mut cache = journey.path("cache-0");
    for kill in 0..kills {
        if kill % KILLS_A_CACHE == 0 {
            cache = journey.path(&format!("cache-{kill}"));
        }
        let options = DaemonOptions::image(&relay.reference("killed"), &cache).flag("--log-level", "warn");
        // A registry at some distance: chunks are in flight for longer than they are decoded.
        relay.set(Rule::Slow(Duration::from_millis(2)));
        let (flying, reads) = kill_under_readers(&options, &relay, &contents, &mut random)
            .with_context(|| format!("kill {kill}, seed {seed:#x}"))?;
        in_flight += u32::from(flying);
        right_reads += reads;
        if kill % KILLS_A_CACHE == KILLS_A_CACHE - 1 || kill + 1 == kills {
            relay.set(Rule::Pass);
            let daemon = options.start()?;
            for (file, bytes) in contents.iter().enumerate() {
                ensure!(
                    &fs::read(daemon.root().join(file.to_string()))? == bytes,
                    "kill {kill}: wrong bytes"
                );
            }
        }
    }
    eprintln!("{kills} kills, {in_flight} with an uncached chunk in flight, {right_reads} reads compared");
    ensure!(in_flight * 10 >= kills * 8, "only {in_flight} of {kills} kills hit a chunk in flight");
    ensure!(right_reads > 0, "no read was compared");
    Ok(())
}

/// Starts a daemon, lets readers loose, kills it; whether a request was in flight, and the reads
/// that were compared.
fn kill_under_readers(
    options: &DaemonOptions,
    relay: &Relay,
    contents: &[Vec<u8>],
    random: &mut Random,
) -> Result<(bool, u64)> {
    let mut daemon = options.start()?;
    let root = daemon.root().to_owned();
    let (dying, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let arrived = relay.arrived();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                let mut random = Random(random.next() | 1);
                let (root, dying, reads) = (&root, &dying, &reads);
                scope.spawn(move || {
                    loop {
                        match read_one(root, contents, &mut random) {
                            Ok(()) => reads.fetch_add(1, Ordering::Relaxed),
                            Err(_) if dying.load(Ordering::SeqCst) => return Ok(()),
                            Err(error) => return Err(error),
                        };
                    }
                })
            })
            .collect();
        // The moment: some requests on, then up to 20 ms.
        let waited = relay.wait_arrived(arrived + 1 + usize::try_from(random.next() % 24)?);
        let moment = Instant::now() + Duration::from_micros(random.next() % 20_000);
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        dying.store(true, Ordering::SeqCst);
        let flying = relay.active() > 0;
        daemon.kill()?;
        drop(daemon);
        for reader in readers {
            reader.join().expect("readers do not panic")?;
        }
        let reads = reads.load(Ordering::Relaxed);
        waited.with_context(|| format!("{reads} reads compared meanwhile"))?;
        Ok((flying, reads))
    })
}

/// One read at a random place, compared, its pages dropped.
fn read_one(root: &Path, contents: &[Vec<u8>], random: &mut Random) -> Result<()> {
    let number = usize::try_from(random.next() % FILES)?;
    let offset = random.next() % (FILE_SIZE / PIECE) * PIECE;
    let file = File::open(root.join(number.to_string()))?;
    let mut found = vec![0; usize::try_from(PIECE)?];
    file.read_exact_at(&mut found, offset)?;
    let start = usize::try_from(offset)?;
    if found != contents[number][start..start + found.len()] {
        bail!("wrong bytes in file {number} at {offset}");
    }
    let (offset, length) = (offset.cast_signed(), PIECE.cast_signed());
    nix::fcntl::posix_fadvise(&file, offset, length, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

/// xorshift64*: repeatable from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
