//! From FUSE requests to calls on [`rafs::fs`], and from its errors to errnos.
//!
//! Metadata never changes by itself, so the kernel is told to ask once: answers, negative ones too,
//! hold until it is told otherwise (a mount, an unmount); open, opendir and flush are answered ENOSYS, after which the kernel does
//! without them. A guest's kernel can not be told: it asks again for what mounts change ([`Adapter::new`]). READ does not come here: [`crate::transport::fusedev`] answers it, for it
//! may have to wait.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rafs::bootstrap::Nid;
use storage::read::ReadSlice;

use crate::failures::Failures;
use crate::metrics::{Fop, Inflight};
use crate::mount::Mount;
use crate::node::NodeId;
use crate::passthrough::{HostMount, OwnDevice};
use crate::vfs::{Node, Vfs};

mod answers;
mod directory;
mod hosts;
mod names;
mod requests;

/// How long the kernel may believe an answer: nothing changes, so for ever (contract 1.8).
pub(crate) const FOR_EVER: Duration = Duration::from_secs(1 << 32);

/// `st_blksize`: the page size, so that readers use whole pages.
const PREFERRED_IO_SIZE: i64 = 4096;

/// The mounted images as a FUSE file system.
#[derive(Debug)]
pub struct Adapter {
    table: Vfs,
    inflight: Arc<Inflight>,
    own_device: OwnDevice,
    failures: Arc<Failures>,
    /// See [`Adapter::new`].
    told: bool,
}

impl Default for Adapter {
    fn default() -> Self {
        Self::new(true)
    }
}

/// The only place where an error becomes an errno. Whatever keeps file data from its reader
/// is EIO.
fn errno(error: &rafs::Error) -> i32 {
    use rafs::ErrorKind;
    match error.kind() {
        ErrorKind::NotFound => libc::ENOENT,
        ErrorKind::WrongType => libc::EINVAL,
        ErrorKind::Invalid => libc::EINVAL,
        ErrorKind::Unsupported => libc::EOPNOTSUPP,
        ErrorKind::Corrupt | ErrorKind::Mismatch | ErrorKind::Io | ErrorKind::Storage => libc::EIO,
    }
}

fn os_error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// Turns an error of the image into the caller's errno; what is not the caller's doing is
/// logged here.
fn refuse(error: rafs::Error) -> io::Error {
    let errno = errno(&error);
    if errno == libc::EIO {
        tracing::error!("metadata: {}", crate::logging::chain(&error));
    }
    os_error(errno)
}

/// What a READ is for.
#[derive(Debug)]
pub enum Planned {
    /// An image's file.
    Chunks(ReadPlan),
    /// A file of the host.
    Host(Arc<HostMount>, Nid),
}

/// A READ that was resolved to chunks.
#[derive(Debug)]
pub struct ReadPlan {
    /// The image.
    pub mount: Arc<Mount>,
    /// The file.
    pub nid: Nid,
    /// Bytes that will be answered, fewer than asked at the end of the file.
    pub len: u32,
}

impl Adapter {
    /// Nothing is mounted. `told` says that the kernel will be told when that changes; otherwise it must not believe
    /// for long what mounts and unmounts change.
    pub fn new(told: bool) -> Self {
        Self {
            table: Vfs::default(),
            inflight: Arc::default(),
            own_device: OwnDevice::default(),
            failures: Arc::default(),
            told,
        }
    }

    /// See [`Adapter::new`].
    pub fn tells(&self) -> bool {
        self.told
    }

    /// The mounts.
    pub fn table(&self) -> &Vfs {
        &self.table
    }

    /// Reads that wait for their source.
    pub fn inflight(&self) -> &Arc<Inflight> {
        &self.inflight
    }

    /// Where failed reads are reported.
    pub fn failures(&self) -> &Arc<Failures> {
        &self.failures
    }

    /// Resolves a READ of at most `size` bytes; the chunks of an image go to `slices`.
    ///
    /// # Errors
    /// The errno for the reader.
    pub fn plan_read(
        &self,
        node: NodeId,
        offset: u64,
        size: u32,
        slices: &mut Vec<ReadSlice>,
    ) -> io::Result<Planned> {
        let (mount, nid) = match self.node(node)? {
            Node::Image { mount, nid, .. } => (mount, nid),
            Node::Host { host, nid, .. } => return Ok(Planned::Host(host, nid)),
            Node::Own(_) => return Err(os_error(libc::EISDIR)),
        };
        let len = mount.rafs().read(nid, offset, size, slices).map_err(|error| {
            // It counts as a read that failed; looking it up took no time worth noting.
            mount.metrics().record_read(nid, None, Duration::ZERO);
            refuse(error)
        })?;
        mount.tracer().touch(slices);
        mount.watch().read(nid, offset);
        Ok(Planned::Chunks(ReadPlan { mount, nid, len }))
    }

    /// True if a request for `node` has to search a directory of the host first.
    pub fn must_search(&self, node: NodeId) -> bool {
        self.table.inherits()
            && matches!(self.table.resolve(node), Some(Node::Host { host, nid, .. }) if host.is_lost(nid))
    }

    /// True if a request for `node` goes to the file system of the host, which may take its time.
    pub fn is_host(&self, node: NodeId) -> bool {
        matches!(self.table.resolve(node), Some(Node::Host { .. }))
    }

    /// What a node id stands for.
    fn node(&self, node: NodeId) -> io::Result<Node> {
        self.table.resolve(node).ok_or_else(|| os_error(libc::ESTALE))
    }

    /// Resolves a node and runs one operation on it, which is counted where an image or the host has it. For
    /// our own directories there is `own`.
    fn run<T>(
        &self,
        node: u64,
        fop: Fop,
        own: impl FnOnce(u64) -> io::Result<T>,
        operation: impl FnOnce(&Mount, Nid) -> io::Result<T>,
        on_host: impl FnOnce(&HostMount, Nid) -> io::Result<T>,
    ) -> io::Result<T> {
        let started = Instant::now();
        match self.node(NodeId(node))? {
            Node::Own(number) => own(number),
            Node::Image { mount, nid, .. } => {
                let result = operation(&mount, nid);
                mount.metrics().record_on(nid, fop, result.is_ok(), started.elapsed());
                result
            }
            Node::Host { host, nid, .. } => {
                let result = on_host(&host, nid);
                host.metrics().record_on(nid, fop, result.is_ok(), started.elapsed());
                result
            }
        }
    }

    /// True if extended attributes may be asked for.
    fn shows_xattrs(&self) -> bool {
        !self.table.is_dedicated() || self.table.mounts().iter().any(|mount| mount.has_xattrs())
    }

    /// For an image without any extended attributes: where it is the only one, the kernel need not ask
    /// again.
    fn no_xattrs(&self) -> i32 {
        if self.table.refuse_xattrs() { libc::ENOSYS } else { libc::ENODATA }
    }
}
