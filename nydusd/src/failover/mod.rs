//! The mount outlives its daemon.
//!
//! ```text
//!            save: descriptor + state             restore
//!   daemon ───────────────────────────▶ supervisor ───────▶ successor
//!     │  takes requests                  (holds)              │ asks for those again that were
//!     ▼                                                       ▼ taken and not answered, serves on
//!  ═══════════════════════ FUSE connection, mount, readers ═══════════════════════
//! ```
//!
//! A FUSE connection lives as long as anybody holds its descriptor. While no daemon reads it,
//! readers wait; nothing fails. A successor needs the descriptor and the few facts of [`state`]: node
//! ids are a function of the image, and nothing is ever open in the daemon's view. Supervisors speak
//! [`supervisor`]'s protocol: nydus-snapshotter does, and so does [`holder`], which is `nydusd
//! supervise`.
//!
//! A successor is told to wait for its takeover by `--upgrade`, or finds out by itself that its
//! predecessor crashed: the mount is there, the API socket too, and nobody answers on it. It stays in
//! INIT until the API's `takeover`, and serves from the API's `start` on, so that the predecessor can
//! be ended in between.

mod directory;
pub mod holder;
mod recovery;
pub mod state;
pub mod supervisor;

use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use anyhow::Context as _;

use crate::cli::Front;
use crate::daemon::{Daemon, State};
use crate::transport::fusedev::FuseMount;

use self::state::SavedState;

/// How a daemon begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// It mounts.
    Mount,
    /// It waits until the API tells it to take over.
    Wait,
    /// It takes over at once.
    TakeOver,
}

