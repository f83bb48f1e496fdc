//! FUSE requests through a device's rings.

use anyhow::{Result, ensure};
use vm_memory::{Bytes, GuestAddress};

use super::monitor::{Descriptor, Guest, NEXT, WRITE};

/// Bytes of a request's header.
const HEADER: usize = 40;
/// Bytes of an answer's header.
pub const ANSWER: usize = 16;

/// FUSE_LOOKUP (linux/fuse.h).
pub const LOOKUP: u32 = 1;
/// FUSE_GETATTR.
pub const GETATTR: u32 = 3;
/// FUSE_READ.
pub const READ: u32 = 15;
/// FUSE_INIT.
pub const INIT: u32 = 26;

/// A whole request.
pub fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(len.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// The body of FUSE_INIT of Linux 6.1.
pub fn init() -> Vec<u8> {
    [7_u32, 38, 128 << 10, 0x73ff_fffb, 0].iter().flat_map(|word| word.to_le_bytes()).chain([0; 44]).collect()
}

/// The body of FUSE_READ.
pub fn read(offset: u64, size: u32) -> Vec<u8> {
    let mut body = vec![0; 40];
    body[8..16].copy_from_slice(&offset.to_le_bytes());
    body[16..20].copy_from_slice(&size.to_le_bytes());
    body
}

/// An answer.
#[derive(PartialEq, Eq)]
pub struct Answer {
    /// 0 or a negative errno.
    pub error: i32,
    /// The request's number.
    pub unique: u64,
    /// What follows.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let begin = &self.data[..self.data.len().min(64)];
        write!(f, "{} to {}, {} bytes: {begin:?}", self.error, self.unique, self.data.len())
    }
}

/// A guest's driver. Each request has a place of its own in memory, in which its answer is looked for.
pub struct Driver {
    /// Its memory and rings.
    pub guest: Guest,
    /// The ring that requests go to.
    ring: usize,
    next: u64,
}

/// Places for requests at once, and the bytes of each.
const PLACES: u64 = 32;
const PLACE: u64 = 300 << 10;

impl Driver {
    /// For the first ring of requests of a guest with so many rings.
    pub fn new(rings: usize) -> Result<Self> {
        Ok(Self { guest: Guest::new(rings)?, ring: 1, next: 1 })
    }

    fn place(&self, unique: u64) -> u64 {
        self.guest.heap() + unique % PLACES * PLACE
    }

    /// Sends a request with room for `room` bytes of data; its number.
    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Result<u64> {
        let unique = self.next;
        self.next += 1;
        let bytes = request(opcode, unique, node, body);
        let place = self.place(unique);
        ensure!(bytes.len() as u64 <= PLACE / 2 && u64::from(room) < PLACE / 2);
        self.guest.memory.write_slice(&bytes, GuestAddress(place))?;
        let head = u16::try_from(unique % PLACES)? * 2;
        let answer = place + PLACE / 2;
        self.guest.memory.write_slice(&[0; ANSWER], GuestAddress(answer))?;
        let len = u32::try_from(bytes.len())?;
        let first = Descriptor { address: place, len, flags: NEXT, next: head + 1 };
        let second = Descriptor { address: answer, len: room + ANSWER as u32, flags: WRITE, next: 0 };
        self.guest.describe(self.ring, head, first)?;
        self.guest.describe(self.ring, head + 1, second)?;
        self.guest.offer(self.ring, head)?;
        self.guest.kick(self.ring)?;
        Ok(unique)
    }

    /// The next answer.
    pub fn receive(&mut self) -> Result<Answer> {
        let (head, len) = self.guest.take(self.ring)?;
        let place = self.guest.heap() + u64::from(head / 2) * PLACE + PLACE / 2;
        let mut bytes = vec![0; len as usize];
        self.guest.memory.read_slice(&mut bytes, GuestAddress(place))?;
        ensure!(bytes.len() >= ANSWER, "an answer of {len} bytes to chain {head}");
        let word = |at: usize| -> Result<u32> { Ok(u32::from_le_bytes(bytes[at..at + 4].try_into()?)) };
        ensure!(word(0)? == len, "an answer of {len} bytes says {}", word(0)?);
        let unique = u64::from_le_bytes(bytes[8..16].try_into()?);
        Ok(Answer { error: word(4)?.cast_signed(), unique, data: bytes[ANSWER..].to_vec() })
    }

    /// Sends a request, and waits for its answer.
    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Result<Answer> {
        let unique = self.send(opcode, node, body, room)?;
        let answer = self.receive()?;
        ensure!(answer.unique == unique, "{answer:?} to request {unique}");
        Ok(answer)
    }

    /// The node that `name` in `parent` is.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64> {
        let answer = self.ask(LOOKUP, parent, &[name.as_bytes(), b"\0"].concat(), 128)?;
        ensure!(answer.error == 0, "{name}: {}", answer.error);
        Ok(u64::from_le_bytes(answer.data[..8].try_into()?))
    }
}
