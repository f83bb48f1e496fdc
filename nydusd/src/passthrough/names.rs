//! What a directory has under a name.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::Context;
use rafs::bootstrap::Nid;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::caller::acting_as;
use super::file_id::look;
use super::nodes::Node;
use super::repeat::{self, Wanted};
use super::{Held, HostMount, path_of};

/// Bytes of a directory that are asked for at once.
const LISTING: usize = 32 << 10;

/// An entry of a directory.
#[derive(Debug)]
pub(crate) struct Listed<'a> {
    pub name: &'a [u8],
    /// Where a listing goes on behind it.
    pub next: u64,
    /// `DT_*`.
    pub kind: u32,
    /// Its node; `None` for the dots, and for what can not be looked up.
    pub held: Option<Held>,
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn dirent_type(kind: FileType) -> u32 {
    u32::from(match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::Unknown => libc::DT_UNKNOWN,
    })
}

/// One component and no way up.
fn check(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(error(libc::EINVAL)),
        _ => Ok(()),
    }
}

impl HostMount {
    fn directory(&self, nid: Nid) -> io::Result<Arc<Node>> {
        let node = self.get(nid)?;
        if node.is_directory() { Ok(node) } else { Err(error(libc::ENOTDIR)) }
    }

    /// What is `name` in directory `parent`; `None` if there is nothing.
    pub(crate) fn lookup(self: &Arc<Self>, parent: Nid, name: &CStr) -> io::Result<Option<Held>> {
        check(name)?;
        let dir = self.directory(parent)?;
        self.lookup_at(parent, &dir, name)
    }

    fn lookup_at(self: &Arc<Self>, parent: Nid, dir: &Node, name: &CStr) -> io::Result<Option<Held>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(file) => self.intern(parent, look(file, &self.own)?).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The same node once more.
    pub(crate) fn again(self: &Arc<Self>, nid: Nid) -> io::Result<Held> {
        self.get(nid)?;
        let node = self.nodes.again(nid).ok_or_else(|| error(libc::ESTALE))?;
        Ok(Held { host: Arc::clone(self), nid, node, believed: Duration::ZERO })
    }

    /// Visits directory `nid` from cursor `offset` on; false if the visitor had no room for more. What
    /// `covered` names is left out.
    pub(crate) fn list(
        self: &Arc<Self>,
        nid: Nid,
        offset: u64,
        covered: &BTreeSet<&[u8]>,
        visit: &mut dyn FnMut(Listed<'_>) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let node = self.directory(nid)?;
        let dir = node.open(OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::seek(&dir, SeekFrom::Start(offset))?;
        let mut buffer = Vec::with_capacity(LISTING);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let bytes = name.to_bytes();
            if covered.contains(bytes) {
                continue;
            }
            let held = match bytes {
                b"." | b".." => None,
                _ => match self.lookup_at(nid, &node, name) {
                    Ok(Some(held)) => Some(held),
                    // Gone since it was listed.
                    Ok(None) => continue,
                    // Its name is there all the same; who asks for it is told why.
                    Err(_) => None,
                },
            };
            let kind = dirent_type(entry.file_type());
            if !visit(Listed { name: bytes, next: entry.next_entry_cookie(), kind, held })? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The inode number of what directory `nid` is in.
    pub(crate) fn parent_ino(self: &Arc<Self>, nid: Nid) -> io::Result<u64> {
        let dir = self.directory(nid)?;
        let above = rustix::fs::openat(&*dir, "..", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(self.ino(self.number(&look(above, &self.own)?)))
    }

    /// Makes what `make` makes in directory `parent`, as the caller.
    fn make(
        self: &Arc<Self>,
        context: &Context,
        parent: Nid,
        name: &CStr,
        wanted: &Wanted<'_>,
        make: impl FnOnce(&Node) -> rustix::io::Result<()>,
    ) -> io::Result<Held> {
        check(name)?;
        let dir = self.directory(parent)?;
        let made = acting_as(context, wanted.mask, || Ok(make(&dir)))?;
        repeat::settle(made, Errno::EXIST, || repeat::is_made(&dir, name, context, wanted))?;
        // Whoever took it away at once was faster.
        self.lookup_at(parent, &dir, name)?.ok_or_else(|| error(libc::ENOENT))
    }

    /// Makes a directory.
    pub(crate) fn mkdir(
        self: &Arc<Self>,
        context: &Context,
        parent: Nid,
        name: &CStr,
        mode: u32,
        mask: u32,
    ) -> io::Result<Held> {
        let wanted = Wanted { kind: FileType::Directory, mode, mask, device: 0, target: None };
        self.make(context, parent, name, &wanted, |dir| {
            rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))
        })
    }

    /// Makes a file, empty if it can have content.
    pub(crate) fn mknod(
        self: &Arc<Self>,
        context: &Context,
        parent: Nid,
        name: &CStr,
        (mode, mask): (u32, u32),
        device: u32,
    ) -> io::Result<Held> {
        let kind = FileType::from_raw_mode(mode);
        let wanted = Wanted { kind, mode, mask, device: device.into(), target: None };
        self.make(context, parent, name, &wanted, |dir| {
            rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(mode), device.into())
        })
    }

    /// Makes a symbolic link.
    pub(crate) fn symlink(
        self: &Arc<Self>,
        context: &Context,
        target: &CStr,
        parent: Nid,
        name: &CStr,
    ) -> io::Result<Held> {
        let wanted =
            Wanted { kind: FileType::Symlink, mode: 0o777, mask: 0, device: 0, target: Some(target) };
        self.make(context, parent, name, &wanted, |dir| rustix::fs::symlinkat(target, dir, name))
    }

    /// Gives `nid` one more name.
    pub(crate) fn link(self: &Arc<Self>, nid: Nid, parent: Nid, name: &CStr) -> io::Result<Held> {
        check(name)?;
        let (node, dir) = (self.get(nid)?, self.directory(parent)?);
        let linked = rustix::fs::linkat(CWD, path_of(&*node), &*dir, name, AtFlags::SYMLINK_FOLLOW);
        repeat::settle(linked, Errno::EXIST, || repeat::is_linked(&*node, &dir, name))?;
        self.lookup_at(parent, &dir, name)?.ok_or_else(|| error(libc::ENOENT))
    }

    /// Removes a name; `flags` tells directories from other files.
    pub(crate) fn remove(&self, parent: Nid, name: &CStr, flags: AtFlags) -> io::Result<()> {
        check(name)?;
        let removed = rustix::fs::unlinkat(&*self.directory(parent)?, name, flags);
        repeat::settle(removed, Errno::NOENT, || Ok(true))
    }

    /// Renames within the directory that is served.
    pub(crate) fn rename(
        &self,
        (old_parent, old): (Nid, &CStr),
        (new_parent, new): (Nid, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        check(old)?;
        check(new)?;
        let (old_dir, new_dir) = (self.directory(old_parent)?, self.directory(new_parent)?);
        let flags = RenameFlags::from_bits(flags).ok_or_else(|| error(libc::EINVAL))?;
        match repeat::is_renamed((&old_dir, old), (&new_dir, new), flags)? {
            true => Ok(()),
            false => Ok(rustix::fs::renameat_with(&*old_dir, old, &*new_dir, new, flags)?),
        }
    }
}
