//! From what is wanted to chunks, one at a time: an order takes memory for a window of it, however large
//! the image.

use std::ops::ControlFlow;
use std::sync::Arc;

use rafs::bootstrap::{FileType, Nid};
use rafs::format::limits::MAX_DEPTH;
use rafs::fs::Rafs;
use storage::extent::ChunkExtent;
use storage::ids::ChunkIndex;
use storage::prefetch::Order;

/// Every chunk of every blob, as they lie. Chunks of a blob that the image does not use
/// have no digest here and are left out.
pub fn image(rafs: &Arc<Rafs>) -> Order {
    blobs(rafs, (0..rafs.bootstrap().blobs().len() as u32).collect())
}

/// Every chunk of the blobs at these places of the table, as they lie; without those that the image does
/// not use, as [`image`].
pub fn blobs(rafs: &Arc<Rafs>, places: Vec<u32>) -> Order {
    let rafs = Arc::clone(rafs);
    Box::new(places.into_iter().flat_map(move |blob| {
        let count = rafs.bootstrap().blobs().get(blob as usize).map_or(0, |blob| blob.chunk_count);
        let rafs = Arc::clone(&rafs);
        (0..count).filter_map(move |index| Some((blob, rafs.chunk_extent(blob, ChunkIndex(index)).ok()?)))
    }))
}

/// The chunks of `nodes`, in this order: of files in file order, of directories with all
/// below them in tree order. Links on the way are not followed.
pub fn nodes(rafs: &Arc<Rafs>, nodes: Vec<Nid>) -> Order {
    let walk = Walk { rafs: Arc::clone(rafs), nodes: nodes.into_iter(), directories: Vec::new(), file: None };
    Box::new(walk)
}

/// Stands before the next chunk of an order over nodes.
struct Walk {
    rafs: Arc<Rafs>,
    nodes: std::vec::IntoIter<Nid>,
    /// Directories from a node down to the one being listed, with the cursor behind the last entry.
    directories: Vec<(Nid, u64)>,
    /// A file and its next chunk.
    file: Option<(Nid, u32)>,
}

impl Walk {
    fn enter(&mut self, nid: Nid, file_type: FileType) {
        match file_type {
            FileType::Regular => self.file = Some((nid, 0)),
            // Deeper than any image that opens.
            FileType::Directory if self.directories.len() < MAX_DEPTH => self.directories.push((nid, 0)),
            _ => {}
        }
    }

    /// Goes on to the next node of the tree; false at the end of the listed directory.
    fn next_entry(&mut self, dir: Nid, cursor: u64) -> bool {
        let mut found = None;
        let listed = self.rafs.bootstrap().children(dir, cursor, &mut |entry| {
            found = Some((entry.nid, entry.file_type, entry.next));
            ControlFlow::Break(())
        });
        // What can not be listed can not be read either; whoever reads it is told.
        let Some((nid, file_type, next)) = listed.ok().and(found) else { return false };
        if let Some(last) = self.directories.last_mut() {
            last.1 = next;
        }
        self.enter(nid, file_type);
        true
    }
}

impl Iterator for Walk {
    type Item = (u32, ChunkExtent);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((nid, position)) = self.file {
                match self.rafs.file_chunk(nid, position) {
                    Ok(Some(chunk)) => {
                        self.file = position.checked_add(1).map(|next| (nid, next));
                        return Some(chunk);
                    }
                    // The end; or a damaged blob context, which a reader is told of.
                    Ok(None) | Err(_) => self.file = None,
                }
            } else if let Some(&(dir, cursor)) = self.directories.last() {
                if !self.next_entry(dir, cursor) {
                    self.directories.pop();
                }
            } else {
                let nid = self.nodes.next()?;
                if let Ok(attr) = self.rafs.bootstrap().attr(nid) {
                    self.enter(nid, attr.file_type);
                }
            }
        }
    }
}

/// What an order amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Chunks; one that two files share counts twice.
    pub chunks: u64,
    /// Bytes of their units as stored; neighbours in one unit count once.
    pub bytes: u64,
}

/// Counts `order`, or gives up when `stop` says so.
pub fn total(order: Order, stop: impl Fn() -> bool) -> Option<Total> {
    let mut total = Total::default();
    let mut last = None;
    for (blob, extent) in order {
        if stop() {
            return None;
        }
        total.chunks += 1;
        let unit = Some((blob, extent.unit.clone()));
        if last != unit {
            last = unit;
            total.bytes = total.bytes.saturating_add(extent.unit.compressed.len());
        }
    }
    Some(total)
}
