//! The requests of the kernel, one by one.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader,
};
use rafs::fs::SeekKind;
use rustix::fs::{AtFlags, SeekFrom};

use super::answers::{fits, negative_entry, stat};
use super::{Adapter, FOR_EVER, directory, os_error, refuse};
use crate::metrics::Fop;
use crate::mount::Mount;
use crate::node::NodeId;
use crate::passthrough::{BELIEVED, HostMount};
use crate::vfs::Node;

/// Counts an operation where an image or the host has it.
fn record(node: &Node, fop: Fop, ok: bool, started: Instant) {
    match node {
        Node::Image { mount, nid, .. } => mount.metrics().record_on(*nid, fop, ok, started.elapsed()),
        Node::Host { host, nid, .. } => host.metrics().record_on(*nid, fop, ok, started.elapsed()),
        Node::Own(_) => {}
    }
}

impl FileSystem for Adapter {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            // Always, not only where it seems to be of use (READDIRPLUS_AUTO): that forgets it behind
            // the first part of a large directory, and asks for each of the other entries.
            | FsOptions::DO_READDIRPLUS
            | FsOptions::ASYNC_DIO
            | FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ZERO_MESSAGE_OPENDIR
            | FsOptions::EXPORT_SUPPORT
            | FsOptions::INIT_EXT;
        wanted |= match self.table.is_dedicated() {
            true => FsOptions::CACHE_SYMLINKS | FsOptions::EXPLICIT_INVAL_DATA,
            // Directories of the host may come: their files change without us, and are made under umasks that
            // default ACLs override. Of images the kernel still asks nothing twice, as their attributes hold.
            false => FsOptions::CACHE_SYMLINKS | FsOptions::AUTO_INVAL_DATA | FsOptions::DONT_MASK,
        };
        // Lets the kernel enforce the image's ACLs, and cache that most files have none.
        if self.shows_xattrs() {
            wanted |= FsOptions::POSIX_ACL;
        }
        Ok(capable & wanted)
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let started = Instant::now();
        let is_root = NodeId(parent) == NodeId::ROOT;
        let parent = self.node(NodeId(parent))?;
        let result = self.find(&parent, name).and_then(|found| match found {
            Some(node) => {
                let entry = self.entry(&node)?;
                self.given(&node, &entry);
                Ok(self.believable(&parent, is_root, Some(&node), entry))
            }
            // What is not there on the host may be there the next time.
            None if matches!(parent, Node::Host { .. }) => Ok(Entry::default()),
            None => Ok(self.believable(&parent, is_root, None, negative_entry())),
        });
        record(&parent, Fop::Lookup, result.is_ok(), started);
        result
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        let started = Instant::now();
        // Before the mount may go with its last node.
        match self.table.resolve(NodeId(node)) {
            Some(Node::Image { mount, .. }) => mount.metrics().record(Fop::Forget, true, started.elapsed()),
            Some(Node::Host { host, .. }) => host.metrics().record(Fop::Forget, true, started.elapsed()),
            Some(Node::Own(_)) | None => {}
        }
        self.table.forget(NodeId(node), count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        let started = Instant::now();
        let first = requests.first().and_then(|(node, _)| self.table.resolve(NodeId(*node)));
        match first {
            Some(Node::Image { mount, .. }) => {
                mount.metrics().record(Fop::BatchForget, true, started.elapsed())
            }
            Some(Node::Host { host, .. }) => host.metrics().record(Fop::BatchForget, true, started.elapsed()),
            Some(Node::Own(_)) | None => {}
        }
        for (node, count) in &requests {
            self.table.forget(NodeId(*node), *count);
        }
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let believed = if self.told { FOR_EVER } else { Duration::ZERO };
        let own = |number| Ok((directory::stat(&self.table, number)?, believed));
        let image = |mount: &Mount, nid| {
            let attr = mount.rafs().bootstrap().attr(nid).map_err(refuse)?;
            Ok((stat(mount, &attr), FOR_EVER))
        };
        self.run(node, Fop::Getattr, own, image, |host, nid| Ok((host.stat(nid)?, BELIEVED)))
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        let own = |_| Err(os_error(libc::EINVAL));
        let image = |mount: &Mount, nid| {
            mount.rafs().bootstrap().read_link(nid).map(|target| target.into_owned()).map_err(refuse)
        };
        self.run(node, Fop::Readlink, own, image, HostMount::read_link)
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
        let started = Instant::now();
        let dir = self.node(NodeId(node))?;
        let result = self.list(&dir, offset, &mut |dirent, _| Ok(add_entry(dirent)? > 0));
        record(&dir, Fop::Readdir, result.is_ok(), started);
        result
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
        let started = Instant::now();
        let is_root = NodeId(node) == NodeId::ROOT;
        let dir = self.node(NodeId(node))?;
        let mut filled = false;
        let result = self.list(&dir, offset, &mut |dirent, node| {
            let Some(node) = node else {
                // The kernel looks the dots up nowhere; node 0 says so.
                return Ok(add_entry(dirent, Entry::default())? > 0);
            };
            let entry = match (self.entry(node), node) {
                // Gone since the directory was looked at.
                (Err(e), Node::Own(_)) if e.raw_os_error() == Some(libc::ESTALE) => return Ok(true),
                // What was added is counted, so it must reach the kernel; who goes on meets the error again.
                (Err(_), _) if filled => return Ok(false),
                (entry, _) => entry?,
            };
            let entry = self.believable(&dir, is_root, Some(node), entry);
            let added = add_entry(dirent, entry)? > 0;
            if added {
                self.given(node, &entry);
                filled = true;
            }
            Ok(added)
        });
        record(&dir, Fop::Readdirplus, result.is_ok(), started);
        result
    }

