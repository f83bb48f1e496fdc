//! Tar headers that stand behind what they name.

/// A tar header as the reference builder writes it behind a section of `size` bytes: GNU
/// format, mode and owners left empty, checksum of seven digits.
pub fn tar_header(name: &str, size: u64) -> [u8; 512] {
    /// Largest size of 11 octal digits.
    const MAX_OCTAL: u64 = (1 << 33) - 1;
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    if size <= MAX_OCTAL {
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar  \0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:07o}\0").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reverse_tar_headers_are_valid_tar() {
        for size in [0, 70276, (1 << 33) - 1, 1 << 33] {
            let bytes = tar_header("image.blob", size);
            let header = tar::Header::from_byte_slice(&bytes);
            assert_eq!(header.size().unwrap(), size);
            assert_eq!(header.path().unwrap().to_str(), Some("image.blob"));
            assert!(header.as_gnu().is_some());
        }
        assert_eq!(&tar_header("image.blob", 70276)[148..156], b"0005631\0");
    }
}
