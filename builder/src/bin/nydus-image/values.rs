//! Words and numbers that flags take.

use builder::Error;
use clap::ValueEnum;

/// Levels of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// Details of each step.
    Debug,
    /// What was done.
    Info,
    /// What was coped with.
    Warn,
    /// What failed.
    Error,
}

/// What a source is converted from and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConversionType {
    /// Directory.
    #[value(name = "dir-rafs", alias = "directory")]
    DirRafs,
    /// Tar stream, plain or compressed with gzip or zstd.
    #[value(name = "tar-rafs")]
    TarRafs,
    /// Tar stream compressed with gzip.
    #[value(name = "targz-rafs")]
    TargzRafs,
    /// eStargz.
    #[value(name = "estargz-rafs")]
    EstargzRafs,
    /// Reference to a tar, plain or compressed with gzip.
    #[value(name = "targz-ref")]
    TargzRef,
    /// Reference to an eStargz.
    #[value(name = "estargz-ref")]
    EstargzRef,
    /// Reference to an eStargz by its index: JSON, or the whole layer.
    #[value(name = "estargztoc-ref", alias = "stargz_index")]
    EstargztocRef,
    /// Reference to a plain tar, in blocks of 512 bytes.
    #[value(name = "tar-tarfs")]
    TarTarfs,
}

impl ConversionType {
    /// The word on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
    }
}

/// Compressors on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compressor {
    /// Stored.
    #[value(name = "none")]
    None,
    /// Raw LZ4 block.
    #[value(name = "lz4_block")]
    Lz4Block,
    /// zstd frame.
    #[value(name = "zstd")]
    Zstd,
}

/// Digesters on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Digester {
    /// BLAKE3.
    Blake3,
    /// SHA-256.
    Sha256,
}

/// Prefetch policies on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrefetchPolicy {
    /// A table in the bootstrap; patterns are read from stdin, one path a line.
    Fs,
    /// Prefetched data first in the blob; patterns are read from stdin.
    Blob,
    /// None; stdin is not read.
    None,
}

/// Whiteout styles on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhiteoutSpec {
    /// `.wh.` files.
    Oci,
    /// Character devices 0:0 and opaque xattrs.
    Overlayfs,
    /// Keep everything as it is.
    None,
}

/// Versions of the format on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FsVersion {
    /// RAFS v5.
    #[value(name = "5")]
    V5,
    /// RAFS v6.
    #[value(name = "6")]
    V6,
}

/// Optional features on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Feature {
    /// Table of content and chunk digests in the blob.
    BlobToc,
}

/// A number as `0x…` or decimal.
pub fn number(flag: &str, text: &str) -> anyhow::Result<u64> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| Error::invalid(format!("{flag} {text:?}: want a number, decimal or 0x…")).into())
}

/// A number in hexadecimal, with or without `0x`.
pub fn hexadecimal(flag: &str, text: &str) -> anyhow::Result<u64> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    u64::from_str_radix(digits, 16)
        .map_err(|_| Error::invalid(format!("{flag} {text:?}: want a hexadecimal number")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("--chunk-size", "0x1000").unwrap(), 4096);
        assert_eq!(number("--chunk-size", "4096").unwrap(), 4096);
        assert!(number("--chunk-size", "4k").is_err());
        assert_eq!(hexadecimal("--blob-data-size", "10").unwrap(), 16);
        assert_eq!(hexadecimal("--blob-data-size", "0x10").unwrap(), 16);
        assert!(hexadecimal("--blob-data-size", "-1").is_err());
    }
}
