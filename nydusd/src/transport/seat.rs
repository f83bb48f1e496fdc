//! The mount as the host has it: what only somebody in the host's mount namespace, and with its rights, can do to it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use fuse_backend_rs::transport::FuseSession;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{getgid, getuid};
use serde::{Deserialize, Serialize};

use super::control;
use super::mounted::{self, MountIdentity};
use crate::passthrough::{Device, device_of};
use crate::sandbox::place::Place;

/// Source in the mount table (contract 1.8).
pub(crate) const SOURCE: &str = "rafs";

/// Where connections come from.
const DEVICE: &str = "/dev/fuse";

/// Longest read that the kernel asks for, with room for what comes before its data.
const MAX_READ: usize = (1 << 20) + 4096;

/// How long a mount may take to say that nobody serves it: the kernel itself says so, at once.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// What keeps a mount from being unmounted.
const COVERED: &str = "another mount covers it; unmount both by hand";

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
    /// Its name in the directory of its connection.
    pub(super) fn name(self) -> &'static str {
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
    /// Mounts on the directory `mountpoint`, a path without links, read-only unless `writable`; with the descriptor of
    /// the connection, of which nothing stays here.
    ///
    /// # Errors
    /// Not a usable directory, a dead mount in its place, or the kernel refuses.
    pub fn mount(mountpoint: &Path, writable: bool) -> anyhow::Result<(Self, OwnedFd)> {
        let place = usable_mountpoint(mountpoint)?;
        let context = || format!("mount on {}", mountpoint.display());
        let device = File::options().read(true).write(true).open(DEVICE).context("open /dev/fuse")?;
        let descriptor = match mount_on(&place, &device, writable) {
            Err(Errno::EPERM) => mount_by_helper(mountpoint, writable).with_context(context)?,
            mounted => mounted.map(|()| device.into()).with_context(context)?,
        };
        let identity = MountIdentity::at(mountpoint)
            .inspect_err(|e| tracing::warn!("the mount on {} has no identity: {e}", mountpoint.display()))
            .ok();
        Ok((Self { mountpoint: mountpoint.to_owned(), identity: Mutex::new(identity) }, descriptor))
    }

    /// Goes on with the mount on `mountpoint`, a path without links, of connection `number`, be it covered by others.
    /// Asks nothing of it.
    ///
    /// # Errors
    /// It is not there.
    pub fn inherit(mountpoint: &Path, number: u64) -> anyhow::Result<Self> {
        let found = MountIdentity::of_connection(mountpoint, SOURCE, number)
            .with_context(|| format!("look for the mount on {}", mountpoint.display()))?;
        let Some(identity) = found else {
            bail!(
                "the saved state is of FUSE connection {number}, but {} is not its mount; give the \
                 --mountpoint of the daemon that saved it",
                mountpoint.display()
            )
        };
        Ok(Self { mountpoint: mountpoint.to_owned(), identity: Mutex::new(Some(identity)) })
    }

    /// What is mounted at `mountpoint`, as if it were ours.
    #[cfg(test)]
    pub fn known(mountpoint: &Path) -> io::Result<Self> {
        let identity = MountIdentity::at(mountpoint)?;
        Ok(Self { mountpoint: mountpoint.to_owned(), identity: Mutex::new(Some(identity)) })
    }

    /// The canonical mountpoint.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The kernel's number of the connection, if it is known.
    pub fn number(&self) -> Option<u64> {
        self.identity().as_ref().and_then(MountIdentity::connection)
    }

    /// True if `place` is in the mount, by whatever path. Asks nothing of it.
    ///
    /// # Errors
    /// The system's.
    pub fn serves(&self, place: &Place) -> io::Result<bool> {
        let Some(number) = self.number() else { return Ok(false) };
        // The device of an overlay is another one.
        let is_covered = self.identity().is_some_and(|ours| ours.is_cover());
        Ok(device_of(place)? == Device::of(number)
            || is_covered && MountIdentity::of(place).is_ok_and(|there| there.connection() == Some(number)))
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
        let ours = self.identity();
        if let Some(ours) = &ours
            && ours.wait_gone(Duration::ZERO)?
        {
            return Ok(());
        }
        let place = Place::fixed(&self.mountpoint)?;
        if let Some(ours) = &ours
            && MountIdentity::of(&place)? != *ours
        {
            bail!("{COVERED}")
        }
        // The numbers of a mount that is gone may be a successor's: that one answers.
        let is_cover = ours.is_some_and(|ours| ours.is_cover());
        if ended && !is_cover && fstatvfs(&place) != Err(Errno::ENOTCONN) {
            return Ok(());
        }
        match mounted::detach(&place) {
            // Somebody else was faster.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Ends the connection, and with it whatever waits for its answers. A mount that is gone already has none.
    ///
    /// # Errors
    /// The kernel refuses, or has no file for that and another mount is on top.
    pub fn abort(&self) -> anyhow::Result<()> {
        let Some(ours) = self.identity().filter(|ours| !ours.wait_gone(Duration::ZERO).unwrap_or(false))
        else {
            return Ok(());
        };
        // It is found by its number whatever covers the mount; but not everybody has these files.
        let file = self.connection_file(ConnectionFile::Abort);
        if file.and_then(|mut file| file.write_all(b"1")).is_ok() {
            return Ok(());
        }
        let place = Place::fixed(&self.mountpoint)?;
        if MountIdentity::of(&place)? != ours {
            bail!("{COVERED}")
        }
        Ok(umount2(&place.link(), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH)?)
    }

    /// Opens one of the kernel's files of this connection to be written, while the mount is there: the
    /// number of one that is gone may be another's. What is open stays ours.
    ///
    /// # Errors
    /// There is no such file, or no mount.
    pub fn connection_file(&self, file: ConnectionFile) -> io::Result<File> {
        let number = self.number().ok_or_else(|| io::Error::other("the mount has no identity"))?;
        let file = control::open(number, file)?;
        match self.identity() {
            Some(ours) if !ours.wait_gone(Duration::ZERO)? => Ok(file),
            _ => Err(io::Error::other("the mount is gone")),
        }
    }

    /// Waits until it is mounted no more, as far as that is known of it; false if it still is after `limit`.
    ///
    /// # Errors
    /// The mount table can not be read.
    pub fn wait_gone(&self, limit: Duration) -> io::Result<bool> {
        self.identity().map_or(Ok(true), |identity| identity.wait_gone(limit))
    }
}

/// Mounts a connection. Its attributes and options are the contract's (1.8).
fn mount_on(place: &Place, device: &File, writable: bool) -> nix::Result<()> {
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, !writable);
    let options = format!(
        "default_permissions,allow_other,fd={},rootmode={:o},user_id={},group_id={},max_read={}",
        device.as_raw_fd(),
        libc::S_IFDIR,
        getuid(),
        getgid(),
        MAX_READ
    );
    mount(Some(SOURCE), &place.link(), Some("fuse"), flags, Some(options.as_str()))
}

