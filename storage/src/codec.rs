//! Compress and decompress one fetch unit within its recorded size.

use std::fmt;
use std::io::{self, Read as _};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use zstd::zstd_safe::CParameter;

use crate::{Error, ErrorKind, Result};

/// zstd level of chunks: the reference builder's level (rafs-v6 appendix B).
pub const ZSTD_LEVEL: i32 = 3;

/// Compression of a unit's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Stored as it is.
    None,
    /// One raw LZ4 block without a size prefix.
    Lz4Block,
    /// The beginning of a gzip member. What it decodes to beyond the recorded size is padding and headers
    /// of the tar that it is a part of.
    Gzip,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    /// The name on the command line and in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4Block => "lz4_block",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Codec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Self::None, Self::Lz4Block, Self::Gzip, Self::Zstd].into_iter().find(|c| c.name() == s).ok_or_else(
            || {
                Error::new(
                    ErrorKind::Invalid,
                    format!("compressor {s:?}: want none, lz4_block, gzip or zstd"),
                )
            },
        )
    }
}

/// Fills `dst` with the decoded form of `src`.
///
/// `dst.len()` is the recorded decoded size; hostile input can not make this allocate
/// or write more. Of gzip, the checksum is compared only if the member is whole and ends with `dst`; a chunk
/// that it goes on behind is known by its digest alone, which the caller must verify.
///
/// # Errors
/// `Corrupt`: `src` is not a valid stream, decodes to another length, or has another checksum.
pub fn decompress(codec: Codec, src: &[u8], dst: &mut [u8]) -> Result<()> {
    let corrupt =
        |why: String| Error::new(ErrorKind::Corrupt, format!("{codec} data of {} bytes: {why}", src.len()));
    let want = dst.len();
    let got = match codec {
        Codec::None => {
            if src.len() == want {
                dst.copy_from_slice(src);
            }
            src.len()
        }
        Codec::Lz4Block => lz4_flex::block::decompress_into(src, dst).map_err(|e| corrupt(e.to_string()))?,
        Codec::Zstd => {
            with_zstd(|zstd| zstd.decompress_to_buffer(src, dst)).map_err(|e| corrupt(e.to_string()))?
        }
        Codec::Gzip => {
            let mut reader = flate2::bufread::GzDecoder::new(src);
            reader.read_exact(dst).map_err(|e| corrupt(e.to_string()))?;
            // At its end a member is checked, when more is asked for. A range may end before that.
            match reader.read(&mut [0]) {
                Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => return Err(corrupt(e.to_string())),
                _ => want,
            }
        }
    };
    if got != want {
        return Err(corrupt(format!("decodes to {got} bytes, {want} are recorded")));
    }
    Ok(())
}

/// Most zstd contexts that are kept: more threads than cores rarely decompress at once.
const MAX_CONTEXTS: usize = 8;

/// Idle zstd contexts. Making one costs as much as decompressing a small chunk, and a context
/// a thread would be one for each of the many that only wait. Nothing blocks under it.
static CONTEXTS: Mutex<Vec<zstd::bulk::Decompressor<'static>>> = Mutex::new(Vec::new());

