//! A blob file read from its end, as the converter does: by tar headers behind what they name, or by
//! the table of content. Written from the format's description alone.

use std::ops::Range;

use sha2::{Digest, Sha256};
use tests::{Context, Result, bail, ensure};

/// Bytes of a tar header.
const HEADER: usize = 512;
/// Bytes of an entry of the table of content.
const ENTRY: usize = 128;
/// The table's own name.
const TABLE: &str = "rafs.blob.toc";

/// One row of the table of content.
#[derive(Clone, Debug)]
pub struct Row {
    pub flags: u32,
    pub name: String,
    digest: [u8; 32],
    stored: Range<usize>,
    decoded: usize,
}

/// Sections with their places, in file order.
pub fn sections(blob: &[u8]) -> Result<Vec<(String, Range<usize>)>> {
    let (mut found, mut end) = (Vec::new(), blob.len());
    while end > 0 {
        let at = end.checked_sub(HEADER).context("no room for a header")?;
        let (name, size) = header(&blob[at..end])?;
        end = at.checked_sub(size).with_context(|| format!("{name} begins before the file"))?;
        found.push((name, end..at));
    }
    found.reverse();
    Ok(found)
}

/// Name and size in a header whose checksum is right.
fn header(bytes: &[u8]) -> Result<(String, usize)> {
    let text = |field: Range<usize>| -> Result<&str> {
        let field = &bytes[field];
        let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
        Ok(std::str::from_utf8(&field[..end])?.trim())
    };
    let sum: usize =
        bytes.iter().enumerate().map(|(at, &b)| if (148..156).contains(&at) { 32 } else { b.into() }).sum();
    ensure!(usize::from_str_radix(text(148..156)?, 8)? == sum, "wrong checksum");
    ensure!(&bytes[257..262] == b"ustar" && bytes[156] == b'0', "no header of a regular file");
    Ok((text(0..100)?.to_owned(), usize::from_str_radix(text(124..136)?, 8)?))
}

/// The table of content.
pub fn table(blob: &[u8]) -> Result<Vec<Row>> {
    let Some((name, range)) = sections(blob)?.pop() else { bail!("an empty file") };
    ensure!(name == TABLE && range.len().is_multiple_of(ENTRY) && range.len() <= 1 << 20, "{name} {range:?}");
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | usize::from(byte));
    let rows = blob[range].chunks(ENTRY).map(|entry| {
        let name = &entry[8..24];
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        let start = number(&entry[56..64]);
        ensure!(
            entry[4..8] == [0; 4] && entry[80..].iter().all(|&byte| byte == 0),
            "reserved bytes are used"
        );
        Ok(Row {
            flags: number(&entry[0..4]) as u32,
            name: std::str::from_utf8(&name[..end])?.to_owned(),
            digest: entry[24..56].try_into()?,
            stored: start..start + number(&entry[64..72]),
            decoded: number(&entry[72..80]),
        })
    });
    rows.collect()
}

/// A section by the table of content, decoded and compared with its digest.
pub fn extract(blob: &[u8], name: &str) -> Result<Vec<u8>> {
    let row = table(blob)?.into_iter().find(|row| row.name == name).with_context(|| name.to_owned())?;
    let stored = blob.get(row.stored.clone()).with_context(|| format!("{name} lies outside"))?;
    // The converter knows no other.
    let decoded = match row.flags & 0xf {
        1 => stored.to_vec(),
        2 => zstd::decode_all(stored)?,
        other => bail!("{name} is compressed in way {other}, which the converter does not know"),
    };
    ensure!(decoded.len() == row.decoded, "{name}: {} bytes, {} are stated", decoded.len(), row.decoded);
    ensure!(Sha256::digest(&decoded)[..] == row.digest, "{name} has another digest");
    Ok(decoded)
}

/// The bootstrap: by the table of content, or plain before the last header.
pub fn bootstrap(blob: &[u8]) -> Result<Vec<u8>> {
    match sections(blob)?.pop() {
        Some((name, _)) if name == TABLE => extract(blob, "image.boot"),
        Some((name, range)) if name == "image.boot" => Ok(blob[range].to_vec()),
        other => bail!("ends with {other:?}"),
    }
}

/// Names of the sections in file order.
pub fn names(blob: &[u8]) -> Result<Vec<String>> {
    Ok(sections(blob)?.into_iter().map(|(name, _)| name).collect())
}
