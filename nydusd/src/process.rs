//! What the kernel tells of a process.

use nix::unistd::Pid;

/// True if the first thread of a process has ended, whatever the others do.
pub(crate) fn has_ended(process: Pid) -> bool {
    // Its name, in brackets, may hold anything.
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}
