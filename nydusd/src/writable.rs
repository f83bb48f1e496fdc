//! An image that can be written to: the kernel's own overlayfs above it.
//!
//! ```text
//!   before:  mountpoint ── FUSE mount           after:  mountpoint ── overlay
//!                                                                    ├ upper_dir, work_dir
//!                                                                    └ FUSE mount, seen by the overlay only
//! ```
//!
//! What is changed goes to `upper_dir`, which is a common overlayfs upper directory: another mount goes on with it,
//! and tools that make a layer of one read it. The image below stays as it is, and nothing that is written passes
//! through this daemon.
//!
//! The FUSE mount is taken out of the tree when the overlay is there. It lasts as long as the overlay does, so that
//! whoever unmounts the overlay ends the daemon. Another process mounts it: a thread of the daemon that waited for
//! an answer of the daemon would make it unkillable.

use std::fs::{File, Permissions, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, umount2};
use rafs::bootstrap::Attr;
use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, move_mount,
};

use crate::config::IdMapping;
use crate::sandbox::place::Place;

/// Where changes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayConfig {
    /// Absolute path of the directory that holds them.
    pub upper_dir: PathBuf,
    /// Absolute path of a directory on the same file system, for overlayfs itself.
    pub work_dir: PathBuf,
}

/// Settings of the overlay. The upper directory has to be a layer that others understand: nothing in it refers
/// to names or contents below.
const SETTINGS: [(&str, &str); 3] = [("redirect_dir", "off"), ("metacopy", "off"), ("index", "off")];

/// When a predecessor that still locks the upper directory is worth a warning: it ends within moments otherwise.
const LOCK_LATE: Duration = Duration::from_secs(5);

/// What `nydusd overlay` is told. The directory for changes is its standard input, and overlayfs's own its standard
/// output: which ones they are, not what they are called.
#[derive(clap::Args, Clone, Debug)]
pub struct OverlayArgs {
    /// The FUSE mount to be covered.
    #[arg(long)]
    at: PathBuf,
    /// What the mount table names as source.
    #[arg(long)]
    source: String,
}

/// Keeps other daemons from the upper directory while it lives.
#[derive(Debug)]
pub struct UpperLock {
    _directory: File,
}

impl OverlayConfig {
    /// Owner and mode of the upper directory: those of the image's `root`, which it will stand for, the owner as
    /// `mapping` has it.
    pub fn standing_for(root: &Attr, mapping: Option<IdMapping>) -> ((u32, u32), u32) {
        let shown = |id: u32| mapping.map_or(id, |mapping| mapping.shown(id));
        ((shown(root.uid), shown(root.gid)), root.mode & 0o7777)
    }

