//! The few FUSE messages that are taken apart here: fixed records in the host's byte order,
//! as `linux/fuse.h` defines them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::passthrough::KILL_SGID;

/// FUSE_WRITE. Its body begins as [`ReadIn`] does.
pub(super) const OP_WRITE: u32 = 16;
/// FUSE_READ.
pub(super) const OP_READ: u32 = 15;
/// FUSE_INIT, the first request of a connection.
pub(super) const OP_INIT: u32 = 26;
/// FUSE_FORGET, without reply.
pub(super) const OP_FORGET: u32 = 2;
/// FUSE_INTERRUPT, without reply.
pub(super) const OP_INTERRUPT: u32 = 36;
/// FUSE_NOTIFY_REPLY, which the kernel wants no answer to.
pub(super) const OP_NOTIFY_REPLY: u32 = 41;
/// FUSE_BATCH_FORGET, without reply.
pub(super) const OP_BATCH_FORGET: u32 = 42;
/// FUSE_SETXATTR.
const OP_SETXATTR: u32 = 21;
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

/// Has a write that appends go to where the kernel's idea of the end was. For one that is asked for again: what was
/// written may be there already, and would be appended once more.
pub(super) fn place_write(request: &mut [u8]) {
    let Some(body) = request.get_mut(size_of::<InHeader>()..) else { return };
    if let Ok((write, _)) = ReadIn::mut_from_prefix(body) {
        write.flags &= !libc::O_APPEND.cast_unsigned();
    }
}

/// The nodes that a request is for; none that the kernel only gives back.
pub(super) fn nodes(header: &InHeader, body: &[u8]) -> [Option<u64>; 2] {
    /// FUSE_RENAME, FUSE_LINK, FUSE_RENAME2: their bodies begin with another node.
    const OF_TWO: [u32; 3] = [12, 13, 45];
    let is_given_back = [OP_FORGET, OP_BATCH_FORGET].contains(&header.opcode);
    let second = || Some(u64::read_from_prefix(body).ok()?.0);
    [(!is_given_back).then_some(header.nodeid), OF_TWO.contains(&header.opcode).then(second).flatten()]
}

/// Has a FUSE_SETXATTR of a connection with [`SETXATTR_EXT`](super::init::SETXATTR_EXT) look as fuse-backend-rs knows
/// it: without the second pair of words. What they say goes to the flags. Other requests stay as they are.
pub(super) fn fold_setxattr(request: &mut [u8]) -> &mut [u8] {
    const KEPT: usize = size_of::<InHeader>() + 8;
    const FOLDED: usize = 8;
    /// FUSE_SETXATTR_ACL_KILL_SGID.
    const ACL_KILL_SGID: u32 = 1;
    let is_whole = request.len() >= KEPT + FOLDED;
    let Ok((header, body)) = InHeader::mut_from_prefix(request) else { return request };
    if header.opcode != OP_SETXATTR || !is_whole {
        return request;
    }
    header.len = header.len.saturating_sub(FOLDED as u32);
    if let Ok((words, _)) = <[u32; 4]>::mut_from_prefix(body)
        && words[2] & ACL_KILL_SGID != 0
    {
        words[1] |= KILL_SGID;
    }
    request.copy_within(KEPT + FOLDED.., KEPT);
    let len = request.len() - FOLDED;
    &mut request[..len]
}

/// Head and body of a request, as far as they are there.
pub(super) fn parse(request: &[u8]) -> Option<(InHeader, &[u8])> {
    let (header, body) = InHeader::read_from_prefix(request).ok()?;
    Some((header, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_setxattr_is_folded() {
        let header = |len, opcode| InHeader {
            len,
            opcode,
            unique: 7,
            nodeid: 1,
            uid: 2,
            gid: 3,
            pid: 4,
            total_extlen: 0,
            padding: 0,
        };
        let mut words = [0_u64; 16];
        for (opcode, kills, flags) in
            [(OP_SETXATTR, 1_u32, KILL_SGID | 2), (OP_SETXATTR, 0, 2), (OP_READ, 1, 2)]
        {
            let whole = [
                header(61, opcode).as_bytes(),
                3_u32.as_bytes(),
                2_u32.as_bytes(),
                kills.as_bytes(),
                &[0; 4],
                b"a\0abc",
            ]
            .concat();
            let request = &mut words.as_mut_bytes()[..61];
            request.copy_from_slice(&whole);
            let folded = fold_setxattr(request);
            if opcode == OP_READ {
                assert_eq!(folded, whole);
                continue;
            }
            let wanted =
                [header(53, opcode).as_bytes(), 3_u32.as_bytes(), flags.as_bytes(), b"a\0abc"].concat();
            assert_eq!(folded, wanted);
        }
        // Cut off: left to whoever decodes it.
        words.as_mut_bytes()[..40].copy_from_slice(header(55, OP_SETXATTR).as_bytes());
        assert_eq!(fold_setxattr(&mut words.as_mut_bytes()[..55]).len(), 55);
        assert_eq!(fold_setxattr(&mut words.as_mut_bytes()[..7]).len(), 7);
    }

    #[test]
    fn a_repeated_append_has_its_place() {
        let flags = (libc::O_WRONLY | libc::O_APPEND | libc::O_SYNC).cast_unsigned();
        let write = ReadIn { fh: 1, offset: 2, size: 3, read_flags: 4, lock_owner: 5, flags, padding: 0 };
        // The kernel's own alignment.
        let mut words = [0_u64; 16];
        let request = &mut words.as_mut_bytes()[..83];
        request[40..80].copy_from_slice(write.as_bytes());
        request[80..].copy_from_slice(b"abc");
        place_write(request);
        let placed = ReadIn { flags: (libc::O_WRONLY | libc::O_SYNC).cast_unsigned(), ..write };
        assert_eq!((&request[40..80], &request[80..]), (placed.as_bytes(), &b"abc"[..]));
        // Cut off: left to whoever decodes it.
        place_write(&mut request[..79]);
        place_write(&mut request[..7]);
    }
}
