//! FUSE over io_uring: requests come and answers go in memory that is shared with the kernel, with one system
//! call for both, on the CPU that asks.
//!
//! ```text
//!   reader on CPU n ─▶ kernel's queue n ─▶ entry ─▶ ring thread n ─▶ cache ─▶ the same entry ─▶ reader
//!                                                        │  ▲ mailbox
//!                                                        ▼  │
//!                                               storage, where it must wait
//! ```
//!
//! The kernel has a queue for each CPU there may ever be, and an **entry** carries one request and its answer. A
//! read that waits for its source keeps its entry; so for each of those the queue gets one entry more, and
//! metadata and cached data stay prompt however many wait ([`serve`]). What has no answer of its own
//! (FORGET, INTERRUPT) and what we tell the kernel goes through `/dev/fuse` as before: [`super::worker`] runs on,
//! and serves alone where there are no rings.
//!
//! # Memory
//! An entry is 1 MiB of address space, of which only what was used takes memory. Per mount, [`KEPT`] of that
//! is kept, at least one entry's data for each thread; what goes beyond it is given back with each answer.
//!
//! # What blocks
//! A queue has one thread. What waits for a source is storage's; for a page of the cache file that is on the disk only,
//! the thread waits itself, as the reader on its CPU would. A host's disk may be slow or gone: its directories are not
//! served through rings where that is known before the mount.
//!
//! # A crash
//! Requests that are in an entry end with an error when the daemon dies (Linux 6.18), and the kernel does not
//! give them to a successor. Hence rings only when asked for, and never together with a supervisor.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context as _, anyhow, ensure};
use fuse_backend_rs::api::server::Server;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use self::mailbox::Mailbox;
use super::worker::Connection;
use crate::adapter::Adapter;
use crate::cli::{FuseFront, ServeArgs};

mod layout;
mod mailbox;
mod serve;
#[expect(unsafe_code, reason = "memory that is shared with the kernel")]
mod sys;

/// Bytes of entries' data that are kept for later requests, of all threads together.
const KEPT: usize = 16 << 20;

/// Where the kernel says whether it offers rings.
const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";
/// CPUs there may ever be.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";
/// Those that somebody may ask from.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// What one thread serves.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Where it runs.
    cpu: usize,
    /// The kernel's queues: first that of its CPU, then some of CPUs that are offline.
    queues: Vec<u16>,
}

/// How this machine's queues are served. To be made before the process gives up what it may open.
#[derive(Debug)]
pub struct Plan {
    places: Vec<Place>,
    /// Swallows what fuse-backend-rs writes: its answers are taken from memory.
    null: File,
}

impl Plan {
    /// The plan for this machine; without rings `None`, with a warning that says why.
    pub fn new(front: &FuseFront, args: &ServeArgs) -> Option<Self> {
        if front.writable || args.shared_dir.is_some() {
            tracing::warn!(
                "no FUSE over io_uring with --writable or --shared-dir: a request that waits for the host's disk \
                 would hold up its whole CPU; requests come through /dev/fuse"
            );
            return None;
        }
        match std::fs::read_to_string(PARAMETER) {
            Ok(text) if text.trim() == "Y" => {}
            Ok(_) => {
                not_offered();
                return None;
            }
            Err(e) => {
                tracing::warn!("no FUSE over io_uring: {PARAMETER}: {e}; Linux 6.14 or later is needed");
                return None;
            }
        }
        Self::of_this_machine()
            .inspect_err(|e| tracing::warn!("no FUSE over io_uring: {e:#}; requests come through /dev/fuse"))
            .ok()
    }

