//! Deflate from the middle: decoding that begins where a block begins, and finding such places.
//!
//! A reference image leaves the layer as the gzip file that it is. A *slice* of it can be read
//! without what precedes it, if it begins at a block of deflate data and the 32 KiB before it
//! are known (rafs-v6 section 8.7).

use std::ffi::c_int;
use std::mem::size_of;

use bytes::Bytes;
use libz_rs_sys as z;

use crate::{Error, ErrorKind, Result};

/// Bytes that deflate refers back to at most.
pub const MAX_DICTIONARY: usize = 32 << 10;

/// `windowBits` of raw deflate data.
const RAW: c_int = -15;
/// `windowBits` of gzip members.
const GZIP: c_int = 31;
/// Checksum and length behind the deflate data of a gzip member.
const TRAILER: usize = 8;

/// What must be known to begin inside a deflate stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// What was decoded before, up to [`MAX_DICTIONARY`] bytes.
    pub dictionary: Bytes,
    /// How many bits of `byte` belong to the block, 0 to 7.
    pub bits: u8,
    /// The byte before the first stored one; its upper bits begin the block.
    pub byte: u8,
}

impl Window {
    /// Fills `decoded` from `stored`, which may reach over the end of a gzip member into the next.
    ///
    /// # Errors
    /// `Corrupt`: not deflate data, or less than `decoded` holds.
    pub fn inflate(&self, stored: &[u8], decoded: &mut [u8]) -> Result<()> {
        let mut stream = Stream::new(RAW)?;
        if self.bits > 0 {
            stream.prime(self.bits, self.byte)?;
        }
        if !self.dictionary.is_empty() {
            stream.set_dictionary(&self.dictionary)?;
        }
        let (mut input, mut output) = (stored, decoded);
        let mut raw = true;
        while !output.is_empty() {
            let step = stream.run(input, output, false)?;
            input = &input[step.consumed..];
            output = &mut output[step.produced..];
            if step.ended && !output.is_empty() {
                // A raw stream leaves the trailer of its member to us.
                let skip = if raw { TRAILER } else { 0 };
                input = input.get(skip..).ok_or_else(|| corrupt("ends within a gzip trailer"))?;
                stream.reset(GZIP)?;
                raw = false;
            } else if step.consumed == 0 && step.produced == 0 && !output.is_empty() {
                return Err(corrupt(&format!("ends {} bytes too early", output.len())));
            }
        }
        Ok(())
    }
}

/// A place where decoding can begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// First byte of the file that decoding needs, but for `byte`.
    pub in_offset: u64,
    /// Decoded bytes before it.
    pub out_offset: u64,
    /// See [`Window::bits`].
    pub bits: u8,
    /// See [`Window::byte`].
    pub byte: u8,
}

/// Decodes gzip members and tells where blocks begin.
pub struct GzipBlocks {
    stream: Stream,
    consumed: u64,
    produced: u64,
    /// The byte consumed last.
    last: u8,
    /// Inside of a member.
    is_open: bool,
}

/// What one call of [`GzipBlocks::run`] did.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Bytes put out.
    pub produced: usize,
    /// Set if a block begins here.
    pub boundary: Option<Boundary>,
}

impl GzipBlocks {
    /// A decoder at the start of a file.
    ///
    /// # Errors
    /// `Io`: out of memory.
    pub fn new() -> Result<Self> {
        Ok(Self { stream: Stream::new(GZIP)?, consumed: 0, produced: 0, last: 0, is_open: false })
    }

    /// True between members: only there may a file end.
    pub fn is_between_members(&self) -> bool {
        !self.is_open
    }

    /// Decodes on, until input or output are used up or a block begins.
    ///
    /// # Errors
    /// `Corrupt`: not gzip data, or a checksum is wrong.
    pub fn run(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress> {
        self.step(input, output, true)
    }

    /// As [`Self::run`], but past the beginnings of blocks, which costs less.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_through(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress> {
        self.step(input, output, false)
    }

