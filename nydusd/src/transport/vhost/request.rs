//! One request of a guest.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::ring::{Flights, Ticket};

/// A piece of the guest's memory, not known to be there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub address: GuestAddress,
    pub len: u32,
}

/// A request that was taken from a ring. It is given back once: with an answer, or empty when it is dropped.
pub(crate) struct Request {
    flights: Arc<Flights>,
    /// `None` once it was given back.
    ticket: Option<Ticket>,
    memory: Arc<GuestMemoryMmap>,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Request {
    pub(super) fn new(
        flights: Arc<Flights>,
        ticket: Ticket,
        memory: Arc<GuestMemoryMmap>,
        readable: Vec<Segment>,
        writable: Vec<Segment>,
    ) -> Self {
        Self { flights, ticket: Some(ticket), memory, readable, writable }
    }

    /// Bytes that the guest wrote.
    pub fn readable(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Bytes of room for the answer.
    pub fn writable(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Copies all that the guest wrote to `bytes`.
    ///
    /// # Errors
    /// It is more than `most` bytes, or not all of it is in the guest's memory.
    pub fn copy_to(&self, bytes: &mut Vec<u8>, most: usize) -> io::Result<()> {
        bytes.clear();
        if self.readable() > most as u64 {
            return Err(io::Error::other(format!(
                "a request of {} bytes; {most} are allowed",
                self.readable()
            )));
        }
        for segment in &self.readable {
            let begin = bytes.len();
            bytes.resize(begin + segment.len as usize, 0);
            self.memory.read_slice(&mut bytes[begin..], segment.address).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Gives it back with `parts` as the answer, one after the other.
    ///
    /// # Errors
    /// There is no room for them, or it is not in the guest's memory: it is given back empty.
    pub fn answer(self, parts: &[&[u8]]) -> io::Result<()> {
        self.give(|request| request.write(0, parts))
    }

    /// Gives it back with `begin` where its room for an answer begins, and `end` where that ends. What is between is left
    /// as it is.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn answer_around(self, begin: &[u8], end: &[u8]) -> io::Result<()> {
        self.give(|request| {
            let room = request.writable();
            let at = room.checked_sub(end.len() as u64).filter(|at| *at >= begin.len() as u64);
            let at = at.ok_or_else(|| io::Error::other(format!("room for {room} bytes")))?;
            request.write(0, &[begin])?;
            request.write(at, &[end])?;
            Ok(u32::try_from(room).unwrap_or(u32::MAX))
        })
    }

    /// Gives it back; `write` says how many bytes of its room have an answer.
    fn give(mut self, write: impl FnOnce(&Self) -> io::Result<u32>) -> io::Result<()> {
        let Some(ticket) = self.ticket.take() else { return Ok(()) };
        let mut written = Ok(0);
        self.flights.complete(ticket, &self.memory, || {
            written = write(&self);
            *written.as_ref().unwrap_or(&0)
        });
        written.map(drop)
    }

    /// Writes from byte `skip` of its room on; how many bytes those are.
    fn write(&self, mut skip: u64, parts: &[&[u8]]) -> io::Result<u32> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).map_err(io::Error::other)?;
        if skip.saturating_add(len.into()) > self.writable() {
            let room = self.writable();
            return Err(io::Error::other(format!("an answer of {len} bytes, and room for {room}")));
        }
        let mut segments = self.writable.iter().copied();
        let mut room = Segment { address: GuestAddress(0), len: 0 };
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                if room.len == 0 {
                    // There is enough.
                    let Some(next) = segments.next() else { break };
                    let skipped = skip.min(next.len.into());
                    skip -= skipped;
                    // An address that overflows is nobody's, and is refused when it is written to.
                    room.address = GuestAddress(next.address.0.saturating_add(skipped));
                    room.len = next.len - skipped as u32;
                    continue;
                }
                let count = rest.len().min(room.len as usize);
                self.memory.write_slice(&rest[..count], room.address).map_err(io::Error::other)?;
                // It was there to be written to, so it does not overflow; nor does what is left.
                room.address = GuestAddress(room.address.0.wrapping_add(count as u64));
                room.len -= count as u32;
                rest = &rest[count..];
            }
        }
        Ok(len)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.flights.complete(ticket, &self.memory, || 0);
        }
    }
}
