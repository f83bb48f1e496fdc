//! A walk over a validated tree, in byte order of names, without recursion.

use std::ops::ControlFlow;

use super::{Bootstrap, DirEntry, FileType, Nid};
use crate::format::limits::MAX_DEPTH;
use crate::{Error, Result};

/// What a [`Walk`] meets.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// A directory, before its entries. The root has an empty name.
    Enter(DirEntry<'a>),
    /// An entry that is not a directory.
    Leaf(DirEntry<'a>),
    /// A directory, after its entries.
    Leave(Nid),
}

/// Depth-first walk from a directory. Memory: one small frame per level.
pub struct Walk<'a> {
    bootstrap: &'a dyn Bootstrap,
    start: Option<Nid>,
    stack: Vec<(Nid, u64)>,
    path: Vec<u8>,
    /// Length of `path` before the last leaf's name was put there.
    leaf_at: Option<usize>,
}

impl<'a> Walk<'a> {
    /// A walk over `dir` and everything below.
    pub fn new(bootstrap: &'a dyn Bootstrap, dir: Nid) -> Self {
        Self { bootstrap, start: Some(dir), stack: Vec::new(), path: Vec::new(), leaf_at: None }
    }

    /// Path of the entry answered last, relative to the start: components joined by `/`
    /// without a leading one. After `Leave` it is that directory's.
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    /// The next step, `None` at the end.
    ///
    /// # Errors
    /// Those of the bootstrap. `Corrupt`: nested deeper than [`MAX_DEPTH`].
    pub fn step(&mut self) -> Result<Option<Step<'a>>> {
        if let Some(len) = self.leaf_at.take() {
            self.path.truncate(len);
        }
        if let Some(nid) = self.start.take() {
            self.stack.push((nid, 0));
            return Ok(Some(Step::Enter(DirEntry {
                name: b"",
                nid,
                file_type: FileType::Directory,
                next: 0,
            })));
        }
        let Some((dir, cursor)) = self.stack.last_mut() else { return Ok(None) };
        let mut found = None;
        self.bootstrap.children(*dir, *cursor, &mut |entry| {
            found = Some(entry);
            ControlFlow::Break(())
        })?;
        let Some(entry) = found else {
            let dir = *dir;
            self.stack.pop();
            // The name of this directory goes with the next step.
            let parent = self.path.iter().rposition(|&b| b == b'/').unwrap_or(0);
            self.leaf_at = Some(parent);
            return Ok(Some(Step::Leave(dir)));
        };
        *cursor = entry.next;
        let len = self.path.len();
        if len != 0 {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(entry.name);
        if entry.file_type != FileType::Directory {
            self.leaf_at = Some(len);
            return Ok(Some(Step::Leaf(entry)));
        }
        if self.stack.len() >= MAX_DEPTH {
            return Err(Error::corrupt("directories are nested too deeply"));
        }
        self.stack.push((entry.nid, 0));
        Ok(Some(Step::Enter(entry)))
    }
}
