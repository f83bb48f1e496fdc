//! The tree of an image while it is built: an arena of inodes, directories that map
//! names to them.
//!
//! A hard link is one inode under several names. Names, targets and xattrs are bytes.
//! An inode that no directory names any more stays in the arena, unreachable; every
//! walk starts at the root.
//!
//! Invariants: the root is a directory and inode 0; only regular files have several
//! names; a directory has exactly one parent; names are 1 to 255 bytes without `/` and
//! NUL and are neither `.` nor `..`.
//!
//! Memory: about 150 bytes an entry with a short name.

mod inode;
mod xattr;

use std::collections::HashMap;

use rafs::format::limits;

use crate::{Error, Result};
pub use inode::{Children, Content, Inode, Metadata};
pub use xattr::{Xattr, XattrPool, Xattrs, split_xattr};

/// Number of an inode in its [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(pub u32);

/// Number of a layer of the build, counted from 0 in the order they were opened. Each layer has at
/// most one blob; a layer that stores no chunk has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerIndex(pub u16);

/// The data of one regular file, as added to a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// The layer it was added to.
    pub layer: LayerIndex,
    /// Its number among the files of that layer, in stream order.
    pub index: u32,
}

/// A tree under construction or finished.
#[derive(Clone, Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
    below: LinksBelow,
}

/// Hard links of a layer to what only a layer below has.
#[derive(Clone, Debug, Default)]
pub(crate) struct LinksBelow {
    /// Inodes that only hold the place of such a link, and the path it leads to.
    open: HashMap<InodeId, Box<[u8]>>,
    /// Copies of inodes of the tree below, and which ones: a merge makes them one again.
    pub(crate) found: HashMap<InodeId, InodeId>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree of an implied root directory.
    pub fn new() -> Self {
        Self {
            inodes: vec![Inode {
                metadata: Metadata::implied_directory(),
                content: Content::Directory(Children::new()),
                implied: true,
            }],
            below: LinksBelow::default(),
        }
    }

    /// The root directory.
    pub fn root(&self) -> InodeId {
        InodeId(0)
    }

