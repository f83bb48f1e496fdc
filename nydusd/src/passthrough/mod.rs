//! A host directory beside the images: read and, if the daemon mounts writable, written.
//!
//! ```text
//!  mod.rs      the mount: which directory, where, its counters
//!  nodes.rs    files that the kernel holds: node number ◀─▶ descriptor
//!  file_id.rs  which file is which, and its attributes
//!  names.rs    what a directory has under a name: look up, list, make, remove, rename
//!  content.rs  what a file has: attributes, data, extended attributes
//!  caller.rs   files are made as whoever asked for them
//!  xattr.rs    extended attributes, some of which take more rights than the daemon has
//!  lost.rs     files that a predecessor gave the kernel
//!  repeat.rs   requests that a predecessor may have carried out
//! ```
//!
//! Every file that the kernel holds is a descriptor that can only name it (`O_PATH`). A name is looked
//! up as one component below such a descriptor and no symbolic link is followed, so nothing outside of the
//! directory is reached, whatever is in it or is asked for. Mounts below it are part of it. Content is opened
//! anew for each request: the kernel gives no open requests to this daemon, and a successor has no
//! handles to take over.
//!
//! The number of a node is made from what identifies the file, so that a successor gives the same
//! file the same number: a path goes on meaning the same node, and what is held open is searched for. Two files may
//! have one number. Where both are known one gets another; a successor does not know what the kernel holds, so the
//! kernel is told more bits of what identifies a file, its generation, and whoever held the other one gets errors.
//!
//! fuse-backend-rs has such a file system, too. It keeps a number for every file it has ever seen, ends a
//! listing with an error when a file goes away meanwhile, and gives numbers that mean nothing to a successor.

mod caller;
mod content;
mod file_id;
mod lost;
mod names;
mod nodes;
pub(crate) mod repeat;
#[cfg(test)]
mod tests;
pub(crate) mod xattr;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use rafs::bootstrap::Nid;
use rustix::fs::{CWD, Mode, OFlags};

pub(crate) use self::file_id::{Device, device_of};
use self::file_id::{Found, look};
use self::nodes::{Node, Nodes};
use crate::metrics::{FileOptions, FsMetrics};
use crate::node::NodeId;
use crate::vfs::command::{MountCommand, SavedHost, SavedMount};
use crate::vfs::place::Place;

/// Number of the directory's own node.
pub(crate) const ROOT: Nid = Nid(1);

/// How long the kernel may believe what it was told of a file: others may change it on the host.
pub(crate) const BELIEVED: Duration = Duration::from_secs(1);

/// Among the flags of [`HostMount::setxattr`], where no caller can have it: whoever sets the access ACL may not keep
/// set-group-id.
pub(crate) const KILL_SGID: u32 = 1 << 31;

/// Why what this daemon serves is not to be served by it once more.
pub(crate) const OWN_MOUNT: &str = "this daemon serves it itself, and would wait for its own answers; name what is \
     behind it, or have another daemon serve it";

/// The device numbers of what this daemon itself serves, once they are known.
pub type OwnDevice = Arc<OnceLock<Device>>;

/// What is needed to mount a directory.
#[derive(Debug)]
pub struct HostSpec {
    /// Where it appears inside the daemon: a checked absolute path.
    pub mountpoint: String,
    /// The API's command; `None` for the command line's.
    pub command: Option<MountCommand>,
    /// The directory.
    pub source: PathBuf,
    /// What a predecessor served under that name.
    pub expected: Option<SavedHost>,
    /// See [`SavedHost::plain`].
    pub plain: bool,
}

/// A directory that is ready to be mounted. Its place is not known yet.
#[derive(Debug)]
pub struct OpenedHost {
    spec: HostSpec,
    root: Found,
    identity: SavedHost,
    own: OwnDevice,
}

/// One host directory that is mounted.
#[derive(Debug)]
pub struct HostMount {
    place: Place,
    spec: HostSpec,
    /// For a successor: what `source` meant.
    identity: SavedHost,
    nodes: Nodes,
    /// Its mount on the host: node numbers do not depend on it.
    home: u64,
    own: OwnDevice,
    metrics: FsMetrics,
    mounted_at: SystemTime,
    /// It was made from saved state, and nobody has asked for it since.
    restored: AtomicBool,
    /// The kernel may hold nodes that a predecessor gave it.
    inherited: AtomicBool,
    searches: lost::Searches,
}

