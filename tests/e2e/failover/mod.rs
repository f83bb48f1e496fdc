//! The mount outlives its daemon: upgrades and crashes that no reader notices.

mod covered;
mod many;
mod sequences;
mod supervise;
mod writable;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tests::image::{Entry, Image};
use tests::mount::abort;
use tests::recipes::noise;
use tests::scene::Scene;
use tests::successor::{Place, Supervisor};
use tests::{Context, Result, bail, ensure};

const FILES: u64 = 4;
const FILE_SIZE: u64 = 16 << 20;
const READERS: usize = 4;
/// What one read asks for.
const PIECE: u64 = 64 << 10;
/// How long readers may take to be answered in the end.
const PATIENCE: Duration = Duration::from_secs(30);

/// An image of noise in a registry, and what its files hold.
struct Noise {
    scene: Scene,
    contents: Vec<Vec<u8>>,
}

/// One read that was answered with the right bytes.
#[derive(Clone, Copy)]
struct Answered {
    began: Instant,
    took: Duration,
}

/// Reads that were answered so far.
#[derive(Default)]
struct Progress(AtomicUsize);

impl Progress {
    /// Waits until so many more were answered.
    fn wait(&self, count: usize) -> Result<()> {
        let (wanted, deadline) = (self.0.load(Ordering::SeqCst) + count, Instant::now() + PATIENCE);
        while self.0.load(Ordering::SeqCst) < wanted {
            ensure!(Instant::now() < deadline, "readers do not get on");
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl Noise {
    fn set() -> Result<Self> {
        let contents: Vec<Vec<u8>> = (0..FILES)
            .map(|file| Ok(noise(100 + file, usize::try_from(FILE_SIZE)?)))
            .collect::<Result<_>>()?;
        let mut entries = vec![Entry::dir("./")];
        entries.extend(
            (0..FILES).zip(&contents).map(|(file, bytes)| Entry::file(format!("{file}"), bytes.as_slice())),
        );
        let scene = Scene::set(&Image::new(vec![entries]), &["--chunk-size", "0x4000"])?;
        Ok(Self { scene, contents })
    }

    /// A mount point for daemons of this image with the cache directory `cache`.
    fn place(&self, cache: &str, supervisor: Option<&Supervisor>) -> Result<Place> {
        let reference = self.scene.relay.reference("scene");
        let cache = self.scene.journey.path(cache).to_string_lossy().into_owned();
        let mut arguments = vec!["--image".to_owned(), reference, "--cache-dir".to_owned(), cache];
        arguments.extend(supervisor.iter().flat_map(|supervisor| supervisor.arguments()));
        Place::new(&arguments)
    }

    /// One read at a random place, compared, its pages dropped.
    fn read_one(&self, root: &Path, random: &mut Random) -> Result<()> {
        let number = usize::try_from(random.next() % FILES)?;
        let offset = random.next() % (FILE_SIZE / PIECE) * PIECE;
        let path = root.join(number.to_string());
        let context = || format!("{} at {offset}", path.display());
        let file = File::open(&path).with_context(context)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        let mut found = vec![0; usize::try_from(PIECE)?];
        file.read_exact_at(&mut found, offset).with_context(context)?;
        let start = usize::try_from(offset)?;
        if found != self.contents[number][start..start + found.len()] {
            bail!("wrong bytes in file {number} at {offset}");
        }
        let (offset, len) = (offset.cast_signed(), PIECE.cast_signed());
        posix_fadvise(&file, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }

    /// All files, compared.
    fn read_all(&self, root: &Path) -> Result<()> {
        for (file, bytes) in self.contents.iter().enumerate() {
            ensure!(&std::fs::read(root.join(file.to_string()))? == bytes, "file {file} differs");
        }
        Ok(())
    }

    /// Runs `work` while readers compare what they read; the reads of each. Any error that one of them
    /// sees is an error.
    fn under_readers(
        &self,
        root: &Path,
        random: &mut Random,
        work: impl FnOnce(&mut Random, &Progress) -> Result<()>,
    ) -> Result<Vec<Vec<Answered>>> {
        let (done, progress) = (AtomicBool::new(false), Progress::default());
        let read = |mut random: Random| {
            let mut answered = Vec::new();
            while !done.load(Ordering::SeqCst) {
                let began = Instant::now();
                self.read_one(root, &mut random)?;
                answered.push(Answered { began, took: began.elapsed() });
                progress.0.fetch_add(1, Ordering::SeqCst);
            }
            Ok(answered)
        };
        thread::scope(|scope| {
            let read = &read;
            let readers: Vec<_> = (0..READERS)
                .map(|_| {
                    let random = Random::new(random.next());
                    scope.spawn(move || -> Result<_> { read(random) })
                })
                .collect();
            let worked = work(random, &progress);
            done.store(true, Ordering::SeqCst);
            // A reader that nobody answers any more is set free, and so found out about.
            let deadline = Instant::now() + if worked.is_ok() { PATIENCE } else { Duration::ZERO };
            while readers.iter().any(|reader| !reader.is_finished()) {
                if Instant::now() > deadline {
                    abort(root)?;
                    break;
                }
                // There is nothing to wait on that could be given up.
                thread::sleep(Duration::from_millis(1));
            }
            let found: Vec<Result<_>> =
                readers.into_iter().map(|reader| reader.join().expect("readers do not panic")).collect();
            worked?;
            let found =
                found.into_iter().collect::<Result<Vec<Vec<_>>>>().context("a reader saw an error")?;
            ensure!(found.iter().all(|reads| !reads.is_empty()), "a reader has read nothing");
            Ok(found)
        })
    }
}

/// How long each reader was kept waiting by what happened at each of `moments`: by the read that was
/// under way then, or else by the next.
fn stalls(readers: &[Vec<Answered>], moments: &[Instant]) -> Vec<Duration> {
    let hit = |reads: &Vec<Answered>, moment: &Instant| {
        let read = reads.iter().find(|read| read.began + read.took > *moment)?;
        Some((read.began + read.took).saturating_duration_since(*moment))
    };
    moments.iter().flat_map(|moment| readers.iter().filter_map(move |reads| hit(reads, moment))).collect()
}

/// How many kills a test is to do: `few`, or as many as the environment says (`make soak`).
fn kills(variable: &str, few: usize) -> Result<usize> {
    match std::env::var(variable) {
        Ok(text) => text.parse().context(variable.to_owned()),
        Err(_) => Ok(few),
    }
}

/// Prints what readers felt.
fn report(what: &str, reads: usize, mut stalls: Vec<Duration>) {
    stalls.sort_unstable();
    let at = |percent: usize| stalls[(stalls.len() - 1) * percent / 100];
    eprintln!(
        "{what}: {reads} reads compared; a reader stalled for {:?} (median), {:?} (p99), {:?} (longest)",
        at(50),
        at(99),
        at(100)
    );
}

/// xorshift64*: repeatable from its seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
