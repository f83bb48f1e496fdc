//! A daemon that is the device of a virtual machine.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::monitor::PATIENCE;
use crate::successor::Process;

/// A daemon with its sockets. Dropped, it is killed.
#[derive(Debug)]
pub struct Device {
    // Dropped before the directory.
    process: Process,
    service: String,
    arguments: Vec<String>,
    directory: TempDir,
}

impl Device {
    /// Starts `nydusd SERVICE` with `arguments`, and waits until it serves.
    ///
    /// # Errors
    /// It does not.
    pub fn start<S: AsRef<str>>(service: &str, arguments: &[S]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let arguments: Vec<String> = arguments.iter().map(|text| text.as_ref().to_owned()).collect();
        let mut process = run(service, &arguments, directory.path())?;
        process.wait_state("RUNNING", &["INIT", "READY"])?;
        Ok(Self { process, service: service.to_owned(), arguments, directory })
    }

    /// The same command once more, after the process was killed.
    ///
    /// # Errors
    /// It does not serve.
    pub fn restart(&mut self) -> Result<()> {
        self.process = run(&self.service, &self.arguments, self.directory.path())?;
        self.process.wait_state("RUNNING", &["INIT", "READY"])
    }

    /// The socket that monitors connect to.
    pub fn socket(&self) -> PathBuf {
        socket(self.directory.path())
    }

    /// The process and its API.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Waits until the log has `count` lines with `text`.
    ///
    /// # Errors
    /// They do not come.
    pub fn wait_for_log(&self, text: &str, count: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.log().matches(text).count() < count {
            ensure!(Instant::now() < deadline, "no {text:?} for the {count}. time in:\n{}", self.log());
            // A file that grows can only be looked at.
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait()
    }

    /// Ends it with a signal, and waits for that.
    ///
    /// # Errors
    /// It does not end.
    pub fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        self.process.signal(signal)?;
        self.process.wait()
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("device.sock")
}

fn run(service: &str, arguments: &[String], directory: &Path) -> Result<Process> {
    let socket = socket(directory);
    let fixed = [OsStr::new(service), OsStr::new("--sock"), socket.as_os_str()];
    let all = fixed.into_iter().chain(arguments.iter().map(OsStr::new));
    Process::start(all, directory.join("api.sock"), directory.join("log"))
}
