//! The tree in saved state: the same nodes for a kernel that goes on using them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail, ensure};
use rafs::bootstrap::Nid;
use storage::engine::Engine;

use super::Vfs;
use super::command::{FsType, SavedMount, SavedVfs};
use super::mounted::{Mounted, Opened};
use super::path::VfsPath;
use super::place::Place;
use super::stale::Stale;
use super::tree::{FIRST_DIRECTORY, ROOT, State, changed};
use crate::daemon::Daemon;
use crate::image;
use crate::mount::{self, MountSpec};
use crate::node::{MAX_INDEX, MountIndex, NodeId};

/// Mounts that the kernel may come to know after a save and before the next one. Their indexes are
/// lost to a successor, which can not tell.
const UNSAVED_INDEXES: u32 = 32;
/// The same for directories.
const UNSAVED_DIRECTORIES: u64 = 1 << 16;
/// Directories have index 0 and so at most 40 bits; what is left suffices for those to come.
const LAST_DIRECTORY: u64 = (1 << 40) - (1 << 32);

impl Vfs {
    /// What a successor needs to answer for the same nodes.
    pub fn save(&self) -> SavedVfs {
        let state = self.read();
        let path = |mut number: u64| {
            let mut names = Vec::new();
            while number != ROOT {
                let directory = &state.directories[&number];
                names.push(directory.name.as_str());
                number = directory.parent;
            }
            names.iter().rev().map(|name| format!("/{name}")).collect::<String>()
        };
        let mut directories: Vec<(String, u64)> =
            state.directories.keys().filter(|number| **number != ROOT).map(|n| (path(*n), *n)).collect();
        directories.sort_unstable();
        let attached = state.slots.iter().filter(|slot| slot.attached);
        // There are no more slots than indexes, which have 24 bits.
        let next_index = state.slots.len() as u32 + 1 + UNSAVED_INDEXES;
        SavedVfs {
            mounts: attached.filter_map(|slot| Some(slot.mount.as_ref()?.saved())).collect(),
            next_index: next_index.min(MAX_INDEX + 1),
            directories,
            next_directory: state.next_directory + UNSAVED_DIRECTORIES,
            outdated: self.outdated().clone(),
            shares_xattrs: self.shares_xattrs(),
            shared_dir: None,
        }
    }

    /// Takes over the directories of a predecessor, and leaves its indexes to [`Vfs::restore_mount`].
    ///
    /// # Errors
    /// Something is mounted already, or the state is damaged.
    pub fn restore(&self, saved: &SavedVfs) -> anyhow::Result<()> {
        let mut state = self.write();
        ensure!(state.slots.is_empty() && state.directories.len() == 1, "something is mounted already");
        ensure!(
            (1..=MAX_INDEX + 1).contains(&saved.next_index),
            "damaged state: the next mount index is {}",
            saved.next_index
        );
        ensure!(
            saved.next_directory <= LAST_DIRECTORY,
            "damaged state: the next directory is {}",
            saved.next_directory
        );
        // The kernel may hold nodes of any index that was ever used.
        state.reserve_past(saved.next_index);
        let mut numbers = HashMap::from([(String::new(), ROOT)]);
        let mut directories: Vec<_> = saved.directories.iter().collect();
        directories.sort_unstable_by_key(|(path, _)| path.matches('/').count());
        for (path, number) in directories {
            let checked = VfsPath::parse(path).map_err(anyhow::Error::from)?;
            let context = || format!("damaged state: the directory {path}");
            let (name, parents) = checked.names().split_last().with_context(context)?;
            let parent: String = parents.iter().map(|name| format!("/{name}")).collect();
            let parent = *numbers.get(&parent).with_context(context)?;
            let range = FIRST_DIRECTORY..saved.next_directory;
            ensure!(range.contains(number) && !numbers.values().any(|n| n == number), context());
            ensure!(numbers.insert(checked.to_string(), *number).is_none(), context());
            state.add(*number, parent, name);
        }
        state.next_directory = saved.next_directory.max(FIRST_DIRECTORY);
        self.outdated().clone_from(&saved.outdated);
        Ok(())
    }

