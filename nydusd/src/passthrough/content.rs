//! What a file has: attributes, data, extended attributes.

use std::ffi::CStr;
use std::io;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply, SetattrValid, ZeroCopyReader};
use rafs::bootstrap::Nid;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
    Uid,
};
use rustix::io::Errno;

use super::nodes::Node;
use super::xattr::{self, XattrCall};
use super::{Held, HostMount, KILL_SGID, file_id, path_of, repeat};

impl HostMount {
    /// Attributes.
    pub(crate) fn stat(&self, nid: Nid) -> io::Result<stat64> {
        self.stat_node(&*self.get(nid)?, nid)
    }

    /// The same of a node at hand.
    pub(crate) fn stat_held(&self, held: &Held) -> io::Result<stat64> {
        self.stat_node(&held.node, held.nid)
    }

    fn stat_node(&self, node: &Node, nid: Nid) -> io::Result<stat64> {
        file_id::stat(node, self.ino(nid))
    }

    /// Changes attributes, those that `valid` names.
    pub(crate) fn set_attributes(&self, nid: Nid, to: &stat64, valid: SetattrValid) -> io::Result<stat64> {
        let node = self.get(nid)?;
        // The owner first: that takes set-id bits away, which a mode may set.
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(to.st_uid));
            let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(to.st_gid));
            rustix::fs::chownat(&*node, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::MODE) {
            rustix::fs::chmodat(CWD, path_of(&*node), Mode::from_raw_mode(to.st_mode), AtFlags::empty())?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(to.st_size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            rustix::fs::ftruncate(node.open(OFlags::WRONLY)?, size)?;
        }
        let time = |set, now, seconds, nanoseconds| Timespec {
            tv_sec: seconds,
            tv_nsec: match () {
                () if valid.contains(now) => UTIME_NOW,
                () if valid.contains(set) => nanoseconds,
                () => UTIME_OMIT,
            },
        };
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = Timestamps {
                last_access: time(
                    SetattrValid::ATIME,
                    SetattrValid::ATIME_NOW,
                    to.st_atime,
                    to.st_atime_nsec,
                ),
                last_modification: time(
                    SetattrValid::MTIME,
                    SetattrValid::MTIME_NOW,
                    to.st_mtime,
                    to.st_mtime_nsec,
                ),
            };
            rustix::fs::utimensat(&*node, "", &times, AtFlags::EMPTY_PATH)?;
        }
        self.stat_node(&node, nid)
    }

    /// Where a symbolic link leads to.
    pub(crate) fn read_link(&self, nid: Nid) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&*self.get(nid)?, "", Vec::new())?.into_bytes())
    }

    /// Reads into `buffer` from `offset`; fewer bytes at the end of the file.
    pub(crate) fn read(&self, nid: Nid, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let started = Instant::now();
        let result = self.read_uncounted(nid, offset, buffer);
        let bytes = result.as_ref().ok().map(|len| u32::try_from(*len).unwrap_or(u32::MAX));
        self.metrics.record_read(nid, bytes, started.elapsed());
        result
    }

    fn read_uncounted(&self, nid: Nid, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let file = self.get(nid)?.open(OFlags::RDONLY)?;
        let mut len = 0;
        while len < buffer.len() {
            match rustix::io::pread(&file, &mut buffer[len..], offset.saturating_add(len as u64)) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(rustix::io::Errno::INTR) => {}
                // What was read is an answer; who goes on meets the error again.
                Err(_) if len > 0 => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(len)
    }

    /// Writes `size` bytes at `offset`, or at the end if `flags` has `O_APPEND`; answers how many.
    pub(crate) fn write(
        &self,
        nid: Nid,
        data: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        flags: u32,
    ) -> io::Result<usize> {
        let append = OFlags::from_bits_retain(flags) & OFlags::APPEND;
        let mut file = self.get(nid)?.open(OFlags::WRONLY | append)?;
        let mut len = 0;
        while len < size as usize {
            match data.read_to(&mut file, size as usize - len, offset.saturating_add(len as u64)) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if len > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(len)
    }

    /// Makes room, or holes.
    pub(crate) fn allocate(&self, nid: Nid, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let file = self.get(nid)?.open(OFlags::WRONLY)?;
        Ok(rustix::fs::fallocate(file, FallocateFlags::from_bits_retain(mode), offset, length)?)
    }

    /// The next data or hole.
    pub(crate) fn seek(&self, nid: Nid, to: SeekFrom) -> io::Result<u64> {
        Ok(rustix::fs::seek(self.get(nid)?.open(OFlags::RDONLY)?, to)?)
    }

    /// Makes a file or directory durable.
    pub(crate) fn sync(&self, nid: Nid, only_data: bool) -> io::Result<()> {
        let file = self.get(nid)?.open(OFlags::RDONLY)?;
        if only_data { file.sync_data() } else { file.sync_all() }
    }

    /// Numbers of the file system that `nid` is on.
    pub(crate) fn statfs(&self, nid: Nid) -> io::Result<statvfs64> {
        let from = rustix::fs::fstatvfs(&*self.get(nid)?)?;
        let mut st = crate::sys::zeroed_statvfs();
        st.f_bsize = from.f_bsize;
        st.f_frsize = from.f_frsize;
        st.f_blocks = from.f_blocks;
        st.f_bfree = from.f_bfree;
        st.f_bavail = from.f_bavail;
        st.f_files = from.f_files;
        st.f_ffree = from.f_ffree;
        st.f_favail = from.f_favail;
        st.f_namemax = from.f_namemax;
        Ok(st)
    }

    /// One extended attribute; its length if `size` is 0.
    pub(crate) fn getxattr(&self, nid: Nid, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let found = XattrCall::Get { name: name.to_owned() }.run(&*self.get(nid)?)?;
        Ok(xattr::fit(found, size)?.map_or_else(GetxattrReply::Count, GetxattrReply::Value))
    }

    /// The names of all of them, each ended by a zero; their length if `size` is 0.
    pub(crate) fn listxattr(&self, nid: Nid, size: u32) -> io::Result<ListxattrReply> {
        let found = XattrCall::List.run(&*self.get(nid)?)?;
        Ok(xattr::fit(found, size)?.map_or_else(ListxattrReply::Count, ListxattrReply::Names))
    }

    /// Sets one. `flags` may have [`KILL_SGID`].
    pub(crate) fn setxattr(&self, nid: Nid, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let node = self.get(nid)?;
        let call = XattrCall::Set { name: name.to_owned(), value: value.to_vec(), flags: flags & !KILL_SGID };
        repeat::settle(call.run(&*node).map(|_| ()).map_err(errno), Errno::EXIST, || {
            match (XattrCall::Get { name: name.to_owned() }).run(&*node) {
                // Who makes one may mean to be the only one who did.
                Ok(there) if there == value => Err(Errno::IO.into()),
                Ok(_) | Err(_) => Ok(false),
            }
        })?;
        let mode = rustix::fs::fstat(&*node)?.st_mode & 0o7777;
        if flags & KILL_SGID != 0 && mode & libc::S_ISGID != 0 {
            let mode = Mode::from_raw_mode(mode & !libc::S_ISGID);
            rustix::fs::chmodat(CWD, path_of(&*node), mode, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Removes one.
    pub(crate) fn removexattr(&self, nid: Nid, name: &CStr) -> io::Result<()> {
        let removed = XattrCall::Remove { name: name.to_owned() }.run(&*self.get(nid)?);
        repeat::settle(removed.map(|_| ()).map_err(errno), Errno::NODATA, || Ok(true))
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
