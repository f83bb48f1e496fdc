//! A gzip file read once: its decoded bytes, and where decoding can begin again.
//!
//! ```text
//! gzip   |==|=====|===|======|====|===| deflate blocks
//!        ^ start       ^ start      ^ start      every 4 MiB decoded, at the next block
//! slice  [-------------+--]
//!                      [------------+---]        to the end of the last chunk that begins in it
//! ```
//!
//! A start keeps the 32 KiB decoded before it. Slices are made of starts when all chunks are known,
//! so nothing but the stream itself decides where they begin.

use std::env::temp_dir;
use std::io::{self, BufRead, Read, Seek as _, Write as _};

use rafs::bootstrap::Buffer;
use rafs::format::blob_context::ZranSlice;
use rafs::format::limits::{MAX_CHUNK_SIZE, MAX_CONTEXT_SIZE};
use storage::inflate::{Boundary, GzipBlocks, MAX_DICTIONARY};
use tempfile::SpooledTempFile;
use zerocopy::IntoBytes as _;
use zerocopy::byteorder::little_endian::{U32, U64};

use crate::{Error, ErrorKind, Result};

/// Decoded bytes between starts, at least. A start costs 32 KiB of dictionary before compression,
/// a slice is what a first read of any of its chunks fetches: some 1.5 MiB of an ordinary layer.
const STRIDE: u64 = 4 << 20;
/// Dictionaries of layers up to 1 GiB decoded stay in memory, those of others go to a temporary file.
const DICTIONARIES_IN_MEMORY: usize = 8 << 20;
/// Most starts: readers hold a context of 512 MiB at most.
const MAX_STARTS: usize = (MAX_CONTEXT_SIZE / MAX_DICTIONARY as u64) as usize;
/// Decoded bytes held for the reader.
const OUTPUT: usize = 256 << 10;
/// Largest stored size that a context entry can state.
const MAX_HINT: u64 = (1 << 24) - 1;

/// Decodes a gzip file and notes where decoding can begin.
pub struct GzipIndexer<R> {
    input: R,
    blocks: GzipBlocks,
    /// The last 32 KiB that were handed out, and what is still to be.
    decoded: Box<[u8]>,
    decoded_at: usize,
    decoded_end: usize,
    ended: bool,
    /// Only zeros may follow.
    padded: bool,
    consumed: u64,
    produced: u64,
    index: GzipIndex,
}

/// Where decoding can begin.
pub struct GzipIndex {
    /// With the length of the dictionary of each.
    starts: Vec<(Boundary, usize)>,
    /// Dictionaries of all starts, one behind the other.
    dictionaries: SpooledTempFile,
    /// (decoded, stored) bytes up to points in between, ascending.
    marks: Vec<(u64, u64)>,
}

/// The slices that the chunks of a build lie in.
pub struct Slices {
    index: GzipIndex,
    /// End of each start's slice, decoded; where it begins if no chunk lies in it.
    ends: Vec<u64>,
    /// Number of each start's slice among those that have chunks.
    numbers: Vec<u32>,
}

impl<R: BufRead> GzipIndexer<R> {
    /// A decoder of `input` from its first byte.
    ///
    /// # Errors
    /// `Io`: out of memory.
    pub fn new(input: R) -> Result<Self> {
        Ok(Self {
            input,
            blocks: GzipBlocks::new()?,
            decoded: vec![0; MAX_DICTIONARY + OUTPUT].into(),
            decoded_at: 0,
            decoded_end: 0,
            ended: false,
            padded: false,
            consumed: 0,
            produced: 0,
            index: GzipIndex {
                starts: Vec::new(),
                dictionaries: SpooledTempFile::new(DICTIONARIES_IN_MEMORY),
                marks: Vec::new(),
            },
        })
    }

    /// What was found, and the input, which was read to its end if the decoded bytes were.
    pub fn finish(self) -> (GzipIndex, R) {
        (self.index, self.input)
    }

