//! One look at an image, most of whose data is not there.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::ControlFlow;

use rafs::bootstrap::{Bootstrap, FileType, Nid, Step, Walk};
use rafs::fs::Rafs;
use rafs::hints::{self, Files, Follower, Inode, Kind};
use storage::cache::BlobSet;
use storage::extent::ChunkExtent;

/// Opened files that are looked at. They are those that nothing led to, so few.
const MAX_OPENED: usize = 128;

/// Looks at an image. Each brings the chunks that the one before has missed.
const MAX_LOOKS: usize = 512;

/// Entries of the tree that are passed in search of opened files.
const MAX_STEPS: usize = 2 << 20;

/// Chunks that are asked for after one look.
const MAX_MISSING: usize = 4096;

/// How often a chunk is asked for: its source may fail, or another daemon be at it.
const MAX_TRIES: u8 = 3;

/// Files of this size or less are fetched whole when a part of them is looked at, to ask but once.
const SMALL: u64 = 256 << 10;

/// Parts of this size are not waited for with others.
const LARGE: u64 = 256 << 10;

/// Blob and number of a chunk.
pub(super) type Chunk = (u32, u32);

/// What was done for a chunk.
#[derive(Debug, Default)]
struct Asked {
    tries: u8,
    under_way: bool,
}

/// What is known of a start.
#[derive(Debug, Default)]
pub(super) struct Looker {
    follower: Follower,
    /// Files that were told of, and their bytes.
    found: HashSet<Nid>,
    bytes: u64,
    /// Files that were opened before anything led to them.
    opened: HashSet<Nid>,
    asked: HashMap<Chunk, Asked>,
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

    /// Notes that an order has ended: what did not come with it may be asked for again.
    pub fn ended(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            self.asked.entry(*chunk).or_default().under_way = false;
        }
    }

    /// Looks at the image again, now that the files `opened` are. `None` when it is enough.
    pub fn look(&mut self, rafs: &Rafs, blobs: &BlobSet, opened: Vec<Nid>) -> Option<Seen> {
        let mut new = opened;
        new.retain(|nid| self.opened.insert(*nid));
        self.looks += 1;
        let is_enough = self.opened.len() > MAX_OPENED
            || self.looks > MAX_LOOKS
            || self.found.len() > hints::MAX_FILES
            || self.bytes > hints::MAX_BYTES
            || self.follower.is_exhausted();
        if is_enough {
            return None;
        }
        for path in self.paths(&**rafs.bootstrap(), &new)? {
            self.follower.opened(path);
        }
        let image = Image { rafs, blobs, asked: &self.asked, absent: RefCell::default() };
        let found = self.follower.find(&image).into_iter().map(|inode| Nid(inode.0));
        let Absent { missing, large, .. } = image.absent.into_inner();
        for (blob, extent) in missing.iter().chain(&large) {
            self.bytes = self.bytes.saturating_add(extent.stored_share());
            let asked = self.asked.entry((*blob, extent.index.0)).or_default();
            asked.tries += 1;
            asked.under_way = true;
        }
        let files: Vec<Nid> = found.filter(|nid| self.found.insert(*nid)).collect();
        let sizes = files.iter().filter_map(|nid| Some(rafs.bootstrap().attr(*nid).ok()?.size));
        self.bytes = sizes.fold(self.bytes, u64::saturating_add);
        Some(Seen { files, missing, large })
    }

    /// Where `nids` lie, in their order; `None` if the search takes too long.
    fn paths(&mut self, bootstrap: &dyn Bootstrap, nids: &[Nid]) -> Option<Vec<Vec<u8>>> {
        let mut places: HashMap<Nid, Option<Vec<u8>>> = nids.iter().map(|nid| (*nid, None)).collect();
        let mut left = places.len();
        let mut walk = Walk::new(bootstrap, bootstrap.root());
        while left > 0 {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return None;
            }
            let Some(step) = walk.step().ok()? else { break };
            if let Step::Leaf(entry) = step
                && let Some(place @ None) = places.get_mut(&entry.nid)
            {
                *place = Some([b"/", walk.path()].concat());
                left -= 1;
            }
        }
        Some(nids.iter().filter_map(|nid| places.remove(nid)?).collect())
    }
}

/// An image as hints look at it: what is not local is not there.
struct Image<'a> {
    rafs: &'a Rafs,
    blobs: &'a BlobSet,
    asked: &'a HashMap<Chunk, Asked>,
    absent: RefCell<Absent>,
}

/// What was looked for in vain.
#[derive(Default)]
struct Absent {
    /// Small files of which a part was not there.
    files: HashSet<Nid>,
    seen: HashSet<Chunk>,
    missing: Vec<(u32, ChunkExtent)>,
    large: Vec<(u32, ChunkExtent)>,
}

impl Image<'_> {
    /// Notes a chunk that is wanted, unless it is there or was asked for in vain.
    fn want(&self, (blob, extent): (u32, ChunkExtent), is_large: bool) {
        let mut absent = self.absent.borrow_mut();
        let key = (blob, extent.index.0);
        let is_full = absent.missing.len() + absent.large.len() >= MAX_MISSING;
        let is_asked = self.asked.get(&key).is_some_and(|asked| asked.under_way || asked.tries >= MAX_TRIES);
        let is_there = self.blobs.blobs().get(blob as usize).is_none_or(|blob| blob.is_ready(&extent));
        if !is_full && !is_asked && !is_there && absent.seen.insert(key) {
            let list = if is_large { &mut absent.large } else { &mut absent.missing };
            list.push((blob, extent));
        }
    }

    fn chunk(&self, nid: Nid, position: u64) -> Option<(u32, ChunkExtent)> {
        self.rafs.file_chunk(nid, u32::try_from(position).ok()?).ok()?
    }
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

    fn will_read_ends(&self, inode: Inode) {
        let nid = Nid(inode.0);
        let Ok(attr) = self.rafs.bootstrap().attr(nid) else { return };
        // Smaller ones come whole.
        if attr.file_type == FileType::Regular && attr.size > SMALL {
            let last = (attr.size - 1) / u64::from(self.rafs.bootstrap().summary().chunk_size);
            for position in [0, last.saturating_sub(1), last] {
                self.chunk(nid, position).into_iter().for_each(|chunk| self.want(chunk, false));
            }
        }
    }

    fn read_at(&self, inode: Inode, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let nid = Nid(inode.0);
        if self.absent.borrow().files.contains(&nid) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut slices = Vec::new();
        let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
        let n = self.rafs.read(nid, offset, len, &mut slices).map_err(io::Error::other)? as usize;
        if self.blobs.peek(&slices, &mut into[..n]).map_err(io::Error::other)? {
            return Ok(n);
        }
        if self.rafs.bootstrap().attr(nid).map_err(io::Error::other)?.size <= SMALL {
            self.absent.borrow_mut().files.insert(nid);
            let want = &mut |blob, extent| {
                self.want((blob, extent), false);
                Ok(())
            };
            self.rafs.file_extents(nid, want).map_err(io::Error::other)?;
        } else {
            let is_large = into.len() as u64 > LARGE;
            slices.iter().for_each(|slice| self.want((slice.blob, slice.extent.clone()), is_large));
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}
