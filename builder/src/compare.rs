//! Two trees entry by entry: what an image was made from against what it holds.
//!
//! Content is compared by chunk digests: a source is cut and hashed with the image's own
//! chunk size and algorithm, so equal digests mean equal bytes.

use std::collections::HashMap;
use std::fmt;

use crate::content::ChunkSource;
use crate::tree::{Content, Inode, InodeId, Tree, shown};

/// One side of a comparison.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// The tree.
    pub tree: &'a Tree,
    /// Chunks of its files.
    pub chunks: &'a dyn ChunkSource,
}

/// How to compare.
#[derive(Clone, Copy, Debug)]
pub struct CompareOptions {
    /// Chunk size of both sides.
    pub chunk_size: u32,
    /// Differences to describe; further ones are only counted.
    pub limit: usize,
    /// Leave the root's mtime out: that of a directory source is not part of an image.
    pub ignore_root_mtime: bool,
}

/// What differs.
#[derive(Debug, Default)]
pub struct Differences {
    /// The first ones, in order of the walk: path and what is different about it.
    pub first: Vec<Difference>,
    /// All of them.
    pub count: u64,
    /// Entries compared.
    pub entries: u64,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Path without leading slash; empty for the root.
    pub path: Vec<u8>,
    /// What the source has and what the image has.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.is_empty() { b"/" } else { &self.path[..] };
        write!(f, "{}: {}", shown(path), self.what)
    }
}

/// Compares the tree of a source with that of an image.
pub fn compare(source: Side<'_>, image: Side<'_>, options: CompareOptions) -> Differences {
    let mut comparer = Comparer {
        source,
        image,
        options,
        found: Differences::default(),
        links: HashMap::new(),
        links_back: HashMap::new(),
    };
    let (a, b) = (source.tree.root(), image.tree.root());
    comparer.inodes(b"", a, b);
    let mut stack = vec![(Vec::new(), a, b)];
    while let Some((path, a, b)) = stack.pop() {
        comparer.directories(&path, a, b, &mut stack);
    }
    comparer.found
}

struct Comparer<'a> {
    source: Side<'a>,
    image: Side<'a>,
    options: CompareOptions,
    found: Differences,
    /// Which inode of the image stands for which of the source, and back: hard links must
    /// form the same groups.
    links: HashMap<InodeId, InodeId>,
    links_back: HashMap<InodeId, InodeId>,
}

