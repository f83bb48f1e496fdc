//! One `nydusd` with its mount point, API socket and log; nothing of it survives the test.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::binaries;
use crate::mount::{Mount, mounted};

/// How long a daemon may take to be ready, or to end, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lines of the log that a failed test shows.
const LOG_TAIL: usize = 60;

/// How to start a daemon: the flags of `nydusd fuse` beyond mount point, API socket and log.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    launcher: Vec<OsString>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl DaemonOptions {
    /// Serves `--image REFERENCE` with its cache in `cache`.
    pub fn image(reference: &str, cache: &Path) -> Self {
        Self::empty().flag("--image", reference).flag("--cache-dir", cache)
    }

    /// Serves a bootstrap with a configuration file.
    pub fn bootstrap(bootstrap: &Path, config: &Path) -> Self {
        Self::empty().flag("--bootstrap", bootstrap).flag("--config", config)
    }

    /// Serves nothing until the API says what to mount.
    pub fn empty() -> Self {
        Self { launcher: Vec::new(), arguments: Vec::new(), environment: Vec::new() }
    }

    /// The same with one more flag and its value.
    pub fn flag(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.arguments.extend([name.into(), value.into()]);
        self
    }

    /// The same with one more flag that takes no value.
    pub fn switch(mut self, name: &str) -> Self {
        self.arguments.push(name.into());
        self
    }

    /// The same with one more environment variable.
    pub fn environment(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The same started by a command that ends in executing what its last arguments say.
    pub fn through(mut self, launcher: &[&str]) -> Self {
        self.launcher = launcher.iter().map(OsString::from).collect();
        self
    }

    /// Starts the daemon and waits until it serves.
    ///
    /// # Errors
    /// It ended, or did not become ready in time; its log is in the message.
    pub fn start(&self) -> Result<Daemon> {
        let mut daemon = self.spawn()?;
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Starts a daemon that must refuse to serve; returns its exit code and log.
    ///
    /// # Errors
    /// It became ready, or neither ended nor became ready in time.
    pub fn refused(&self) -> Result<(Option<i32>, String)> {
        let mut daemon = self.spawn()?;
        let status = daemon.wait_ended()?;
        Ok((status.code(), daemon.log()))
    }

    fn spawn(&self) -> Result<Daemon> {
        let directory = tempfile::tempdir()?;
        let mountpoint = directory.path().join("mount");
        fs::create_dir(&mountpoint)?;
        let log = fs::File::create(directory.path().join("log"))?;
        let socket = directory.path().join("api.sock");
        let mut words = self.launcher.iter().cloned().chain([binaries::nydusd().into()]);
        let child = Command::new(words.next().context("nothing to start")?)
            .args(words)
            .arg("fuse")
            .arg("--mountpoint")
            .arg(&mountpoint)
            .arg("--apisock")
            .arg(&socket)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start nydusd")?;
        Ok(Daemon { child, mount: Mount::guard(mountpoint), socket, directory, ended: None })
    }
}

/// A running daemon. Dropped, it is killed and its mount point unmounted.
#[derive(Debug)]
pub struct Daemon {
    // Dropped in this order: the child is killed in `drop`, then the mount goes, then the directory.
    child: Child,
    mount: Mount,
    socket: PathBuf,
    directory: TempDir,
    ended: Option<ExitStatus>,
}

impl Daemon {
    /// The root of the mounted tree.
    pub fn root(&self) -> &Path {
        self.mount.path()
    }

    /// The API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read(self.directory.path().join("log"))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Waits for a line of the log that contains `text`.
    ///
    /// # Errors
    /// None comes in time.
    pub fn wait_for_log(&self, text: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.log().lines().find(|line| line.contains(text)) {
                return Ok(line.to_owned());
            }
            ensure!(Instant::now() < deadline, "no {text:?} within {PATIENCE:?} in:\n{}", self.log());
            // A file that grows can only be looked at.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Stops it until it gets SIGCONT: when this returns, none of its threads answers any more.
    ///
    /// # Errors
    /// It has ended.
    pub fn freeze(&self) -> Result<()> {
        kill(self.pid(), Signal::SIGSTOP)?;
        waitid(Id::Pid(self.pid()), WaitPidFlag::WSTOPPED)?;
        Ok(())
    }

    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.ended = Some(status);
                bail!("nydusd ended with {status} before it served:\n{}", self.log());
            }
            let running = self.get("/api/v1/daemon").is_ok_and(|info| info["state"] == "RUNNING");
            if running && mounted(self.root()) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "nydusd is not ready within {PATIENCE:?}:\n{}", self.log());
            // Readiness is only to be asked for; there is nothing to wait on.
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the API and returns the JSON of a 200.
    ///
    /// # Errors
    /// No connection, another status, or no JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let text = String::from_utf8_lossy(&answer);
        let (head, body) = text.split_once("\r\n\r\n").context("the API answered no HTTP")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "GET {path}: {head}\n{body}");
        serde_json::from_str(body).with_context(|| format!("GET {path}: {body}"))
    }

    /// Sends `body`, unless it is null, and returns status and JSON of the answer, null if it is empty.
    ///
    /// # Errors
    /// No connection, or no HTTP.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Result<(u16, Value)> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let text = String::from_utf8_lossy(&answer);
        let (head, body) = text.split_once("\r\n\r\n").context("the API answered no HTTP")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, serde_json::from_str(body).unwrap_or(Value::Null)))
    }

    /// Asks until there is an answer.
    ///
    /// # Errors
    /// What `ask` fails with; none within 30 seconds.
    pub fn wait_until<T>(&self, what: &str, ask: impl Fn(&Self) -> Result<Option<T>>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = ask(self)? {
                return Ok(answer);
            }
            ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}\n{}", self.log());
            // The state is only to be asked for; there is nothing to wait on.
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends SIGKILL and waits for the end. The dead mount stays until [`Daemon`] is dropped.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.ended = Some(self.child.wait()?);
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        kill(self.pid(), Signal::SIGTERM)?;
        self.wait_ended()
    }

    /// Waits until the daemon ends by itself.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait_ended(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.ended = Some(status);
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "nydusd does not end within {PATIENCE:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Drops the pages that the kernel keeps of this mount, so that reads reach the daemon again.
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn drop_pages(&self, file: &Path) -> Result<()> {
        let file = fs::File::open(file)?;
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // Always printed, since an error on its way out of a test can not be seen from here. libtest
        // keeps what a test prints and shows it if the test fails.
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL)..];
        let ended = self.ended.map_or_else(|| "killed by the test's end".to_owned(), |s| s.to_string());
        eprintln!("--- nydusd on {} ({ended}), end of its log:\n{}", self.root().display(), tail.join("\n"));
    }
}
