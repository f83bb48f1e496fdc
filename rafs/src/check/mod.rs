//! Verifies a whole image and reports every fault, not the first.
//!
//! [`structure`] runs the door's own validation, collecting instead of stopping, and then
//! what the door lets pass because no reader depends on it: link counts, totals, order of
//! the chunk table. [`data()`] decodes every chunk of a blob and compares it with its digest.

mod data;
mod v5;

use std::collections::HashMap;
use std::ops::ControlFlow;

use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::U32;

pub use data::{DataReport, data};

use crate::bootstrap::{
    Bootstrap, Buffer, ChunkRef, Faults, FileType, Nid, OpenOptions, Step, V5, V6, Walk, validate,
    validate_v5,
};
use crate::format::features::{BlobFeatures, ImageFlags};
use crate::format::superblock::{SUPERBLOCK_OFFSET, Superblock};
use crate::format::v5::is_v5;
use crate::{Error, Result};

/// Faults kept in a report; the rest is counted.
pub const MAX_FAULTS: usize = 1000;

/// What is wrong with an image.
#[derive(Debug, Default)]
pub struct Report {
    /// Up to [`MAX_FAULTS`] broken rules, each with its place.
    pub faults: Vec<Error>,
    /// Faults beyond those.
    pub suppressed: u64,
    /// What the image holds, as far as it could be walked.
    pub counts: Counts,
}

impl Report {
    /// True if nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty() && self.suppressed == 0
    }
}

/// Entries by type, and chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Directories, the root included.
    pub directories: u64,
    /// Names of regular files; hard links count each.
    pub regular: u64,
    /// Symlinks.
    pub symlinks: u64,
    /// Devices, fifos and sockets.
    pub special: u64,
    /// Bytes of all regular files, hard links counted once.
    pub file_bytes: u64,
    /// Chunk indexes of all regular files.
    pub chunk_references: u64,
}

/// Checks the structure of a bootstrap.
///
/// # Errors
/// `Unsupported`: an image of a kind not read yet, by name. Every broken rule is in the
/// report instead.
pub fn structure(bytes: impl Into<Buffer>, options: &OpenOptions) -> Result<Report> {
    let bytes = bytes.into();
    let mut faults = Faults::collect(MAX_FAULTS);
    let (inlined, v5) = (options.inlined_blob_id.as_ref(), is_v5(&bytes));
    let door = if v5 {
        validate_v5(&bytes, inlined, &mut faults).map(drop)
    } else {
        validate(&bytes, inlined, &mut faults).map(drop)
    };
    if let Err(e) = door {
        // After such a fault nothing more can be said.
        if e.kind() != crate::ErrorKind::Corrupt {
            return Err(e);
        }
        faults.report(e)?;
    }
    let mut counts = Counts::default();
    if faults.is_empty() && v5 {
        counts = v5::check(&V5::from_buffer(bytes, options)?, &mut faults)?;
    } else if faults.is_empty() {
        let blocks = Superblock::ref_from_prefix(bytes.get(SUPERBLOCK_OFFSET..).unwrap_or_default())
            .map_or(U32::ZERO, |(sb, _)| sb.blocks);
        let bootstrap = V6::from_buffer(bytes, options)?;
        tables(&bootstrap, blocks.get(), &mut faults)?;
        let mut used = vec![false; bootstrap.chunk_table().len()];
        counts = tree(&bootstrap, &mut faults, &mut |chunk| {
            if let Some(row) = bootstrap.chunk_row(chunk.blob, chunk.index) {
                used[row] = true;
            }
        })?;
        for row in used.iter().enumerate().filter(|(_, used)| !**used).map(|(row, _)| row) {
            faults.report(Error::corrupt(format!("chunk record {row}: no file refers to it")))?;
        }
    }
    let (faults, suppressed) = faults.into_parts();
    Ok(Report { faults, suppressed, counts })
}

