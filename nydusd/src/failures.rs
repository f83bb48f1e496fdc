//! One error line for each failed read, naming blob, chunk, file and cause.
//!
//! An image keeps no path of an inode, so naming the file means walking the tree. That is
//! done on a thread of its own, with the last answers remembered: neither the reader nor the
//! engine waits for it. There is one for all mounts.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock, Weak};

use rafs::bootstrap::{Bootstrap, Nid, Step, Walk};
use rafs::fs::Rafs;
use storage::read::ReadSlice;

/// Reports that wait for their path. More at once are logged without it: a dead source fails
/// thousands of reads a second, and their paths are of no use to anyone.
const QUEUE: usize = 64;

/// Paths remembered: a failing file is usually read again at once.
const REMEMBERED: usize = 64;

/// One failed read.
#[derive(Debug)]
pub struct Failure {
    /// The image.
    pub rafs: Arc<Rafs>,
    /// Where it is mounted.
    pub mountpoint: String,
    /// The file.
    pub nid: Nid,
    /// First byte asked for.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u32,
    /// The chunks beneath.
    pub slices: Vec<ReadSlice>,
    /// All causes on one line.
    pub cause: String,
}

/// Where failed reads are reported.
#[derive(Debug, Default)]
pub struct Failures {
    /// Made by the first failure.
    queue: OnceLock<SyncSender<Failure>>,
}

impl Failures {
    /// Logs `failure`. Returns at once.
    pub fn report(&self, failure: Failure) {
        let queue = self.queue.get_or_init(|| {
            let (sender, receiver) = sync_channel(QUEUE);
            let thread = std::thread::Builder::new()
                .name("failures".to_owned())
                .stack_size(256 << 10)
                .spawn(move || name_and_log(&receiver));
            if let Err(e) = thread {
                tracing::warn!("failed reads are logged without the file's path: {e}");
            }
            sender
        });
        if let Err(TrySendError::Full(failure) | TrySendError::Disconnected(failure)) =
            queue.try_send(failure)
        {
            log(&failure, None);
        }
    }
}

/// A path that was found, or that there is none.
struct Named {
    /// The image, which may be gone.
    rafs: Weak<Rafs>,
    nid: Nid,
    path: Option<Vec<u8>>,
}

impl Named {
    fn is_of(&self, failure: &Failure) -> bool {
        self.nid == failure.nid && self.rafs.upgrade().is_some_and(|rafs| Arc::ptr_eq(&rafs, &failure.rafs))
    }
}

fn name_and_log(queue: &Receiver<Failure>) {
    let mut remembered: VecDeque<Named> = VecDeque::new();
    while let Ok(failure) = queue.recv() {
        if !remembered.iter().any(|named| named.is_of(&failure)) {
            remembered.truncate(REMEMBERED - 1);
            remembered.push_front(Named {
                rafs: Arc::downgrade(&failure.rafs),
                nid: failure.nid,
                path: path_of(&**failure.rafs.bootstrap(), failure.nid),
            });
        }
        let named = remembered.iter().find(|named| named.is_of(&failure));
        log(&failure, named.and_then(|named| named.path.as_deref()));
    }
}

/// One path of `nid` by walking the tree; a hard link has several.
pub fn path_of(bootstrap: &dyn Bootstrap, nid: Nid) -> Option<Vec<u8>> {
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    while let Some(step) = walk.step().ok()? {
        if let Step::Enter(entry) | Step::Leaf(entry) = step
            && entry.nid == nid
        {
            return Some(walk.path().to_owned());
        }
    }
    None
}

fn log(failure: &Failure, path: Option<&[u8]>) {
    let Failure { mountpoint, rafs, nid, offset, len, slices, cause } = failure;
    let file = match (path, mountpoint.as_str()) {
        (Some(path), "/") => format!("/{}", path.escape_ascii()),
        (Some(path), at) => format!("{at}/{}", path.escape_ascii()),
        (None, "/") => format!("inode {nid}"),
        (None, at) => format!("inode {nid} of {at}"),
    };
    tracing::error!("read of {file}, {len} bytes at {offset}, failed ({}): {cause}", chunks(rafs, slices));
}

/// `blob ID chunk N` or `blob ID chunks N..=M`, for each run of slices of one blob.
fn chunks(rafs: &Rafs, slices: &[ReadSlice]) -> String {
    let mut text = String::new();
    for run in slices.chunk_by(|a, b| a.blob == b.blob) {
        let [first, ..] = run else { continue };
        let blob = rafs.bootstrap().blobs().get(first.blob as usize);
        let id = blob.map_or_else(|| first.blob.to_string(), |blob| blob.id.to_string());
        let numbers = run.iter().map(|slice| slice.extent.index.0);
        let (low, high) = numbers.fold((u32::MAX, 0), |(low, high), n| (low.min(n), high.max(n)));
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = match run.len() {
            1 => write!(text, "{separator}blob {id} chunk {low}"),
            count => write!(text, "{separator}blob {id} {count} chunks {low}..={high}"),
        };
    }
    text
}
