//! Streams of whole blobs: verified, read whole, or read by blocking code.

use std::io;

use bytes::{Buf as _, Bytes};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::runtime::Handle;

use crate::backend::ByteStream;
use crate::digest::TaggedDigest;
use crate::{Error, ErrorKind, Result};

/// Passes a blob's bytes on, and ends with an error unless they are `size` bytes with
/// `digest`. What has passed is good only once the stream has ended without one.
pub fn verified(stream: ByteStream, digest: TaggedDigest, size: u64) -> ByteStream {
    let supplier = stream.supplier();
    let state = (stream, Some(digest.algorithm.hasher()), 0u64);
    let checked =
        futures_util::stream::try_unfold(state, move |(mut stream, mut hasher, mut len)| async move {
            let corrupt = |why: String| Error::new(ErrorKind::Corrupt, format!("blob {digest}: {why}"));
            match stream.next().await.transpose()? {
                Some(piece) => {
                    len += piece.len() as u64;
                    if len > size {
                        return Err(corrupt(format!("more than the {size} bytes its descriptor says")));
                    }
                    if let Some(hasher) = &mut hasher {
                        hasher.update(&piece);
                    }
                    Ok(Some((piece, (stream, hasher, len))))
                }
                None if len != size => Err(corrupt(format!("{len} bytes, its descriptor says {size}"))),
                None => match hasher.take().map(crate::digest::Hasher::finish) {
                    Some(found) if found != digest.digest => {
                        Err(corrupt(format!("its bytes have digest {found}; nothing of it is used")))
                    }
                    _ => Ok(None),
                },
            }
        });
    ByteStream::new(supplier, checked)
}

/// Reads a stream to its end, at most `cap` bytes.
///
/// # Errors
/// Those of the stream; `Invalid`: it is longer.
pub async fn read_all(mut stream: ByteStream, cap: u64) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(piece) = stream.try_next().await? {
        if (all.len() + piece.len()) as u64 > cap {
            return Err(Error::new(ErrorKind::Invalid, format!("longer than the {cap} bytes accepted")));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// A stream read by blocking code, on a thread that is not the runtime's own.
pub struct BlockingReader {
    handle: Handle,
    stream: ByteStream,
    piece: Bytes,
}

impl BlockingReader {
    /// Reads `stream`, driven by the runtime behind `handle`.
    pub fn new(handle: Handle, stream: ByteStream) -> Self {
        Self { handle, stream, piece: Bytes::new() }
    }
}

impl io::Read for BlockingReader {
    /// Errors carry an [`Error`] of this crate inside.
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.handle.block_on(self.stream.next()) {
                Some(piece) => self.piece = piece.map_err(io::Error::other)?,
                None => return Ok(0),
            }
        }
        let len = dst.len().min(self.piece.len());
        dst[..len].copy_from_slice(&self.piece[..len]);
        self.piece.advance(len);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Supplier;
    use crate::digest::DigestAlgorithm;

    #[tokio::test]
    async fn only_the_right_bytes_end_well() {
        let algorithm = DigestAlgorithm::Sha256;
        let digest = TaggedDigest { algorithm, digest: algorithm.digest(b"hello world") };
        let run = |pieces: &'static [&'static [u8]], size| async move {
            let stream = futures_util::stream::iter(pieces.iter().map(|p| Ok(Bytes::from_static(p))));
            read_all(verified(ByteStream::new(Supplier::Local, stream), digest, size), 100).await
        };
        assert_eq!(run(&[b"hello ", b"", b"world"], 11).await.unwrap(), b"hello world");
        const BAD: [(&[&[u8]], u64); 4] =
            [(&[b"hello worlx"], 11), (&[b"hello"], 11), (&[b"hello world", b"!"], 11), (&[], 11)];
        for (pieces, size) in BAD {
            assert_eq!(run(pieces, size).await.unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
