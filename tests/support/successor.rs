//! Daemons that take one mount over from each other, and the supervisor between them.
//!
//! Whoever holds a FUSE connection's descriptor and waits for its mount can not be killed once
//! nobody serves it. So the supervisor is another process, `supervisor.py`, and a [`Place`] ends
//! its connection before anything waits for it.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::binaries;
use crate::mount::{Mount, abort};

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Seconds after which a supervisor ends whatever happens: longer than any test here.
const LIFE: &str = "300";

/// A mount point whose daemons come and go. Dropped, its connection is ended and it is unmounted.
#[derive(Debug)]
pub struct Place {
    mount: Mount,
    directory: TempDir,
    arguments: Vec<String>,
    wrapper: Vec<String>,
}

impl Place {
    /// For daemons with `arguments`, which say what is mounted.
    ///
    /// # Errors
    /// No directory can be made.
    pub fn new<S: AsRef<str>>(arguments: &[S]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mountpoint = directory.path().canonicalize()?.join("mount");
        fs::create_dir(&mountpoint)?;
        let arguments = arguments.iter().map(|text| text.as_ref().to_owned()).collect();
        Ok(Self { mount: Mount::guard(mountpoint), directory, arguments, wrapper: Vec::new() })
    }

    /// The same with daemons that this program starts, which is given their command line.
    pub fn through(mut self, program: &[&str]) -> Self {
        self.wrapper = program.iter().map(|text| (*text).to_owned()).collect();
        self
    }

    /// The root of the mounted tree.
    pub fn root(&self) -> &Path {
        self.mount.path()
    }

    /// A path beside the mount point.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts `nydusd fuse` with its API at `socket` and `more` arguments; does not wait for it.
    ///
    /// # Errors
    /// It can not be started.
    pub fn start(&self, socket: &str, more: &[&str]) -> Result<Process> {
        self.run(&["fuse"], socket, more)
    }

    /// The same as the child of `nydusd supervise`.
    ///
    /// # Errors
    /// It can not be started.
    pub fn supervise(&self, socket: &str) -> Result<Process> {
        self.run(&["supervise", "--", "fuse"], socket, &[])
    }

    fn run(&self, service: &[&str], socket: &str, more: &[&str]) -> Result<Process> {
        let (socket, log) = (self.path(socket), self.path("log"));
        let out = fs::File::options().create(true).append(true).open(&log)?;
        let program = self.wrapper.iter().map(AsRef::as_ref).chain([binaries::nydusd().as_os_str()]);
        let program: Vec<&OsStr> = program.collect();
        let child = Command::new(program[0])
            .args(&program[1..])
            .args(service)
            .args(&self.arguments)
            .arg("--mountpoint")
            .arg(self.root())
            .arg("--apisock")
            .arg(&socket)
            .args(more)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("start nydusd")?;
        Ok(Process { child, socket, log })
    }

    /// What all daemons logged so far.
    pub fn log(&self) -> String {
        read(&self.path("log"))
    }

    /// Children of `nydusd supervise` so far.
    pub fn children(&self) -> Vec<i32> {
        let log = self.log();
        let numbers =
            log.lines().filter_map(|line| line.rsplit_once("nydusd is process ")?.1.trim().parse().ok());
        numbers.collect()
    }

    /// Waits for the child number `count` of `nydusd supervise`.
    ///
    /// # Errors
    /// None comes in time.
    pub fn wait_child(&self, count: usize) -> Result<Pid> {
        wait("another child", || Ok(self.children().get(count - 1).map(|pid| Pid::from_raw(*pid))))
            .with_context(|| self.log())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whoever still waits for it must not wait for ever. It is usually gone by now.
        let _ = abort(self.root());
    }
}

