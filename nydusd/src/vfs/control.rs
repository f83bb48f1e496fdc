//! Mount, remount and unmount while the daemon serves.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use storage::engine::Engine;

use super::command::{FsType, MountCommand};
use super::error::{MountError, MountErrorKind};
use super::mounted::{Mounted, Opened};
use super::path::VfsPath;
use super::stale::Stale;
use super::{AttachError, Replaced};
use crate::cli::Front;
use crate::daemon::{Daemon, State};
use crate::image::{self, Plan};
use crate::mount::{self, Mount};
use crate::passthrough::{self, HostSpec};
use crate::{follow, preheat, trace};

/// How long who unmounts waits until the dedup database has no rows of files that are gone. What is
/// not done by then goes on by itself.
const GARBAGE_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes of all commands that made mounts. Saved state has a bound eight times as high, and may have to escape them.
const MAX_COMMANDS: usize = 8 << 20;

impl Daemon {
    /// Mounts what `command` says; its tree is visible when this returns. Blocks; not for threads that
    /// serve anybody.
    ///
    /// # Errors
    /// Any [`MountErrorKind`] but `NotFound`; nothing is left behind.
    pub fn mount(self: &Arc<Self>, command: MountCommand) -> Result<(), MountError> {
        let path = VfsPath::parse(&command.mountpoint)?;
        let engine = self.serving()?;
        self.changeable()?;
        let _turn = self.turns().take(&path).ok_or_else(|| busy(&path))?;
        if let Some(there) = self.adapter().table().mounted(&path) {
            return if there.repeats(&command) { Ok(()) } else { Err(occupied(&path)) };
        }
        self.can_be_noticed(&path)?;
        let size = command.size();
        let opened = self.open(engine, command)?;
        self.share(&opened)?;
        let change = self.turns().change();
        self.can_be_saved(&path, size)?;
        let attached = self.adapter().table().attach(&path, |place| opened.at(place));
        let (mounted, stale) = attached.map_err(|e| refused(e, &path))?;
        self.keep_state();
        self.tell(&stale, None);
        drop(change);
        self.shown(engine, &mounted);
        tracing::info!("mounted {mounted} at {path}");
        Ok(())
    }

    /// Puts what `command` says in the place of what is mounted there. What is open of the old tree stays
    /// readable. Blocks likewise.
    ///
    /// # Errors
    /// Any [`MountErrorKind`] but `AlreadyExists`; the old mount serves on.
    pub fn remount(self: &Arc<Self>, command: MountCommand) -> Result<(), MountError> {
        let path = VfsPath::parse(&command.mountpoint)?;
        let engine = self.serving()?;
        self.changeable()?;
        let _turn = self.turns().take(&path).ok_or_else(|| busy(&path))?;
        if self.adapter().table().mounted(&path).is_none() {
            return Err(vacant(&path));
        }
        let size = command.size();
        let opened = self.open(engine, command)?;
        self.share(&opened)?;
        let change = self.turns().change();
        self.can_be_saved(&path, size)?;
        let replaced = self.adapter().table().replace(&path, |place| opened.at(place));
        let (Replaced { new, old }, stale) = replaced.map_err(|e| refused(e, &path))?;
        self.keep_state();
        self.tell(&stale, Some(&old));
        drop(change);
        self.shown(engine, &new);
        tracing::info!("mounted {new} at {path} in place of {old}");
        self.retire(engine, old, Vec::new());
        Ok(())
    }

    /// Takes what is mounted at `mountpoint` out of the tree; what is open of it stays readable.
    /// Blocks likewise.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`, `Busy`, `NotReady`.
    pub fn umount(self: &Arc<Self>, mountpoint: &str) -> Result<(), MountError> {
        let path = VfsPath::parse(mountpoint)?;
        let engine = self.serving()?;
        self.changeable()?;
        let turn = self.turns().take(&path).ok_or_else(|| busy(&path))?;
        let change = self.turns().change();
        let (mounted, stale) = self.adapter().table().detach(&path).map_err(|e| refused(e, &path))?;
        self.hot().forget(mounted.mountpoint());
        self.keep_state();
        self.tell(&stale, Some(&mounted));
        drop(change);
        tracing::info!("unmounted {path}");
        self.retire(engine, mounted, stale);
        drop(turn);
        // Nobody else waits for the database.
        if let Some(dedup) = self.dedup() {
            dedup.collect_garbage(GARBAGE_PATIENCE);
        }
        Ok(())
    }

