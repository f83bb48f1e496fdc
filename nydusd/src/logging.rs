//! The log: on standard error or in a file that rotates by size. The threshold can be changed
//! while the daemon runs.

use std::io::{self, IsTerminal as _, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::Context as _;
use file_rotate::compression::Compression;
use file_rotate::suffix::{AppendTimestamp, FileLimit};
use file_rotate::{ContentLimit, FileRotate};
use storage::log::{Line, SHOWS_SECRETS};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Registry, reload};

use crate::cli::{GlobalArgs, LogFormat, LogLevel};
use crate::metrics::events::Errors;
use crate::sandbox::place::{self, Place};

/// Rotated files that are kept (contract 1.2).
const KEPT_FILES: usize = 10;

static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// What to log from where: the threshold, with talkative dependencies held at `warn`.
fn targets(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Trace => Level::TRACE,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Info => Level::INFO,
        LogLevel::Warn => Level::WARN,
        LogLevel::Error => Level::ERROR,
    };
    // fuse-backend-rs 0.14 converts unknown opcodes to an enum when it traces, which is
    // undefined behaviour; its info lines repeat ours.
    let quiet = level.min(Level::WARN);
    Targets::new()
        .with_default(level)
        .with_target("fuse_backend_rs", quiet)
        .with_target("hyper", quiet)
        .with_target("hyper_util", quiet)
        .with_target("reqwest", quiet)
        .with_target("rustls", quiet)
        .with_target("h2", quiet)
        .with_target("mio", quiet)
        .with_target("opendal", quiet)
        .with_target(SHOWS_SECRETS, LevelFilter::OFF)
}

/// Sets up the log as the command line asks. Called once.
///
/// # Errors
/// The log file can not be opened for appending.
pub fn init(args: &GlobalArgs) -> anyhow::Result<()> {
    let (filter, handle) = reload::Layer::new(targets(args.log_level));
    // A second call (several daemons in one test process) keeps the first log.
    let _ = FILTER.set(handle);
    match &args.log_file {
        None => install(filter, args.log_format, io::stderr().is_terminal(), io::stderr),
        Some(path) => {
            let path = with_extension(path);
            let file = LogFile::open(&path, args.log_rotation_size)
                .with_context(|| format!("log file {}", path.display()))?;
            install(filter, args.log_format, false, Arc::new(SharedLog(Mutex::new(file))))
        }
    }
}

/// The same for a process beside the one that owns the log file, which seldom has anything to say: the file is opened
/// for each line, so that it is the right one after a rotation.
///
/// # Errors
/// None where no log was set up before.
pub fn init_occasional(args: &GlobalArgs) -> anyhow::Result<()> {
    let (filter, handle) = reload::Layer::new(targets(args.log_level));
    let _ = FILTER.set(handle);
    match &args.log_file {
        None => install(filter, args.log_format, io::stderr().is_terminal(), io::stderr),
        Some(path) => {
            let path = place::settle_parent(&with_extension(path)).context("log file")?;
            // Who may write to its directory can not have another file written to.
            let append = move || Place::fixed(path.parent()?).ok()?.append(path.file_name()?).ok();
            let open = move || -> Box<dyn io::Write> {
                match append() {
                    Some(file) => Box::new(file),
                    None => Box::new(io::sink()),
                }
            };
            install(filter, args.log_format, false, open)
        }
    }
}

/// Makes `writer` the log of this process.
fn install<W>(
    filter: reload::Layer<Targets, Registry>,
    format: LogFormat,
    colours: bool,
    writer: W,
) -> anyhow::Result<()>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let registry = Registry::default().with(filter).with(Errors);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Text => registry.with(layer.with_ansi(colours).event_format(Line)).try_init()?,
        // An object on each line: timestamp, level, message, the fields of the event, target.
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init()?,
    }
    Ok(())
}

/// Changes the threshold of the running log.
pub fn set_level(level: LogLevel) {
    if let Some(handle) = FILTER.get() {
        // The only failure is a dropped subscriber: then there is no log to change.
        let _ = handle.reload(targets(level));
    }
}

/// `.log` for a name without extension (contract 1.2).
fn with_extension(path: &Path) -> PathBuf {
    if path.extension().is_some() { path.to_owned() } else { path.with_extension("log") }
}

/// The file behind the log.
enum LogFile {
    Plain(std::fs::File),
    Rotating(Box<FileRotate<AppendTimestamp>>),
}

impl LogFile {
    fn open(path: &Path, rotation_mib: u64) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        // Opened either way: a rotating file reports no error of its own.
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
        if rotation_mib == 0 {
            return Ok(Self::Plain(file));
        }
        let limit = usize::try_from(rotation_mib.saturating_mul(1 << 20)).unwrap_or(usize::MAX);
        Ok(Self::Rotating(Box::new(FileRotate::new(
            path,
            AppendTimestamp::default(FileLimit::MaxFiles(KEPT_FILES)),
            ContentLimit::BytesSurpassed(limit),
            Compression::OnRotate(0),
            None,
        ))))
    }
}

impl io::Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.write(bytes),
            Self::Rotating(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.flush(),
            Self::Rotating(file) => file.flush(),
        }
    }
}

/// The log of all threads. Rotation asserts what others may change, such as that the directory
/// can still be made: a line is lost then, not the thread that writes it.
struct SharedLog(Mutex<LogFile>);

impl SharedLog {
    fn with<T>(&self, write: impl FnOnce(&mut LogFile) -> io::Result<T>) -> io::Result<T> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        catch_unwind(AssertUnwindSafe(|| write(&mut file)))
            .unwrap_or_else(|_| Err(io::Error::other("the log file can not be rotated")))
    }
}

impl io::Write for &SharedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.with(LogFile::flush)
    }
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Prints the contract's `Error:` line for a failed run.
pub fn print_failure(error: &anyhow::Error) {
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "Error: {error:#}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_extension_get_one() {
        assert_eq!(with_extension(Path::new("/l/nydusd")), Path::new("/l/nydusd.log"));
        assert_eq!(with_extension(Path::new("/l/nydusd.txt")), Path::new("/l/nydusd.txt"));
    }

    #[test]
    fn a_lost_log_directory_loses_lines_and_no_thread() {
        let dir = tempfile::tempdir().unwrap();
        let log = SharedLog(Mutex::new(LogFile::open(&dir.path().join("sub/nydusd.log"), 1).unwrap()));
        (&log).write_all(b"one\n").unwrap();
        // A file in its place: it can not be made again.
        std::fs::remove_dir_all(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub"), "").unwrap();
        let line = vec![b'x'; 2 << 20];
        for _ in 0..3 {
            // Lost or written to the file that is still open; either way we come back.
            let _ = (&log).write_all(&line);
        }
        std::fs::remove_file(dir.path().join("sub")).unwrap();
        (&log).write_all(b"two\n").unwrap();
    }

    #[test]
    fn a_log_rotates_by_size_and_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/nydusd.log");
        let line = vec![b'x'; 1 << 20];
        for _ in 0..2 {
            let mut file = LogFile::open(&path, 1).unwrap();
            file.write_all(&line).unwrap();
            file.write_all(b"end\n").unwrap();
            file.flush().unwrap();
        }
        let names: Vec<_> =
            std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.len() >= 2, "{names:?}");
    }
}
