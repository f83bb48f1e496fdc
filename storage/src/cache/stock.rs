//! What lies in a cache directory, and how to take it away while daemons use the rest.
//!
//! An item is a blob (its data, chunk map and blob context) or a bootstrap (with the trace of its
//! starts). Nothing else in the directory is looked at or touched: it may be a directory of
//! blobs, too.
//!
//! A blob is in use while somebody holds the use lock of its chunk map. Taking one away holds the
//! directory, so that nobody opens it meanwhile, and that lock. The map goes first, durably: what
//! a power cut leaves is a blob without ready chunks.

use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::chunk_map;
use crate::digest::Digest;
use crate::ids::BlobId;
use crate::{Error, ErrorKind, Result};

/// Bytes of one block of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// The kinds of items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Decoded data of a blob, named by the blob's id.
    Blob,
    /// The metadata of an image and the trace of its starts, named by the bootstrap's digest.
    Bootstrap,
}

impl Kind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Bootstrap => "bootstrap",
        }
    }

    /// Its files, the one that vouches for the others first.
    fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Blob => &[".blob.data.chunk_map", ".blob.data", ".blob.meta"],
            Self::Bootstrap => &[".boot", ".trace"],
        }
    }

    fn of(file_name: &str) -> Option<(Self, &str)> {
        [Self::Blob, Self::Bootstrap].into_iter().find_map(|kind| {
            let stem = kind.suffixes().iter().find_map(|suffix| file_name.strip_suffix(suffix))?;
            let ours = match kind {
                Self::Blob => BlobId::new(stem).is_ok(),
                Self::Bootstrap => Digest::from_hex(stem).is_ok(),
            };
            ours.then_some((kind, stem))
        })
    }
}

/// Does a cache have the blob open now?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// None has.
    Free,
    /// One has, in whichever process.
    InUse,
    /// Nobody can tell: its chunk map can not be opened or locked here.
    Unknown,
}

/// Something in a cache directory.
#[derive(Clone, Debug)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// Its blob id or digest.
    pub name: String,
    /// Its files that are there.
    pub files: Vec<PathBuf>,
    /// Bytes that they take on disk.
    pub allocated_size: u64,
    /// Length of the blob's decoded space; 0 for a bootstrap.
    pub decoded_size: u64,
    /// Ready chunks and all chunks, if the chunk map tells.
    pub chunks: Option<(u32, u32)>,
    /// When a daemon opened it, wrote or read it last, as far as its file system records that.
    pub last_use: SystemTime,
    /// By the lock of its chunk map. Bootstraps have none: `Unknown`.
    pub usage: Usage,
}

/// What became of an item that was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone.
    Removed,
    /// It stays: see [`Usage`].
    Kept(Usage),
}

/// Lists what lies in `dir`, in order of kind and name. Changes nothing.
///
/// # Errors
/// `NotFound`, `Denied`, `Io`: the directory can not be read.
pub fn list(dir: &Path) -> Result<Vec<Item>> {
    let failed = |e| Error::io(format!("read the cache directory {}", dir.display()), e);
    let mut found: BTreeMap<(Kind, String), Vec<(PathBuf, Metadata)>> = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let Some((kind, stem)) = name.to_str().and_then(Kind::of) else { continue };
        // One that has gone since is none.
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        if metadata.is_file() {
            found.entry((kind, stem.to_owned())).or_default().push((entry.path(), metadata));
        }
    }
    Ok(found.into_iter().map(|((kind, name), files)| item(dir, kind, name, files)).collect())
}

