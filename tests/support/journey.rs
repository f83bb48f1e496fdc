//! The steps that journeys share: an image, converted, perhaps pushed, beside its reference tree.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::binaries;
use crate::command::{Finished, finish, run};
use crate::image::Image;
use crate::layout::Layout;
use crate::reference;

/// An image as OCI layout, in a scratch directory that goes with it.
#[derive(Debug)]
pub struct Journey {
    scratch: TempDir,
    /// The OCI image.
    pub source: Layout,
}

impl Journey {
    /// Writes `image` into a new scratch directory.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn start(image: &Image) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let source = Layout::new(scratch.path().join("source"));
        image.write_layout(source.path())?;
        Ok(Self { scratch, source })
    }

    /// The scratch directory.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Converts into an OCI layout called `name` in the scratch directory.
    ///
    /// # Errors
    /// `nydus-image convert` fails.
    pub fn convert(&self, name: &str, flags: &[&str]) -> Result<Layout> {
        let layout = Layout::new(self.path(name));
        convert(&self.source.reference(), &layout.reference(), flags)?;
        Ok(layout)
    }

    /// Unpacks the source with umoci; the root of the tree.
    ///
    /// # Errors
    /// umoci fails.
    pub fn reference(&self) -> Result<PathBuf> {
        reference::unpack(&self.source, self.scratch())
    }
}

/// `nydus-image convert SOURCE TARGET FLAGS`. Each chunk is stored alone unless FLAGS have a `--batch-size`:
/// what a daemon fetches of small files can be counted then.
///
/// # Errors
/// It fails.
pub fn convert(source: &str, target: &str, flags: &[&str]) -> Result<()> {
    let alone: &[&str] = if flags.contains(&"--batch-size") { &[] } else { &["--batch-size", "0"] };
    run(&mut nydus_image("convert", [&[source, target], alone, flags].concat()))
        .map(drop)
        .with_context(|| format!("convert {source} to {target}"))
}

/// `nydus-image COMMAND ARGUMENTS`, not started yet.
pub fn nydus_image<S: AsRef<OsStr>>(command: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut program = Command::new(binaries::nydus_image());
    program.arg(command).args(arguments);
    program
}

/// Runs `nydus-image` to whatever end.
///
/// # Errors
/// It cannot be started.
pub fn try_nydus_image<S: AsRef<OsStr>>(
    command: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<Finished> {
    finish(&mut nydus_image(command, arguments))
}

/// Runs `work` on a thread and fails if it is not done within `limit`. The thread is left behind:
/// it may hang in a system call, which is the very fault that this finds.
///
/// # Errors
/// Too late, or what `work` answers.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(limit) {
        Ok(result) => result.with_context(|| what.to_owned()),
        Err(_) => bail!("{what} took longer than {limit:?}"),
    }
}