    fn serving(&self) -> Result<&Arc<Engine>, MountError> {
        // A successor that is READY shows what its predecessor still serves: there is nothing to change yet.
        self.engine().filter(|_| self.state() == State::Running).ok_or_else(|| {
            let message = format!("the daemon is in state {}; mount when it is RUNNING", self.state().name());
            MountError::new(MountErrorKind::NotReady, message)
        })
    }

    /// Below an overlay nothing may change, nor does a disk.
    fn changeable(&self) -> Result<(), MountError> {
        if let Front::Blk(_) = self.front() {
            return Err(MountError::new(
                MountErrorKind::Unsupported,
                "this daemon serves the image that it was started with as a disk; start another one, or `nydusd \
                 virtiofs`, whose images come and go",
            ));
        }
        let root = VfsPath::parse("/").ok().and_then(|root| self.adapter().table().mounted(&root));
        let covered = root.and_then(|root| Some(root.image()?.config().overlay.is_some()));
        match covered {
            Some(true) => Err(MountError::new(
                MountErrorKind::Unsupported,
                "the image at / is writable: an overlay covers it, below which nothing can be mounted or unmounted; \
                 use another daemon",
            )),
            Some(false) | None => Ok(()),
        }
    }

    /// A guest's kernel believes for good what it was told of an image's directories, and can not be told otherwise.
    fn can_be_noticed(&self, path: &VfsPath) -> Result<(), MountError> {
        match self.adapter().table().inside(path).filter(|_| !self.adapter().tells()) {
            Some(image) => Err(MountError::new(
                MountErrorKind::Unsupported,
                format!(
                    "{path} is inside the image at {image}, whose directories a guest does not look at twice; mount                      it beside the image"
                ),
            )),
            None => Ok(()),
        }
    }

    /// A successor is told all commands at once, and what it is told has a bound: so has this one's `size` together
    /// with those of all mounts but the one at `path`.
    fn can_be_saved(&self, path: &VfsPath, size: usize) -> Result<(), MountError> {
        let mounts = self.adapter().table().all();
        let others = mounts.iter().filter(|mount| mount.mountpoint() != path.to_string());
        let others: usize = others.filter_map(Mounted::command).map(MountCommand::size).sum();
        if others.saturating_add(size) <= MAX_COMMANDS {
            return Ok(());
        }
        Err(MountError::new(
            MountErrorKind::InvalidArgument,
            format!(
                "invalid argument: configuration and names take {size} bytes, those of other mounts {others}, and \
                 {MAX_COMMANDS} at most are kept for a successor; shorten `config` or `prefetch_files`, or use \
                 another daemon"
            ),
        ))
    }

    fn open(&self, engine: &Arc<Engine>, command: MountCommand) -> Result<Opened, MountError> {
        let open = || {
            if command.fs_type == FsType::Passthrough {
                let (mountpoint, source) = (command.mountpoint.clone(), command.source.clone());
                return self.open_host(HostSpec {
                    mountpoint,
                    source,
                    command: Some(command),
                    expected: None,
                    plain: false,
                });
            }
            let mountpoint = command.mountpoint.clone();
            let spec = image::commanded(command, |config| self.hot().amend(&mountpoint, config))?;
            warn_of(&spec.config.warnings);
            Ok(Opened::Image(Box::new(mount::open(engine, spec, self.known(), self.dedup())?)))
        };
        open().map_err(|e| MountError::image(&e))
    }

    /// Opens a directory of the host.
    pub(super) fn open_host(&self, mut spec: HostSpec) -> anyhow::Result<Opened> {
        // The kernel asks its mount for leave before it asks this daemon, so what may be written to is told by that.
        if spec.source.is_absolute() {
            let admitted = self.host().admit_shown(&spec.source, self.front().is_writable());
            // Where it is, not a link to it: that is what a successor looks for.
            spec.source = admitted
                .with_context(|| format!("the directory {} can not be served", spec.source.display()))?;
        }
        Ok(Opened::Host(Box::new(passthrough::open(spec, self.adapter().own_device())?)))
    }

    /// Prepares for one more mount, or for another.
    fn share(&self, opened: &Opened) -> Result<(), MountError> {
        let has_xattrs = match opened {
            Opened::Image(opened) => opened.has_xattrs(),
            Opened::Host(_) => false,
        };
        if self.adapter().table().share() || !has_xattrs {
            return Ok(());
        }
        Err(MountError::new(
            MountErrorKind::Unsupported,
            "the image has extended attributes, but this daemon began with an image that has none and told the \
             kernel so, for good: mount it in a daemon that is started without an image, or set \
             `enable_xattr` to false",
        ))
    }

