//! The broker: a process that stays outside of the sandbox and does what its daemon may not.
//!
//! It comes from a fork before the daemon has read anything of anybody, keeps nothing open that the daemon opens, and
//! ends when the daemon does. Each request has a thread, for some wait: a name server, a mount that is busy.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::Context as _;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::host::{Host, Places};
use super::privileged::Broker;
use super::protocol::{self, Reply, Request};
use crate::cli::GlobalArgs;
use crate::{logging, sys};

/// Requests that are worked on at once; more wait.
const AT_ONCE: usize = 64;
/// Stack of a thread that works on one: modules that resolve names are not ours.
const STACK_SIZE: usize = 1 << 20;
/// What the kernel calls the process.
const NAME: &std::ffi::CStr = c"nydusd-broker";

/// Starts the broker of this process, which must have no other thread yet. The broker comes back from here only to end.
///
/// # Errors
/// The system refuses; there is no broker then.
pub(super) fn start(places: Places, global: &GlobalArgs) -> anyhow::Result<Broker> {
    let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    if !sys::fork().context("fork the broker")? {
        // It has no other child, and waits for none: one that ends is gone.
        sys::handle(Signal::SIGCHLD, SigHandler::SigIgn)?;
        return Ok(Broker { socket: ours, directory });
    }
    drop(ours);
    let code = match serve(places, theirs, global) {
        Ok(()) => 0,
        Err(e) => {
            // Nobody is left to tell when standard error is gone.
            let _ = writeln!(std::io::stderr(), "Error: the broker: {e:#}");
            1
        }
    };
    std::process::exit(code)
}

fn serve(places: Places, socket: OwnedFd, global: &GlobalArgs) -> anyhow::Result<()> {
    let socket = sys::keep_only(socket).context("close what the daemon has open")?;
    let _ = nix::sys::prctl::set_name(NAME);
    // Its end is the daemon's end.
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        sys::handle(signal, SigHandler::SigIgn)?;
    }
    super::forbid_core_dumps();
    logging::init_occasional(global)?;
    let host = Arc::new(Host::new(places));
    let places = Arc::new(Room::default());
    while let Some((bytes, descriptors)) = protocol::receive(&socket).context("read a request")? {
        let mut descriptors = descriptors.into_iter();
        let Some(answer_to) = descriptors.next() else { continue };
        let request = match protocol::parse::<Request>(&bytes) {
            Ok(request) => request,
            Err(e) => {
                tracing::warn!("the daemon sent what is no request: {e}");
                continue;
            }
        };
        let rest: Vec<OwnedFd> = descriptors.collect();
        // No wait in it, and there may be one for each read.
        if matches!(request, Request::Thread { .. } | Request::Xattr(_)) {
            answer(&host, request, rest, &answer_to);
            continue;
        }
        let (host, place) = (Arc::clone(&host), places.enter());
        let work = move || {
            answer(&host, request, rest, &answer_to);
            drop(place);
        };
        let thread = std::thread::Builder::new().name("broker".to_owned()).stack_size(STACK_SIZE);
        // Without a thread the daemon sees the end of the connection for its answer.
        if let Err(e) = thread.spawn(work) {
            tracing::warn!("start a thread: {e}");
        }
    }
    Ok(())
}

fn answer(host: &Host, request: Request, descriptors: Vec<OwnedFd>, answer_to: &OwnedFd) {
    use std::os::fd::AsRawFd as _;
    let (reply, descriptor) = match host.answer(request, descriptors) {
        Ok(answer) => answer,
        Err(refusal) => (Reply::Failed(refusal), None),
    };
    let descriptors: Vec<_> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
    if let Err(e) = protocol::send(answer_to, &reply, &descriptors) {
        // Whoever asked may be gone.
        tracing::debug!("answer: {e}");
    }
}

/// How many may work at once.
#[derive(Default)]
struct Room {
    inside: Mutex<usize>,
    left: Condvar,
}

/// A place among them.
struct Place(Arc<Room>);

impl Room {
    /// Waits for one.
    fn enter(self: &Arc<Self>) -> Place {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = self.left.wait_while(inside, |inside| *inside >= AT_ONCE);
        *inside.unwrap_or_else(PoisonError::into_inner) += 1;
        Place(Arc::clone(self))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.left.notify_one();
    }
}
