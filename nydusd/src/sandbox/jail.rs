//! The jail: a mount namespace whose root directory is empty but for what the daemon cannot do without.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::pivot_root;
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

/// Puts this process, which must have one thread, into a new jail, and has the broker admit things into it.
///
/// # Errors
/// A privilege is missing, or the kernel refuses; the process sees the host's files then.
pub(super) fn enter(broker: &Broker) -> anyhow::Result<()> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT;
    if !capabilities(None)?.effective.contains(needed) {
        bail!("CAP_SYS_ADMIN and CAP_SYS_CHROOT are needed");
    }
    let directory = &broker.directory;
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    // What happens here is not seen outside; what is unmounted there goes here, too.
    let quiet = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", quiet).context("separate the mounts")?;
    let namespace = OwnedFd::from(File::open("/proc/self/ns/mnt").context("the mount namespace")?);
    let kept = keep().context("what the jail shows of the host")?;

    let root = make_root().context("the jail's root directory")?;
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
    broker.ask(&Request::Jail, &[namespace.as_fd(), back.as_fd()]).map_err(anyhow::Error::from)?;
    Ok(())
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
        sys::confine_mount(tree.as_fd(), false).with_context(|| path.display().to_string())?;
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
