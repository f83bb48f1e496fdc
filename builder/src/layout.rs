//! Pure: a tree goes in, the place of every inode comes out. Same tree, same image.
//!
//! This is the placement algorithm of the reference builder (rafs-v6 appendix A), so that
//! bootstraps come out byte for byte. A cursor grows through the inode area; inodes whose
//! inline tail would cross a block boundary move on to the next block, and what they leave
//! free at the end of a block is handed to later inodes that fit, smallest gap first, oldest
//! block first.
//!
//! Positions are relative to the start of the inode area, whose first block stays unused.

use std::collections::VecDeque;

use rafs::format::limits::{BLOCK_SIZE, MAX_BOOTSTRAP_SIZE, MAX_DEPTH, SLOT_SIZE};

use crate::tree::{Children, Content, InodeId, Tree};
use crate::{Error, Result};

/// Bytes of an extended inode.
const INODE_SIZE: u64 = size_of::<rafs::format::inode::ExtendedInode>() as u64;
/// Bytes of a directory entry without its name.
const DIRENT_SIZE: u64 = size_of::<rafs::format::dirent::Dirent>() as u64;
/// Bytes of a chunk index.
const CHUNK_INDEX_SIZE: u64 = size_of::<rafs::format::inode::ChunkIndexRecord>() as u64;

/// What placement depends on besides the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// EROFS block size: 4096, or 512 for plain tars.
    pub block_size: u64,
    /// Chunk size of the image.
    pub chunk_size: u32,
    /// Byte where the inode area starts in the bootstrap.
    pub meta_offset: u64,
}

/// Where one inode lies and what is counted about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Sequence number, from 1 = root; 0 for inodes the root does not reach.
    pub ino: u32,
    /// Link count.
    pub nlink: u32,
    /// Position in units of 32 bytes from the start of the inode area, which is the nid.
    pub slot: u32,
    /// Directories and symlinks: first block of data that is not inline, counted from the
    /// start of the bootstrap.
    pub block: u32,
    /// Directories and symlinks: the last part of the data follows the inode.
    pub inline: bool,
}

impl Place {
    /// The inode's nid.
    pub fn nid(self) -> u64 {
        u64::from(self.slot)
    }

    /// Byte of the inode from the start of the inode area.
    pub fn offset(self) -> u64 {
        u64::from(self.slot) * SLOT_SIZE
    }
}

/// Places of all inodes of one tree.
#[derive(Debug)]
pub struct Layout {
    places: Vec<Place>,
    /// Bytes of the inode area, its unused first block included; a multiple of the block size.
    pub area_size: u64,
    /// Directory entries with root, hard links counted each.
    pub entry_count: u32,
}

impl Layout {
    /// The place of `id`.
    ///
    /// # Panics
    /// If `id` is not of the tree that was laid out.
    pub fn place(&self, id: InodeId) -> &Place {
        &self.places[id.0 as usize]
    }
}

/// Places every inode of `tree`.
///
/// # Errors
/// `Limit`: the bootstrap would outgrow what a reader accepts, directories are nested too
/// deep, or there are 2^31 entries.
pub fn lay_out(tree: &Tree, geometry: &Geometry) -> Result<Layout> {
    let mut placer = Placer {
        tree,
        geometry: *geometry,
        // Whatever the block size: nothing may have nid 0.
        cursor: BLOCK_SIZE,
        free: vec![VecDeque::new(); (geometry.block_size / SLOT_SIZE) as usize],
        places: vec![Place::default(); tree.inode_count()],
        entry_count: 1,
    };
    placer.places[tree.root().0 as usize].ino = 1;
    let mut stack = vec![(tree.root(), 0usize)];
    while let Some((dir, depth)) = stack.pop() {
        // What readers accept: the root is at depth 0.
        if depth >= MAX_DEPTH {
            return Err(Error::limit(format!("directories nested deeper than {}", MAX_DEPTH - 1)));
        }
        let Some(children) = tree.inode(dir).children() else { continue };
        placer.directory(dir, children)?;
        // The stack is popped from its end: the first child directory comes next.
        stack.extend(
            children.values().rev().filter(|&&id| tree.inode(id).is_dir()).map(|&id| (id, depth + 1)),
        );
    }
    Ok(Layout {
        places: placer.places,
        area_size: placer.cursor.next_multiple_of(geometry.block_size),
        entry_count: placer.entry_count,
    })
}

