//! The FUSE messages that this server takes and sends: records and flags of fuse-backend-rs, in the host's byte order.

pub use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, Dirent, EntryOut, InHeader, InitIn, InitIn2, InitOut, Kstatfs, OpenOut, OutHeader, ReadIn,
    StatfsOut,
};
use fuse_backend_rs::abi::fuse_abi::{FsOptions, Opcode};
pub use vm_memory::ByteValued;

pub const LOOKUP: u32 = Opcode::Lookup as u32;
pub const FORGET: u32 = Opcode::Forget as u32;
pub const GETATTR: u32 = Opcode::Getattr as u32;
pub const READLINK: u32 = Opcode::Readlink as u32;
pub const OPEN: u32 = Opcode::Open as u32;
pub const READ: u32 = Opcode::Read as u32;
pub const STATFS: u32 = Opcode::Statfs as u32;
pub const RELEASE: u32 = Opcode::Release as u32;
pub const GETXATTR: u32 = Opcode::Getxattr as u32;
pub const INIT: u32 = Opcode::Init as u32;
pub const READDIR: u32 = Opcode::Readdir as u32;
pub const INTERRUPT: u32 = Opcode::Interrupt as u32;
pub const BATCH_FORGET: u32 = Opcode::BatchForget as u32;
pub const READDIRPLUS: u32 = Opcode::Readdirplus as u32;

/// What is agreed on with the kernel.
pub const FLAGS: u64 = FsOptions::ASYNC_READ.bits()
    | FsOptions::BIG_WRITES.bits()
    | FsOptions::DO_READDIRPLUS.bits()
    | FsOptions::ASYNC_DIO.bits()
    | FsOptions::ZERO_MESSAGE_OPEN.bits()
    | FsOptions::PARALLEL_DIROPS.bits()
    | FsOptions::MAX_PAGES.bits()
    | FsOptions::CACHE_SYMLINKS.bits()
    | FsOptions::ZERO_MESSAGE_OPENDIR.bits()
    | FsOptions::INIT_EXT.bits();
// The crate does not know these.
/// FUSE_PASSTHROUGH.
pub const PASSTHROUGH: u64 = 1 << 37;
/// Where FUSE_INIT's answer has `max_stack_depth`, in what is unused for the crate.
pub const MAX_STACK_DEPTH: usize = 0;
/// FOPEN_NOFLUSH.
pub const NO_FLUSH: u32 = 1 << 5;
/// FOPEN_PASSTHROUGH.
pub const OPEN_PASSTHROUGH: u32 = 1 << 7;

/// The record at the beginning of `bytes` and what follows it; `None` if they are too few.
pub fn split<T: ByteValued>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>())?;
    let mut record = T::zeroed();
    record.as_mut_slice().copy_from_slice(head);
    Some((record, rest))
}
