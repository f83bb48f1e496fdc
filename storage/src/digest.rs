//! Digests of chunks, blobs and trees.

use std::fmt;
use std::str::FromStr;

use sha2::Digest as _;

use crate::{Error, ErrorKind, Result};

/// The digest algorithms an image may use for its chunks (rafs-v6 blob record, offset 80).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DigestAlgorithm {
    /// BLAKE3 with 256 bits of output.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl DigestAlgorithm {
    /// Digest of `data` in one call.
    pub fn digest(self, data: &[u8]) -> Digest {
        match self {
            Self::Blake3 => Digest(*blake3::hash(data).as_bytes()),
            Self::Sha256 => Digest(sha2::Sha256::digest(data).into()),
        }
    }

    /// A running digest.
    pub fn hasher(self) -> Hasher {
        match self {
            Self::Blake3 => Hasher::Blake3(Box::new(blake3::Hasher::new())),
            Self::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
        }
    }

    /// `blake3` or `sha256`, as on the command line and in tagged digests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        }
    }
}

impl fmt::Display for DigestAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DigestAlgorithm {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "blake3" => Ok(Self::Blake3),
            "sha256" => Ok(Self::Sha256),
            _ => Err(Error::new(ErrorKind::Invalid, format!("digester {s:?}: want blake3 or sha256"))),
        }
    }
}

/// A digest being computed over a stream of bytes.
#[derive(Clone)]
pub enum Hasher {
    /// BLAKE3 state (1.9 KiB, hence boxed).
    Blake3(Box<blake3::Hasher>),
    /// SHA-256 state.
    Sha256(sha2::Sha256),
}

impl Hasher {
    /// Feeds `data`.
    pub fn update(&mut self, data: &[u8]) {
        match self {
            Self::Blake3(h) => {
                h.update(data);
            }
            Self::Sha256(h) => h.update(data),
        }
    }

    /// The digest of all bytes fed.
    pub fn finish(self) -> Digest {
        match self {
            Self::Blake3(h) => Digest(*h.finalize().as_bytes()),
            Self::Sha256(h) => Digest(h.finalize().into()),
        }
    }
}

/// 32 bytes of digest. Which algorithm made it is known from where it stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Parses 64 lower-case hex digits.
    ///
    /// # Errors
    /// `Invalid`: another length or character.
    pub fn from_hex(hex: &str) -> Result<Self> {
        let bad = || Error::new(ErrorKind::Invalid, format!("digest {hex:?}: want 64 lower-case hex digits"));
        let bytes = hex.as_bytes();
        if bytes.len() != 64 {
            return Err(bad());
        }
        let nibble = |b: u8| match b {
            b'0'..=b'9' => Ok(b - b'0'),
            b'a'..=b'f' => Ok(b - b'a' + 10),
            _ => Err(bad()),
        };
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(out))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest with its algorithm, written `alg:hex` (`sha256:…`, `blake3:…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaggedDigest {
    /// The algorithm before the colon.
    pub algorithm: DigestAlgorithm,
    /// The value after it.
    pub digest: Digest,
}

impl fmt::Display for TaggedDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.digest)
    }
}

impl FromStr for TaggedDigest {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let (algorithm, hex) = s
            .split_once(':')
            .ok_or_else(|| Error::new(ErrorKind::Invalid, format!("digest {s:?}: want ALGORITHM:HEX")))?;
        Ok(Self { algorithm: algorithm.parse()?, digest: Digest::from_hex(hex)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tagged_digests_round_trip() {
        for algorithm in [DigestAlgorithm::Blake3, DigestAlgorithm::Sha256] {
            let tagged = TaggedDigest { algorithm, digest: algorithm.digest(b"abc") };
            assert_eq!(tagged.to_string().parse::<TaggedDigest>().unwrap(), tagged);
            let mut running = algorithm.hasher();
            running.update(b"a");
            running.update(b"bc");
            assert_eq!(running.finish(), tagged.digest);
        }
        assert_eq!(
            DigestAlgorithm::Sha256.digest(b"").to_string(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        for bad in ["", "sha256", "md5:00", "sha256:00", &format!("sha256:{}", "G".repeat(64))] {
            assert!(bad.parse::<TaggedDigest>().is_err(), "{bad:?}");
        }
    }
}