/// Calls `visit` for every entry in the order in which inodes are numbered: the entries of a
/// directory in byte order of names, then each of its directories the same way. The root comes
/// first; an inode with several names comes several times.
///
/// # Errors
/// The visitor's.
pub fn in_number_order(tree: &Tree, visit: impl FnMut(InodeId) -> Result<()>) -> Result<()> {
    in_number_order_from(tree, tree.root(), visit)
}

/// As [`in_number_order`], for `start` and what lies below it.
///
/// # Errors
/// The visitor's.
pub fn in_number_order_from(
    tree: &Tree,
    start: InodeId,
    mut visit: impl FnMut(InodeId) -> Result<()>,
) -> Result<()> {
    visit(start)?;
    let mut stack = vec![start];
    while let Some(dir) = stack.pop() {
        let Some(children) = tree.inode(dir).children() else { continue };
        for &id in children.values() {
            visit(id)?;
        }
        stack.extend(children.values().rev().filter(|&&id| tree.inode(id).is_dir()));
    }
    Ok(())
}

/// An entry of a directory as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `.`
    This,
    /// `..`
    Parent,
    /// Any other.
    Child(InodeId),
}

/// Entries of a directory in byte order of names, `.` and `..` among them.
pub fn entries(children: &Children) -> Vec<(&[u8], Entry)> {
    let mut out: Vec<(&[u8], Entry)> = Vec::with_capacity(children.len() + 2);
    out.extend(children.iter().map(|(name, &id)| (&**name, Entry::Child(id))));
    for (name, entry) in [(&b"."[..], Entry::This), (b"..", Entry::Parent)] {
        let at = out.partition_point(|(other, _)| *other < name);
        out.insert(at, (name, entry));
    }
    out
}

/// Splits `entries` into directory blocks: the number of entries of each, and `i_size`.
pub fn directory_blocks(entries: &[(&[u8], Entry)], block_size: u64) -> (Vec<usize>, u64) {
    let (mut counts, mut count, mut used) = (Vec::new(), 0, 0);
    for (name, _) in entries {
        let need = DIRENT_SIZE + name.len() as u64;
        if used + need > block_size {
            counts.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += need;
    }
    counts.push(count);
    let size = (counts.len() as u64 - 1) * block_size + used;
    (counts, size)
}

/// Chunks of a regular file of `size` bytes.
pub fn chunk_count(size: u64, chunk_size: u32) -> u64 {
    size.div_ceil(u64::from(chunk_size))
}

/// Where the chunk indexes of a regular file start behind its inode's start.
pub fn chunk_index_offset(xattr_size: usize) -> u64 {
    (INODE_SIZE + xattr_size as u64).next_multiple_of(CHUNK_INDEX_SIZE)
}

struct Placer<'a> {
    tree: &'a Tree,
    geometry: Geometry,
    cursor: u64,
    /// Blocks with free slots at their end, by number of free slots.
    free: Vec<VecDeque<u64>>,
    places: Vec<Place>,
    entry_count: u32,
}