impl<'a> Comparer<'a> {
    fn directories(
        &mut self,
        path: &[u8],
        a: InodeId,
        b: InodeId,
        stack: &mut Vec<(Vec<u8>, InodeId, InodeId)>,
    ) {
        let (source, image): (&'a Tree, &'a Tree) = (self.source.tree, self.image.tree);
        let mut left = source.inode(a).children().into_iter().flatten().peekable();
        let mut right = image.inode(b).children().into_iter().flatten().peekable();
        let mut below = Vec::new();
        loop {
            let order = match (left.peek(), right.peek()) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((x, _)), Some((y, _))) => x.cmp(y),
            };
            let child = |name: &[u8]| match path.is_empty() {
                true => name.to_vec(),
                false => [path, b"/", name].concat(),
            };
            match order {
                std::cmp::Ordering::Less => {
                    if let Some((name, _)) = left.next() {
                        self.report(&child(name), || "is in the source, not in the image".into());
                    }
                }
                std::cmp::Ordering::Greater => {
                    if let Some((name, _)) = right.next() {
                        self.report(&child(name), || "is in the image, not in the source".into());
                    }
                }
                std::cmp::Ordering::Equal => {
                    if let (Some((name, &a)), Some((_, &b))) = (left.next(), right.next()) {
                        let path = child(name);
                        self.inodes(&path, a, b);
                        if source.inode(a).is_dir() && image.inode(b).is_dir() {
                            below.push((path, a, b));
                        }
                    }
                }
            }
        }
        // The stack is popped from its end: in order of names.
        stack.extend(below.into_iter().rev());
    }

    fn inodes(&mut self, path: &[u8], a: InodeId, b: InodeId) {
        self.found.entries += 1;
        let (x, y): (&'a Inode, &'a Inode) = (self.source.tree.inode(a), self.image.tree.inode(b));
        self.field(path, "mode", format_args!("{:o}", x.mode()), format_args!("{:o}", y.mode()));
        if x.content.type_bits() != y.content.type_bits() {
            return;
        }
        let (m, n) = (&x.metadata, &y.metadata);
        self.field(path, "uid", m.uid, n.uid);
        self.field(path, "gid", m.gid, n.gid);
        if !(path.is_empty() && self.options.ignore_root_mtime) {
            let time = |s: i64, ns: u32| format!("{s}.{ns:09}");
            self.field(path, "mtime", time(m.mtime, m.mtime_nsec), time(n.mtime, n.mtime_nsec));
        }
        self.xattrs(path, x, y);
        self.field(
            path,
            "device",
            format_args!("{:#x}", x.content.rdev()),
            format_args!("{:#x}", y.content.rdev()),
        );
        match (&x.content, &y.content) {
            (Content::Symlink(s), Content::Symlink(t)) => self.field(path, "target", shown(s), shown(t)),
            (Content::Regular { file: f, size: s }, Content::Regular { file: g, size: t }) => {
                if *self.links.entry(a).or_insert(b) != b || *self.links_back.entry(b).or_insert(a) != a {
                    self.report(path, || "has other hard links in the image than in the source".into());
                }
                if s != t {
                    return self.field(path, "size", s, t);
                }
                let digests = |side: Side<'a>, file| {
                    side.chunks.file_chunks(file).iter().map(move |&c| side.chunks.row(c).digest)
                };
                let differs = digests(self.source, *f).zip(digests(self.image, *g)).position(|(d, e)| d != e);
                if let Some(position) = differs {
                    let start = position as u64 * u64::from(self.options.chunk_size);
                    let end = (start + u64::from(self.options.chunk_size)).min(*s);
                    self.report(path, || format!("bytes {start} to {end} differ"));
                }
            }
            _ => {}
        }
    }

    fn xattrs(&mut self, path: &[u8], x: &Inode, y: &Inode) {
        let (a, b) = (&x.metadata.xattrs, &y.metadata.xattrs);
        if a == b {
            return;
        }
        for attr in a.iter() {
            match b.get(&attr.name) {
                None => self.report(path, || format!("xattr {} is not in the image", shown(&attr.name))),
                Some(value) if *value != *attr.value => {
                    self.report(path, || {
                        format!("xattr {} has another value in the image", shown(&attr.name))
                    });
                }
                Some(_) => {}
            }
        }
        for attr in b.iter().filter(|attr| a.get(&attr.name).is_none()) {
            self.report(path, || format!("xattr {} is not in the source", shown(&attr.name)));
        }
    }

    fn field(&mut self, path: &[u8], name: &str, source: impl fmt::Display, image: impl fmt::Display) {
        let (source, image) = (source.to_string(), image.to_string());
        if source != image {
            self.report(path, || format!("{name} {source} in the source, {image} in the image"));
        }
    }

    fn report(&mut self, path: &[u8], what: impl FnOnce() -> String) {
        self.found.count += 1;
        if self.found.first.len() < self.options.limit {
            self.found.first.push(Difference { path: path.to_vec(), what: what() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::BuiltContent;
    use crate::tree::{Children, FileId, LayerIndex, Metadata, Xattr, Xattrs};

    fn tree() -> Tree {
        let mut tree = Tree::new();
        let file = |mode| {
            let content = Content::Symlink((*b"t").into());
            Inode::new(Metadata { mode, ..Metadata::implied_directory() }, content)
        };
        tree.insert(b"d/a", file(0o644)).unwrap();
        tree.insert(b"d/b", file(0o644)).unwrap();
        tree.insert(b"e", Inode::new(Metadata::implied_directory(), Content::Directory(Children::new())))
            .unwrap();
        tree
    }

    fn differences(change: impl FnOnce(&mut Tree)) -> Vec<String> {
        let chunks = BuiltContent::default();
        let (a, mut b) = (tree(), tree());
        change(&mut b);
        let options = CompareOptions { chunk_size: 4096, limit: 10, ignore_root_mtime: false };
        let side = |tree| Side { tree, chunks: &chunks };
        compare(side(&a), side(&b), options).first.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        assert!(differences(|_| {}).is_empty());
        let meta = |tree: &mut Tree, change: &dyn Fn(&mut Metadata)| {
            let id = tree.lookup(b"d/a").unwrap();
            change(&mut tree.inode_mut(id).metadata);
        };
        for (change, want) in [
            (&(|m: &mut Metadata| m.mode = 0o600) as &dyn Fn(&mut Metadata), "mode 120644"),
            (&|m: &mut Metadata| m.uid = 7, "uid 0 in the source, 7"),
            (&|m: &mut Metadata| m.mtime = -1, "mtime"),
            (
                &|m: &mut Metadata| {
                    let x = Xattr { name: (*b"user.a").into(), value: (*b"1").into() };
                    m.xattrs = Xattrs::new(vec![x]).unwrap();
                },
                "xattr \"user.a\" is not in the source",
            ),
        ] {
            let found = differences(|tree| meta(tree, change));
            assert_eq!(found.len(), 1);
            assert!(found[0].starts_with("\"d/a\": ") && found[0].contains(want), "{found:?}");
        }
        let gone = differences(|tree| {
            let d = tree.lookup(b"d").unwrap();
            tree.children_mut(d).unwrap().remove(&b"b"[..]);
        });
        assert_eq!(gone, ["\"d/b\": is in the source, not in the image"]);
        let swapped = differences(|tree| {
            tree.insert(b"e", Inode::new(Metadata::implied_directory(), Content::Fifo)).unwrap();
        });
        assert!(swapped[0].contains("mode 40755 in the source, 10755 in the image"));
    }

    #[test]
    fn hard_link_groups_must_be_the_same() {
        let chunks = BuiltContent::default();
        let build = |linked: bool| {
            let mut tree = Tree::new();
            // Never asked for content: both are empty and sizes differ from no one.
            let file = |index| {
                let file = FileId { layer: LayerIndex(0), index };
                Inode::new(Metadata::implied_directory(), Content::Regular { file, size: u64::from(index) })
            };
            let a = tree.insert(b"a", file(1)).unwrap();
            if linked {
                tree.link(b"b", a).unwrap();
            } else {
                tree.insert(b"b", file(2)).unwrap();
            }
            tree
        };
        let (linked, apart) = (build(true), build(false));
        let options = CompareOptions { chunk_size: 4096, limit: 10, ignore_root_mtime: false };
        let side = |tree| Side { tree, chunks: &chunks };
        // Sizes differ, so content is not looked at; the groups are compared first.
        let mut one = Comparer {
            source: side(&linked),
            image: side(&apart),
            options,
            found: Differences::default(),
            links: HashMap::new(),
            links_back: HashMap::new(),
        };
        let (a, b) = (linked.lookup(b"a").unwrap(), apart.lookup(b"b").unwrap());
        one.links.insert(a, apart.lookup(b"a").unwrap());
        one.inodes(b"b", a, b);
        assert!(one.found.first[0].what.contains("hard links"));
    }
}
