//! Paths inside the image's tree, symbolic links followed as a process in it would.

use super::files::{Files, Inode, Kind};

/// Symbolic links followed in one path, as in the kernel.
const MAX_LINKS: usize = 40;
/// Bytes of a path that take about as long as a component.
const LONG: usize = 256;
/// Longest path, as in the kernel.
pub(super) const MAX_PATH: usize = 4096;

/// Where a path leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub inode: Inode,
    /// Absolute, without links in it.
    pub path: Vec<u8>,
}

/// Follows the absolute path `path`; `None` if it leads nowhere, or when `may_spend` refuses the steps it takes: one
/// a component, and more for long ones.
pub(super) fn resolve(files: &dyn Files, path: &[u8], may_spend: impl Fn(usize) -> bool) -> Option<Place> {
    if path.len() > MAX_PATH {
        return None;
    }
    // Components still to go, the next one last.
    let mut rest: Vec<Vec<u8>> = components(path);
    if !may_spend(rest.len() + path.len() / LONG) {
        return None;
    }
    let mut at: Vec<(Inode, Vec<u8>)> = Vec::new();
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == b".." {
            at.pop();
            continue;
        }
        let dir = at.last().map_or(files.root(), |(inode, _)| *inode);
        let inode = files.lookup(dir, &name)?;
        if let Kind::Symlink(target) = files.kind(inode) {
            links += 1;
            if links > MAX_LINKS {
                return None;
            }
            if target.starts_with(b"/") {
                at.clear();
            }
            let target = components(&target);
            if rest.len() + target.len() > MAX_PATH || !may_spend(target.len()) {
                return None;
            }
            rest.extend(target);
        } else {
            at.push((inode, name));
        }
    }
    let inode = at.last().map_or(files.root(), |(inode, _)| *inode);
    let path = at.iter().flat_map(|(_, name)| [b"/", name.as_slice()].concat()).collect();
    Some(Place { inode, path })
}

/// Components of a path, the first one last.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}

/// `dir` and `name` with one slash; an absolute name stands for itself.
pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if name.starts_with(b"/") {
        return name.to_vec();
    }
    [dir.strip_suffix(b"/").unwrap_or(dir), b"/", name].concat()
}

/// The directory that a path lies in.
pub(super) fn parent(path: &[u8]) -> Vec<u8> {
    let end = path.iter().rposition(|&b| b == b'/').unwrap_or(0);
    if end == 0 { b"/".to_vec() } else { path[..end].to_vec() }
}

/// The last component of a path.
pub(super) fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or_default()
}
