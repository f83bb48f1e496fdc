//! Jobs that run, and those that ended of late.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rafs::fs::Rafs;
use serde::Serialize;
use storage::engine::Handle;
use storage::prefetch::{Class, Prefetch, PrefetchOptions, PrefetchProgress};
use tokio::sync::Semaphore;

use super::order::{Total, total};
use super::{Chunks, Request, Wish};
use crate::mount::Mount;
use crate::words::counted;

/// Jobs that run at once. Each holds a few requests open; more of them fetch no faster. As many more
/// may run that came with mounts.
pub const MAX_RUNNING: usize = 16;

/// Jobs that ended and can still be asked about.
const MAX_ENDED: usize = 64;

/// How long that is.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// Missing files that are named; the others are counted.
const MAX_NAMED: usize = 20;

/// The jobs of one daemon.
#[derive(Debug)]
pub struct Jobs {
    /// Held for look-ups only. Taken before a job's state, never the other way round.
    table: Mutex<Table>,
    /// Turns of jobs that wait for one.
    turns: Arc<Semaphore>,
}

impl Default for Jobs {
    fn default() -> Self {
        Self { table: Mutex::default(), turns: Arc::new(Semaphore::new(MAX_RUNNING)) }
    }
}

#[derive(Debug, Default)]
struct Table {
    last_id: u64,
    jobs: BTreeMap<u64, Arc<Job>>,
}

/// As many jobs run as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MAX_RUNNING} prefetches are running; wait for one, or cancel it")
    }
}

impl std::error::Error for TooMany {}

impl Jobs {
    /// Starts a job on `mount` and answers its id, which is never given again. The job ends by itself, when
    /// it is cancelled, and with the mount.
    ///
    /// # Errors
    /// [`MAX_RUNNING`] run already.
    pub fn start(&self, engine: &Handle, mount: &Arc<Mount>, request: Request) -> Result<u64, TooMany> {
        let mut table = self.lock();
        table.forget(Instant::now());
        let running = table.jobs.values().filter(|job| !job.takes_turns && job.ended().is_none());
        if running.count() >= MAX_RUNNING {
            return Err(TooMany);
        }
        Ok(table.add(engine, mount, request, None))
    }

    /// The same for what a new mount asks for: there may be any number of them, and those too many wait
    /// for their turn.
    pub fn queue(&self, engine: &Handle, mount: &Arc<Mount>, request: Request) -> u64 {
        let mut table = self.lock();
        table.forget(Instant::now());
        table.add(engine, mount, request, Some(Arc::clone(&self.turns)))
    }

    /// How far job `id` is; `None` if there is no such job, or no longer.
    pub fn report(&self, id: u64) -> Option<Report> {
        self.lock().jobs.get(&id).map(|job| job.report())
    }

    /// All of them, the oldest first.
    pub fn reports(&self) -> Vec<Report> {
        let mut table = self.lock();
        table.forget(Instant::now());
        table.jobs.values().map(|job| job.report()).collect()
    }

    /// Ends job `id` early; what has arrived stays. True if there is such a job, ended or not.
    pub fn cancel(&self, id: u64) -> bool {
        self.lock().jobs.get(&id).map(|job| job.cancel()).is_some()
    }

    /// Ends those of `mount`.
    pub fn cancel_of(&self, mount: &Arc<Mount>) {
        let own = |job: &&Arc<Job>| std::ptr::eq(job.mount.as_ptr(), Arc::as_ptr(mount));
        self.lock().jobs.values().filter(own).for_each(|job| job.cancel());
    }

