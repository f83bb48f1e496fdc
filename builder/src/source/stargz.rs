//! The index of an eStargz layer as a source: metadata of every entry, and where in the layer's gzip
//! data each chunk lies.
//!
//! ```text
//! layer   |member|member|member| ... |index|footer|
//!          ^chunk ^chunk ^chunk       ^ JSON in a tar, in gzip
//! ```
//!
//! A chunk is the beginning of a gzip member; behind it the member holds padding and headers of the
//! tar. The index says where members begin, so a chunk's stored bytes are those up to the next one.
//!
//! The index is not trusted. It is read entry by entry, so what it takes in memory is what the tree
//! takes; offsets ascend and end inside the layer, chunks of a file follow it in order, links lead to
//! files, and every chunk has a digest, or the index is refused.

mod entry;
mod layer;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use rafs::format::limits;
use storage::digest::Digest;

pub(crate) use self::entry::read as read_entries;
use self::entry::{Entry, Kind};
pub use self::layer::{Index, open};
use crate::chunks::{BuiltContent, FileRow, LayerFiles};
use crate::content::ChunkId;
use crate::dedup::DedupIndex;
use crate::layout;
use crate::tree::{
    Children, Content, FileId, Inode, LayerIndex, Metadata, Tree, XattrPool, Xattrs, components, shown,
};
use crate::{Error, ErrorKind, Result};

