//! The files behind one blob, and the one trait through which they are read and written.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::{Error, ErrorKind, Result};

/// Positioned access to one file. Tests record, cut and fail through it.
pub(super) trait Storage: Send + Sync + 'static {
    /// Fills `buffer`; the end of the file is an error.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Has the system read ahead, if it can.
    fn will_need(&self, _offset: u64, _len: u64) {}
    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Returns once all earlier writes would survive a power cut.
    fn sync(&self) -> io::Result<()>;
}

impl Storage for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn will_need(&self, offset: u64, len: u64) {
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        // Without it, reads are slower.
        let _ = posix_fadvise(self, offset.cast_signed(), len.cast_signed(), advice);
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Creates the cache directory with its parents and holds it alone while its files are
/// opened or replaced, so that processes that start at once agree on them.
pub(super) fn hold_directory(path: &Path) -> Result<File> {
    let context = |what: &str| format!("cache directory {}: {what}", path.display());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io(context("create it"), e))?;
    let directory = File::open(path).map_err(|e| Error::io(context("open it"), e))?;
    directory.lock().map_err(|e| Error::io(context("lock it"), e))?;
    Ok(directory)
}

/// Opens the data file `path` of exactly `size` bytes, making a new sparse one unless
/// the present one is a regular file of ours with that size.
///
/// A file that does not fit may be in use by another process under another idea of the
/// blob: it is replaced, never cut. Before a new file appears the map at `map_path` goes,
/// because the new file may get the inode number that map belongs to. The caller holds
/// `directory`.
pub(super) fn open_data(path: &Path, size: u64, map_path: &Path, directory: &File) -> Result<File> {
    let context = |what: &str| format!("cache file {}: {what}", path.display());
    if let Some(file) = open_own(path)?
        && file.metadata().map_err(|e| Error::io(context("stat"), e))?.len() == size
    {
        return Ok(file);
    }
    remove_map(map_path, directory)?;
    replace(path, |file| file.set_len(size)).map_err(|e| Error::io(context("create it"), e))
}

/// Removes a map, durably.
fn remove_map(path: &Path, directory: &File) -> Result<()> {
    let removed = match std::fs::remove_file(path) {
        Ok(()) => directory.sync_all(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    };
    removed.map_err(|e| Error::io(format!("chunk map {}: remove it", path.display()), e))
}

/// Takes a data file from the caller, growing it to `size` if it is empty, in which case
/// the map goes first. The caller holds `directory`.
///
/// # Errors
/// `Invalid`: not a regular file, or of another size.
pub(super) fn adopt_data(descriptor: OwnedFd, size: u64, map_path: &Path, directory: &File) -> Result<File> {
    let context = || "cache file from the caller".to_owned();
    let file = File::from(descriptor);
    let metadata = file.metadata().map_err(|e| Error::io(context(), e))?;
    if !metadata.is_file() || (metadata.len() != 0 && metadata.len() != size) {
        let what = format!("{}: want a regular file of 0 or {size} bytes", context());
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    if metadata.len() != size {
        remove_map(map_path, directory)?;
        file.set_len(size).map_err(|e| Error::io(context(), e))?;
    }
    Ok(file)
}

/// Opens `path` if it is a regular file that only we can write.
pub(super) fn open_own(path: &Path) -> Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path);
    let Ok(file) = opened else {
        // Absent, a link, a directory, not ours: whatever it is, it is not trusted.
        return Ok(None);
    };
    let metadata = file.metadata().map_err(|e| Error::io(format!("cache file {}", path.display()), e))?;
    let ours = metadata.is_file()
        && metadata.uid() == nix::unistd::geteuid().as_raw()
        && metadata.mode() & 0o022 == 0
        && metadata.nlink() == 1;
    Ok(ours.then_some(file))
}

/// Makes a new file (0600), lets `fill` write it, makes it durable and puts it at `path`.
pub(super) fn replace(path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&temporary)?;
    let written = fill(&file).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&temporary, path));
    if let Err(e) = written {
        // The error below says more than a failure to clean up would.
        let _ = std::fs::remove_file(&temporary);
        return Err(e);
    }
    Ok(file)
}
