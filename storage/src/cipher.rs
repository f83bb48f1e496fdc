//! AES-128-XTS of chunk data (rafs-v6 section 8.12).
//!
//! Every unit of a blob is encrypted on its own, with the same key and the same tweak.

use std::fmt;
use std::fs::File;
use std::io::Read as _;

use aes::Aes128;
use aes::cipher::KeyInit as _;
use xts_mode::Xts128;

use crate::{Error, ErrorKind, Result};

/// Bytes of a cipher block: less can not be encrypted.
const BLOCK: usize = 16;

/// What follows the padding of shorter data.
const PADDED: [u8; 2] = [0x78, 0x90];

/// Stored length of data that was padded.
const PADDED_LEN: usize = BLOCK + PADDED.len();

/// Key and tweak of one blob.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct XtsKey {
    key: [u8; 32],
    iv: [u8; 16],
}

impl fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("XtsKey")
    }
}

impl XtsKey {
    /// The key for data, then the key for tweaks; the halves must differ.
    ///
    /// # Errors
    /// `Corrupt`: the halves are equal, which gives the cipher away.
    pub fn new(key: [u8; 32], iv: [u8; 16]) -> Result<Self> {
        if key[..BLOCK] == key[BLOCK..] {
            return Err(Error::new(ErrorKind::Corrupt, "both halves of an AES-XTS key are the same"));
        }
        Ok(Self { key, iv })
    }

    /// Key and tweak from the system's source of random bytes.
    ///
    /// # Errors
    /// `Io`: it can not be read.
    pub fn random() -> Result<Self> {
        loop {
            let mut bytes = [0; 48];
            File::open("/dev/urandom")
                .and_then(|mut source| source.read_exact(&mut bytes))
                .map_err(|e| Error::io("read /dev/urandom", e))?;
            let (mut key, mut iv) = ([0; 32], [0; 16]);
            key.copy_from_slice(&bytes[..32]);
            iv.copy_from_slice(&bytes[32..]);
            if let Ok(key) = Self::new(key, iv) {
                return Ok(key);
            }
        }
    }

    /// The two keys, as records hold them.
    pub fn key(&self) -> &[u8; 32] {
        &self.key
    }

    /// The tweak, as records hold it.
    pub fn iv(&self) -> &[u8; 16] {
        &self.iv
    }

    /// Bytes that `len` bytes take when encrypted.
    pub fn sealed_len(len: usize) -> usize {
        if (1..BLOCK).contains(&len) { PADDED_LEN } else { len }
    }

    /// Encrypts `data` in place; less than 16 bytes become 18.
    pub fn seal(&self, data: &mut Vec<u8>) {
        if data.is_empty() {
            return;
        }
        if data.len() < BLOCK {
            let missing = BLOCK - data.len();
            data.resize(BLOCK, missing as u8);
            data.extend_from_slice(&PADDED);
        }
        self.xts().encrypt_sector(data, self.iv.into());
    }

    /// Decrypts `stored` and hands it to `decode`.
    ///
    /// 18 bytes may be less that was padded, or 18: if they look padded `decode` is asked
    /// with what was padded first, and with all of them if that fails.
    ///
    /// # Errors
    /// `Corrupt`: less than a block. Those of `decode`.
    pub fn open<T>(&self, stored: &[u8], mut decode: impl FnMut(&[u8]) -> Result<T>) -> Result<T> {
        if stored.len() < BLOCK {
            let what = format!("{} encrypted bytes: want at least {BLOCK}", stored.len());
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let mut plain = stored.to_vec();
        self.xts().decrypt_sector(&mut plain, self.iv.into());
        if let Some(padded) = unpadded(&plain)
            && let Ok(decoded) = decode(padded)
        {
            return Ok(decoded);
        }
        decode(&plain)
    }

    fn xts(&self) -> Xts128<Aes128> {
        let (data, tweak) = self.key.split_at(BLOCK);
        // Both halves have the length of a key.
        let cipher = |half: &[u8]| {
            let mut key = aes::cipher::Key::<Aes128>::default();
            key.copy_from_slice(half);
            Aes128::new(&key)
        };
        Xts128::new(cipher(data), cipher(tweak))
    }
}

/// What was padded to these bytes, if that can be.
fn unpadded(plain: &[u8]) -> Option<&[u8]> {
    let body = plain.strip_suffix(&PADDED).filter(|_| plain.len() == PADDED_LEN)?;
    let missing = *body.last()?;
    let len = BLOCK.checked_sub(missing.into()).filter(|&len| len > 0 && len < BLOCK)?;
    body[len..].iter().all(|&b| b == missing).then(|| &body[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> XtsKey {
        XtsKey::new(std::array::from_fn(|n| n as u8), [7; 16]).unwrap()
    }

    #[test]
    fn every_length_comes_back() {
        let key = key();
        for len in 1..=70 {
            let data: Vec<u8> = (0..len).map(|n| n as u8 ^ 0x5a).collect();
            let mut sealed = data.clone();
            key.seal(&mut sealed);
            assert_eq!(sealed.len(), if len < 16 { 18 } else { len });
            assert_ne!(sealed[..16.min(len)], data[..16.min(len)]);
            let want = |plain: &[u8]| match plain == data {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Corrupt, "other bytes")),
            };
            key.open(&sealed, want).unwrap();
        }
    }

    #[test]
    fn eighteen_bytes_that_only_look_padded_are_read() {
        let key = key();
        let mut data = vec![1; 16];
        data.extend_from_slice(&PADDED);
        let mut sealed = data.clone();
        key.seal(&mut sealed);
        let decode = |plain: &[u8]| match plain.len() {
            18 => Ok(plain.to_vec()),
            _ => Err(Error::new(ErrorKind::Corrupt, "too short")),
        };
        assert_eq!(key.open(&sealed, decode).unwrap(), data);
    }

    #[test]
    fn weak_keys_and_short_data_are_refused() {
        assert_eq!(XtsKey::new([1; 32], [0; 16]).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(key().open(&[0; 15], |_| Ok(())).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    /// IEEE 1619-2007, vector 2.
    #[test]
    fn the_cipher_is_the_standard_one() {
        let mut halves = [0x11; 32];
        halves[16..].fill(0x22);
        let mut iv = [0; 16];
        iv[..5].fill(0x33);
        let mut data = vec![0x44; 32];
        XtsKey::new(halves, iv).unwrap().seal(&mut data);
        let want = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0";
        let hex: String = data.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, want);
    }
}