    /// Decodes the next bytes; none at the end of the file.
    fn fill(&mut self) -> io::Result<()> {
        let keep = self.decoded_end.min(MAX_DICTIONARY);
        self.decoded.copy_within(self.decoded_end - keep..self.decoded_end, 0);
        (self.decoded_at, self.decoded_end) = (keep, keep);
        while !self.ended && self.decoded_end < self.decoded.len() {
            let input = self.input.fill_buf()?;
            if input.is_empty() {
                self.ended = true;
                if !self.blocks.is_between_members() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                break;
            }
            // What pads a file behind its last member is nobody's, but zeros it must be.
            self.padded |= self.blocks.is_between_members() && self.produced > 0 && input[0] == 0;
            if self.padded {
                if input.iter().any(|&byte| byte != 0) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "data behind the padding of a gzip file",
                    ));
                }
                let len = input.len();
                self.input.consume(len);
                continue;
            }
            let room = &mut self.decoded[self.decoded_end..];
            // Where no start can be, blocks are of no interest. Whether one that begins where output
            // ends is seen depends on how the input came, so this ends before the first that counts.
            let far = match self.index.starts.last() {
                Some((last, _)) => (last.out_offset + STRIDE - 1).saturating_sub(self.produced),
                None => 0,
            };
            let step = match usize::try_from(far).unwrap_or(usize::MAX).min(room.len()) {
                0 => self.blocks.run(input, room),
                far => self.blocks.run_through(input, &mut room[..far]),
            }
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            self.input.consume(step.consumed);
            self.decoded_end += step.produced;
            self.consumed += step.consumed as u64;
            self.produced += step.produced as u64;
            if let Some(boundary) = step.boundary {
                self.begin(boundary)?;
            }
        }
        self.index.marks.push((self.produced, self.consumed));
        Ok(())
    }

    /// Notes a place where a block begins, if the last start is far enough away.
    fn begin(&mut self, boundary: Boundary) -> io::Result<()> {
        let last = self.index.starts.last();
        if last.is_some_and(|(last, _)| boundary.out_offset < last.out_offset + STRIDE) {
            return Ok(());
        }
        if self.index.starts.len() == MAX_STARTS {
            return Err(Error::limit("a layer of more than 64 GiB decoded can not be referred to").into_io());
        }
        let from = self.decoded_end.saturating_sub(MAX_DICTIONARY);
        let dictionary = &self.decoded[from..self.decoded_end];
        self.index.dictionaries.write_all(dictionary).map_err(|e| {
            Error::io(format!("write a temporary file in {}", temp_dir().display()), e).into_io()
        })?;
        self.index.starts.push((boundary, dictionary.len()));
        self.index.marks.push((boundary.out_offset, boundary.in_offset));
        Ok(())
    }
}

impl<R: BufRead> Read for GzipIndexer<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.decoded_at == self.decoded_end {
            self.fill()?;
        }
        let len = buffer.len().min(self.decoded_end - self.decoded_at);
        buffer[..len].copy_from_slice(&self.decoded[self.decoded_at..self.decoded_at + len]);
        self.decoded_at += len;
        Ok(len)
    }
}

impl GzipIndex {
    /// The slices that hold `chunks`: place in the decoded file and length of each.
    ///
    /// # Errors
    /// `Unsupported`: a block is so long that a slice with it would be larger than readers accept.
    pub fn slices(self, chunks: impl Iterator<Item = (u64, u32)>) -> Result<Slices> {
        let mut ends: Vec<u64> = self.starts.iter().map(|(start, _)| start.out_offset).collect();
        for (at, len) in chunks {
            let number = self.start_of(at)?;
            ends[number] = ends[number].max(at + u64::from(len));
        }
        let mut numbers = Vec::with_capacity(ends.len());
        let mut count = 0;
        for ((start, _), end) in self.starts.iter().zip(&ends) {
            let len = end - start.out_offset;
            if len == 0 {
                numbers.push(count);
                continue;
            }
            if len > u64::from(MAX_CHUNK_SIZE)
                || self.stored_up_to(*end).saturating_sub(start.in_offset) > MAX_HINT
            {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "the gzip data at {} can not be entered for {len} bytes, readers accept {MAX_CHUNK_SIZE}; build the \
                         layer with --type targz-rafs, or use a smaller chunk size",
                        start.in_offset
                    ),
                ));
            }
            numbers.push(count);
            count += 1;
        }
        Ok(Slices { index: self, ends, numbers })
    }

    fn start_of(&self, at: u64) -> Result<usize> {
        let behind = self.starts.partition_point(|(start, _)| start.out_offset <= at);
        behind.checked_sub(1).ok_or_else(|| Error::bad_source("gzip data without a first block"))
    }

    fn stored_up_to(&self, decoded: u64) -> u64 {
        stored_up_to(&self.marks, decoded)
    }

    /// Stored bytes that surely do not reach byte `decoded`.
    fn stored_before(&self, decoded: u64) -> u64 {
        let mark = self.marks.partition_point(|(out, _)| *out <= decoded);
        mark.checked_sub(1).map_or(0, |mark| self.marks[mark].1)
    }
}

