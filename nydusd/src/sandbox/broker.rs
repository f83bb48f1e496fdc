//! The broker: a process that stays outside of the sandbox and does what its daemon may not.
//!
//! It comes from a fork before the daemon has read anything of anybody, keeps nothing open that the daemon opens, and
//! ends when the daemon does. One thread takes requests and waits for nothing else; others work on them, each
//! [`Kind`] in threads of its own: what hangs (a name server, a file server) holds up neither the mount's end nor that of
//! the broker.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use super::host::{Host, Places};
use super::pool::Pool;
use super::privileged::Broker;
use super::protocol::{self, Kind, MAX_DESCRIPTORS, Refusal, Reply, Request};
use crate::cli::GlobalArgs;
use crate::sys::{self, Disposition};
use crate::{limits, logging};

/// Threads for requests of each kind.
const URGENT: usize = 8;
const OWN: usize = 4;
const ATTRIBUTES: usize = 16;
const NAMED: usize = 64;
/// How many of a kind may wait for one: a part of the descriptors that this process may have.
const PART: u64 = 16;
const QUEUE: RangeInclusive<u64> = 64..=4096;
/// Until this process is looked at again for room for a message.
const FULL_PAUSE: Duration = Duration::from_millis(5);
/// What the kernel calls the process.
const NAME: &std::ffi::CStr = c"nydusd-broker";

/// Starts the broker of this process, which must have no other thread yet, and waits until it is ready. The broker comes
/// back from here only to end.
///
/// # Errors
/// The system refuses; there is no broker then.
pub(super) fn start(places: Places, global: &GlobalArgs) -> anyhow::Result<Broker> {
    let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let Some(child) = sys::fork().context("fork the broker")? else {
        drop(ours);
        std::process::exit(run(places, theirs, global))
    };
    drop(theirs);
    if let Err(e) = ready(&ours) {
        // What may be left of it is in nobody's way, and no zombie.
        let _ = kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
        return Err(e);
    }
    // The daemon has no other child, and waits for none: one that ends is gone. One that has ended before is waited for.
    sys::handle(Signal::SIGCHLD, Disposition::Ignored)?;
    let _ = waitpid(child, Some(WaitPidFlag::WNOHANG));
    Ok(Broker { socket: ours, process: process(child), directory })
}

/// Its end is seen through this, if the kernel has it.
fn process(child: Pid) -> Option<OwnedFd> {
    pidfd_open(rustix::process::Pid::from_raw(child.as_raw())?, PidfdFlags::empty()).ok()
}

/// Waits for the broker's first word.
fn ready(socket: &OwnedFd) -> anyhow::Result<()> {
    let (bytes, _) = protocol::receive(socket, None)?.context("the broker ended at once")?;
    match protocol::parse(&bytes)? {
        Reply::Failed(refusal) => Err(anyhow!(refusal)),
        _ => Ok(()),
    }
}

/// The broker's life, and its exit code.
fn run(places: Places, socket: OwnedFd, global: &GlobalArgs) -> i32 {
    let result = prepare(socket, global).and_then(|socket| {
        protocol::send(&socket, &Reply::Done, &[], None)?;
        serve(places, &socket)
    });
    match result {
        Ok(()) => 0,
        Err(e) => {
            // Nobody is left to tell when standard error is gone.
            let _ = writeln!(io::stderr(), "Error: the broker: {e:#}");
            1
        }
    }
}

fn prepare(socket: OwnedFd, global: &GlobalArgs) -> anyhow::Result<OwnedFd> {
    let socket = sys::keep_only(socket).context("close what the daemon has open")?;
    let prepare = || -> anyhow::Result<()> {
        let _ = nix::sys::prctl::set_name(NAME);
        // Its end is the daemon's end.
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            sys::handle(signal, Disposition::Unheeded)?;
        }
        super::forbid_core_dumps();
        logging::init_occasional(global)
    };
    if let Err(e) = prepare() {
        let refusal = Refusal::from(anyhow!("the broker: {e:#}"));
        protocol::send(&socket, &Reply::Failed(refusal), &[], None)?;
        return Err(e);
    }
    limits::raise_nofile(global.rlimit_nofile);
    Ok(socket)
}

