//! The sockets that the daemon listens on: made, looked at and removed where its command line says, and nowhere else.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::place::Place;
use crate::process;

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Socket {
    /// Clients' HTTP API.
    Api,
    /// Where a virtual machine monitor finds a device: the first one at the path that the command line says, others
    /// beside it, at that path with a dot and their number.
    Device(u16),
}

impl Socket {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "API socket",
            Self::Device(_) => "vhost-user socket",
        }
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Sockets {
    api: Arc<Listening>,
    /// Of the first device.
    device: Option<PathBuf>,
    /// Those that were asked for.
    devices: Mutex<BTreeMap<u16, Arc<Listening>>>,
}

impl Sockets {
    /// Where these paths say: absolute ones, whose directories have no links.
    pub fn new(api: Option<PathBuf>, device: Option<PathBuf>) -> Self {
        let api = Arc::new(Listening::new(Socket::Api, api));
        Self { api, device, devices: Mutex::default() }
    }

    /// The place of a socket.
    pub fn get(&self, socket: Socket) -> Arc<Listening> {
        let Socket::Device(number) = socket else { return Arc::clone(&self.api) };
        let path = self.device.clone().map(|path| match number {
            0 => path,
            _ => {
                let mut path = path.into_os_string();
                path.push(format!(".{number}"));
                path.into()
            }
        });
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(devices.entry(number).or_insert_with(|| Arc::new(Listening::new(socket, path))))
    }
}

/// The place of one socket.
#[derive(Debug)]
pub(super) struct Listening {
    socket: Socket,
    /// An absolute path whose directory has no links.
    path: Option<PathBuf>,
    /// Device and inode of the socket's file: a successor's at the same path is not ours to remove.
    made: Mutex<Option<(u64, u64)>>,
}

impl Listening {
    fn new(socket: Socket, path: Option<PathBuf>) -> Self {
        Self { socket, path, made: Mutex::default() }
    }

    /// The directory where the socket belongs, and its name there.
    fn place<'a>(&self, path: &'a Path) -> anyhow::Result<(Place, &'a OsStr)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("it is no name of a file")
        };
        let directory = Place::fixed(parent).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => anyhow::anyhow!(
                "there is no directory {0}; make it (`mkdir -p {0}`), or name another path",
                parent.display()
            ),
            _ => e.into(),
        });
        Ok((directory?, name))
    }

    /// A live daemon's socket is not ours to take, nor is a file that is no socket. True if there is one.
    pub fn check(&self) -> anyhow::Result<bool> {
        let Some(path) = &self.path else { return Ok(false) };
        let what = self.socket.name();
        // What can not be looked at can not be bound either, and that says why.
        let Ok((directory, name)) = self.place(path) else { return Ok(false) };
        let Ok(found) = directory.look(name) else { return Ok(false) };
        if !found.metadata()?.file_type().is_socket() {
            bail!("the {what} {} exists and is no socket; name another path", path.display())
        }
        if is_answered(&found) {
            bail!("another daemon answers on the {what} {}; stop it first", path.display())
        }
        Ok(true)
    }

    /// Binds the socket, for this user alone from the first moment on: the mode of the descriptor
    /// becomes that of the file. The process's umask is left alone, for other threads make files.
    pub fn bind(&self) -> anyhow::Result<OwnedFd> {
        let what = self.socket.name();
        let path = self.path.as_deref().with_context(|| format!("this daemon has no {what}"))?;
        let context = || format!("{what} {}", path.display());
        let (directory, name) = self.place(path).with_context(context)?;
        match directory.look(name).and_then(|found| found.metadata()) {
            Ok(found) if !found.file_type().is_socket() => {
                bail!("the {what} {} exists and is no socket; name another path", path.display())
            }
            Ok(_) => directory.remove(name).with_context(context)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(context),
        }
        let bound = || -> io::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
            bind(socket.as_raw_fd(), &UnixAddr::new(&directory.link().join(name))?)?;
            Ok(socket)
        };
        let socket = bound().with_context(context)?;
        let made = directory.look(name).and_then(|made| made.metadata()).with_context(context)?;
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some((made.dev(), made.ino()));
        Ok(socket)
    }

    /// Removes the socket's file, if it is still the one that was made.
    pub fn remove(&self) -> anyhow::Result<()> {
        let ours = *self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(path), Some(ours)) = (&self.path, ours) else { return Ok(()) };
        let (directory, name) = self.place(path)?;
        let found = directory.look(name)?.metadata()?;
        if (found.dev(), found.ino()) == ours {
            directory.remove(name)?;
        }
        Ok(())
    }
}

/// True if whoever listens on a socket may still answer. A daemon that was killed can be kept from going away by
/// a thread that waits in the kernel, and its socket with it.
fn is_answered(place: &Place) -> bool {
    let dial = || -> nix::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(stream.as_raw_fd(), &UnixAddr::new(&place.link())?)?;
        Ok(stream)
    };
    let stream = match dial() {
        Ok(stream) => stream,
        // Too many wait for one that listens but does not accept now.
        Err(e) => return e == Errno::EAGAIN,
    };
    let listener = getsockopt(&stream, sockopt::PeerCredentials).map(|peer| peer.pid());
    // Processes outside of our namespace have number 0.
    !listener.is_ok_and(|pid| pid > 0 && process::has_ended(Pid::from_raw(pid)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{Backlog, listen};

    use super::*;

    #[test]
    fn who_listens_is_asked_without_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let place = Place::find(&path).unwrap();
        // One more than has room: the last one is not even queued.
        let asked: Vec<_> = (0..3).map(|_| is_answered(&place)).collect();
        assert_eq!(asked, [true; 3]);
        drop(listener);
        assert!(!is_answered(&place));
    }
}
