//! Tar streams as they come: plain, gzip or zstd, told by their first bytes.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

use crate::Error;

/// Largest window a zstd stream may ask for, as a power of two: 128 MiB, what `zstd --long` and
/// every container runtime accept by default. It bounds the memory of hostile streams.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Decoded bytes of a stream. Several gzip members or zstd frames in a row are one stream.
///
/// Damage is reported as [`io::ErrorKind::InvalidData`], `InvalidInput` or `UnexpectedEof`, never
/// as an early end; what the input itself fails with passes unchanged.
pub struct Decompressor<R: BufRead>(Decoder<R>);

enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(zstd::Decoder<'static, R>),
}

impl<R: BufRead> Decompressor<R> {
    /// Looks at the first bytes of `input` and picks the decoder.
    ///
    /// # Errors
    /// What the first read of `input` fails with; lack of memory.
    pub fn new(mut input: R) -> io::Result<Self> {
        let head = input.fill_buf()?;
        Ok(Self(if head.starts_with(&GZIP_MAGIC) {
            Decoder::Gzip(Box::new(MultiGzDecoder::new(input)))
        } else if head.starts_with(&ZSTD_MAGIC) {
            let mut decoder = zstd::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Decoder::Zstd(decoder)
        } else {
            Decoder::Plain(input)
        }))
    }
}

impl<R: BufRead> Read for Decompressor<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Decoder::Plain(input) => input.read(buf),
            Decoder::Gzip(decoder) => match decoder.read(buf)? {
                0 if !buf.is_empty() => drain(decoder.get_mut()),
                got => Ok(got),
            },
            Decoder::Zstd(decoder) => match decoder.read(buf) {
                Ok(0) if !buf.is_empty() => drain(decoder.get_mut()),
                Ok(got) => Ok(got),
                Err(e) if e.get_ref().is_some_and(|inner| inner.is::<Error>()) => Err(e),
                // libzstd's complaints arrive as `Other`.
                Err(e) if e.kind() == io::ErrorKind::Other => {
                    Err(io::Error::new(io::ErrorKind::InvalidData, e))
                }
                Err(e) => Err(e),
            },
        }
    }
}

/// Reaches the end of the stored bytes: whoever writes a FIFO wants to be read to the end, and
/// whoever checks a digest compares it there.
fn drain(input: &mut impl BufRead) -> io::Result<usize> {
    loop {
        match input.fill_buf()?.len() {
            0 => return Ok(0),
            len => input.consume(len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(data).unwrap();
        out.finish().unwrap()
    }

    fn decode(stored: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decompressor::new(stored)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn members_and_frames_are_one_stream() {
        let data: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let (a, b) = data.split_at(777);
        let pack = |d: &[u8]| zstd::encode_all(d, 1).unwrap();
        for stored in
            [data.clone(), gzip(&data), [gzip(a), gzip(b)].concat(), pack(&data), [pack(a), pack(b)].concat()]
        {
            assert!(decode(&stored).unwrap() == data);
        }
        assert_eq!(decode(b"").unwrap(), b"");
    }

    #[test]
    fn huge_windows_and_truncation_are_errors() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(28).unwrap();
        encoder.write_all(&[7; 100_000]).unwrap();
        assert_eq!(decode(&encoder.finish().unwrap()).unwrap_err().kind(), io::ErrorKind::InvalidData);

        let data = vec![7; 1 << 20];
        for stored in [gzip(&data), zstd::encode_all(&data[..], 1).unwrap()] {
            for cut in [4, stored.len() / 2, stored.len() - 1] {
                let kind = decode(&stored[..cut]).unwrap_err().kind();
                assert!(matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData), "{kind}");
            }
        }
    }
}
