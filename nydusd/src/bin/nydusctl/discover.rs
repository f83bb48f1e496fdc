//! Which daemons run, found by what they were started with.
//!
//! Only daemons of this user and of root are asked: whoever else answers as one could tell anything.

use std::ffi::OsString;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt::PeerCredentials,
};

/// What the names of daemons begin with.
pub const DAEMON: &str = "nydusd";

/// A daemon that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its process.
    pub pid: u32,
    /// Its user.
    pub user: u32,
    /// Its API socket, as it is reached from here.
    pub socket: PathBuf,
    /// Where it is mounted on this host, if its command line tells.
    pub mountpoint: Option<PathBuf>,
}

/// The daemon that was named, or all that run.
///
/// # Errors
/// The named one can not be reached, or none runs.
pub fn all(named: Option<&Path>) -> anyhow::Result<Vec<Found>> {
    let found = match named {
        Some(socket) => vec![reach(socket).with_context(|| format!("connect to {}", socket.display()))?],
        None => running(),
    };
    if found.is_empty() {
        bail!("no nydusd with an API socket runs here; start it with --apisock, or name its socket with -S");
    }
    Ok(found)
}

/// The socket of the daemon that was named, or of the only one that runs; says so on standard error.
///
/// # Errors
/// None runs, or several do.
pub fn one(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(socket) = named {
        return Ok(socket.to_owned());
    }
    match &all(None)?[..] {
        [only] => {
            eprintln!("nydusctl: nydusd {} at {}", only.pid, only.socket.display());
            Ok(only.socket.clone())
        }
        several => {
            let lines = several.iter().map(|found| {
                let at =
                    found.mountpoint.as_ref().map_or_else(String::new, |at| format!(" on {}", at.display()));
                format!("\n  -S {}  (process {}{at})", found.socket.display(), found.pid)
            });
            bail!("{} daemons run; name one of them:{}", several.len(), lines.collect::<String>())
        }
    }
}

/// All daemons that answer, in order of their processes.
pub fn running() -> Vec<Found> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<Found> = processes
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().iter().all(u8::is_ascii_digit))
        .filter_map(|entry| socket_of(&entry.path()))
        .filter_map(|socket| match reach(&socket) {
            Ok(found) => Some(found),
            Err(e) => {
                // One that has ended leaves its socket behind.
                if e.kind() == std::io::ErrorKind::WouldBlock {
                    eprintln!(
                        "nydusctl: the daemon at {} takes no connections; is it stopped?",
                        socket.display()
                    );
                }
                None
            }
        })
        .filter(|found| is_trusted(found.user))
        .collect();
    found.sort_by_key(|found| found.pid);
    // One that supervises another has the same command line: who answers counts.
    found.dedup_by_key(|found| found.pid);
    found
}

/// The API socket of a process, if it is a daemon of ours or of root's that has one.
fn socket_of(process: &Path) -> Option<PathBuf> {
    if !is_trusted(process.metadata().ok()?.uid()) {
        return None;
    }
    // First by its short name: a command line lies in the memory of the process, and one that stands in a
    // page fault on a stalled mount may keep that locked for ever.
    if !std::fs::read_to_string(process.join("comm")).ok()?.starts_with(DAEMON) {
        return None;
    }
    let arguments = arguments(process);
    let program = Path::new(arguments.first()?).file_name()?;
    if !program.as_bytes().starts_with(DAEMON.as_bytes()) {
        return None;
    }
    let socket = value(&arguments, "--apisock", Some('A'))?;
    // As the process sees it: from its directory, below its root.
    let absolute = match socket.is_absolute() {
        true => socket,
        false => process.join("cwd").read_link().ok()?.join(socket),
    };
    let inside = process.join("root").join(absolute.strip_prefix("/").unwrap_or(&absolute));
    let file = |path: &Path| {
        let metadata = path.metadata().ok().filter(|metadata| metadata.file_type().is_socket())?;
        Some((metadata.dev(), metadata.ino()))
    };
    // In a container the path means another file than here, where it may be that of another daemon. A daemon in a
    // jail may not see its own socket.
    match (file(&inside), file(&absolute)) {
        (Some(own), here) if here != Some(own) => Some(inside),
        (_, Some(_)) => Some(absolute),
        (_, None) => None,
    }
}