    /// Inodes in the arena, unreachable ones included; ids are below this.
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// The inode `id`.
    ///
    /// # Panics
    /// If `id` is not of this tree.
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.0 as usize]
    }

    /// The inode `id`, to change its attributes.
    ///
    /// # Panics
    /// If `id` is not of this tree.
    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.0 as usize]
    }

    /// The inode at `path`, components joined by `/` with or without a leading slash.
    /// Symlinks are not followed.
    pub fn lookup(&self, path: &[u8]) -> Option<InodeId> {
        path.split(|&b| b == b'/')
            .filter(|c| !c.is_empty())
            .try_fold(self.root(), |dir, name| self.inode(dir).children()?.get(name).copied())
    }

    /// Puts an inode into the arena, not yet named by any directory.
    ///
    /// # Errors
    /// `Limit`: 2^31 inodes.
    pub fn add(&mut self, inode: Inode) -> Result<InodeId> {
        // i_ino is at most 2^31 - 1 (rafs-v6 section 4.2).
        if self.inodes.len() >= i32::MAX as usize {
            return Err(Error::limit("more than 2147483647 inodes in one image"));
        }
        if let Content::Symlink(target) = &inode.content {
            check_target(target)?;
        }
        let id = InodeId(self.inodes.len() as u32);
        self.inodes.push(inode);
        Ok(id)
    }

    /// Puts `inode` at `path`. Missing parents become implied directories. What is there
    /// already is replaced, but a directory put over a directory keeps the entries and takes
    /// the attributes, and the empty path is the root.
    ///
    /// # Errors
    /// `Corrupt`: a component is `..`, longer than 255 bytes or holds a NUL; a parent is
    /// not a directory; the root is not a directory. `Limit`: of the format.
    pub fn insert(&mut self, path: &[u8], inode: Inode) -> Result<InodeId> {
        let components = components(path)?;
        let Some((name, parents)) = components.split_last() else {
            return self.replace_root(inode);
        };
        let dir = self.make_parents(parents, path)?;
        if inode.is_dir()
            && let Some(&old) = self.inode(dir).children().and_then(|c| c.get(*name))
            && self.inode(old).is_dir()
        {
            let there = self.inode_mut(old);
            there.metadata = inode.metadata;
            there.implied = inode.implied;
            return Ok(old);
        }
        let id = self.add(inode).map_err(|e| e.context(shown(path)))?;
        self.set_child(dir, name, id);
        Ok(id)
    }

    /// Names the regular file `target` a second time, at `path`.
    ///
    /// # Errors
    /// As [`Tree::insert`]; also `Corrupt` if `target` is not a regular file.
    pub fn link(&mut self, path: &[u8], target: InodeId) -> Result<()> {
        if !self.inode(target).is_regular() {
            return Err(Error::bad_source(format!(
                "{}: hard link to something that is not a regular file",
                shown(path)
            )));
        }
        let components = components(path)?;
        let Some((name, parents)) = components.split_last() else {
            return Err(Error::bad_source("hard link in place of the root directory"));
        };
        let dir = self.make_parents(parents, path)?;
        self.set_child(dir, name, target);
        Ok(())
    }

    /// Names at `path` what the layers below have at `target`; nothing more is known of it until
    /// [`Tree::resolve_links`].
    ///
    /// # Errors
    /// As [`Tree::insert`].
    pub fn link_below(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let place = self.insert(path, Inode::new(Metadata::implied_directory(), Content::Fifo))?;
        self.below.open.insert(place, target.into());
        Ok(())
    }

    /// Where the hard link `id` leads, as long as that is not resolved.
    pub fn open_link(&self, id: InodeId) -> Option<&[u8]> {
        self.below.open.get(&id).map(|target| &**target)
    }

    /// Finds the targets of all links to layers below in `lower`, the merged tree of these. A file
    /// is copied with its metadata and chunks, once for all of its new names, and remembered as
    /// that file, so that a merge joins the names of both trees into one group.
    ///
    /// # Errors
    /// `Corrupt`: a target is in no layer below, or a directory.
    pub fn resolve_links(&mut self, lower: &Tree) -> Result<()> {
        if self.below.open.is_empty() {
            return Ok(());
        }
        // Links that a later entry has replaced are not looked for.
        let mut links = Vec::new();
        self.walk(|path, id| {
            if self.below.open.contains_key(&id) {
                links.push((path.to_vec(), id));
            }
            Ok(())
        })?;
        let mut copies: HashMap<InodeId, InodeId> = HashMap::new();
        for (path, place) in links {
            let Some(target) = self.below.open.get(&place) else { continue };
            let refused = |why: &str| {
                Error::bad_source(format!("{}: hard link to {}, which {why}", shown(&path), shown(target)))
            };
            let found = lower
                .lookup(target)
                .ok_or_else(|| refused("neither precedes it in its layer nor is in a layer below"))?;
            let inode = lower.inode(found);
            if inode.is_dir() {
                return Err(refused("is a directory"));
            }
            if let Some(&copy) = copies.get(&found) {
                self.link(&path, copy)?;
                continue;
            }
            *self.inode_mut(place) = inode.clone();
            // Only regular files have several names.
            if inode.is_regular() {
                copies.insert(found, place);
                self.below.found.insert(place, found);
            }
        }
        self.below.open.clear();
        Ok(())
    }

    /// True while [`Tree::resolve_links`] has to be called.
    pub fn has_open_links(&self) -> bool {
        !self.below.open.is_empty()
    }

    /// Calls `visit` with path (no leading slash, root empty) and inode of every entry: a
    /// directory before its entries, these in byte order of names.
    ///
    /// # Errors
    /// The visitor's.
    pub fn walk(&self, mut visit: impl FnMut(&[u8], InodeId) -> Result<()>) -> Result<()> {
        let mut path = Vec::new();
        visit(&path, self.root())?;
        let mut stack = Vec::new();
        if let Some(children) = self.inode(self.root()).children() {
            stack.push((0, children.iter()));
        }
        while let Some((parent_len, children)) = stack.last_mut() {
            path.truncate(*parent_len);
            let Some((name, &id)) = children.next() else {
                stack.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            visit(&path, id)?;
            if let Some(below) = self.inode(id).children() {
                stack.push((path.len(), below.iter()));
            }
        }
        Ok(())
    }

    pub(crate) fn set_child(&mut self, dir: InodeId, name: &[u8], id: InodeId) {
        if let Content::Directory(children) = &mut self.inode_mut(dir).content {
            children.insert(name.into(), id);
        }
    }

    pub(crate) fn children_mut(&mut self, dir: InodeId) -> Option<&mut Children> {
        match &mut self.inode_mut(dir).content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    pub(crate) fn into_parts(self) -> (Vec<Inode>, LinksBelow) {
        (self.inodes, self.below)
    }

    fn replace_root(&mut self, inode: Inode) -> Result<InodeId> {
        if !inode.is_dir() {
            return Err(Error::bad_source("the root of the tree is not a directory"));
        }
        let root = &mut self.inodes[0];
        root.metadata = inode.metadata;
        root.implied = inode.implied;
        Ok(self.root())
    }

    fn make_parents(&mut self, parents: &[&[u8]], path: &[u8]) -> Result<InodeId> {
        if parents.len() >= limits::MAX_DEPTH {
            return Err(Error::limit(format!(
                "{}: nested deeper than {} directories",
                shown(path),
                limits::MAX_DEPTH
            )));
        }
        let mut dir = self.root();
        for name in parents {
            let found = self.inode(dir).children().and_then(|c| c.get(*name)).copied();
            dir = match found {
                Some(id) if self.inode(id).is_dir() => id,
                Some(_) => {
                    return Err(Error::bad_source(format!(
                        "{}: its parent {:?} is not a directory in this source",
                        shown(path),
                        String::from_utf8_lossy(name)
                    )));
                }
                None => {
                    let id = self.add(Inode {
                        metadata: Metadata::implied_directory(),
                        content: Content::Directory(Children::new()),
                        implied: true,
                    })?;
                    self.set_child(dir, name, id);
                    id
                }
            };
        }
        Ok(dir)
    }
}

/// Splits `path` into components; empty ones and `.` vanish, so leading slashes and `./` do.
///
/// # Errors
/// `Corrupt`: `..`, a NUL, or a component over 255 bytes.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    let mut out = Vec::new();
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(Error::bad_source(format!("{}: the path contains ..", shown(path)))),
            _ if name.contains(&0) => {
                return Err(Error::bad_source(format!("{}: the path contains a NUL byte", shown(path))));
            }
            _ if name.len() > limits::MAX_NAME_LEN => {
                return Err(Error::bad_source(format!(
                    "{}: a name of {} bytes, at most {} are possible",
                    shown(path),
                    name.len(),
                    limits::MAX_NAME_LEN
                )));
            }
            _ => out.push(name),
        }
    }
    Ok(out)
}

