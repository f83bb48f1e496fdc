//! The image root digest, computed from the tree and its chunk digests while an image is
//! built: before any bootstrap exists, so that the two can be compared.

use std::collections::HashMap;

use rafs::bootstrap::Buffer;
use rafs::merkle::{DirectoryDigest, Merkle, NO_LINKS, NodeFields};
use storage::digest::{Digest, DigestAlgorithm, TaggedDigest};

use crate::content::ChunkSource;
use crate::tree::{Content, InodeId, Tree};
use crate::{Error, ErrorKind, Result};

/// What the digest depends on besides tree and chunks.
#[derive(Clone, Copy, Debug)]
pub struct RootOptions {
    /// Algorithm of the image.
    pub digester: DigestAlgorithm,
    /// Chunk size of the image.
    pub chunk_size: u32,
    /// False if owners are stored as 0.
    pub explicit_ids: bool,
}

/// The image root digest of `tree`.
///
/// # Errors
/// None of its own; the walk's type demands it.
pub fn image_root(tree: &Tree, chunks: &dyn ChunkSource, options: RootOptions) -> Result<TaggedDigest> {
    let merkle = Merkle(options.digester);
    let mut hasher = TreeHasher {
        tree,
        chunks,
        options,
        merkle,
        no_xattrs: merkle.xattrs::<&[u8], &[u8]>(&[]),
        links: links(tree, merkle)?,
        done: HashMap::new(),
    };
    Ok(merkle.root(options.chunk_size, hasher.root()))
}

/// Opens a bootstrap just written as a mount would and recomputes its root digest, so that nothing
/// gets a final name that readers refuse. Without `root` the image has none to compare.
///
/// # Errors
/// `Corrupt`, `Mismatch`: it fails, which is a fault of the builder or of bootstraps it merged.
pub fn check_written(bootstrap: &[u8], root: Option<TaggedDigest>) -> Result<()> {
    const FAILS: &str = "the new bootstrap fails its own check";
    let options = rafs::bootstrap::OpenOptions::default();
    let opened = rafs::bootstrap::from_bytes(Buffer::copy_of(bootstrap), &options)
        .map_err(|e| Error::from(e).context(FAILS))?;
    let Some(root) = root else { return Ok(()) };
    let found = rafs::merkle::image_root(&*opened).map_err(|e| Error::from(e).context(FAILS))?;
    if found != root {
        return Err(Error::new(
            ErrorKind::Mismatch,
            format!("{FAILS}: root digest {found} instead of {root}"),
        ));
    }
    Ok(())
}

/// Link digests of the regular files that have two or more names.
fn links(tree: &Tree, merkle: Merkle) -> Result<HashMap<InodeId, Digest>> {
    let mut names = vec![0u8; tree.inode_count()];
    let regular = |id: InodeId| tree.inode(id).is_regular();
    tree.walk(|_, id| {
        names[id.0 as usize] = names[id.0 as usize].saturating_add(1);
        Ok(())
    })?;
    let mut groups: HashMap<InodeId, Vec<Box<[u8]>>> = HashMap::new();
    tree.walk(|path, id| {
        if names[id.0 as usize] > 1 && regular(id) {
            groups.entry(id).or_default().push(path.into());
        }
        Ok(())
    })?;
    Ok(groups
        .into_iter()
        .map(|(id, mut paths)| {
            // The walk's order is that of components, not of whole paths.
            paths.sort_unstable();
            (id, merkle.links(&paths))
        })
        .collect())
}

struct TreeHasher<'a> {
    tree: &'a Tree,
    chunks: &'a dyn ChunkSource,
    options: RootOptions,
    merkle: Merkle,
    /// Of an inode without xattrs, as nearly all are.
    no_xattrs: Digest,
    links: HashMap<InodeId, Digest>,
    /// Nodes of hard-linked files.
    done: HashMap<InodeId, Digest>,
}

/// A directory being hashed.
struct Level<'a> {
    id: InodeId,
    name: &'a [u8],
    rest: std::collections::btree_map::Iter<'a, Box<[u8]>, InodeId>,
    digest: DirectoryDigest,
}

impl<'a> TreeHasher<'a> {
    fn root(&mut self) -> Digest {
        let mut stack: Vec<Level<'a>> = self.level(self.tree.root(), b"").into_iter().collect();
        let mut node = self.merkle.special();
        while let Some(top) = stack.last_mut() {
            if let Some((name, &id)) = top.rest.next() {
                match self.level(id, name) {
                    Some(below) => stack.push(below),
                    None => {
                        let child = self.leaf(id);
                        top.digest.push(name, child);
                    }
                }
                continue;
            }
            let Some(full) = stack.pop() else { break };
            node = self.node(full.id, full.digest.finish());
            if let Some(parent) = stack.last_mut() {
                parent.digest.push(full.name, node);
            }
        }
        node
    }

    fn level(&self, id: InodeId, name: &'a [u8]) -> Option<Level<'a>> {
        let children = self.tree.inode(id).children()?;
        // Fewer than 2^31 entries exist.
        let digest = self.merkle.directory(children.len() as u32);
        Some(Level { id, name, rest: children.iter(), digest })
    }

    fn leaf(&mut self, id: InodeId) -> Digest {
        if let Some(&node) = self.done.get(&id) {
            return node;
        }
        let data = match &self.tree.inode(id).content {
            Content::Regular { file, size } => {
                let digests = self.chunks.file_chunks(*file).iter().map(|&c| self.chunks.row(c).digest);
                self.merkle.file(*size, digests)
            }
            Content::Symlink(target) => self.merkle.symlink(target),
            &Content::CharDevice { major, minor } | &Content::BlockDevice { major, minor } => {
                self.merkle.device(major, minor)
            }
            Content::Fifo | Content::Socket | Content::Directory(_) => self.merkle.special(),
        };
        let node = self.node(id, data);
        if self.links.contains_key(&id) {
            self.done.insert(id, node);
        }
        node
    }

    fn node(&self, id: InodeId, data: Digest) -> Digest {
        let inode = self.tree.inode(id);
        let meta = &inode.metadata;
        let xattrs = match meta.xattrs.is_empty() {
            true => self.no_xattrs,
            false => {
                let sorted: Vec<_> = meta.xattrs.iter().map(|x| (&x.name, &x.value)).collect();
                self.merkle.xattrs(&sorted)
            }
        };
        self.merkle.node(&NodeFields {
            mode: inode.mode(),
            uid: if self.options.explicit_ids { meta.uid } else { 0 },
            gid: if self.options.explicit_ids { meta.gid } else { 0 },
            mtime: meta.mtime,
            mtime_nsec: meta.mtime_nsec,
            xattrs,
            links: self.links.get(&id).copied().unwrap_or(NO_LINKS),
            data,
        })
    }
}
