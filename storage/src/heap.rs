//! What the C library's allocator keeps of what it has been given back.

/// Heaps. Small pieces come from a thread's own cache and rarely need the heap's lock.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 1;
/// Free bytes at the end of a heap that are kept.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 1 << 20;
/// Larger pieces are mapped one by one and given back when freed: a heap that held a chunk
/// between small pieces would stay that large.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 128 << 10;

/// Keeps what the C library's allocator holds close to what is in use.
///
/// By default each of our many threads may get a heap of its own, and what one has freed is
/// not given to another: a read of a whole image left 50 MB behind where 10 were in use.
#[cfg(target_env = "gnu")]
pub fn keep_small() {
    for (parameter, value) in
        [(libc::M_ARENA_MAX, HEAPS), (libc::M_TRIM_THRESHOLD, KEPT), (libc::M_MMAP_THRESHOLD, MAPPED)]
    {
        // SAFETY: `mallopt` takes two integers and only changes the allocator's own settings.
        // An unknown setting is refused, which costs nothing but memory.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives the free pages of the heap back to the system.
#[cfg(target_env = "gnu")]
pub fn trim() {
    // SAFETY: takes an integer, and only gives back pages that hold nothing in use.
    unsafe { libc::malloc_trim(KEPT as libc::size_t) };
}

/// Other C libraries have no such settings.
#[cfg(not(target_env = "gnu"))]
pub fn keep_small() {}
#[cfg(not(target_env = "gnu"))]
pub fn trim() {}