fn item(dir: &Path, kind: Kind, name: String, files: Vec<(PathBuf, Metadata)>) -> Item {
    let times = |metadata: &Metadata| [metadata.accessed().ok(), metadata.modified().ok()];
    let last_use = files.iter().flat_map(|(_, m)| times(m)).flatten().max().unwrap_or(SystemTime::UNIX_EPOCH);
    let allocated_size = files.iter().map(|(_, m)| m.blocks().saturating_mul(STAT_BLOCK)).sum();
    let data = dir.join(format!("{name}.blob.data"));
    let decoded_size = files.iter().find(|(path, _)| *path == data).map_or(0, |(_, m)| m.len());
    let (chunks, usage) = match kind {
        Kind::Bootstrap => (None, Usage::Unknown),
        Kind::Blob => match open_map(dir, &name) {
            Ok(None) => (None, Usage::Free),
            Ok(Some(map)) => (chunk_map::count_ready(&map), usage(&map)),
            Err(_) => (None, Usage::Unknown),
        },
    };
    let files = files.into_iter().map(|(path, _)| path).collect();
    Item { kind, name, files, allocated_size, decoded_size, chunks, last_use, usage }
}

/// The chunk map of a blob, if there is one.
fn open_map(dir: &Path, name: &str) -> io::Result<Option<File>> {
    let path = dir.join(format!("{name}{}", Kind::Blob.suffixes()[0]));
    let open = |flags| {
        let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path)
    };
    // To look is no use of a blob; only its owner may look unseen.
    let opened = open(libc::O_NOATIME).or_else(|e| match e.raw_os_error() {
        Some(libc::EPERM) => open(0),
        _ => Err(e),
    });
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn usage(map: &File) -> Usage {
    match chunk_map::is_open_elsewhere(map) {
        Ok(Some(true)) => Usage::InUse,
        Ok(Some(false)) => Usage::Free,
        Ok(None) | Err(_) => Usage::Unknown,
    }
}