    /// Takes away what leads to no mount, after all mounts but those that are `lost` were restored: nobody is shown
    /// an empty directory for what could not be. The kernel has to be told of names that meant those.
    fn tidy(&self, lost: &[&SavedMount]) {
        let mut state = self.write();
        let chains = |state: &State| -> Vec<Option<(VfsPath, Vec<Option<NodeId>>)>> {
            let chain = |one: &&SavedMount| {
                let path = VfsPath::parse(&one.mountpoint).ok()?;
                let chain = state.chain(&path);
                Some((path, chain))
            };
            lost.iter().map(chain).collect()
        };
        let before = chains(&state);
        let leaves: Vec<u64> = state.directories.keys().copied().collect();
        leaves.into_iter().for_each(|number| state.prune(number));
        let after = chains(&state);
        drop(state);
        let mut outdated = Vec::new();
        for ((one, before), after) in lost.iter().zip(before).zip(after) {
            let (Some((path, mut before)), Some((_, after))) = (before, after) else { continue };
            if path.names().is_empty() {
                // Nobody knows any more which names there were.
                outdated.extend([Stale::Names, Stale::Node(NodeId::ROOT)]);
            } else if let Some(last) = before.last_mut() {
                // Its root, whatever number that had.
                *last = NodeId::new(MountIndex(one.index), Nid(0));
                let none = BTreeMap::new();
                outdated.extend(changed(&path, (&before, &none), (&after, &none)));
            }
        }
        let mut all = self.outdated();
        all.extend(outdated);
        all.sort_unstable();
        all.dedup();
    }

    /// Takes everything out of the tree. For a tree that no kernel has seen.
    fn clear(&self) {
        let old = std::mem::take(&mut *self.write());
        drop(old);
    }

    /// Mounts what `build` makes at the place that it had. Call after [`Vfs::restore`].
    ///
    /// # Errors
    /// The state is damaged.
    pub fn restore_mount<T: Into<Mounted>>(
        &self,
        saved: &SavedMount,
        build: impl FnOnce(Place) -> T,
    ) -> anyhow::Result<Mounted> {
        let path = VfsPath::parse(&saved.mountpoint)?;
        let mut state = self.write();
        let index = MountIndex(saved.index);
        let free = state.slot(index).is_some_and(|slot| slot.mount.is_none());
        if !free || state.mounted(&path).is_some() {
            bail!("damaged state: mount {} at {path}", saved.index);
        }
        let Some(slot) = state.slot_mut(index) else { bail!("damaged state: mount index {}", saved.index) };
        slot.generation = saved.generation;
        let place = Place { index, generation: saved.generation, lookups: Arc::clone(&slot.lookups) };
        let mount: Mounted = build(place).into();
        mount.set_restored();
        if mount.host().is_some() {
            self.inherits.store(true, Ordering::Relaxed);
        }
        let number = state.make(&path);
        state.put(number, mount.clone());
        Ok(mount)
    }
}

