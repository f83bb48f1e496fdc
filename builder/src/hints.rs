//! Hints for an image that is being converted: its tree, and the bytes of its files read back from the
//! spooled blobs, so that nothing is unpacked and no layer read twice.

use std::fs::File;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use rafs::hints::{self, Command, Files, Inode, Kind};
use serde_json::{Map, Value};
use storage::codec::{Codec, decompress};

use crate::chunks::{BuiltContent, StoredUnit};
use crate::content::ChunkSource as _;
use crate::tree::{Content, InodeId, LayerIndex, Tree};

/// Decoded bytes that are kept for further reads.
const RECENT_SIZE: usize = 8 << 20;

/// The files that a start of the image with this configuration reads, in order.
pub fn find(tree: &Tree, config: &Map<String, Value>, contents: Contents<'_>) -> Vec<InodeId> {
    let image = Image { tree, contents, recent: Mutex::default() };
    // Numbers of a tree fit.
    let ids = hints::find(&image, &Command::of(config)).into_iter();
    ids.filter_map(|inode| u32::try_from(inode.0).ok().map(InodeId)).collect()
}

/// The blobs of one build, one a layer, not yet at their target.
pub struct Contents<'a> {
    chunks: &'a BuiltContent,
    blobs: Vec<File>,
    codec: Codec,
    chunk_size: u32,
}

impl<'a> Contents<'a> {
    /// Files made of `chunks`, which lie in `blobs`.
    pub fn new(chunks: &'a BuiltContent, blobs: Vec<File>, codec: Codec, chunk_size: u32) -> Self {
        Self { chunks, blobs, codec, chunk_size }
    }

    /// Decodes what a chunk is stored in.
    fn unit(&self, unit: &StoredUnit) -> io::Result<Vec<u8>> {
        let blob = self.blobs.get(usize::from(unit.layer.0)).ok_or(io::ErrorKind::NotFound)?;
        let mut stored = vec![0; unit.stored as usize];
        blob.read_exact_at(&mut stored, unit.start)?;
        if unit.stored == unit.decoded {
            return Ok(stored);
        }
        let mut bytes = vec![0; unit.decoded as usize];
        decompress(self.codec, &stored, &mut bytes).map_err(io::Error::other)?;
        Ok(bytes)
    }
}

/// Units read last, the latest at the end: programs are looked into here and there, and small reads
/// come one behind the other.
#[derive(Default)]
struct Recent {
    units: Vec<(Place, Arc<Vec<u8>>)>,
    /// Their bytes.
    size: usize,
}

/// A layer, and where a unit begins in its blob.
type Place = (LayerIndex, u64);

impl Recent {
    fn get(&mut self, place: Place) -> Option<Arc<Vec<u8>>> {
        let known = self.units.iter().rposition(|(known, _)| *known == place)?;
        self.units[known..].rotate_left(1);
        self.units.last().map(|(_, bytes)| Arc::clone(bytes))
    }

    fn keep(&mut self, place: Place, bytes: Arc<Vec<u8>>) {
        self.size += bytes.len();
        self.units.push((place, bytes));
        let many = self.units.len() - 1;
        let mut old = 0;
        while old < many && self.size > RECENT_SIZE {
            self.size -= self.units[old].1.len();
            old += 1;
        }
        self.units.drain(..old);
    }
}

struct Image<'a> {
    tree: &'a Tree,
    contents: Contents<'a>,
    recent: Mutex<Recent>,
}

impl Image<'_> {
    fn content(&self, inode: Inode) -> &Content {
        // Only numbers of this tree are asked for.
        &self.tree.inode(InodeId(inode.0 as u32)).content
    }

    /// The bytes of `unit`, which is decoded if they are not there.
    fn unit(&self, unit: &StoredUnit) -> io::Result<Arc<Vec<u8>>> {
        let place = (unit.layer, unit.start);
        let recent = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = recent().get(place) {
            return Ok(bytes);
        }
        let bytes = Arc::new(self.contents.unit(unit)?);
        recent().keep(place, Arc::clone(&bytes));
        Ok(bytes)
    }
}

impl Files for Image<'_> {
    fn root(&self) -> Inode {
        Inode(self.tree.root().0.into())
    }

    fn kind(&self, inode: Inode) -> Kind {
        match self.content(inode) {
            Content::Regular { size, .. } => Kind::Regular(*size),
            Content::Directory(_) => Kind::Directory,
            Content::Symlink(target) => Kind::Symlink(target.to_vec()),
            _ => Kind::Other,
        }
    }

    fn lookup(&self, dir: Inode, name: &[u8]) -> Option<Inode> {
        match self.content(dir) {
            Content::Directory(children) => children.get(name).map(|id| Inode(id.0.into())),
            _ => None,
        }
    }

    fn names(&self, dir: Inode, from: &[u8], visit: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) {
        let Content::Directory(children) = self.content(dir) else { return };
        let mut names = children.range::<[u8], _>((Bound::Included(from), Bound::Unbounded));
        while let Some((name, _)) = names.next()
            && visit(name).is_continue()
        {}
    }

    fn read_at(&self, inode: Inode, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let Content::Regular { file, size } = self.content(inode) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if offset >= *size || into.is_empty() {
            return Ok(0);
        }
        let chunk_size = u64::from(self.contents.chunk_size);
        // A file has less than 2^32 chunks.
        let id = self.contents.chunks.file_chunks(*file).get((offset / chunk_size) as usize);
        let id = *id.ok_or(io::ErrorKind::UnexpectedEof)?;
        let unit = self.contents.chunks.chunks.stored_unit(id);
        let bytes = self.unit(&unit)?;
        let start = unit.offset as usize;
        let bytes = bytes.get(start..start + unit.len as usize).unwrap_or_default();
        let rest = bytes.get((offset % chunk_size) as usize..).unwrap_or_default();
        let n = rest.len().min(into.len());
        into[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
}