/// Opens the directory.
///
/// # Errors
/// It is none, can not be opened, is served by this daemon, or is another one than was expected.
pub fn open(spec: HostSpec, own: &OwnDevice) -> anyhow::Result<OpenedHost> {
    let source = &spec.source;
    let context = || format!("the directory {} can not be served", source.display());
    if !source.is_absolute() {
        bail!("invalid argument: source {}: want an absolute path of a directory", source.display());
    }
    let file =
        rustix::fs::openat(CWD, source, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(context)?;
    let root = look(file, own)
        .map_err(|e| match e.raw_os_error() {
            // Links were followed when it was opened.
            Some(libc::ELOOP) => anyhow!(OWN_MOUNT),
            _ => e.into(),
        })
        .with_context(context)?;
    let identity = SavedHost {
        path: std::fs::read_link(path_of(&root.file)).with_context(context)?,
        device: (root.id.device.0, root.id.device.1),
        ino: root.id.ino,
        born: root.id.born,
        plain: spec.plain,
    };
    let same =
        |one: &SavedHost| (one.device, one.ino, one.born) == (identity.device, identity.ino, identity.born);
    if !spec.expected.as_ref().is_none_or(same) {
        bail!("{} is another directory than the one that was served", source.display());
    }
    Ok(OpenedHost { spec, root, identity, own: Arc::clone(own) })
}

impl OpenedHost {
    /// The mount at its place.
    pub fn at(self, place: Place) -> HostMount {
        let home = self.root.id.mount;
        HostMount {
            place,
            spec: self.spec,
            identity: self.identity,
            nodes: Nodes::new(Node::new(self.root)),
            home,
            own: self.own,
            metrics: FsMetrics::new(FileOptions::default()),
            mounted_at: SystemTime::now(),
            restored: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
            searches: lost::Searches::default(),
        }
    }
}

impl HostMount {
    /// Where it appears inside the daemon.
    pub fn mountpoint(&self) -> &str {
        &self.spec.mountpoint
    }

    /// The directory.
    pub fn source(&self) -> &Path {
        &self.spec.source
    }

    /// Its index, generation and references.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Counters of file system operations.
    pub fn metrics(&self) -> &FsMetrics {
        &self.metrics
    }

    /// When it was mounted.
    pub fn mounted_at(&self) -> SystemTime {
        self.mounted_at
    }

    /// The node id of `nid`: FUSE's root for the directory at `/`.
    pub(crate) fn node(&self, nid: Nid) -> Option<NodeId> {
        match self.mountpoint() == "/" && nid == ROOT {
            true => Some(NodeId::ROOT),
            false => NodeId::new(self.place.index, nid),
        }
    }

    /// The inode number that users see, no other mount's.
    pub(crate) fn ino(&self, nid: Nid) -> u64 {
        NodeId::new(self.place.index, nid).map_or(nid.0, |node| node.0)
    }

    /// How long the kernel may believe what a name in directory `parent` means. Names in FUSE's
    /// root are not believed: they could not be told to be over when something else is mounted there.
    fn names_believed(&self, parent: Nid) -> Duration {
        match self.node(parent) {
            Some(NodeId::ROOT) => Duration::ZERO,
            _ => BELIEVED,
        }
    }

    /// What a successor needs to make it again.
    pub fn saved(&self) -> SavedMount {
        SavedMount {
            mountpoint: self.spec.mountpoint.clone(),
            command: self.spec.command.clone(),
            index: self.place.index.0,
            generation: self.place.generation,
            // A directory has neither.
            bootstrap: String::new(),
            work_dir: PathBuf::new(),
            host: Some(self.identity.clone()),
        }
    }

    /// Says that it was made from saved state: the kernel may hold nodes that are not known here.
    pub fn set_restored(&self) {
        self.restored.store(true, Ordering::Relaxed);
        self.inherited.store(true, Ordering::Relaxed);
    }

    /// The API's command that made it; `None` for the command line's.
    pub fn command(&self) -> Option<&MountCommand> {
        self.spec.command.as_ref()
    }

    /// True once if it was made from saved state by the same command.
    pub fn repeats(&self, command: &MountCommand) -> bool {
        let same = self.spec.command.as_ref().is_some_and(|own| own.source == command.source);
        same && self.restored.swap(false, Ordering::Relaxed)
    }

    /// The kernel gave back `count` references to `nid`.
    pub(crate) fn forget(&self, nid: Nid, count: u64) {
        drop(self.nodes.forget(nid, count));
    }

    /// The kernel has begun anew, and knows no node.
    pub(crate) fn forget_all(&self) {
        drop(self.nodes.forget_all());
    }

    /// The kernel was given a reference to a node that `held` stands for.
    pub(crate) fn give(&self, held: &Held) {
        held.node.give();
        self.place.lookups.take(1);
    }

    /// True if the file behind `nid` has to be searched for, which may take long.
    pub(crate) fn is_lost(&self, nid: Nid) -> bool {
        self.inherited.load(Ordering::Relaxed) && self.nodes.get(nid).is_none()
    }

    /// The file behind `nid`; a predecessor's is searched for.
    fn get(&self, nid: Nid) -> io::Result<Arc<Node>> {
        match self.nodes.get(nid) {
            Some(node) => Ok(node),
            None if self.inherited.load(Ordering::Relaxed) => self.find_lost(nid),
            None => Err(io::Error::from_raw_os_error(libc::ESTALE)),
        }
    }

    /// The node of a file in directory `parent`, which stays known at least as long as the answer.
    fn intern(self: &Arc<Self>, parent: Nid, found: Found) -> io::Result<Held> {
        let first = found.id.number(self.home);
        let (nid, node) = self.nodes.intern(first, found)?;
        Ok(Held { host: Arc::clone(self), nid, node, believed: self.names_believed(parent) })
    }

    /// What tells a node from others that have or had its number, as far as the kernel has room for that: it has
    /// nobody go on with a file under the number of another.
    pub(crate) fn generation(&self, held: &Held) -> u64 {
        let (generation, bits) = (self.place.generation, file_id::GENERATION_BITS);
        match held.nid == ROOT || self.identity.plain {
            true => generation,
            false => generation << bits | held.node.generation(self.home),
        }
    }

    /// The number that a file has, or would have.
    fn number(&self, found: &Found) -> Nid {
        self.nodes.number(&found.id).unwrap_or_else(|| found.id.number(self.home))
    }
}

/// A node that is known as long as this value is, also if the kernel does not hold it.
#[derive(Debug)]
pub struct Held {
    host: Arc<HostMount>,
    nid: Nid,
    node: Arc<Node>,
    believed: Duration,
}

impl Held {
    /// How long the kernel may believe that its name means it.
    pub(crate) fn believed(&self) -> Duration {
        self.believed
    }

    /// Its number.
    pub(crate) fn nid(&self) -> Nid {
        self.nid
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.host.nodes.release(self.nid));
    }
}

/// A path that names what `fd` stands for, for calls that take no descriptor.
fn path_of(fd: impl std::os::fd::AsFd) -> String {
    use std::os::fd::AsRawFd as _;
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
