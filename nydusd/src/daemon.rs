//! The daemon's life: start, serve, stop.
//!
//! ```text
//! INIT ──mount, takeover──▶ READY ──threads──▶ RUNNING ──signal, exit, umount──▶ STOPPED
//! ```
//!
//! The main thread is the control plane: signals, the API, the end of FUSE threads. Starting
//! (which may fetch) runs beside it, so that a signal ends a daemon that is stuck in its start,
//! too. The API socket appears only when the mount has answered, or when the daemon waits for its
//! takeover ([`crate::failover`]).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use storage::cache::dedup::{DedupDb, open_cache_file};
use storage::engine::{Engine, EngineConfig};
use tokio::sync::mpsc;

use crate::adapter::Adapter;
use crate::cli::{Front, FuseFront, ServeArgs};
use crate::failover::{Beginning, LifeError};
use crate::mount::Mount;
use crate::preheat::jobs::Jobs;
use crate::sandbox::{Privileged, Socket};
use crate::transport::Prepared;
use crate::transport::fusedev::FuseMount;
use crate::transport::{blk, virtiofs};
use crate::vfs::known::Known;
use crate::vfs::turns::Turns;
use crate::writable::{OverlayConfig, UpperLock};
use crate::{api, image};

mod control;
mod state;

pub use control::run;
pub use state::State;

/// Longest wait for the disk at an orderly end: whoever stops us waits a second in all.
const FLUSH_LIMIT: Duration = Duration::from_millis(400);

/// What ends the daemon.
#[derive(Debug)]
pub enum End {
    /// The API's `exit`: the mount stays.
    Exit,
    /// A FUSE thread stopped: the mount is gone, or reading failed.
    Fuse(anyhow::Result<()>),
}

/// Everything one daemon has.
pub struct Daemon {
    front: Front,
    args: ServeArgs,
    /// Does what this process may not.
    host: Arc<Privileged>,
    state: AtomicU8,
    adapter: Arc<Adapter>,
    preheat: Jobs,
    hot: api::HotConfig,
    /// Images that were validated.
    known: Known,
    /// Mountpoints that a command works on.
    turns: Turns,
    fuse: OnceLock<FuseMount>,
    /// Taken when the mount or the device is served.
    prepared: Mutex<Prepared>,
    /// Sockets of devices that were made.
    devices: AtomicU16,
    /// Set if the image is writable: keeps others from the directory of its changes.
    upper: OnceLock<UpperLock>,
    /// Held while mounting and while stopping begins: a mount that nobody would take away
    /// again must not appear. True once stopping has begun.
    stopping: Mutex<bool>,
    /// See [`Daemon::steps`].
    steps: Mutex<()>,
    /// Set when the start begins.
    beginning: OnceLock<Beginning>,
    engine: OnceLock<Arc<Engine>>,
    /// Made by whoever asks first; `None` if there is to be none.
    dedup: OnceLock<Option<Arc<DedupDb>>>,
    /// Unbounded, but at most one message a FUSE thread and an API call.
    ends: mpsc::UnboundedSender<End>,
}

