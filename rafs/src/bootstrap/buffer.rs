//! The bytes of a bootstrap that is made or read.

use std::io::{self, Read};
use std::ops::{Deref, DerefMut};

use crate::sys::UnnamedFile;

/// Smaller ones stay in memory: those of images of some fifty thousand entries.
const SPILL_FROM: usize = 16 << 20;

/// Bytes in memory; or, if there are many, in a file without a name in the system's folder for
/// temporary files (`TMPDIR`), mapped, so that the system can take the memory back. Where no such
/// file can be made, memory serves.
#[derive(Debug)]
pub struct Buffer(Place);

#[derive(Debug)]
enum Place {
    Memory(Vec<u8>),
    File(UnnamedFile),
}

impl Buffer {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Self(match spill(len) {
            Some(file) => Place::File(file),
            None => Place::Memory(vec![0; len]),
        })
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut this = Self::zeroed(bytes.len());
        this.copy_from_slice(bytes);
        this
    }

    /// The rest of `input`, of which `len` bytes are expected.
    ///
    /// # Errors
    /// Those of `input`.
    pub fn read(mut input: impl Read, len: usize) -> io::Result<Self> {
        if let Some(mut file) = spill(len) {
            let mut filled = 0;
            while filled < len {
                match input.read(&mut file[filled..]) {
                    // Less than there was when it was asked.
                    Ok(0) => return Ok(file[..filled].to_vec().into()),
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            let mut more = Vec::new();
            input.read_to_end(&mut more)?;
            return Ok(match more.is_empty() {
                true => Self(Place::File(file)),
                false => [&file, &more[..]].concat().into(),
            });
        }
        let mut bytes = Vec::with_capacity(len);
        input.read_to_end(&mut bytes)?;
        Ok(bytes.into())
    }
}

fn spill(len: usize) -> Option<UnnamedFile> {
    if len < SPILL_FROM {
        return None;
    }
    UnnamedFile::zeroed(len)
        .inspect_err(|error| tracing::debug!(%error, "a bootstrap of {len} bytes stays in memory"))
        .ok()
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Place::Memory(bytes))
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Place::Memory(bytes) => bytes,
            Place::File(file) => file,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Place::Memory(bytes) => bytes,
            Place::File(file) => file,
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_ones_lie_in_a_file_and_small_ones_in_memory() {
        let mut large = Buffer::zeroed(SPILL_FROM + 1);
        assert!(matches!(large.0, Place::File(_)));
        assert!(large.iter().all(|&byte| byte == 0));
        large[SPILL_FROM] = 7;
        assert_eq!(*Buffer::copy_of(&large), *large);
        assert!(matches!(Buffer::zeroed(5).0, Place::Memory(_)));
    }

    #[test]
    fn what_is_read_is_what_is_there_whatever_was_expected() {
        let bytes: Vec<u8> = (0..SPILL_FROM + 9).map(|n| (n / 3) as u8).collect();
        for expected in [0, 5, SPILL_FROM, SPILL_FROM + 9, SPILL_FROM + 4096] {
            assert!(*Buffer::read(&bytes[..], expected).unwrap() == *bytes, "{expected}");
        }
    }
}
