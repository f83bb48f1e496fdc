//! Prefetch patterns: which inodes the prefetch table names, and which data comes first.

use std::collections::HashSet;
use std::io::BufRead;

use crate::layout;
use crate::tree::{InodeId, Tree, components, shown};
use crate::{Error, Result};

/// Longest pattern line read: PATH_MAX.
const MAX_LINE: u64 = 4096;

/// Absolute paths given to the builder, each without leading slash, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns(Vec<Vec<u8>>);

impl Patterns {
    /// Reads one absolute path a line, to the end of `input`. Relative lines are skipped with a
    /// warning; a path at or below an earlier one is dropped. No line means no pattern.
    ///
    /// # Errors
    /// `Io`: reading failed. `Corrupt`: a line over 4096 bytes.
    pub fn read(mut input: impl BufRead) -> Result<Self> {
        use std::io::Read as _;
        let mut patterns: Vec<Vec<u8>> = Vec::new();
        let mut line = Vec::new();
        loop {
            line.clear();
            let got = (&mut input)
                .take(MAX_LINE + 1)
                .read_until(b'\n', &mut line)
                .map_err(|e| Error::io("read prefetch patterns", e))?;
            if got == 0 {
                return Ok(Self(patterns));
            }
            if got as u64 > MAX_LINE {
                return Err(Error::bad_source(format!("a prefetch pattern of more than {MAX_LINE} bytes")));
            }
            let text = line.trim_ascii();
            if text.is_empty() {
                continue;
            }
            if text[0] != b'/' {
                tracing::warn!(pattern = %shown(text), "prefetch pattern is not an absolute path, skipped");
                continue;
            }
            let Ok(parts) = components(text) else {
                tracing::warn!(pattern = %shown(text), "prefetch pattern is not a plain path, skipped");
                continue;
            };
            let pattern = parts.join(&b'/');
            if !patterns.iter().any(|earlier| covers(earlier, &pattern)) {
                patterns.push(pattern);
            }
        }
    }

    /// The pattern `/` alone: everything.
    pub fn everything() -> Self {
        Self(vec![Vec::new()])
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The inodes they name in `tree`; paths that do not exist are dropped silently.
    pub fn resolve(&self, tree: &Tree) -> Vec<InodeId> {
        let mut seen = HashSet::new();
        self.0.iter().filter_map(|path| tree.lookup(path)).filter(|id| seen.insert(*id)).collect()
    }
}

/// True if `path` is `dir` or below it.
fn covers(dir: &[u8], path: &[u8]) -> bool {
    match path.strip_prefix(dir) {
        Some(rest) => dir.is_empty() || rest.is_empty() || rest[0] == b'/',
        None => false,
    }
}

/// The regular files of `tree`, each once: what `first` names and what lies below it, in that
/// order, then all others in the order of inode numbers. This is the order of data in a blob
/// made from a directory.
pub fn file_order(tree: &Tree, first: &[InodeId]) -> Vec<InodeId> {
    let all: Vec<_> = first.iter().copied().chain([tree.root()]).collect();
    below(tree, &all)
}

/// The regular files among `starts` and below, each once, in that order.
pub fn below(tree: &Tree, starts: &[InodeId]) -> Vec<InodeId> {
    let mut order = Vec::new();
    let mut seen = vec![false; tree.inode_count()];
    let mut add = |start: InodeId| {
        // The visitor never fails, so neither does the walk.
        let _ = layout::in_number_order_from(tree, start, |id| {
            if tree.inode(id).is_regular() && !std::mem::replace(&mut seen[id.0 as usize], true) {
                order.push(id);
            }
            Ok(())
        });
    };
    for &id in starts {
        add(id);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Content, FileId, Inode, LayerIndex, Metadata};

    #[test]
    fn patterns_are_trimmed_ordered_and_folded() {
        let text = b"  /b/c \n\nrelative\n/b\n/b/d\n/a/../x\n//a//\r\n/bc";
        let patterns = Patterns::read(&text[..]).unwrap();
        assert_eq!(patterns.0, [&b"b/c"[..], b"b", b"a", b"bc"]);
        assert_eq!(Patterns::read(&b"/\n/a\n"[..]).unwrap(), Patterns::everything());
        assert_eq!(Patterns::read(&b""[..]).unwrap(), Patterns::default());
        assert!(Patterns::read(&vec![b'a'; 5000][..]).is_err());
    }

    #[test]
    fn prefetch_files_come_first() {
        let mut tree = Tree::new();
        let mut ids = Vec::new();
        for (n, path) in ["a/1", "a/2", "b/3", "c"].into_iter().enumerate() {
            let file = FileId { layer: LayerIndex(0), index: n as u32 };
            let inode = Inode::new(Metadata::implied_directory(), Content::Regular { file, size: 1 });
            ids.push(tree.insert(path.as_bytes(), inode).unwrap());
        }
        let first = Patterns::read(&b"/b\n/none\n/a/2\n"[..]).unwrap().resolve(&tree);
        assert_eq!(first.len(), 2);
        assert_eq!(file_order(&tree, &first), [ids[2], ids[1], ids[3], ids[0]]);
    }
}