    fn of_this_machine() -> anyhow::Result<Self> {
        let possible = u16::try_from(cpus(POSSIBLE)?.len()).context(POSSIBLE)?;
        let set = sched_getaffinity(Pid::from_raw(0)).context("this process's CPUs")?;
        // A queue is kept going from its own CPU only, see `serve`.
        let foreign = cpus(ONLINE)?.into_iter().find(|&cpu| set.is_set(cpu.into()) != Ok(true));
        ensure!(
            foreign.is_none(),
            "this process may not run on CPU {}, whose requests it would serve; let it run on all CPUs (cpuset, \
             CPUAffinity=, taskset)",
            foreign.unwrap_or_default()
        );
        let places = places(possible, (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)));
        ensure!(!places.is_empty(), "no CPU that this process may run on has a queue");
        let null = File::options().write(true).open("/dev/null").context("/dev/null")?;
        Ok(Self { places, null })
    }
}

/// Says that the kernel offers no rings.
pub(super) fn not_offered() {
    tracing::warn!(
        "no FUSE over io_uring: the kernel does not offer it; `echo Y > {PARAMETER}` before the mount, on Linux 6.14 \
         or later; requests come through /dev/fuse"
    );
}

/// The CPUs that a file of the kernel's names.
fn cpus(path: &str) -> anyhow::Result<Vec<u16>> {
    let text = std::fs::read_to_string(path).context(path.to_owned())?;
    parse(&text).with_context(|| format!("{path}: {text:?} is no list of CPUs"))
}

