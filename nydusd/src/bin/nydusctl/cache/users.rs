//! Which processes have files of a directory open or mapped, as far as this user may see.
//!
//! To list what a process has mapped waits for its memory's lock, and a process that stands in a page
//! fault on a stalled mount may keep that for ever: only daemons are asked, which read no mount.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use storage::cache::stock::{Item, Kind};

use crate::discover::DAEMON;

/// Process ids and names by file.
pub struct Users(BTreeMap<PathBuf, BTreeSet<(u32, String)>>);

impl Users {
    /// Looks at all processes. `dir` is canonical.
    pub fn of(dir: &Path) -> Self {
        let mut users = BTreeMap::<PathBuf, BTreeSet<(u32, String)>>::new();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let process = process.path();
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            let maps = if name.starts_with(DAEMON) { mapped(&process) } else { BTreeSet::new() };
            let files: Vec<PathBuf> =
                opened(&process).chain(maps).filter(|path| path.starts_with(dir)).collect();
            if files.is_empty() {
                continue;
            }
            // A program chooses its own name.
            let name = name.trim_end().escape_debug().to_string();
            for file in files {
                users.entry(file).or_default().insert((pid, name.clone()));
            }
        }
        Self(users)
    }

    /// Who uses an item: of a blob its chunk map, of a bootstrap the file itself.
    pub fn of_item(&self, item: &Item) -> Vec<&(u32, String)> {
        let sign = match item.kind {
            Kind::Blob => ".chunk_map",
            Kind::Bootstrap => ".boot",
        };
        let files = item.files.iter().filter(|file| file.as_os_str().as_bytes().ends_with(sign.as_bytes()));
        files.filter_map(|file| self.0.get(file)).flatten().collect()
    }
}

fn opened(process: &Path) -> impl Iterator<Item = PathBuf> {
    let descriptors = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    descriptors.filter_map(|entry| entry.path().read_link().ok()).map(|path| still(path.as_os_str()))
}

fn mapped(process: &Path) -> BTreeSet<PathBuf> {
    let maps = std::fs::read(process.join("maps")).unwrap_or_default();
    // Address, permissions, offset, device, inode, and what the rest of the line is.
    maps.split(|byte| *byte == b'\n')
        .filter_map(|line| line.iter().position(|byte| *byte == b'/').map(|at| &line[at..]))
        .map(|path| still(OsStr::from_bytes(path)))
        .collect()
}

/// The name that a file had. One that was replaced since is in use under its old name all the same:
/// its user may ask for that name again.
fn still(path: &OsStr) -> PathBuf {
    let bytes = path.as_bytes();
    Path::new(OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes))).to_owned()
}
