//! Hints for an image that is being converted: its tree, and the bytes of its files read back from the
//! spooled blobs, so that nothing is unpacked and no layer read twice.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::os::unix::fs::FileExt as _;

use rafs::hints::{self, Command, Files, Inode, Kind};
use serde_json::{Map, Value};
use storage::codec::{Codec, decompress};

use crate::chunks::BuiltContent;
use crate::content::{ChunkId, ChunkSource as _};
use crate::tree::{Content, InodeId, Tree};

/// The files that a start of the image with this configuration reads, in order.
pub fn find(tree: &Tree, config: &Map<String, Value>, contents: Contents<'_>) -> Vec<InodeId> {
    let image = Image { tree, contents, last: RefCell::new(None) };
    // Numbers of a tree fit.
    let ids = hints::find(&image, Command::of(config)).into_iter();
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

    fn chunk(&self, id: ChunkId) -> io::Result<Vec<u8>> {
        let chunk = self.chunks.chunks.get(id);
        let blob = self.blobs.get(usize::from(chunk.layer.0)).ok_or(io::ErrorKind::NotFound)?;
        let mut stored = vec![0; chunk.compressed_size as usize];
        blob.read_exact_at(&mut stored, chunk.compressed_offset)?;
        if !chunk.is_compressed() {
            return Ok(stored);
        }
        let mut bytes = vec![0; chunk.uncompressed_size as usize];
        decompress(self.codec, &stored, &mut bytes).map_err(io::Error::other)?;
        Ok(bytes)
    }
}

struct Image<'a> {
    tree: &'a Tree,
    contents: Contents<'a>,
    /// The chunk read last: small reads come one behind the other.
    last: RefCell<Option<(ChunkId, Vec<u8>)>>,
}

impl Image<'_> {
    fn content(&self, inode: Inode) -> &Content {
        // Only numbers of this tree are asked for.
        &self.tree.inode(InodeId(inode.0 as u32)).content
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
        let mut last = self.last.borrow_mut();
        if last.as_ref().is_none_or(|(known, _)| *known != id) {
            *last = Some((id, self.contents.chunk(id)?));
        }
        let bytes = last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let rest = bytes.get((offset % chunk_size) as usize..).unwrap_or_default();
        let n = rest.len().min(into.len());
        into[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
}
