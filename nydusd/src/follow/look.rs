//! One look at an image, most of whose data is not there.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;

use rafs::bootstrap::{FileType, Nid, Step, Walk};
use rafs::fs::Rafs;
use rafs::hints::{Files, Follower, Inode, Kind};
use storage::cache::BlobSet;
use storage::extent::ChunkExtent;

/// Opened files that are looked at. They are those that nothing led to, so few.
const MAX_OPENED: usize = 128;

/// Looks at an image. Each brings the chunks that the one before has missed.
const MAX_LOOKS: usize = 512;

/// Entries of the tree that are passed in search of opened files.
const MAX_STEPS: usize = 4 << 20;

/// Files of this size or less are fetched whole when a part of them is looked at, to ask but once.
const SMALL: u64 = 256 << 10;

/// Parts of this size are not waited for with others.
const LARGE: u64 = 256 << 10;

/// What is known of a start.
#[derive(Debug, Default)]
pub(super) struct Looker {
    follower: Follower,
    /// Files that were told of.
    found: HashSet<Nid>,
    /// Files that were opened before anything led to them.
    opened: HashSet<Nid>,
    /// Chunks that were asked for. Those that did not come are not asked for again.
    asked: HashSet<(u32, u32)>,
    steps: usize,
    looks: usize,
}

/// What a look has shown.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Files that a start reads, in order, not told of before.
    pub files: Vec<Nid>,
    /// Chunks without which nothing more can be told.
    pub missing: Vec<(u32, ChunkExtent)>,
    /// The same, of large parts of files: nothing else waits for them.
    pub large: Vec<(u32, ChunkExtent)>,
}

impl Looker {
    /// Files told of so far.
    pub fn count(&self) -> usize {
        self.found.len()
    }

    /// True if nothing led to this file, and it was not opened before.
    pub fn is_new(&self, nid: Nid) -> bool {
        !self.found.contains(&nid) && !self.opened.contains(&nid)
    }

    /// Looks at the image again, now that the files `opened` are. `None` when it is enough.
    pub fn look(&mut self, rafs: &Rafs, blobs: &BlobSet, opened: Vec<Nid>) -> Option<Seen> {
        let mut new = HashSet::new();
        new.extend(opened.into_iter().filter(|nid| self.opened.insert(*nid)));
        self.looks += 1;
        if self.opened.len() > MAX_OPENED || self.looks > MAX_LOOKS {
            return None;
        }
        let mut walk = Walk::new(&**rafs.bootstrap(), rafs.bootstrap().root());
        while !new.is_empty() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return None;
            }
            let Some(step) = walk.step().ok()? else { break };
            if let Step::Leaf(entry) = step
                && new.remove(&entry.nid)
            {
                self.follower.opened([b"/", walk.path()].concat());
            }
        }
        let image = Image { rafs, blobs, missing: RefCell::default(), large: RefCell::default() };
        let found = self.follower.find(&image).into_iter().map(|inode| Nid(inode.0));
        let files = found.filter(|nid| self.found.insert(*nid)).collect();
        let mut to_ask = |mut chunks: Vec<(u32, ChunkExtent)>| {
            chunks.retain(|(blob, extent)| self.asked.insert((*blob, extent.index.0)));
            chunks
        };
        let (missing, large) = (to_ask(image.missing.into_inner()), to_ask(image.large.into_inner()));
        Some(Seen { files, missing, large })
    }
}

/// An image as hints look at it: what is not local is not there.
struct Image<'a> {
    rafs: &'a Rafs,
    blobs: &'a BlobSet,
    /// Chunks that were looked for.
    missing: RefCell<Vec<(u32, ChunkExtent)>>,
    large: RefCell<Vec<(u32, ChunkExtent)>>,
}

impl Files for Image<'_> {
    fn root(&self) -> Inode {
        Inode(self.rafs.bootstrap().root().0)
    }

    fn kind(&self, inode: Inode) -> Kind {
        let bootstrap = self.rafs.bootstrap();
        let Ok(attr) = bootstrap.attr(Nid(inode.0)) else { return Kind::Other };
        match attr.file_type {
            FileType::Regular => Kind::Regular(attr.size),
            FileType::Directory => Kind::Directory,
            FileType::Symlink => {
                bootstrap.read_link(attr.nid).map_or(Kind::Other, |target| Kind::Symlink(target.into_owned()))
            }
            _ => Kind::Other,
        }
    }

    fn lookup(&self, dir: Inode, name: &[u8]) -> Option<Inode> {
        let entry = self.rafs.bootstrap().lookup(Nid(dir.0), name).ok()??;
        Some(Inode(entry.nid.0))
    }

    fn names(&self, dir: Inode, from: &[u8], visit: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) {
        let (bootstrap, dir) = (self.rafs.bootstrap(), Nid(dir.0));
        if let Ok(cursor) = bootstrap.cursor_at(dir, from) {
            // What can not be listed has no names to visit.
            let _ = bootstrap.children(dir, cursor, &mut |entry| visit(entry.name));
        }
    }

    fn read_at(&self, inode: Inode, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let (nid, mut slices) = (Nid(inode.0), Vec::new());
        let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
        let n = self.rafs.read(nid, offset, len, &mut slices).map_err(io::Error::other)? as usize;
        if self.blobs.peek(&slices, &mut into[..n]).map_err(io::Error::other)? {
            return Ok(n);
        }
        let is_large = into.len() as u64 > LARGE;
        let mut missing = if is_large { self.large.borrow_mut() } else { self.missing.borrow_mut() };
        let size = self.rafs.bootstrap().attr(nid).map_err(io::Error::other)?.size;
        if size <= SMALL {
            let all = self.rafs.file_extents(nid, &mut |blob, extent| {
                missing.push((blob, extent));
                Ok(())
            });
            all.map_err(io::Error::other)?;
        } else {
            missing.extend(slices.iter().map(|slice| (slice.blob, slice.extent)));
            // The dynamic linker's part of a library, or its section headers, lies at its end.
            if offset == 0 && !is_large {
                let last = (size - 1) / u64::from(self.rafs.bootstrap().summary().chunk_size);
                for position in [last.saturating_sub(1), last] {
                    // A file has less than 2^32 chunks.
                    let chunk = self.rafs.file_chunk(nid, position as u32).map_err(io::Error::other)?;
                    missing.extend(chunk);
                }
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}
