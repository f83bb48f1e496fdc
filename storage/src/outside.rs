//! What a sandboxed process has others do for it: open files, make directories, resolve names, run helpers.
//!
//! By default this process does it itself. One whose view of the file system is confined names somebody else, once and
//! before its first use; everything in these crates that opens what a user names goes through here.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Somebody who is not confined.
pub trait Outside: Send + Sync {
    /// Opens a file for reading: a regular one, or with `device` a block device.
    ///
    /// # Errors
    /// The system's, or another kind of file.
    fn open(&self, path: &Path, device: bool) -> io::Result<File>;

    /// Makes a directory with its parents, mode 0700, if it is not there; it can be used afterwards.
    ///
    /// # Errors
    /// The system's.
    fn make_directory(&self, path: &Path) -> io::Result<()>;

    /// Connects to the unix socket at `path`. Blocks.
    ///
    /// # Errors
    /// The system's: nobody listens, or it is no socket.
    fn connect(&self, path: &Path) -> io::Result<UnixStream>;

    /// The addresses of `host`. Blocks.
    ///
    /// # Errors
    /// It has none, or nobody can be asked.
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>>;

    /// What the credential helper `helper` says of `server`; `None` if it knows no login. Blocks.
    ///
    /// # Errors
    /// It can not be run, fails or takes too long.
    fn login(&self, helper: &str, server: &str) -> io::Result<Option<String>>;
}

static OUTSIDE: OnceLock<Arc<dyn Outside>> = OnceLock::new();

/// Has `outside` do it for this process from now on. Only the first call counts.
pub fn set(outside: Arc<dyn Outside>) {
    let _ = OUTSIDE.set(outside);
}

/// Who does it, if not this process.
pub fn get() -> Option<&'static dyn Outside> {
    OUTSIDE.get().map(Arc::as_ref)
}

/// Opens a file for reading. A fifo in its place blocks nobody; what is opened may be no regular file unless somebody
/// else opened it.
///
/// # Errors
/// The system's.
pub fn open(path: &Path) -> io::Result<File> {
    open_as(path, false)
}

/// The same, but waits for whoever writes to a fifo, if this process opens it.
///
/// # Errors
/// The system's.
pub fn open_or_wait(path: &Path) -> io::Result<File> {
    match get() {
        Some(outside) => outside.open(path, false),
        None => File::open(path),
    }
}

/// The same as [`open`] for what may be a block device.
///
/// # Errors
/// The system's.
pub fn open_device(path: &Path) -> io::Result<File> {
    open_as(path, true)
}

fn open_as(path: &Path, device: bool) -> io::Result<File> {
    match get() {
        Some(outside) => outside.open(path, device),
        None => File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path),
    }
}

/// All of a file.
///
/// # Errors
/// The system's.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Makes a directory with its parents, mode 0700, if it is not there.
///
/// # Errors
/// The system's.
pub fn make_directory(path: &Path) -> io::Result<()> {
    match get() {
        Some(outside) => outside.make_directory(path),
        None => DirBuilder::new().recursive(true).mode(0o700).create(path),
    }
}

/// Connects to the unix socket at `path`. Blocks.
///
/// # Errors
/// The system's.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    match get() {
        Some(outside) => outside.connect(path),
        None => UnixStream::connect(path),
    }
}