/// Totals, flags, order of the chunk table, names of the prefetch table.
fn tables(bootstrap: &V6, blocks: u32, faults: &mut Faults) -> Result<()> {
    let summary = bootstrap.summary();
    let block_size = u64::from(summary.block_size);
    let total: u64 = bootstrap.blobs().iter().map(|b| b.decoded_size / block_size).sum();
    // The field has 32 bits.
    faults
        .require(total as u32 == blocks, || format!("superblock: {blocks} blocks, the blobs have {total}"))?;
    faults.require(!summary.has_xattrs || summary.flags.contains(ImageFlags::HAS_XATTR), || {
        "inodes have xattrs, but the superblock flag is clear".into()
    })?;
    let inlined = bootstrap.blobs().iter().all(|b| b.features.contains(BlobFeatures::INLINED_CHUNK_DIGEST));
    faults.require(inlined == summary.flags.contains(ImageFlags::INLINED_CHUNK_DIGEST), || {
        "the superblock's and the blobs' flags for inlined chunk digests differ".into()
    })?;
    for blob in bootstrap.blobs() {
        faults.require(blob.unverified_chunks == 0, || {
            format!("blob {}: {} chunk references without a digest", blob.id, blob.unverified_chunks)
        })?;
    }
    let table = bootstrap.chunk_table();
    // Equal chunks may lie in several places of one blob: of a plain tar, or of another builder's.
    let key = |row: usize| (table[row].digest, table[row].blob_index.get(), table[row].index.get());
    for row in 1..table.len() {
        faults.require(key(row - 1) < key(row), || {
            format!("chunk record {row}: out of order by digest, blob and number")
        })?;
    }
    let listed = bootstrap.prefetch_table();
    for (place, nid) in listed.iter().enumerate().take_while(|(_, nid)| nid.get() != 0) {
        faults.require(bootstrap.attr(Nid(nid.get().into())).is_ok(), || {
            format!("prefetch table, entry {place}: {nid} is not an inode")
        })?;
    }
    Ok(())
}

/// Link counts and the number of entries; `visit` gets each chunk of each file.
fn tree(bootstrap: &dyn Bootstrap, faults: &mut Faults, visit: &mut dyn FnMut(ChunkRef)) -> Result<Counts> {
    let mut counts = Counts::default();
    // (names found, names stated) of inodes that state or have more than one.
    let mut links: HashMap<Nid, (u32, u32)> = HashMap::new();
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    while let Some(step) = walk.step()? {
        let entry = match step {
            Step::Enter(entry) | Step::Leaf(entry) => entry,
            Step::Leave(_) => continue,
        };
        let attr = bootstrap.attr(entry.nid)?;
        match attr.file_type {
            FileType::Directory => {
                counts.directories += 1;
                let mut children = 0;
                bootstrap.children(entry.nid, 0, &mut |child| {
                    children += u32::from(child.file_type == FileType::Directory);
                    ControlFlow::Continue(())
                })?;
                faults.require(attr.nlink == children + 2, || {
                    let path = walk.path().escape_ascii();
                    format!("/{path}: link count {}, {children} directories inside", attr.nlink)
                })?;
                continue;
            }
            FileType::Regular => counts.regular += 1,
            FileType::Symlink => counts.symlinks += 1,
            _ => counts.special += 1,
        }
        let (found, _) = links.entry(entry.nid).or_insert((0, attr.nlink));
        *found += 1;
        if *found > 1 || attr.file_type != FileType::Regular {
            continue;
        }
        counts.file_bytes += attr.size;
        let chunks = attr.size.div_ceil(u64::from(bootstrap.summary().chunk_size));
        counts.chunk_references += chunks;
        for position in 0..chunks {
            // The door found the number of chunks in 32 bits.
            visit(bootstrap.chunk(entry.nid, position as u32)?);
        }
    }
    let mut wrong: Vec<_> = links.into_iter().filter(|(_, (found, stated))| found != stated).collect();
    wrong.sort_unstable();
    for (nid, (found, stated)) in wrong {
        faults.report(Error::corrupt(format!("inode {nid}: link count {stated}, it has {found} names")))?;
    }
    let entries = counts.directories + counts.regular + counts.symlinks + counts.special;
    faults.require(entries == bootstrap.summary().inode_count, || {
        format!("superblock: {} entries, the tree has {entries}", bootstrap.summary().inode_count)
    })?;
    Ok(counts)
}
