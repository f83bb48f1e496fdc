//! The root digest and proofs, computed from a bootstrap alone.

use std::ops::ControlFlow;
use std::thread;

use storage::digest::{Digest, TaggedDigest};

use super::proof::{Attributes, Child, Data, Directory, Proof, Target, Xattr};
use super::{DirectoryDigest, Merkle, NO_LINKS, NodeFields};
use crate::bootstrap::{Attr, Bootstrap, DirEntry, FileType, Nid, Step, Walk};
use crate::format::limits::MAX_LINK_PATH_BYTES;
use crate::{Error, ErrorKind, Result};

/// Steps of the walk whose leaves are hashed together: half a MiB with their digests.
const STEPS_AT_ONCE: usize = 4096;

/// Fewer leaves are hashed faster (a µs each) than another thread starts.
const LEAVES_PER_THREAD: usize = 512;

/// The image root digest of `bootstrap`.
///
/// Three walks at most: two to find hard-link groups and their names, one to hash. Memory:
/// 8 bytes for each name, the paths of hard-linked inodes, a hasher per level, and half a MiB.
///
/// # Errors
/// `Unsupported`: a chunk has no digest record, or one of another algorithm than the
/// image's. `Corrupt`: a stored link count is not the number of names, which everybody
/// would see and the digest would not cover; more link names than [`MAX_LINK_PATH_BYTES`].
pub fn image_root(bootstrap: &dyn Bootstrap) -> Result<TaggedDigest> {
    let mut tree = Tree::new(bootstrap)?;
    let node = tree.digest(&mut |_, _, _| {})?;
    Ok(tree.merkle.root(bootstrap.summary().chunk_size, node))
}

/// A proof that the entry at `path` (components joined by `/`; empty for the root) is what
/// it is, which whoever knows the root digest can verify without the image.
///
/// # Errors
/// Those of [`image_root`]. `NotFound`: no such entry.
pub fn prove(bootstrap: &dyn Bootstrap, path: &[u8]) -> Result<Proof> {
    let mut chain = vec![bootstrap.root()];
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&b| b == b'/').filter(|name| !name.is_empty()) {
        let dir = chain[chain.len() - 1];
        let entry = bootstrap.lookup(dir, name)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the image has no \"{}\"", path.escape_ascii()))
        })?;
        chain.push(entry.nid);
        names.push(name);
    }
    let mut lists: Vec<Vec<Child>> = vec![Vec::new(); chain.len()];
    let mut tree = Tree::new(bootstrap)?;
    let node = tree.digest(&mut |dir, name, node| {
        if let Some(level) = chain.iter().position(|&nid| nid == dir) {
            lists[level].push(Child::new(name, node));
        }
    })?;
    let target = chain.pop().unwrap_or(bootstrap.root());
    let target_children = lists.pop().unwrap_or_default();
    let directories = chain
        .iter()
        .zip(lists)
        .map(|(&dir, children)| {
            let attributes = Attributes::new(&bootstrap.attr(dir)?);
            Ok(Directory { attributes, xattrs: tree.xattrs(dir)?.to_string(), children })
        })
        .collect::<Result<_>>()?;
    Proof::new(
        tree.merkle.root(bootstrap.summary().chunk_size, node),
        bootstrap.summary().chunk_size,
        &names.join(&b'/'),
        directories,
        tree.target(target, target_children)?,
    )
}

/// The names of a hard-linked inode, and its digest once it is known.
struct Group {
    nid: Nid,
    names: u32,
    links: Digest,
    node: Option<Digest>,
    /// Hashed with its first name, however many there are.
    met: bool,
}

struct Tree<'a> {
    bootstrap: &'a dyn Bootstrap,
    merkle: Merkle,
    /// Of an inode without xattrs, as nearly all are.
    no_xattrs: Digest,
    /// Hard-link groups, sorted by nid.
    groups: Vec<Group>,
}

