//! The front of the pipeline: cuts files into chunks and fills batches.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use storage::digest::Digest;

use super::Placement;
use super::batch::{Batch, Buffer, Piece, PieceState, Unit};
use super::hub::{Event, Hub, Job};
use crate::chunks::FileRow;
use crate::tree::{FileId, LayerIndex};
use crate::{Error, ErrorKind, Result};

/// Chunks of one file; the bootstrap takes 8 bytes for each.
const MAX_FILE_CHUNKS: u64 = 1 << 27;

/// A stretch of a sparse file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// One layer of a build, to be fed file by file by one thread and then [finished](Self::finish).
///
/// Dropping a layer unfinished fails the build: its data would be missing.
pub struct Layer {
    hub: Arc<Hub>,
    index: LayerIndex,
    /// The batch being filled.
    buffer: Option<Buffer>,
    /// Batches handed over so far.
    batches: u64,
    files: Vec<FileRow>,
    /// Chunks so far.
    chunks: u64,
    /// A full chunk of zeros went into this layer with its bytes; further ones need none.
    zero_seen: bool,
    /// Nothing more to tell the hub when this is dropped.
    finished: bool,
    /// Where the file that is added lies in the decoded source.
    origin: u64,
    /// The file that is added may share a unit with others.
    shares: bool,
    /// What the last file failed with: the reason for giving the layer up.
    error: Option<Error>,
}

impl Layer {
    pub(super) fn new(hub: Arc<Hub>, index: LayerIndex) -> Self {
        Self {
            hub,
            index,
            buffer: None,
            batches: 0,
            files: Vec::new(),
            chunks: 0,
            zero_seen: false,
            finished: false,
            origin: 0,
            shares: false,
            error: None,
        }
    }

