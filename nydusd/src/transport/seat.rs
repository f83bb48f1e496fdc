//! The mount as the host has it: what only somebody in the host's mount namespace, and with its rights, can do to it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use fuse_backend_rs::transport::FuseSession;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use super::mounted::{self, MountIdentity};

/// Source in the mount table (contract 1.8).
pub(crate) const SOURCE: &str = "rafs";

/// How long a mount may take to say that nobody serves it: the kernel itself says so, at once.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// Where the kernel has a directory of files for each connection.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// A file that the kernel has of each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConnectionFile {
    /// Ends it.
    Abort,
    /// Has requests repeated (some kernels before 6.9).
    Resend,
    /// Has requests fail (some kernels before 6.9).
    Flush,
}

impl ConnectionFile {
    fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Resend => "resend",
            Self::Flush => "flush",
        }
    }
}

/// One FUSE mount of ours.
#[derive(Debug)]
pub(crate) struct Seat {
    mountpoint: PathBuf,
    /// Unknown without a proc file system.
    identity: Mutex<Option<MountIdentity>>,
}

impl Seat {
    /// Mounts on the directory `mountpoint`, read-only unless `writable`; with the descriptor of the connection,
    /// of which nothing stays here.
    ///
    /// # Errors
    /// Not a usable directory, a dead mount in its place, or the kernel refuses.
    pub fn mount(mountpoint: &Path, writable: bool) -> anyhow::Result<(Self, OwnedFd)> {
        let mountpoint = usable_mountpoint(mountpoint)?;
        let mut session = FuseSession::new(&mountpoint, SOURCE, "", !writable)?;
        session.mount().with_context(|| format!("mount on {}", mountpoint.display()))?;
        let identity = MountIdentity::at(&mountpoint)
            .inspect_err(|e| tracing::warn!("the mount on {} has no identity: {e}", mountpoint.display()))
            .ok();
        let file = session.get_fuse_file().context("the FUSE session has no descriptor")?;
        let descriptor = OwnedFd::from(file.try_clone().context("duplicate the FUSE descriptor")?);
        // Its own descriptor would keep the connection alive after the daemon, and its drop would unmount.
        session.set_fuse_file(File::open("/dev/null").context("open /dev/null")?);
        std::mem::forget(session);
        Ok((Self { mountpoint, identity: Mutex::new(identity) }, descriptor))
    }

    /// Goes on with the mount on `mountpoint` of connection `number`. Asks nothing of it.
    ///
    /// # Errors
    /// Another connection's mount is there, or none.
    pub fn inherit(mountpoint: &Path, number: u64) -> anyhow::Result<Self> {
        let context = || format!("take over the mount on {}", mountpoint.display());
        let mountpoint = mounted::resolve(mountpoint).with_context(context)?;
        let identity = MountIdentity::at(&mountpoint).with_context(context)?;
        if identity.connection() != Some(number) {
            bail!(
                "the saved state is of FUSE connection {number}, but {} is not its mount; give the \
                 --mountpoint of the daemon that saved it",
                mountpoint.display()
            );
        }
        Ok(Self { mountpoint, identity: Mutex::new(Some(identity)) })
    }

    /// The canonical mountpoint.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The kernel's number of the connection, if it is known.
    pub fn number(&self) -> Option<u64> {
        self.identity().as_ref().and_then(MountIdentity::connection)
    }

    fn identity(&self) -> Option<MountIdentity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has `cover` put an overlay in its place, which is then what will be unmounted. It is told the mountpoint,
    /// and what the mount table has to name as the overlay's source.
    ///
    /// # Errors
    /// Those of `cover`; the overlay is not there.
    pub fn cover(&self, cover: impl FnOnce(&Path, &str) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let number =
            self.number().with_context(|| format!("{} has no identity", self.mountpoint.display()))?;
        cover(&self.mountpoint, &mounted::covering(SOURCE, number))?;
        let there = MountIdentity::at(&self.mountpoint).context("look for the overlay")?;
        if !there.is_cover() || there.connection() != Some(number) {
            bail!(
                "the overlay is not on {}; something else was mounted meanwhile",
                self.mountpoint.display()
            );
        }
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Some(there);
        Ok(())
    }

