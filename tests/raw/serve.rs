//! Requests and their answers.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tests::{Context, Result};

use crate::Data;
use crate::sys;
use crate::tree::{FOR_EVER, Node, Tree};
use crate::wire::{
    self, AttrOut, ByteValued as _, InHeader, InitIn, InitIn2, InitOut, Kstatfs, OpenOut, OutHeader, ReadIn,
    StatfsOut,
};

/// Bytes of the largest read.
const MAX_TRANSFER: u32 = 1 << 20;
/// A request or an answer with its head.
const BUFFER_SIZE: usize = MAX_TRANSFER as usize + 4096;

/// Bytes of a pipe: what everybody may have.
const PIPE_SIZE: i32 = 1 << 20;
/// Bytes of the largest read that fits a pipe, with a page for its head and one for where it does not begin on one.
const SPLICED: usize = PIPE_SIZE as usize - 2 * 4096;

pub struct Server {
    pub tree: Tree,
    pub data: Data,
}

/// One serving thread.
pub struct Worker {
    server: Arc<Server>,
    device: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
}

impl Worker {
    pub fn new(server: Arc<Server>, device: OwnedFd) -> Result<Self> {
        let pipe = nix::unistd::pipe()?;
        fcntl(&pipe.1, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE)).context("grow a pipe")?;
        Ok(Self { server, device, pipe })
    }

    /// Serves until the mount is gone.
    pub fn run(&mut self) -> Result<()> {
        let mut request = vec![0; BUFFER_SIZE];
        let mut data = vec![0; BUFFER_SIZE];
        loop {
            match nix::unistd::read(&self.device, &mut request) {
                Ok(len) => self.answer(&request[..len], &mut data)?,
                Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => {}
                Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
                Err(e) => return Err(e).context("read from /dev/fuse"),
            }
        }
    }

    fn answer(&self, request: &[u8], data: &mut [u8]) -> Result<()> {
        let (header, body) = wire::split::<InHeader>(request).context("a short request")?;
        if matches!(header.opcode, wire::FORGET | wire::BATCH_FORGET | wire::INTERRUPT) {
            return Ok(());
        }
        if header.opcode == wire::READ
            && let Some(node) = self.server.tree.node(header.nodeid)
        {
            return self.read(&header, body, node, data);
        }
        match self.other(&header, body) {
            Ok(body) => self.reply(header.unique, 0, &body),
            Err(errno) => self.reply(header.unique, -(errno as i32), &[]),
        }
    }

    fn reply(&self, unique: u64, error: i32, body: &[u8]) -> Result<()> {
        let out = OutHeader { len: 16 + body.len() as u32, error, unique };
        match nix::sys::uio::writev(&self.device, &[IoSlice::new(out.as_slice()), IoSlice::new(body)]) {
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e).context("answer"),
        }
    }

    fn other(&self, header: &InHeader, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let tree = &self.server.tree;
        let node = || tree.node(header.nodeid).ok_or(Errno::ESTALE);
        let name = || body.split(|byte| *byte == 0).next().unwrap_or_default();
        match header.opcode {
            wire::INIT => Ok(self.init(body)?.as_slice().to_owned()),
            wire::LOOKUP => {
                let entry = tree.lookup(header.nodeid, name()).ok_or(Errno::ESTALE)?;
                Ok(entry.as_slice().to_owned())
            }
            wire::GETATTR => {
                let out = AttrOut { attr_valid: FOR_EVER, attr: node()?.attr, ..AttrOut::default() };
                Ok(out.as_slice().to_owned())
            }
            wire::READLINK => node()?.link().map_err(|_| Errno::EIO),
            wire::READDIR | wire::READDIRPLUS => {
                let (read, _) = wire::split::<ReadIn>(body).ok_or(Errno::EINVAL)?;
                let plus = header.opcode == wire::READDIRPLUS;
                let mut out = Vec::new();
                tree.list(header.nodeid, read.offset, read.size as usize, plus, &mut out)
                    .ok_or(Errno::ESTALE)?;
                Ok(out)
            }
            wire::OPEN if self.server.data == Data::Passthrough => {
                let node = node()?;
                let backing_id = match node.backing.get() {
                    Some(id) => *id,
                    None => {
                        let id = sys::register(&self.device, &*tree.file(node).map_err(|_| Errno::EIO)?)?;
                        *node.backing.get_or_init(|| id)
                    }
                };
                let open_flags = wire::NO_FLUSH | wire::OPEN_PASSTHROUGH;
                Ok(OpenOut { fh: 0, open_flags, passthrough: backing_id.cast_unsigned() }
                    .as_slice()
                    .to_owned())
            }
            wire::RELEASE => Ok(Vec::new()),
            wire::STATFS => {
                let out = Kstatfs { bsize: 4096, frsize: 4096, namelen: 255, ..Kstatfs::default() };
                Ok(StatfsOut { st: out }.as_slice().to_owned())
            }
            wire::GETXATTR => Err(Errno::ENODATA),
            // OPEN, OPENDIR and FLUSH, too: from then on the kernel does without.
            _ => Err(Errno::ENOSYS),
        }
    }

    fn init(&self, body: &[u8]) -> Result<InitOut, Errno> {
        let (init, more) = wire::split::<InitIn>(body).ok_or(Errno::EPROTO)?;
        let (more, _) = wire::split::<InitIn2>(more).ok_or(Errno::EPROTO)?;
        let passthrough = if self.server.data == Data::Passthrough { wire::PASSTHROUGH } else { 0 };
        let offered = u64::from(init.flags) | u64::from(more.flags2) << 32;
        let flags = offered & (wire::FLAGS | passthrough);
        if flags & passthrough != passthrough {
            return Err(Errno::EOPNOTSUPP);
        }
        let mut unused = [0; 7];
        unused[wire::MAX_STACK_DEPTH] = u32::from(passthrough != 0);
        Ok(InitOut {
            major: 7,
            minor: 45.min(init.minor),
            max_readahead: init.max_readahead,
            flags: flags as u32,
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_TRANSFER,
            time_gran: 1,
            max_pages: (MAX_TRANSFER / 4096) as u16,
            flags2: (flags >> 32) as u32,
            unused,
            ..InitOut::default()
        })
    }

    fn read(&self, header: &InHeader, body: &[u8], node: &Node, data: &mut [u8]) -> Result<()> {
        let (read, _) = wire::split::<ReadIn>(body).context("a short READ")?;
        let len = u64::from(read.size.min(MAX_TRANSFER)).min(node.attr.size.saturating_sub(read.offset));
        let file = self.server.tree.file(node)?;
        match self.server.data {
            Data::Splice | Data::Move if len as usize <= SPLICED => {
                self.splice(header.unique, &file, read.offset, len as usize)
            }
            _ => {
                file.read_exact_at(&mut data[..len as usize], read.offset)?;
                self.reply(header.unique, 0, &data[..len as usize])
            }
        }
    }

    fn splice(&self, unique: u64, file: &File, offset: u64, len: usize) -> Result<()> {
        let out = OutHeader { len: 16 + len as u32, error: 0, unique };
        nix::unistd::write(&self.pipe.1, out.as_slice())?;
        let mut at = offset.cast_signed();
        let mut rest = len;
        while rest > 0 {
            let done = sys::splice(file, Some(&mut at), &self.pipe.1, rest, 0)?;
            tests::ensure!(done > 0, "the file is shorter than it was");
            rest -= done;
        }
        let flags = if self.server.data == Data::Move { libc::SPLICE_F_MOVE } else { 0 };
        sys::splice(&self.pipe.0, None, &self.device, 16 + len, flags).context("answer")?;
        Ok(())
    }
}
