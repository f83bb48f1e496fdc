//! From FUSE requests to calls on [`rafs::fs`], and from its errors to errnos.
//!
//! Metadata never changes, so the kernel is told to ask once: answers, negative ones too,
//! hold for ever; open, opendir and flush are answered ENOSYS, after which the kernel does
//! without them. READ does not come here: [`crate::transport::fusedev`] answers it, for it
//! may have to wait.

use std::ffi::CStr;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader,
};
use rafs::bootstrap::{Attr, FileType, Nid};
use rafs::fs::SeekKind;
use storage::read::ReadSlice;

use crate::metrics::{Fop, Inflight};
use crate::mount::Mount;
use crate::node::NodeId;
use crate::table::MountTable;

/// How long the kernel may believe an answer: nothing changes, so for ever (contract 1.8).
pub(crate) const FOR_EVER: Duration = Duration::from_secs(1 << 32);

/// `st_blksize`: the page size, so that readers use whole pages.
const PREFERRED_IO_SIZE: i64 = 4096;

/// Unit of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// Cursors of `.` and `..`; those of the image's entries follow.
const AFTER_DOT: u64 = 1;
const AFTER_DOT_DOT: u64 = 2;

/// The mounted images as a FUSE file system.
#[derive(Debug, Default)]
pub struct Adapter {
    table: MountTable,
    inflight: Arc<Inflight>,
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
    /// The mounts.
    pub fn table(&self) -> &MountTable {
        &self.table
    }

    /// Reads that wait for their source.
    pub fn inflight(&self) -> &Arc<Inflight> {
        &self.inflight
    }

    /// Resolves a READ of at most `size` bytes; the chunks go to `slices`.
    ///
    /// # Errors
    /// The errno for the reader.
    pub fn plan_read(
        &self,
        node: NodeId,
        offset: u64,
        size: u32,
        slices: &mut Vec<ReadSlice>,
    ) -> io::Result<ReadPlan> {
        let (mount, nid) = self.resolve(node)?;
        let len = mount.rafs().read(nid, offset, size, slices).map_err(|error| {
            // It counts as a read that failed; looking it up took no time worth noting.
            mount.metrics().record_read(nid, None, Duration::ZERO);
            refuse(error)
        })?;
        mount.tracer().touch(slices);
        Ok(ReadPlan { mount, nid, len })
    }

    /// Mount and inode of a node id.
    fn resolve(&self, node: NodeId) -> io::Result<(Arc<Mount>, Nid)> {
        let mount = self.table.mount_of(node).ok_or_else(|| os_error(libc::ESTALE))?;
        let nid = mount.nid(node);
        Ok((mount, nid))
    }

    /// Resolves a node, runs one operation on it and counts it.
    fn run<T>(
        &self,
        node: u64,
        fop: Fop,
        operation: impl FnOnce(&Mount, Nid) -> io::Result<T>,
    ) -> io::Result<T> {
        let started = Instant::now();
        let (mount, nid) = self.resolve(NodeId(node))?;
        let result = operation(&mount, nid);
        mount.metrics().record_on(nid, fop, result.is_ok(), started.elapsed());
        result
    }
}

/// Attributes as the kernel wants them.
fn stat(mount: &Mount, attr: &Attr) -> stat64 {
    // The one constructor of a zeroed stat64 that needs no unsafe code of ours.
    let mut st = Entry::default().attr;
    let shown = |id: u32| mount.config().id_mapping.map_or(id, |mapping| mapping.shown(id));
    st.st_ino = attr.nid.0;
    st.st_mode = attr.mode;
    st.st_nlink = attr.nlink.into();
    st.st_uid = shown(attr.uid);
    st.st_gid = shown(attr.gid);
    // Already in the 32-bit encoding that FUSE carries.
    st.st_rdev = attr.rdev.into();
    st.st_size = attr.size.cast_signed();
    st.st_blksize = PREFERRED_IO_SIZE;
    st.st_blocks = attr.size.div_ceil(STAT_BLOCK).cast_signed();
    for (seconds, nanoseconds) in [
        (&mut st.st_atime, &mut st.st_atime_nsec),
        (&mut st.st_mtime, &mut st.st_mtime_nsec),
        (&mut st.st_ctime, &mut st.st_ctime_nsec),
    ] {
        *seconds = attr.mtime;
        *nanoseconds = attr.mtime_nsec.into();
    }
    st
}

/// The answer to a lookup of `nid`.
fn entry(mount: &Mount, nid: Nid) -> io::Result<Entry> {
    let attr = mount.rafs().bootstrap().attr(nid).map_err(refuse)?;
    let node = mount.node(nid).ok_or_else(|| os_error(libc::EOVERFLOW))?;
    Ok(Entry {
        inode: node.0,
        generation: mount.place().generation,
        attr: stat(mount, &attr),
        attr_flags: 0,
        attr_timeout: FOR_EVER,
        entry_timeout: FOR_EVER,
    })
}