/// Runs `work` with a zstd context that nobody else uses.
fn with_zstd<T>(
    work: impl FnOnce(&mut zstd::bulk::Decompressor<'static>) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let contexts = || CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let kept = contexts().pop();
    let mut context = match kept {
        Some(context) => context,
        None => zstd::bulk::Decompressor::new()?,
    };
    let result = work(&mut context);
    let mut contexts = contexts();
    if contexts.len() < MAX_CONTEXTS {
        contexts.push(context);
    }
    result
}

/// A reusable compressor; one per worker thread.
pub struct Compressor {
    codec: Codec,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    /// Output of the last unit; kept, because most units are small and many.
    scratch: Vec<u8>,
}

impl Compressor {
    /// A compressor for `codec` at the level used for chunks, for the tables of a blob.
    ///
    /// # Errors
    /// `Unsupported`: gzip, which no native blob uses for chunks. `Io`: out of memory.
    pub fn new(codec: Codec) -> Result<Self> {
        let zstd = match codec {
            Codec::Zstd => Some(
                zstd::bulk::Compressor::new(ZSTD_LEVEL)
                    .map_err(|e| Error::io("make a zstd compressor", e))?,
            ),
            Codec::Gzip => return Err(Error::new(ErrorKind::Unsupported, "compress chunks with gzip")),
            Codec::None | Codec::Lz4Block => None,
        };
        Ok(Self { codec, zstd, scratch: Vec::new() })
    }

    /// A compressor for chunks.
    ///
    /// zstd gets two parameters that are not its level's. Of matches of four bytes, which that level
    /// seeks in data of up to 256 KiB, a chunk has few that pay; and a table of 128 KiB for short
    /// matches stays closer to the core than one of 256 KiB. Together they take 3.4 % off the time of
    /// the node image's chunks, and add 0.3 % to their size.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn for_chunks(codec: Codec) -> Result<Self> {
        let mut this = Self::new(codec)?;
        if let Some(zstd) = &mut this.zstd {
            for parameter in [CParameter::MinMatch(5), CParameter::ChainLog(15)] {
                zstd.set_parameter(parameter).map_err(|e| Error::io("tune a zstd compressor", e))?;
            }
        }
        Ok(this)
    }

    /// Compresses `src`, or answers `None` if that does not make it strictly smaller, in
    /// which case the bytes are stored as they are (rafs-v6 section 8.1).
    ///
    /// # Errors
    /// `Io`: the library failed, which only lack of memory can cause.
    pub fn compress(&mut self, src: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.compress_borrowed(src)?.map(<[u8]>::to_vec))
    }

    /// [`Self::compress`] into a buffer that the next call overwrites.
    ///
    /// # Errors
    /// As [`Self::compress`].
    pub fn compress_borrowed(&mut self, src: &[u8]) -> Result<Option<&[u8]>> {
        let bound = match self.codec {
            Codec::Lz4Block => lz4_flex::block::get_maximum_output_size(src.len()),
            Codec::Zstd => zstd::zstd_safe::compress_bound(src.len()),
            Codec::None | Codec::Gzip => return Ok(None),
        };
        if self.scratch.len() < bound {
            self.scratch.resize(bound, 0);
        }
        let len = match &mut self.zstd {
            Some(zstd) => zstd
                .compress_to_buffer(src, &mut self.scratch[..])
                .map_err(|e| Error::io("compress a chunk with zstd", e))?,
            None => lz4_flex::block::compress_into(src, &mut self.scratch)
                .map_err(|e| Error::new(ErrorKind::Io, "compress a chunk with lz4").with_source(e))?,
        };
        Ok((len < src.len()).then(|| &self.scratch[..len]))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn codecs_round_trip_and_refuse_other_sizes() {
        let data: Vec<u8> = (0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        for codec in [Codec::Lz4Block, Codec::Zstd] {
            let packed = Compressor::new(codec).unwrap().compress(&data).unwrap().unwrap();
            let mut out = vec![0; data.len()];
            decompress(codec, &packed, &mut out).unwrap();
            assert_eq!(out, data);
            for wrong in [data.len() - 1, data.len() + 1, 0] {
                let err = decompress(codec, &packed, &mut vec![0; wrong]).unwrap_err();
                assert_eq!(err.kind(), ErrorKind::Corrupt);
            }
            assert!(decompress(codec, &packed[..packed.len() / 2], &mut out).is_err());
        }
        assert!(decompress(Codec::None, b"abc", &mut [0; 2]).is_err());
    }

    #[test]
    fn a_gzip_member_may_go_on_behind_its_chunk() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(&[7; 5000]).unwrap();
        let packed = encoder.finish().unwrap();
        for len in [1, 4096, 5000] {
            let mut out = vec![0; len];
            decompress(Codec::Gzip, &[&packed[..], b"another"].concat(), &mut out).unwrap();
            assert_eq!(out, vec![7; len]);
        }
        for (stored, len) in [(&packed[..], 5001), (&packed[..20], 5000), (b"plain", 1)] {
            let error = decompress(Codec::Gzip, stored, &mut vec![0; len]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
        // The trailer is checksum and length: wrong, or cut off.
        let mut wrong = packed.clone();
        let end = wrong.len();
        wrong[end - 8] ^= 1;
        let mut out = vec![0; 5000];
        assert_eq!(decompress(Codec::Gzip, &wrong, &mut out).unwrap_err().kind(), ErrorKind::Corrupt);
        decompress(Codec::Gzip, &wrong, &mut out[..4096]).unwrap();
        decompress(Codec::Gzip, &packed[..end - 8], &mut out).unwrap();
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        for codec in [Codec::None, Codec::Lz4Block, Codec::Zstd] {
            assert!(Compressor::new(codec).unwrap().compress(b"x").unwrap().is_none());
        }
    }
}