    /// Takes the mount, and no other, out of the tree at once, whoever still uses it. One that is gone already is
    /// fine. `ended` says that its connection has.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unmount(&self, ended: bool) -> anyhow::Result<()> {
        let path = &self.mountpoint;
        let ours = self.identity();
        match &ours {
            Some(ours) if ours.wait_gone(Duration::ZERO)? => return Ok(()),
            Some(ours) if MountIdentity::at(path)? != *ours => {
                bail!("another mount covers it; unmount both by hand")
            }
            _ => {}
        }
        // The numbers of a mount that is gone may be a successor's: that one answers.
        let is_cover = ours.is_some_and(|ours| ours.is_cover());
        if ended && !is_cover && nix::sys::statvfs::statvfs(path) != Err(Errno::ENOTCONN) {
            return Ok(());
        }
        match mounted::detach(path) {
            // Somebody else was faster.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Ends the connection, and with it whatever waits for its answers.
    pub fn abort(&self) {
        let ours = self.identity().zip(MountIdentity::at(&self.mountpoint).ok());
        if ours.is_some_and(|(ours, there)| ours == there) {
            // A mount that is gone already has no connection to end.
            let _ = umount2(&self.mountpoint, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
    }

    /// Opens one of the kernel's files of this connection to be written, while the mount is there: the
    /// number of one that is gone may be another's. What is open stays ours.
    ///
    /// # Errors
    /// There is no such file, or no mount.
    pub fn connection_file(&self, file: ConnectionFile) -> io::Result<File> {
        let number = self.number().ok_or_else(|| io::Error::other("the mount has no identity"))?;
        let file = File::options().write(true).open(format!("{CONNECTIONS}/{number}/{}", file.name()))?;
        match self.identity() {
            Some(ours) if !ours.wait_gone(Duration::ZERO)? => Ok(file),
            _ => Err(io::Error::other("the mount is gone")),
        }
    }

    /// True if it is gone within `limit`, or nobody can tell.
    pub fn is_gone_within(&self, limit: Duration) -> bool {
        self.identity().is_none_or(|identity| identity.wait_gone(limit).unwrap_or(true))
    }
}

/// Canonical path of a directory to mount on.
///
/// # Errors
/// Not a directory, the mount of another daemon, or the dead mount of one that is gone. The kernel
/// may answer a stat of a dead mount from its cache, but never a statfs.
pub(crate) fn usable_mountpoint(path: &Path) -> anyhow::Result<PathBuf> {
    let probe = || -> io::Result<(bool, PathBuf)> {
        let real = path.canonicalize()?;
        nix::sys::statvfs::statvfs(&real)?;
        Ok((std::fs::metadata(&real)?.is_dir(), real))
    };
    match probe() {
        Ok((true, real)) if MountIdentity::is_fuse_of(&real, SOURCE).unwrap_or(false) => match is_dead(&real)
        {
            true => bail!(
                "the mountpoint {0} holds the overlay of a daemon that is gone; remove it with `umount -l {0}`: what \
                 was changed is kept in `overlay.upper_dir`",
                path.display()
            ),
            false => bail!(
                "the mountpoint {0} is served by another nydusd; unmount it first with `umount {0}`, or take another directory",
                path.display()
            ),
        },
        Ok((true, real)) => Ok(real),
        Ok((false, real)) => bail!("the mountpoint {} is not a directory", real.display()),
        Err(e) if e.raw_os_error() == Some(Errno::ENOTCONN as i32) => bail!(
            "the mountpoint {0} holds the dead mount of a daemon that is gone; remove it with `umount -l {0}`",
            path.display()
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            bail!("the mountpoint {0} does not exist; make it with `mkdir -p {0}`", path.display())
        }
        Err(e) => Err(e).with_context(|| format!("the mountpoint {} can not be used", path.display())),
    }
}

/// True if what is mounted on `path`, which is the root of a mount of ours, has nobody who serves it. An overlay
/// answers from what it covers no more than names that nobody has asked for. Somebody who takes requests and does not
/// answer keeps a thread waiting, and is no dead one.
fn is_dead(path: &Path) -> bool {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let name = format!(".nydusd-{}-{}", std::process::id(), now.as_nanos());
    let probed = path.join(name);
    let (answer, answered) = mpsc::channel();
    let probe = move || {
        let found = probed.symlink_metadata();
        // Nobody listens any more if it came late.
        let _ = answer.send(found.is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN)));
    };
    let started = std::thread::Builder::new().name("probe".to_owned()).spawn(probe);
    started.is_ok() && answered.recv_timeout(PROBE_LIMIT).unwrap_or(false)
}