/// The configuration of `fusermount3` (mount.fuse3(8)).
const HELPER_CONFIG: &str = "/etc/fuse.conf";

/// The same by `fusermount3`, where only that may.
fn mount_by_helper(mountpoint: &Path, writable: bool) -> anyhow::Result<OwnedFd> {
    let mut session = FuseSession::new(mountpoint, SOURCE, "", !writable)?;
    // The helper refuses a mount for others unless its configuration says that users may make one.
    let config = std::fs::read_to_string(HELPER_CONFIG).unwrap_or_default();
    if !config.lines().any(|line| line.trim() == "user_allow_other") {
        tracing::info!("only this user sees the mount: {HELPER_CONFIG} has no `user_allow_other`");
        session.set_allow_other(false);
    }
    session.mount()?;
    let file = session.get_fuse_file().context("the FUSE session has no descriptor")?;
    let descriptor = OwnedFd::from(file.try_clone().context("duplicate the FUSE descriptor")?);
    // Its own descriptor would keep the connection alive after the daemon, and its drop would unmount.
    session.set_fuse_file(File::open("/dev/null").context("open /dev/null")?);
    std::mem::forget(session);
    Ok(descriptor)
}

/// A directory to mount on: `path`, which has no links.
///
/// # Errors
/// Not a directory, the mount of another daemon, or the dead mount of one that is gone. The kernel
/// may answer a stat of a dead mount from its cache, but never a statfs.
pub(crate) fn usable_mountpoint(path: &Path) -> anyhow::Result<Place> {
    let probe = || -> io::Result<(bool, Place)> {
        let place = Place::fixed(path)?;
        fstatvfs(&place)?;
        Ok((place.metadata()?.is_dir(), place))
    };
    let is_ours = |place: &Place| MountIdentity::of_ours(place, SOURCE).is_ok_and(|ours| ours.is_some());
    match probe() {
        Ok((true, place)) if is_ours(&place) => match is_dead(&place) {
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
        Ok((true, place)) => Ok(place),
        Ok((false, _)) => bail!("the mountpoint {} is not a directory", path.display()),
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

/// True if what is mounted at `place`, which is the root of a mount of ours, has nobody who serves it. An overlay
/// answers from what it covers no more than names that nobody has asked for. Somebody who takes requests and does not
/// answer keeps a thread waiting, and is no dead one.
fn is_dead(place: &Place) -> bool {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let name = OsString::from(format!(".nydusd-{}-{}", std::process::id(), now.as_nanos()));
    let Ok(place) = place.try_clone() else { return false };
    let (answer, answered) = mpsc::channel();
    let probe = move || {
        let found = place.look(&name);
        // Nobody listens any more if it came late.
        let _ = answer.send(found.is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN)));
    };
    let started = std::thread::Builder::new().name("probe".to_owned()).spawn(probe);
    started.is_ok() && answered.recv_timeout(PROBE_LIMIT).unwrap_or(false)
}
