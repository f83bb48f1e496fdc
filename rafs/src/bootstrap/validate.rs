//! The door: every rule that needs more than one record, checked once in O(n).
//!
//! One walk over the tree with an explicit stack. It ends on any input because each
//! inode is entered once (a bit per possible inode), the entries are bounded by the
//! superblock's count, which is bounded by the file, and the bytes that inodes claim for
//! themselves may not exceed the inode area, so that overlapping inodes can not make
//! the same bytes be looked at again and again.

use std::ops::Range;

use storage::ids::BlobId;

use super::bytes::records;
use super::chunks::ChunkRows;
use super::faults::Faults;
use super::header::Header;
use super::view::{Inode, View, dirent_type};
use super::xattr_names::XattrNames;
use super::{Blob, FileType, Nid, blobs};
use crate::format::chunk::ChunkInfo;
use crate::format::dirent::{Dirent, FT_DIRECTORY};
use crate::format::limits::{MAX_CONTEXT_SIZE, MAX_DEPTH, MAX_NAME_LEN, SLOT_SIZE};
use crate::{Error, Result};

/// Set of nids: one bit for each 32 bytes of the inode area.
#[derive(Debug)]
pub struct NidSet(Box<[u64]>);

impl NidSet {
    fn new(header: &Header) -> Self {
        let slots = (header.summary.bootstrap_size - header.meta_offset) / SLOT_SIZE + 1;
        Self(vec![0; slots.div_ceil(64) as usize].into_boxed_slice())
    }

    /// True if `nid` is in the set.
    pub fn contains(&self, nid: Nid) -> bool {
        usize::try_from(nid.0 / 64)
            .ok()
            .and_then(|i| self.0.get(i))
            .is_some_and(|w| w >> (nid.0 % 64) & 1 != 0)
    }

