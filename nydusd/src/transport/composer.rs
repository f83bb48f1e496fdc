//! Answers of fuse-backend-rs, composed in memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use zerocopy::FromBytes as _;

use super::message::{OUT_HEADER_LEN, OutHeader};
use crate::adapter::Adapter;

/// Has fuse-backend-rs decode a request in memory, call the adapter and leave its answer in memory, so that neither
/// depends on where they come from and go to. In particular no guest changes a request while it is looked at.
pub(super) struct Composer {
    server: Arc<Server<Arc<Adapter>>>,
    /// Swallows what fuse-backend-rs writes: what was split off a writer it collects in memory first, and that is taken.
    null: File,
}

impl Composer {
    /// Answers for `server`; `null` swallows what is written to it.
    pub fn new(server: Arc<Server<Arc<Adapter>>>, null: File) -> Self {
        Self { server, null }
    }

    /// Answers the whole request in `message` at the beginning of `answer`. The head of what is there; `None` if there
    /// is no answer to it, or none that fits.
    pub fn compose(&self, message: &mut [u8], unique: u64, answer: &mut [u8]) -> Option<OutHeader> {
        answer.get_mut(..OUT_HEADER_LEN)?.fill(0);
        if let Err(e) = self.delegate(message, answer) {
            tracing::debug!("FUSE request: {e}");
        }
        let (header, _) = OutHeader::read_from_prefix(answer).ok()?;
        let range = OUT_HEADER_LEN..=answer.len();
        (header.unique == unique && range.contains(&(header.len as usize))).then_some(header)
    }

    fn delegate(&self, message: &mut [u8], answer: &mut [u8]) -> io::Result<()> {
        let other = |e: &dyn std::fmt::Display| io::Error::other(e.to_string());
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(message)).map_err(|e| other(&e))?;
        let mut whole = FuseDevWriter::<()>::new(self.null.as_raw_fd(), answer).map_err(|e| other(&e))?;
        let writer = whole.split_at(0).map_err(|e| other(&e))?;
        let done = self.server.handle_message(reader, Writer::FuseDev(writer), None, None);
        done.map(drop).map_err(|e| other(&e))
    }
}
