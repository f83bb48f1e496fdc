//! One call of `nydus-image` as a client in another language makes it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tests::command::Finished;
use tests::image::{Entry, tar_bytes};
use tests::journey::{nydus_image, within};
use tests::recipes::{noise, prose};
use tests::{Context, Result, ensure};

/// How long a call may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a call finds on its standard input.
#[derive(Clone, Copy, Debug)]
pub enum Input {
    /// Nothing: the end.
    Closed,
    /// These bytes, then the end.
    Text(&'static str),
    /// Nothing, and no end: a pipe that somebody keeps open.
    Silent,
}

/// A directory in which calls are made, with sources to build from.
pub struct Place {
    directory: Arc<tempfile::TempDir>,
}

impl Place {
    /// `src/` with some files, and the same as `layer.tar`.
    pub fn new() -> Result<Self> {
        let place = Self::empty()?;
        fs::create_dir_all(place.path("src/sub"))?;
        fs::write(place.path("src/a"), prose(1, 300_000))?;
        fs::write(place.path("src/sub/b"), noise(2, 70_000))?;
        fs::write(place.path("src/sub/c"), "c")?;
        fs::write(place.path("layer.tar"), tar_bytes(&lower())?)?;
        Ok(place)
    }

    pub fn empty() -> Result<Self> {
        Ok(Self { directory: Arc::new(tempfile::tempdir()?) })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        fs::read(self.path(name)).with_context(|| name.to_owned())
    }

    pub fn json(&self, name: &str) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.read(name)?).with_context(|| name.to_owned())
    }

    /// Names in a directory of it, sorted.
    pub fn names(&self, directory: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(directory))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    pub fn fifo(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(path)
    }

    /// Writes `bytes` into the FIFO `name` from a thread, in pieces of odd sizes.
    pub fn feed(&self, name: &str, bytes: Vec<u8>) -> Result<JoinHandle<Result<()>>> {
        let path = self.fifo(name)?;
        Ok(thread::spawn(move || {
            let mut fifo = File::options().write(true).open(path)?;
            for piece in bytes.chunks(10_007) {
                fifo.write_all(piece)?;
            }
            Ok(())
        }))
    }

    /// Reads the FIFO `name` from a thread, front to back, to the end that its writer makes.
    pub fn drain(&self, name: &str) -> Result<JoinHandle<Result<Vec<u8>>>> {
        let path = self.fifo(name)?;
        Ok(thread::spawn(move || {
            let mut bytes = Vec::new();
            File::open(path)?.read_to_end(&mut bytes)?;
            Ok(bytes)
        }))
    }

    /// Starts `nydus-image` with the words of `line`, in this directory.
    pub fn start(&self, line: &str) -> Result<Child> {
        self.spawn(&line.split_whitespace().collect::<Vec<_>>(), Input::Closed)
    }

    fn spawn(&self, words: &[&str], input: Input) -> Result<Child> {
        let mut command = match words.split_first() {
            Some((command, rest)) => nydus_image(command, rest),
            None => Command::new(tests::binaries::nydus_image()),
        };
        let stdin = if matches!(input, Input::Closed) { Stdio::null() } else { Stdio::piped() };
        command.current_dir(self.directory.path()).stdin(stdin);
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// Runs `nydus-image` with `words` to its end.
    pub fn call(&self, words: &[&str], input: Input) -> Result<Finished> {
        let mut child = self.spawn(words, input)?;
        let held = child.stdin.take();
        let held = match (held, input) {
            (Some(mut pipe), Input::Text(text)) => {
                pipe.write_all(text.as_bytes())?;
                None
            }
            (held, _) => held,
        };
        let directory = Arc::clone(&self.directory);
        let finished = within(PATIENCE, &words.join(" "), move || {
            let done = end(child);
            drop(directory);
            done
        })?;
        drop(held);
        Ok(finished)
    }

    /// The same with the words of `line`; it must end with 0 and say nothing on stderr.
    pub fn quiet(&self, line: &str, input: Input) -> Result<Finished> {
        let finished = self.call(&line.split_whitespace().collect::<Vec<_>>(), input)?;
        ensure!(finished.code == Some(0) && finished.stderr.is_empty(), "{line}: {finished:?}");
        Ok(finished)
    }
}

/// Waits for the end of a child, within a time that no call needs.
pub fn ended(child: Child) -> Result<Finished> {
    within(PATIENCE, "the end of a call", move || end(child))
}

fn end(child: Child) -> Result<Finished> {
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Finished { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// What a thread made of its FIFO.
pub fn joined<T: Send + 'static>(thread: JoinHandle<Result<T>>) -> Result<T> {
    within(PATIENCE, "the other end of a FIFO", move || {
        thread.join().map_err(|_| tests::Error::msg("the thread panicked"))?
    })
}

/// A layer to begin with.
pub fn lower() -> Vec<Entry> {
    vec![
        Entry::dir("./"),
        Entry::dir("etc"),
        Entry::file("etc/name", "lower\n"),
        Entry::file("etc/gone", prose(7, 5000)),
        Entry::dir("data"),
        Entry::file("data/noise", noise(3, (1 << 20) + 4097)),
        Entry::file("data/prose", prose(4, 2 << 20)),
        Entry::hard_link("data/again", "data/prose"),
        Entry::dir("rest"),
        Entry::file("rest/kept", noise(5, 50_000)),
        Entry::symlink("link", "data/noise"),
    ]
}

/// A layer upon [`lower`], with markers.
pub fn upper() -> Vec<Entry> {
    vec![
        Entry::dir("./"),
        Entry::dir("etc"),
        Entry::file("etc/.wh.gone", ""),
        Entry::file("etc/name", "upper\n"),
        Entry::dir("data"),
        Entry::file("data/.wh..wh..opq", ""),
        Entry::file("data/prose", prose(4, 2 << 20)),
        Entry::file("data/new", noise(9, 100_000)),
    ]
}

/// Lower and upper as one.
pub fn merged() -> Vec<Entry> {
    vec![
        Entry::dir("./"),
        Entry::dir("etc"),
        Entry::file("etc/name", "upper\n"),
        Entry::dir("data"),
        Entry::file("data/prose", prose(4, 2 << 20)),
        Entry::file("data/new", noise(9, 100_000)),
        Entry::dir("rest"),
        Entry::file("rest/kept", noise(5, 50_000)),
        Entry::dir("rest"),
        Entry::file("rest/kept", noise(5, 50_000)),
        Entry::symlink("link", "data/noise"),
    ]
}

/// The file as a word of a command line.
pub fn word(path: &Path) -> String {
    path.display().to_string()
}
