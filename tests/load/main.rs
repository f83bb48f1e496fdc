//! `fs-load`: loops over a tree that a script would be too slow for, timed from their own start.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use nix::dir::Dir;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::{Mode, lstat};
use serde_json::json;
use tests::{Context, Result, ensure};

/// Does one thing to a tree again and again and prints as JSON: `count` (of operations),
/// `bytes` (read), `seconds`, and for `getxattr` the `errno` of the last call.
#[derive(Debug, Parser)]
struct Cli {
    /// Threads, each with a share of its own, or an order of its own
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// What to do
    #[command(subcommand)]
    load: Load,
}

#[derive(Clone, Debug, Subcommand)]
enum Load {
    /// lstat(2) of every path in a random order, as often as it takes
    Stat(Metadata),
    /// Opens, lists and closes every directory, as often as it takes
    Readdir(Metadata),
    /// lgetxattr(2) of every path in a random order, as often as it takes
    Getxattr(Metadata),
    /// Reads the tree's largest files, each block once
    Read(Blocks),
}

#[derive(clap::Args, Clone, Debug)]
struct Metadata {
    /// Seconds at least; every path is taken once before
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Attribute that is asked for
    #[arg(long, default_value = "user.bench")]
    name: String,
    /// The tree
    root: PathBuf,
}

#[derive(clap::Args, Clone, Debug)]
struct Blocks {
    /// Bytes a read(2)
    #[arg(long)]
    block: usize,
    /// In a random order, with the kernel's readahead off
    #[arg(long)]
    random: bool,
    /// Bytes that all jobs read together
    #[arg(long)]
    bytes: u64,
    /// The tree
    root: PathBuf,
}

/// What one job has done.
#[derive(Clone, Copy, Default)]
struct Done {
    count: u64,
    bytes: u64,
    errno: i32,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    ensure!((1..=64).contains(&cli.jobs), "--jobs {}: want 1 to 64", cli.jobs);
    let (seconds, done) = match &cli.load {
        Load::Stat(args) => {
            let paths = paths(&args.root, |_| true)?;
            repeat(cli.jobs, args, &paths, |path| Ok(lstat(path.as_c_str()).map(|_| 0)?))?
        }
        Load::Readdir(args) => {
            let paths = paths(&args.root, |kind| kind.is_dir())?;
            repeat(cli.jobs, args, &paths, |path| {
                let mut dir =
                    Dir::open(path.as_c_str(), OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())?;
                for entry in dir.iter() {
                    entry?;
                }
                Ok(0)
            })?
        }
        Load::Getxattr(args) => {
            let paths = paths(&args.root, |kind| kind.is_file())?;
            repeat(cli.jobs, args, &paths, |path| {
                let path = Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()));
                Ok(match xattr::get(path, &args.name) {
                    Ok(Some(_)) => 0,
                    Ok(None) => libc::ENODATA,
                    Err(e) => e.raw_os_error().context("getxattr")?,
                })
            })?
        }
        Load::Read(args) => read(cli.jobs, args)?,
    };
    let Done { count, bytes, errno } = done;
    writeln!(
        std::io::stdout(),
        "{}",
        json!({"count": count, "bytes": bytes, "errno": errno, "seconds": seconds})
    )?;
    Ok(())
}

/// A fixed sequence that looks random: every run takes the same order.
struct Shuffler(u64);

impl Shuffler {
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            // Constants of Knuth's MMIX generator; its high bits are good.
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            items.swap(last, (self.0 >> 33) as usize % (last + 1));
        }
    }
}

/// All paths below `root` on its file system, in the order of their names.
fn paths(root: &Path, wanted: impl Fn(std::fs::FileType) -> bool) -> Result<Vec<CString>> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                dirs.push(entry.path());
            }
            if wanted(kind) {
                found.push(CString::new(entry.path().as_os_str().as_bytes())?);
            }
        }
    }
    ensure!(!found.is_empty(), "{}: nothing to work with", root.display());
    found.sort();
    Ok(found)
}

/// Runs `job` on as many threads at once, from a common start to the last one's end.
fn together(jobs: usize, job: impl Fn(usize) -> Result<Done> + Sync) -> Result<(f64, Done)> {
    let start = Barrier::new(jobs + 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs)
            .map(|number| {
                let (start, job) = (&start, &job);
                scope.spawn(move || {
                    start.wait();
                    job(number)
                })
            })
            .collect();
        start.wait();
        let began = Instant::now();
        let mut all = Done::default();
        for thread in threads {
            let done = thread.join().ok().context("a thread panicked")??;
            all.count += done.count;
            all.bytes += done.bytes;
            all.errno = done.errno;
        }
        Ok((began.elapsed().as_secs_f64(), all))
    })
}

/// Every thread does `operation` on all paths, in an order of its own, until the time is over.
fn repeat(
    jobs: usize,
    args: &Metadata,
    paths: &[CString],
    operation: impl Fn(&CString) -> Result<i32> + Sync,
) -> Result<(f64, Done)> {
    let limit = Duration::try_from_secs_f64(args.seconds).context("--seconds")?;
    for path in paths {
        operation(path).with_context(|| path.to_string_lossy().into_owned())?;
    }
    together(jobs, |number| {
        let mut order: Vec<&CString> = paths.iter().collect();
        Shuffler(number as u64 + 1).shuffle(&mut order);
        let mut done = Done::default();
        let began = Instant::now();
        loop {
            for part in order.chunks(256) {
                for path in part {
                    done.errno = operation(path)?;
                }
                done.count += part.len() as u64;
                if began.elapsed() >= limit {
                    return Ok(done);
                }
            }
        }
    })
}

/// Reads whole blocks of the largest files until there is enough, divided among the threads.
fn read(jobs: usize, args: &Blocks) -> Result<(f64, Done)> {
    ensure!((1..=64 << 20).contains(&args.block), "--block {}: want 1 byte to 64 MiB", args.block);
    let mut sizes = Vec::new();
    for path in paths(&args.root, |kind| kind.is_file())? {
        let size = u64::try_from(lstat(path.as_c_str())?.st_size)?;
        sizes.push((std::cmp::Reverse(size), path));
    }
    sizes.sort();
    let block = args.block as u64;
    let mut files = Vec::new();
    let mut places = Vec::new();
    for (std::cmp::Reverse(size), path) in sizes {
        let enough = places.len() as u64 * block >= args.bytes;
        if size < block || (enough && !args.random) || files.len() == 64 {
            break;
        }
        let file = File::open(std::ffi::OsStr::from_bytes(path.as_bytes()))?;
        if args.random {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        }
        places.extend((0..size / block).map(|number| (files.len(), number * block)));
        files.push(file);
    }
    ensure!(!places.is_empty(), "no file holds a block of {block} bytes");
    if args.random {
        Shuffler(1).shuffle(&mut places);
    }
    places.truncate(usize::try_from(args.bytes / block)?.max(jobs));
    let share = places.len().div_ceil(jobs);
    together(jobs, |number| {
        let mut buffer = vec![0; args.block];
        let mut done = Done::default();
        for (file, offset) in places.iter().skip(number * share).take(share) {
            let file = &files[*file];
            file.read_exact_at(&mut buffer, *offset)
                .with_context(|| format!("descriptor {} at {offset}", file.as_raw_fd()))?;
            done.count += 1;
            done.bytes += block;
        }
        Ok(done)
    })
}
