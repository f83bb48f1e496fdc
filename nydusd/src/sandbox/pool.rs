//! Threads that work on requests of one kind.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Stack of a thread: modules that resolve names are not ours.
const STACK_SIZE: usize = 1 << 20;
/// How long a thread that has nothing to do stays.
const IDLE: Duration = Duration::from_secs(10);

/// Does `work` to each of what it is given, in threads of its own.
pub(super) struct Pool<T> {
    work: Box<dyn Fn(T) + Send + Sync>,
    /// Most threads.
    threads: usize,
    /// Most that wait for one.
    queue: usize,
    state: Mutex<State<T>>,
    /// Told when something begins to wait.
    come: Condvar,
}

/// Guarded by [`Pool::state`].
struct State<T> {
    waiting: VecDeque<T>,
    /// Threads that there are.
    threads: usize,
    /// Threads of those that wait for work.
    idle: usize,
}

impl<T: Send + 'static> Pool<T> {
    /// Starts no thread yet.
    pub fn new(threads: usize, queue: usize, work: impl Fn(T) + Send + Sync + 'static) -> Arc<Self> {
        let state = State { waiting: VecDeque::new(), threads: 0, idle: 0 };
        Arc::new(Self {
            work: Box::new(work),
            threads,
            queue,
            state: Mutex::new(state),
            come: Condvar::new(),
        })
    }

    /// Has `job` worked on. Never waits for another.
    ///
    /// # Errors
    /// `job`: too many wait, or the system has no thread for the first.
    pub fn put(self: &Arc<Self>, job: T) -> Result<(), T> {
        let mut state = self.state();
        if state.waiting.len() < state.idle {
            state.waiting.push_back(job);
            self.come.notify_one();
            return Ok(());
        }
        if state.threads < self.threads {
            let pool = Arc::clone(self);
            let thread = std::thread::Builder::new().name("broker".to_owned()).stack_size(STACK_SIZE);
            match thread.spawn(move || pool.run()) {
                Ok(_) => state.threads += 1,
                Err(e) if state.threads == 0 => {
                    tracing::warn!("start a thread: {e}");
                    return Err(job);
                }
                // Those that there are get to it.
                Err(_) => {}
            }
        }
        if state.waiting.len() >= self.queue {
            return Err(job);
        }
        state.waiting.push_back(job);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(job) = self.next() {
            // A panic has been reported, and whoever waits for the job sees that it is dropped.
            let _ = catch_unwind(AssertUnwindSafe(|| (self.work)(job)));
        }
    }

    /// The next job; `None` for a thread that has waited for long enough.
    fn next(&self) -> Option<T> {
        let mut state = self.state();
        state.idle += 1;
        let nothing = |state: &mut State<T>| state.waiting.is_empty();
        let (mut state, _) =
            self.come.wait_timeout_while(state, IDLE, nothing).unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
        let job = state.waiting.pop_front();
        if job.is_none() {
            // Under the same lock as the look: nobody counts on it any more.
            state.threads -= 1;
        }
        job
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PROMPT: Duration = Duration::from_secs(60);

    #[test]
    fn jobs_wait_in_turn_and_too_many_are_refused() {
        let (release, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let (begun, begins) = mpsc::channel();
        let pool = Pool::new(2, 3, move |job: u32| {
            begun.send(job).unwrap();
            if job < 2 {
                held.lock().unwrap().recv().unwrap();
            }
            assert_ne!(job, 2, "what fails takes no thread with it");
        });
        for job in 0..2 {
            pool.put(job).unwrap();
        }
        let mut first = [begins.recv_timeout(PROMPT).unwrap(), begins.recv_timeout(PROMPT).unwrap()];
        first.sort_unstable();
        assert_eq!(first, [0, 1]);
        for job in 2..5 {
            pool.put(job).unwrap();
        }
        assert_eq!(pool.put(5), Err(5));
        assert!(begins.try_recv().is_err());
        for _ in 0..2 {
            release.send(()).unwrap();
        }
        let mut rest: Vec<_> = (2..5).map(|_| begins.recv_timeout(PROMPT).unwrap()).collect();
        rest.sort_unstable();
        assert_eq!(rest, [2, 3, 4]);
        pool.put(6).unwrap();
        assert_eq!(begins.recv_timeout(PROMPT).unwrap(), 6);
        assert!(pool.state().threads <= 2);
    }
}