/// Files at the root of an eStargz layer that belong to its format and not to the image: its index,
/// and the marks of what to prefetch.
const OWN_FILES: [&[u8]; 3] = [b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"];
/// Entries of one index.
const MAX_ENTRIES: u32 = 1 << 24;
/// Links that lead to links.
const MAX_LINK_CHAIN: usize = 40;
/// Bytes of a name or of a hard link's target, those of a path that Linux takes.
const MAX_PATH: usize = 4096;
/// What the names and targets of hard links may take, which wait for the last entry; more than this only
/// where they are short on average, by [`LINK_BYTES`] an entry.
const FREE_LINK_BYTES: u64 = 16 << 20;
/// See [`FREE_LINK_BYTES`].
const LINK_BYTES: u64 = 128;
/// Bytes of an inode in a bootstrap, without its name.
const INODE_BYTES: u64 = 64;
/// Largest stored size that a record can state.
const MAX_STORED: u64 = (1 << 24) - 1;

/// True for a path (components joined by `/`) that belongs to the format of eStargz.
pub fn is_own_file(path: &[u8]) -> bool {
    OWN_FILES.contains(&path)
}

/// What an index says of its layer.
pub struct Indexed {
    /// The tree of the layer, overlay markers as ordinary entries.
    pub tree: Tree,
    /// Its chunks, in order of their places in the layer.
    pub content: BuiltContent,
}

/// Collects entries in the order of the index.
pub(crate) struct Collector {
    chunk_size: u32,
    tree: Tree,
    pool: XattrPool,
    content: BuiltContent,
    files: LayerFiles,
    known: DedupIndex,
    entries: u32,
    /// Bytes that the entries so far take in a bootstrap, at least.
    metadata: u64,
    links: Vec<HardLink>,
    /// Bytes of `links`.
    link_bytes: u64,
    /// The file whose chunks are read.
    open: Option<OpenFile>,
    /// Where the member of the last chunk begins.
    last: Option<Place>,
}

/// A hard link, and the path that it leads to.
struct HardLink {
    path: Box<[u8]>,
    target: Box<[u8]>,
}

/// A file some of whose chunks are to come.
struct OpenFile {
    name: String,
    size: u64,
    seen: u64,
    /// It belongs to the format.
    own: bool,
}

struct Place {
    offset: u64,
    /// The chunk that is stored there, unless an equal one was before.
    chunk: Option<(ChunkId, u32)>,
}

impl Collector {
    /// For an image with chunks of `chunk_size` bytes.
    pub fn new(chunk_size: u32) -> Self {
        let mut content = BuiltContent::default();
        content.chunks.open_layer(0);
        Self {
            chunk_size,
            tree: Tree::new(),
            pool: XattrPool::default(),
            content,
            files: LayerFiles::default(),
            known: DedupIndex::default(),
            entries: 0,
            metadata: 0,
            links: Vec::new(),
            link_bytes: 0,
            open: None,
            last: None,
        }
    }

    /// Takes the next entry.
    pub fn add(&mut self, entry: Entry) -> Result<()> {
        let name = entry.name.clone();
        self.entry(entry).map_err(|e| e.context(format_args!("entry {}", shown(name.as_bytes()))))
    }

    /// All entries came; the members end at byte `end` of the layer.
    pub fn finish(mut self, end: u64) -> Result<Indexed> {
        self.closed()?;
        self.ends(end).map_err(|e| e.context("the last chunk"))?;
        self.resolve_links()?;
        self.content.files.layers.push(self.files);
        Ok(Indexed { tree: self.tree, content: self.content })
    }

    fn entry(&mut self, entry: Entry) -> Result<()> {
        self.bound(&entry)?;
        // What was no UTF-8 was replaced when the index was written.
        if [&entry.name, &entry.link].iter().any(|text| text.contains(char::REPLACEMENT_CHARACTER)) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "its name may have been another, which the index can not hold: use --type estargz-ref",
            ));
        }
        if entry.kind == Kind::Chunk {
            return self.chunk(&entry);
        }
        self.closed()?;
        let path = components(entry.name.as_bytes())?.join(&b'/');
        let own = is_own_file(&path);
        if entry.kind == Kind::Regular && entry.size > 0 {
            let count = layout::chunk_count(entry.size, self.chunk_size);
            self.metadata = self.metadata.saturating_add(count.saturating_mul(8));
            self.bounded()?;
            self.open = Some(OpenFile { name: entry.name.clone(), size: entry.size, seen: 0, own });
        }
        if !own {
            let first = u32::try_from(self.files.refs.len())
                .map_err(|_| Error::limit("more than 2^32 references to chunks"))?;
            let content = match entry.kind {
                Kind::Hardlink => {
                    let target = components(entry.link.as_bytes())?.join(&b'/');
                    return self.link(path.into(), target.into());
                }
                Kind::Directory => Content::Directory(Children::new()),
                Kind::Symlink => Content::Symlink(entry.link.as_bytes().into()),
                Kind::CharDevice => Content::CharDevice { major: entry.major, minor: entry.minor },
                Kind::BlockDevice => Content::BlockDevice { major: entry.major, minor: entry.minor },
                Kind::Fifo => Content::Fifo,
                Kind::Regular | Kind::Chunk => {
                    let file = FileId { layer: LayerIndex(0), index: self.files.files.len() as u32 };
                    self.files.files.push(FileRow { first, size: entry.size });
                    Content::Regular { file, size: entry.size }
                }
            };
            let (mtime, mtime_nsec) = entry.time()?;
            let metadata = Metadata {
                mode: entry.mode & 0o7777,
                uid: entry.uid,
                gid: entry.gid,
                mtime,
                mtime_nsec,
                xattrs: self.pool.intern(Xattrs::new(entry.attributes()?)?),
                directory_size: 0,
            };
            self.tree.insert(&path, Inode::new(metadata, content))?;
        }
        if self.open.is_some() { self.chunk(&entry) } else { Ok(()) }
    }

    /// Keeps a hard link until all entries came.
    fn link(&mut self, path: Box<[u8]>, target: Box<[u8]>) -> Result<()> {
        self.link_bytes += (path.len() + target.len()) as u64;
        let most = FREE_LINK_BYTES + LINK_BYTES * u64::from(self.entries);
        if self.link_bytes > most {
            return Err(Error::limit(format!(
                "its hard links have names of more than {most} bytes in all: use --type estargz-ref"
            )));
        }
        self.links.push(HardLink { path, target });
        Ok(())
    }

    /// The next chunk of the file that is open.
    fn chunk(&mut self, entry: &Entry) -> Result<()> {
        let Some(mut open) = self.open.take().filter(|open| open.name == entry.name) else {
            return Err(Error::bad_source("a chunk that does not follow its file"));
        };
        if entry.inner_offset != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "several chunks share a gzip member: use --type estargz-ref, which reads the layer",
            ));
        }
        let left = open.size - open.seen;
        let len = if entry.chunk_size == 0 { left } else { entry.chunk_size };
        if entry.chunk_offset != open.seen || len > left {
            return Err(Error::bad_source(format!(
                "a chunk of {len} bytes at {}, want one at {} of at most {left}",
                entry.chunk_offset, open.seen
            )));
        }
        let size = u64::from(self.chunk_size);
        if !open.own && len != left.min(size) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the layer is cut into chunks of {len} bytes, the image into {:#x}: give that as --chunk-size, \
                     if it is a power of two, or use --type estargz-ref",
                    self.chunk_size
                ),
            ));
        }
        self.ends(entry.offset)?;
        let mut place = Place { offset: entry.offset, chunk: None };
        if !open.own {
            let digest = entry.digest(len == open.size)?;
            // At most the chunk size.
            let len = len as u32;
            let chunks = &mut self.content.chunks;
            let id = match self.known.find(chunks, &digest, len) {
                Some(id) => id,
                None => {
                    let id = chunks.push(digest, 0, len)?;
                    self.known.insert(chunks, id);
                    place.chunk = Some((id, len));
                    id
                }
            };
            self.files.refs.push(id);
        }
        self.last = Some(place);
        open.seen += len;
        if open.seen < open.size {
            self.open = Some(open);
        }
        Ok(())
    }

    /// The member of the last chunk ends at `end` at the latest.
    fn ends(&mut self, end: u64) -> Result<()> {
        let Some(last) = self.last.take() else { return Ok(()) };
        let Some(len) = end.checked_sub(last.offset).filter(|&len| len > 0) else {
            return Err(Error::bad_source(format!(
                "byte {end} of the layer, where the chunk before begins at {}: offsets have to ascend, and to \
                 lie inside the layer",
                last.offset
            )));
        };
        if end > limits::MAX_BLOB_COMPRESSED {
            return Err(Error::limit(format!("byte {end} of the layer: at most 2^40 are possible")));
        }
        if let Some((id, decoded)) = last.chunk {
            // Headers of many entries may follow; no chunk takes this much.
            let most = (2 * u64::from(decoded) + (64 << 10)).min(MAX_STORED);
            self.content.chunks.set_member(id, last.offset, len.min(most) as u32);
        }
        Ok(())
    }

    /// The file before is complete.
    fn closed(&mut self) -> Result<()> {
        match self.open.take() {
            None => Ok(()),
            Some(open) => Err(Error::bad_source(format!(
                "{} has chunks for {} of its {} bytes",
                shown(open.name.as_bytes()),
                open.seen,
                open.size
            ))),
        }
    }

    /// Refuses what no bootstrap can hold before it takes memory.
    fn bound(&mut self, entry: &Entry) -> Result<()> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES || self.tree.inode_count() > MAX_ENTRIES as usize {
            return Err(Error::limit(format!("more than {MAX_ENTRIES} entries, implied ones included")));
        }
        let longest = match entry.kind {
            // The tree knows how long a target may be.
            Kind::Symlink => entry.name.len(),
            _ => entry.name.len().max(entry.link.len()),
        };
        if longest > MAX_PATH {
            return Err(Error::limit(format!("a path of {longest} bytes, at most {MAX_PATH} are accepted")));
        }
        let name = entry.name.len().min(limits::MAX_NAME_LEN);
        let xattrs: usize =
            entry.xattrs.iter().flatten().map(|(name, value)| name.len() + value.len() / 2).sum();
        self.metadata = self.metadata.saturating_add((name + entry.link.len() + xattrs) as u64);
        self.bounded()
    }

    fn bounded(&self) -> Result<()> {
        // Directories that are only implied are inodes, too.
        let inodes = self.tree.inode_count() as u64 * INODE_BYTES;
        match self.metadata.saturating_add(inodes) > limits::MAX_BOOTSTRAP_SIZE {
            true => Err(Error::limit(format!(
                "its entries take more than the {} bytes of the largest bootstrap",
                limits::MAX_BOOTSTRAP_SIZE
            ))),
            false => Ok(()),
        }
    }

    /// Names files again. The index may name a link before what it leads to.
    fn resolve_links(&mut self) -> Result<()> {
        let links = std::mem::take(&mut self.links);
        let targets: HashMap<&[u8], &[u8]> = links.iter().map(|link| (&*link.path, &*link.target)).collect();
        for HardLink { path, target } in &links {
            let refused = |why: &str| {
                Error::bad_source(format!("{}: hard link to {}, which {why}", shown(path), shown(target)))
            };
            if self.tree.lookup(path).is_some_and(|id| !self.tree.inode(id).implied) {
                return Err(Error::bad_source(format!("{}: named twice, once as a hard link", shown(path))));
            }
            let mut at = &target[..];
            let mut steps = 0;
            let found = loop {
                if let Some(id) = self.tree.lookup(at) {
                    break id;
                }
                at = targets.get(at).ok_or_else(|| refused("is not in the index"))?;
                steps += 1;
                if steps > MAX_LINK_CHAIN {
                    return Err(refused("leads from link to link"));
                }
            };
            let inode = self.tree.inode(found);
            if inode.is_dir() {
                return Err(refused("is a directory"));
            }
            if inode.is_regular() {
                self.tree.link(path, found)?;
                continue;
            }
            // Only regular files keep several names.
            let copy = inode.clone();
            self.tree.insert(path, copy)?;
        }
        Ok(())
    }
}

/// The digest in `sha256:HEX`.
fn sha256(text: &str) -> Result<Digest> {
    let hex = text.strip_prefix("sha256:");
    hex.and_then(|hex| Digest::from_hex(hex).ok())
        .ok_or_else(|| Error::bad_source(format!("digest {text:?}: want sha256: and 64 hexadecimal digits")))
}