impl Placer<'_> {
    fn directory(&mut self, dir: InodeId, children: &Children) -> Result<()> {
        let (_, size) = directory_blocks(&entries(children), self.geometry.block_size);
        self.tailed(dir, size)?;
        self.align();
        let mut directories = 0;
        for &id in children.values() {
            self.entry_count += 1;
            if self.entry_count > i32::MAX as u32 {
                return Err(Error::limit("more than 2147483647 directory entries in one image"));
            }
            let first = self.places[id.0 as usize].ino == 0;
            if first {
                self.places[id.0 as usize].ino = self.entry_count;
            }
            let area = self.inode_size(id);
            match &self.tree.inode(id).content {
                Content::Directory(_) => directories += 1,
                Content::Regular { size, .. } => {
                    let chunks = chunk_count(*size, self.geometry.chunk_size);
                    let need = (area.next_multiple_of(CHUNK_INDEX_SIZE)).checked_add(
                        chunks
                            .checked_mul(CHUNK_INDEX_SIZE)
                            .ok_or_else(|| Error::limit(format!("a file of {size} bytes")))?,
                    );
                    let need = need.ok_or_else(|| Error::limit(format!("a file of {size} bytes")))?;
                    if first {
                        let at = self.take(need).map_or_else(|| self.grow(need), Ok)?;
                        self.put(id, at)?;
                    }
                    self.places[id.0 as usize].nlink += 1;
                }
                Content::Symlink(target) => {
                    self.tailed(id, target.len() as u64)?;
                    self.places[id.0 as usize].nlink = 1;
                }
                Content::CharDevice { .. }
                | Content::BlockDevice { .. }
                | Content::Fifo
                | Content::Socket => {
                    let at = self.grow(area)?;
                    self.put(id, at)?;
                    self.places[id.0 as usize].nlink = 1;
                }
            }
            self.align();
        }
        self.places[dir.0 as usize].nlink = 2 + directories;
        Ok(())
    }

    /// Places an inode with data of its own: `size` bytes of entries or of a symlink target.
    fn tailed(&mut self, id: InodeId, size: u64) -> Result<()> {
        let block_size = self.geometry.block_size;
        let (area, tail) = (self.inode_size(id), size % block_size);
        let inline = tail != 0 && area + tail <= block_size;
        let data = if inline {
            let need = area + tail;
            let at = match self.take(need) {
                Some(at) => at,
                None => {
                    if block_size - self.cursor % block_size < need {
                        self.register(self.cursor);
                        self.cursor = self.cursor.next_multiple_of(block_size);
                    }
                    self.grow(need)?
                }
            };
            self.put(id, at)?;
            if size != tail {
                self.next_block();
            }
            let data = self.cursor;
            self.grow(size - tail)?;
            data
        } else {
            let at = self.take(area).map_or_else(|| self.grow(area), Ok)?;
            self.put(id, at)?;
            self.next_block();
            let data = self.cursor;
            self.grow(size.next_multiple_of(block_size))?;
            data
        };
        let place = &mut self.places[id.0 as usize];
        // Both fit: `grow` keeps the cursor below 2 GiB, and so is the area's start.
        place.block = ((data + self.geometry.meta_offset) / block_size) as u32;
        place.inline = inline;
        Ok(())
    }

    fn next_block(&mut self) {
        self.register(self.cursor);
        self.cursor = self.cursor.next_multiple_of(self.geometry.block_size);
    }

    fn align(&mut self) {
        self.cursor = self.cursor.next_multiple_of(SLOT_SIZE);
    }

    /// Bytes of the inode and its xattrs.
    fn inode_size(&self, id: InodeId) -> u64 {
        INODE_SIZE + self.tree.inode(id).metadata.xattrs.area_size() as u64
    }

    fn put(&mut self, id: InodeId, at: u64) -> Result<()> {
        self.places[id.0 as usize].slot =
            u32::try_from(at / SLOT_SIZE).map_err(|_| Error::limit("inode area beyond 2^37 bytes"))?;
        Ok(())
    }

    /// Moves the cursor by `size` and returns where it stood.
    fn grow(&mut self, size: u64) -> Result<u64> {
        let at = self.cursor;
        self.cursor = at
            .checked_add(size)
            .filter(|&end| self.geometry.meta_offset.saturating_add(end) <= MAX_BOOTSTRAP_SIZE)
            .ok_or_else(|| {
                Error::limit(format!(
                    "the bootstrap would exceed {MAX_BOOTSTRAP_SIZE} bytes; use a larger chunk size or fewer files"
                ))
            })?;
        Ok(at)
    }

    /// Remembers the free end of the block that position `at` lies in.
    fn register(&mut self, at: u64) {
        let rest = at % self.geometry.block_size;
        if rest != 0 {
            let slots = (self.geometry.block_size - rest) / SLOT_SIZE;
            if let Some(list) = self.free.get_mut(slots as usize)
                && slots > 0
            {
                list.push_back(at - rest);
            }
        }
    }

    /// A place of `size` bytes at the free end of an earlier block.
    fn take(&mut self, size: u64) -> Option<u64> {
        let block_size = self.geometry.block_size;
        if size >= block_size {
            return None;
        }
        let need = size.div_ceil(SLOT_SIZE);
        let slots = (need..block_size / SLOT_SIZE).find(|&n| !self.free[n as usize].is_empty())?;
        let block = self.free[slots as usize].pop_front()?;
        let at = block + block_size - SLOT_SIZE * slots;
        self.register(at + SLOT_SIZE * need);
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Inode, Metadata};

    const GEOMETRY: Geometry = Geometry { block_size: 4096, chunk_size: 0x1000, meta_offset: 8192 };

    #[test]
    fn dots_are_sorted_among_the_names() {
        let mut children = Children::new();
        for name in ["!", "-", ".-a", ".a", "a", ".."] {
            children.insert(name.as_bytes().into(), InodeId(9));
        }
        children.remove(&b".."[..]);
        let names: Vec<_> = entries(&children).into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, [&b"!"[..], b"-", b".", b".-a", b"..", b".a", b"a"]);
    }

    #[test]
    fn depth_is_what_readers_accept() {
        let with_depth = |depth: usize| {
            let mut tree = Tree::new();
            let directory = Inode::new(Metadata::implied_directory(), Content::Directory(Children::new()));
            tree.insert(&b"d/".repeat(depth), directory).unwrap();
            lay_out(&tree, &GEOMETRY)
        };
        assert!(with_depth(MAX_DEPTH - 1).is_ok());
        assert_eq!(with_depth(MAX_DEPTH).unwrap_err().kind(), crate::ErrorKind::Limit);
    }

    #[test]
    fn the_root_comes_first_and_inline_data_never_crosses_a_block() {
        let mut tree = Tree::new();
        for n in 0..3000u32 {
            let target = vec![b'x'; (n as usize * 37) % 4096 + 1];
            let path = format!("d{}/{}{n}", n % 17, "n".repeat(n as usize % 200));
            tree.insert(
                path.as_bytes(),
                Inode::new(Metadata::implied_directory(), Content::Symlink(target.into())),
            )
            .unwrap();
        }
        let layout = lay_out(&tree, &GEOMETRY).unwrap();
        assert_eq!(layout.place(tree.root()).nid(), rafs::format::limits::ROOT_NID);
        assert_eq!(layout.entry_count, 3000 + 17 + 1);
        let mut taken = Vec::new();
        in_number_order(&tree, |id| {
            let place = layout.place(id);
            let size = match &tree.inode(id).content {
                Content::Directory(children) => directory_blocks(&entries(children), 4096).1,
                Content::Symlink(target) => target.len() as u64,
                _ => unreachable!(),
            };
            let end = place.offset() + 64 + if place.inline { size % 4096 } else { 0 };
            if place.inline {
                assert_eq!((place.offset() + 64) / 4096, (end - 1) / 4096);
            }
            taken.push((place.offset(), end));
            let blocks = if place.inline { size / 4096 } else { size.div_ceil(4096) };
            if blocks > 0 {
                let start = u64::from(place.block) * 4096 - GEOMETRY.meta_offset;
                taken.push((start, start + blocks * 4096));
            }
            Ok(())
        })
        .unwrap();
        taken.sort_unstable();
        assert!(taken.windows(2).all(|w| w[0].1 <= w[1].0));
        assert!(taken.last().unwrap().1 <= layout.area_size);
    }
}
