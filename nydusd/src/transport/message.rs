//! The few FUSE messages that are taken apart here: fixed records in the host's byte order,
//! as `linux/fuse.h` defines them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// FUSE_READ.
pub(super) const OP_READ: u32 = 15;
/// FUSE_INIT, the first request of a connection.
pub(super) const OP_INIT: u32 = 26;
/// FUSE_FORGET, without reply.
pub(super) const OP_FORGET: u32 = 2;
/// FUSE_INTERRUPT, without reply.
pub(super) const OP_INTERRUPT: u32 = 36;
/// FUSE_BATCH_FORGET, without reply.
pub(super) const OP_BATCH_FORGET: u32 = 42;
/// Highest opcode that fuse-backend-rs 0.14 knows (FUSE_REMOVEMAPPING).
pub(super) const OP_MAX: u32 = 49;

/// FUSE_NOTIFY_RESEND, in the place of an errno.
const NOTIFY_RESEND: i32 = 7;

/// FUSE_UNIQUE_RESEND: set in the number of a request that was given out before.
pub(super) const RESENT: u64 = 1 << 63;

/// Head of every request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub total_extlen: u16,
    pub padding: u16,
}
const _: () = assert!(size_of::<InHeader>() == 40);

/// Body of FUSE_READ.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ReadIn {
    pub fh: u64,
    pub offset: u64,
    pub size: u32,
    pub read_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}
const _: () = assert!(size_of::<ReadIn>() == 40);

/// Body of FUSE_INIT.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
}
const _: () = assert!(size_of::<InitIn>() == 16);

/// What follows [`InitIn`] if its flags say so.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitIn2 {
    pub flags2: u32,
    pub unused: [u32; 11],
}
const _: () = assert!(size_of::<InitIn2>() == 48);

/// Body of the reply to FUSE_INIT.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_gran: u32,
    pub max_pages: u16,
    pub map_alignment: u16,
    pub flags2: u32,
    pub max_stack_depth: u32,
    pub request_timeout: u16,
    pub unused: [u16; 11],
}
const _: () = assert!(size_of::<InitOut>() == 64);

/// Head of every reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct OutHeader {
    pub len: u32,
    /// 0 or a negative errno.
    pub error: i32,
    pub unique: u64,
}

/// Bytes of [`OutHeader`].
pub(super) const OUT_HEADER_LEN: usize = 16;
const _: () = assert!(size_of::<OutHeader>() == OUT_HEADER_LEN);

impl OutHeader {
    /// A reply with `len` bytes of data behind the head.
    pub fn data(unique: u64, len: u32) -> Self {
        Self { len: OUT_HEADER_LEN as u32 + len, error: 0, unique }
    }

    /// Asks the kernel for every request again that was taken and not answered.
    pub fn resend() -> Self {
        Self { len: OUT_HEADER_LEN as u32, error: NOTIFY_RESEND, unique: 0 }
    }

    /// A refusal.
    pub fn refusal(unique: u64, errno: i32) -> Self {
        Self { len: OUT_HEADER_LEN as u32, error: -errno, unique }
    }
}

/// Head and body of a request, as far as they are there.
pub(super) fn parse(request: &[u8]) -> Option<(InHeader, &[u8])> {
    let (header, body) = InHeader::read_from_prefix(request).ok()?;
    Some((header, body))
}