    /// Makes the directories, if need be, the upper one, which it answers, with this owner and mode. `allow` is asked
    /// for both, and for their real paths.
    ///
    /// # Errors
    /// Those of `allow`, or they can not be made.
    pub(crate) fn make(
        &self,
        owner: (u32, u32),
        mode: u32,
        allow: impl Fn(&Place, &Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Place> {
        let upper =
            make_owned(&self.upper_dir, owner, mode & 0o7777, &allow).with_context(|| self.named())?;
        let work = &self.work_dir;
        Place::make(work, 0o700, allow).with_context(|| format!("`overlay.work_dir` {}", work.display()))?;
        Ok(upper)
    }

    /// Keeps others from using the upper directory, which `directory` is.
    ///
    /// # Errors
    /// Somebody uses it.
    pub fn lock(&self, directory: File) -> anyhow::Result<UpperLock> {
        match self.try_lock(directory)? {
            Ok(lock) => Ok(lock),
            Err(_) => bail!("{} is in use by another daemon; give each its own", self.named()),
        }
    }

    fn named(&self) -> String {
        format!("`overlay.upper_dir` {}", self.upper_dir.display())
    }

    /// The lock, or the directory if somebody has it.
    fn try_lock(&self, directory: File) -> anyhow::Result<Result<UpperLock, File>> {
        match directory.try_lock() {
            Ok(()) => Ok(Ok(UpperLock { _directory: directory })),
            Err(TryLockError::WouldBlock) => Ok(Err(directory)),
            Err(TryLockError::Error(e)) => Err(e).with_context(|| self.named()),
        }
    }

    /// Keeps others from the upper directory of an overlay that a predecessor made, as long as this process lives.
    /// A predecessor that has not ended yet still has it: then a thread waits for it. What can not be is
    /// logged, for the overlay is there and has to be served all the same.
    pub fn inherit(&self, directory: anyhow::Result<File>) {
        let waited = match directory.and_then(|directory| self.try_lock(directory)) {
            Ok(Ok(lock)) => return std::mem::forget(lock),
            Ok(Err(directory)) => {
                let (named, late) = (self.named(), self.named());
                let (waits, waited) = mpsc::channel::<()>();
                let wait = move || {
                    match directory.lock() {
                        Ok(()) => std::mem::forget(directory),
                        Err(e) => tracing::error!("{named}: others may use it, too: {e}"),
                    }
                    drop(waits);
                };
                let warn = move || {
                    if waited.recv_timeout(LOCK_LATE) == Err(RecvTimeoutError::Timeout) {
                        tracing::warn!(
                            "{late} is still locked by another process, the predecessor or one that must not use it; \
                             waiting for it"
                        );
                    }
                };
                let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
                    std::thread::Builder::new().name(name.to_owned()).spawn(work)
                };
                let threads =
                    spawn("upper", Box::new(wait)).and_then(|_| spawn("upper-late", Box::new(warn)));
                threads.map(drop).map_err(Into::into)
            }
            Err(e) => Err(e),
        };
        if let Err(e) = waited {
            tracing::error!("others may use it, too: {e:#}");
        }
    }
}

/// Puts an overlay with these directories in the place of the FUSE mount at `mountpoint`, which must be served.
///
/// # Errors
/// The kernel refuses; the mount may be gone then.
pub(crate) fn cover(upper: &Place, work: &Place, mountpoint: &Path, source: &str) -> anyhow::Result<()> {
    let directory =
        |place: &Place| place.open(libc::O_DIRECTORY).with_context(|| place.real().display().to_string());
    let program = std::env::current_exe().context("find this program")?;
    let output = Command::new(program)
        .arg("overlay")
        .arg("--at")
        .arg(mountpoint)
        .args(["--source", source])
        .stdin(Stdio::from(directory(upper)?))
        .stdout(Stdio::from(directory(work)?))
        .output()
        .context("start the process that mounts the overlay")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("the image can not be made writable: {}", why.trim().trim_start_matches("Error: "));
    }
    Ok(())
}

/// Makes a directory, and those it is in, as far as `allow` has nothing against its real path. It is there with its
/// owner and mode or not at all: an end in between leaves an empty directory beside it, which nobody takes for it.
fn make_owned(
    path: &Path,
    (uid, gid): (u32, u32),
    mode: u32,
    allow: impl Fn(&Place, &Path) -> anyhow::Result<()>,
) -> anyhow::Result<Place> {
    match Place::find(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        found => {
            let found = found?;
            allow(&found, found.real())?;
            return Ok(found);
        }
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("it is no name of a directory")
    };
    let parent = Place::make(parent, 0o755, |place, real| allow(place, &real.join(name)))?;
    let temporary = tempfile::Builder::new().prefix(".nydusd-upper-").tempdir_in(parent.link())?;
    let own_name = temporary.path().file_name().context("a directory without a name")?;
    let made = parent.enter(own_name)?;
    allow(&made, made.real())?;
    let directory = made.open(libc::O_DIRECTORY)?;
    fchown(&directory, Some(uid), Some(gid))?;
    // After the owner, whose change takes set-id bits away.
    directory.set_permissions(Permissions::from_mode(mode))?;
    match renameat_with(&parent, own_name, &parent, name, RenameFlags::NOREPLACE) {
        Ok(()) => {
            // There is nothing to remove under the other name.
            let _ = temporary.keep();
        }
        // Another daemon was faster.
        Err(Errno::EXIST) => {}
        Err(e) => return Err(e.into()),
    }
    let upper = parent.enter(name)?;
    allow(&upper, upper.real())?;
    Ok(upper)
}

