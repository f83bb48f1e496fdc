//! A daemon of the test's own: started, waited for, and gone with its mount however the test ends.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest wait for anything that must happen soon.
pub const PROMPT: Duration = Duration::from_secs(20);

/// True if mounts can be made here; otherwise says why the test is skipped.
pub fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

/// A golden file.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(path)
}

/// Directories of one test: mount point, blobs, cache, socket.
pub struct Site {
    dir: tempfile::TempDir,
    pub bootstrap: PathBuf,
}

impl Site {
    /// With the golden `bootstrap` and the blob files of its blobs, in the order of its blob table.
    pub fn new(bootstrap: &str, blobs: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["mount", "blobs", "cache"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let bootstrap = golden(bootstrap);
        let put = |file: &str, name: &str| {
            std::fs::copy(golden(file), dir.path().join("blobs").join(name)).unwrap();
        };
        let image = rafs::bootstrap::open(&bootstrap, &rafs::bootstrap::OpenOptions::default()).unwrap();
        assert_eq!(image.blobs().len(), blobs.len());
        for (blob, file) in image.blobs().iter().zip(blobs) {
            put(file, blob.id.as_str());
            if let Some(context) = &blob.context_id {
                put("zran/rafs.blob", context.as_str());
            }
        }
        let site = Self { dir, bootstrap };
        site.configure("");
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn mount(&self) -> PathBuf {
        self.path("mount")
    }

    /// Writes the configuration, with `rafs` in its `[rafs]` section.
    pub fn configure(&self, rafs: &str) {
        let text = format!(
            "version = 2\nid = 'test'\n[backend]\ntype = 'localfs'\nlocalfs = {{ dir = {:?} }}\n\
             [cache]\ntype = 'filecache'\nfilecache = {{ work_dir = {:?} }}\n[rafs]\n{rafs}\n",
            self.path("blobs"),
            self.path("cache")
        );
        std::fs::write(self.path("config.toml"), text).unwrap();
    }

    /// The daemon's command line, `extra` behind the usual arguments.
    pub fn command(&self, extra: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
        command.arg("fuse").arg("--config").arg(self.path("config.toml"));
        command.arg("--bootstrap").arg(&self.bootstrap).arg("--mountpoint").arg(self.mount());
        command.arg("--apisock").arg(self.path("api.sock")).args(extra);
        command.env_remove("IMAGE_PULL_AUTH").stdin(Stdio::null());
        command
    }

    /// Starts the daemon and waits until its API answers.
    pub fn start(&self, extra: &[&str]) -> Daemon {
        let mut child = self.command(extra).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("nydusd: {line}");
                let _ = sender.send(line);
            }
        });
        let daemon = Daemon { child, lines, mount: self.mount(), socket: self.path("api.sock") };
        daemon.wait_for_line("API on ");
        daemon
    }

    /// True while the kernel has a mount on the mount point.
    pub fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = self.mount().canonicalize().unwrap_or_else(|_| self.mount());
        mounts.lines().any(|line| line.split(' ').nth(1) == mount.to_str())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // What a test leaves mounted on purpose.
        let _ = nix::mount::umount2(&self.mount(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A running daemon.
pub struct Daemon {
    child: Child,
    lines: Receiver<String>,
    mount: PathBuf,
    pub socket: PathBuf,
}

impl Daemon {
    /// The first line of the log from here on that contains `text`.
    pub fn wait_for_line(&self, text: &str) -> String {
        loop {
            match self.lines.recv_timeout(PROMPT) {
                Ok(line) if line.contains(text) => return line,
                Ok(_) => {}
                Err(e) => panic!("no line with {text:?}: {e}"),
            }
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        // The log ends with the process.
        loop {
            match self.lines.recv_timeout(PROMPT) {
                Ok(_) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
                Err(e) => panic!("the daemon does not end: {e}"),
            }
        }
    }

    /// Status and body of one API request.
    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PROMPT)).unwrap();
        let len = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// The document at `path`.
    pub fn get(&self, path: &str) -> serde_json::Value {
        let (status, body) = self.request("GET", path, "");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = nix::mount::umount2(&self.mount, nix::mount::MntFlags::MNT_DETACH);
    }
}
