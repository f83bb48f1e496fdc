//! The device: which thread answers which request.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use fuse_backend_rs::api::server::Server;

use super::answers::{Answers, Asked, Shared};
use crate::adapter::Adapter;
use crate::cli::VirtiofsFront;
use crate::node::NodeId;
use crate::transport::message;
use crate::transport::vhost::{Device, Request};

/// Rings before those for requests: the one for what must not wait.
const URGENT_QUEUES: usize = 1;

/// A file system of virtual machines.
pub(super) struct FsDevice {
    adapter: Arc<Adapter>,
    in_order: bool,
    /// By ring. Each has one thread; nobody waits for it.
    answers: Vec<Mutex<Answers>>,
    /// To the threads for files of the host.
    aside: Sender<Asked>,
}

impl FsDevice {
    /// A device that serves `adapter`, and its threads; `null` swallows what is written to it.
    ///
    /// # Errors
    /// The system refuses threads or descriptors.
    pub fn new(adapter: &Arc<Adapter>, front: &VirtiofsFront, null: &File) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::new(Server::new(Arc::clone(adapter))));
        let answers = || -> anyhow::Result<Answers> {
            let null = null.try_clone().context("duplicate a descriptor")?;
            Ok(Answers::new(adapter, &shared, null))
        };
        let (aside, waiting) = channel();
        let waiting = Arc::new(Mutex::new(waiting));
        for number in 0..front.threads {
            let (mut answers, waiting) = (answers()?, Arc::clone(&waiting));
            std::thread::Builder::new()
                .name(format!("virtiofs-{number}"))
                .spawn(move || {
                    while let Some(asked) = next(&waiting) {
                        answer(&mut answers, asked);
                    }
                })
                .context("start a thread of the device")?;
        }
        let queues = URGENT_QUEUES + usize::from(front.request_queues);
        Ok(Self {
            adapter: Arc::clone(adapter),
            in_order: front.in_order,
            answers: (0..queues).map(|_| answers().map(Mutex::new)).collect::<anyhow::Result<_>>()?,
            aside,
        })
    }

    fn answers(&self, queue: usize) -> MutexGuard<'_, Answers> {
        self.answers[queue].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if a request goes to the file system of the host.
    fn may_wait(&self, asked: &Asked) -> bool {
        let nodes = message::nodes(&asked.header, asked.body());
        nodes.into_iter().flatten().any(|node| self.adapter.is_host(NodeId(node)))
    }
}

/// The next request, if there will be one.
fn next(waiting: &Mutex<Receiver<Asked>>) -> Option<Asked> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// Answers a request; a panic fails it and no other.
fn answer(answers: &mut Answers, asked: Asked) {
    let (opcode, nodeid) = (asked.header.opcode, asked.header.nodeid);
    if catch_unwind(AssertUnwindSafe(|| answers.answer(asked))).is_err() {
        tracing::error!("FUSE request {opcode} of inode {nodeid:#x} panicked");
    }
}

impl Device for FsDevice {
    fn name(&self) -> &'static str {
        "virtiofs"
    }

    fn queues(&self) -> usize {
        self.answers.len()
    }

    fn in_order(&self) -> bool {
        self.in_order
    }

    fn serve(&self, queue: usize, request: Request) {
        let asked = match Asked::new(request) {
            Ok(asked) => asked,
            Err(e) => {
                tracing::warn!("a FUSE request of the guest is refused: {e}");
                return;
            }
        };
        match self.may_wait(&asked) {
            true => {
                if let Err(lost) = self.aside.send(asked) {
                    lost.0.refuse(libc::EIO);
                }
            }
            false => answer(&mut self.answers(queue), asked),
        }
    }

    fn abandon(&self) {
        let table = self.adapter.table();
        for mount in table.mounts().iter().chain(&table.retired()) {
            mount.abandon_reads();
        }
    }

    fn reset(&self) {
        self.adapter.table().forget_all();
    }
}
