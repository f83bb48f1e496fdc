//! A source that is read and, on a thread of its own, hashed.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use storage::digest::{Digest, DigestAlgorithm};

use crate::{Error, ErrorKind, Result};

/// Bytes read at once.
const PIECE: usize = 256 << 10;
/// Pieces on their way; the reader waits when all of them wait to be hashed.
const PIECES: usize = 4;

/// Bytes in a buffer that is used again, of which the first `len` count.
struct Piece {
    bytes: Box<[u8]>,
    len: usize,
}

/// Reads `R` and hashes what was read.
pub struct Hashed<R> {
    input: R,
    piece: Option<Arc<Piece>>,
    /// What of the piece was taken.
    at: usize,
    len: u64,
    /// One that could not be filled.
    spare: Option<Piece>,
    made: usize,
    to_hash: Sender<Arc<Piece>>,
    hashed: Receiver<Arc<Piece>>,
    thread: JoinHandle<Digest>,
}

impl<R: Read> Hashed<R> {
    /// Reads and hashes `input` with `algorithm`.
    ///
    /// # Errors
    /// `Io`: no thread can be made.
    pub fn new(input: R, algorithm: DigestAlgorithm) -> Result<Self> {
        let (to_hash, pieces) = channel::<Arc<Piece>>();
        let (done, hashed) = channel();
        let hash = move || {
            let mut hasher = algorithm.hasher();
            for piece in pieces {
                hasher.update(&piece.bytes[..piece.len]);
                // Nobody takes it back any more when the last pieces are hashed.
                let _ = done.send(piece);
            }
            hasher.finish()
        };
        let thread = std::thread::Builder::new()
            .name("build-hash".into())
            .spawn(hash)
            .map_err(|e| Error::io("start a thread that hashes the source", e))?;
        Ok(Self { input, piece: None, at: 0, len: 0, spare: None, made: 0, to_hash, hashed, thread })
    }

    /// Digest and number of the bytes that were read.
    ///
    /// # Errors
    /// `Cancelled`: the thread has panicked.
    pub fn finish(self) -> Result<(Digest, u64)> {
        drop(self.to_hash);
        let digest = self.thread.join().map_err(|_| gone())?;
        Ok((digest, self.len))
    }

    /// A piece that nobody else uses.
    fn free_piece(&mut self) -> io::Result<Piece> {
        self.piece = None;
        if let Some(spare) = self.spare.take() {
            return Ok(spare);
        }
        if self.made < PIECES {
            self.made += 1;
            return Ok(Piece { bytes: vec![0; PIECE].into(), len: 0 });
        }
        let piece = self.hashed.recv().map_err(|_| gone().into_io())?;
        // Both sides have let go of it.
        Arc::into_inner(piece).ok_or_else(|| gone().into_io())
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Cancelled, "the thread that hashes the source has ended")
}

impl<R: Read> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let left = self.piece.as_ref().map_or(0, |piece| piece.len - self.at);
        if left == 0 {
            let mut piece = self.free_piece()?;
            piece.len = loop {
                match self.input.read(&mut piece.bytes) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Ok(len) => break len,
                    Err(e) => {
                        self.spare = Some(piece);
                        return Err(e);
                    }
                }
            };
            self.len += piece.len as u64;
            let piece = Arc::new(piece);
            self.to_hash.send(Arc::clone(&piece)).map_err(|_| gone().into_io())?;
            self.piece = Some(piece);
            self.at = 0;
        }
        Ok(self.piece.as_ref().map_or(&[], |piece| &piece.bytes[self.at..piece.len]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

impl<R: Read> Read for Hashed<R> {
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
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = buffer.len().min(self.0.len()).min(70_001);
            let (now, rest) = self.0.split_at(len);
            buffer[..len].copy_from_slice(now);
            self.0 = rest;
            Ok(len)
        }
    }

    #[test]
    fn the_digest_is_that_of_the_bytes_however_they_come() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        for algorithm in [DigestAlgorithm::Sha256, DigestAlgorithm::Blake3] {
            let mut hashed = Hashed::new(Slow(&bytes), algorithm).unwrap();
            let mut read = Vec::new();
            hashed.read_to_end(&mut read).unwrap();
            assert!(read == bytes);
            assert_eq!(hashed.finish().unwrap(), (algorithm.digest(&bytes), bytes.len() as u64));
        }
    }

    #[test]
    fn an_error_of_the_source_comes_through_and_ends_the_thread() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut hashed = Hashed::new(Broken, DigestAlgorithm::Sha256).unwrap();
        for _ in 0..3 * PIECES {
            assert_eq!(hashed.fill_buf().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
        assert_eq!(hashed.finish().unwrap().1, 0);
    }
}