    /// Ends them all.
    pub fn cancel_all(&self) {
        self.lock().jobs.values().for_each(|job| job.cancel());
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing panics under the lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn add(
        &mut self,
        engine: &Handle,
        mount: &Arc<Mount>,
        request: Request,
        turns: Option<Arc<Semaphore>>,
    ) -> u64 {
        self.last_id += 1;
        let id = self.last_id;
        let job = Arc::new(Job {
            id,
            mountpoint: mount.mountpoint().to_owned(),
            mount: Arc::downgrade(mount),
            what: request.what,
            bandwidth: request.bandwidth,
            takes_turns: turns.is_some(),
            started: Instant::now(),
            state: Mutex::default(),
        });
        self.jobs.insert(id, Arc::clone(&job));
        engine.spawn(run(job, engine.clone(), request.stages, turns));
        id
    }

    /// Drops jobs that ended long ago, or before many others.
    fn forget(&mut self, now: Instant) {
        let ended: Vec<_> = self.jobs.values().filter_map(|job| Some((job.ended()?, job.id))).collect();
        let mut young: Vec<_> =
            ended.iter().filter(|(at, _)| now.saturating_duration_since(*at) < REMEMBERED).collect();
        young.sort_unstable();
        let kept = &young[young.len().saturating_sub(MAX_ENDED)..];
        for entry in &ended {
            if !kept.contains(&entry) {
                self.jobs.remove(&entry.1);
            }
        }
    }
}

/// How far a job is: a document of the API.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Its id.
    pub id: u64,
    /// The mount it fetches for.
    pub mountpoint: String,
    /// What it fetches: `start` (what the configuration asks for), `all`, `files`, `trace`.
    pub what: &'static str,
    /// Where it is.
    pub state: State,
    /// Its orders taken together.
    #[serde(flatten)]
    pub progress: PrefetchProgress,
    /// Chunks in all, counted as `chunks` is, once they are counted.
    pub total_chunks: Option<u64>,
    /// Stored bytes of these, including what need not be fetched.
    pub total_bytes: Option<u64>,
    /// Limit in bytes a second.
    pub bandwidth: Option<NonZeroU64>,
    /// Files of the list that the image does not have.
    pub missing_files: u64,
    /// The first of them.
    pub missing: Vec<String>,
    /// Since its start, or from start to end.
    pub seconds: f64,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Under way.
    Running,
    /// All is there.
    Done,
    /// At its end, and something could not be had.
    Incomplete,
    /// Ended early, by request or with its mount.
    Cancelled,
}

#[derive(Debug)]
struct Job {
    id: u64,
    mountpoint: String,
    /// Weak: a job does not keep an image mounted.
    mount: Weak<Mount>,
    what: &'static str,
    bandwidth: Option<NonZeroU64>,
    takes_turns: bool,
    started: Instant,
    /// Held for a few moves; nothing waits or calls out under it but into the orders' handles.
    state: Mutex<JobState>,
}

#[derive(Debug, Default)]
struct JobState {
    cancelled: bool,
    /// One a stage that has begun.
    handles: Vec<Prefetch>,
    total: Option<Total>,
    missing_files: u64,
    missing: Vec<String>,
    ended: Option<Instant>,
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, JobState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> Option<Instant> {
        self.lock().ended
    }

    fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    fn cancel(&self) {
        let mut state = self.lock();
        if state.ended.is_none() {
            state.cancelled = true;
            state.handles.iter().for_each(Prefetch::cancel);
        }
    }

    /// Starts the order of a stage, unless the job was cancelled or the mount is gone.
    fn begin(&self, class: Class, chunks: &Chunks) -> Option<Prefetch> {
        let mut state = self.lock();
        let mount = self.mount.upgrade();
        let handle = match (state.cancelled, mount) {
            (false, Some(mount)) => {
                let options = PrefetchOptions { bandwidth: self.bandwidth, ..PrefetchOptions::of(class) };
                mount.prefetch(chunks.order(mount.rafs_shared()), options)
            }
            _ => None,
        };
        match &handle {
            Some(handle) => state.handles.push(handle.clone()),
            None => state.cancelled = true,
        }
        handle
    }

    fn resolve(&self, rafs: &Rafs, wish: &Wish) -> Chunks {
        let missing = |path: &[u8]| {
            let mut state = self.lock();
            state.missing_files += 1;
            if state.missing.len() < MAX_NAMED {
                state.missing.push(String::from_utf8_lossy(path).into_owned());
            }
        };
        Chunks::resolve(rafs, wish, missing, || self.is_cancelled())
    }

    fn report(&self) -> Report {
        let state = self.lock();
        let mut progress = PrefetchProgress {
            chunks: 0,
            present_chunks: 0,
            failed_chunks: 0,
            bytes: 0,
            finished: state.ended.is_some(),
            error: None,
        };
        for stage in state.handles.iter().map(Prefetch::progress) {
            progress.chunks += stage.chunks;
            progress.present_chunks += stage.present_chunks;
            progress.failed_chunks += stage.failed_chunks;
            progress.bytes += stage.bytes;
            progress.error = progress.error.or(stage.error);
        }
        let cancelled = state.cancelled || state.handles.iter().any(Prefetch::is_cancelled);
        let whole = progress.failed_chunks == 0 && state.missing_files == 0;
        Report {
            id: self.id,
            mountpoint: self.mountpoint.clone(),
            what: self.what,
            state: match state.ended {
                None => State::Running,
                Some(_) if cancelled => State::Cancelled,
                Some(_) if whole => State::Done,
                Some(_) => State::Incomplete,
            },
            progress,
            total_chunks: state.total.map(|total| total.chunks),
            total_bytes: state.total.map(|total| total.bytes),
            bandwidth: self.bandwidth,
            missing_files: state.missing_files,
            missing: state.missing.clone(),
            seconds: state.ended.unwrap_or_else(Instant::now).duration_since(self.started).as_secs_f64(),
        }
    }
}