/// Why a step of the daemon's life was not taken.
#[derive(Debug)]
pub enum LifeError {
    /// Not from the state it is in. The word is the API's for the event.
    Unexpected(&'static str),
    /// Nothing is mounted yet.
    NotReady,
    /// It was started without `--supervisor`.
    NoSupervisor,
    /// It failed; everything is as before.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for LifeError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl Daemon {
    /// How this daemon begins: by its command line, and by what a crashed one left behind
    /// (contract 1.8).
    ///
    /// Without a supervisor there is nothing to take over from, so that a dead mount is reported as
    /// such.
    ///
    /// `socket` says that there is a file where the API's socket will be.
    pub(crate) fn beginning(&self, socket: bool) -> Beginning {
        let global = &self.args().global;
        match (&global.holder, &global.apisock) {
            (Some(_), _) if global.upgrade => Beginning::TakeOver,
            _ if global.upgrade => Beginning::Wait,
            (_, Some(_)) if global.supervisor.is_some() && socket => {
                // Whoever answers there is found out about before this.
                match self.host().is_listed() {
                    Ok(true) => Beginning::Wait,
                    _ => Beginning::Mount,
                }
            }
            _ => Beginning::Mount,
        }
    }

    /// Where descriptor and state are kept.
    pub(crate) fn keeper(&self) -> Result<&Path, LifeError> {
        let global = &self.args().global;
        global.supervisor.as_deref().or(global.holder.as_deref()).ok_or(LifeError::NoSupervisor)
    }

    /// Held over each step that depends on the state or saves it: steps come one after the other.
    fn step(&self) -> MutexGuard<'_, ()> {
        self.steps().lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the supervisor the descriptor and the state. Blocks, for 10 seconds at most.
    ///
    /// # Errors
    /// `NotReady`, `NoSupervisor`, or the supervisor does not take them.
    pub fn save_state(&self) -> Result<(), LifeError> {
        if self.state() == State::Init {
            return Err(LifeError::NotReady);
        }
        let keeper = self.keeper()?;
        let _step = self.step();
        let fuse = self.fuse().ok_or(LifeError::NotReady)?;
        Ok(self.give(keeper, fuse)?)
    }

    /// Gives `nydusd supervise`, if that started this daemon, what it needs for another one; to be
    /// called after each change.
    ///
    /// # Errors
    /// It does not take it.
    pub(crate) fn tell_holder(&self) -> anyhow::Result<()> {
        let (Some(holder), Some(fuse)) = (&self.args().global.holder, self.fuse()) else { return Ok(()) };
        let _step = self.step();
        self.give(holder, fuse)
    }

    /// True for the socket of `nydusd supervise`.
    fn is_holder(&self, keeper: &Path) -> bool {
        self.args().global.holder.as_deref() == Some(keeper)
    }

    fn give(&self, keeper: &Path, fuse: &FuseMount) -> anyhow::Result<()> {
        let state = SavedState {
            release: crate::version::DESCRIBE.to_owned(),
            connection: fuse.number()?,
            negotiated: fuse.negotiated().context("the kernel has not asked for FUSE_INIT yet")?,
            vfs: self.adapter().table().save(),
            settings: self.hot().save(),
        };
        let context = || format!("give the state to the supervisor at {}", keeper.display());
        let stream = self.host().keeper(self.is_holder(keeper)).with_context(context)?;
        supervisor::send(stream, &state.encode()?, fuse.descriptor()).with_context(context)?;
        tracing::debug!("the state of {} mounts is with {}", state.vfs.mounts.len(), keeper.display());
        Ok(())
    }

    /// INIT → READY: adopts the mount that the supervisor holds. It is not served before
    /// [`Daemon::begin`]. Blocks.
    ///
    /// # Errors
    /// `Unexpected` outside INIT, `NoSupervisor`, or it can not be had; the daemon stays in INIT.
    pub fn take_over(&self) -> Result<(), LifeError> {
        let _step = self.step();
        if self.state() != State::Init || self.beginning_was() == Beginning::Mount {
            return Err(LifeError::Unexpected("Takeover"));
        }
        let global = &self.args().global;
        let keeper = global.holder.as_deref().or(global.supervisor.as_deref());
        let keeper = keeper.ok_or(LifeError::NoSupervisor)?;
        let context = || format!("take the state from the supervisor at {}", keeper.display());
        let stream = self.host().keeper(self.is_holder(keeper)).with_context(context)?;
        let (bytes, descriptor) = supervisor::receive(stream).with_context(context)?;
        let state = SavedState::decode(&bytes)?;
        let fuse = FuseMount::inherit(self.host(), descriptor, state.connection, state.negotiated)?;
        self.hot().restore(state.settings);
        let restored = self.make_engine().and_then(|engine| self.restore_mounts(engine, &state.vfs));
        if let Err(e) = restored {
            // Another one may fare better.
            fuse.abandon();
            return Err(e.into());
        }
        self.hold(fuse)?;
        tracing::info!("took over {} mounts of {}", state.vfs.mounts.len(), state.release);
        Ok(())
    }

    /// READY → RUNNING: serves the adopted mount, requests first that a predecessor took and did not
    /// answer.
    ///
    /// # Errors
    /// `Unexpected` outside READY, or the system refuses threads.
    pub fn begin(&self) -> Result<(), LifeError> {
        let _step = self.step();
        let fuse = match self.fuse() {
            Some(fuse) if self.state() == State::Ready && self.beginning_was() != Beginning::Mount => fuse,
            _ => return Err(LifeError::Unexpected("Start")),
        };
        self.inherit_upper();
        if let Front::Fuse(front) = self.front() {
            recovery::recover(fuse, front.failover_policy);
        }
        let correct = || fuse.correct(&self.adapter().table().take_outdated());
        // Nobody is answered by names that are over, where the kernel takes that without waiting for answers.
        let early = fuse.negotiated().is_some_and(|negotiated| negotiated.has_epochs());
        if early {
            correct();
        }
        // No FUSE_INIT comes, and the answer to it is not waited for.
        self.serve(fuse)?;
        if !early {
            correct();
        }
        self.set_running();
        Ok(())
    }

    /// Has the upper directory of a writable image, if there is one, to itself from the predecessor's end on.
    fn inherit_upper(&self) {
        for mount in self.adapter().table().mounts() {
            if let Some(overlay) = &mount.config().overlay {
                overlay.inherit(self.host().upper_directory(overlay, None));
            }
        }
    }
}
