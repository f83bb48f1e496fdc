//! The ring of one thread, and the memory that the kernel shares with it: the only unsafe code here.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use zerocopy::IntoBytes as _;

use super::layout::{COMMAND_SIZE, Command, ENTRY_SIZE, HEAD_SIZE};
use crate::transport::worker::Connection;

/// Submissions that wait for the next system call; more are made at once.
const SUBMISSIONS: u32 = 64;
/// Completions that wait for us; the kernel keeps what does not fit.
const COMPLETIONS: u32 = 512;

/// `FUSE_IO_URING_CMD_REGISTER`: gives the kernel an entry.
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`: gives it back with an answer in it.
const COMMIT_AND_FETCH: u32 = 2;

/// Where a submission has its length, which the crate has no setter for with this kind of command.
const LEN_OFFSET: usize = 24;

/// `IORING_ENTER_GETEVENTS`: waits, and does what is to be done by this thread.
const GET_EVENTS: u32 = 1;
/// `IORING_ENTER_NO_IOWAIT` (Linux 6.15).
const NO_IOWAIT: u32 = 1 << 7;

/// Stands for the mailbox in place of an entry.
const MAILBOX: u64 = u64::MAX;

type Uring = IoUring<Entry128, cqueue::Entry>;

/// A ring as the system made it, with the memory of its first entries.
pub(super) struct Prepared {
    uring: Uring,
    areas: Vec<Area>,
}

/// Makes a ring for the calling thread and no other, and memory for so many entries.
///
/// # Errors
/// The system has no rings, or forbids them; no memory.
pub(super) fn set_up(entries: usize) -> io::Result<Prepared> {
    let uring = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        // What the kernel has for us is done when we ask for it, by this thread: see `Ring::trim`.
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(SUBMISSIONS)?;
    let areas = (0..entries).map(|_| Area::new()).collect::<io::Result<_>>()?;
    Ok(Prepared { uring, areas })
}

/// Who may touch the memory of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    /// The kernel: it is registered or committed, and has not come back.
    Kernel,
    /// We: it came with a request.
    Us,
    /// Nobody any more: the kernel has refused it.
    Nobody,
}

/// Private anonymous memory, unmapped when dropped.
struct Area(NonNull<libc::c_void>);

impl Area {
    fn new() -> io::Result<Self> {
        let len =
            NonZeroUsize::new(ENTRY_SIZE).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: an anonymous mapping at an address of the kernel's choice replaces nothing.
        Ok(Self(unsafe { mmap_anonymous(None, len, access, flags) }?))
    }

    fn at(&self, offset: usize) -> *mut libc::c_void {
        // SAFETY: `offset` is HEAD_SIZE or 0, within the mapping of ENTRY_SIZE bytes.
        unsafe { self.0.as_ptr().byte_add(offset) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and whole, and whoever drops it has no reference into it: those borrow
        // the ring. The kernel has none either, see `Ring::drop`.
        let _ = unsafe { munmap(self.0, ENTRY_SIZE) };
    }
}

struct Entry {
    area: Area,
    /// Where it is, as the kernel wants to be told.
    parts: Box<[libc::iovec; 2]>,
    queue: u16,
    holder: Holder,
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A request, in this entry.
    Request(usize),
    /// This entry is of no use any more.
    Refused(usize, Errno),
    /// The mailbox has mail, and has to be watched again.
    Mail,
}

/// The ring of one thread with its entries, which are numbered from 0 in the order they were added.
pub(super) struct Ring {
    uring: Uring,
    connection: Arc<Connection>,
    entries: Vec<Entry>,
    /// For entries to come.
    areas: Vec<Area>,
}

impl Ring {
    /// A ring for requests of `connection`, without an entry.
    pub fn new(Prepared { uring, areas }: Prepared, connection: Arc<Connection>) -> Self {
        Self { uring, connection, entries: Vec::new(), areas }
    }

    /// Has the kernel use one more entry for requests of `queue`, with the next submission; its number.
    ///
    /// # Errors
    /// No memory.
    pub fn add(&mut self, queue: u16) -> io::Result<usize> {
        let area = self.areas.pop().map_or_else(Area::new, Ok)?;
        let parts = Box::new([
            libc::iovec { iov_base: area.at(0), iov_len: HEAD_SIZE },
            libc::iovec { iov_base: area.at(HEAD_SIZE), iov_len: ENTRY_SIZE - HEAD_SIZE },
        ]);
        let number = self.entries.len();
        let address = std::ptr::from_ref(&*parts).addr() as u64;
        self.entries.push(Entry { area, parts, queue, holder: Holder::Kernel });
        let command = Command { flags: 0, commit_id: 0, queue, padding: [0; 6] };
        let entry = self.command(REGISTER, number, &command, Some(address));
        if let Err(e) = self.push(entry) {
            self.entries[number].holder = Holder::Nobody;
            return Err(e);
        }
        Ok(number)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if none can come back.
    pub fn is_idle(&self) -> bool {
        self.entries.iter().all(|entry| entry.holder != Holder::Kernel)
    }

    /// The queue of an entry.
    pub fn queue(&self, entry: usize) -> u16 {
        self.entries[entry].queue
    }

    /// The memory of an entry that has come with a request, until it is committed.
    pub fn memory(&mut self, entry: usize) -> Option<&mut [u8]> {
        let entry = self.entries.get_mut(entry).filter(|entry| entry.holder == Holder::Us)?;
        // SAFETY: the mapping has ENTRY_SIZE bytes, initialized by the kernel, and is as long-lived as the entry,
        // which is borrowed. No other reference exists, since the ring is borrowed for as long; and the kernel
        // does not touch it, since it has given the entry to us.
        Some(unsafe { std::slice::from_raw_parts_mut(entry.area.at(0).cast(), ENTRY_SIZE) })
    }

    /// Gives an entry back with its answer to the request `commit_id`, with the next submission.
    ///
    /// # Errors
    /// The system's.
    pub fn commit(&mut self, entry: usize, commit_id: u64) -> io::Result<()> {
        if self.entries[entry].holder != Holder::Us {
            return Err(io::Error::other("an answer for an entry without a request"));
        }
        self.entries[entry].holder = Holder::Kernel;
        let command = Command { flags: 0, commit_id, queue: self.entries[entry].queue, padding: [0; 6] };
        let submission = self.command(COMMIT_AND_FETCH, entry, &command, None);
        self.push(submission)
    }

    /// Watches a mailbox until it has mail, from the next submission on.
    ///
    /// # Errors
    /// The system's.
    pub fn watch(&mut self, mailbox: &EventFd) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(mailbox.as_raw_fd()), libc::POLLIN as u32);
        self.push(Entry128::from(poll.build().user_data(MAILBOX)))
    }

    /// Submits, without waiting: all of it, unless the system puts it off.
    ///
    /// # Errors
    /// The system's.
    pub fn submit(&mut self) -> io::Result<()> {
        calmly(self.uring.submit())
    }

    /// Submits, and waits until something has come.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&mut self) -> io::Result<()> {
        // A thread that waits here is idle, and would be counted as one that waits for a disk.
        let quiet = if self.uring.params().is_feature_no_iowait() { NO_IOWAIT } else { 0 };
        // At most SUBMISSIONS.
        let pending = self.uring.submission().len() as u32;
        // SAFETY: `enter` wants parameters that belong together: without an argument these are two numbers and
        // flags, which the kernel checks.
        calmly(unsafe { self.uring.submitter().enter::<()>(pending, 1, GET_EVENTS | quiet, None) })
    }

    /// True if the kernel keeps completions for which there was no room: they are collected only after the next
    /// submission.
    pub fn overflows(&mut self) -> bool {
        self.uring.submission().cq_overflow()
    }

    /// Takes what has come.
    pub fn collect(&mut self, events: &mut Vec<Event>) {
        for completion in self.uring.completion() {
            if completion.user_data() == MAILBOX {
                events.push(Event::Mail);
                continue;
            }
            let number = completion.user_data() as usize;
            let Some(entry) = self.entries.get_mut(number) else { continue };
            let result = completion.result();
            (entry.holder, _) = match result {
                0.. => (Holder::Us, events.push(Event::Request(number))),
                _ => (Holder::Nobody, events.push(Event::Refused(number, Errno::from_raw(-result)))),
            };
        }
    }

    /// True if an entry that is the kernel's holds nothing that somebody will read: once what has come since the
    /// last submission is collected, and the next one is not begun. All was then submitted, so the kernel has
    /// taken the answer; no request waits in the kernel to be collected; and it copies the next one in only when
    /// this thread enters the ring, see [`set_up`].
    pub fn is_settled(&mut self) -> bool {
        let submission = self.uring.submission();
        submission.is_empty() && !submission.cq_overflow()
    }

    /// Gives the pages of an entry's data back to the system; false if it is ours again, or the ring is not settled.
    pub fn trim(&mut self, entry: usize) -> bool {
        if !self.is_settled() {
            return false;
        }
        let entry = &self.entries[entry];
        if entry.holder != Holder::Kernel {
            return false;
        }
        if let Some(data) = NonNull::new(entry.area.at(HEAD_SIZE)) {
            // SAFETY: the range is the mapping's, and nobody has a reference into it: it is not ours now. It
            // becomes zeros, and holds neither an answer nor a request: the ring is settled, and stays so
            // meanwhile, since only this thread enters it.
            let done = unsafe { madvise(data, ENTRY_SIZE - HEAD_SIZE, MmapAdvise::MADV_DONTNEED) };
            return done.is_ok();
        }
        false
    }

    fn command(&self, operation: u32, number: usize, command: &Command, address: Option<u64>) -> Entry128 {
        let mut bytes = [0; COMMAND_SIZE];
        bytes[..size_of::<Command>()].copy_from_slice(command.as_bytes());
        let mut entry = opcode::UringCmd80::new(types::Fd(self.connection.fd.as_raw_fd()), operation)
            .cmd(bytes)
            .addr(address)
            .build()
            .user_data(number as u64);
        if address.is_some() {
            // SAFETY: an Entry128 is repr(C): the 128 bytes of the kernel's record, whose length is 32 bits at
            // this offset, a multiple of 4; the record is aligned to 8. Any value is valid there.
            unsafe { std::ptr::from_mut(&mut entry).byte_add(LEN_OFFSET).cast::<u32>().write(2) };
        }
        entry
    }

    fn push(&mut self, submission: Entry128) -> io::Result<()> {
        loop {
            // SAFETY: `push` wants what the submission points to, to be there until it has completed: an
            // entry's memory and its two parts are kept as long as the kernel has the entry, see `drop`.
            // Other submissions point to nothing.
            if unsafe { self.uring.submission().push(&submission) }.is_ok() {
                return Ok(());
            }
            self.submit()?;
        }
    }
}

const _: () = assert!(size_of::<Entry128>() == 128);

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write to what it has: that is lost, with the connection or the process.
        for entry in self.entries.drain(..).filter(|entry| entry.holder == Holder::Kernel) {
            std::mem::forget((entry.area, entry.parts));
        }
    }
}

/// What keeps a call from waiting, and nothing else, is no error.
fn calmly(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        // A signal, or more completions than there is room for.
        Err(e) if [Some(libc::EINTR), Some(libc::EBUSY), Some(libc::EAGAIN)].contains(&e.raw_os_error()) => {
            Ok(())
        }
        Err(e) => Err(e),
    }
}
