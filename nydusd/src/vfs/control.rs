//! Mount, remount and unmount while the daemon serves.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use storage::engine::Engine;

use super::command::{FsType, MountCommand};
use super::error::{MountError, MountErrorKind};
use super::mounted::{Mounted, Opened};
use super::path::VfsPath;
use super::stale::Stale;
use super::{AttachError, Replaced};
use crate::daemon::{Daemon, State};
use crate::image::{self, Plan};
use crate::mount::{self, Mount};
use crate::passthrough::{self, HostSpec};
use crate::{preheat, trace};

impl Daemon {
    /// Mounts what `command` says; its tree is visible when this returns. Blocks; not for threads that
    /// serve anybody.
    ///
    /// # Errors
    /// Any [`MountErrorKind`] but `NotFound`; nothing is left behind.
    pub fn mount(&self, command: MountCommand) -> Result<(), MountError> {
        let path = VfsPath::parse(&command.mountpoint)?;
        let engine = self.serving()?;
        let _turn = self.turns().take(&path).ok_or_else(|| busy(&path))?;
        if let Some(there) = self.adapter().table().mounted(&path) {
            return if there.repeats(&command) { Ok(()) } else { Err(occupied(&path)) };
        }
        let opened = self.open(engine, command)?;
        let change = self.turns().change();
        let attached = self.adapter().table().attach(&path, |place| opened.at(place));
        let (mounted, stale) = attached.map_err(|e| refused(e, &path))?;
        self.keep_state();
        self.invalidate(&stale);
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
    pub fn remount(&self, command: MountCommand) -> Result<(), MountError> {
        let path = VfsPath::parse(&command.mountpoint)?;
        let engine = self.serving()?;
        let _turn = self.turns().take(&path).ok_or_else(|| busy(&path))?;
        if self.adapter().table().mounted(&path).is_none() {
            return Err(vacant(&path));
        }
        let opened = self.open(engine, command)?;
        let change = self.turns().change();
        let replaced = self.adapter().table().replace(&path, |place| opened.at(place));
        let (Replaced { new, old }, stale) = replaced.map_err(|e| refused(e, &path))?;
        self.keep_state();
        self.invalidate(&stale);
        drop(change);
        self.shown(engine, &new);
        tracing::info!("mounted {new} at {path} in place of {old}");
        self.retire(engine, old);
        Ok(())
    }

    /// Takes what is mounted at `mountpoint` out of the tree; what is open of it stays readable.
    /// Blocks likewise.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`, `Busy`, `NotReady`.
    pub fn umount(&self, mountpoint: &str) -> Result<(), MountError> {
        let path = VfsPath::parse(mountpoint)?;
        let engine = self.serving()?;
        let _turn = self.turns().take(&path).ok_or_else(|| busy(&path))?;
        let change = self.turns().change();
        let (mounted, stale) = self.adapter().table().detach(&path).map_err(|e| refused(e, &path))?;
        self.hot().forget(mounted.mountpoint());
        self.keep_state();
        self.invalidate(&stale);
        drop(change);
        tracing::info!("unmounted {path}");
        self.retire(engine, mounted);
        Ok(())
    }

    fn serving(&self) -> Result<&Arc<Engine>, MountError> {
        let serves = matches!(self.state(), State::Ready | State::Running);
        self.engine().filter(|_| serves).ok_or_else(|| {
            let message = format!("the daemon is in state {}; mount when it is RUNNING", self.state().name());
            MountError::new(MountErrorKind::NotReady, message)
        })
    }

    fn open(&self, engine: &Arc<Engine>, command: MountCommand) -> Result<Opened, MountError> {
        let open = || {
            if command.fs_type == FsType::Passthrough {
                return self.open_host(command.mountpoint.clone(), command.source.clone(), Some(command));
            }
            let mountpoint = command.mountpoint.clone();
            let spec = image::commanded(command, |config| self.hot().amend(&mountpoint, config))?;
            warn_of(&spec.config.warnings);
            Ok(Opened::Image(Box::new(mount::open(engine, spec, self.known())?)))
        };
        open().map_err(|e| MountError::image(&e))
    }

    /// Opens a directory of the host.
    pub(super) fn open_host(
        &self,
        mountpoint: String,
        source: PathBuf,
        command: Option<MountCommand>,
    ) -> anyhow::Result<Opened> {
        let spec = HostSpec { mountpoint, command, source };
        Ok(Opened::Host(passthrough::open(spec, self.adapter().own_device())?))
    }

    /// Warns of what a new mount does not show, and fetches what it wants to be fetched.
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
        if mount.has_xattrs() && self.adapter().has_refused_xattrs() {
            tracing::warn!(
                "{} has extended attributes, but the kernel was told that there are none: they are not shown",
                mount.mountpoint()
            );
        }
        self.fetch_hints(engine, mount);
        self.fetch_configured(engine, mount);
    }

