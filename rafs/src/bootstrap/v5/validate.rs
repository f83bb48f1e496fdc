//! The door of RAFS v5: every rule, checked once in O(n), in passes over the slots.
//!
//! No walk is needed. A directory's children lie in slots of their own behind its own slot,
//! and each slot but the root's belongs to exactly one directory: so the slots are a tree.
//! Records do not overlap, so all passes together look at each byte a few times at most.
//! And each inode's digest is compared with what lies directly below it, so together the
//! records prove the root's.

use storage::ids::BlobId;

use super::super::chunks::ChunkRows;
use super::super::faults::Faults;
use super::super::xattr_names::XattrNames;
use super::super::{Blob, FileType};
use super::blobs::{self, Derived};
use super::chunks::{self, Collector};
use super::header::Header;
use super::view::{Record, View, Xattrs};
use crate::format::limits::MAX_DEPTH;
use crate::format::v5::ROOT_INO;
use crate::{Error, Result};

/// What validation leaves behind.
#[derive(Debug)]
pub struct Validated {
    /// Checked header.
    pub header: Header,
    /// Checked blob table.
    pub blobs: Vec<Blob>,
    /// Chunk to the position of its record.
    pub rows: ChunkRows,
}

/// Checks the whole of `bytes`.
///
/// # Errors
/// `Unsupported`: a kind of image that is not read. `Corrupt`: a broken rule; with collecting
/// `faults` only one after which nothing more can be said.
pub fn validate(bytes: &[u8], inlined: Option<&BlobId>, faults: &mut Faults) -> Result<Validated> {
    let mut header = Header::parse(bytes, faults)?;
    let described = blobs::parse(bytes, &header, inlined, faults)?;
    let view = View { bytes, header: &header };
    check_places(view, faults)?;
    let mut derived = Derived::new(described.len());
    for record in (1..=header.entries).filter_map(|slot| view.record(slot).ok()) {
        record.chunks.iter().for_each(|chunk| derived.add(chunk));
    }
    let blobs = derived.complete(described)?;
    let mut validator = Validator {
        view,
        chunks: Collector::new(blobs.len()),
        blobs: &blobs,
        depths: vec![0; header.entries as usize + 1],
        xattrs: XattrNames::default(),
        references: 0,
        faults,
    };
    validator.run()?;
    let Validator { chunks, references, xattrs, .. } = validator;
    let rows = chunks.index(bytes, &blobs, faults)?;
    header.summary.has_xattrs = xattrs.any;
    header.summary.chunk_table = (0, references);
    header.summary.blob_table.1 = blobs.len() as u64;
    Ok(Validated { header, blobs, rows })
}

/// Every record can be read, and none lies in a table or in another record.
fn check_places(view: View<'_>, faults: &mut Faults) -> Result<()> {
    let mut places = Vec::with_capacity(view.header.entries as usize);
    for slot in 1..=view.header.entries {
        match view.record(slot) {
            Ok(record) => places.push((record.offset, record.end)),
            Err(e) => faults.report(e)?,
        }
    }
    places.extend(view.header.reserved.iter().filter(|r| !r.is_empty()).map(|r| (r.start, r.end)));
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(pair) => Err(Error::corrupt(format!(
            "inodes and tables overlap: {} to {}, and {} to {}",
            pair[0].0, pair[0].1, pair[1].0, pair[1].1
        ))),
        None => Ok(()),
    }
}

struct Validator<'a, 'f> {
    view: View<'a>,
    blobs: &'f [Blob],
    chunks: Collector,
    /// Directories above each slot; 0: no directory has it yet.
    depths: Vec<u16>,
    xattrs: XattrNames<'a>,
    references: u64,
    faults: &'f mut Faults,
}