impl Daemon {
    /// Mounts everything of a predecessor's state, each image as it was then. Nothing is told to the
    /// kernel, for which nothing has changed. What can not be restored is left out with an error in the log: its
    /// nodes are stale from then on, and the others are served.
    ///
    /// # Errors
    /// The state is damaged, or of all its images each is gone or changed; nothing is mounted then.
    pub fn restore_mounts(&self, engine: &Arc<Engine>, saved: &SavedVfs) -> anyhow::Result<()> {
        let vfs = self.adapter().table();
        let open = |one: &SavedMount| {
            if let Some(source) = self.saved_directory(one, saved)? {
                return self.open_host(one.host_spec(source));
            }
            let spec = self.saved_spec(engine, one)?;
            Ok(Opened::Image(Box::new(mount::open(engine, spec, self.known(), self.dedup())?)))
        };
        let (mut opened, mut lost) = (Vec::new(), Vec::new());
        let mut last_error = None;
        for one in &saved.mounts {
            match open(one).with_context(|| format!("restore the mount at {}", one.mountpoint)) {
                Ok(mount) => opened.push((one, mount)),
                Err(e) => {
                    tracing::error!("{e:#}; what is open there fails from now on");
                    last_error = Some(e);
                    lost.push(one);
                }
            }
        }
        // Another successor may fare better, and this one would serve nothing.
        if let Some(e) = last_error.filter(|_| opened.is_empty()) {
            return Err(e);
        }
        let attach = || {
            vfs.restore(saved)?;
            let attached =
                opened.into_iter().map(|(one, opened)| vfs.restore_mount(one, |place| opened.at(place)));
            attached.collect::<anyhow::Result<Vec<_>>>()
        };
        // All of it or nothing.
        let mounts = attach().inspect_err(|_| vfs.clear())?;
        vfs.tidy(&lost);
        for mount in mounts.iter().filter_map(Mounted::image) {
            if mount.command().is_none() {
                self.hot().renew(mount);
                if mount.mountpoint() == "/" {
                    vfs.dedicate_again(saved.shares_xattrs, mount.has_xattrs());
                }
            }
            self.fetch_hints(engine, mount);
            self.fetch_configured(engine, mount);
        }
        Ok(())
    }

    /// The host directory that a mount shows, if it is one.
    fn saved_directory(&self, one: &SavedMount, saved: &SavedVfs) -> anyhow::Result<Option<PathBuf>> {
        if let Some(host) = &one.host {
            // Whatever its name means now, and from here: the kernel knows files of this one.
            return Ok(Some(host.path.clone()));
        }
        Ok(match (&one.command, &self.args().shared_dir) {
            (Some(command), _) if command.fs_type == FsType::Passthrough => Some(command.source.clone()),
            (Some(_), _) | (None, None) => None,
            (None, Some(_)) if saved.shared_dir.is_some() => saved.shared_dir.clone(),
            (None, Some(source)) => {
                let admitted = self.host().admit_shown(source, self.front().is_writable());
                Some(admitted.with_context(|| format!("--shared-dir {}", source.display()))?)
            }
        })
    }

    fn saved_spec(&self, engine: &Arc<Engine>, saved: &SavedMount) -> anyhow::Result<MountSpec> {
        // Before anything in it is looked for.
        mount::make_cache_dir(&saved.work_dir)?;
        let copy = copy_of(&saved.work_dir, &saved.bootstrap);
        let mut spec = match &saved.command {
            Some(command) => image::commanded(command.clone(), |config| {
                self.hot().amend(&command.mountpoint, config);
            })?,
            None => {
                let args = self.args();
                let mut plan = image::plan(&args.image, args.global.config.as_deref())?
                    .context("it came by a command line that had --image or --bootstrap")?;
                image::apply_serve_arguments(plan.config_mut(), args)?;
                let mountpoint = saved.mountpoint.clone();
                match copy.is_file() {
                    // A source may be down, and a tag may have moved.
                    true => image::resolve_again(plan, mountpoint, copy.clone())?,
                    false => image::resolve(engine, plan, mountpoint)?,
                }
            }
        };
        // Whatever lies under the image's name now: the kernel knows nodes of this one.
        spec.config.expect_bootstrap =
            Some(crate::cli::parse_sha256(&saved.bootstrap).map_err(anyhow::Error::msg)?);
        if copy.is_file() {
            spec.bootstrap = copy;
        }
        // Whoever goes on here started long ago: that is no start to learn from.
        spec.config.trace = crate::trace::Mode::Off;
        Ok(spec)
    }
}

/// Where the bootstrap of a mount was copied to.
fn copy_of(work_dir: &Path, digest: &str) -> std::path::PathBuf {
    work_dir.join(format!("{}.boot", digest.trim_start_matches("sha256:")))
}
