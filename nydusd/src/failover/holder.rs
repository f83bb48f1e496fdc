//! `nydusd supervise`: the small process that outlives the daemon.
//!
//! It starts the daemon as its child and keeps what that saves: the descriptor of the FUSE
//! connection, and the state. Should the child be gone while the mount is not, whatever the reason,
//! another one is started at once and takes the mount over: readers wait for some tens of
//! milliseconds. So a daemon is upgraded by replacing the program's file and sending SIGHUP.
//!
//! ```text
//!  supervise ── starts, listens ──▶ nydusd fuse … --holder SOCKET [--upgrade]
//!      │                                │ at its start, and after every change
//!      ◀── descriptor, state ───────────┘
//! ```
//!
//! A child that was killed may leave a thread behind, which tells the kernel of a change and waits for somebody who
//! waits for the child's answer: only a successor can give that. The kernel reports such a child to nobody before, so
//! the holder looks whether its first thread has ended.
//!
//! It ends when the mount is gone, with the child's exit code; SIGTERM and SIGINT make the child
//! unmount and end first. The child does not depend on it: should the holder be killed, the child
//! serves on, but nobody takes over from it. It neither reads images nor speaks to anybody but its
//! child, and has one thread.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal as SignalNumber, kill};
use nix::unistd::Pid;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use super::directory::{Directory, SOCKET};
use super::{state, supervisor};
use crate::cli::{GlobalArgs, SuperviseArgs};
use crate::transport::mounted;
use crate::transport::seat::Seat;
use crate::{logging, process};

/// A child that failed by itself and lived shorter than this is not replaced at once.
const SHORT_LIFE: Duration = Duration::from_secs(2);
/// Longest wait before another child is started.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The same where the last one did not fail by itself: somebody killed it, or told it to end.
const LONGEST_PAUSE_KILLED: Duration = Duration::from_millis(250);
/// First such wait; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How often the holder looks whether the child is dead without being reported. What is dead at two looks is stuck.
const LOOK: Duration = Duration::from_millis(500);
/// How long a child that was told to end may take. It needs less than a second.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Runs to the end of the mount and answers the exit code.
pub fn run(args: &SuperviseArgs) -> i32 {
    let child = args.child().unwrap_or_else(|e| e.exit());
    // The log file is the child's.
    if let Err(e) = logging::init(&GlobalArgs { log_file: None, ..child.serve.global.clone() }) {
        logging::print_failure(&e);
        return 1;
    }
    let hold = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mountpoint = child.front.mountpoint.clone();
        runtime.block_on(async { Holder::new(args.arguments.clone(), mountpoint)?.run().await })
    };
    hold().unwrap_or_else(|e| {
        logging::print_failure(&e);
        1
    })
}

/// What a child saved.
struct Saved {
    state: Vec<u8>,
    descriptor: OwnedFd,
    /// Its mount.
    seat: Seat,
}

impl Saved {
    /// True if the connection has ended, so that nobody can serve it.
    fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.descriptor.as_fd(), PollFlags::empty())];
        poll(&mut ended, PollTimeout::ZERO).is_ok()
            && ended[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
    }

    /// True if there is a mount to be taken over.
    fn lives(&self) -> bool {
        !self.has_ended() && !self.seat.wait_gone(Duration::ZERO).unwrap_or(false)
    }
}

struct Holder {
    /// Found once: the file may be replaced by a later release.
    program: PathBuf,
    arguments: Vec<OsString>,
    mountpoint: PathBuf,
    socket: PathBuf,
    listener: UnixListener,
    /// Holds the socket.
    _directory: Directory,
    saved: Option<Saved>,
    /// The next connection of the child is for taking, not for saving.
    takes: bool,
    /// The child has taken or saved, so it handles signals.
    met: bool,
    /// Children that are dead but for a thread that waits in the kernel.
    unreaped: Vec<Child>,
}

/// How a child ended that is to be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// After some time, whatever the reason.
    Lasted,
    /// Soon, by somebody else's doing: no sign that the next one will fare no better, unless it is done again, by a
    /// limit of memory perhaps.
    Killed,
    /// Soon, by itself, or it could not be started.
    Failed,
}