impl<'a> Tree<'a> {
    fn new(bootstrap: &'a dyn Bootstrap) -> Result<Self> {
        let summary = bootstrap.summary();
        if let Some(blob) = bootstrap.blobs().iter().find(|b| b.digester != summary.digester) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "chunks of blob {} have {} digests in an image of {} ones: such a mixture has no root digest",
                    blob.id, blob.digester, summary.digester
                ),
            ));
        }
        let merkle = Merkle(summary.digester);
        let no_xattrs = merkle.xattrs::<&[u8], &[u8]>(&[]);
        let mut tree = Self { bootstrap, merkle, no_xattrs, groups: Vec::new() };
        let mut names = tree.link_names()?;
        names.sort_unstable();
        for group in names.chunk_by(|a, b| a.0 == b.0) {
            let paths: Vec<&[u8]> = group.iter().map(|(_, path)| &**path).collect();
            // Fewer than 2^32 names fit in a bootstrap.
            let names = paths.len() as u32;
            tree.groups.push(Group {
                nid: group[0].0,
                names,
                links: tree.merkle.links(&paths),
                node: None,
                met: false,
            });
        }
        Ok(tree)
    }

    /// Nid and path of every name of an inode that has two or more.
    ///
    /// The stored link counts are not asked: what counts are the names there are.
    fn link_names(&self) -> Result<Vec<(Nid, Box<[u8]>)>> {
        let mut leaves = Vec::new();
        let mut walk = Walk::new(self.bootstrap, self.bootstrap.root());
        while let Some(step) = walk.step()? {
            if let Step::Leaf(DirEntry { nid, .. }) = step {
                leaves.push(nid);
            }
        }
        leaves.sort_unstable();
        let mut linked: Vec<Nid> =
            leaves.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
        linked.dedup();
        drop(leaves);
        let mut names = Vec::new();
        if linked.is_empty() {
            return Ok(names);
        }
        let mut total = 0;
        let mut walk = Walk::new(self.bootstrap, self.bootstrap.root());
        while let Some(step) = walk.step()? {
            if let Step::Leaf(entry) = step
                && linked.binary_search(&entry.nid).is_ok()
            {
                total += walk.path().len() + size_of::<(Nid, Box<[u8]>)>();
                if total > MAX_LINK_PATH_BYTES {
                    return Err(Error::corrupt(format!(
                        "the names of hard-linked files take more than {MAX_LINK_PATH_BYTES} bytes"
                    )));
                }
                names.push((entry.nid, walk.path().into()));
            }
        }
        Ok(names)
    }

    /// Hashes the tree; `on_child` sees (directory, name, node digest) of every entry.
    ///
    /// Leaves are most of the work and need nobody's digest but their own: they are hashed on
    /// all cores, as many of the walk's steps at a time as memory is given to.
    fn digest(&mut self, on_child: &mut dyn FnMut(Nid, &[u8], Digest)) -> Result<Digest> {
        struct Level<'a> {
            nid: Nid,
            name: &'a [u8],
            links: u32,
            digest: DirectoryDigest,
        }
        let mut levels: Vec<Level<'a>> = Vec::new();
        let mut walk = Walk::new(self.bootstrap, self.bootstrap.root());
        let mut steps = Vec::with_capacity(STEPS_AT_ONCE);
        loop {
            steps.clear();
            while steps.len() < STEPS_AT_ONCE
                && let Some(step) = walk.step()?
            {
                steps.push(step);
            }
            if steps.is_empty() {
                return Err(Error::corrupt("the walk ended before its root"));
            }
            let mut leaves = self.leaves(&steps)?.into_iter();
            for step in &steps {
                let (name, node) = match *step {
                    Step::Enter(entry) => {
                        // "." and the name, and ".." of every directory inside.
                        let (mut count, mut links) = (0u32, 2u32);
                        self.bootstrap.children(entry.nid, 0, &mut |child| {
                            count += 1;
                            links += u32::from(child.file_type == FileType::Directory);
                            ControlFlow::Continue(())
                        })?;
                        let digest = self.merkle.directory(count);
                        levels.push(Level { nid: entry.nid, name: entry.name, links, digest });
                        continue;
                    }
                    Step::Leaf(entry) => {
                        let node = leaves.next().ok_or_else(|| Error::corrupt("a leaf was not hashed"))?;
                        (entry.name, node)
                    }
                    Step::Leave(nid) => {
                        let Some(level) = levels.pop() else { continue };
                        let attr = self.bootstrap.attr(nid)?;
                        check_links(&attr, level.links)?;
                        let fields = self.fields(&attr, NO_LINKS, level.digest.finish())?;
                        (level.name, self.merkle.node(&fields))
                    }
                };
                match levels.last_mut() {
                    Some(parent) => {
                        on_child(parent.nid, name, node);
                        parent.digest.push(name, node);
                    }
                    None => return Ok(node),
                }
            }
        }
    }

    /// Node digests of the leaves among `steps`, in their order.
    fn leaves(&mut self, steps: &[Step<'a>]) -> Result<Vec<Digest>> {
        let mut unknown = Vec::with_capacity(steps.len());
        for nid in steps.iter().filter_map(leaf_of) {
            let met = self.group(nid).is_some_and(|at| std::mem::replace(&mut self.groups[at].met, true));
            if !met {
                unknown.push(nid);
            }
        }
        let hashed = self.hash(&unknown)?;
        for (&nid, &node) in unknown.iter().zip(&hashed) {
            if let Some(at) = self.group(nid) {
                self.groups[at].node = Some(node);
            }
        }
        let mut hashed = unknown.into_iter().zip(hashed).peekable();
        let node_of = |nid| {
            let next = hashed.next_if(|&(unknown, _)| unknown == nid).map(|(_, node)| node);
            next.or_else(|| self.group(nid).and_then(|at| self.groups[at].node))
        };
        let nodes: Option<Vec<Digest>> = steps.iter().filter_map(leaf_of).map(node_of).collect();
        nodes.ok_or_else(|| Error::corrupt("a leaf was not hashed"))
    }

    /// Node digests of these leaves.
    fn hash(&self, nids: &[Nid]) -> Result<Vec<Digest>> {
        let hash = |nids: &[Nid]| nids.iter().map(|&nid| self.leaf(nid)).collect::<Result<Vec<_>>>();
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = nids.len().div_ceil(threads).max(LEAVES_PER_THREAD);
        let (own, others) = nids.split_at(share.min(nids.len()));
        thread::scope(|scope| {
            let others: Vec<_> = others
                .chunks(share)
                .map(|nids| (nids, thread::Builder::new().spawn_scoped(scope, move || hash(nids))))
                .collect();
            let mut nodes = hash(own)?;
            for (nids, thread) in others {
                nodes.extend(match thread.map(thread::ScopedJoinHandle::join) {
                    Ok(Ok(hashed)) => hashed?,
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    // No more threads: it is only slower.
                    Err(_) => hash(nids)?,
                });
            }
            Ok(nodes)
        })
    }

    fn group(&self, nid: Nid) -> Option<usize> {
        self.groups.binary_search_by_key(&nid, |group| group.nid).ok()
    }

    /// Node digest of an inode that is not a directory.
    fn leaf(&self, nid: Nid) -> Result<Digest> {
        let group = self.group(nid).map(|at| &self.groups[at]);
        let (names, links) = group.map_or((1, NO_LINKS), |group| (group.names, group.links));
        let attr = self.bootstrap.attr(nid)?;
        check_links(&attr, names)?;
        let data = match attr.file_type {
            FileType::Regular => self.merkle.file(attr.size, self.chunks(&attr)?.into_iter()),
            FileType::Symlink => self.merkle.symlink(&self.bootstrap.read_link(nid)?),
            FileType::CharDevice | FileType::BlockDevice => {
                let (major, minor) = attr.device();
                self.merkle.device(major, minor)
            }
            FileType::Fifo | FileType::Socket => self.merkle.special(),
            FileType::Directory => return Err(Error::corrupt(format!("inode {nid} is a directory"))),
        };
        Ok(self.merkle.node(&self.fields(&attr, links, data)?))
    }

    fn fields(&self, attr: &Attr, links: Digest, data: Digest) -> Result<NodeFields> {
        Ok(NodeFields {
            mode: attr.mode,
            uid: attr.uid,
            gid: attr.gid,
            mtime: attr.mtime,
            mtime_nsec: attr.mtime_nsec,
            xattrs: self.xattrs(attr.nid)?,
            links,
            data,
        })
    }

    fn chunks(&self, attr: &Attr) -> Result<Vec<Digest>> {
        let count = attr.size.div_ceil(u64::from(self.bootstrap.summary().chunk_size));
        // The door has counted the chunks and found them in 32 bits.
        let positions = 0..count as u32;
        positions
            .map(|position| {
                let chunk = self.bootstrap.chunk(attr.nid, position)?;
                let record = self.bootstrap.chunk_info(chunk.blob, chunk.index).ok_or_else(|| {
                    Error::new(
                        ErrorKind::Unsupported,
                        format!("inode {}, chunk {position}: the image has no digest of it", attr.nid),
                    )
                })?;
                Ok(Digest(record.digest))
            })
            .collect()
    }

    fn sorted_xattrs(&self, nid: Nid) -> Result<Vec<(Vec<u8>, &'a [u8])>> {
        let mut xattrs = Vec::new();
        self.bootstrap.xattrs(nid, &mut |xattr| {
            xattrs.push(([xattr.prefix, xattr.suffix].concat(), xattr.value));
            ControlFlow::Continue(())
        })?;
        xattrs.sort_unstable();
        Ok(xattrs)
    }

    fn xattrs(&self, nid: Nid) -> Result<Digest> {
        let xattrs = self.sorted_xattrs(nid)?;
        Ok(if xattrs.is_empty() { self.no_xattrs } else { self.merkle.xattrs(&xattrs) })
    }

    /// Everything about the entry that a proof is for.
    fn target(&self, nid: Nid, children: Vec<Child>) -> Result<Target> {
        let attr = self.bootstrap.attr(nid)?;
        let mut links = Vec::new();
        if self.groups.binary_search_by_key(&nid, |group| group.nid).is_ok() {
            links = self.link_names()?;
            links.retain(|(linked, _)| *linked == nid);
            links.sort_unstable();
        }
        let data = match attr.file_type {
            FileType::Regular => Data::regular(attr.size, &self.chunks(&attr)?),
            FileType::Directory => Data::Directory { children },
            FileType::Symlink => Data::symlink(&self.bootstrap.read_link(nid)?),
            FileType::CharDevice | FileType::BlockDevice => {
                let (major, minor) = attr.device();
                Data::Device { major, minor }
            }
            FileType::Fifo | FileType::Socket => Data::Special,
        };
        let xattrs = self.sorted_xattrs(nid)?;
        Ok(Target {
            attributes: Attributes::new(&attr),
            xattrs: xattrs.iter().map(|(name, value)| Xattr::new(name, value)).collect(),
            links: links.iter().map(|(_, path)| super::proof::encode(path)).collect(),
            data,
        })
    }
}

fn leaf_of(step: &Step<'_>) -> Option<Nid> {
    match step {
        Step::Leaf(entry) => Some(entry.nid),
        _ => None,
    }
}

/// A link count follows from the names, so the digest does not hold it; it must be true.
fn check_links(attr: &Attr, names: u32) -> Result<()> {
    if attr.nlink != names {
        return Err(Error::corrupt(format!(
            "inode {}: link count {} instead of {names}; such an image has no root digest",
            attr.nid, attr.nlink
        )));
    }
    Ok(())
}