    fn step(&mut self, input: &[u8], output: &mut [u8], stop_at_blocks: bool) -> Result<Progress> {
        let step = self.stream.run(input, output, stop_at_blocks).map_err(|e| {
            e.context(format_args!("gzip data at {}, decoded {}", self.consumed, self.produced))
        })?;
        self.is_open |= step.consumed > 0;
        self.consumed += step.consumed as u64;
        self.produced += step.produced as u64;
        if let Some(last) = step.consumed.checked_sub(1) {
            self.last = input[last];
        }
        if step.ended {
            self.stream.reset(GZIP)?;
            self.is_open = false;
        }
        let boundary = step.block_bits.filter(|_| stop_at_blocks).map(|bits| Boundary {
            in_offset: self.consumed,
            out_offset: self.produced,
            bits,
            byte: self.last,
        });
        Ok(Progress { consumed: step.consumed, produced: step.produced, boundary })
    }
}

struct Step {
    consumed: usize,
    produced: usize,
    ended: bool,
    /// Bits of the byte consumed last that belong to the block that begins here.
    block_bits: Option<u8>,
}

/// An inflate state of the library, released when dropped.
struct Stream(Box<z::z_stream>);

impl Stream {
    fn new(window_bits: c_int) -> Result<Self> {
        let mut stream = Self(Box::default());
        // SAFETY: the stream is valid, at an address that stays, and zeroed as the function wants it.
        let code = unsafe {
            z::inflateInit2_(&mut *stream.0, window_bits, z::zlibVersion(), size_of::<z::z_stream>() as c_int)
        };
        check(code, "start")?;
        Ok(stream)
    }

    fn reset(&mut self, window_bits: c_int) -> Result<()> {
        // SAFETY: `new` initialised the stream.
        check(unsafe { z::inflateReset2(&mut *self.0, window_bits) }, "start again")
    }

    fn prime(&mut self, bits: u8, byte: u8) -> Result<()> {
        let (bits, byte) = (u32::from(bits.min(8)), u32::from(byte));
        let value = byte >> (8 - bits);
        // SAFETY: `new` initialised the stream.
        check(unsafe { z::inflatePrime(&mut *self.0, bits as c_int, value as c_int) }, "prime")
    }

    fn set_dictionary(&mut self, dictionary: &[u8]) -> Result<()> {
        let len = u32::try_from(dictionary.len()).map_err(|_| corrupt("dictionary too long"))?;
        // SAFETY: `new` initialised the stream; the pointer is good for `len` bytes, which are copied.
        check(unsafe { z::inflateSetDictionary(&mut *self.0, dictionary.as_ptr(), len) }, "take a dictionary")
    }