    /// Adds `nid`, which lies in the inode area; answers whether it was new.
    fn insert(&mut self, nid: Nid) -> bool {
        let (word, bit) = (&mut self.0[(nid.0 / 64) as usize], 1u64 << (nid.0 % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// What validation leaves behind.
#[derive(Debug)]
pub struct Validated {
    /// Checked header.
    pub header: Header,
    /// Checked blob table.
    pub blobs: Vec<Blob>,
    /// Chunk to row.
    pub rows: ChunkRows,
    /// Every inode that the tree reaches.
    pub inodes: NidSet,
}

/// Checks the whole of `bytes`.
///
/// # Errors
/// `Unsupported`: an image of a kind not read yet, by name. `Corrupt`: a broken rule; with
/// collecting `faults` only one after which nothing more can be said.
pub fn validate(bytes: &[u8], inlined: Option<&BlobId>, faults: &mut Faults) -> Result<Validated> {
    let mut header = Header::parse(bytes, faults)?;
    let mut blobs = blobs::parse(bytes, &header, inlined, faults)?;
    let (offset, count) = header.summary.chunk_table;
    let table: &[ChunkInfo] = records(bytes, offset, count, "chunk table")?;
    let rows = ChunkRows::build(table, &blobs, faults)?;
    let mut walk = Validator {
        view: View { bytes, header: &header },
        blobs: &mut blobs,
        rows: &rows,
        table,
        faults,
        inodes: NidSet::new(&header),
        stack: Vec::new(),
        entries: 1,
        unclaimed: bytes.len() as u64 - header.meta_offset,
        xattrs: XattrNames::default(),
    };
    walk.run()?;
    let (inodes, has_xattrs) = (walk.inodes, walk.xattrs.any);
    header.summary.has_xattrs = has_xattrs;
    // A mount holds these; each is capped, but 254 small ones could still decode to 127 GiB.
    let held = blobs.iter().filter(|b| b.needs_context()).map(|b| b.record.ci_uncompressed_size.get());
    let held = held.fold(0, u64::saturating_add);
    faults.require(held <= MAX_CONTEXT_SIZE, || {
        format!(
            "the contexts needed to read the image take {held} bytes, at most {MAX_CONTEXT_SIZE} are accepted"
        )
    })?;
    Ok(Validated { header, blobs, rows, inodes })
}

/// A directory being walked.
struct Frame<'a> {
    inode: Inode,
    parent: Nid,
    name: &'a [u8],
    blocks: u64,
    block: u64,
    index: usize,
    /// Name of the entry before, for the order.
    last: &'a [u8],
    dot: bool,
    dot_dot: bool,
}

struct Validator<'a, 'f> {
    view: View<'a>,
    blobs: &'f mut [Blob],
    rows: &'f ChunkRows,
    table: &'a [ChunkInfo],
    faults: &'f mut Faults,
    inodes: NidSet,
    stack: Vec<Frame<'a>>,
    entries: u64,
    /// Bytes of the inode area that no inode has claimed yet.
    unclaimed: u64,
    xattrs: XattrNames<'a>,
}

impl<'a> Validator<'a, '_> {
    fn run(&mut self) -> Result<()> {
        let root = self.view.header.root;
        let inode = self.view.inode(root).map_err(|e| Error::corrupt(format!("root: {e}")))?;
        if inode.attr.file_type != FileType::Directory {
            return Err(Error::corrupt(format!("root inode {root} is not a directory")));
        }
        self.enter(inode, root, b"")?;
        while let Some(frame) = self.stack.last_mut() {
            if frame.block == frame.blocks {
                let complete = frame.dot && frame.dot_dot;
                let path = (!complete).then(|| self.path(b""));
                self.stack.pop();
                if let Some(path) = path {
                    self.faults.report(Error::corrupt(format!("{path}: no \".\" or no \"..\" entry")))?;
                }
                continue;
            }
            let step = self.view.dir_block(&frame.inode, frame.block).and_then(|block| {
                if frame.index == block.len() {
                    frame.index = 0;
                    frame.block += 1;
                    return Ok(None);
                }
                frame.index += 1;
                block.entry(frame.index - 1).map(Some)
            });
            match step {
                Ok(None) => {}
                Ok(Some((entry, name))) => self.entry(entry, name)?,
                Err(e) => {
                    // What follows in this directory can not be found.
                    let e = e.context(self.path(b""));
                    self.stack.pop();
                    self.faults.report(e)?;
                }
            }
        }
        Ok(())
    }

    /// One entry of the directory on top of the stack.
    fn entry(&mut self, entry: &'a Dirent, name: &'a [u8]) -> Result<()> {
        let (nid, is_dir) = (Nid(entry.nid.get()), entry.file_type == FT_DIRECTORY);
        let Some(frame) = self.stack.last_mut() else { return Ok(()) };
        let ordered = frame.last < name;
        frame.last = name;
        if !ordered {
            self.fault(name, "is a duplicate or out of order in its directory")?;
            return Ok(());
        }
        match name {
            b"." => {
                frame.dot = true;
                if nid != frame.inode.attr.nid || !is_dir {
                    self.fault(name, "does not point to its own directory")?;
                }
            }
            b".." => {
                frame.dot_dot = true;
                if nid != frame.parent || !is_dir {
                    self.fault(name, "does not point to the parent directory")?;
                }
            }
            _ if name.len() > MAX_NAME_LEN || name.contains(&b'/') || name.contains(&0) => {
                self.fault(name, "name is longer than 255 bytes, or contains / or NUL")?;
            }
            _ => self.child(entry, nid, name)?,
        }
        Ok(())
    }

    fn child(&mut self, entry: &'a Dirent, nid: Nid, name: &'a [u8]) -> Result<()> {
        self.entries += 1;
        if self.entries > self.view.header.summary.inode_count {
            return Err(Error::corrupt(format!(
                "{}: more entries than the {} of the superblock",
                self.path(name),
                self.view.header.summary.inode_count
            )));
        }
        let inode = match self.view.inode(nid) {
            Ok(inode) => inode,
            Err(e) => {
                let e = Error::corrupt(e.to_string()).context(self.path(name));
                return self.faults.report(e);
            }
        };
        if dirent_type(inode.attr.file_type) != entry.file_type {
            self.fault(name, "entry and inode differ in type")?;
        }
        if inode.attr.file_type == FileType::Directory {
            let parent = self.stack.last().map_or(nid, |frame| frame.inode.attr.nid);
            return self.enter(inode, parent, name);
        }
        if !self.inodes.insert(nid) {
            return Ok(());
        }
        self.claim(&inode, name)?;
        if let Err(e) = self.leaf(&inode) {
            let e = e.context(self.path(name));
            self.faults.report(e)?;
        }
        Ok(())
    }

    /// Puts a directory on the stack.
    fn enter(&mut self, inode: Inode, parent: Nid, name: &'a [u8]) -> Result<()> {
        if !self.inodes.insert(inode.attr.nid) {
            return self.fault(name, "directory is reached twice: a cycle, or two parents");
        }
        if self.stack.len() >= MAX_DEPTH {
            return self.fault(name, "directories are nested too deeply");
        }
        self.claim(&inode, name)?;
        let checked = self.view.data_ranges(&inode).and_then(|(blocks, inline)| {
            self.outside_tables(&inode, &[blocks, inline])?;
            self.xattrs(&inode)
        });
        if let Err(e) = checked {
            let e = e.context(self.path(name));
            return self.faults.report(e);
        }
        let blocks = self.view.dir_block_count(&inode);
        self.stack.push(Frame {
            inode,
            parent,
            name,
            blocks,
            block: 0,
            index: 0,
            last: b"",
            dot: false,
            dot_dot: false,
        });
        Ok(())
    }

    /// Takes the bytes of an inode met for the first time from the unclaimed ones.
    fn claim(&mut self, inode: &Inode, name: &[u8]) -> Result<()> {
        let claimed = inode.claimed(self.view.header.summary.chunk_size);
        self.unclaimed = self.unclaimed.checked_sub(claimed).ok_or_else(|| {
            Error::corrupt(format!("{}: inodes overlap, or claim more bytes than there are", self.path(name)))
        })?;
        Ok(())
    }

    fn leaf(&mut self, inode: &Inode) -> Result<()> {
        match inode.attr.file_type {
            FileType::Regular => self.chunks(inode)?,
            FileType::Symlink => {
                let (blocks, inline) = self.view.data_ranges(inode)?;
                self.outside_tables(inode, &[blocks, inline])?;
                if self.view.link_target(inode)?.contains(&0) {
                    return Err(Error::corrupt("symlink target contains NUL"));
                }
            }
            _ => self.outside_tables(inode, &[])?,
        }
        self.xattrs(inode)
    }

    fn chunks(&mut self, inode: &Inode) -> Result<()> {
        let indexes = self.view.chunk_indexes(inode)?;
        let start = (inode.offset + inode.inode_size + inode.xattr_size).next_multiple_of(8);
        let index_bytes = start..start + size_of_val(indexes) as u64;
        self.outside_tables(inode, std::slice::from_ref(&index_bytes))?;
        let summary = &self.view.header.summary;
        let (chunk_size, block_size) = (u64::from(summary.chunk_size), u64::from(summary.block_size));
        let mut left = inode.attr.size;
        for (position, index) in indexes.iter().enumerate() {
            let len = left.min(chunk_size);
            left -= len;
            let fail = |why: String| Err(Error::corrupt(format!("chunk {position}: {why}")));
            let Some(blob_index) = u32::from(index.device_id).checked_sub(1) else {
                return fail("no blob (a hole), which RAFS does not have".into());
            };
            let blob_count = self.blobs.len();
            let Some(blob) = self.blobs.get_mut(blob_index as usize) else {
                return fail(format!("blob {blob_index} of {blob_count}"));
            };
            let number = index.chunk_index();
            if number >= blob.chunk_count {
                return fail(format!("number {number} in blob {} of {} chunks", blob.id, blob.chunk_count));
            }
            let decoded_offset = u64::from(index.blkaddr.get()) * block_size;
            if decoded_offset + len > blob.decoded_size {
                return fail(format!(
                    "{len} bytes at {decoded_offset} of the {} of blob {}",
                    blob.decoded_size, blob.id
                ));
            }
            match self.rows.get(blob_index, number).and_then(|row| self.table.get(row)) {
                Some(record)
                    if record.uncompressed_offset.get() != decoded_offset
                        || u64::from(record.uncompressed_size.get()) != len =>
                {
                    return fail(format!(
                        "file has {len} bytes at {decoded_offset}, the record of chunk {number} of blob {} {} at {}",
                        blob.id, record.uncompressed_size, record.uncompressed_offset
                    ));
                }
                Some(_) => {}
                None => blob.unverified_chunks += 1,
            }
        }
        Ok(())
    }

    fn xattrs(&mut self, inode: &Inode) -> Result<()> {
        self.xattrs.check(self.view.xattrs(inode)?)
    }

    /// No byte of an inode lies in a superblock or table.
    fn outside_tables(&self, inode: &Inode, data: &[Range<u64>]) -> Result<()> {
        let own = inode.offset..inode.offset + inode.inode_size + inode.xattr_size;
        let touches = |range: &Range<u64>| {
            self.view.header.reserved.iter().any(|r| range.start < r.end && r.start < range.end)
        };
        if touches(&own) || data.iter().any(touches) {
            return Err(Error::corrupt(format!("inode at {} or its data lies in a table", inode.offset)));
        }
        Ok(())
    }

    fn fault(&mut self, name: &[u8], why: &str) -> Result<()> {
        let fault = Error::corrupt(format!("{}: {why}", self.path(name)));
        self.faults.report(fault)
    }

    /// Path of an entry of the directory on top of the stack, for messages.
    fn path(&self, name: &[u8]) -> String {
        const LONGEST: usize = 1024;
        let mut path = String::new();
        for part in self.stack.iter().map(|f| f.name).chain([name]).filter(|n| !n.is_empty()) {
            path.push('/');
            path.extend(part.escape_ascii().map(char::from));
            if path.len() > LONGEST {
                path.push('…');
                return path;
            }
        }
        if path.is_empty() { "/".into() } else { path }
    }
}