    /// Tells the kernel. Waits for requests that are being answered; so no lock is held here.
    fn invalidate(&self, stale: &[Stale]) {
        if let Some(fuse) = self.fuse() {
            fuse.invalidate(stale);
        }
    }

    /// Has `nydusd supervise` know of a change, before the kernel or the client hears of it.
    pub(crate) fn keep_state(&self) {
        if let Err(e) = self.tell_holder() {
            tracing::warn!("a successor would not know this change: {e:#}");
        }
    }

    /// Ends what goes on behind a mount that is out of the tree, beside whoever took it out.
    fn retire(&self, engine: &Arc<Engine>, mounted: Mounted) {
        let Mounted::Image(mount) = mounted else {
            drop(mounted);
            self.adapter().table().sweep();
            return;
        };
        self.preheat().cancel_of(&mount);
        mount.orders().iter().for_each(storage::prefetch::Prefetch::cancel);
        let (handle, adapter) = (engine.handle().clone(), Arc::clone(self.adapter()));
        engine.spawn(async move {
            // A failure is the end of the engine.
            let _ = handle
                .blocking(move || {
                    mount.finish();
                    drop(mount);
                    adapter.table().sweep();
                })
                .await;
        });
    }

    /// Mounts the command line's image.
    pub(crate) fn mount_planned(&self, engine: &Arc<Engine>, mut plan: Plan) -> anyhow::Result<Arc<Mount>> {
        let path = self.virtual_mountpoint()?;
        image::apply_fuse_arguments(plan.config_mut(), self.args())?;
        let spec = image::resolve(engine, plan, path.to_string())?;
        warn_of(&spec.config.warnings);
        if path.names().is_empty() {
            self.adapter().table().dedicate();
        }
        let opened = mount::open(engine, spec, self.known())?;
        let attached = self.adapter().table().attach(&path, |place| opened.at(place));
        let (mounted, _) = attached.map_err(|e| refused(e, &path))?;
        mounted.image().cloned().context("an image was mounted")
    }

    /// Mounts the command line's directory.
    pub(crate) fn mount_shared(&self, source: &Path) -> anyhow::Result<()> {
        let path = self.virtual_mountpoint()?;
        let source = source.canonicalize().with_context(|| format!("--shared-dir {}", source.display()))?;
        let opened = self.open_host(path.to_string(), source, None)?;
        self.adapter().table().attach(&path, |place| opened.at(place)).map_err(|e| refused(e, &path))?;
        Ok(())
    }

    fn virtual_mountpoint(&self) -> anyhow::Result<VfsPath> {
        VfsPath::parse(&self.args().virtual_mountpoint).context("--virtual-mountpoint")
    }

    /// Fetches what earlier starts of the image read, or what the image hints at.
    pub(crate) fn fetch_hints(&self, engine: &Arc<Engine>, mount: &Arc<Mount>) {
        engine.spawn(crate::why::log_start(Arc::downgrade(mount)));
        let known = mount.fetch_ahead(engine.handle());
        let hints = preheat::hints(mount.config(), &**mount.rafs().bootstrap());
        if let Some(request) = hints.filter(|_| !known && mount.config().trace == trace::Mode::On) {
            self.preheat().queue(engine.handle(), mount, request);
        }
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
    let message = format!("already exists: something is mounted at {path}; unmount it first, or remount");
    MountError::new(MountErrorKind::AlreadyExists, message)
}

fn vacant(path: &VfsPath) -> MountError {
    MountError::new(MountErrorKind::NotFound, format!("not found: nothing is mounted at {path}"))
}

fn busy(path: &VfsPath) -> MountError {
    MountError::new(MountErrorKind::Busy, format!("busy: another command works on {path}; ask again"))
}