/// Waits between children: twice as long each time, until one lasts.
#[derive(Debug)]
struct Pauses {
    next: Duration,
    /// The last child was replaced without a pause although it did not live long.
    spared: bool,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next: FIRST_PAUSE, spared: false }
    }
}

impl Pauses {
    /// How long to wait for the next child; `None` if it is to come at once.
    fn after(&mut self, end: Ended) -> Option<Duration> {
        if end == Ended::Lasted || (end == Ended::Killed && !self.spared) {
            *self = Self { next: FIRST_PAUSE, spared: end == Ended::Killed };
            return None;
        }
        let longest = if end == Ended::Killed { LONGEST_PAUSE_KILLED } else { LONGEST_PAUSE };
        let pause = self.next.min(longest);
        self.next = pause * 2;
        Some(pause)
    }
}

/// Signals that concern the holder.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    child: Signal,
    hangup: Signal,
}

impl Holder {
    fn new(arguments: Vec<OsString>, mountpoint: PathBuf) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let directory = Directory::make(&std::env::temp_dir()).context("make a directory for the socket")?;
        let socket = directory.path().join(SOCKET);
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("listen at {}", socket.display()))?;
        // Not asked later, when it may be the mount of a daemon that is gone.
        let mountpoint = mounted::resolve(&mountpoint)
            .with_context(|| format!("the mountpoint {}", mountpoint.display()))?;
        Ok(Self {
            program,
            arguments,
            mountpoint,
            socket,
            listener,
            _directory: directory,
            saved: None,
            takes: false,
            met: false,
            unreaped: Vec::new(),
        })
    }

    fn start(&mut self) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("--holder").arg(&self.socket).stdin(Stdio::null());
        self.takes = self.saved.is_some();
        self.met = false;
        if self.takes {
            command.arg("--upgrade");
        }
        let child = command.spawn().with_context(|| format!("start {}", self.program.display()))?;
        tracing::info!("nydusd is process {}", child.id());
        Ok(child)
    }

    /// Starts children until one ends and the mount with it; the exit code.
    async fn run(mut self) -> anyhow::Result<i32> {
        let mut signals = Signals {
            terminate: signal(SignalKind::terminate()).context("catch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("catch SIGINT")?,
            child: signal(SignalKind::child()).context("catch SIGCHLD")?,
            hangup: signal(SignalKind::hangup()).context("catch SIGHUP")?,
        };
        let mut pauses = Pauses::default();
        loop {
            let began = Instant::now();
            let ended = match self.start() {
                Ok(child) => Some(self.watch(child, &mut signals).await?),
                // The file may be about to be replaced.
                Err(e) if self.saved.is_some() => {
                    tracing::error!("{e:#}");
                    None
                }
                Err(e) => return Err(e),
            };
            let mut end = Ended::Failed;
            if let Some((status, told)) = ended {
                self.drain();
                if told || !self.mount_lives() {
                    return self.end(status, told);
                }
                if status.success() {
                    // By SIGHUP or the API.
                    tracing::info!("nydusd ended as it was told to; another one takes its mount over");
                } else {
                    tracing::warn!("nydusd ended ({status}) and its mount did not; another one takes over");
                }
                end = match status.signal() == Some(libc::SIGKILL) || status.success() {
                    _ if began.elapsed() >= SHORT_LIFE => Ended::Lasted,
                    true => Ended::Killed,
                    false => Ended::Failed,
                };
            }
            let Some(pause) = pauses.after(end) else { continue };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = signals.terminate.recv() => return self.unmount().map(|()| 0),
                _ = signals.interrupt.recv() => return self.unmount().map(|()| 0),
            }
        }
    }

    /// Serves the child until it ends; its status, and whether it was told to end.
    async fn watch(&mut self, mut child: Child, signals: &mut Signals) -> anyhow::Result<(ExitStatus, bool)> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut deadline = None;
        let (mut end, mut is_told) = (false, false);
        let mut hangs_up = false;
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_dead = false;
        self.unreaped.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        loop {
            if std::mem::take(&mut end) && !is_told {
                is_told = true;
                tell(pid, SignalNumber::SIGTERM);
                deadline = Some(tokio::time::Instant::now() + END_LIMIT);
            }
            // Before its first exchange it need not handle the signal, which would kill it.
            if hangs_up && self.met {
                hangs_up = false;
                tell(pid, SignalNumber::SIGHUP);
            }
            if let Some(status) = child.try_wait().context("wait for nydusd")? {
                return Ok((status, is_told));
            }
            let limit = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => self.exchange(stream),
                    Err(e) => tracing::warn!("accept: {e}"),
                },
                _ = looks.tick() => {
                    let was_dead = std::mem::replace(&mut is_dead, process::has_ended(pid));
                    if !(was_dead && is_dead) || child.try_wait().context("wait for nydusd")?.is_some() {
                        continue;
                    }
                    tracing::warn!("nydusd is dead, but for a thread that waits for what it has not answered");
                    if is_told {
                        // Nobody will answer that.
                        self.abort()?;
                        is_dead = false;
                        continue;
                    }
                    self.unreaped.push(child);
                    return Ok((ExitStatus::from_raw(libc::SIGKILL), is_told));
                }
                _ = signals.child.recv() => {}
                _ = signals.terminate.recv() => end = true,
                _ = signals.interrupt.recv() => end = true,
                _ = signals.hangup.recv() => hangs_up = true,
                () = limit => {
                    tracing::error!("nydusd does not end within {END_LIMIT:?} and is killed");
                    deadline = None;
                    child.kill().context("kill nydusd")?;
                }
            }
        }
    }

    /// One connection of the child. Blocks for the time-outs of [`supervisor`] at most.
    fn exchange(&mut self, stream: UnixStream) {
        let result = match stream.into_std().and_then(|stream| stream.set_nonblocking(false).map(|()| stream))
        {
            Ok(stream) if self.takes => self.give(stream),
            Ok(stream) => self.take(stream),
            Err(e) => Err(e.into()),
        };
        if let Err(e) = result {
            tracing::warn!("an exchange with nydusd failed: {e:#}");
        }
    }

    fn give(&mut self, stream: std::os::unix::net::UnixStream) -> anyhow::Result<()> {
        self.takes = false;
        let Some(saved) = &self.saved else { bail!("nothing was saved") };
        supervisor::send(stream, &saved.state, saved.descriptor.as_fd())?;
        self.met = true;
        Ok(())
    }

    fn take(&mut self, stream: std::os::unix::net::UnixStream) -> anyhow::Result<()> {
        let (state, descriptor) = supervisor::receive(stream)?;
        // A child that is killed meanwhile sends a part, which is worth less than what is there.
        let number = state::verify(&state).context("what was saved before is kept")?;
        // Whatever else is at the path by now is not its mount.
        let there = match number {
            Some(number) => Seat::inherit(&self.mountpoint, number),
            None => Err(anyhow!("the state does not say of which mount it is")),
        };
        let is_same = |held: &Saved| number.is_none() || held.seat.number() == number;
        let seat = match (there, self.saved.take_if(|held| is_same(held))) {
            (Ok(seat), _) => seat,
            (Err(_), Some(held)) => held.seat,
            (Err(e), None) => return Err(e),
        };
        tracing::debug!("holding {} bytes of state", state.len());
        self.saved = Some(Saved { state, descriptor, seat });
        self.met = true;
        Ok(())
    }

    /// Takes what the child, now dead, sent last.
    fn drain(&mut self) {
        self.takes = false;
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        while let std::task::Poll::Ready(Ok((stream, _))) = self.listener.poll_accept(&mut context) {
            self.exchange(stream);
        }
    }

    /// True if there is a mount to be taken over.
    fn mount_lives(&self) -> bool {
        self.saved.as_ref().is_some_and(Saved::lives)
    }

    /// After the last child.
    fn end(&self, status: ExitStatus, told: bool) -> anyhow::Result<i32> {
        if let Some(signal) = status.signal() {
            if self.saved.is_none() {
                bail!("nydusd was killed by signal {signal} before its mount was served");
            }
            tracing::warn!("nydusd was killed by signal {signal}");
        }
        if told {
            self.unmount()?;
        }
        Ok(status.code().unwrap_or(i32::from(!told)))
    }

    /// Ends what waits for answers.
    fn abort(&self) -> anyhow::Result<()> {
        let Some(saved) = self.saved.as_ref().filter(|saved| saved.lives()) else { return Ok(()) };
        saved.seat.abort().with_context(|| format!("end the mount on {}", self.mountpoint.display()))
    }

    /// Takes the mount, and no other, out of the tree. One that is gone already is fine.
    fn unmount(&self) -> anyhow::Result<()> {
        let Some(saved) = &self.saved else { return Ok(()) };
        let unmounted = saved.seat.unmount(saved.has_ended());
        unmounted.with_context(|| format!("unmount {}", self.mountpoint.display()))
    }
}