/// Removes an item of `dir` from disk, unless a cache has it open.
///
/// Of a bootstrap only the caller can know whether it is in use; a daemon that has it mapped
/// keeps it, and one that starts later makes it anew. An item that is not there is removed.
///
/// # Errors
/// `Invalid`: no name of such an item. `Denied`, `Io`: a file or the directory can not be
/// opened, locked or removed.
pub fn remove(dir: &Path, kind: Kind, name: &str) -> Result<Removal> {
    if Kind::of(&format!("{name}{}", kind.suffixes()[0])) != Some((kind, name)) {
        return Err(Error::new(ErrorKind::Invalid, format!("{name:?} names no {}", kind.name())));
    }
    let failed = |what: &str, e| Error::io(format!("{} {name}: {what}", kind.name()), e);
    let directory = File::open(dir).map_err(|e| failed("open its directory", e))?;
    directory.lock().map_err(|e| failed("lock its directory", e))?;
    // Held until its files are gone.
    let map = match kind {
        Kind::Blob => open_map(dir, name).map_err(|e| failed("open its chunk map", e))?,
        Kind::Bootstrap => None,
    };
    if let Some(map) = &map {
        match chunk_map::try_hold_alone(map).map_err(|e| failed("lock its chunk map", e))? {
            Some(true) => {}
            Some(false) => return Ok(Removal::Kept(Usage::InUse)),
            None => return Ok(Removal::Kept(Usage::Unknown)),
        }
    }
    for suffix in kind.suffixes() {
        let path = dir.join(format!("{name}{suffix}"));
        match std::fs::remove_file(&path) {
            Ok(()) => directory.sync_all(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
        .map_err(|e| failed(&format!("remove {}", path.display()), e))?;
    }
    Ok(Removal::Removed)
}

/// What a file system must have for several daemons to share a cache directory on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locks {
    /// Locks of byte ranges exclude each other: who works on which chunk, who uses which blob.
    pub ranges: bool,
    /// A directory can be locked.
    pub directory: bool,
}

/// Tries the locks of the file system of `dir`, on a temporary file in it.
///
/// # Errors
/// `Denied`, `Io`: no file can be made there.
pub fn try_locks(dir: &Path) -> Result<Locks> {
    let failed = |e| Error::io(format!("no file can be made in {}", dir.display()), e);
    let file = tempfile::NamedTempFile::with_prefix_in(".fetch-", dir).map_err(failed)?;
    let other = file.reopen().map_err(failed)?;
    let ranges = matches!(chunk_map::try_hold_alone(file.as_file()), Ok(Some(true)))
        && matches!(chunk_map::try_hold_alone(&other), Ok(Some(false)));
    let directory =
        File::open(dir).and_then(|directory| directory.try_lock_shared().map_err(io::Error::from));
    // Somebody else's hold shows that it works.
    let directory = match directory {
        Ok(()) => true,
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
    };
    Ok(Locks { ranges, directory })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{read_dir, write};
    use std::time::Duration;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn stocked() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut map = vec![0; 4096 + 3 * 32];
        map[..8].copy_from_slice(b"rdychnks");
        map[8] = 1;
        map[12] = 3;
        map[4096 + 32 + 8] = 1;
        for (suffix, bytes) in [
            (".blob.data", vec![7; 8192]),
            (".blob.data.chunk_map", map),
            (".blob.meta", vec![1; 10]),
            (".boot", vec![1; 4096]),
            (".trace", vec![1; 10]),
            // A directory may hold the blobs themselves, and anything else.
            ("", vec![1; 10]),
            (".blob.raw", vec![1; 10]),
        ] {
            write(dir.path().join(format!("{ID}{suffix}")), bytes).unwrap();
        }
        write(dir.path().join("notes.boot"), "no digest").unwrap();
        dir
    }

    #[test]
    fn to_look_is_no_use() {
        let dir = stocked();
        let map = dir.path().join(format!("{ID}.blob.data.chunk_map"));
        let old = SystemTime::now() - Duration::from_secs(7 * 86_400);
        // Older than a day: also where reads seldom move the time of access.
        let times = std::fs::FileTimes::new().set_accessed(old).set_modified(old);
        File::options().write(true).open(&map).unwrap().set_times(times).unwrap();
        let before = map.metadata().unwrap().accessed().unwrap();
        list(dir.path()).unwrap();
        assert_eq!(map.metadata().unwrap().accessed().unwrap(), before);
    }

    #[test]
    fn a_directory_is_listed_by_item() {
        let dir = stocked();
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        let items = list(dir.path()).unwrap();
        let [blob, bootstrap] = &items[..] else { panic!("{items:?}") };
        assert_eq!((blob.kind, blob.name.as_str(), blob.files.len()), (Kind::Blob, ID, 3));
        assert_eq!((blob.chunks, blob.decoded_size, blob.usage), (Some((1, 3)), 8192, Usage::Free));
        assert!(blob.allocated_size >= 8192 && blob.last_use > long_ago);
        assert_eq!((bootstrap.kind, bootstrap.files.len()), (Kind::Bootstrap, 2));
        assert_eq!(list(&dir.path().join("nowhere")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_in_use_stays_and_what_is_not_goes_whole() {
        let dir = stocked();
        let user = open_map(dir.path(), ID).unwrap().unwrap();
        assert_eq!(chunk_map::try_hold_alone(&user).unwrap(), Some(true));
        assert_eq!(list(dir.path()).unwrap()[0].usage, Usage::InUse);
        let before = names(dir.path());
        assert_eq!(remove(dir.path(), Kind::Blob, ID).unwrap(), Removal::Kept(Usage::InUse));
        assert_eq!(names(dir.path()), before);
        drop(user);
        assert_eq!(remove(dir.path(), Kind::Blob, ID).unwrap(), Removal::Removed);
        assert_eq!(remove(dir.path(), Kind::Bootstrap, ID).unwrap(), Removal::Removed);
        assert_eq!(names(dir.path()), [ID.to_owned(), format!("{ID}.blob.raw"), "notes.boot".to_owned()]);
        assert_eq!(remove(dir.path(), Kind::Blob, ID).unwrap(), Removal::Removed);
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", "../x", "a/b", &format!("../{ID}")] {
            assert_eq!(
                remove(dir.path(), Kind::Blob, name).unwrap_err().kind(),
                ErrorKind::Invalid,
                "{name}"
            );
        }
    }

    #[test]
    fn this_file_system_has_the_locks() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(try_locks(dir.path()).unwrap(), Locks { ranges: true, directory: true });
        assert_eq!(names(dir.path()), [""; 0]);
    }
}