/// The CPUs that a list like `0-3,8` names, in ascending order.
fn parse(list: &str) -> Option<Vec<u16>> {
    let mut all = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || all.last().is_some_and(|&before| before >= first) {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// One thread for each usable CPU that has a queue; they share the queues of all others.
fn places(possible: u16, usable: impl Iterator<Item = usize>) -> Vec<Place> {
    let own: Vec<u16> =
        usable.filter_map(|cpu| u16::try_from(cpu).ok()).filter(|cpu| *cpu < possible).collect();
    let mut places: Vec<_> = own.iter().map(|&cpu| Place { cpu: cpu.into(), queues: vec![cpu] }).collect();
    let others = (0..possible).filter(|queue| !own.contains(queue));
    for (queue, place) in others.zip((0..own.len()).cycle()) {
        places[place].queues.push(queue);
    }
    places
}

/// Threads with rings, before the kernel has agreed to use them. Dropped, they end.
pub(super) struct Rings {
    threads: Vec<Sender<Arc<Connection>>>,
}

/// What all ring threads share.
struct Shared {
    adapter: Arc<Adapter>,
    server: Arc<Server<Arc<Adapter>>>,
    plan: Plan,
    /// Threads whose entries the kernel does not have yet.
    missing: AtomicUsize,
}

impl Rings {
    /// Starts the threads, each with its ring; once started each calls `ended` when it stops.
    ///
    /// # Errors
    /// The system refuses a thread, its CPU or a ring, or has no memory.
    pub fn prepare(
        plan: Plan,
        adapter: Arc<Adapter>,
        server: Arc<Server<Arc<Adapter>>>,
        ended: impl Fn(anyhow::Result<()>) + Clone + Send + 'static,
    ) -> anyhow::Result<(Self, Vec<JoinHandle<()>>)> {
        let missing = AtomicUsize::new(plan.places.len());
        let shared = Arc::new(Shared { adapter, server, plan, missing });
        let (prepared, results) = channel();
        let mut rings = Self { threads: Vec::new() };
        let mut handles = Vec::new();
        for number in 0..shared.plan.places.len() {
            let (go, told) = channel();
            let (shared, prepared, ended) = (Arc::clone(&shared), prepared.clone(), ended.clone());
            let handle = std::thread::Builder::new()
                .name(format!("fuse-ring-{number}"))
                .stack_size(super::fusedev::STACK_SIZE)
                .spawn(move || run(&shared, number, &prepared, &told, &ended))
                .context("start a ring thread")?;
            rings.threads.push(go);
            handles.push(handle);
        }
        for _ in &handles {
            results.recv().map_err(|_| anyhow!("a ring thread ended"))??;
        }
        Ok((rings, handles))
    }

    /// Serves `connection`, now that the kernel has agreed.
    pub fn start(self, connection: &Arc<Connection>) {
        for thread in self.threads {
            // One that has ended has said so.
            let _ = thread.send(Arc::clone(connection));
        }
    }
}

/// The life of one ring thread.
fn run(
    shared: &Arc<Shared>,
    number: usize,
    prepared: &Sender<anyhow::Result<()>>,
    told: &Receiver<Arc<Connection>>,
    ended: &impl Fn(anyhow::Result<()>),
) {
    let (means, sent) = match set_up(&shared.plan, number) {
        Ok(means) => (means, prepared.send(Ok(()))),
        Err(e) => {
            let _ = prepared.send(Err(e));
            return;
        }
    };
    let (Ok(()), Ok(connection)) = (sent, told.recv()) else { return };
    let serve = || serve::RingWorker::new(shared, number, means, connection).run();
    match catch_unwind(AssertUnwindSafe(serve)) {
        Ok(Ok(serve::End::Over)) => ended(Ok(())),
        // The kernel has said no, and uses /dev/fuse.
        Ok(Ok(serve::End::Withdrawn)) => {}
        Ok(Err(e)) => ended(Err(anyhow::Error::new(e).context("serve a FUSE ring"))),
        Err(_) => ended(Err(anyhow!("a ring thread panicked"))),
    }
}

/// What a ring thread is made of.
struct Means {
    ring: sys::Prepared,
    mailbox: Mailbox,
    /// See [`Plan::null`].
    null: File,
}

/// Binds the calling thread to its CPU, and makes its ring. What can fail, fails here, before the kernel has agreed:
/// after that it has all requests wait until each queue has an entry.
fn set_up(plan: &Plan, number: usize) -> anyhow::Result<Means> {
    let place = &plan.places[number];
    let mut set = CpuSet::new();
    set.set(place.cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .with_context(|| format!("bind a thread to CPU {}", place.cpu))?;
    let ring = sys::set_up(place.queues.len() * serve::DEPTH).context("set up a ring")?;
    let mailbox = Mailbox::new().context("set up a ring's mailbox")?;
    Ok(Means { ring, mailbox, null: plan.null.try_clone().context("/dev/null")? })
}

impl Shared {
    /// Notes that one more thread serves.
    fn serving(&self) {
        if self.missing.fetch_sub(1, Ordering::Relaxed) == 1 {
            tracing::info!("FUSE requests come through io_uring, {} threads", self.plan.places.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_taken_apart() {
        for (list, cpus) in [
            ("0\n", vec![0]),
            ("0-3\n", vec![0, 1, 2, 3]),
            ("0-1,8,10-11", vec![0, 1, 8, 10, 11]),
            ("65534-65535", vec![65534, 65535]),
        ] {
            assert_eq!(parse(list), Some(cpus), "{list:?}");
        }
        for list in ["", "\n", "3-1", "65536", "a", "0-", "-1", "0,,1", "0-40000,0-40000", "0-1,1"] {
            assert_eq!(parse(list), None, "{list:?}");
        }
    }

    #[test]
    fn every_queue_is_served_once() {
        for (possible, usable) in [(1, vec![0]), (2, vec![0, 1]), (8, vec![1, 3]), (2, vec![0, 1, 5, 70_000])]
        {
            let places = places(possible, usable.iter().copied());
            let mut queues: Vec<_> = places.iter().flat_map(|place| place.queues.clone()).collect();
            queues.sort_unstable();
            assert_eq!(queues, (0..possible).collect::<Vec<_>>(), "{places:?}");
            for place in &places {
                // A thread serves its own CPU's queue, first.
                assert_eq!(place.cpu, usize::from(place.queues[0]), "{places:?}");
                assert!(usable.contains(&place.cpu), "{places:?}");
            }
        }
        assert_eq!(places(3, [9].into_iter()), []);
    }
}