/// `nydusd overlay`: mounts it and ends. Answers the exit code.
pub fn run(args: &OverlayArgs) -> i32 {
    match mount(args) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("Error: {e:#}");
            1
        }
    }
}

fn mount(args: &OverlayArgs) -> anyhow::Result<()> {
    let at = || args.at.display();
    let lower = Place::fixed(&args.at).with_context(|| at().to_string())?;
    let (upper, work) = (io::stdin(), io::stdout());
    let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .context("this kernel has no overlayfs for us; `modprobe overlay`, and start nydusd as root")?;
    let made = configure(&overlay, &args.source, [lower.as_fd(), upper.as_fd(), work.as_fd()]);
    let made = made.with_context(|| {
        let changes = std::fs::read_link(link(upper.as_fd())).unwrap_or_default();
        format!(
            "overlayfs over {} with changes in {} refused{}; both directories have to be on one file system, and not \
             on an overlay",
            at(),
            changes.display(),
            complaints(&overlay)
        )
    })?;
    umount2(&lower.link(), MntFlags::MNT_DETACH).with_context(|| format!("uncover {}", at()))?;
    let under = Place::fixed(&args.at).with_context(|| at().to_string())?;
    let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&made, "", &under, "", onto).with_context(|| format!("mount on {}", at()))?;
    Ok(())
}

/// A path that leads to what a descriptor stands for.
fn link(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The overlay as a mount that is nowhere yet. Directories are named by descriptors, so that no name needs escaping
/// and nobody puts other ones in their place.
fn configure(
    overlay: &OwnedFd,
    source: &str,
    [lower, upper, work]: [BorrowedFd<'_>; 3],
) -> io::Result<OwnedFd> {
    fsconfig_set_string(overlay, "source", source)?;
    for (key, directory) in [("lowerdir", lower), ("upperdir", upper), ("workdir", work)] {
        fsconfig_set_string(overlay, key, link(directory))?;
    }
    for (key, value) in SETTINGS {
        fsconfig_set_string(overlay, key, value)?;
    }
    fsconfig_create(overlay)?;
    // As the FUSE mount has them (contract 1.8).
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    Ok(fsmount(overlay, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// What the kernel says of it.
fn complaints(overlay: &OwnedFd) -> String {
    let mut text = String::new();
    let mut line = [0; 1024];
    while let Ok(len @ 1..) = rustix::io::read(overlay, &mut line) {
        // Its severity comes first: "e ".
        let words = String::from_utf8_lossy(&line[..len]);
        text = format!("{text}: {}", words.get(2..).unwrap_or_default().trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn an_upper_directory_is_whole_or_not_there() {
        let scratch = tempfile::tempdir().unwrap();
        let config = OverlayConfig {
            upper_dir: scratch.path().join("a/upper"),
            work_dir: scratch.path().join("work"),
        };
        let own = std::fs::metadata(scratch.path()).unwrap();
        // Ids that anybody may give away: one's own, as others of the image.
        let mapping = IdMapping { internal: 7, external: own.uid(), count: 1 };
        make_owned(&config.upper_dir, (mapping.shown(7), own.gid()), 0o2751, |_, _| Ok(())).unwrap();
        let made = std::fs::metadata(&config.upper_dir).unwrap();
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (own.uid(), own.gid(), 0o2751));
        // What is there stays as it is.
        std::fs::write(config.upper_dir.join("kept"), "").unwrap();
        make_owned(&config.upper_dir, (own.uid(), own.gid()), 0o700, |_, _| Ok(())).unwrap();
        let kept = std::fs::metadata(&config.upper_dir).unwrap();
        assert_eq!((kept.ino(), kept.mode() & 0o7777), (made.ino(), 0o2751));
        assert!(config.upper_dir.join("kept").exists());
        assert_eq!(
            std::fs::read_dir(scratch.path().join("a")).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }
}
