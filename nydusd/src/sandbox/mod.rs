//! The daemon parses what strangers send: bootstraps, registries' answers, requests of clients. Should one of them take
//! it over, it finds itself in a process that can do little.
//!
//! ```text
//!  nydusd fuse ── fork ──▶ broker        host's mount namespace, all rights, parses only `Request`s
//!       │                    ▲  opens files, admits directories, mounts and unmounts,
//!       │                    │  resolves names, binds the API's socket
//!       ▼                    │
//!  jail, fewer capabilities, Landlock, seccomp: the daemon, with the process id that its client knows
//! ```
//!
//! ```text
//!  protocol.rs      what is asked and answered           jail.rs          an empty root directory
//!  privileged.rs    the daemon's side                    capabilities.rs  what root keeps
//!  broker.rs        the process beside it                landlock.rs      what even root may not do to files
//!  pool.rs          its threads                          seccomp.rs       which system calls there are
//!  host.rs          what is done, and refused            refuse.rs        what a jail never gets
//!  place.rs         paths, looked up once
//!  socket.rs        the sockets that are listened on
//!  admit.rs         directories into the jail
//!  own.rs           what must not be among them
//! ```
//!
//! Each layer can be turned off, and a kernel or a privilege that is missing costs a layer and a warning, not the start.
//! `misc/docs/security.md` tells users of it.

mod admit;
mod broker;
mod capabilities;
mod host;
#[cfg(test)]
mod hostile;
mod jail;
mod landlock;
mod own;
pub(crate) mod place;
mod pool;
mod privileged;
mod protocol;
mod refuse;
mod seccomp;
mod socket;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;

pub use self::host::Places;
pub use self::privileged::Privileged;
pub(crate) use self::protocol::packed;
pub use self::socket::Socket;
use crate::cli::{Front, ServeArgs};
use crate::sys::{self, Disposition};

/// Set where there is a broker.
static OUTSIDE: OnceLock<Arc<Privileged>> = OnceLock::new();

/// A daemon that is not sandboxed yet.
#[derive(Debug)]
pub struct Sandbox {
    host: Privileged,
    /// Why there is no broker.
    missing: Option<String>,
}

/// Parts with what came from whoever started this process, which has one thread and has opened nothing: its descriptors
/// are no business of ours, and a SIGCHLD that it ignores would keep us from waiting for programs.
pub fn leave_launcher() {
    let parted = sys::close_all().and_then(|()| sys::handle(Signal::SIGCHLD, Disposition::Default));
    if let Err(e) = parted {
        // There is no log yet, nor need there be standard error.
        let _ = writeln!(io::stderr(), "Warning: what was open at the start stays open: {e}");
    }
}

impl Sandbox {
    /// Starts the broker. For a process that has one thread and has opened and read nothing yet.
    pub fn begin(front: &Front, args: &ServeArgs) -> Self {
        let global = &args.global;
        let places = Places {
            mountpoint: front.mountpoint().map(Path::to_owned),
            device: front.device().map(Path::to_owned),
            apisock: global.apisock.clone(),
            supervisor: global.supervisor.clone(),
            holder: global.holder.clone(),
            shared_dir: args.shared_dir.clone(),
            writable: front.is_writable(),
            admit: named(args),
        };
        let without = |places, missing| Self { host: Privileged::direct(places), missing };
        if args.sandbox.no_sandbox {
            return without(places, Some("--no-sandbox".to_owned()));
        }
        if !geteuid().is_root() {
            // Its own rights are few, and fusermount3 needs those that a sandboxed process can not get.
            return without(places, None);
        }
        match broker::start(places.clone(), global) {
            Ok(broker) => Self { host: Privileged::Broker(broker), missing: None },
            Err(e) => without(places, Some(format!("{e:#}"))),
        }
    }

    /// Confines this process, which still has one thread, as far as it is wanted and possible. What is not possible is
    /// logged.
    ///
    /// # Errors
    /// It was left half confined, where nothing can be served.
    pub fn enter(self, front: &Front, args: &ServeArgs) -> anyhow::Result<Arc<Privileged>> {
        let flags = &args.sandbox;
        let host = Arc::new(self.host);
        if !flags.core_dumps && !flags.no_sandbox {
            forbid_core_dumps();
        }
        if let Some(why) = self.missing {
            tracing::warn!("the daemon is not sandboxed: {why}");
        }
        let Privileged::Broker(broker) = &*host else { return Ok(host) };
        for path in &args.admit {
            if let Err(e) = path.metadata() {
                tracing::warn!(
                    "--admit {}: {e}; it admits nothing until that is there: make it, or give another path",
                    path.display()
                );
            }
        }
        let warn = |layer: &str, e: anyhow::Error| tracing::warn!("sandbox without {layer}: {e:#}");
        let mut layers = vec!["broker"];
        let mut has = |layer: &'static str, result: anyhow::Result<bool>| match result {
            Ok(true) => layers.push(layer),
            Ok(false) => {}
            Err(e) => warn(layer, e),
        };
        storage::outside::set(Arc::clone(&host) as Arc<dyn storage::outside::Outside>);
        let jailed = match flags.no_jail {
            true => Ok(false),
            false => jail::enter(broker)?.map(|()| true),
        };
        // Nobody set it before.
        let _ = OUTSIDE.set(Arc::clone(&host));
        if matches!(jailed, Ok(true)) {
            admit_log(&host, args);
        }
        has("jail", jailed);
        has("capabilities", capabilities::drop(front, args));
        has("landlock", if flags.no_landlock { Ok(false) } else { landlock::restrict(front, args) });
        has(
            "seccomp",
            if flags.no_seccomp {
                Ok(false)
            } else {
                seccomp::restrict(matches!(front, Front::Fuse(fuse) if fuse.fuse_io_uring))
            },
        );
        tracing::info!("sandboxed: {}", layers.join(", "));
        Ok(host)
    }
}

/// Directories that the command line has things kept in: its author's business.
fn named(args: &ServeArgs) -> Vec<PathBuf> {
    let image = &args.image;
    let whole = args.admit.iter().chain(&image.cache_dir).chain(&image.localfs_dir).cloned();
    whole.chain(args.dedup_db.as_deref().map(directory_of)).chain(log_directory(args)).collect()
}

fn directory_of(file: &Path) -> PathBuf {
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    directory.unwrap_or(Path::new(".")).to_owned()
}

/// A log that is rotated needs its directory.
fn log_directory(args: &ServeArgs) -> Option<PathBuf> {
    let global = &args.global;
    global.log_file.as_deref().filter(|_| global.log_rotation_size > 0).map(directory_of)
}

fn admit_log(host: &Privileged, args: &ServeArgs) {
    let Some(directory) = log_directory(args) else { return };
    if let Err(e) = host.admit(&directory, true) {
        tracing::warn!("the log is not rotated: {e:#}");
    }
}

/// What this process holds in memory, logins among it, is not written to a file when it crashes, nor shown to others of
/// its user.
fn forbid_core_dumps() {
    if let Err(e) = setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| nix::sys::prctl::set_dumpable(false))
    {
        tracing::warn!("core dumps are possible: {e}");
    }
}

/// Whom a sandboxed daemon asks for what it may not do or see itself.
pub(crate) fn outside() -> Option<&'static Privileged> {
    OUTSIDE.get().map(Arc::as_ref)
}
