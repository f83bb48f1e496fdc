//! Names: what a directory has under one, across the borders of mounts.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rafs::bootstrap::{FileType, Nid};

use super::{Adapter, directory, os_error, refuse};
use crate::mount::Mount;
use crate::node::NodeId;
use crate::vfs::{FIRST_DIRECTORY, Node};

/// Cursors of `.` and `..`; those of an image's entries follow, then those of directories of ours.
const AFTER_DOT: u64 = 1;
const AFTER_DOT_DOT: u64 = 2;

impl Adapter {
    /// The answer to a lookup of `node`.
    pub(super) fn entry(&self, node: &Node) -> io::Result<Entry> {
        match node {
            Node::Image { mount, nid, .. } => super::entry(mount, *nid),
            Node::Own(number) => directory::entry(&self.table, *number),
        }
    }

    /// Counts that the kernel has been given an answer to a lookup.
    pub(super) fn given(&self, node: &Node, entry: &Entry) {
        // FUSE's root is no mount's, and directories of ours are not counted.
        if let (Node::Image { mount, .. }, false) = (node, entry.inode == NodeId::ROOT.0) {
            mount.place().lookups.take(1);
        }
    }

    /// What `name` is in `parent`; `None` if there is no such name.
    pub(super) fn find(&self, parent: &Node, name: &[u8]) -> io::Result<Option<Node>> {
        let own = match parent {
            Node::Own(number) => Some(*number),
            Node::Image { own, .. } => *own,
        };
        match (name, parent) {
            // Asked by file handles of exported mounts, `.` also of what is no directory.
            (b".", _) => return Ok(Some(parent.clone())),
            (b"..", _) => return self.parent(parent).map(Some),
            _ => {}
        }
        if let Some(child) = own.and_then(|number| self.table.child(number, name)) {
            return Ok(Some(child.node));
        }
        match parent {
            Node::Own(_) => Ok(None),
            Node::Image { mount, nid, .. } => {
                let found = mount.rafs().bootstrap().lookup(*nid, name).map_err(refuse)?;
                Ok(found.map(|child| Node::Image { mount: Arc::clone(mount), nid: child.nid, own: None }))
            }
        }
    }

    /// What a directory is in, across the borders of mounts; FUSE's root is in itself.
    pub(super) fn parent(&self, dir: &Node) -> io::Result<Node> {
        let of = |number: u64| self.table.parent(number).ok_or_else(|| os_error(libc::ESTALE));
        match dir {
            Node::Own(number) | Node::Image { own: Some(number), .. } => of(*number),
            Node::Image { mount, nid, own: None } => {
                let nid = mount.rafs().bootstrap().parent(*nid).map_err(refuse)?;
                Ok(Node::Image { mount: Arc::clone(mount), nid, own: None })
            }
        }
    }

    /// Visits a directory from cursor `offset`: `.`, `..`, what the image has, then what leads to mounts
    /// below. The visitor answers false when it has no room. It is given the node of real entries.
    pub(super) fn list(
        &self,
        dir: &Node,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>, Option<&Node>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let type_ = u32::from(libc::DT_DIR);
        if offset < AFTER_DOT {
            let dot = DirEntry { ino: ino(dir), offset: AFTER_DOT, type_, name: b"." };
            if !visit(dot, None)? {
                return Ok(());
            }
        }
        if offset < AFTER_DOT_DOT {
            let parent = ino(&self.parent(dir)?);
            let dot_dot = DirEntry { ino: parent, offset: AFTER_DOT_DOT, type_, name: b".." };
            if !visit(dot_dot, None)? {
                return Ok(());
            }
        }
        let own = match dir {
            Node::Own(number) => Some(*number),
            Node::Image { own, .. } => *own,
        };
        let children = own.map(|number| self.table.children(number, 0)).unwrap_or_default();
        if let Node::Image { mount, nid, .. } = dir
            && offset < FIRST_DIRECTORY
        {
            let names: BTreeSet<&[u8]> = children.iter().map(|child| child.name.as_bytes()).collect();
            let covers = |name: &[u8]| names.contains(name);
            if !list_image(mount, *nid, offset, &covers, visit)? {
                return Ok(());
            }
        }
        for child in children.iter().filter(|child| child.number > offset) {
            let name = child.name.as_bytes();
            let entry = DirEntry { ino: ino(&child.node), offset: child.number, type_, name };
            if !visit(entry, Some(&child.node))? {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn dirent_type(file_type: FileType) -> u32 {
    u32::from(match file_type {
        FileType::Regular => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::CharDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
    })
}

/// The inode number that users see.
fn ino(node: &Node) -> u64 {
    match node {
        Node::Own(number) => *number,
        Node::Image { mount, nid, .. } => mount.ino(*nid),
    }
}

/// Visits the entries of an image's directory but those that something covers; false if the visitor has
/// no room for more.
fn list_image(
    mount: &Arc<Mount>,
    dir: Nid,
    offset: u64,
    covers: &dyn Fn(&[u8]) -> bool,
    visit: &mut dyn FnMut(DirEntry<'_>, Option<&Node>) -> io::Result<bool>,
) -> io::Result<bool> {
    let mut end = Ok(true);
    mount
        .rafs()
        .bootstrap()
        .children(dir, offset.saturating_sub(AFTER_DOT_DOT), &mut |child| {
            if covers(child.name) {
                return ControlFlow::Continue(());
            }
            let entry = DirEntry {
                ino: mount.ino(child.nid),
                offset: child.next.saturating_add(AFTER_DOT_DOT),
                type_: dirent_type(child.file_type),
                name: child.name,
            };
            let node = Node::Image { mount: Arc::clone(mount), nid: child.nid, own: None };
            match visit(entry, Some(&node)) {
                Ok(true) => ControlFlow::Continue(()),
                other => {
                    end = other;
                    ControlFlow::Break(())
                }
            }
        })
        .map_err(refuse)?;
    end
}