    fn getxattr(&self, _: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.run(
            node,
            Fop::Getxattr,
            |_| Err(os_error(libc::ENODATA)),
            |mount, nid| {
                if !mount.has_xattrs() {
                    return Err(os_error(self.no_xattrs()));
                }
                let value = mount.rafs().getxattr(nid, name.to_bytes()).map_err(refuse)?;
                let value = value.ok_or_else(|| os_error(libc::ENODATA))?;
                Ok(match fits(value.len(), size)? {
                    Some(count) => GetxattrReply::Count(count),
                    None => GetxattrReply::Value(value.to_owned()),
                })
            },
            |host, nid| host.getxattr(nid, name, size),
        )
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let reply = |names: Vec<u8>| {
            Ok(match fits(names.len(), size)? {
                Some(count) => ListxattrReply::Count(count),
                None => ListxattrReply::Names(names),
            })
        };
        self.run(
            node,
            Fop::Listxattr,
            |_| reply(Vec::new()),
            |mount, nid| {
                if mount.has_xattrs() {
                    return reply(mount.rafs().listxattr(nid).map_err(refuse)?);
                }
                match self.no_xattrs() {
                    libc::ENODATA => reply(Vec::new()),
                    errno => Err(os_error(errno)),
                }
            },
            |host, nid| host.listxattr(nid, size),
        )
    }

    fn statfs(&self, _: &Context, node: u64) -> io::Result<statvfs64> {
        let own = |_| Ok(directory::statfs());
        let image = |mount: &Mount, _| {
            let numbers = mount.rafs().statfs();
            let mut st = crate::sys::zeroed_statvfs();
            st.f_bsize = numbers.block_size.into();
            st.f_frsize = numbers.block_size.into();
            st.f_blocks = numbers.blocks;
            st.f_files = numbers.files;
            st.f_namemax = numbers.name_max.into();
            Ok(st)
        };
        self.run(node, Fop::Statfs, own, image, HostMount::statfs)
    }

    fn access(&self, _: &Context, node: u64, mask: u32) -> io::Result<()> {
        // The kernel checks modes itself (default_permissions).
        let answer = || match mask & libc::W_OK.cast_unsigned() {
            0 => Ok(()),
            _ => Err(os_error(libc::EROFS)),
        };
        self.run(
            node,
            Fop::Access,
            |_| answer(),
            |mount, nid| {
                mount.rafs().bootstrap().attr(nid).map_err(refuse)?;
                answer()
            },
            |host, nid| host.stat(nid).map(drop),
        )
    }

