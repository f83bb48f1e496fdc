//! The threads behind every fetch: a small async runtime and a bounded CPU pool.
//!
//! ```text
//!  front-end thread ──submit──▶ 2 workers: sockets, timers, waiting
//!                                  │ unit complete
//!                                  ▼
//!                               CPU pool, one job a core: decode, verify, write
//! ```
//!
//! Invariants:
//! - Workers never compute for long and never wait for a disk; what does goes through
//!   [`Handle::compute`] or [`Handle::blocking`].
//! - What fetches in flight may hold in memory is bounded by one budget for all blobs.
//! - Only [`Engine`] owns the threads. Everything else holds a [`Handle`], so that
//!   dropping the engine ends the tasks instead of waiting for them to drop it.
//! - Nothing ticks: an idle engine uses no CPU.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::task::JoinHandle;

use crate::backend::retry::within;
use crate::backend::{Backend, Priority, ReadContext};
use crate::budget::Budget;
use crate::ids::ByteRange;
use crate::link::Link;
use crate::{Error, ErrorKind, Result};

/// Bytes of stack of an engine thread. Deepest are hundreds of modules that import one another
/// (`rafs::hints`): 256 KiB, and about 1 MiB in an unoptimised build. Pages that are not touched cost nothing.
const STACK_SIZE: usize = 2 << 20;

/// Threads that may wait for a disk or a name server besides the CPU pool: one syncer a
/// busy blob, and room for lookups.
const BLOCKING_THREADS: usize = 32;

/// How long an idle thread of the pool lives on.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Units that may be in flight where that is less than [`MOST_IN_FLIGHT`] bytes.
const UNITS_IN_FLIGHT: u64 = 3;
const MOST_IN_FLIGHT: u64 = 8 << 20;

/// Sizes of an [`Engine`].
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Threads that drive sockets and timers.
    pub workers: usize,
    /// Decode and verify jobs that run at once.
    pub cpu_jobs: usize,
    /// Bytes that units in flight may hold, stored and decoded together; more for large units
    /// ([`Engine::serve_units`]).
    pub memory: u64,
}

impl Default for EngineConfig {
    /// Two workers, one job a core, 3 MiB: what has come waits in the sockets, or in the windows of
    /// HTTP/2.
    fn default() -> Self {
        Self {
            workers: 2,
            cpu_jobs: std::thread::available_parallelism().map_or(1, usize::from),
            memory: 3 << 20,
        }
    }
}

/// Owner of the threads. Dropping it cancels all tasks and joins the threads.
#[derive(Debug)]
pub struct Engine {
    /// Taken only by `Drop`.
    runtime: Option<tokio::runtime::Runtime>,
    handle: Handle,
}

