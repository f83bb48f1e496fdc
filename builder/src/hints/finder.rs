//! The files found so far, and the means to look at more of them.

use std::collections::HashSet;
use std::io::{Read as _, Seek, SeekFrom};
use std::ops::{Bound, Range};

use super::contents::Contents;
use super::paths::{self, Place};
use crate::tree::{Content, InodeId, Tree};

/// Files named at most. A hint is no promise: what is behind it comes when it is read.
const MAX_FILES: usize = 4096;
/// Bytes of files named at most.
const MAX_BYTES: u64 = 1 << 30;
/// Largest text that is looked into.
const MAX_TEXT: u64 = 4 << 20;
/// Text looked into in all.
const MAX_ALL_TEXT: u64 = 256 << 20;

/// Collects files in the order in which a start reads them.
pub(super) struct Finder<'a> {
    tree: &'a Tree,
    contents: &'a Contents<'a>,
    environment: Vec<Vec<u8>>,
    found: Vec<InodeId>,
    known: HashSet<InodeId>,
    /// Libraries looked into, added or not.
    libraries: HashSet<InodeId>,
    bytes: u64,
    text: u64,
    /// Where the dynamic linker looks, once known.
    pub linker_dirs: Option<Vec<Vec<u8>>>,
}

impl<'a> Finder<'a> {
    /// Nothing found yet. `environment` holds `NAME=VALUE`.
    pub fn new(tree: &'a Tree, contents: &'a Contents<'a>, environment: Vec<Vec<u8>>) -> Self {
        Self {
            tree,
            contents,
            environment,
            found: Vec::new(),
            known: HashSet::new(),
            libraries: HashSet::new(),
            bytes: 0,
            text: 0,
            linker_dirs: None,
        }
    }

    /// What was found, in order.
    pub fn into_found(self) -> Vec<InodeId> {
        self.found
    }

    /// Value of an environment variable that is set and not empty.
    pub fn variable(&self, name: &str) -> Option<&[u8]> {
        let entries = self.environment.iter();
        let mut values = entries.filter_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
        values.next().filter(|value| !value.is_empty())
    }

    /// Where `path` leads, whatever is there.
    pub fn resolve(&self, path: &[u8]) -> Option<Place> {
        paths::resolve(self.tree, path)
    }

    /// The regular file that `path` leads to.
    pub fn regular(&self, path: &[u8]) -> Option<Place> {
        self.resolve(path).filter(|place| self.tree.inode(place.inode).is_regular())
    }

    /// True if `path` leads to a directory.
    pub fn is_dir(&self, path: &[u8]) -> bool {
        self.resolve(path).is_some_and(|place| self.tree.inode(place.inode).is_dir())
    }

    /// Names in the directory at `path`, in order; none if it is no directory.
    pub fn names(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let place = self.resolve(path);
        let children = place.as_ref().and_then(|place| self.tree.inode(place.inode).children());
        children.into_iter().flatten().map(|(name, _)| name.to_vec()).collect()
    }

    /// True if a name in the directory at `path` begins with `stem`.
    pub fn has_prefix(&self, path: &[u8], stem: &[u8]) -> bool {
        let place = self.resolve(path);
        let children = place.as_ref().and_then(|place| self.tree.inode(place.inode).children());
        let from = (Bound::Included(stem), Bound::Unbounded);
        children
            .and_then(|children| children.range::<[u8], _>(from).next())
            .is_some_and(|(name, _)| name.starts_with(stem))
    }

    /// The first library in `dir` whose name begins with `stem` and a dash or dot.
    pub fn libraries(&self, dir: &[u8], stem: &[u8]) -> Option<Vec<u8>> {
        let place = self.resolve(dir)?;
        let children = self.tree.inode(place.inode).children()?;
        let from = children.range::<[u8], _>((Bound::Included(stem), Bound::Unbounded));
        from.map(|(name, _)| name)
            .take_while(|name| name.starts_with(stem))
            .find(|name| name.ends_with(b".so") && b"-.".contains(&name[stem.len()]))
            .map(|name| name.to_vec())
    }

    /// True if a library was added or [noted](Self::note_library): it is not looked into again.
    pub fn is_known(&self, inode: InodeId) -> bool {
        self.known.contains(&inode) || self.libraries.contains(&inode)
    }

    /// Notes a library that is looked into, for which there may be no room.
    pub fn note_library(&mut self, inode: InodeId) {
        self.libraries.insert(inode);
    }

    /// Adds the regular file that `path` leads to. `None` if there is none, or no room.
    pub fn add(&mut self, path: &[u8]) -> Option<Place> {
        let place = self.regular(path)?;
        let size = self.size(place.inode);
        if self.known.contains(&place.inode) {
            return Some(place);
        }
        if self.found.len() >= MAX_FILES || self.bytes.saturating_add(size) > MAX_BYTES {
            return None;
        }
        self.known.insert(place.inode);
        // An empty file has nothing to fetch.
        if size > 0 {
            self.found.push(place.inode);
            self.bytes += size;
        }
        Some(place)
    }

    /// Bytes of a regular file.
    pub fn size(&self, inode: InodeId) -> u64 {
        match &self.tree.inode(inode).content {
            Content::Regular { size, .. } => *size,
            _ => 0,
        }
    }

    /// The bytes of a regular file.
    pub fn open(&self, inode: InodeId) -> Option<impl std::io::Read + Seek> {
        match &self.tree.inode(inode).content {
            Content::Regular { file, size } => Some(self.contents.open(*file, *size)),
            _ => None,
        }
    }

    /// The first bytes of a regular file: as many as tell a program from a script.
    pub fn head(&self, inode: InodeId) -> Vec<u8> {
        let mut head = Vec::new();
        if let Some(file) = self.open(inode) {
            // What can not be read is not looked into.
            let _ = file.take(256).read_to_end(&mut head);
        }
        head
    }

    /// The whole of a text file; `None` if there is none, or it is too large to be looked into.
    pub fn text(&mut self, path: &[u8]) -> Option<Vec<u8>> {
        let inode = self.regular(path)?.inode;
        let size = self.size(inode);
        if size > MAX_TEXT || self.text + size > MAX_ALL_TEXT {
            return None;
        }
        self.text += size;
        let mut bytes = Vec::new();
        self.open(inode)?.read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Bytes of a file, cut to the size of text that is looked into.
    pub fn part(&mut self, inode: InodeId, range: Range<u64>) -> Option<Vec<u8>> {
        let size = range.end.min(self.size(inode)).saturating_sub(range.start).min(MAX_TEXT);
        if self.text + size > MAX_ALL_TEXT {
            return None;
        }
        self.text += size;
        let mut file = self.open(inode)?;
        file.seek(SeekFrom::Start(range.start)).ok()?;
        let mut bytes = Vec::new();
        file.take(size).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }
}
