//! Whiteouts, opaque directories, and merging the trees of layers in their order.
//!
//! Markers stay ordinary entries in the tree of one layer. They are consumed when the
//! tree is applied to what lies below, so the order of entries inside a layer does not
//! matter: whiteouts act on lower layers only.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use crate::tree::{Content, Inode, InodeId, Tree};
use crate::{Error, Result};

/// Prefix of OCI whiteouts.
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// OCI marker of an opaque directory.
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// overlayfs marks of an opaque directory, of a privileged and an unprivileged mount.
const OPAQUE_XATTRS: [&[u8]; 2] = [b"trusted.overlay.opaque", b"user.overlay.opaque"];

/// How a layer says that something below is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WhiteoutSpec {
    /// `.wh.NAME` and `.wh..wh..opq`.
    Oci,
    /// Character device 0:0, and xattr `trusted.overlay.opaque` or `user.overlay.opaque` = `y`.
    Overlayfs,
    /// Nothing is a marker; everything is kept.
    None,
}

impl WhiteoutSpec {
    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Oci => "oci",
            Self::Overlayfs => "overlayfs",
            Self::None => "none",
        }
    }
}

impl fmt::Display for WhiteoutSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WhiteoutSpec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Self::Oci, Self::Overlayfs, Self::None]
            .into_iter()
            .find(|w| w.name() == s)
            .ok_or_else(|| Error::invalid(format!("whiteout spec {s:?}: want oci, overlayfs or none")))
    }
}

/// What an entry of a layer does to the layers below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marker<'a> {
    /// Removes the lower entry of this name.
    Whiteout(&'a [u8]),
    /// Hides everything below its directory.
    Opaque,
}

impl WhiteoutSpec {
    fn marker<'a>(self, name: &'a [u8], content: &Content) -> Option<Marker<'a>> {
        match self {
            Self::Oci if name == OPAQUE_MARKER => Some(Marker::Opaque),
            Self::Oci => {
                // An empty rest names nothing: such a file is an ordinary entry.
                name.strip_prefix(WHITEOUT_PREFIX).filter(|rest| !rest.is_empty()).map(Marker::Whiteout)
            }
            Self::Overlayfs => matches!(content, Content::CharDevice { major: 0, minor: 0 })
                .then_some(Marker::Whiteout(name)),
            Self::None => None,
        }
    }

    /// True for an entry that only says what it removes from the layers below.
    pub(crate) fn is_marker(self, name: &[u8], content: &Content) -> bool {
        self.marker(name, content).is_some()
    }

    fn opaque_xattr(self, dir: &Inode) -> Option<&'static [u8]> {
        (self == Self::Overlayfs)
            .then(|| OPAQUE_XATTRS.into_iter().find(|name| dir.metadata.xattrs.get(name) == Some(b"y")))
            .flatten()
    }
}

/// Removes all whiteout entries of `tree`, which has no lower layer. Opaque xattrs stay, as
/// the reference builder leaves them.
pub fn drop_whiteouts(tree: &mut Tree, spec: WhiteoutSpec) {
    if spec == WhiteoutSpec::None {
        return;
    }
    let mut stack = vec![tree.root()];
    while let Some(dir) = stack.pop() {
        let Some(children) = tree.inode(dir).children() else { continue };
        let mut doomed = Vec::new();
        for (name, &id) in children {
            let inode = tree.inode(id);
            if spec.is_marker(name, &inode.content) {
                doomed.push(name.clone());
            } else if inode.is_dir() {
                stack.push(id);
            }
        }
        if let Some(children) = tree.children_mut(dir) {
            for name in doomed {
                children.remove(&name);
            }
        }
    }
}

/// Applies `upper` on top of `lower` (rafs-v6 section 11.1) and consumes it.
///
/// The root's attributes come from `upper` unless that only implies its root. An upper file is
/// another inode than any lower one, unless the upper layer itself names a lower file by a hard
/// link: then the new name joins those that are left of that file. Such links see `lower` as it
/// was before the whiteouts of `upper`.
///
/// # Errors
/// `Limit`: too many inodes. Those of [`Tree::resolve_links`].
pub fn apply(lower: &mut Tree, mut upper: Tree, spec: WhiteoutSpec) -> Result<()> {
    upper.resolve_links(lower)?;
    let (upper, below) = upper.into_parts();
    Merger { lower, upper, spec, moved: below.found }.run()
}