/// Sends the child a signal. It is not waited for yet, so the number is still its own.
fn tell(child: Pid, signal: SignalNumber) {
    if let Err(e) = kill(child, signal) {
        tracing::warn!("{signal} to nydusd: {e}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;
    use std::path::Path;

    use storage::digest::DigestAlgorithm;

    use super::*;

    fn state(connection: u64, release: &str) -> Vec<u8> {
        let body = format!(r#"{{"release":"{release}","connection":{connection}}}"#);
        format!("nydusd-state 9 {}\n{body}", DigestAlgorithm::Sha256.digest(body.as_bytes())).into_bytes()
    }

    #[test]
    fn children_that_do_not_last_are_waited_for() {
        use Ended::{Failed, Killed, Lasted};
        let run = |ends: &[Ended]| {
            let mut pauses = Pauses::default();
            let millis = |end: &Ended| pauses.after(*end).map(|pause| pause.as_millis());
            ends.iter().map(millis).collect::<Vec<_>>()
        };
        // One kill is a stall that nobody notices; a row of them is no reason to keep readers waiting for long.
        assert_eq!(run(&[Lasted, Lasted, Killed, Lasted, Killed]), [None; 5]);
        let killed = [None, Some(50), Some(100), Some(200), Some(250), Some(250)];
        assert_eq!(run(&[Killed; 6]), killed);
        let failed = [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000].map(Some);
        assert_eq!(run(&[Failed; 9]), failed);
        assert_eq!(
            run(&[Failed, Failed, Lasted, Failed, Killed]),
            [Some(50), Some(100), None, Some(50), None]
        );
    }

    #[tokio::test]
    async fn a_part_of_a_state_does_not_replace_a_whole_one() {
        let mut holder = Holder::new(Vec::new(), "/proc".into()).unwrap();
        // What is mounted there is none of ours, so what was known of the mount stays known.
        let seat = Seat::known(Path::new("/proc")).unwrap();
        let number = seat.number().unwrap();
        holder.saved =
            Some(Saved { state: Vec::new(), descriptor: File::open("/dev/null").unwrap().into(), seat });
        let none = Some((Vec::new(), String::new()));
        let mut save = |bytes: &[u8], of: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(&file, of).unwrap();
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let (bytes, fd) = (bytes.to_vec(), File::open(&file).unwrap());
            let child = std::thread::spawn(move || supervisor::send(theirs, &bytes, fd.as_fd()).unwrap());
            let taken = holder.take(ours);
            child.join().unwrap();
            let saved = holder.saved.as_ref().map(|saved| {
                let file = File::open(format!("/proc/self/fd/{}", saved.descriptor.as_raw_fd())).unwrap();
                (saved.state.clone(), std::io::read_to_string(file).unwrap())
            });
            (taken.is_ok(), saved)
        };
        // Longer than what travels with the descriptor.
        let (first, second) = (state(number, &"first ".repeat(20_000)), state(number, "second"));
        assert_eq!(save(&first[..40_000], "part"), (false, none));
        let kept = Some((first.clone(), "one".to_owned()));
        assert_eq!(save(&first, "one"), (true, kept.clone()));
        for part in [&second[..second.len() - 1], &first[..32 << 10], b"x"] {
            assert_eq!(save(part, "part"), (false, kept.clone()));
        }
        // Of a mount that is not there.
        assert_eq!(save(&state(number + 1, "third"), "three"), (false, kept));
        assert_eq!(save(&second, "two"), (true, Some((second.clone(), "two".to_owned()))));
    }
}