/// Notes the end of a job, however it comes.
struct End(Arc<Job>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.lock().ended = Some(Instant::now());
        let report = self.0.report();
        let Report { id, progress, seconds, missing_files, .. } = &report;
        let figures = format!(
            "{} ({} there before), {} bytes fetched in {seconds:.1} s",
            counted(progress.chunks, "chunk"),
            progress.present_chunks,
            progress.bytes
        );
        match report.state {
            State::Incomplete => tracing::warn!(
                "prefetch {id} ({}): {} could not be had, {} not found in the image; \
                 {figures}{}",
                report.what,
                counted(progress.failed_chunks, "chunk"),
                counted(*missing_files, "file"),
                progress.error.as_ref().map_or_else(String::new, |e| format!("; first: {e}")),
            ),
            state => tracing::info!("prefetch {id} ({}) {state:?}: {figures}", report.what),
        }
    }
}

/// The life of a job.
async fn run(job: Arc<Job>, engine: Handle, stages: Vec<(Class, Wish)>, turns: Option<Arc<Semaphore>>) {
    let end = End(Arc::clone(&job));
    let _turn = match &turns {
        // Nobody closes it.
        Some(turns) => turns.acquire().await.ok(),
        None => None,
    };
    let Some(rafs) = job.mount.upgrade().map(|mount| Arc::clone(mount.rafs_shared())) else { return };
    let (finder, image) = (Arc::clone(&job), Arc::clone(&rafs));
    let find = move || -> Vec<(Class, Chunks)> {
        stages.into_iter().map(|(class, wish)| (class, finder.resolve(&image, &wish))).collect()
    };
    // A failure here and below is the end of the engine.
    let Ok(stages) = engine.blocking(find).await else { return };

    let (counter, counted) = (Arc::clone(&job), stages.clone());
    let count = engine.blocking(move || {
        let mut sum = Total::default();
        for (_, chunks) in &counted {
            let Some(stage) = total(chunks.order(&rafs), || counter.is_cancelled()) else { return };
            sum.chunks += stage.chunks;
            sum.bytes = sum.bytes.saturating_add(stage.bytes);
        }
        counter.lock().total = Some(sum);
    });
    let work = async {
        for (class, chunks) in &stages {
            match job.begin(*class, chunks) {
                Some(handle) => handle.wait().await,
                None => break,
            }
        }
    };
    let _ = tokio::join!(count, work);
    drop(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: u64, ended: Option<Instant>) -> (u64, Arc<Job>) {
        let state = Mutex::new(JobState { ended, ..JobState::default() });
        let (mountpoint, mount) = ("/".to_owned(), Weak::new());
        let started = Instant::now();
        let (what, bandwidth, takes_turns) = ("all", None, false);
        (id, Arc::new(Job { id, mountpoint, mount, what, bandwidth, takes_turns, started, state }))
    }

    #[test]
    fn ended_jobs_are_forgotten_and_running_ones_are_not() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let ended = 2 * MAX_ENDED as u64;
        // The first are those that ended last.
        let past = (1..=ended).map(|id| job(id, Some(now + second * (ended - id) as u32)));
        let mut table = Table { last_id: ended + 1, jobs: past.collect() };
        table.jobs.extend([job(ended + 1, None)]);
        table.forget(now + second);
        let kept: Vec<u64> = table.jobs.keys().copied().collect();
        assert_eq!(kept, (1..=MAX_ENDED as u64).chain([ended + 1]).collect::<Vec<_>>());
        table.forget(now + second * ended as u32 + REMEMBERED);
        assert_eq!(table.jobs.keys().copied().collect::<Vec<_>>(), [ended + 1]);
    }

    #[test]
    fn an_ended_job_can_not_be_cancelled_any_more() {
        let jobs = Jobs::default();
        jobs.lock().jobs.extend([job(1, Some(Instant::now())), job(2, None)]);
        assert!(jobs.cancel(1) && jobs.cancel(2) && !jobs.cancel(3));
        let states: Vec<_> = jobs.reports().iter().map(|report| report.state).collect();
        assert_eq!(
            states,
            [State::Done, State::Running],
            "a running job ends by itself when it is cancelled"
        );
        assert!(jobs.lock().jobs[&2].is_cancelled());
    }
}
