//! How the kernel lets the threads of a build take turns.
//!
//! A build has more threads than processors, and they are not alike: a layer has one reader, which no other can
//! help, while hashing and compressing is any worker's business. Whoever holds the reader up has nothing to do
//! soon after. Both settings together take 5 % of the time of converting the python image on two processors.

/// What workers step back by. Readers and the committer run whenever they can, and stop when the buffers are full.
const STEP: i32 = 5;

/// Lets each thread of this process that will be started, and this one, run on while others wake: nobody waits for
/// an answer of a build. Left alone if the user has chosen how it is scheduled.
#[expect(unsafe_code, reason = "policies have the C interface only")]
pub fn run_as_batch() {
    // SAFETY: takes an integer, 0 for this thread, and only tells.
    let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
    if policy != libc::c_long::from(libc::SCHED_OTHER) {
        return;
    }
    let priority: libc::c_int = 0;
    // SAFETY: reads one structure, whose only field Linux has is this integer, and changes this thread's turns only.
    // Refused, they stay as they are, which costs nothing but time.
    unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_BATCH, &raw const priority) };
}

/// Lets the threads that this one works for run first.
pub(crate) fn step_back() {
    // Refused, turns are as they were.
    let _ = rustix::process::nice(STEP);
}
