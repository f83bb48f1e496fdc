//! Bytes of files of an image that is being converted, read back from its spooled blobs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;

use storage::codec::{Codec, decompress};

use crate::chunks::BuiltContent;
use crate::content::{ChunkId, ChunkSource as _};
use crate::tree::FileId;

/// The blobs of one build, one a layer, not yet at their target.
pub struct Contents<'a> {
    chunks: &'a BuiltContent,
    blobs: Vec<File>,
    codec: Codec,
    chunk_size: u32,
}

impl<'a> Contents<'a> {
    /// Files made of `chunks`, which lie in `blobs`.
    pub fn new(chunks: &'a BuiltContent, blobs: Vec<File>, codec: Codec, chunk_size: u32) -> Self {
        Self { chunks, blobs, codec, chunk_size }
    }

    /// The bytes of `file`, which is `size` bytes long.
    pub(super) fn open(&self, file: FileId, size: u64) -> FileReader<'_> {
        FileReader { contents: self, chunks: self.chunks.file_chunks(file), size, at: 0, last: None }
    }

    fn chunk(&self, id: ChunkId) -> io::Result<Vec<u8>> {
        let chunk = self.chunks.chunks.get(id);
        let blob = self.blobs.get(usize::from(chunk.layer.0)).ok_or(io::ErrorKind::NotFound)?;
        let mut stored = vec![0; chunk.compressed_size as usize];
        blob.read_exact_at(&mut stored, chunk.compressed_offset)?;
        if !chunk.is_compressed() {
            return Ok(stored);
        }
        let mut bytes = vec![0; chunk.uncompressed_size as usize];
        decompress(self.codec, &stored, &mut bytes).map_err(io::Error::other)?;
        Ok(bytes)
    }
}

/// One file, read from front to back or here and there. Keeps one chunk in memory.
pub(super) struct FileReader<'a> {
    contents: &'a Contents<'a>,
    chunks: &'a [ChunkId],
    size: u64,
    at: u64,
    /// The chunk read last and its place in the file.
    last: Option<(usize, Vec<u8>)>,
}

impl Read for FileReader<'_> {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        let chunk_size = u64::from(self.contents.chunk_size);
        // A file has less than 2^32 chunks.
        let place = (self.at / chunk_size) as usize;
        if self.at >= self.size || dst.is_empty() {
            return Ok(0);
        }
        if self.last.as_ref().is_none_or(|(at, _)| *at != place) {
            let id = self.chunks.get(place).ok_or(io::ErrorKind::UnexpectedEof)?;
            self.last = Some((place, self.contents.chunk(*id)?));
        }
        let bytes = self.last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let rest = bytes.get((self.at % chunk_size) as usize..).unwrap_or_default();
        let n = rest.len().min(dst.len());
        dst[..n].copy_from_slice(&rest[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for FileReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(delta) => self.size.checked_add_signed(delta),
            SeekFrom::Current(delta) => self.at.checked_add_signed(delta),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
