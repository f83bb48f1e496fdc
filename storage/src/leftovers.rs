//! Temporary files of processes that were killed.
//!
//! Whoever writes a file under a temporary name removes it when it fails, but not when it is
//! killed. Nobody can tell such a file from one that is being written but by its age.

use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Age without a change from which nobody works on a temporary file any more: no transfer and no
/// build pauses for so long.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Removes from `dir` the files and directories whose names `is_temporary`, which belong to this
/// user and in which nothing has changed for a day. Other directories are not entered.
///
/// What can not be removed stays: it only takes space. Each removal is logged, and answered.
pub fn sweep(dir: &Path, is_temporary: impl Fn(&[u8]) -> bool) -> Vec<PathBuf> {
    let mut gone = Vec::new();
    let Ok(entries) = std::fs::read_dir(dir) else { return gone };
    let own = nix::unistd::geteuid().as_raw();
    for entry in entries.flatten().filter(|entry| is_temporary(entry.file_name().as_bytes())) {
        let path = entry.path();
        let Ok(metadata) = path.symlink_metadata() else { continue };
        let abandoned =
            newest(&path, &metadata).is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age >= ABANDONED));
        if metadata.uid() != own || !abandoned {
            continue;
        }
        let removed =
            if metadata.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Ok(()) => {
                tracing::info!("removed {}, which a killed process left", path.display());
                gone.push(path);
            }
            Err(e) => tracing::debug!("{} is left by a killed process: {e}", path.display()),
        }
    }
    gone
}

/// Latest change of a file, or of a directory and all below it.
fn newest(path: &Path, metadata: &Metadata) -> io::Result<SystemTime> {
    let mut latest = metadata.modified()?;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            latest = latest.max(newest(&entry.path(), &entry.metadata()?)?);
        }
    }
    Ok(latest)
}

/// True for the temporary names that are used in a cache directory.
pub fn is_cache_temporary(name: &[u8]) -> bool {
    let begins = [".fetch-", ".boot-", ".bootstrap-", ".meta-", ".trace-"];
    let ends = [".blob.data.tmp", ".blob.data.chunk_map.tmp", ".blob.meta.tmp"];
    begins.iter().any(|begin| name.starts_with(begin.as_bytes()))
        || ends.iter().any(|end| name.ends_with(end.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::fs::{File, create_dir, read_dir, write};

    fn age(path: &Path, age: Duration) {
        File::open(path).unwrap().set_modified(SystemTime::now() - age).unwrap();
    }

    #[test]
    fn only_old_temporary_entries_go() {
        let dir = tempfile::tempdir().unwrap();
        let old = ABANDONED + Duration::from_secs(60);
        let long = "0123456789abcdef.blob.data";
        for (name, after) in [
            (".fetch-old", old),
            (".boot-old", old),
            (".bootstrap-old", old),
            (".meta-old", old),
            ("0123.blob.data.tmp", old),
            ("0123.blob.data.chunk_map.tmp", old),
            ("0123.blob.meta.tmp", old),
            (".fetch-new", ABANDONED / 2),
            (long, old),
            ("0123.tmp", old),
            (".hidden", old),
        ] {
            write(dir.path().join(name), name).unwrap();
            age(&dir.path().join(name), after);
        }
        // A directory is as new as the newest in it.
        for (name, inside) in [(".boot-dir-old", old), (".boot-dir-new", Duration::ZERO)] {
            let below = dir.path().join(name);
            create_dir(&below).unwrap();
            write(below.join("file"), "").unwrap();
            age(&below.join("file"), inside);
            age(&below, old);
        }
        sweep(dir.path(), is_cache_temporary);
        let mut left: Vec<_> = read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".boot-dir-new", ".fetch-new", ".hidden", "0123.tmp", long].map(OsStr::new));
        sweep(&dir.path().join("nowhere"), is_cache_temporary);
    }
}