    fn lseek(&self, _: &Context, node: u64, _: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let (kind, to) = match whence.cast_signed() {
            libc::SEEK_DATA => (SeekKind::Data, SeekFrom::Data(offset)),
            libc::SEEK_HOLE => (SeekKind::Hole, SeekFrom::Hole(offset)),
            _ => return Err(os_error(libc::EINVAL)),
        };
        match self.node(NodeId(node))? {
            Node::Image { mount, nid, .. } => {
                let found = mount.rafs().seek(nid, offset, kind).map_err(refuse)?;
                found.ok_or_else(|| os_error(libc::ENXIO))
            }
            Node::Host { host, nid, .. } => host.seek(nid, to),
            Node::Own(_) => Err(os_error(libc::EISDIR)),
        }
    }

    fn setattr(
        &self,
        _: &Context,
        node: u64,
        attr: stat64,
        _: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (host, nid) = self.host(node)?;
        Ok((host.set_attributes(nid, &attr, valid)?, BELIEVED))
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (host, dir) = self.changes(parent, name)?;
        let held = host.symlink(context, target, dir, name)?;
        self.made(&host, &held)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        let (host, dir) = self.changes(parent, name)?;
        let held = host.mknod(context, dir, name, (mode, mask), device)?;
        self.made(&host, &held)
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, mask: u32) -> io::Result<Entry> {
        let (host, dir) = self.changes(parent, name)?;
        let held = host.mkdir(context, dir, name, mode, mask)?;
        self.made(&host, &held)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (host, dir) = self.changes(parent, name)?;
        host.remove(dir, name, AtFlags::empty())
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (host, dir) = self.changes(parent, name)?;
        host.remove(dir, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _: &Context,
        old_parent: u64,
        old: &CStr,
        new_parent: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (host, old_dir) = self.changes(old_parent, old)?;
        let (other, new_dir) = self.changes(new_parent, new)?;
        if !Arc::ptr_eq(&host, &other) {
            return Err(os_error(libc::EXDEV));
        }
        host.rename((old_dir, old), (new_dir, new), flags)
    }

    fn link(&self, _: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (host, dir) = self.changes(parent, name)?;
        let (other, nid) = self.host(node)?;
        if !Arc::ptr_eq(&host, &other) {
            return Err(os_error(libc::EXDEV));
        }
        let held = host.link(nid, dir, name)?;
        self.made(&host, &held)
    }

    fn create(
        &self,
        _: &Context,
        parent: u64,
        name: &CStr,
        _: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.changes(parent, name)?;
        // The kernel makes it with MKNOD then, and needs no handle.
        Err(os_error(libc::ENOSYS))
    }

    fn write(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        data: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        from_cache: bool,
        flags: u32,
        _: u32,
    ) -> io::Result<usize> {
        let (host, nid) = self.host(node)?;
        // What comes from the page cache has its place.
        host.write(nid, data, size, offset, if from_cache { 0 } else { flags })
    }

    fn fsync(&self, _: &Context, node: u64, only_data: bool, _: u64) -> io::Result<()> {
        match self.node(NodeId(node))? {
            Node::Host { host, nid, .. } => host.sync(nid, only_data),
            // Nothing was written.
            Node::Own(_) | Node::Image { .. } => Ok(()),
        }
    }

    fn fsyncdir(&self, context: &Context, node: u64, only_data: bool, handle: u64) -> io::Result<()> {
        self.fsync(context, node, only_data, handle)
    }

    fn fallocate(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (host, nid) = self.host(node)?;
        host.allocate(nid, mode, offset, length)
    }

    fn setxattr(&self, _: &Context, node: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let (host, nid) = self.host(node)?;
        host.setxattr(nid, name, value, flags)
    }

    fn removexattr(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let (host, nid) = self.host(node)?;
        host.removexattr(nid, name)
    }
}
