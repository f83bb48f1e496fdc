//! One source layer as a stream of tar bytes that vouches for itself.
//!
//! ```text
//! stored bytes ─▶ digest + size ─▶ gunzip / unzstd ─▶ diff_id ─▶ tar reader
//! [---------- thread ----------]   [--- thread ---]   [---- caller ----]   where there are more than two processors
//! ```
//!
//! Both digests are compared when the stream ends, before its end is reported: a reader that
//! reaches the end without an error has read exactly the layer that manifest and config name.
//! A tar ends before its file does, so whoever stops early calls [`LayerReader::finish`].

use std::io::{self, BufRead, BufReader, Read};
use std::thread;

use storage::digest::{Digest, DigestAlgorithm, Hasher};

use crate::source::ahead::Ahead;
use crate::source::decompress::Decompressor;
use crate::{Error, ErrorKind, Result};

/// Bytes read ahead of the decompressor.
const INPUT_BUFFER: usize = 256 << 10;

/// Pieces of 256 KiB on their way from one of its threads to the next.
const PIECES_AHEAD: usize = 4;

/// What is known of a layer before it is read.
#[derive(Clone, Debug)]
pub struct LayerPromise {
    /// Names the layer in messages: `layer 2 of 5 (sha256:…)`.
    pub name: String,
    /// SHA-256 and length of the stored bytes; `None` in a `docker save` file, which names neither.
    pub stored: Option<(Digest, u64)>,
    /// SHA-256 of the decompressed bytes, from the image's config.
    pub diff_id: Digest,
}

/// Decompressed, verified bytes of one layer.
pub struct LayerReader {
    inner: Verified<Box<dyn Read + Send>>,
}

type Stored = Box<dyn Read + Send>;

impl LayerReader {
    /// Opens a layer; the compression is told by its first bytes, as container runtimes do.
    ///
    /// # Errors
    /// `Io`: the first read. Whatever the stored stream fails with keeps its kind.
    pub fn new(stored: Stored, promise: &LayerPromise) -> Result<Self> {
        // With two, those who hash and compress keep them busy.
        let has_more = thread::available_parallelism().is_ok_and(|processors| processors.get() > 2);
        Self::by(stored, promise, has_more)
    }

    /// With `threads`, reading and inflating have one each: of what can only be done front to back, the longest
    /// part is inflating.
    fn by(stored: Stored, promise: &LayerPromise, threads: bool) -> Result<Self> {
        let stored = Verified {
            inner: stored,
            name: promise.name.clone(),
            part: "stored bytes",
            expect: promise.stored.map(|(digest, _)| digest),
            expect_size: promise.stored.map(|(_, size)| size),
            state: Some(DigestAlgorithm::Sha256.hasher()),
            size: 0,
        };
        let input: Box<dyn BufRead + Send> = match threads {
            true => Box::new(Ahead::new(stored, "read-layer", PIECES_AHEAD)?),
            false => Box::new(BufReader::with_capacity(INPUT_BUFFER, stored)),
        };
        let decoder =
            Decompressor::new(input).map_err(|e| Error::io(format!("{}: reading", promise.name), e))?;
        let decoded: Box<dyn Read + Send> = match threads {
            true => Box::new(Ahead::new(decoder, "inflate-layer", PIECES_AHEAD)?),
            false => Box::new(decoder),
        };
        Ok(Self {
            inner: Verified {
                inner: decoded,
                name: promise.name.clone(),
                part: "decompressed bytes (diff_id)",
                expect: Some(promise.diff_id),
                expect_size: None,
                state: Some(DigestAlgorithm::Sha256.hasher()),
                size: 0,
            },
        })
    }

    /// Reads what is left and returns the number of decompressed bytes of the whole layer.
    ///
    /// # Errors
    /// `Mismatch`: the layer is not the one that manifest and config name. `Corrupt`: its
    /// compression is damaged.
    pub fn finish(mut self) -> Result<u64> {
        let mut sink = vec![0; INPUT_BUFFER];
        loop {
            match self.read(&mut sink) {
                Ok(0) => return Ok(self.inner.size),
                Ok(_) => {}
                Err(e) => return Err(Error::io(format!("{}: reading", self.inner.name), e)),
            }
        }
    }
}

impl Read for LayerReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf).map_err(|e| match e.kind() {
            // The decoders' own words for damaged input; errors of this crate are `Other`.
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                Error::new(
                    ErrorKind::Corrupt,
                    format!("{}: its compression is damaged; fetch the image again", self.inner.name),
                )
                .with_source(e)
                .into_io()
            }
            _ => e,
        })
    }
}

/// Hashes what passes and compares at the end.
struct Verified<R> {
    inner: R,
    name: String,
    part: &'static str,
    expect: Option<Digest>,
    expect_size: Option<u64>,
    /// `None` once the end was reached and found good.
    state: Option<Hasher>,
    size: u64,
}

