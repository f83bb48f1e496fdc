//! The tar headers between the sections of a blob. They stand behind their data ("reverse
//! tar"), so that a blob can be written as a stream and read from its end.

use crate::{Error, Result};

/// Bytes of a header.
pub const SIZE: usize = 512;

const NAME: std::ops::Range<usize> = 0..100;
const LEN: std::ops::Range<usize> = 124..136;
const MTIME: std::ops::Range<usize> = 136..148;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const TYPE: usize = 156;
const MAGIC: std::ops::Range<usize> = 257..265;

/// Largest length that fits the octal field; above it GNU tar's base-256 is used.
const MAX_OCTAL: u64 = 0o777_7777_7777;

/// The header of a section called `name` (a section name, shorter than 100 bytes) of `size`
/// bytes, as the reference builder writes it.
pub fn write(name: &str, size: u64) -> [u8; SIZE] {
    let mut header = [0; SIZE];
    let name = name.as_bytes();
    let len = name.len().min(NAME.len() - 1);
    header[..len].copy_from_slice(&name[..len]);
    if size <= MAX_OCTAL {
        octal(&mut header[LEN.start..LEN.end - 1], size);
    } else {
        header[LEN.start] = 0x80;
        header[LEN.end - 8..LEN.end].copy_from_slice(&size.to_be_bytes());
    }
    octal(&mut header[MTIME.start..MTIME.end - 1], 0);
    header[TYPE] = b'0';
    header[MAGIC].copy_from_slice(b"ustar  \0");
    let sum = checksum(&header);
    octal(&mut header[CHECKSUM.start..CHECKSUM.end - 1], sum);
    header
}

/// Name and size from a header of a regular file.
///
/// # Errors
/// `Corrupt`: not such a header, or its checksum is wrong.
pub fn parse(header: &[u8; SIZE]) -> Result<(String, u64)> {
    let fail = |why: &str| Error::corrupt(format!("tar header: {why}"));
    if !header[MAGIC].starts_with(b"ustar") || !matches!(header[TYPE], b'0' | 0) {
        return Err(fail("not that of a regular file"));
    }
    let stated = number(&header[CHECKSUM]).ok_or_else(|| fail("checksum field"))?;
    if stated != checksum(header) {
        return Err(fail("wrong checksum"));
    }
    let name = header[NAME].split(|&b| b == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name).map_err(|_| fail("name is not text"))?;
    let size = match header[LEN].split_last_chunk::<8>() {
        Some(([0x80, 0, 0, 0], low)) => u64::from_be_bytes(*low),
        _ => number(&header[LEN]).ok_or_else(|| fail("size field"))?,
    };
    Ok((name.to_owned(), size))
}

fn checksum(header: &[u8; SIZE]) -> u64 {
    let spaces = CHECKSUM.len() as u64 * u64::from(b' ');
    let bytes = header[..CHECKSUM.start].iter().chain(&header[CHECKSUM.end..]);
    spaces + bytes.map(|&b| u64::from(b)).sum::<u64>()
}

fn octal(field: &mut [u8], mut value: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (value & 7) as u8;
        value >>= 3;
    }
}

fn number(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches(|c| c == ' ' || c == '\0');
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    u64::from_str_radix(text, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_refuse_damage() {
        for size in [0, 1, 640, MAX_OCTAL, MAX_OCTAL + 1, 1 << 40] {
            let header = write("image.blob", size);
            assert_eq!(parse(&header).unwrap(), ("image.blob".to_owned(), size));
            for at in [0, 130, 150, 156, 257] {
                let mut damaged = header;
                damaged[at] ^= 1;
                assert!(parse(&damaged).is_err(), "byte {at}");
            }
        }
        assert!(parse(&[0; SIZE]).is_err());
    }
}