/// "No such name", to be remembered for ever.
fn negative_entry() -> Entry {
    Entry { entry_timeout: FOR_EVER, ..Entry::default() }
}

fn dirent_type(file_type: FileType) -> u32 {
    u32::from(match file_type {
        FileType::Regular => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::CharDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
    })
}

/// Visits a directory from cursor `offset`: `.`, `..`, then the entries. The visitor answers
/// false when it has no room. The flag tells real entries from the two dots.
fn list(
    mount: &Mount,
    dir: Nid,
    offset: u64,
    visit: &mut dyn FnMut(DirEntry<'_>, Nid, bool) -> io::Result<bool>,
) -> io::Result<()> {
    let bootstrap = mount.rafs().bootstrap();
    if bootstrap.attr(dir).map_err(refuse)?.file_type != FileType::Directory {
        return Err(os_error(libc::ENOTDIR));
    }
    let type_ = u32::from(libc::DT_DIR);
    if offset < AFTER_DOT {
        let dot = DirEntry { ino: dir.0, offset: AFTER_DOT, type_, name: b"." };
        if !visit(dot, dir, false)? {
            return Ok(());
        }
    }
    if offset < AFTER_DOT_DOT {
        let parent = bootstrap.parent(dir).map_err(refuse)?;
        let dot_dot = DirEntry { ino: parent.0, offset: AFTER_DOT_DOT, type_, name: b".." };
        if !visit(dot_dot, parent, false)? {
            return Ok(());
        }
    }
    let mut failed = None;
    bootstrap
        .children(dir, offset.saturating_sub(AFTER_DOT_DOT), &mut |child| {
            let entry = DirEntry {
                ino: child.nid.0,
                offset: child.next.saturating_add(AFTER_DOT_DOT),
                type_: dirent_type(child.file_type),
                name: child.name,
            };
            match visit(entry, child.nid, true) {
                Ok(true) => ControlFlow::Continue(()),
                Ok(false) => ControlFlow::Break(()),
                Err(e) => {
                    failed = Some(e);
                    ControlFlow::Break(())
                }
            }
        })
        .map_err(refuse)?;
    failed.map_or(Ok(()), Err)
}

/// An xattr answer of `len` bytes into a buffer of `size`: 0 asks for the length.
fn fits(len: usize, size: u32) -> io::Result<Option<u32>> {
    let count = u32::try_from(len).map_err(|_| os_error(libc::E2BIG))?;
    match size {
        0 => Ok(Some(count)),
        size if count > size => Err(os_error(libc::ERANGE)),
        _ => Ok(None),
    }
}

/// What every operation that would change something answers.
fn read_only<T>() -> io::Result<T> {
    Err(os_error(libc::EROFS))
}

impl FileSystem for Adapter {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::ASYNC_DIO
            | FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ZERO_MESSAGE_OPENDIR
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::EXPLICIT_INVAL_DATA
            | FsOptions::EXPORT_SUPPORT
            | FsOptions::INIT_EXT;
        // Lets the kernel enforce the image's ACLs, and cache that most files have none.
        if self.table.mounts().iter().any(|mount| mount.has_xattrs()) {
            wanted |= FsOptions::POSIX_ACL;
        }
        Ok(capable & wanted)
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.run(parent, Fop::Lookup, |mount, dir| {
            let bootstrap = mount.rafs().bootstrap();
            let found = match name.to_bytes() {
                // Asked by file handles of exported mounts, `.` also of what is no directory.
                b"." => Some(dir),
                b".." => Some(bootstrap.parent(dir).map_err(refuse)?),
                name => bootstrap.lookup(dir, name).map_err(refuse)?.map(|child| child.nid),
            };
            match found {
                Some(nid) => {
                    let entry = entry(mount, nid)?;
                    mount.place().lookups.take(1);
                    Ok(entry)
                }
                None => Ok(negative_entry()),
            }
        })
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        let started = Instant::now();
        self.table.forget(NodeId(node), count);
        if let Some(mount) = self.table.mount_of(NodeId(node)) {
            mount.metrics().record(Fop::Forget, true, started.elapsed());
        }
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        let started = Instant::now();
        for (node, count) in &requests {
            self.table.forget(NodeId(*node), *count);
        }
        if let Some(mount) = requests.first().and_then(|(node, _)| self.table.mount_of(NodeId(*node))) {
            mount.metrics().record(Fop::BatchForget, true, started.elapsed());
        }
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.run(node, Fop::Getattr, |mount, nid| {
            let attr = mount.rafs().bootstrap().attr(nid).map_err(refuse)?;
            Ok((stat(mount, &attr), FOR_EVER))
        })
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        self.run(node, Fop::Readlink, |mount, nid| {
            mount.rafs().bootstrap().read_link(nid).map(|target| target.into_owned()).map_err(refuse)
        })
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        Err(os_error(libc::ENOSYS))
    }

    fn opendir(&self, _: &Context, _: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        Err(os_error(libc::ENOSYS))
    }

    fn flush(&self, _: &Context, _: u64, _: u64, _: u64) -> io::Result<()> {
        Err(os_error(libc::ENOSYS))
    }

    fn readdir(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.run(node, Fop::Readdir, |mount, dir| {
            list(mount, dir, offset, &mut |dirent, _, _| Ok(add_entry(dirent)? > 0))
        })
    }

    fn readdirplus(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.run(node, Fop::Readdirplus, |mount, dir| {
            list(mount, dir, offset, &mut |dirent, nid, is_child| {
                if !is_child {
                    // The kernel looks the dots up nowhere; node 0 says so.
                    return Ok(add_entry(dirent, Entry::default())? > 0);
                }
                let added = add_entry(dirent, entry(mount, nid)?)? > 0;
                if added {
                    mount.place().lookups.take(1);
                }
                Ok(added)
            })
        })
    }

    fn getxattr(&self, _: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let (mount, _) = self.resolve(NodeId(node))?;
        if !mount.has_xattrs() {
            return Err(os_error(libc::ENOSYS));
        }
        self.run(node, Fop::Getxattr, |mount, nid| {
            let value = mount.rafs().getxattr(nid, name.to_bytes()).map_err(refuse)?;
            let value = value.ok_or_else(|| os_error(libc::ENODATA))?;
            Ok(match fits(value.len(), size)? {
                Some(count) => GetxattrReply::Count(count),
                None => GetxattrReply::Value(value.to_owned()),
            })
        })
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let (mount, _) = self.resolve(NodeId(node))?;
        if !mount.has_xattrs() {
            return Err(os_error(libc::ENOSYS));
        }
        self.run(node, Fop::Listxattr, |mount, nid| {
            let names = mount.rafs().listxattr(nid).map_err(refuse)?;
            Ok(match fits(names.len(), size)? {
                Some(count) => ListxattrReply::Count(count),
                None => ListxattrReply::Names(names),
            })
        })
    }

    fn statfs(&self, _: &Context, node: u64) -> io::Result<statvfs64> {
        self.run(node, Fop::Statfs, |mount, _| {
            let numbers = mount.rafs().statfs();
            let mut st = crate::sys::zeroed_statvfs();
            st.f_bsize = numbers.block_size.into();
            st.f_frsize = numbers.block_size.into();
            st.f_blocks = numbers.blocks;
            st.f_files = numbers.files;
            st.f_namemax = numbers.name_max.into();
            Ok(st)
        })
    }

    fn access(&self, _: &Context, node: u64, mask: u32) -> io::Result<()> {
        self.run(node, Fop::Access, |mount, nid| {
            mount.rafs().bootstrap().attr(nid).map_err(refuse)?;
            // The kernel checks modes itself (default_permissions).
            if mask & libc::W_OK.cast_unsigned() != 0 { read_only() } else { Ok(()) }
        })
    }

    fn lseek(&self, _: &Context, node: u64, _: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let kind = match whence.cast_signed() {
            libc::SEEK_DATA => SeekKind::Data,
            libc::SEEK_HOLE => SeekKind::Hole,
            _ => return Err(os_error(libc::EINVAL)),
        };
        let (mount, nid) = self.resolve(NodeId(node))?;
        let found = mount.rafs().seek(nid, offset, kind).map_err(refuse)?;
        found.ok_or_else(|| os_error(libc::ENXIO))
    }

    fn setattr(
        &self,
        _: &Context,
        _: u64,
        _: stat64,
        _: Option<u64>,
        _: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        read_only()
    }

    fn symlink(&self, _: &Context, _: &CStr, _: u64, _: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn mknod(&self, _: &Context, _: u64, _: &CStr, _: u32, _: u32, _: u32) -> io::Result<Entry> {
        read_only()
    }

    fn mkdir(&self, _: &Context, _: u64, _: &CStr, _: u32, _: u32) -> io::Result<Entry> {
        read_only()
    }

    fn unlink(&self, _: &Context, _: u64, _: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rmdir(&self, _: &Context, _: u64, _: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rename(&self, _: &Context, _: u64, _: &CStr, _: u64, _: &CStr, _: u32) -> io::Result<()> {
        read_only()
    }

    fn link(&self, _: &Context, _: u64, _: u64, _: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn create(
        &self,
        _: &Context,
        _: u64,
        _: &CStr,
        _: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        read_only()
    }

    fn write(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        _: &mut dyn ZeroCopyReader,
        _: u32,
        _: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        _: u32,
    ) -> io::Result<usize> {
        read_only()
    }

    fn fallocate(&self, _: &Context, _: u64, _: u64, _: u32, _: u64, _: u64) -> io::Result<()> {
        read_only()
    }

    fn setxattr(&self, _: &Context, _: u64, _: &CStr, _: &[u8], _: u32) -> io::Result<()> {
        read_only()
    }

    fn removexattr(&self, _: &Context, _: u64, _: &CStr) -> io::Result<()> {
        read_only()
    }
}