    /// Which layer of the build this is.
    pub fn index(&self) -> LayerIndex {
        self.index
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u32 {
        self.hub.options.chunk_size
    }

    /// Adds a regular file: reads exactly `size` bytes from `data`, which must end there.
    ///
    /// Blocks while the build has no buffer free for this layer.
    ///
    /// # Errors
    /// `Mismatch`: `data` is shorter or longer than `size`. `Io`: reading failed. `Limit`: too many
    /// chunks. Otherwise the first error of the build. The caller names the file, see
    /// [`Error::context`]. After an error the layer can only be dropped or [aborted](Self::abort).
    pub fn add_file(&mut self, data: &mut dyn Read, size: u64) -> Result<FileId> {
        let all = [Extent { offset: 0, len: size }];
        self.add(data, size, &all).inspect_err(|error| self.error = Some(error.clone()))
    }

    /// [`Self::add_file`] for a file whose data begins at byte `origin` of the decoded source, and
    /// may stay there.
    ///
    /// # Errors
    /// As [`Self::add_file`].
    pub fn add_file_at(&mut self, data: &mut dyn Read, size: u64, origin: u64) -> Result<FileId> {
        self.origin = origin;
        self.add_file(data, size)
    }

    /// Adds a regular file of which only `extents` have data; the rest is zeros. `data` yields the
    /// bytes of the extents, one after another, and must end there.
    ///
    /// # Errors
    /// As [`Self::add_file`]; `Corrupt`: the extents overlap, are out of order, or pass `size`.
    /// `Unsupported`: data that stays in the source does not lie there as the file has it.
    pub fn add_sparse_file(&mut self, data: &mut dyn Read, size: u64, extents: &[Extent]) -> Result<FileId> {
        let added = match self.hub.options.placement {
            Placement::Blob => self.add(data, size, extents),
            Placement::Source | Placement::DecodedSpace => Err(Error::new(
                ErrorKind::Unsupported,
                "a sparse file does not lie in its archive as it is, so nothing can refer to it; build the layer \
                 with --type tar-rafs",
            )),
        };
        added.inspect_err(|error| self.error = Some(error.clone()))
    }

    /// Fails the build with `error` and returns its first failure, which is `error` unless another
    /// part of the build failed before (and perhaps caused it).
    pub fn abort(mut self, error: Error) -> Error {
        self.finished = true;
        self.hub.fail(error.clone());
        self.hub.failure().unwrap_or(error)
    }

    /// Ends the layer. Its data may still be on the way; [`super::Session::finish`] waits for it.
    ///
    /// # Errors
    /// The first error of the build, if it has failed already.
    pub fn finish(mut self) -> Result<()> {
        if let Some(error) = self.error.take() {
            return Err(self.abort(error));
        }
        self.flush();
        self.finished = true;
        let (layer, batches) = (self.index, self.batches);
        self.hub.post(Event::Closed { layer, batches, files: std::mem::take(&mut self.files) });
        self.hub.check()
    }

    fn add(&mut self, data: &mut dyn Read, size: u64, extents: &[Extent]) -> Result<FileId> {
        check_extents(size, extents)?;
        let chunk_size = u64::from(self.hub.options.chunk_size);
        let limit = |what: &str| Error::new(ErrorKind::Limit, format!("{what}; use a larger chunk size"));
        if size.div_ceil(chunk_size) > MAX_FILE_CHUNKS {
            return Err(limit(&format!("a file of {size} bytes has more than {MAX_FILE_CHUNKS} chunks")));
        }
        let (Ok(index), Ok(first)) = (u32::try_from(self.files.len()), u32::try_from(self.chunks)) else {
            return Err(limit("a layer of more than 2^32 files or chunks"));
        };
        // As the reference builder chooses (rafs-v6 section 8.6).
        self.shares = size <= chunk_size && size < u64::from(self.hub.options.batch_size / 2);
        let mut extents = extents;
        let mut start = 0;
        while start < size {
            let end = size.min(start + chunk_size);
            // Extents that end before this chunk are done with.
            while extents.first().is_some_and(|e| e.offset + e.len <= start) {
                extents = &extents[1..];
            }
            let is_hole = extents.first().is_none_or(|e| e.offset >= end);
            if is_hole && end - start == chunk_size {
                self.add_zeros()?;
            } else {
                self.add_chunk(data, start..end, extents)?;
            }
            start = end;
        }
        expect_end(data, size)?;
        self.files.push(FileRow { first, size });
        Ok(FileId { layer: self.index, index })
    }

    /// Reads one chunk, the bytes `range` of its file, into the batch.
    fn add_chunk(&mut self, data: &mut dyn Read, range: Range<u64>, extents: &[Extent]) -> Result<()> {
        // At most the chunk size.
        let len = (range.end - range.start) as usize;
        let (origin, shares) = (self.origin.saturating_add(range.start), self.shares);
        let buffer = self.room_for(len)?;
        let offset = buffer.filled;
        let bytes = &mut buffer.bytes[offset..offset + len];
        let mut filled = 0;
        for extent in extents.iter().take_while(|e| e.offset < range.end) {
            let from = extent.offset.max(range.start);
            let to = (extent.offset + extent.len).min(range.end);
            let (from, to) = ((from - range.start) as usize, (to - range.start) as usize);
            bytes[filled..from].fill(0);
            read_full(data, &mut bytes[from..to], range.start + from as u64)?;
            filled = to;
        }
        bytes[filled..].fill(0);
        buffer.filled += len;
        buffer.pieces.push(Piece {
            offset: offset as u32,
            len: len as u32,
            digest: Digest([0; 32]),
            crc32: 0,
            origin,
            shares,
            state: PieceState::Read,
        });
        self.chunks += 1;
        Ok(())
    }

    /// Adds a full chunk of zeros, with its bytes only if it is the first of this layer.
    fn add_zeros(&mut self) -> Result<()> {
        let len = self.hub.options.chunk_size;
        if !self.zero_seen {
            self.add_chunk(&mut std::io::empty(), 0..u64::from(len), &[])?;
            self.zero_seen = true;
            return Ok(());
        }
        let (digest, crc32) = self.hub.zero_chunk();
        let buffer = self.room_for(0)?;
        buffer.pieces.push(Piece {
            offset: 0,
            len,
            digest,
            crc32,
            origin: 0,
            shares: false,
            state: PieceState::Hashed,
        });
        self.chunks += 1;
        Ok(())
    }

    /// The batch being filled, with room for one more chunk of `len` bytes.
    fn room_for(&mut self, len: usize) -> Result<&mut Buffer> {
        if self.buffer.as_ref().is_some_and(|b| !b.has_room(len)) {
            self.flush();
        }
        let buffer = match self.buffer.take() {
            Some(buffer) => buffer,
            None => self.hub.acquire(self.index)?,
        };
        Ok(self.buffer.insert(buffer))
    }

    fn flush(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.hub.submit(Job::Hash(Batch {
                layer: self.index,
                number: self.batches,
                buffer,
                carried: Unit::default(),
                packed: None,
            }));
            self.batches += 1;
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if !self.finished {
            let given_up =
                || Error::new(ErrorKind::Cancelled, format!("layer {} was given up", self.index.0));
            self.hub.fail(self.error.take().unwrap_or_else(given_up));
        }
    }
}

fn check_extents(size: u64, extents: &[Extent]) -> Result<()> {
    let mut end = 0;
    for extent in extents {
        match extent.offset.checked_add(extent.len) {
            Some(next) if extent.offset >= end && next <= size => end = next,
            _ => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "data at {}+{} of a sparse file of {size} bytes overlaps what precedes it or passes the end",
                        extent.offset, extent.len
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Fills `bytes`; `at` is their place in the file, for the message.
fn read_full(data: &mut dyn Read, bytes: &mut [u8], at: u64) -> Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        match data.read(&mut bytes[filled..]) {
            Ok(0) => {
                return Err(Error::new(
                    ErrorKind::Mismatch,
                    format!("data ends at byte {}, before the announced size", at + filled as u64),
                ));
            }
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(format!("read at byte {}", at + filled as u64), e)),
        }
    }
    Ok(())
}

fn expect_end(data: &mut dyn Read, size: u64) -> Result<()> {
    loop {
        match data.read(&mut [0]) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                return Err(Error::new(
                    ErrorKind::Mismatch,
                    format!("data goes on after the announced {size} bytes"),
                ));
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(format!("read at byte {size}"), e)),
        }
    }
}