impl<'a> Validator<'a, '_> {
    fn run(&mut self) -> Result<()> {
        let root = self.view.record(ROOT_INO as u32)?;
        if root.file_type != FileType::Directory || root.ino() != ROOT_INO || root.raw.i_parent.get() != 0 {
            return Err(Error::corrupt("the first slot does not hold a root directory"));
        }
        self.depths[ROOT_INO as usize] = 1;
        for slot in 1..=self.view.header.entries {
            // Those that can not be read were reported.
            let Ok(record) = self.view.record(slot) else { continue };
            if let Err(e) = self.record(&record) {
                let e = e.context(self.path(&record));
                self.faults.report(e)?;
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'a>) -> Result<()> {
        if self.depths[record.slot as usize] == 0 {
            return Err(Error::corrupt("no directory has it"));
        }
        if record.ino() != u64::from(record.slot) {
            self.hard_link(record)?;
        }
        match record.file_type {
            FileType::Directory => self.directory(record)?,
            FileType::Regular => self.file(record)?,
            FileType::Symlink if record.target.contains(&0) => {
                return Err(Error::corrupt("symlink target contains NUL"));
            }
            _ => {}
        }
        self.digest(record)?;
        self.xattrs(record)
    }

    /// A later name of a file: the first one must say the same.
    fn hard_link(&self, record: &Record<'a>) -> Result<()> {
        let first = u32::try_from(record.ino())
            .ok()
            .filter(|&first| first < record.slot)
            .and_then(|first| self.view.record(first).ok());
        let same = first.is_some_and(|first| {
            first.ino() == record.ino()
                && first.file_type == FileType::Regular
                && record.file_type == FileType::Regular
                && first.raw.i_nlink == record.raw.i_nlink
                && first.raw.i_size == record.raw.i_size
                && first.raw.i_digest == record.raw.i_digest
        });
        if same {
            Ok(())
        } else {
            Err(Error::corrupt(format!("inode number {}: no earlier file is the same", record.raw.i_ino)))
        }
    }

    /// Children lie behind their directory, belong to it alone and are sorted by name.
    fn directory(&mut self, record: &Record<'a>) -> Result<()> {
        let (first, count) = (record.raw.i_child_index.get(), record.raw.i_child_count.get());
        if count == 0 {
            return Ok(());
        }
        let end = first.checked_add(count).filter(|&end| end - 1 <= self.view.header.entries);
        let Some(end) = end.filter(|_| first > record.slot) else {
            return Err(Error::corrupt(format!("{count} children from slot {first} on")));
        };
        let depth = self.depths[record.slot as usize];
        if usize::from(depth) >= MAX_DEPTH {
            return Err(Error::corrupt("directories are nested too deeply"));
        }
        let mut last: &[u8] = b"";
        for slot in first..end {
            let place = &mut self.depths[slot as usize];
            if *place != 0 {
                return Err(Error::corrupt(format!("slot {slot} is reached twice: a cycle, or two parents")));
            }
            *place = depth + 1;
            let Ok(child) = self.view.record(slot) else { continue };
            let name = child.name;
            let named = |why: &str| Err(Error::corrupt(format!("entry \"{}\" {why}", name.escape_ascii())));
            if child.raw.i_parent != record.raw.i_ino {
                named("has another parent")?;
            }
            if matches!(name, b"." | b"..") || name.contains(&b'/') || name.contains(&0) {
                named("is no name")?;
            }
            if last >= name {
                named("is a duplicate or out of order")?;
            }
            last = name;
        }
        Ok(())
    }

    fn file(&mut self, record: &Record<'a>) -> Result<()> {
        let chunk_size = u64::from(self.view.header.summary.chunk_size);
        self.references += record.chunks.len() as u64;
        for (position, chunk) in (0u64..).zip(record.chunks) {
            let start = position * chunk_size;
            let want = (record.raw.i_size.get() - start).min(chunk_size);
            chunks::check(chunk, self.blobs, start, want)
                .map_err(|e| e.context(format_args!("chunk {position}")))?;
            self.chunks.add(chunk, record.chunks_at + position * size_of_val(chunk) as u64);
        }
        Ok(())
    }

    /// The digest over what lies directly below.
    fn digest(&self, record: &Record<'a>) -> Result<()> {
        let mut hasher = self.view.header.summary.digester.hasher();
        match record.file_type {
            FileType::Regular => record.chunks.iter().for_each(|chunk| hasher.update(&chunk.digest)),
            FileType::Directory => {
                let first = record.raw.i_child_index.get();
                for slot in (first..).take(record.raw.i_child_count.get() as usize) {
                    // A child that can not be read was reported.
                    let Ok(child) = self.view.record(slot) else { return Ok(()) };
                    hasher.update(&child.raw.i_digest);
                }
            }
            _ => hasher.update(record.target),
        }
        if hasher.finish().0 == record.raw.i_digest {
            Ok(())
        } else {
            Err(Error::corrupt("its digest is not that of what it holds"))
        }
    }

    fn xattrs(&mut self, record: &Record<'a>) -> Result<()> {
        self.xattrs.check(Xattrs(record.xattrs))
    }

    /// Slot and path of a record, for messages. Parents may be forged: each must lie before its child.
    fn path(&self, record: &Record<'a>) -> String {
        const LONGEST: usize = 16;
        let mut names = Vec::new();
        let mut at = *record;
        while u64::from(at.slot) != ROOT_INO && names.len() < LONGEST {
            names.push(at.name.escape_ascii().to_string());
            let parent = u32::try_from(at.raw.i_parent.get()).ok().filter(|&parent| parent < at.slot);
            match parent.and_then(|parent| self.view.record(parent).ok()) {
                Some(parent) => at = parent,
                None => break,
            }
        }
        names.reverse();
        format!("inode {} at {}: /{}", record.slot, record.offset, names.join("/"))
    }
}