impl Engine {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Io`: the system refuses threads or descriptors.
    pub fn new(config: EngineConfig) -> Result<Arc<Self>> {
        let cpu_jobs = config.cpu_jobs.max(1);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.workers.max(1))
            .max_blocking_threads(cpu_jobs + BLOCKING_THREADS)
            .thread_stack_size(STACK_SIZE)
            .thread_keep_alive(KEEP_ALIVE)
            .thread_name("engine")
            .enable_all()
            .build()
            .map_err(|e| Error::io("start the engine's threads", e))?;
        let handle = Handle {
            runtime: runtime.handle().clone(),
            // A place is left to readers, should the disk keep those that store what was fetched ahead.
            cpu: Budget::new(cpu_jobs as u64 + 1, cpu_jobs as u64),
            budget: Budget::new(config.memory, config.memory / 2),
            link: Link::new(),
        };
        Ok(Arc::new(Self { runtime: Some(runtime), handle }))
    }

    /// What tasks and caches hold of the engine.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Says that units of `size` decoded bytes will be served: makes room for a few of them, so that
    /// the cores need not wait for each other, nor readers for a stalled prefetch.
    pub fn serve_units(&self, size: u32) {
        self.handle.budget.at_least((UNITS_IN_FLIGHT * 2 * u64::from(size)).min(MOST_IN_FLIGHT));
    }

    /// Runs `future` on the calling thread and waits for it. Not for threads of the engine.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.handle.runtime.block_on(future)
    }

    /// Starts `future` on the workers.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.handle.spawn(future)
    }

    /// Reads all of `range` and waits for it. Not for threads of the engine.
    ///
    /// # Errors
    /// The backend's; `TimedOut`, `Cancelled`: as `context` says; `Corrupt`: the stream
    /// held less or more than was asked.
    pub fn fetch(&self, backend: &dyn Backend, range: ByteRange, context: &ReadContext) -> Result<Vec<u8>> {
        self.block_on(fetch(backend, range, context))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        if tokio::runtime::Handle::try_current().is_ok() {
            // Dropped by a task: joining would wait for ourselves.
            runtime.shutdown_background();
        }
        // Otherwise the drop of the runtime joins.
    }
}

/// A way to run work on an [`Engine`] without keeping it alive. Cheap to clone.
///
/// After the engine is gone, tasks are dropped unrun and calls answer `Cancelled`.
#[derive(Clone, Debug)]
pub struct Handle {
    runtime: tokio::runtime::Handle,
    /// One place a running CPU job.
    cpu: Arc<Budget>,
    budget: Arc<Budget>,
    link: Arc<Link>,
}

impl Handle {
    /// Starts `future` on the workers.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.runtime.spawn(future)
    }

    /// Starts `future` on the workers; it ends with `set`.
    pub(crate) fn spawn_in<T: Send + 'static>(
        &self,
        set: &mut tokio::task::JoinSet<T>,
        future: impl Future<Output = T> + Send + 'static,
    ) {
        set.spawn_on(future, &self.runtime);
    }

    /// Bytes that units in flight may hold.
    pub(crate) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// The way to the sources.
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Runs `job` on the CPU pool, after those that wait already; what readers wait for goes
    /// first.
    ///
    /// # Errors
    /// `Cancelled`: the job panicked or the engine is shutting down.
    pub async fn compute<T: Send + 'static>(
        &self,
        priority: Priority,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let permit = self.cpu.reserve(1, priority).await;
        self.blocking(move || {
            let _permit = permit;
            job()
        })
        .await
    }

    /// Runs `job`, which may wait for a disk, beside the CPU pool.
    ///
    /// # Errors
    /// `Cancelled`: the job panicked or the engine is shutting down.
    pub async fn blocking<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        self.spawn_blocking(job).await.map_err(|e| gone().with_source(e))
    }

    /// Starts `job`, which may wait for a disk, beside the CPU pool.
    pub(crate) fn spawn_blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        self.runtime.spawn_blocking(job)
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Cancelled, "engine: the job was dropped")
}

/// Reads all of `range`.
///
/// # Errors
/// As [`Engine::fetch`].
pub async fn fetch(backend: &dyn Backend, range: ByteRange, context: &ReadContext) -> Result<Vec<u8>> {
    if range.is_empty() {
        return Ok(Vec::new());
    }
    within(context, "fetch", async {
        let mut stream = backend.open(range, context).await?;
        // Grows with what arrives: the length of a range may come from hostile metadata.
        let mut bytes = Vec::with_capacity(usize::try_from(range.len().min(1 << 20)).unwrap_or(0));
        while let Some(piece) = stream.next().await {
            let piece = piece?;
            if (bytes.len() + piece.len()) as u64 > range.len() {
                return Err(overlong(range));
            }
            bytes.extend_from_slice(&piece);
        }
        if bytes.len() as u64 != range.len() {
            return Err(truncated(range, bytes.len() as u64));
        }
        Ok(bytes)
    })
    .await
}

/// The stream of `range` ended after `got` bytes.
pub(crate) fn truncated(range: ByteRange, got: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("bytes {range}: the source ended after {got} of {} bytes", range.len()),
    )
}

/// The stream of `range` went on behind its end.
pub(crate) fn overlong(range: ByteRange) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("bytes {range}: the source sent more than {} bytes; does it ignore ranges?", range.len()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fault, FaultyBackend, Gate};

    #[test]
    fn a_fetch_is_whole_or_an_error() {
        let engine = Engine::new(EngineConfig::default()).unwrap();
        let backend = FaultyBackend::new(vec![7; 5000]);
        let range = ByteRange::new(10, 4000).unwrap();
        let context = ReadContext::on_demand(None);
        assert_eq!(engine.fetch(&backend, range, &context).unwrap(), [7; 4000]);
        for fault in [Fault::Shorten(1), Fault::Lengthen(1)] {
            backend.fault(range, fault, 1);
            assert_eq!(engine.fetch(&backend, range, &context).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        let gate = Gate::default();
        backend.fault(range, Fault::Stall(gate), 2);
        let soon = std::time::Instant::now() + Duration::from_millis(10);
        let hasty = ReadContext::on_demand(Some(soon));
        assert_eq!(engine.fetch(&backend, range, &hasty).unwrap_err().kind(), ErrorKind::TimedOut);
        context.cancel.cancel();
        assert_eq!(engine.fetch(&backend, range, &context).unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_panicking_job_is_an_error_and_frees_its_place() {
        let engine = Engine::new(EngineConfig { cpu_jobs: 1, ..EngineConfig::default() }).unwrap();
        let handle = engine.handle().clone();
        for _ in 0..3 {
            let result: Result<()> =
                engine.block_on(handle.compute(Priority::OnDemand, || panic!("a panic on plan")));
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
        }
        assert_eq!(engine.block_on(handle.compute(Priority::Prefetch, || 5)).unwrap(), 5);
    }

    #[test]
    fn a_task_may_drop_the_engine() {
        let engine = Engine::new(EngineConfig::default()).unwrap();
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let (go, gone) = tokio::sync::oneshot::channel();
        let task = Arc::clone(&engine);
        engine.spawn(async move {
            let _ = gone.await;
            drop(task);
            sender.send(()).unwrap();
        });
        drop(engine);
        go.send(()).unwrap();
        receiver.recv().unwrap();
    }
}
