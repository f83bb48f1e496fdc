//! Following a start of which nothing is known: no trace, and no hints in the image.
//!
//! ```text
//! READ from offset 0 ──▶ Watch ──▶ paths ──▶ hints::Follower ──▶ what comes next, fetched ahead
//!                                               ▲    │
//!                          once they are there, └────┴── files to be looked into first
//! ```
//!
//! - What a program was linked with, and the modules that a script names, is asked for at once instead of one
//!   after the other, as the program does. What hints are worth is told in [`rafs::hints`].
//! - Files that have to be looked into are data of the image like any other: verified, and kept in the cache.
//! - It ends a minute after the first read, after so many files, when a trace turns up, and with the mount.

mod look;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use rafs::bootstrap::Nid;
use storage::engine::Handle;
use storage::prefetch::{Class, PrefetchOptions};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::mount::Mount;
use crate::preheat::order;
use look::{Looker, Seen};

/// After the first read.
const LONGEST: Duration = Duration::from_secs(60);

/// How long little is guessed after something was found: the next file is opened, or looked into, sooner.
const CONFIDENT: Duration = Duration::from_millis(500);

/// Files that were opened and not looked at yet. Those beyond are passed over: whoever opens that many at a
/// time reads everything.
const MAX_WAITING: usize = 256;

/// Sees which files a start opens.
#[derive(Debug, Default)]
pub struct Watch {
    /// Cleared when there is nothing to follow any more.
    on: Arc<AtomicBool>,
    opened: OnceLock<mpsc::Sender<Nid>>,
}

impl Watch {
    /// Notes a read of file `nid`.
    pub fn read(&self, nid: Nid, offset: u64) {
        if offset == 0
            && self.on.load(Relaxed)
            && let Some(opened) = self.opened.get()
        {
            let _ = opened.try_send(nid);
        }
    }

    /// Ends it: what a start reads is known better.
    pub fn stop(&self) {
        self.on.store(false, Relaxed);
    }
}

/// Follows the next start of the image of `mount`.
pub fn start(engine: &Handle, mount: &Arc<Mount>) {
    let (sender, opened) = mpsc::channel(MAX_WAITING);
    let watch = mount.watch();
    if watch.opened.set(sender).is_ok() {
        watch.on.store(true, Relaxed);
        let end = End(Arc::clone(&watch.on));
        engine.spawn(follow(end, engine.clone(), Arc::downgrade(mount), opened));
    }
}

/// Clears the flag of a watch, however following ends.
struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

async fn follow(on: End, engine: Handle, mount: Weak<Mount>, mut opened: mpsc::Receiver<Nid>) {
    let Some(first) = opened.recv().await else { return };
    let end = Instant::now() + LONGEST;
    let mut looker = Looker::default();
    let mut new = vec![first];
    // Orders of chunks without which nothing more can be told.
    let mut coming = JoinSet::new();
    let mut arrived = false;
    while on.0.load(Relaxed) {
        new.extend(std::iter::from_fn(|| opened.try_recv().ok()));
        new.retain(|nid| looker.is_new(*nid));
        if new.is_empty() && !std::mem::take(&mut arrived) {
            let event = async {
                tokio::select! {
                    Some(_) = coming.join_next() => Some(None),
                    nid = opened.recv() => nid.map(Some),
                }
            };
            match timeout_at(end, event).await {
                Ok(Some(Some(nid))) => new.push(nid),
                Ok(Some(None)) => arrived = true,
                Ok(None) | Err(_) => break,
            }
            continue;
        }
        let Some((rafs, blobs)) = mount.upgrade().and_then(|mount| mount.image()) else { return };
        let opened = std::mem::take(&mut new);
        let look = move || {
            let seen = looker.look(&rafs, &blobs, opened);
            (looker, seen)
        };
        // A failure is the end of the engine.
        let Ok((again, seen)) = engine.blocking(look).await else { return };
        looker = again;
        let (Some(Seen { files, missing, large }), Some(mount)) = (seen, mount.upgrade()) else { break };
        if !(files.is_empty() && missing.is_empty()) {
            mount.image().inspect(|(_, blobs)| blobs.guide(CONFIDENT));
        }
        for chunks in [missing, large].into_iter().filter(|chunks| !chunks.is_empty()) {
            // What is looked into next goes before what is only wanted.
            let options = PrefetchOptions { until_stored: true, ..PrefetchOptions::of(Class::Trace) };
            if let Some(order) = mount.prefetch(Box::new(chunks.into_iter()), options) {
                coming.spawn(async move { order.wait().await });
            }
        }
        if !files.is_empty() {
            mount.prefetch(order::nodes(mount.rafs_shared(), files), PrefetchOptions::of(Class::Predicted));
        }
    }
    tracing::debug!("followed the start to {} files", looker.count());
}
