//! A source that is hashed as it is read.

use std::io::{self, Read};

use storage::digest::{Digest, DigestAlgorithm, Hasher};

/// Reads `R` and hashes what was read.
pub struct Hashed<R> {
    input: R,
    hasher: Hasher,
    len: u64,
}

impl<R> Hashed<R> {
    /// Hashes `input` with `algorithm`.
    pub fn new(input: R, algorithm: DigestAlgorithm) -> Self {
        Self { input, hasher: algorithm.hasher(), len: 0 }
    }

    /// Digest and number of the bytes that were read.
    pub fn finish(self) -> (Digest, u64) {
        (self.hasher.finish(), self.len)
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.hasher.update(&buffer[..len]);
        self.len += len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_what_was_read() {
        for algorithm in [DigestAlgorithm::Sha256, DigestAlgorithm::Blake3] {
            let mut hashed = Hashed::new(&b"read and left"[..], algorithm);
            let mut read = [0; 4];
            hashed.read_exact(&mut read).unwrap();
            assert_eq!(hashed.finish(), (algorithm.digest(b"read"), 4));
        }
    }
}
