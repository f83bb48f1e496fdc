//! The memory of a ring entry: fixed records in the host's byte order, as `linux/fuse.h` defines them.
//!
//! ```text
//!   0      128     256          288        4080     4096                            ENTRY_SIZE
//!   | head | body  | kernel's   | -        | head   | data of the request, or of the answer |
//!   |      |       | account    |          | of ours|                                       |
//! ```
//!
//! The request is head, body (its first argument) and data (all others); the answer is head and data. The second
//! head is where an answer is composed as one piece: the kernel is told nothing of it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::transport::message::{InHeader, OUT_HEADER_LEN, OutHeader};

/// Where the data begins.
pub(super) const HEAD_SIZE: usize = 4096;
/// Most bytes of data: those of the largest read or write that is agreed on.
pub(super) const DATA_SIZE: usize = 1 << 20;
/// Bytes of an entry.
pub(super) const ENTRY_SIZE: usize = HEAD_SIZE + DATA_SIZE;
/// Where an answer begins that is composed as one piece.
pub(super) const ANSWER_OFFSET: usize = HEAD_SIZE - OUT_HEADER_LEN;

/// Where the body of a request is, and how long it is at most.
const BODY_OFFSET: usize = 128;
const BODY_SIZE: usize = 128;
const ACCOUNT_OFFSET: usize = 256;

/// Bytes of a submission that are the command's.
pub(super) const COMMAND_SIZE: usize = 80;

/// `fuse_uring_cmd_req`: what a submission says.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Command {
    pub flags: u64,
    pub commit_id: u64,
    pub queue: u16,
    pub padding: [u8; 6],
}
const _: () = assert!(size_of::<Command>() == 24);

/// `fuse_uring_ent_in_out`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Account {
    flags: u64,
    /// By which the kernel knows the request when it is answered.
    commit_id: u64,
    /// Bytes of data.
    data_len: u32,
    padding: u32,
    reserved: u64,
}
const _: () = assert!(size_of::<Account>() == 32 && ACCOUNT_OFFSET + size_of::<Account>() <= ANSWER_OFFSET);

/// What an entry came with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub header: InHeader,
    body_len: usize,
    data_len: usize,
}

impl Request {
    /// Takes the request of an entry apart; `None` if its lengths make no sense.
    pub fn parse(memory: &[u8]) -> Option<Self> {
        let (header, _) = InHeader::read_from_prefix(memory).ok()?;
        let (account, _) = Account::read_from_prefix(memory.get(ACCOUNT_OFFSET..)?).ok()?;
        let data_len = account.data_len as usize;
        let body_len = (header.len as usize).checked_sub(size_of::<InHeader>() + data_len)?;
        let fits = body_len <= BODY_SIZE && data_len <= DATA_SIZE;
        fits.then_some(Self { header, body_len, data_len })
    }

    /// Its first argument.
    pub fn body<'a>(&self, memory: &'a [u8]) -> &'a [u8] {
        &memory[BODY_OFFSET..BODY_OFFSET + self.body_len]
    }

    /// The request as it would have been read from `/dev/fuse`.
    pub fn compose(&self, memory: &[u8], message: &mut Vec<u8>) {
        message.clear();
        message.extend_from_slice(self.header.as_bytes());
        message.extend_from_slice(self.body(memory));
        message.extend_from_slice(&memory[HEAD_SIZE..HEAD_SIZE + self.data_len]);
    }

    /// Bytes of data that it came with.
    pub fn data_len(&self) -> usize {
        self.data_len
    }
}

/// The number of the request in an entry, 0 if it has none.
pub(super) fn unique(memory: &[u8]) -> u64 {
    InHeader::read_from_prefix(memory).map_or(0, |(header, _)| header.unique)
}

/// What the kernel wants to be told with the answer.
pub(super) fn commit_id(memory: &[u8]) -> u64 {
    let account = memory.get(ACCOUNT_OFFSET..).map(Account::read_from_prefix);
    account.and_then(Result::ok).map_or(0, |(account, _)| account.commit_id)
}

/// Puts the head of an answer in its place; its data is there.
pub(super) fn answer(memory: &mut [u8], header: &OutHeader) {
    let data_len = header.len - OUT_HEADER_LEN as u32;
    memory[..OUT_HEADER_LEN].copy_from_slice(header.as_bytes());
    if let Some(Ok((account, _))) = memory.get_mut(ACCOUNT_OFFSET..).map(Account::mut_from_prefix) {
        account.data_len = data_len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(len: u32, data_len: u32) -> Vec<u64> {
        let mut words = vec![0_u64; ENTRY_SIZE / 8];
        let memory = words.as_mut_bytes();
        let header = InHeader {
            len,
            opcode: 1,
            unique: 6,
            nodeid: 1,
            uid: 0,
            gid: 0,
            pid: 0,
            total_extlen: 0,
            padding: 0,
        };
        memory[..40].copy_from_slice(header.as_bytes());
        memory[128..136].copy_from_slice(b"argument");
        memory[4096..4100].copy_from_slice(b"name");
        let account = Account { flags: 0, commit_id: 9, data_len, padding: 0, reserved: 0 };
        memory[256..288].copy_from_slice(account.as_bytes());
        words
    }

    #[test]
    fn a_request_is_put_together() {
        let words = entry(40 + 8 + 4, 4);
        let memory = words.as_bytes();
        let request = Request::parse(memory).unwrap();
        assert_eq!((commit_id(memory), unique(memory), request.data_len()), (9, 6, 4));
        let mut message = vec![1; 3];
        request.compose(memory, &mut message);
        assert_eq!((&message[..40], &message[40..]), (&memory[..40], &b"argumentname"[..]));
    }

    #[test]
    fn lengths_that_make_no_sense_are_refused() {
        for (len, data_len) in [(39, 0), (40, 1), (0, 0), (40 + 129, 0), (u32::MAX, 4), (u32::MAX, u32::MAX)]
        {
            assert!(Request::parse(entry(len, data_len).as_bytes()).is_none(), "{len} {data_len}");
        }
        assert!(Request::parse(&entry(48, 4).as_bytes()[..287]).is_none());
        let largest = 40 + 128 + DATA_SIZE as u32;
        assert!(Request::parse(entry(largest, DATA_SIZE as u32).as_bytes()).is_some());
        assert!(Request::parse(entry(largest, DATA_SIZE as u32 + 1).as_bytes()).is_none());
    }

    #[test]
    fn an_answer_has_its_place() {
        let mut words = entry(52, 4);
        let memory = words.as_mut_bytes();
        let header = OutHeader::data(6, 5);
        answer(memory, &header);
        assert_eq!(&memory[..16], header.as_bytes());
        assert_eq!((&memory[264..272], &memory[272..276]), (9_u64.as_bytes(), 5_u32.as_bytes()));
    }
}
