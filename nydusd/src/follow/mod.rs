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
//! - It ends a minute after the first read, when a trace turns up, with the mount, and when what an image may cost is
//!   spent: opened files that nothing led to, looks, names looked up, memory, bytes told of.
//! - A mount that was taken over is not followed: its start was long ago.

mod look;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rafs::bootstrap::Nid;
use storage::engine::Handle;
use storage::prefetch::{Class, PrefetchOptions};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::mount::Mount;
use crate::preheat::order;
use look::{Chunk, Looker, Seen};

/// After the first read.
const LONGEST: Duration = Duration::from_secs(60);

/// A first read later than this after the mount is no start.
const FIRST_READ: Duration = Duration::from_secs(600);

/// How long little is guessed after something was found: the next file is opened, or looked into, sooner.
const CONFIDENT: Duration = Duration::from_millis(500);

/// Files that were opened and not looked at yet. Those beyond are passed over: whoever opens that many at a
/// time reads everything.
const MAX_WAITING: usize = 256;

/// Starts that are followed at a time: what is known of each takes up to some 10 MB. Others go without.
static FOLLOWED: Semaphore = Semaphore::const_new(8);

/// One image is looked at at a time: it takes a core for milliseconds, and a hostile one for up to a second.
static LOOKS: Semaphore = Semaphore::const_new(1);

/// Sees which files a start opens.
#[derive(Debug, Default)]
pub struct Watch {
    /// A start is followed.
    on: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Following(mpsc::Sender<Nid>),
    /// What a start reads is known.
    Over,
}

impl Watch {
    /// Notes a read of file `nid`.
    pub fn read(&self, nid: Nid, offset: u64) {
        if offset == 0
            && self.on.load(Relaxed)
            && let State::Following(opened) = &*self.state()
        {
            let _ = opened.try_send(nid);
        }
    }

    /// Ends it for good: what a start reads is known better.
    pub fn stop(&self) {
        *self.state() = State::Over;
        self.on.store(false, Relaxed);
    }

    /// Begins it, unless that was done, or it is over.
    fn begin(&self) -> Option<(End, mpsc::Receiver<Nid>)> {
        let mut state = self.state();
        if !matches!(*state, State::Idle) {
            return None;
        }
        let (sender, opened) = mpsc::channel(MAX_WAITING);
        *state = State::Following(sender);
        self.on.store(true, Relaxed);
        Some((End(Arc::clone(&self.on)), opened))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows the next start of the image of `mount`.
pub fn start(engine: &Handle, mount: &Arc<Mount>) {
    if let Some((end, opened)) = mount.watch().begin() {
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
    let Ok(Some(first)) = timeout(FIRST_READ, opened.recv()).await else { return };
    let Ok(_place) = FOLLOWED.try_acquire() else { return };
    let end = Instant::now() + LONGEST;
    let mut looker = Looker::default();
    let mut new = vec![first];
    // Orders of chunks without which nothing more can be told.
    let mut coming = JoinSet::new();
    let mut arrived = false;
    while on.0.load(Relaxed) && Instant::now() < end {
        new.extend(std::iter::from_fn(|| opened.try_recv().ok()));
        new.retain(|nid| looker.is_new(*nid));
        if new.is_empty() && !std::mem::take(&mut arrived) {
            let event = async {
                tokio::select! {
                    Some(ended) = coming.join_next() => Some(Event::Arrived(ended.unwrap_or_default())),
                    nid = opened.recv() => nid.map(Event::Opened),
                }
            };
            match timeout_at(end, event).await {
                Ok(Some(Event::Opened(nid))) => new.push(nid),
                Ok(Some(Event::Arrived(chunks))) => {
                    looker.ended(&chunks);
                    arrived = true;
                }
                Ok(None) | Err(_) => break,
            }
            continue;
        }
        // Nobody closes it.
        let turn = LOOKS.acquire().await;
        let Some((rafs, blobs)) = mount.upgrade().and_then(|mount| mount.image()) else { return };
        let opened = std::mem::take(&mut new);
        let look = move || {
            let seen = looker.look(&rafs, &blobs, opened);
            (looker, seen)
        };
        // A failure is the end of the engine.
        let Ok((again, seen)) = engine.blocking(look).await else { return };
        drop(turn);
        looker = again;
        let (Some(seen), Some(mount)) = (seen, mount.upgrade()) else { break };
        order_what_was(seen, &mount, &mut coming);
    }
    tracing::debug!("followed the start to {} files", looker.count());
}

enum Event {
    Opened(Nid),
    /// What an order was for.
    Arrived(Vec<Chunk>),
}

/// Fetches what was seen; orders that have to end before more can be seen go to `coming`.
fn order_what_was(seen: Seen, mount: &Mount, coming: &mut JoinSet<Vec<Chunk>>) {
    let Seen { files, missing, large } = seen;
    for chunks in [missing, large].into_iter().filter(|chunks| !chunks.is_empty()) {
        let keys = chunks.iter().map(|(blob, extent)| (*blob, extent.index.0)).collect();
        // What is looked into next goes before what is only wanted.
        let options = PrefetchOptions { until_stored: true, ..PrefetchOptions::of(Class::Trace) };
        if let Some(order) = mount.prefetch(Box::new(chunks.into_iter()), options) {
            coming.spawn(async move {
                order.wait().await;
                keys
            });
        }
    }
    if !files.is_empty() {
        mount.image().inspect(|(_, blobs)| blobs.guide(CONFIDENT));
        mount.prefetch(order::nodes(mount.rafs_shared(), files), PrefetchOptions::of(Class::Predicted));
    }
}
