//! Names: what a directory has under one, across the borders of mounts.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rafs::bootstrap::{FileType, Nid};

use super::{Adapter, answers, directory, hosts, os_error, refuse};
use crate::mount::Mount;
use crate::node::NodeId;
use crate::passthrough::{BELIEVED, Held, HostMount};
use crate::vfs::stale::Stale;
use crate::vfs::{FIRST_DIRECTORY, Node};

/// Cursors of `.` and `..`; those of an image's entries follow, then those of directories of ours.
const AFTER_DOT: u64 = 1;
const AFTER_DOT_DOT: u64 = 2;

/// Cursors of directories of ours in a directory of the host, whose own may be any number below 2^63. ext4 makes
/// them of hashes and keeps these from being one; others count.
const OWN_CURSORS: u64 = 0x7fff_ffff << 32;
/// Directories of ours in the life of a daemon that have such a cursor.
const OWN_COUNT: u64 = 1 << 31;

impl Adapter {
    /// The answer to a lookup of `node`.
    pub(super) fn entry(&self, node: &Node) -> io::Result<Entry> {
        match node {
            Node::Image { mount, nid, .. } => answers::entry(mount, *nid),
            Node::Own(number) => directory::entry(&self.table, *number),
            Node::Host { host, held: Some(held), .. } => hosts::host_entry(host, held),
            Node::Host { host, nid, .. } => hosts::root_entry(host, *nid),
        }
    }

    /// The answer to a lookup in directory `parent`, FUSE's root if `is_root`, of what is `node` or of nothing: a kernel
    /// that is not told of mounts and unmounts believes nothing that they change, or not for long.
    pub(super) fn believable(
        &self,
        parent: &Node,
        is_root: bool,
        node: Option<&Node>,
        mut entry: Entry,
    ) -> Entry {
        if self.tells() {
            return entry;
        }
        // What is mounted there, or leads to it.
        if matches!(parent, Node::Own(_)) || node.is_some_and(|node| node.own().is_some()) {
            entry.entry_timeout = Duration::ZERO;
        } else if is_root && !self.table().is_dedicated() {
            entry.entry_timeout = BELIEVED;
        }
        if matches!(node, Some(Node::Own(_))) {
            entry.attr_timeout = Duration::ZERO;
        }
        entry
    }

    /// Counts that the kernel has been given an answer to a lookup.
    pub(super) fn given(&self, node: &Node, entry: &Entry) {
        // FUSE's root is no mount's, and directories of ours are not counted.
        match node {
            _ if entry.inode == NodeId::ROOT.0 => {}
            Node::Image { mount, .. } => mount.place().lookups.take(1),
            Node::Host { host, held: Some(held), .. } => host.give(held),
            Node::Host { host, .. } => host.place().lookups.take(1),
            Node::Own(_) => {}
        }
    }

    /// What `name` is in `parent`; `None` if there is no such name.
    pub(super) fn find(&self, parent: &Node, name: &CStr) -> io::Result<Option<Node>> {
        match (name.to_bytes(), parent) {
            // Asked by file handles of exported mounts, `.` also of what is no directory.
            (b".", Node::Host { host, nid, own, .. }) => {
                let held = Some(Arc::new(host.again(*nid)?));
                return Ok(Some(Node::Host { host: Arc::clone(host), nid: *nid, own: *own, held }));
            }
            (b".", _) => return Ok(Some(parent.clone())),
            (b"..", _) => return self.parent(parent).map(Some),
            _ => {}
        }
        if let Some(child) = parent.own().and_then(|number| self.table.child(number, name.to_bytes())) {
            return Ok(Some(child.node));
        }
        match parent {
            Node::Own(_) => Ok(None),
            Node::Image { mount, nid, .. } => {
                let found = mount.rafs().bootstrap().lookup(*nid, name.to_bytes()).map_err(refuse)?;
                Ok(found.map(|child| Node::Image { mount: Arc::clone(mount), nid: child.nid, own: None }))
            }
            Node::Host { host, nid, .. } => Ok(host.lookup(*nid, name)?.map(|held| below(host, held))),
        }
    }

    /// True for a name that is nobody's, in a directory that there is.
    pub fn is_vacant(&self, stale: &Stale) -> bool {
        let Stale::Entry { parent, name } = stale else { return false };
        // No other name has a NUL in it.
        let Ok(name) = CString::new(name.as_slice()) else { return true };
        self.node(*parent).is_ok_and(|dir| matches!(self.find(&dir, &name), Ok(None)))
    }

    /// What a directory is in, across the borders of mounts; FUSE's root is in itself.
    pub(super) fn parent(&self, dir: &Node) -> io::Result<Node> {
        let of = |number: u64| self.table.parent(number).ok_or_else(|| os_error(libc::ESTALE));
        match dir {
            Node::Own(number)
            | Node::Image { own: Some(number), .. }
            | Node::Host { own: Some(number), .. } => of(*number),
            // A directory may have been moved to where nobody was given anything.
            Node::Host { own: None, .. } => Err(os_error(libc::ESTALE)),
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
        if let Node::Host { host, nid, own, .. } = dir {
            return self.list_host(host, *nid, *own, offset, visit);
        }
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
        let children = dir.own().map(|number| self.table.children(number, 0)).unwrap_or_default();
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

    /// The same of a directory of the host, whose cursors are its own; those of directories of ours come
    /// behind them.
    fn list_host(
        &self,
        host: &Arc<HostMount>,
        nid: Nid,
        own: Option<u64>,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>, Option<&Node>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let children = own.map(|number| self.table.children(number, 0)).unwrap_or_default();
        let own_cursor = |number: u64| OWN_CURSORS + (number - FIRST_DIRECTORY);
        let seen = (OWN_CURSORS..OWN_CURSORS + OWN_COUNT).contains(&offset);
        if !seen {
            let parent = match own {
                Some(number) => self.table.parent(number).map_or(0, |parent| ino(&parent)),
                None => host.parent_ino(nid)?,
            };
            let covered: BTreeSet<&[u8]> = children.iter().map(|child| child.name.as_bytes()).collect();
            let whole = host.list(nid, offset, &covered, &mut |listed| {
                let node = listed.held.map(|held| below(host, held));
                let ino = match (&node, listed.name) {
                    (Some(node), _) => ino(node),
                    (None, b"..") => parent,
                    (None, _) => host.ino(nid),
                };
                let entry = DirEntry { ino, offset: listed.next, type_: listed.kind, name: listed.name };
                visit(entry, node.as_ref())
            })?;
            if !whole {
                return Ok(());
            }
        }
        for child in children.iter().filter(|child| !seen || own_cursor(child.number) > offset) {
            let type_ = u32::from(libc::DT_DIR);
            let (ino, offset) = (ino(&child.node), own_cursor(child.number));
            let entry = DirEntry { ino, offset, type_, name: child.name.as_bytes() };
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
        Node::Host { host, nid, .. } => host.ino(*nid),
    }
}

/// The node of what was found in a directory of the host.
fn below(host: &Arc<HostMount>, held: Held) -> Node {
    Node::Host { host: Arc::clone(host), nid: held.nid(), own: None, held: Some(Arc::new(held)) }
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
