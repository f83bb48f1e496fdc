//! The cache directory and its file system.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{Whence, lseek};
use storage::cache::stock;

use super::Finding;
use crate::why::size;

/// Free bytes below which a node's images will hardly fit.
const FREE: u64 = 4 << 30;
/// Length of the file that shows whether holes take space.
const SPARSE: u64 = 64 << 20;
/// Longest name of a cache file: 64 characters of an id, `.blob.data.chunk_map.tmp`.
const LONGEST_NAME: u64 = 64 + 24;

/// Looks at `dir`, or where it will be made. Leaves nothing there.
pub fn look(dir: &Path) -> Vec<Finding> {
    let name = "cache directory";
    let Some(present) = nearest(dir) else {
        return vec![Finding::missing(name, format!("{}: no such path", dir.display()), "name another")];
    };
    let mut findings = Vec::new();
    if !present.is_dir() {
        return vec![Finding::missing(
            name,
            format!("{} is no directory", present.display()),
            "name another",
        )];
    }
    match present == dir {
        true => findings.push(foreign(dir)),
        false => findings.push(Finding::ok(name, format!("{} will be made", dir.display()))),
    }
    match stock::try_locks(&present) {
        Err(e) => {
            let remedy = "name a directory on a local disk where this user may write (--cache-dir), or `chown` this one";
            findings.push(Finding::missing("write access", nydusd::logging::chain(&e), remedy));
        }
        Ok(locks) => {
            findings.push(Finding::ok("write access", present.display().to_string()));
            findings.push(match (locks.ranges, locks.directory) {
                (true, true) => Finding::ok("locks", "of byte ranges and directories"),
                _ => Finding::warning(
                    "locks",
                    "this file system does not have them",
                    "a local file system (ext4, xfs, btrfs), or a directory for each daemon: \
                     daemons can not share this one, and `nydusctl cache` removes nothing from it",
                ),
            });
            findings.push(holes(&present));
        }
    }
    findings.push(space(&present));
    findings
}

/// `dir` or the nearest directory above it that exists.
fn nearest(dir: &Path) -> Option<PathBuf> {
    let dir = std::path::absolute(dir).ok()?;
    dir.ancestors().find(|path| path.symlink_metadata().is_ok()).map(Path::to_owned)
}

/// Others could change what lies in it.
fn foreign(dir: &Path) -> Finding {
    let name = "cache directory";
    let shown = dir.display();
    match dir.metadata() {
        Err(e) => Finding::missing(name, format!("{shown}: {e}"), "a directory that this user may enter"),
        Ok(metadata) if metadata.mode() & 0o022 != 0 => Finding::warning(
            name,
            format!("{shown} can be written by others (mode {:o})", metadata.mode() & 0o7777),
            format!("`chmod go-w {shown}`: who can replace its files can waste them"),
        ),
        Ok(_) => Finding::ok(name, shown.to_string()),
    }
}

/// Do holes take no space, and are they found again?
fn holes(dir: &Path) -> Finding {
    let name = "sparse files";
    let tried = || -> std::io::Result<(bool, bool)> {
        let file: File = tempfile::tempfile_in(dir)?;
        file.set_len(SPARSE)?;
        let last = SPARSE - 4096;
        file.write_all_at(&[1; 4096], last)?;
        file.sync_data()?;
        let seek = lseek(file.as_fd(), 0, Whence::SeekData).ok().and_then(|at| u64::try_from(at).ok());
        let found = seek.is_some_and(|at| at > 0 && at <= last);
        Ok((file.metadata()?.blocks() * 512 < SPARSE / 2, found))
    };
    match tried() {
        Ok((true, true)) => Finding::ok(name, "holes take no space"),
        Ok((true, false)) => Finding::warning(
            name,
            "holes are not told apart from data",
            "another file system: listing the cache reads whole maps here",
        ),
        Ok((false, _)) => Finding::warning(
            name,
            "holes take space",
            "another file system: here each blob takes its whole decoded size",
        ),
        Err(e) => {
            Finding::missing(name, e.to_string(), "room for a file, on a file system that can be written")
        }
    }
}

fn space(dir: &Path) -> Finding {
    let name = "free space";
    let stat = match statvfs(dir) {
        Ok(stat) => stat,
        Err(e) => return Finding::warning(name, format!("unknown: {e}"), "a file system that tells"),
    };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let nodes = stat.files_available();
    if stat.flags().contains(FsFlags::ST_RDONLY) {
        return Finding::missing(name, "mounted read-only", "remount it, or name another directory");
    }
    if stat.name_max() < LONGEST_NAME {
        let found = format!("names of at most {} characters", stat.name_max());
        return Finding::missing(name, found, "a file system with names of 255 characters");
    }
    if stat.files() > 0 && nodes < 1024 {
        return Finding::warning(name, format!("{nodes} inodes left"), "remove files: each blob takes three");
    }
    match free < FREE {
        true => Finding::warning(
            name,
            size(free),
            "make room, or `nydusctl cache prune`: with a full disk every read goes to the source",
        ),
        false => Finding::ok(name, size(free)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_directory_to_be_made_is_judged_by_the_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let findings = look(&dir.path().join("a/b"));
        assert!(findings[0].found.contains("will be made"), "{findings:?}");
        assert!(findings.iter().all(|finding| finding.state != State::Missing), "{findings:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_can_not_be_written_is_told_with_the_cause() {
        // Not even root makes a file there.
        let findings = look(Path::new("/proc/self"));
        let finding = findings.iter().find(|finding| finding.name == "write access").unwrap();
        assert_eq!(finding.state, State::Missing);
        assert!(finding.found.starts_with("no file can be made in /proc/self: "), "{finding:?}");
        assert!(finding.remedy.as_ref().unwrap().contains("--cache-dir"), "{finding:?}");
    }

    #[test]
    fn a_file_is_no_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let findings = look(&file.path().join("cache"));
        assert!(findings[0].found.contains("is no directory") && findings[0].state == State::Missing);
    }

    #[test]
    fn a_directory_that_others_may_write_is_told() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(look(dir.path())[0].state, State::Warning);
    }
}