/// `path` for a message: quoted, lossy where it is not UTF-8, cut when very long.
pub fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    match text.char_indices().nth(300) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}

fn check_target(target: &[u8]) -> Result<()> {
    if target.is_empty() || target.len() > limits::MAX_SYMLINK_LEN || target.contains(&0) {
        return Err(Error::bad_source(format!(
            "symlink target of {} bytes: want 1 to {} bytes without NUL",
            target.len(),
            limits::MAX_SYMLINK_LEN
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: u32) -> Inode {
        Inode::new(
            Metadata::implied_directory(),
            Content::Regular { file: FileId { layer: LayerIndex(0), index: n }, size: 0 },
        )
    }

    fn dir() -> Inode {
        Inode::new(Metadata::implied_directory(), Content::Directory(Children::new()))
    }

    #[test]
    fn hostile_paths_are_refused_and_plain_ones_normalised() {
        let long = [b'a'; 256];
        for bad in [&b"../a"[..], b"a/../b", b"a\0b", &long] {
            assert_eq!(components(bad).unwrap_err().kind(), crate::ErrorKind::Corrupt);
        }
        assert_eq!(components(b"/./a//b/").unwrap(), [b"a", b"b"]);
        assert!(components(b"./").unwrap().is_empty());
    }

    #[test]
    fn insertion_implies_parents_and_replaces() {
        let mut tree = Tree::new();
        let f = tree.insert(b"a/b/c", file(1)).unwrap();
        assert!(tree.inode(tree.lookup(b"/a/b").unwrap()).implied);
        tree.insert(b"a/b", dir()).unwrap();
        assert!(!tree.inode(tree.lookup(b"a/b").unwrap()).implied);
        assert_eq!(tree.lookup(b"a/b/c"), Some(f));
        tree.link(b"z", f).unwrap();
        assert_eq!(tree.lookup(b"z"), Some(f));
        assert!(tree.insert(b"z/y", file(2)).is_err());
        tree.insert(b"a", file(3)).unwrap();
        assert_eq!(tree.lookup(b"a/b"), None);
        let mut seen = Vec::new();
        tree.walk(|p, _| {
            seen.push(p.to_vec());
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [&b""[..], b"a", b"z"]);
        assert!(tree.insert(b"/", file(4)).is_err());
        let id = tree.lookup(b"").unwrap();
        assert!(tree.link(b"l", id).is_err());
    }
}