    /// Warns of what a new mount does not show, has it use a login that was set while it was opened, and
    /// fetches what it wants to be fetched.
    fn shown(&self, engine: &Arc<Engine>, mounted: &Mounted) {
        let mount = match mounted {
            Mounted::Image(mount) => mount,
            Mounted::Host(host) if self.adapter().table().is_dedicated() => {
                tracing::warn!(
                    "the kernel was told that nothing changes here: what others change in {} may not be seen; \
                     serve it with a daemon that is started without an image",
                    host.source().display()
                );
                return;
            }
            Mounted::Host(_) => return,
        };
        self.hot().renew(mount);
        self.expect_start(engine, mount);
        self.fetch_configured(engine, mount);
    }

    /// Has the kernel ask again for what has changed. `gone` is out of the tree.
    fn tell(&self, stale: &[Stale], gone: Option<&Mounted>) {
        let Some(fuse) = self.fuse() else { return };
        if let Some(gone) = gone.and_then(Mounted::image).filter(|_| !fuse.expires()) {
            // Such a kernel waits for them, and holds up everybody who works in the directory meanwhile.
            gone.abandon_reads();
        }
        fuse.expire(stale);
    }

    /// Has `nydusd supervise` know of a change, before the kernel or the client hears of it.
    pub(crate) fn keep_state(&self) {
        if let Err(e) = self.tell_holder() {
            tracing::warn!("a successor would not know this change: {e:#}");
        }
    }

    /// Ends what goes on behind a mount that is out of the tree, beside whoever took it out, and has the
    /// kernel drop the names that went with it.
    fn retire(self: &Arc<Self>, engine: &Arc<Engine>, mounted: Mounted, stale: Vec<Stale>) {
        if let Mounted::Image(mount) = &mounted {
            self.preheat().cancel_of(mount);
            mount.stop_fetching();
        }
        let (handle, daemon) = (engine.handle().clone(), Arc::clone(self));
        engine.spawn(async move {
            if let Mounted::Image(mount) = &mounted {
                let gone = Arc::clone(mount);
                // A failure here and below is the end of the engine.
                let _ = handle.blocking(move || gone.finish()).await;
            }
            if !stale.is_empty() {
                daemon.settle(mounted.image()).await;
            }
            drop(mounted);
            let _ = handle
                .blocking(move || {
                    daemon.forget(stale);
                    daemon.adapter().table().sweep();
                    crate::limits::has_given_up();
                })
                .await;
        });
    }

    /// Waits until nothing is read of images that are out of the tree, which the kernel would wait for if
    /// it dropped their names. Reads of `mount` that wait for ever end after its read timeout: it is not
    /// mounted any more. What is open of it, and what is in the cache, is served on.
    async fn settle(&self, mount: Option<&Arc<Mount>>) {
        if let Some(mount) = mount
            && tokio::time::timeout(mount.config().read_timeout, mount.pending().settle()).await.is_err()
        {
            mount.abandon_reads();
        }
        loop {
            let mut retired = self.adapter().table().retired();
            retired.retain(|mount| !mount.pending().is_empty());
            if retired.is_empty() {
                return;
            }
            for mount in retired {
                mount.pending().settle().await;
            }
        }
    }

    /// Has the kernel drop those names that are still nobody's.
    fn forget(&self, mut stale: Vec<Stale>) {
        let Some(fuse) = self.fuse().filter(|fuse| fuse.expires()) else { return };
        let _change = self.turns().change();
        stale.retain(|one| self.adapter().is_vacant(one));
        fuse.forget(&stale);
    }

