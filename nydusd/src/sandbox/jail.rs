//! The jail: a mount namespace whose root directory is empty but for what the daemon cannot do without.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chroot, fchdir, pivot_root};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
};
use rustix::thread::{CapabilitySet, capabilities};

use super::admit::make_place;
use super::privileged::Broker;
use super::protocol::Request;
use crate::sys;

/// What is in every jail, to be read, as far as the host has it: roots of TLS, the local time, the share of the CPUs.
/// Private keys lie beside some of the roots, so those are named one by one.
const SYSTEM: [&str; 13] = [
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/ca-trust",
    "/etc/ca-certificates",
    "/var/lib/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/sys/fs/cgroup",
];
/// The same, if the environment says so.
const NAMED: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// What the root directory holds: places for mounts.
const SIZE: &str = "4m";
const INODES: &str = "65536";
/// A directory of every host that can be covered while the jail is made.
const SCAFFOLD: &str = "/proc";
/// The mount namespace of this process.
const NAMESPACE: &str = "/proc/self/ns/mnt";

/// Puts this process, which must have one thread, into a new jail, and has the broker admit things into it. The inner
/// error says why there is none: a privilege is missing, or the kernel refuses; the process sees the host's files then.
///
/// # Errors
/// There is none, and the process can not get back to where it was.
pub(super) fn enter(broker: &Broker) -> anyhow::Result<anyhow::Result<()>> {
    let (before, prepared) = match prepare() {
        Ok(ready) => ready,
        Err(e) => return Ok(Err(e)),
    };
    match move_into(broker, prepared) {
        Ok(()) => Ok(Ok(())),
        Err(e) => {
            let back = || format!("get out of a jail that could not be finished ({e:#}); see --no-jail");
            before.restore().with_context(back)?;
            Ok(Err(e))
        }
    }
}

/// What a jail is made of.
struct Prepared {
    /// Its root directory, not mounted yet.
    root: OwnedFd,
    /// What is shown there, under which name.
    kept: Vec<(PathBuf, OwnedFd)>,
}

/// Makes what can be made before the process goes anywhere.
fn prepare() -> anyhow::Result<(Before, Prepared)> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT;
    if !capabilities(None)?.effective.contains(needed) {
        bail!("CAP_SYS_ADMIN and CAP_SYS_CHROOT are needed");
    }
    let before = Before::here().context("where this process is")?;
    let kept = keep().context("what the jail shows of the host")?;
    let root = make_root().context("the jail's root directory")?;
    // Without a way back there is no going. The broker needs the same to admit things.
    before.restore().context("enter a mount namespace")?;
    Ok((before, Prepared { root, kept }))
}

fn move_into(broker: &Broker, prepared: Prepared) -> anyhow::Result<()> {
    let Prepared { root, kept } = prepared;
    let directory = &broker.directory;
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    // What happens here is not seen outside; what is unmounted there goes here, too.
    let quiet = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", quiet).context("separate the mounts")?;
    let namespace = OwnedFd::from(File::open(NAMESPACE).context("the mount namespace")?);
    let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", CWD, SCAFFOLD, onto).context("mount the root directory")?;
    // The other way to the same directory: it stays writable, and is not reached from within.
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let back = open_tree(CWD, SCAFFOLD, clone).context("the way back to the root directory")?;
    for (path, tree) in &kept {
        let is_dir = File::from(tree.try_clone()?).metadata()?.is_dir();
        let context = || format!("{} in the jail", path.display());
        make_place(&back, path, is_dir).with_context(context)?;
        let inside = Path::new(SCAFFOLD).join(path.strip_prefix("/")?);
        move_mount(tree, "", CWD, &inside, onto).with_context(context)?;
    }
    rustix::fs::symlinkat(std::process::id().to_string(), &back, "proc/self").context("/proc/self")?;
    make_place(&back, directory, true).context("the working directory")?;
    sys::make_read_only(root.as_fd()).context("protect the root directory")?;

    std::env::set_current_dir(SCAFFOLD)?;
    // The old root ends up above the new one, and what is on top of the root directory is what goes.
    pivot_root(".", ".").context("change the root directory")?;
    umount2(".", MntFlags::MNT_DETACH).context("leave the old root directory")?;
    std::env::set_current_dir("/")?;
    std::env::set_current_dir(directory)?;
    // The last, so that the broker knows of a jail only if there is one.
    broker.ask(&Request::Jail, &[namespace.as_fd(), back.as_fd()]).map_err(anyhow::Error::from)?;
    Ok(())
}

/// Where the process was.
struct Before {
    namespace: OwnedFd,
    root: OwnedFd,
    directory: OwnedFd,
}

impl Before {
    fn here() -> io::Result<Self> {
        let place =
            |path| File::options().read(true).custom_flags(libc::O_PATH).open(path).map(OwnedFd::from);
        Ok(Self { namespace: File::open(NAMESPACE)?.into(), root: place("/")?, directory: place(".")? })
    }

    /// Goes back there.
    fn restore(&self) -> nix::Result<()> {
        setns(&self.namespace, CloneFlags::CLONE_NEWNS)?;
        // That of the namespace need not have been this process's.
        fchdir(&self.root)?;
        chroot(".")?;
        fchdir(&self.directory)
    }
}

/// Mounts that can be put into a jail, and where they go.
fn keep() -> anyhow::Result<Vec<(PathBuf, OwnedFd)>> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // Of processes only this one: the files of others are reached through theirs.
    let own = PathBuf::from(format!("/proc/{}", std::process::id()));
    let mut kept = vec![(own.clone(), open_tree(CWD, &own, clone).context("/proc")?)];
    let named = NAMED.iter().filter_map(std::env::var_os).map(PathBuf::from);
    for path in SYSTEM.iter().map(PathBuf::from).chain(named.filter(|path| path.is_absolute())) {
        // Links are followed: what it is counts, under the name that it is looked for.
        match open_tree(CWD, &path, clone | OpenTreeFlags::AT_RECURSIVE) {
            Ok(tree) => kept.push((path, tree)),
            Err(e) => tracing::debug!("{}: {e}", path.display()),
        }
    }
    for (path, tree) in &kept {
        sys::confine_mount(tree.as_fd(), false, false).with_context(|| path.display().to_string())?;
    }
    Ok(kept)
}

/// An empty file system in memory.
fn make_root() -> anyhow::Result<OwnedFd> {
    let settings = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("source", "nydusd-jail"), ("size", SIZE), ("nr_inodes", INODES), ("mode", "0755")] {
        fsconfig_set_string(&settings, key, value)?;
    }
    fsconfig_create(&settings)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&settings, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
