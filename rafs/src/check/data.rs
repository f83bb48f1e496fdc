//! Every chunk of a blob against its digest.

use storage::extent::{ChunkExtent, FetchUnit};
use storage::ids::{ByteRange, ChunkIndex};

use super::MAX_FAULTS;
use crate::blob_file::ReadAt;
use crate::bootstrap::{Blob, Faults};
use crate::format::features::{BlobFeatures, ChunkFlags};
use crate::fs::Rafs;
use crate::{Error, ErrorKind, Result};

/// What was found in one blob.
#[derive(Debug, Default)]
pub struct DataReport {
    /// Up to [`MAX_FAULTS`] faults, each naming its chunk.
    pub faults: Vec<Error>,
    /// Faults beyond those.
    pub suppressed: u64,
    /// Chunks that match their digests.
    pub verified: u64,
    /// Chunks that nothing vouches for: no record in this image.
    pub unverified: u64,
    /// Stored bytes of chunk data that belong to no chunk this image knows.
    pub unreferenced_bytes: u64,
}

/// Decodes each chunk of blob `number` that the image knows, from stored bytes that `read`
/// supplies, and compares it with its digest and CRC.
///
/// Units that overlap without being one and the same are faults, but for slices of a gzip file. Bytes that no known chunk
/// covers are only counted: an image may use a part of a blob that others share.
///
/// # Errors
/// `NotFound`: no such blob. Whatever `read` answers, except `Corrupt`, which is a fault of
/// the chunk.
pub fn data(rafs: &Rafs, number: u32, read: &mut ReadAt<'_>) -> Result<DataReport> {
    let bootstrap = rafs.bootstrap().clone();
    let blob = bootstrap
        .blobs()
        .get(number as usize)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("blob {number} is not in the blob table")))?;
    let mut faults = Faults::collect(MAX_FAULTS);
    let mut report = DataReport::default();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    // Members of a batch follow each other, so the unit decoded last is kept.
    let mut last: Option<(FetchUnit, Vec<u8>)> = None;
    for index in (0..blob.chunk_count).map(ChunkIndex) {
        let extent = match rafs.chunk_extent(number, index) {
            Ok(extent) => extent,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => {
                faults.report(e)?;
                continue;
            }
        };
        let span = (extent.unit.compressed.start(), extent.unit.compressed.end());
        if ranges.last() != Some(&span) {
            ranges.push(span);
        }
        if last.as_ref().is_none_or(|(unit, _)| *unit != extent.unit) {
            last = match decode(&extent.unit, read) {
                Ok(bytes) => Some((extent.unit.clone(), bytes)),
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    faults.report(e.context(format_args!("blob {}, chunk {index}", blob.id)))?;
                    None
                }
                Err(e) => return Err(e),
            };
        }
        let Some((_, unit)) = &last else { continue };
        let crc = bootstrap
            .chunk_info(number, index)
            .filter(|r| ChunkFlags::from_bits_retain(r.flags.get()).contains(ChunkFlags::HAS_CRC32))
            .map(|r| r.crc32.get());
        match compare(&extent, unit, crc) {
            Ok(true) => report.verified += 1,
            Ok(false) => report.unverified += 1,
            Err(e) => faults.report(e.context(format_args!("blob {}, chunk {index}", blob.id)))?,
        }
    }
    report.unreferenced_bytes = uncovered(blob, ranges, &mut faults)?;
    (report.faults, report.suppressed) = faults.into_parts();
    Ok(report)
}

fn decode(unit: &FetchUnit, read: &mut ReadAt<'_>) -> Result<Vec<u8>> {
    let stored = read(unit.compressed)?;
    // At most 16 MiB, the largest unit the door lets in.
    let mut decoded = vec![0; unit.decoded_len as usize];
    unit.decode(&stored, &mut decoded)
        .map_err(|e| Error::corrupt("stored bytes do not decode").with_source(e))?;
    Ok(decoded)
}

/// True if the chunk matches its digest, false if it has none.
fn compare(extent: &ChunkExtent, unit: &[u8], crc: Option<u32>) -> Result<bool> {
    let start = extent.offset_in_unit as usize;
    let chunk = unit
        .get(start..start + extent.len as usize)
        .ok_or_else(|| Error::corrupt("the chunk reaches beyond its unit"))?;
    if let Some(crc) = crc
        && crc32c::crc32c(chunk) != crc
    {
        return Err(Error::corrupt(format!("its CRC-32C is not {crc:#010x}")));
    }
    match extent.digest {
        Some(expected) if expected.algorithm.digest(chunk) != expected.digest => {
            Err(Error::corrupt(format!("its {} digest is not {}", expected.algorithm, expected.digest)))
        }
        Some(_) => Ok(true),
        None => Ok(false),
    }
}

/// Bytes of chunk data outside all units; overlaps of units are faults.
fn uncovered(blob: &Blob, mut ranges: Vec<(u64, u64)>, faults: &mut Faults) -> Result<u64> {
    ranges.sort_unstable();
    ranges.dedup();
    let mut covered = 0;
    let mut end = 0;
    for (start, stop) in ranges {
        // Slices of a gzip file may share the block where one ends and the next begins.
        if start < end && !blob.features.contains(BlobFeatures::ZRAN) {
            let range = ByteRange::new(start, stop - start)?;
            faults.report(Error::corrupt(format!(
                "blob {}: the unit at {range} overlaps the one before, which ends at {end}",
                blob.id
            )))?;
        }
        covered += stop.saturating_sub(start.max(end));
        end = end.max(stop);
    }
    Ok(blob.data_size.saturating_sub(covered))
}