/// Stored bytes that surely decode to all of the first `decoded` ones.
fn stored_up_to(marks: &[(u64, u64)], decoded: u64) -> u64 {
    let mark = marks.partition_point(|(out, _)| *out < decoded);
    marks.get(mark).or(marks.last()).map_or(0, |(_, stored)| *stored)
}

impl Slices {
    /// The slice of a chunk, and where in it the chunk begins.
    pub fn place(&self, at: u64) -> (u32, u32) {
        // `slices` has looked at every chunk.
        let number = self.index.start_of(at).unwrap_or(0);
        // A slice is at most 16 MiB.
        (self.numbers[number], (at - self.index.starts[number].0.out_offset) as u32)
    }

    /// About where a chunk begins in the gzip file, and how many bytes it takes there.
    pub fn hint(&self, at: u64, len: u32) -> (u64, u32) {
        let from = self.index.stored_before(at);
        let size = self.index.stored_up_to(at + u64::from(len)).saturating_sub(from);
        (from, size.clamp(1, MAX_HINT) as u32)
    }

    /// Contexts and dictionaries as a blob context has them, and the number of contexts.
    ///
    /// # Errors
    /// `Io`: reading dictionaries back from a temporary file.
    pub fn encode(&mut self) -> Result<(Buffer, u32)> {
        let Self { index, ends, .. } = self;
        let GzipIndex { starts, dictionaries, marks } = index;
        let used = |&((start, _), end): &(&(Boundary, usize), &u64)| *end > start.out_offset;
        let count = starts.iter().zip(&*ends).filter(used).count();
        let len: usize = starts.iter().zip(&*ends).filter(used).map(|((_, len), _)| len).sum();
        let mut bytes = Buffer::zeroed(count * size_of::<ZranSlice>() + len);
        let (contexts, mut room) = bytes.split_at_mut(count * size_of::<ZranSlice>());
        let mut contexts = contexts.chunks_exact_mut(size_of::<ZranSlice>());
        let failed = |e| Error::io("read dictionaries from a temporary file", e);
        dictionaries.rewind().map_err(failed)?;
        let mut at = 0;
        for (&(start, size), &end) in starts.iter().zip(&*ends) {
            if end == start.out_offset {
                let behind = i64::try_from(size).map_err(|_| Error::limit("a dictionary beyond 2^63"))?;
                dictionaries.seek_relative(behind).map_err(failed)?;
                continue;
            }
            let (dictionary, rest) = room.split_at_mut(size);
            dictionaries.read_exact(dictionary).map_err(failed)?;
            room = rest;
            let slice = ZranSlice {
                in_offset: U64::new(start.in_offset),
                out_offset: U64::new(start.out_offset),
                dict_offset: U64::new(at),
                // Both were bounded when the slices were made.
                in_len: U32::new((stored_up_to(marks, end) - start.in_offset) as u32),
                out_len: U32::new((end - start.out_offset) as u32),
                dict_size: U32::new(size as u32),
                ctx_byte: if start.bits > 0 { start.byte } else { 0 },
                ctx_bits: start.bits,
                reserved: [0; 2],
            };
            if let Some(place) = contexts.next() {
                place.copy_from_slice(slice.as_bytes());
            }
            at += size as u64;
        }
        // At most MAX_STARTS.
        Ok((bytes, count as u32))
    }
}
