//! Requests that change something: directories of the host take them, images do not.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::Entry;
use rafs::bootstrap::Nid;

use super::{Adapter, os_error};
use crate::node::NodeId;
use crate::passthrough::{BELIEVED, Device, Held, HostMount, OwnDevice};
use crate::vfs::Node;

impl Adapter {
    /// The device numbers of what is served, once they are known.
    pub fn own_device(&self) -> &OwnDevice {
        &self.own_device
    }

    /// Says under which device numbers all of this is seen.
    pub fn serves_as(&self, device: Option<Device>) {
        if let Some(device) = device {
            // A daemon has one mount in its life.
            let _ = self.own_device.set(device);
        }
    }

    /// The file of the host that `node` stands for; all else is read-only.
    pub(super) fn host(&self, node: u64) -> io::Result<(Arc<HostMount>, Nid)> {
        match self.node(NodeId(node))? {
            Node::Host { host, nid, .. } => Ok((host, nid)),
            Node::Own(_) | Node::Image { .. } => Err(os_error(libc::EROFS)),
        }
    }

    /// The same of a directory where `name` is to be changed: not one that leads to a mountpoint.
    pub(super) fn changes(&self, parent: u64, name: &CStr) -> io::Result<(Arc<HostMount>, Nid)> {
        let node = self.node(NodeId(parent))?;
        let own = node.own();
        let Node::Host { host, nid, .. } = node else { return Err(os_error(libc::EROFS)) };
        match own.and_then(|number| self.table.child(number, name.to_bytes())) {
            Some(_) => Err(os_error(libc::EBUSY)),
            None => Ok((host, nid)),
        }
    }

    /// The answer to whoever made a file.
    pub(super) fn made(&self, host: &HostMount, held: &Held) -> io::Result<Entry> {
        let entry = host_entry(host, held)?;
        host.give(held);
        Ok(entry)
    }
}

/// The answer to a lookup of `held`.
pub(super) fn host_entry(host: &HostMount, held: &Held) -> io::Result<Entry> {
    let generation = host.generation(held);
    let entry = attributes(host, held.nid(), host.stat_held(held)?)?;
    Ok(Entry { entry_timeout: held.believed(), generation, ..entry })
}

/// The answer to a lookup of the directory itself.
pub(super) fn root_entry(host: &HostMount, nid: Nid) -> io::Result<Entry> {
    attributes(host, nid, host.stat(nid)?)
}

fn attributes(host: &HostMount, nid: Nid, attr: fuse_backend_rs::abi::fuse_abi::stat64) -> io::Result<Entry> {
    let node = host.node(nid).ok_or_else(|| os_error(libc::EOVERFLOW))?;
    Ok(Entry {
        inode: node.0,
        generation: host.place().generation,
        attr,
        attr_flags: 0,
        attr_timeout: BELIEVED,
        // A mountpoint's name: changed by mounts only.
        entry_timeout: super::FOR_EVER,
    })
}