impl<R> Verified<R> {
    fn mismatch(&self, found: String) -> io::Error {
        let want = self.expect.map(|d| format!("sha256:{d}")).unwrap_or_default();
        Error::new(
            ErrorKind::Mismatch,
            format!(
                "{}: {} do not match {want}: {found}; the source is damaged or not what its manifest says, \
                 fetch it again",
                self.name, self.part
            ),
        )
        .into_io()
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() || self.state.is_none() {
            return Ok(0);
        }
        let got = self.inner.read(buf)?;
        if got > 0 {
            self.size += got as u64;
            if let Some(limit) = self.expect_size.filter(|limit| self.size > *limit) {
                return Err(self.mismatch(format!("more than its {limit} bytes")));
            }
            if let Some(state) = &mut self.state {
                state.update(&buf[..got]);
            }
            return Ok(got);
        }
        if let Some(size) = self.expect_size.filter(|size| *size != self.size) {
            return Err(self.mismatch(format!("{} bytes instead of {size}", self.size)));
        }
        if let (Some(state), Some(expect)) = (self.state.clone(), self.expect) {
            let found = state.finish();
            if found != expect {
                return Err(self.mismatch(format!("they are sha256:{found}")));
            }
        }
        self.state = None;
        Ok(0)
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

    /// The same with threads and without.
    fn open(stored: &[u8], promise: &LayerPromise) -> Result<Vec<u8>> {
        let [alone, ahead] = [false, true].map(|threads| open_by(stored, promise, threads));
        match (&alone, &ahead) {
            (Ok(alone), Ok(ahead)) => assert!(alone == ahead),
            (Err(alone), Err(ahead)) => assert_eq!(alone.to_string(), ahead.to_string()),
            other => panic!("{other:?}"),
        }
        alone
    }

    fn open_by(stored: &[u8], promise: &LayerPromise, threads: bool) -> Result<Vec<u8>> {
        let mut reader = LayerReader::by(Box::new(io::Cursor::new(stored.to_vec())), promise, threads)?;
        let mut half = vec![0; 10];
        reader.read_exact(&mut half).map_err(|e| Error::io("head", e))?;
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).map_err(|e| Error::io("rest", e))?;
        half.extend(rest);
        Ok(half)
    }

    fn promise(stored: &[u8], data: &[u8]) -> LayerPromise {
        let sha = |b: &[u8]| DigestAlgorithm::Sha256.digest(b);
        LayerPromise {
            name: "layer 1 of 1".into(),
            stored: Some((sha(stored), stored.len() as u64)),
            diff_id: sha(data),
        }
    }

    #[test]
    fn every_compression_reads_and_is_verified() {
        let data: Vec<u8> = (0..500_000u32).flat_map(|n| n.to_le_bytes()).collect();
        let two_members = [gzip(&data[..1000]), gzip(&data[1000..])].concat();
        let two_frames =
            [zstd::encode_all(&data[..1000], 1).unwrap(), zstd::encode_all(&data[1000..], 1).unwrap()]
                .concat();
        for stored in
            [data.clone(), gzip(&data), two_members, zstd::encode_all(&data[..], 1).unwrap(), two_frames]
        {
            let good = promise(&stored, &data);
            assert_eq!(open(&stored, &good).unwrap(), data);
            let reader = LayerReader::new(Box::new(io::Cursor::new(stored.clone())), &good).unwrap();
            assert_eq!(reader.finish().unwrap(), data.len() as u64);

            let wrong_diff = LayerPromise { diff_id: Digest([1; 32]), ..good.clone() };
            let err = open(&stored, &wrong_diff).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::Mismatch);
            assert!(err.to_string().contains("layer 1 of 1") && err.to_string().contains("diff_id"), "{err}");

            let wrong_digest =
                LayerPromise { stored: Some((Digest([1; 32]), stored.len() as u64)), ..good.clone() };
            let err = open(&stored, &wrong_digest).unwrap_err();
            assert!(err.kind() == ErrorKind::Mismatch && err.to_string().contains("stored bytes"), "{err}");

            for wrong_size in [stored.len() as u64 - 1, stored.len() as u64 + 1] {
                let promise =
                    LayerPromise { stored: Some((good.stored.unwrap().0, wrong_size)), ..good.clone() };
                assert_eq!(open(&stored, &promise).unwrap_err().kind(), ErrorKind::Mismatch);
            }
        }
    }

    #[test]
    fn damage_is_never_read_as_an_end() {
        let data = vec![b'x'; 300_000];
        for stored in [gzip(&data), zstd::encode_all(&data[..], 1).unwrap()] {
            for cut in [stored.len() / 2, stored.len() - 1] {
                let err = open(&stored[..cut], &promise(&stored[..cut], &data)).unwrap_err();
                assert!(matches!(err.kind(), ErrorKind::Corrupt | ErrorKind::Mismatch), "{err}");
            }
            let mut flipped = stored.clone();
            flipped[stored.len() / 2] ^= 0x55;
            assert!(open(&flipped, &promise(&flipped, &data)).is_err());
        }
    }
}
