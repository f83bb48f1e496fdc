//! What the kernel is told without having asked: that something it may have cached has changed.
//!
//! The kernel locks the directory for that. To make a name be asked for again takes it no time; to drop
//! it takes everything below with it, and of a file whose reader has gone, that waits until its reads are
//! answered, with the directory locked for everybody and in a way that no signal ends. So names are made to
//! be asked for again first, and dropped when nothing below them is read any more.

use std::io::IoSlice;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::fusedev::FuseMount;
use super::message::OutHeader;
use crate::vfs::stale::Stale;

/// FUSE_NOTIFY_INVAL_INODE.
const INVAL_INODE: i32 = 2;
/// FUSE_NOTIFY_INVAL_ENTRY.
const INVAL_ENTRY: i32 = 3;
/// FUSE_NOTIFY_INC_EPOCH: all names are to be asked for again.
const INC_EPOCH: i32 = 8;

/// What a notification under way may take at the end: those that wait for nobody take microseconds.
const LAST_NOTICE: Duration = Duration::from_millis(100);

/// `fuse_notify_inval_inode_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalInode {
    ino: u64,
    /// First byte of the pages to drop; a directory's are its listing.
    offset: i64,
    /// Bytes; 0: to the end.
    len: i64,
}
const _: () = assert!(size_of::<InvalInode>() == 24);

/// `fuse_notify_inval_entry_out`; the name follows, ended by a NUL that `namelen` does not count.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalEntry {
    parent: u64,
    namelen: u32,
    flags: u32,
}
const _: () = assert!(size_of::<InvalEntry>() == 16);

/// In `flags`: the name is looked up again by who comes next, and nothing is dropped here and now.
const EXPIRE_ONLY: u32 = 1;

/// Who may write notifications: one thread at a time, until the end.
#[derive(Debug, Default)]
pub(super) struct Notices {
    state: Mutex<Notice>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Notice {
    busy: bool,
    closed: bool,
}

impl Notices {
    fn lock(&self) -> MutexGuard<'_, Notice> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `write`, unless it is over.
    fn run<T>(&self, write: impl FnOnce() -> T) -> Option<T> {
        let state = self.done.wait_while(self.lock(), |state| state.busy);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.busy = true;
        drop(state);
        let result = write();
        self.lock().busy = false;
        self.done.notify_all();
        Some(result)
    }

    /// No more from now on; false if one is still under way after `limit`.
    fn close(&self, limit: Duration) -> bool {
        let mut state = self.lock();
        state.closed = true;
        let (state, _) = self
            .done
            .wait_timeout_while(state, limit, |state| state.busy)
            .unwrap_or_else(PoisonError::into_inner);
        !state.busy
    }
}

impl FuseMount {
    /// Has the kernel ask again for these. What it does not know needs nothing. Waits for nobody who
    /// waits for a source, where the kernel can do that ([`FuseMount::expires`]).
    pub fn expire(&self, stale: &[Stale]) {
        let flags = if self.expires() { EXPIRE_ONLY } else { 0 };
        stale.iter().for_each(|one| self.invalidate(one, flags));
    }

    /// Has the kernel ask again for what a predecessor did not tell it of. Who waits for an answer that the predecessor
    /// owed holds directories locked, and a process that waits for those can not be ended, nor does it answer any more
    /// if it is to end. So a kernel that can is told without a lock, to ask for all names again.
    pub fn correct(&self, outdated: &[Stale]) {
        let (nodes, names): (Vec<_>, Vec<_>) =
            outdated.iter().cloned().partition(|one| matches!(one, Stale::Node(_)));
        match self.negotiated().is_some_and(|negotiated| negotiated.has_epochs()) {
            true if !names.is_empty() => self.expire(&[Stale::Names]),
            _ => self.expire(&names),
        }
        self.expire(&nodes);
    }

    /// Has the kernel drop these names and all below them, which it otherwise does when somebody asks for
    /// them. That waits for reads under way below, and with it whoever works in their directories.
    pub fn forget(&self, stale: &[Stale]) {
        stale.iter().for_each(|one| self.invalidate(one, 0));
    }

    /// True if names can be made to be asked for again without being dropped.
    pub fn expires(&self) -> bool {
        self.negotiated().is_some_and(|negotiated| negotiated.expires())
    }

    /// Lets no more notifications begin. One that is under way keeps this process from ending until
    /// those that it waits for have their answers, which this process owes them: false if it has not
    /// ended after a moment.
    pub(super) fn end_notices(&self) -> bool {
        self.notices.close(LAST_NOTICE)
    }

    fn invalidate(&self, stale: &Stale, flags: u32) {
        if let Some(Err(e)) = self.notices.run(|| self.invalidate_one(stale, flags)) {
            tracing::warn!("the kernel may go on with what it has cached of {stale:?}: {e}");
        }
    }

    fn invalidate_one(&self, stale: &Stale, flags: u32) -> nix::Result<()> {
        match stale {
            Stale::Node(node) => {
                self.notify(INVAL_INODE, &[InvalInode { ino: node.0, offset: 0, len: 0 }.as_bytes()])
            }
            Stale::Names if self.negotiated().is_some_and(|negotiated| negotiated.has_epochs()) => {
                self.notify(INC_EPOCH, &[])
            }
            Stale::Names => Err(Errno::EOPNOTSUPP),
            Stale::Entry { parent, name } => {
                let namelen = u32::try_from(name.len()).map_err(|_| Errno::ENAMETOOLONG)?;
                let entry = InvalEntry { parent: parent.0, namelen, flags };
                self.notify(INVAL_ENTRY, &[entry.as_bytes(), name, b"\0"])
            }
        }
    }

    /// Writes one notification.
    fn notify(&self, code: i32, parts: &[&[u8]]) -> nix::Result<()> {
        let len = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(len).map_err(|_| Errno::EMSGSIZE)?;
        let header = OutHeader { len, error: code, unique: 0 };
        let mut all = vec![IoSlice::new(header.as_bytes())];
        all.extend(parts.iter().map(|part| IoSlice::new(part)));
        match nix::sys::uio::writev(self.descriptor(), &all) {
            // Not cached, or no connection any more.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTCONN | Errno::ENOTDIR) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