fn read(log: &Path) -> String {
    fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// Asks until there is an answer; a condition of another process can only be looked at.
fn wait<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// One process on a [`Place`]. Dropped, it is killed; the mount stays.
#[derive(Debug)]
pub struct Process {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts `nydusd` with `arguments`, its API at `socket`, and its log going to the end of `log`; does not wait for it.
    ///
    /// # Errors
    /// It can not be started.
    pub fn start<S: AsRef<OsStr>>(
        arguments: impl IntoIterator<Item = S>,
        socket: PathBuf,
        log: PathBuf,
    ) -> Result<Self> {
        let out = fs::File::options().create(true).append(true).open(&log)?;
        let child = Command::new(binaries::nydusd())
            .args(arguments)
            .arg("--apisock")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("start nydusd")?;
        Ok(Self { child, socket, log })
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Its API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A connection that says nothing, as clients keep one to see the daemon end.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn watch(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Status and body of the answer to a request as Go clients send it.
    ///
    /// # Errors
    /// No connection, or no HTTP.
    pub fn send(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        let mut stream = self.watch()?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        Ok((head.split(' ').nth(1).context("no status")?.parse()?, body.to_owned()))
    }

    /// Sends `PUT path` and expects 204.
    ///
    /// # Errors
    /// Another answer.
    pub fn put(&self, path: &str) -> Result<()> {
        self.expect("PUT", path, "", 204, "").with_context(|| read(&self.log))
    }

    /// Sends a request and expects this status and, to the byte, this body.
    ///
    /// # Errors
    /// Another answer.
    pub fn expect(&self, method: &str, path: &str, body: &str, status: u16, answer: &str) -> Result<()> {
        let found = self.send(method, path, body)?;
        ensure!(found == (status, answer.to_owned()), "{method} {path}: {found:?} for {status} {answer}");
        Ok(())
    }

    /// The state as the API names it; `None` while it does not answer.
    pub fn state(&self) -> Option<String> {
        let (_, body) = self.send("GET", "/api/v1/daemon", "").ok()?;
        Some(body.split_once("\"state\":\"")?.1.split('"').next()?.to_owned())
    }

    /// Polls until the state is `wanted`. Each other one on the way must be in `before`.
    ///
    /// # Errors
    /// It does not come to that, or ends.
    pub fn wait_state(&mut self, wanted: &str, before: &[&str]) -> Result<()> {
        wait(wanted, || {
            if let Some(status) = self.child.try_wait()? {
                bail!("nydusd ended ({status}) before it was {wanted}");
            }
            match self.state() {
                Some(state) if state == wanted => Ok(Some(())),
                Some(state) if !before.contains(&state.as_str()) => bail!("{state} on the way to {wanted}"),
                _ => Ok(None),
            }
        })
        .with_context(|| read(&self.log))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Waits for its end, and reaps it.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        wait("the end of nydusd", || Ok(self.child.try_wait()?)).with_context(|| read(&self.log))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The supervisor: holds what one daemon saved, and gives it to others as often as they ask.
#[derive(Debug)]
pub struct Supervisor {
    child: Child,
    socket: PathBuf,
    pipes: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Supervisor {
    /// At `socket`, where nobody listens but during an exchange.
    ///
    /// # Errors
    /// Python can not be started.
    pub fn new(socket: PathBuf) -> Result<Self> {
        let mut child = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/support/supervisor.py"))
            .arg(&socket)
            .arg(LIFE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start python3")?;
        let pipes = child.stdin.take().zip(child.stdout.take()).context("pipes")?;
        Ok(Self { child, socket, pipes: RefCell::new((pipes.0, BufReader::new(pipes.1))) })
    }

    /// What goes on the daemon's command line.
    pub fn arguments(&self) -> [String; 4] {
        ["--id", "d1", "--supervisor", &self.socket.to_string_lossy()].map(str::to_owned)
    }

    /// One exchange of the kind `command`, which `ask` has a daemon come for.
    fn exchange<T>(&self, command: &str, ask: impl FnOnce() -> Result<T>) -> Result<(T, String)> {
        let (input, output) = &mut *self.pipes.borrow_mut();
        let mut line = || {
            let mut line = String::new();
            output.read_line(&mut line)?;
            anyhow::Ok(line.trim_end().to_owned())
        };
        writeln!(input, "{command}")?;
        ensure!(line()? == "listening", "the supervisor does not listen");
        let asked = ask()?;
        Ok((asked, line()?))
    }

    /// Has `daemon` save; how many bytes came.
    ///
    /// # Errors
    /// It does not, or not with one descriptor.
    pub fn save(&self, daemon: &Process) -> Result<usize> {
        let ((), answer) = self.exchange("save", || daemon.put("/api/v1/daemon/fuse/sendfd"))?;
        let words: Vec<&str> = answer.split(' ').collect();
        match words[..] {
            ["saved", bytes, "1"] => Ok(bytes.parse()?),
            _ => bail!("the supervisor: {answer}"),
        }
    }

    /// Has `daemon` take over; status and body of its answer.
    ///
    /// # Errors
    /// It does not come for it.
    pub fn restore(&self, daemon: &Process) -> Result<(u16, String)> {
        self.give("restore", daemon)
    }

    /// The same with other bytes, `with` the descriptor or without.
    ///
    /// # Errors
    /// It does not come for it.
    pub fn offer(&self, daemon: &Process, bytes: &[u8], with: bool) -> Result<(u16, String)> {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.give(&format!("{} {hex}", if with { "offer" } else { "bare" }), daemon)
    }

    /// The bytes that it holds.
    ///
    /// # Errors
    /// It does not answer.
    pub fn state(&self) -> Result<Vec<u8>> {
        let (input, output) = &mut *self.pipes.borrow_mut();
        writeln!(input, "show")?;
        let mut line = String::new();
        output.read_line(&mut line)?;
        let digits = line.trim_end().as_bytes().chunks(2);
        digits.map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?)).collect()
    }

    fn give(&self, command: &str, daemon: &Process) -> Result<(u16, String)> {
        let ask = || daemon.send("PUT", "/api/v1/daemon/fuse/takeover", "");
        let (answer, said) = self.exchange(command, ask)?;
        ensure!(said == "restored", "the supervisor: {said}");
        Ok(answer)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