    /// Mounts the command line's image.
    pub(crate) fn mount_planned(&self, engine: &Arc<Engine>, mut plan: Plan) -> anyhow::Result<Arc<Mount>> {
        let path = self.virtual_mountpoint()?;
        image::apply_serve_arguments(plan.config_mut(), self.args())?;
        if plan.config_mut().overlay.is_some() {
            match self.front() {
                Front::Fuse(fuse) => {
                    ensure!(fuse.writable, "the configuration has an `overlay`, which needs --writable");
                }
                Front::Virtiofs(_) | Front::Blk(_) => bail!(
                    "the configuration has an `overlay`, which is for mounts of this host; leave it out, and have the \
                     guest mount one"
                ),
            }
            ensure!(
                path.names().is_empty(),
                "an `overlay` needs --virtual-mountpoint /, which is the default"
            );
        } else if let Front::Fuse(fuse) = self.front()
            && fuse.writable
        {
            tracing::warn!(
                "--writable does not make the image writable, only host directories that are mounted beside it: give \
                 it with --bootstrap and a --config that has an `overlay`, or mount an overlay over {}",
                fuse.mountpoint.display()
            );
        }
        let spec = image::resolve(engine, plan, path.to_string())?;
        warn_of(&spec.config.warnings);
        // With an API others may come, and a guest could not be told of them.
        if path.names().is_empty() && (self.adapter().tells() || self.args().global.apisock.is_none()) {
            self.adapter().table().dedicate();
        }
        let opened = mount::open(engine, spec, self.known(), self.dedup())?;
        let attached = self.adapter().table().attach(&path, |place| opened.at(place));
        let (mounted, _) = attached.map_err(|e| refused(e, &path))?;
        // There is no kernel yet that believes anything.
        self.adapter().table().take_outdated();
        mounted.image().cloned().context("an image was mounted")
    }

    /// Mounts the command line's directory.
    pub(crate) fn mount_shared(&self, source: &Path) -> anyhow::Result<()> {
        let path = self.virtual_mountpoint()?;
        let admitted = self.host().admit_shown(source, self.front().is_writable());
        let source = admitted.with_context(|| format!("--shared-dir {}", source.display()))?;
        let mountpoint = path.to_string();
        let spec = HostSpec { mountpoint, source, command: None, expected: None, plain: false };
        let opened = self.open_host(spec)?;
        self.adapter().table().attach(&path, |place| opened.at(place)).map_err(|e| refused(e, &path))?;
        self.adapter().table().take_outdated();
        Ok(())
    }

    fn virtual_mountpoint(&self) -> anyhow::Result<VfsPath> {
        VfsPath::parse(&self.args().virtual_mountpoint).context("--virtual-mountpoint")
    }

    /// Gets ready for a start of an image that was mounted: fetches what is known of it, or else follows it.
    pub(crate) fn expect_start(&self, engine: &Arc<Engine>, mount: &Arc<Mount>) {
        let is_told = self.fetch_hints(engine, mount);
        let config = mount.config();
        if !is_told
            && config.trace == trace::Mode::On
            && preheat::is_left_to_follow(config, &**mount.rafs().bootstrap())
        {
            follow::start(engine.handle(), mount);
        }
    }

    /// Fetches what earlier starts of the image read, or what the image hints at. False if neither is known.
    pub(crate) fn fetch_hints(&self, engine: &Arc<Engine>, mount: &Arc<Mount>) -> bool {
        engine.spawn(crate::why::log_start(Arc::downgrade(mount)));
        let known = mount.fetch_ahead(engine.handle());
        let hints = preheat::hints(mount.config(), &**mount.rafs().bootstrap());
        let hints = hints.filter(|_| !known && mount.config().trace == trace::Mode::On);
        let is_hinted = hints.is_some();
        if let Some(request) = hints {
            self.preheat().queue(engine.handle(), mount, request);
        }
        known || is_hinted
    }

    /// Fetches what the configuration asks for.
    pub(crate) fn fetch_configured(&self, engine: &Arc<Engine>, mount: &Arc<Mount>) {
        if let Some(request) = preheat::after_mount(mount.config(), &**mount.rafs().bootstrap()) {
            self.preheat().queue(engine.handle(), mount, request);
        }
    }
}

fn warn_of(warnings: &[String]) {
    for warning in warnings {
        tracing::warn!("configuration: {warning}");
    }
}

fn refused(error: AttachError, path: &VfsPath) -> MountError {
    match error {
        AttachError::Occupied => occupied(path),
        AttachError::Vacant => vacant(path),
        AttachError::Full => {
            MountError::new(MountErrorKind::Busy, "no mount index is free; unmount an image first")
        }
    }
}

fn occupied(path: &VfsPath) -> MountError {
    let message = format!(
        "already exists: something is mounted at {path}; take it away first (DELETE, `nydusctl umount -m {path}`), or \
         put this in its place with PUT /api/v1/mount"
    );
    MountError::new(MountErrorKind::AlreadyExists, message)
}

fn vacant(path: &VfsPath) -> MountError {
    MountError::new(MountErrorKind::NotFound, format!("not found: nothing is mounted at {path}"))
}

fn busy(path: &VfsPath) -> MountError {
    MountError::new(MountErrorKind::Busy, format!("busy: another command works on {path}; ask again"))
}
