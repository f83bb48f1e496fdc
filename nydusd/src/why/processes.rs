//! Who reads: processes by number and name.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::sandbox::Privileged;

/// Processes told apart; more are one.
const KEPT: usize = 4096;

/// Longest name the kernel keeps of a thread, with the newline behind it.
const NAME_LEN: usize = 16;

/// A thread as the kernel names it.
type Name = [u8; NAME_LEN];

/// Place of a process in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProcessIndex(pub u16);

/// One process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    /// Its number, which is its first thread's; 0 if that is unknown here.
    pub pid: u32,
    /// The reading thread's name; zeros if it was gone already.
    name: Name,
}

impl Process {
    /// Its name, empty if it is not known.
    pub fn name(&self) -> &[u8] {
        let end = self.name.iter().position(|byte| matches!(byte, 0 | b'\n')).unwrap_or(NAME_LEN);
        &self.name[..end]
    }
}

/// A thread whose name has been asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thread {
    tid: u32,
    name: Name,
}

impl Thread {
    /// Asks for the name of a thread: three system calls, or one request to the broker now and then.
    pub fn look_up(tid: u32) -> Self {
        use std::io::Read as _;
        let mut name = Name::default();
        // A jail has no other process in its `/proc`.
        if let Some(outside) = crate::sandbox::outside() {
            if tid != 0 {
                name = told(outside, tid);
            }
        } else if tid != 0
            && let Ok(mut file) = std::fs::File::open(format!("/proc/{tid}/comm"))
        {
            // A thread that ends meanwhile has no name.
            let _ = file.read(&mut name);
        }
        Self { tid, name }
    }
}

/// How long the name that was told of a thread holds: asking takes another process's time for each read that
/// waits, and a thread that runs another program has another name.
const TOLD_HOLDS: Duration = Duration::from_millis(20);

/// The name of a thread, as whoever is not in the jail tells it. Zeros if it has none.
fn told(outside: &Privileged, tid: u32) -> Name {
    const PLACES: usize = 16;
    static TOLD: Mutex<[Option<(u32, Instant, Name)>; PLACES]> = Mutex::new([None; PLACES]);
    let place = tid as usize % PLACES;
    let lock = || TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    if let Some((_, _, name)) =
        lock()[place].filter(|(of, at, _)| *of == tid && now.duration_since(*at) < TOLD_HOLDS)
    {
        return name;
    }
    let mut name = Name::default();
    let answer = outside.thread(tid).map(|(_, name)| name).unwrap_or_default();
    name.iter_mut().zip(answer).for_each(|(to, from)| *to = from);
    lock()[place] = Some((tid, now, name));
    name
}

/// Number of the process that a thread belongs to.
fn process_of(tid: u32) -> Option<u32> {
    if let Some(outside) = crate::sandbox::outside() {
        return outside.thread(tid)?.0;
    }
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// All processes that have waited.
#[derive(Debug, Default)]
pub(super) struct Processes {
    all: Vec<Process>,
    threads: HashMap<(u32, Name), ProcessIndex>,
}

impl Processes {
    /// The process of `thread`. The first time it is asked for its process's number.
    pub fn index(&mut self, thread: Thread) -> ProcessIndex {
        if let Some(index) = self.threads.get(&(thread.tid, thread.name)) {
            return *index;
        }
        if self.threads.len() >= KEPT {
            return self.insert(Process { pid: 0, name: *b"(many others)\0\0\0" });
        }
        let pid = process_of(thread.tid).unwrap_or(thread.tid);
        let index = self.insert(Process { pid, name: thread.name });
        self.threads.insert((thread.tid, thread.name), index);
        index
    }

    fn insert(&mut self, process: Process) -> ProcessIndex {
        let at = self.all.iter().position(|known| *known == process).unwrap_or_else(|| {
            self.all.push(process);
            self.all.len() - 1
        });
        // At most KEPT and one.
        ProcessIndex(u16::try_from(at).unwrap_or(u16::MAX))
    }

    /// The table that [`ProcessIndex`] points into.
    pub fn all(&self) -> &[Process] {
        &self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_a_process_are_one_if_they_share_a_name() {
        let mut processes = Processes::default();
        let own = nix::unistd::gettid().as_raw().cast_unsigned();
        let first = processes.index(Thread::look_up(own));
        assert_eq!(processes.index(Thread::look_up(own)), first);
        let process = processes.all()[usize::from(first.0)];
        assert_eq!(process.pid, std::process::id());
        assert!(!process.name().is_empty() && !process.name().contains(&b'\n'));
        let other = std::thread::Builder::new().name("reader".to_owned());
        let thread = other.spawn(|| {
            let tid = nix::unistd::gettid().as_raw().cast_unsigned();
            let thread = Thread::look_up(tid);
            (thread, process_of(tid))
        });
        let (thread, pid) = thread.unwrap().join().unwrap();
        assert_eq!((pid, &thread.name[..6]), (Some(std::process::id()), b"reader".as_slice()));
        // Nobody has this number: Linux counts to 2^22.
        let gone = processes.index(Thread::look_up(1 << 30));
        let gone = processes.all()[usize::from(gone.0)];
        assert_eq!((gone.pid, gone.name()), (1 << 30, b"".as_slice()));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut processes = Processes::default();
        for tid in 0..2 * KEPT as u32 {
            processes.index(Thread { tid: tid + (1 << 30), name: *b"many\0\0\0\0\0\0\0\0\0\0\0\0" });
        }
        assert_eq!(processes.all().len(), KEPT + 1);
    }
}
