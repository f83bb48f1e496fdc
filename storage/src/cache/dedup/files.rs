//! Files that are opened because somebody named them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

/// Opens a cache file of this machine: a regular file that is named like one, through no link. Rows
/// that we write have no links in their paths.
///
/// # Errors
/// The system's; `InvalidInput`: it is no such file.
pub fn open_cache_file(path: &Path) -> io::Result<File> {
    let is_named = path.is_absolute() && path.as_os_str().as_encoded_bytes().ends_with(b".blob.data");
    if !is_named {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = match crate::outside::get() {
        Some(outside) => outside.open(path, false)?,
        None => {
            // A pipe must not hold us up.
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
            File::from(openat2(AT_FDCWD, path, how)?)
        }
    };
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// True if a file is not there.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// True if a file is there, and not for us.
pub(super) fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied)
        || error.raw_os_error() == Some(libc::ELOOP)
}

/// Makes the file for us alone, or sees that nobody else can write or replace it, and what SQLite puts
/// beside it. Answers its path without links.
///
/// # Errors
/// The system's, and that others could.
pub(super) fn private(path: &Path) -> io::Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no name of a file"));
    };
    let directory = parent.canonicalize()?;
    let us = nix::unistd::geteuid().as_raw();
    let found = directory.metadata()?;
    // Where everybody may make files, others' are among ours, whatever the sticky bit says.
    if ![us, 0].contains(&found.uid()) || found.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!(
            "its directory {} must belong to this user or root, and nobody else may write it",
            directory.display()
        )));
    }
    let path = directory.join(name);
    let made =
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(libc::O_CLOEXEC).open(&path);
    match made {
        Ok(_) => return Ok(path),
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        // Not opened: closing it would give back the locks that this process has on it.
        Err(_) => {}
    }
    let found = path.symlink_metadata()?;
    if found.is_file() && found.uid() == us && found.mode() & 0o022 == 0 {
        return Ok(path);
    }
    Err(io::Error::other("it must be a file of this user that nobody else can write, and no link"))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, create_dir, set_permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn nobody_else_can_write_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let (own, link) = (dir.path().join("own"), dir.path().join("link"));
        create_dir(&own).unwrap();
        symlink(&own, &link).unwrap();
        let set = |path: &Path, mode| set_permissions(path, Permissions::from_mode(mode)).unwrap();
        set(&own, 0o755);
        let file = own.canonicalize().unwrap().join("cas.db");
        // Made, and found again, by any way.
        assert_eq!(private(&link.join("cas.db")).unwrap(), file);
        assert_eq!(private(&file).unwrap(), file);
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        set(&file, 0o620);
        assert!(private(&file).is_err());
        symlink(&file, own.join("other.db")).unwrap();
        set(&file, 0o600);
        assert!(private(&own.join("other.db")).is_err());
        for mode in [0o775, 0o757, 0o1777] {
            set(&own, mode);
            let error = private(&file).unwrap_err().to_string();
            assert!(error.contains("nobody else may write it"), "{error}");
        }
    }

    #[test]
    fn only_files_of_a_cache_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a.blob.data"), dir.path().join("b.blob.data"));
        std::fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        std::fs::create_dir(dir.path().join("c.blob.data")).unwrap();
        let pipe = dir.path().join("d.blob.data");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        assert!(open_cache_file(&file).is_ok());
        for other in [&link, &dir.path().join("c.blob.data"), &pipe, &dir.path().join("secret")] {
            assert!(!is_gone(&open_cache_file(other).unwrap_err()), "{}", other.display());
        }
        // No directory on the way is a link, either.
        let (directory, way) = (dir.path().join("directory"), dir.path().join("way"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("a.blob.data"), "x").unwrap();
        std::os::unix::fs::symlink(&directory, &way).unwrap();
        assert!(open_cache_file(&directory.join("a.blob.data")).is_ok());
        assert!(is_closed(&open_cache_file(&way.join("a.blob.data")).unwrap_err()));
        assert!(is_gone(&open_cache_file(&dir.path().join("e.blob.data")).unwrap_err()));
        assert!(is_gone(&open_cache_file(&file.join("f.blob.data")).unwrap_err()));
    }
}