/// A request, and where its answer goes.
#[derive(Debug)]
struct Job {
    request: Request,
    descriptors: Vec<OwnedFd>,
    answer_to: OwnedFd,
}

/// How many requests of a kind may wait.
fn queue() -> anyhow::Result<usize> {
    let (most, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(usize::try_from((most / PART).clamp(*QUEUE.start(), *QUEUE.end()))?)
}

/// Takes requests until the daemon ends.
fn serve(places: Places, socket: &OwnedFd) -> anyhow::Result<()> {
    let host = Arc::new(Host::new(places));
    let queue = queue()?;
    let pool = |threads| {
        let host = Arc::clone(&host);
        Pool::new(threads, queue, move |job: Job| {
            let answer = host.answer(job.request, job.descriptors);
            give(&job.answer_to, answer.unwrap_or_else(|refusal| (Reply::Failed(refusal), None)));
        })
    };
    let (urgent, own) = (pool(URGENT), pool(OWN));
    let (attributes, named) = (pool(ATTRIBUTES), pool(NAMED));
    let mut reserve = Reserve::default();
    loop {
        reserve.take();
        let Some((bytes, descriptors)) = reserve.receive(socket).context("read a request")? else {
            return Ok(());
        };
        let job = match read(&bytes, descriptors) {
            Ok(Some(job)) => job,
            // Whoever asked sees that nobody answers.
            Ok(None) => {
                tracing::warn!("the daemon sent what is no request, or there was no room for its answer");
                continue;
            }
            Err((answer_to, e)) => {
                tracing::warn!("the daemon sent what is no request: {e}");
                give(&answer_to, (Reply::Failed(anyhow!(e).into()), None));
                continue;
            }
        };
        let pool = match job.request.kind() {
            Kind::Urgent => &urgent,
            Kind::Own => &own,
            Kind::Attributes => &attributes,
            Kind::Named => &named,
        };
        if let Err(job) = pool.put(job) {
            give(&job.answer_to, (Reply::Failed(anyhow!("the broker has too much to do").into()), None));
        }
    }
}

/// What a message asks for; `None` if nobody is to be answered.
fn read(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Option<Job>, (OwnedFd, io::Error)> {
    let count = descriptors.len();
    let mut descriptors = descriptors.into_iter();
    let Some(answer_to) = descriptors.next() else { return Ok(None) };
    if count > MAX_DESCRIPTORS {
        return Err((answer_to, io::Error::new(io::ErrorKind::InvalidData, format!("{count} descriptors"))));
    }
    match protocol::parse(bytes) {
        Ok(request) => Ok(Some(Job { request, descriptors: descriptors.collect(), answer_to })),
        Err(e) => Err((answer_to, e)),
    }
}

/// Answers, unless nobody has room for that: who asks has.
fn give(answer_to: &OwnedFd, (reply, descriptor): (Reply, Option<OwnedFd>)) {
    let descriptors: Vec<_> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
    if let Err(e) = protocol::send(answer_to, &reply, &descriptors, Some(Instant::now())) {
        // Whoever asked may be gone.
        tracing::debug!("answer: {e}");
    }
}

/// One descriptor more than a message brings: room for any, and for what shows that one brings too many, when all that
/// this process may have open is used up.
#[derive(Default)]
struct Reserve(Vec<File>);

impl Reserve {
    /// As far as there are any.
    fn take(&mut self) {
        while self.0.len() <= MAX_DESCRIPTORS {
            let Ok(another) = File::open("/dev/null") else { return };
            self.0.push(another);
        }
    }

    /// Receives a message; `None` at the end of the connection. One that there is no room for stays where it is until
    /// there is: threads that end their work may have taken what was given up.
    fn receive(&mut self, socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        loop {
            let (bytes, descriptors, is_cut) = match protocol::peek(socket)? {
                Some((bytes, received)) => (bytes, received.descriptors, received.is_cut),
                None => return Ok(None),
            };
            // One that brings too many is refused, all there or not.
            if !is_cut || descriptors.len() > MAX_DESCRIPTORS {
                protocol::discard(socket)?;
                return Ok(Some((bytes, descriptors)));
            }
            drop(descriptors);
            if self.0.is_empty() {
                std::thread::sleep(FULL_PAUSE);
            }
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, RawFd};

    use nix::sys::resource::setrlimit;
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

    use super::super::socket::Socket;
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// A broker in a thread, and what speaks to it.
    fn broker() -> (Broker, std::thread::JoinHandle<anyhow::Result<()>>) {
        broker_at(Places::default())
    }

    fn broker_at(places: Places) -> (Broker, std::thread::JoinHandle<anyhow::Result<()>>) {
        let (ours, theirs) = pair();
        let thread = std::thread::spawn(move || serve(places, &theirs));
        (Broker { socket: ours, process: None, directory: "/".into() }, thread)
    }

    fn raw(to: &Broker, bytes: &[u8], descriptors: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &rights[..0] } else { &rights[..] };
        let parts = [io::IoSlice::new(bytes)];
        sendmsg::<UnixAddr>(to.socket.as_raw_fd(), &parts, control, MsgFlags::empty(), None).unwrap();
    }

    fn answer(to: &OwnedFd) -> Option<Reply> {
        let (bytes, _) = protocol::receive(to, None).unwrap()?;
        Some(protocol::parse(&bytes).unwrap())
    }

    #[test]
    fn hostile_messages_are_refused_and_the_next_is_answered() {
        let (broker, thread) = broker();
        let whole = serde_json::to_vec(&Request::SocketCheck(Socket::Api)).unwrap();
        let long = vec![b' '; protocol::MAX_MESSAGE + 100];
        let garbage: &[&[u8]] = &[b"\xff\0", b"{}", b"\"Nothing\"", b"{\"Open\":{\"path\":7}}", &long];
        for message in garbage {
            raw(&broker, message, &[]);
            let (ours, theirs) = pair();
            raw(&broker, message, &[theirs.as_raw_fd()]);
            drop(theirs);
            assert!(matches!(answer(&ours), Some(Reply::Failed(_))), "{message:?}");
        }
        // Nowhere to answer to: what is no socket, and nothing at all.
        raw(&broker, &whole, &[]);
        let null = File::open("/dev/null").unwrap();
        raw(&broker, &whole, &[null.as_raw_fd()]);
        // As many descriptors as a message takes.
        let (ours, theirs) = pair();
        raw(&broker, &whole, &[theirs.as_raw_fd(); 253]);
        drop(theirs);
        let Some(Reply::Failed(refusal)) = answer(&ours) else { panic!("253 descriptors were taken") };
        assert!(refusal.message.contains("253 descriptors"), "{refusal}");
        // A jail of what is none, and attributes of nothing.
        let refused = broker.ask(&Request::Jail, &[null.as_fd(), null.as_fd()]).unwrap();
        assert!(matches!(refused.0, Reply::Failed(_)), "{refused:?}");
        // An answer that nobody has room for holds nobody up.
        let (ours, theirs) = pair();
        while protocol::send(&theirs, &Request::Abort, &[], Some(Instant::now())).is_ok() {}
        raw(&broker, &whole, &[theirs.as_raw_fd()]);
        assert_eq!(broker.ask(&Request::SocketCheck(Socket::Api), &[]).unwrap().0, Reply::Yes(false));
        drop((ours, theirs, broker));
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn hundreds_of_requests_at_once_are_all_answered() {
        let (broker, thread) = broker();
        let request = serde_json::to_vec(&Request::Open { path: "/dev/null".into(), device: false }).unwrap();
        let waiting: Vec<_> = (0..300)
            .map(|_| {
                let (ours, theirs) = pair();
                raw(&broker, &request, &[theirs.as_raw_fd()]);
                ours
            })
            .collect();
        let mut served = 0;
        for socket in &waiting {
            let Some(Reply::Failed(refusal)) = answer(socket) else { panic!("no answer, or another") };
            match refusal.message.as_str() {
                "not a regular file" => served += 1,
                "the broker has too much to do" => assert_eq!(refusal.errno, None),
                _ => panic!("{refusal}"),
            }
        }
        let least = queue().unwrap().min(waiting.len());
        assert!(served >= least, "{served} of {} were served, {least} could wait", waiting.len());
        drop(broker);
        thread.join().unwrap().unwrap();
    }

    /// A mount that nobody serves stands for a file server that does not answer.
    #[test]
    fn what_strangers_name_holds_the_daemons_own_up_nowhere() {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/fuse").exists() {
            return eprintln!("skipped: needs root and /dev/fuse");
        }
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().canonicalize().unwrap();
        let [mountpoint, other] = ["hung", "other"].map(|name| {
            std::fs::create_dir(dir.join(name)).unwrap();
            dir.join(name)
        });
        let (hung, hung_thread) =
            broker_at(Places { mountpoint: Some(mountpoint.clone()), ..Places::default() });
        let (_, connection) = hung.ask(&Request::Mount { writable: false }, &[]).unwrap();
        let apisock = Some(dir.join("api.sock"));
        let (broker, thread) = broker_at(Places { mountpoint: Some(other), apisock, ..Places::default() });
        let open = Request::Open { path: mountpoint.join("file").into(), device: false };
        let open = serde_json::to_vec(&open).unwrap();
        let waiting: Vec<_> = (0..NAMED)
            .map(|_| {
                let (ours, theirs) = pair();
                raw(&broker, &open, &[theirs.as_raw_fd()]);
                ours
            })
            .collect();
        let answers: Vec<_> = [
            Request::SocketCheck(Socket::Api),
            Request::SocketBind(Socket::Api),
            Request::Usable,
            Request::IsListed,
        ]
        .into_iter()
        .map(|request| {
            let (ours, theirs) = pair();
            raw(&broker, &serde_json::to_vec(&request).unwrap(), &[theirs.as_raw_fd()]);
            protocol::receive(&ours, Some(Instant::now() + Duration::from_secs(10)))
        })
        .collect();
        let unmounted = hung.ask(&Request::Abort, &[]).and(hung.ask(&Request::Unmount { ended: true }, &[]));
        drop(connection);
        for answer in answers {
            let (bytes, _) = answer.unwrap().unwrap();
            assert!(!matches!(protocol::parse(&bytes).unwrap(), Reply::Failed(_)), "{bytes:?}");
        }
        assert_eq!(unmounted.unwrap().0, Reply::Done);
        assert!(waiting.iter().all(|socket| matches!(answer(socket), Some(Reply::Failed(_)))));
        drop((broker, hung));
        thread.join().unwrap().unwrap();
        hung_thread.join().unwrap().unwrap();
    }

    /// Of a process of its own, which has nothing left to open.
    #[test]
    fn a_message_without_room_waits_for_it() {
        const ALONE: &str = "NYDUS_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let name = "sandbox::broker::tests::a_message_without_room_waits_for_it";
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let status = alone.args([name, "--exact"]).env(ALONE, "1").status().unwrap();
            assert!(status.success(), "{status}");
            return;
        }
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        let (ours, theirs) = pair();
        let null = File::open("/dev/null").unwrap();
        let send = || {
            let descriptors = [null.as_raw_fd(); MAX_DESCRIPTORS];
            protocol::send(&ours, &Request::Abort, &descriptors, None).unwrap();
        };
        let fill = || std::iter::from_fn(|| null.try_clone().ok()).collect::<Vec<_>>();
        let mut reserve = Reserve::default();
        reserve.take();
        let rest = fill();
        send();
        let (bytes, descriptors) = reserve.receive(&theirs).unwrap().unwrap();
        assert_eq!(protocol::parse::<Request>(&bytes).unwrap(), Request::Abort);
        assert_eq!(descriptors.len(), MAX_DESCRIPTORS);
        // Others were faster.
        send();
        std::thread::scope(|scope| {
            let received = scope.spawn(|| reserve.receive(&theirs).unwrap().unwrap().1.len());
            drop(descriptors);
            drop(rest);
            assert_eq!(received.join().unwrap(), MAX_DESCRIPTORS);
        });
        drop(ours);
        assert!(reserve.receive(&theirs).unwrap().is_none());
    }

    #[test]
    fn a_broker_that_never_began_says_why() {
        let (ours, theirs) = pair();
        let refusal = Refusal { message: "no log".into(), errno: None };
        protocol::send(&theirs, &Reply::Failed(refusal), &[], None).unwrap();
        assert_eq!(ready(&ours).unwrap_err().to_string(), "no log");
        drop(theirs);
        assert_eq!(ready(&ours).unwrap_err().to_string(), "the broker ended at once");
        let (ours, theirs) = pair();
        protocol::send(&theirs, &Reply::Done, &[], None).unwrap();
        ready(&ours).unwrap();
    }
}
