//! The chunks of a tree's files, in order of the walk.

use std::collections::HashSet;

use rafs::bootstrap::{FileType, Nid, Step, Walk};
use rafs::fs::Rafs;
use storage::extent::ChunkExtent;

use crate::Result;

/// Blob and extent of each chunk of each regular file, files in byte order of names, parents
/// before children. A file with several names comes once, at the first.
pub struct FileChunks<'a> {
    rafs: &'a Rafs,
    walk: Walk<'a>,
    /// Files with several names that have come already.
    linked: &'a HashSet<Nid>,
    seen: HashSet<Nid>,
    /// The file at hand and its next chunk.
    file: Option<(Nid, u32)>,
    failed: bool,
}

impl<'a> FileChunks<'a> {
    /// Those of the whole image. `linked`: the files with several names.
    pub fn new(rafs: &'a Rafs, linked: &'a HashSet<Nid>) -> Self {
        let bootstrap = &**rafs.bootstrap();
        Self {
            rafs,
            walk: Walk::new(bootstrap, bootstrap.root()),
            linked,
            seen: HashSet::new(),
            file: None,
            failed: false,
        }
    }

    fn step(&mut self) -> Result<Option<(u32, ChunkExtent)>> {
        loop {
            if let Some((nid, position)) = self.file {
                if let Some(chunk) = self.rafs.file_chunk(nid, position)? {
                    self.file = Some((nid, position + 1));
                    return Ok(Some(chunk));
                }
                self.file = None;
            }
            match self.walk.step()? {
                None => return Ok(None),
                Some(Step::Leaf(entry)) if entry.file_type == FileType::Regular => {
                    if !self.linked.contains(&entry.nid) || self.seen.insert(entry.nid) {
                        self.file = Some((entry.nid, 0));
                    }
                }
                Some(_) => {}
            }
        }
    }
}

impl Iterator for FileChunks<'_> {
    type Item = Result<(u32, ChunkExtent)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.step();
        self.failed = next.is_err();
        next.transpose()
    }
}