    /// Decodes; stops where a block begins if told so.
    fn run(&mut self, input: &[u8], output: &mut [u8], stop_at_blocks: bool) -> Result<Step> {
        let clamp = |len: usize| len.min(1 << 30) as u32;
        let (give, room) = (clamp(input.len()), clamp(output.len()));
        let stream = &mut *self.0;
        stream.next_in = input.as_ptr();
        stream.avail_in = give;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = room;
        let flush = if stop_at_blocks { z::Z_BLOCK } else { z::Z_NO_FLUSH };
        // SAFETY: `new` initialised the stream; the pointers are good for the lengths beside them, and
        // the library does not use them after the call.
        let code = unsafe { z::inflate(stream, flush) };
        let (consumed, produced) = ((give - stream.avail_in) as usize, (room - stream.avail_out) as usize);
        let state = stream.data_type;
        (stream.next_in, stream.next_out) = (std::ptr::null(), std::ptr::null_mut());
        let ended = code == z::Z_STREAM_END;
        if !ended && code != z::Z_OK && code != z::Z_BUF_ERROR {
            return Err(corrupt(match code {
                z::Z_NEED_DICT => "a preset dictionary is asked for",
                z::Z_MEM_ERROR => "out of memory",
                _ => "not valid deflate data",
            }));
        }
        // 128: right behind the end of a block or a header; 64: while in the last block, behind
        // which no block begins; the low bits count unused bits of the last byte.
        let begins = !ended && state & 128 != 0 && state & 64 == 0;
        Ok(Step { consumed, produced, ended, block_bits: begins.then_some((state & 7) as u8) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new` (if that failed the function only says so) and
        // is not used after this.
        unsafe { z::inflateEnd(&mut *self.0) };
    }
}

fn check(code: c_int, what: &str) -> Result<()> {
    match code {
        z::Z_OK => Ok(()),
        z::Z_MEM_ERROR => Err(Error::new(ErrorKind::Io, format!("inflate can not {what}: out of memory"))),
        _ => Err(corrupt(&format!("inflate can not {what} ({code})"))),
    }
}

fn corrupt(why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("deflate data: {why}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        (0..len)
            .map(|n| {
                state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
                if n % 7 < 4 { (state >> 16) as u8 % 23 } else { b'x' }
            })
            .collect()
    }

    fn gzip(data: &[u8], level: u32) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        out.write_all(data).unwrap();
        out.finish().unwrap()
    }

    /// All boundaries of `file`, and what it decodes to.
    fn decode(file: &[u8]) -> (Vec<u8>, Vec<Boundary>) {
        let mut blocks = GzipBlocks::new().unwrap();
        let (mut out, mut boundaries, mut rest) = (Vec::new(), Vec::new(), file);
        let mut buffer = vec![0; 9000];
        loop {
            let input = &rest[..rest.len().min(5000)];
            // Every now and then past some blocks: those behind are found all the same.
            let step = match out.len() / 20_000 % 3 {
                1 => blocks.run_through(input, &mut buffer).unwrap(),
                _ => blocks.run(input, &mut buffer).unwrap(),
            };
            rest = &rest[step.consumed..];
            out.extend_from_slice(&buffer[..step.produced]);
            boundaries.extend(step.boundary);
            if rest.is_empty() && step.produced == 0 {
                break;
            }
        }
        assert!(blocks.is_between_members());
        (out, boundaries)
    }

    #[test]
    fn decoding_begins_at_every_boundary() {
        let (first, second) = (sample(400_000), sample(150_000));
        for levels in [(1, 6), (0, 9)] {
            let file = [gzip(&first, levels.0), gzip(&second, levels.1)].concat();
            let want = [&first[..], &second].concat();
            let (out, boundaries) = decode(&file);
            assert!(out == want);
            assert!(boundaries.len() > 4);
            let mut with_bits = 0;
            for boundary in &boundaries {
                with_bits += usize::from(boundary.bits > 0);
                let at = boundary.out_offset as usize;
                // A new member knows nothing of the one before.
                let member = if at >= first.len() { first.len() } else { 0 };
                let from = at.saturating_sub(MAX_DICTIONARY).max(member);
                let window = Window {
                    dictionary: Bytes::copy_from_slice(&want[from..at]),
                    bits: boundary.bits,
                    byte: boundary.byte,
                };
                // Up to the end: the first ones pass from one member to the next.
                let mut decoded = vec![0; want.len() - at];
                window.inflate(&file[boundary.in_offset as usize..], &mut decoded).unwrap();
                assert!(decoded == want[at..], "{boundary:?}");
            }
            assert!(with_bits > 0 || levels.0 == 0);
        }
    }

    #[test]
    fn damage_is_an_error() {
        let data = sample(100_000);
        let file = gzip(&data, 6);
        let start = Window { dictionary: Bytes::new(), bits: 0, byte: 0 };
        let mut decoded = vec![0; data.len()];
        start.inflate(&file[10..], &mut decoded).unwrap();
        assert!(decoded == data);
        assert!(start.inflate(&file[10..file.len() / 2], &mut decoded).is_err());
        assert!(start.inflate(&file[11..], &mut decoded).is_err() || decoded != data);
        assert!(start.inflate(&[], &mut decoded).is_err());
        assert!(start.inflate(&file[10..], &mut vec![0; data.len() + 1]).is_err());
        let mut blocks = GzipBlocks::new().unwrap();
        assert_eq!(blocks.run(b"no gzip data", &mut decoded).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