/// What each of `daemons` answers. They are asked at once: those that hang are waited for once, not one after the other.
pub fn each<T: Send>(daemons: &[Found], ask: impl Fn(&Found) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let asked: Vec<_> = daemons.iter().map(|daemon| scope.spawn(|| ask(daemon))).collect();
        asked.into_iter().map(|answer| answer.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// True for this user and root.
pub fn is_trusted(user: u32) -> bool {
    user == 0 || user == nix::unistd::geteuid().as_raw()
}

/// Who answers at `path`, and as which user: a daemon may be gone, and its socket be somebody else's.
///
/// # Errors
/// `WouldBlock`: as many wait to be answered as may. Else the system's.
fn reach(path: &Path) -> std::io::Result<Found> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    while let Err(e) = connect(stream.as_raw_fd(), &address) {
        if e != Errno::EINTR {
            return Err(e.into());
        }
    }
    let peer = getsockopt(&stream, PeerCredentials)?;
    let pid = u32::try_from(peer.pid()).unwrap_or(0);
    let process = PathBuf::from(format!("/proc/{pid}"));
    let mountpoint = value(&arguments(&process), "--mountpoint", Some('M')).and_then(|path| {
        if path.is_absolute() {
            Some(path)
        } else {
            process.join("cwd").read_link().ok().map(|cwd| cwd.join(path))
        }
    });
    Ok(Found { pid, user: peer.uid(), socket: path.to_owned(), mountpoint })
}

fn arguments(process: &Path) -> Vec<OsString> {
    let bytes = std::fs::read(process.join("cmdline")).unwrap_or_default();
    let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    if text.is_empty() {
        return Vec::new();
    }
    text.split(|byte| *byte == 0).map(|argument| OsString::from_vec(argument.to_vec())).collect()
}

/// The value of a flag, written in any of the ways that the daemon takes.
fn value(arguments: &[OsString], long: &str, short: Option<char>) -> Option<PathBuf> {
    let short = short.map(|letter| format!("-{letter}"));
    arguments.iter().enumerate().skip(1).find_map(|(at, argument)| {
        let bytes = argument.as_bytes();
        let next = || arguments.get(at + 1).map(PathBuf::from);
        let rest = |rest: &[u8]| Some(PathBuf::from(OsString::from_vec(rest.to_vec())));
        if argument == long || short.as_ref().is_some_and(|short| argument == short.as_str()) {
            return next();
        }
        if let Some(tail) = bytes.strip_prefix(long.as_bytes()) {
            return tail.strip_prefix(b"=").and_then(rest);
        }
        let tail = bytes.strip_prefix(short.as_ref()?.as_bytes())?;
        rest(tail.strip_prefix(b"=").unwrap_or(tail))
    })
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    #[test]
    fn flags_are_found_however_they_are_written() {
        for (line, socket) in [
            ("nydusd fuse --apisock /a -M /m", Some("/a")),
            ("nydusd --mountpoint /m --apisock=/a", Some("/a")),
            ("nydusd -A /a", Some("/a")),
            ("nydusd -A/a", Some("/a")),
            ("nydusd -A=/a", Some("/a")),
            ("nydusd --apisocket /a", None),
            ("nydusd fuse --apisock", None),
            ("nydusd fuse", None),
        ] {
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(value(&arguments, "--apisock", Some('A')).as_deref(), socket.map(Path::new), "{line}");
        }
    }

    #[test]
    fn a_socket_that_nobody_serves_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        assert!(all(Some(&socket)).unwrap_err().to_string().contains("connect to"));
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(all(Some(&socket)).unwrap()[0].pid, std::process::id());
        let own = nix::unistd::geteuid().as_raw();
        assert_eq!(reach(&socket).unwrap().user, own);
        assert!(is_trusted(own) && is_trusted(0) && !is_trusted(own + 4711));
    }

    #[test]
    fn nobody_waits_for_a_daemon_that_takes_no_connections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let waiting: Vec<_> = std::iter::repeat_with(|| reach(&path)).take(8).collect();
        let errors: Vec<_> = waiting.into_iter().filter_map(Result::err).collect();
        assert!(errors.iter().any(|e| e.kind() == std::io::ErrorKind::WouldBlock), "{errors:?}");
    }
}
