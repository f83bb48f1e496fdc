//! A source that a thread of its own reads, ahead of whoever takes the bytes.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::{Error, ErrorKind, Result};

/// Bytes read at once.
const PIECE: usize = 256 << 10;

/// Bytes in a buffer that is used again, of which the first `len` count; none at the end of the source.
struct Piece {
    bytes: Box<[u8]>,
    len: usize,
}

/// The bytes of a source, in order.
///
/// Dropped before the end, it leaves its thread alone, which ends with the read that it is in: that of a FIFO
/// whose writer is silent may take as long as the process.
pub struct Ahead<R> {
    piece: Option<Piece>,
    /// What of the piece was taken.
    at: usize,
    to_fill: Sender<Piece>,
    filled: Receiver<io::Result<Piece>>,
    thread: JoinHandle<R>,
}

impl<R: Read + Send + 'static> Ahead<R> {
    /// Reads `input`, up to `pieces` of 256 KiB ahead, which is at least 1; `name` is the thread's, in at most 15 bytes.
    ///
    /// # Errors
    /// `Io`: no thread can be made.
    pub fn new(mut input: R, name: &str, pieces: usize) -> Result<Self> {
        let (to_fill, empty) = channel::<Piece>();
        let (done, filled) = channel();
        for _ in 0..pieces {
            // The other end is still here.
            let _ = to_fill.send(Piece { bytes: vec![0; PIECE].into(), len: 0 });
        }
        let read = move || {
            for mut piece in empty {
                let read = fill(&mut input, &mut piece);
                let is_last = read.is_err() || piece.len == 0;
                if done.send(read.map(|()| piece)).is_err() || is_last {
                    break;
                }
            }
            input
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(read)
            .map_err(|e| Error::io("start a thread that reads a source", e))?;
        Ok(Self { piece: None, at: 0, to_fill, filled, thread })
    }

    /// The source, of which all was read, also what nobody took.
    ///
    /// # Errors
    /// `Io`: reading the rest. `Cancelled`: the thread has panicked.
    pub fn finish(mut self) -> Result<R> {
        io::copy(&mut self, &mut io::sink()).map_err(|e| Error::io("read the rest of the source", e))?;
        self.thread.join().map_err(|_| gone())
    }
}

/// Reads what comes next.
fn fill(input: &mut impl Read, piece: &mut Piece) -> io::Result<()> {
    piece.len = 0;
    loop {
        match input.read(&mut piece.bytes) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            read => return read.map(|len| piece.len = len),
        }
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Cancelled, "the thread that reads the source has ended")
}

impl<R> BufRead for Ahead<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let is_used_up = |piece: &mut Piece| piece.len > 0 && piece.len == self.at;
        if let Some(piece) = self.piece.take_if(is_used_up) {
            // At the end of the source nobody fills it.
            let _ = self.to_fill.send(piece);
        }
        if self.piece.is_none() {
            self.piece = Some(self.filled.recv().map_err(|_| gone().into_io())??);
            self.at = 0;
        }
        Ok(self.piece.as_ref().map_or(&[], |piece| &piece.bytes[self.at..piece.len]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

impl<R> Read for Ahead<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let len = available.len().min(buffer.len());
        buffer[..len].copy_from_slice(&available[..len]);
        self.consume(len);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes at a time.
    struct Slow(Vec<u8>, usize);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let rest = &self.0[self.1..];
            let len = buffer.len().min(rest.len()).min(70_001);
            buffer[..len].copy_from_slice(&rest[..len]);
            self.1 += len;
            Ok(len)
        }
    }

    #[test]
    fn bytes_come_in_order_and_the_rest_is_read_at_the_end() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        for pieces in [1, 4] {
            for taken in [0, 1, 1_000_000, bytes.len()] {
                let mut ahead = Ahead::new(Slow(bytes.clone(), 0), "slow", pieces).unwrap();
                let mut read = Vec::new();
                ahead.by_ref().take(taken as u64).read_to_end(&mut read).unwrap();
                assert!(read == bytes[..taken]);
                assert_eq!(ahead.finish().unwrap().1, bytes.len());
            }
            let mut ahead = Ahead::new(Slow(bytes.clone(), 0), "slow", pieces).unwrap();
            ahead.read_to_end(&mut Vec::new()).unwrap();
            assert_eq!(ahead.fill_buf().unwrap(), b"", "the end stays the end");
        }
    }

    #[test]
    fn an_error_of_the_source_comes_through_and_is_no_end() {
        struct Broken(bool);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                match std::mem::replace(&mut self.0, false) {
                    true => Ok(buffer.len()),
                    false => Err(io::ErrorKind::BrokenPipe.into()),
                }
            }
        }
        let mut ahead = Ahead::new(Broken(true), "broken", 4).unwrap();
        let error = io::copy(&mut ahead, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert!(ahead.fill_buf().is_err());
        assert!(ahead.finish().is_err());
        let error = Ahead::new(Broken(true), "broken", 1).unwrap().finish().err().unwrap();
        assert!(error.to_string().contains("rest of the source"), "{error}");
    }

    #[test]
    fn a_panic_of_the_source_is_an_error() {
        struct Panics;
        impl Read for Panics {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("for the test")
            }
        }
        assert!(Ahead::new(Panics, "panics", 4).unwrap().read(&mut [0]).is_err());
    }

    #[test]
    fn a_source_that_is_not_read_to_its_end_holds_nobody_up() {
        let (reader, writer) = io::pipe().unwrap();
        drop(Ahead::new(reader, "silent", 4).unwrap());
        drop(writer);
    }
}
