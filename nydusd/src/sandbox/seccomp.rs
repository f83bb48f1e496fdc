//! The system calls that there are. Any other is refused with EPERM.
//!
//! Not among them: what starts programs or processes, signals others or looks into them, mounts, makes or enters namespaces, loads into the
//! kernel, or changes the machine.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Files, by any way but executing them.
const FILES: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_getcwd,
    libc::SYS_umask,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_memfd_create,
    SYS_FCHMODAT2,
];
/// Newer than the C library's list.
const SYS_FCHMODAT2: c_long = 452;

/// Waiting, and being told.
const EVENTS: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_restart_syscall,
];

/// Memory and threads.
const PROCESS: &[c_long] = &[
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_clone3,
    libc::SYS_membarrier,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capget,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_setpriority,
    libc::SYS_getpriority,
    libc::SYS_ioprio_set,
];

/// Sockets, of the kinds that [`SOCKETS`] has.
const NETWORK: &[c_long] = &[
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
];

/// Those that newer architectures have under other names only.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_creat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_unlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_mknod,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utimes,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_time,
    libc::SYS_getpgrp,
    libc::SYS_arch_prctl,
    libc::SYS_getdents,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// FUSE over io_uring, where it is asked for: what goes through a ring goes through no filter.
const RINGS: &[c_long] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Kinds of sockets. The C library asks the kernel for addresses of this machine by the last. Others are connected to unix
/// sockets by the broker.
const SOCKETS: [i32; 3] = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Namespaces that `clone` makes.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// What threads may say of themselves: nothing that ends a layer of the sandbox.
const SAYINGS: [i32; 7] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_GET_SECUREBITS,
    libc::PR_GET_DUMPABLE,
    libc::PR_CAPBSET_READ,
    libc::PR_SET_VMA,
    libc::PR_SET_TIMERSLACK,
];

/// What is asked of files and sockets beyond reading and writing: another channel of a FUSE connection, whether to wait,
/// how much is there, whether it is a terminal, and that programs do not get it.
const REQUESTS: [u64; 5] = [FUSE_DEV_IOC_CLONE, libc::FIONBIO, libc::FIONREAD, libc::TCGETS, libc::FIOCLEX];
/// `_IOR(229, 0, u32)`, from linux/fuse.h.
const FUSE_DEV_IOC_CLONE: u64 = 0x8004_e500;

/// What has the kernel send signals to others, or other signals.
const OWNERS: [i32; 3] = [libc::F_SETOWN, F_SETOWN_EX, F_SETSIG];
/// From linux/fcntl.h, on every architecture that there are filters for.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// Confines this process and the threads that it will start.
///
/// # Errors
/// This kernel has no filters, or refuses.
pub(super) fn restrict(rings: bool) -> anyhow::Result<bool> {
    // One that refuses outdoes one that allows. The C library goes on with clone, whose flags can be seen, if the kernel
    // seems not to have clone3.
    seccompiler::apply_filter(&absent()?)?;
    seccompiler::apply_filter(&allowed(rings)?)?;
    Ok(true)
}

fn allowed(rings: bool) -> anyhow::Result<BpfProgram> {
    let families = [FILES, EVENTS, PROCESS, NETWORK, OLDER, if rings { RINGS } else { &[] }];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        families.concat().into_iter().map(|number| (number, Vec::new())).collect();
    let one_of = |argument, values: &[i32]| -> anyhow::Result<Vec<SeccompRule>> {
        values.iter().map(|value| rule(vec![low(argument, SeccompCmpOp::Eq, *value)?])).collect()
    };
    rules.insert(libc::SYS_socket, one_of(0, &SOCKETS)?);
    rules.insert(libc::SYS_prctl, one_of(0, &SAYINGS)?);
    // A thread's own umask and working directory.
    rules.insert(libc::SYS_unshare, one_of(0, &[libc::CLONE_FS])?);
    // Threads, and no processes: what is left behind would be in nobody's way but ours.
    let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
    let spaces = u64::from(NAMESPACES.cast_unsigned());
    let clone = low(0, SeccompCmpOp::MaskedEq(thread | spaces), libc::CLONE_THREAD)?;
    rules.insert(libc::SYS_clone, vec![rule(vec![clone])?]);
    // Signals go to this process.
    let own = std::process::id().cast_signed();
    for number in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(number, one_of(0, &[own])?);
    }
    let own = OWNERS.map(|command| low(1, SeccompCmpOp::Ne, command));
    rules.insert(libc::SYS_fcntl, vec![rule(own.into_iter().collect::<anyhow::Result<_>>()?)?]);
    // Limits are looked at, of this process alone, and not changed.
    let look =
        [0, 2].map(|argument| SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0));
    rules.insert(libc::SYS_prlimit64, vec![rule(look.into_iter().collect::<Result<_, _>>()?)?]);
    let requests = REQUESTS.map(|number| {
        let is = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number)?;
        rule(vec![is])
    });
    rules.insert(libc::SYS_ioctl, requests.into_iter().collect::<anyhow::Result<_>>()?);
    compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn absent() -> anyhow::Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> anyhow::Result<BpfProgram> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, others, these, architecture)?.try_into()?)
}

fn rule(conditions: Vec<SeccompCondition>) -> anyhow::Result<SeccompRule> {
    Ok(SeccompRule::new(conditions)?)
}

/// About the low half of an argument, which is all of an `int`.
fn low(argument: u8, operator: SeccompCmpOp, value: i32) -> anyhow::Result<SeccompCondition> {
    let value = u64::from(value.cast_unsigned());
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::AsFd as _;
    use std::process::Command;

    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::signal::kill;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket, socketpair};
    use nix::unistd::{getpid, getppid};

    use super::*;
    use crate::sys;

    /// A filter is a thread's, and that of those it starts.
    fn confined<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        let run = || {
            restrict(false).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    #[test]
    fn neither_programs_nor_processes_are_started() {
        confined(|| {
            let refused = Command::new("/bin/true").status().unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
        });
        assert!(Command::new("/bin/true").status().unwrap().success());
    }

    #[test]
    fn neither_signals_nor_sockets_reach_other_processes() {
        confined(|| {
            kill(getpid(), None).unwrap();
            for other in [getppid(), nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(-1)] {
                assert_eq!(kill(other, None), Err(Errno::EPERM), "{other}");
            }
            let (ours, _theirs) =
                socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()).unwrap();
            fcntl(&ours, FcntlArg::F_GETFL).unwrap();
            assert_eq!(sys::disown(ours.as_fd()), Err(Errno::EPERM));
            let unix = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None);
            assert_eq!(unix.map(drop), Err(Errno::EPERM));
            socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
        });
    }
}