impl Daemon {
    fn new(
        front: Front,
        args: ServeArgs,
        host: Arc<Privileged>,
        prepared: Prepared,
        ends: mpsc::UnboundedSender<End>,
    ) -> Self {
        // A guest's kernel can not be told of changes.
        let told = matches!(front, Front::Fuse(_));
        Self {
            front,
            args,
            host,
            prepared: Mutex::new(prepared),
            state: AtomicU8::new(State::Init as u8),
            adapter: Arc::new(Adapter::new(told)),
            preheat: Jobs::default(),
            hot: api::HotConfig::default(),
            known: Known::default(),
            turns: Turns::default(),
            fuse: OnceLock::new(),
            devices: AtomicU16::new(0),
            upper: OnceLock::new(),
            stopping: Mutex::new(false),
            steps: Mutex::new(()),
            beginning: OnceLock::new(),
            engine: OnceLock::new(),
            dedup: OnceLock::new(),
            ends,
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        State::from_u8(self.state.load(Ordering::Acquire))
    }

    fn set_state(&self, state: State) {
        tracing::info!("state {}", state.name());
        self.state.store(state as u8, Ordering::Release);
    }

    /// Its id, if it was given one.
    pub fn id(&self) -> Option<&str> {
        self.args.global.id.as_deref()
    }

    /// The mounts and their counters.
    pub fn adapter(&self) -> &Arc<Adapter> {
        &self.adapter
    }

    /// What is fetched ahead.
    pub fn preheat(&self) -> &Jobs {
        &self.preheat
    }

    /// What was changed by the API.
    pub fn hot(&self) -> &api::HotConfig {
        &self.hot
    }

    /// Images that were validated.
    pub(crate) fn known(&self) -> &Known {
        &self.known
    }

    /// Mountpoints that a command works on.
    pub(crate) fn turns(&self) -> &Turns {
        &self.turns
    }

    /// Who does what this process may not.
    pub(crate) fn host(&self) -> &Arc<Privileged> {
        &self.host
    }

    /// The command line.
    pub(crate) fn args(&self) -> &ServeArgs {
        &self.args
    }

    /// How it is reached.
    pub(crate) fn front(&self) -> &Front {
        &self.front
    }

    /// The connection to the kernel, once there is one.
    pub(crate) fn fuse(&self) -> Option<&FuseMount> {
        self.fuse.get()
    }

    /// The engine, once the start has made it.
    pub fn engine(&self) -> Option<&Arc<Engine>> {
        self.engine.get()
    }

    /// Its supervisor's socket, if it was given one.
    pub fn supervisor(&self) -> Option<&Path> {
        self.args.global.supervisor.as_deref()
    }

    /// Taken by steps of its life that must not overlap. They block while they hold it, and it
    /// guards no data.
    pub(crate) fn steps(&self) -> &Mutex<()> {
        &self.steps
    }

    /// How it began; a mount before that is known.
    pub(crate) fn beginning_was(&self) -> Beginning {
        self.beginning.get().copied().unwrap_or(Beginning::Mount)
    }

    /// The engine, made if need be.
    pub(crate) fn make_engine(&self) -> anyhow::Result<&Arc<Engine>> {
        if let Some(engine) = self.engine.get() {
            return Ok(engine);
        }
        let engine = Engine::new(EngineConfig::default())?;
        Ok(self.engine.get_or_init(|| engine))
    }

    /// Where chunks of other caches are looked up, if that is wanted and possible.
    pub(crate) fn dedup(&self) -> Option<&Arc<DedupDb>> {
        let open = || {
            let path = self.args.dedup_db.as_ref()?;
            // Beside it lie the files that a database keeps for a while.
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            self.host
                .admit(directory.unwrap_or(Path::new(".")), true)
                .inspect_err(|e| tracing::warn!("--dedup-db: {e:#}"))
                .ok()?;
            DedupDb::open(path, Arc::new(open_cache_file))
                .inspect_err(|e| tracing::warn!("--dedup-db has no effect: {}", crate::logging::chain(e)))
                .ok()
        };
        self.dedup.get_or_init(open).as_ref()
    }

    /// Ends the daemon and leaves the mount, if it has one, in place. Returns at once.
    pub fn exit(&self) {
        // A closed channel means that the end has come already.
        let _ = self.ends.send(End::Exit);
    }

    /// Begins as it is told to. Blocks until the mount has answered, if there is to be one.
    fn start(&self) -> anyhow::Result<()> {
        let socket = self.host.check_socket(Socket::Api)?;
        // Opened beside what follows.
        let _ = self.dedup();
        match *self.beginning.get_or_init(|| self.beginning(socket)) {
            Beginning::Mount => match &self.front {
                Front::Fuse(fuse) => self.mount_and_serve(fuse),
                Front::Virtiofs(_) | Front::Blk(_) => self.serve_devices(),
            },
            Beginning::Wait => {
                tracing::info!("waiting for the takeover of {}", self.front.place().display());
                Ok(())
            }
            Beginning::TakeOver => {
                let failed = |error| match error {
                    LifeError::Failed(e) => e.context("take over"),
                    other => anyhow!("take over: {other:?}"),
                };
                self.take_over().map_err(failed)?;
                self.begin().map_err(failed)
            }
        }
    }

    /// Opens what the command line names; its image, if that is one.
    fn open_named(&self, engine: &Arc<Engine>) -> anyhow::Result<Option<Arc<Mount>>> {
        let args = &self.args;
        let plan = image::plan(&args.image, args.global.config.as_deref())?;
        let mount = plan.map(|plan| self.mount_planned(engine, plan)).transpose()?;
        if let Some(mount) = &mount {
            self.expect_start(engine, mount);
        }
        if let Some(source) = &args.shared_dir {
            self.mount_shared(source)?;
        }
        Ok(mount)
    }

    /// Says that it runs, and fetches what its image wants to be fetched.
    fn run(&self, engine: &Arc<Engine>, mount: Option<&Arc<Mount>>) {
        self.set_state(State::Running);
        let place = self.front.place().display();
        match mount {
            Some(mount) => {
                self.fetch_configured(engine, mount);
                tracing::info!("serving bootstrap sha256:{} on {place}", mount.bootstrap_digest());
            }
            None => tracing::info!("serving {place} for mounts of the API"),
        }
    }

    /// Mounts and serves. Blocks until the mount has answered.
    fn mount_and_serve(&self, front: &FuseFront) -> anyhow::Result<()> {
        // Before anything is fetched for a mount that can not be.
        self.host.check_mountpoint()?;
        let engine = self.make_engine()?;
        let mount = self.open_named(engine)?;
        let fuse = self.mount_unless_stopping(front.writable)?;
        self.serve(fuse)?
            .recv()
            .with_context(|| format!("the new mount {} ended at once", fuse.mountpoint().display()))?;
        if let Some(mount) = &mount {
            self.make_writable(mount)?;
        }
        self.tell_holder()?;
        self.run(engine, mount.as_ref());
        Ok(())
    }

    /// Listens for virtual machine monitors.
    fn serve_devices(&self) -> anyhow::Result<()> {
        self.host.check_socket(Socket::Device(0))?;
        let engine = self.make_engine()?;
        let mount = self.open_named(engine)?;
        self.set_state(State::Ready);
        match (&self.front, &mount) {
            (Front::Virtiofs(front), _) => {
                let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
                let null = prepared.null.take().context("there was no /dev/null at the start")?;
                virtiofs::listen(self.bind_device(0)?, &self.adapter, front, null)?;
            }
            (Front::Blk(front), Some(mount)) => {
                for (number, disk) in (0..).zip(blk::disks(mount, front)?) {
                    if number > 0 {
                        self.host.check_socket(Socket::Device(number))?;
                    }
                    blk::listen(self.bind_device(number)?, disk)?;
                }
            }
            _ => bail!("there is nothing to serve"),
        }
        self.run(engine, mount.as_ref());
        Ok(())
    }

    /// Binds the socket of device `number`, unless the daemon is being stopped meanwhile.
    fn bind_device(&self, number: u16) -> anyhow::Result<OwnedFd> {
        let stopping = self.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        if *stopping {
            bail!("stopped before the device");
        }
        let socket = self.host.bind_socket(Socket::Device(number))?;
        self.devices.fetch_max(number + 1, Ordering::Relaxed);
        Ok(socket)
    }

    /// Covers the mount with an overlay, if its configuration says so.
    fn make_writable(&self, mount: &Mount) -> anyhow::Result<()> {
        let Some(overlay) = &mount.config().overlay else { return Ok(()) };
        let bootstrap = mount.rafs().bootstrap();
        let root = bootstrap.attr(bootstrap.root())?;
        let made = OverlayConfig::standing_for(&root, mount.config().id_mapping);
        let lock = overlay.lock(self.host.upper_directory(overlay, Some(made))?)?;
        // It is kept as long as this process lives.
        let _ = self.upper.set(lock);
        // Whoever stops unmounts what is there: not while another process changes it.
        let stopping = self.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        if *stopping {
            bail!("stopped before the overlay");
        }
        self.host.cover(overlay)?;
        drop(stopping);
        tracing::info!("changes go to {}", overlay.upper_dir.display());
        Ok(())
    }

    /// Starts the threads that serve the mount; the receiver hears of FUSE_INIT.
    pub(crate) fn serve(&self, fuse: &FuseMount) -> anyhow::Result<std::sync::mpsc::Receiver<()>> {
        let ends = self.ends.clone();
        let ended = move |result| {
            // The receiver goes away only when the daemon is ending anyway.
            let _ = ends.send(End::Fuse(result));
        };
        let prepared = std::mem::take(&mut *self.prepared.lock().unwrap_or_else(PoisonError::into_inner));
        let threads = match &self.front {
            Front::Fuse(front) => front.fuse_threads,
            Front::Virtiofs(_) | Front::Blk(_) => bail!("a device has no mount"),
        };
        let (_, initialized) = fuse.serve(Arc::clone(&self.adapter), threads, prepared.rings, ended)?;
        Ok(initialized)
    }

    pub(crate) fn set_running(&self) {
        self.set_state(State::Running);
    }

    /// Mounts, unless the daemon is being stopped meanwhile.
    fn mount_unless_stopping(&self, writable: bool) -> anyhow::Result<&FuseMount> {
        let stopping = self.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        if *stopping {
            bail!("stopped before the mount");
        }
        let fuse = FuseMount::new(&self.host, writable)?;
        let fuse = self.fuse.get_or_init(|| fuse);
        self.adapter.serves_as(fuse.device());
        self.set_state(State::Ready);
        Ok(fuse)
    }

    /// Makes an adopted mount this daemon's own, unless the daemon is being stopped meanwhile.
    pub(crate) fn hold(&self, fuse: FuseMount) -> anyhow::Result<()> {
        let stopping = self.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        if *stopping {
            fuse.abandon();
            bail!("stopped before the takeover");
        }
        let fuse = self.fuse.get_or_init(|| fuse);
        self.adapter.serves_as(fuse.device());
        self.set_state(State::Ready);
        Ok(())
    }

    /// For the end of the FUSE connection: usually the mount was taken away.
    ///
    /// # Errors
    /// It is still there, dead.
    fn unmounted(&self) -> anyhow::Result<()> {
        match self.fuse.get() {
            Some(fuse) if fuse.is_aborted() => bail!(
                "the FUSE connection of {} was aborted, and with it every read; start nydusd again",
                fuse.mountpoint().display()
            ),
            _ => Ok(()),
        }
    }

    /// True if the mount is a predecessor's: what fails here is no reason to take it away.
    fn is_inherited(&self) -> bool {
        self.beginning_was() != Beginning::Mount && !self.is_over()
    }

    /// True if another daemon can serve the mount when this one can not.
    fn is_survived(&self) -> bool {
        self.keeper().is_ok() && !self.is_over()
    }

    /// True if the connection has ended, so that nobody can serve it.
    fn is_over(&self) -> bool {
        self.fuse.get().is_some_and(FuseMount::has_ended)
    }

    /// True if the daemon unmounts when it is told to end: not what somebody else still serves.
    fn unmounts(&self) -> bool {
        self.state() == State::Running || !self.is_inherited()
    }

    /// Unmounts, whoever still uses the mount, and makes the cache durable.
    fn stop(&self, unmount: bool) {
        *self.stopping.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.set_state(State::Stopped);
        self.preheat.cancel_all();
        if let Some(fuse) = self.fuse.get() {
            if unmount {
                let held = self.keeper().is_ok();
                if let Err(e) = if held { fuse.unmount_held() } else { fuse.unmount() } {
                    tracing::error!("{e:#}");
                }
            } else {
                fuse.abandon();
            }
        }
        for socket in (0..self.devices.load(Ordering::Relaxed)).map(Socket::Device) {
            if let Err(e) = self.host.remove_socket(socket) {
                tracing::warn!("remove the {}: {e:#}", socket.name());
            }
        }
        let (done, flushed) = std::sync::mpsc::sync_channel(1);
        let mounts = self.adapter.table().mounts();
        let dedup = self.dedup.get().cloned().flatten();
        let flush = move || {
            for mount in mounts {
                mount.tracer().finish();
                for cache in mount.caches() {
                    if let Err(e) = cache.flush() {
                        tracing::warn!("{}", crate::logging::chain(&e));
                    }
                }
            }
            if let Some(dedup) = dedup {
                dedup.flush(FLUSH_LIMIT);
            }
            // Nobody listens any more if the limit has passed.
            let _ = done.send(());
        };
        // What is not durable in time is fetched again after the next start: no harm.
        if std::thread::Builder::new().name("flush".to_owned()).spawn(flush).is_ok() {
            let _ = flushed.recv_timeout(FLUSH_LIMIT);
        }
    }
}