struct Merger<'a> {
    lower: &'a mut Tree,
    upper: Vec<Inode>,
    spec: WhiteoutSpec,
    /// Upper regular files that have their place below already: hard links stay links. At the
    /// start, copies of files that are there.
    moved: HashMap<InodeId, InodeId>,
}

impl Merger<'_> {
    fn run(mut self) -> Result<()> {
        let mut stack = vec![(InodeId(0), self.lower.root())];
        while let Some((from, to)) = stack.pop() {
            self.directory(from, to, &mut stack)?;
        }
        Ok(())
    }

    /// Merges the upper directory `from` into `to`; what lies deeper goes on the stack.
    fn directory(&mut self, from: InodeId, to: InodeId, stack: &mut Vec<(InodeId, InodeId)>) -> Result<()> {
        let Content::Directory(entries) =
            std::mem::replace(&mut self.upper[from.0 as usize].content, Content::Fifo)
        else {
            return Ok(());
        };
        let opaque = self.take_attributes(from, to);
        // First pass: only lower entries are affected, so it comes before anything is added.
        if let Some(children) = self.lower.children_mut(to) {
            if opaque {
                children.clear();
            }
            for (name, id) in &entries {
                match self.spec.marker(name, &self.upper[id.0 as usize].content) {
                    Some(Marker::Opaque) => children.clear(),
                    Some(Marker::Whiteout(name)) => {
                        children.remove(name);
                    }
                    None => {}
                }
            }
        }
        for (name, id) in entries {
            let inode = &self.upper[id.0 as usize];
            if self.spec.is_marker(&name, &inode.content) {
                continue;
            }
            let below = self.lower.inode(to).children().and_then(|c| c.get(&name)).copied();
            let target = if inode.is_dir() {
                match below.filter(|&b| self.lower.inode(b).is_dir()) {
                    Some(b) => b,
                    None => self.lower.add(Inode {
                        metadata: inode.metadata.clone(),
                        content: Content::Directory(Default::default()),
                        implied: inode.implied,
                    })?,
                }
            } else {
                self.moved_inode(id)?
            };
            if self.lower.inode(target).is_dir() {
                stack.push((id, target));
            }
            if below != Some(target) {
                self.lower.set_child(to, &name, target);
            }
        }
        Ok(())
    }

    /// Gives `to` the attributes of `from` and tells whether `from` is opaque by xattr.
    fn take_attributes(&mut self, from: InodeId, to: InodeId) -> bool {
        let upper = &self.upper[from.0 as usize];
        if upper.implied {
            return false;
        }
        let mark = self.spec.opaque_xattr(upper);
        let mut metadata = upper.metadata.clone();
        if mark.is_some() {
            for name in OPAQUE_XATTRS {
                metadata.xattrs = metadata.xattrs.without(name);
            }
        }
        let target = self.lower.inode_mut(to);
        target.metadata = metadata;
        target.implied = false;
        mark.is_some()
    }

    fn moved_inode(&mut self, id: InodeId) -> Result<InodeId> {
        if let Some(&done) = self.moved.get(&id) {
            return Ok(done);
        }
        let inode = self.upper[id.0 as usize].clone();
        let regular = inode.is_regular();
        let to = self.lower.add(inode)?;
        if regular {
            self.moved.insert(id, to);
        }
        Ok(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Children, FileId, LayerIndex, Metadata, Xattr, Xattrs};

    fn tree(paths: &[&str]) -> Tree {
        let mut tree = Tree::new();
        for (n, path) in paths.iter().enumerate() {
            put(&mut tree, path, n as u32);
        }
        tree
    }

    fn meta(mode: u32) -> Metadata {
        Metadata { mode, ..Metadata::implied_directory() }
    }

    fn put(tree: &mut Tree, path: &str, n: u32) {
        let content = match path.strip_suffix('/') {
            Some(_) => Content::Directory(Children::new()),
            None => Content::Regular { file: FileId { layer: LayerIndex(0), index: n }, size: 1 },
        };
        tree.insert(path.as_bytes(), Inode::new(meta(0o700), content)).unwrap();
    }

    fn list(tree: &Tree) -> Vec<String> {
        let mut out = Vec::new();
        tree.walk(|path, id| {
            let slash = if tree.inode(id).is_dir() { "/" } else { "" };
            out.push(format!("{}{slash}", String::from_utf8_lossy(path)));
            Ok(())
        })
        .unwrap();
        out.remove(0);
        out
    }

    #[test]
    fn oci_whiteouts_act_on_lower_layers_only() {
        let mut lower = tree(&["d/", "d/a", "d/b", "e/x", "e/y/z", "f", "g"]);
        let upper =
            tree(&["d/.wh.a", "d/a2", "e/.wh..wh..opq", "e/new", "f/", "f/in", "g", ".wh.g", ".wh.none"]);
        apply(&mut lower, upper, WhiteoutSpec::Oci).unwrap();
        assert_eq!(list(&lower), ["d/", "d/a2", "d/b", "e/", "e/new", "f/", "f/in", "g"]);
    }

    #[test]
    fn implied_directories_keep_lower_attributes() {
        let mut lower = tree(&["d/", "d/a"]);
        lower.insert(b"", Inode::new(meta(0o711), Content::Directory(Children::new()))).unwrap();
        apply(&mut lower, tree(&["d/b"]), WhiteoutSpec::Oci).unwrap();
        assert_eq!(lower.inode(lower.root()).metadata.mode, 0o711);
        assert_eq!(lower.inode(lower.lookup(b"d").unwrap()).metadata.mode, 0o700);
        assert_eq!(list(&lower), ["d/", "d/a", "d/b"]);
    }

    #[test]
    fn hard_links_stay_within_their_layer() {
        let mut lower = tree(&["a"]);
        lower.link(b"b", lower.lookup(b"a").unwrap()).unwrap();
        let mut upper = tree(&["c"]);
        upper.link(b"a", upper.lookup(b"c").unwrap()).unwrap();
        apply(&mut lower, upper, WhiteoutSpec::Oci).unwrap();
        assert_eq!(lower.lookup(b"a"), lower.lookup(b"c"));
        assert_ne!(lower.lookup(b"a"), lower.lookup(b"b"));
    }

    #[test]
    fn overlayfs_markers() {
        let mut lower = tree(&["d/a", "e/x", "f"]);
        let mut upper = tree(&["e/new"]);
        let gone = Inode::new(meta(0), Content::CharDevice { major: 0, minor: 0 });
        upper.insert(b"d/a", gone.clone()).unwrap();
        upper.insert(b"f", gone).unwrap();
        let mut opaque = meta(0o755);
        opaque.xattrs = Xattrs::new(vec![
            Xattr { name: (*b"trusted.overlay.opaque").into(), value: (*b"y").into() },
            Xattr { name: (*b"user.keep").into(), value: (*b"1").into() },
        ])
        .unwrap();
        upper.insert(b"e", Inode::new(opaque, Content::Directory(Children::new()))).unwrap();
        let mut alone = upper.clone();
        apply(&mut lower, upper, WhiteoutSpec::Overlayfs).unwrap();
        assert_eq!(list(&lower), ["d/", "e/", "e/new"]);
        let e = lower.inode(lower.lookup(b"e").unwrap());
        assert_eq!(e.metadata.xattrs.iter().count(), 1);

        drop_whiteouts(&mut alone, WhiteoutSpec::Overlayfs);
        assert_eq!(list(&alone), ["d/", "e/", "e/new"]);
    }

    #[test]
    fn an_upper_type_wins() {
        let mut lower = tree(&["a/b", "c"]);
        let mut upper = tree(&["c/d"]);
        upper.insert(b"a", Inode::new(meta(0o777), Content::Symlink((*b"t").into()))).unwrap();
        apply(&mut lower, upper, WhiteoutSpec::Oci).unwrap();
        assert_eq!(list(&lower), ["a", "c/", "c/d"]);
    }
}
