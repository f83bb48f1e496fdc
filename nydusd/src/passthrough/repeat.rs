//! Requests that are given out again: a predecessor that died may have done what they ask for, and not have said so.
//!
//! The kernel holds a directory from its last look at a name until the answer to the request that changes it, so what
//! is found there is the predecessor's, unless somebody changed the directory on the host in between. That can not
//! be told apart where the outcome is the same: a name that was to go is gone, a new directory of the same owner and
//! mode is empty. Then the caller is told that it was done, which it is. What differs is refused as ever. Two files
//! that were to change places are not swapped again, nor is the caller told that they were (EIO): either way
//! both names are there.
//!
//! Nobody has looked at an extended attribute before it is changed. One that was to go and is not there may never have
//! been: the caller is told that it is gone, which it is. One that was to be made, and nothing but made, and is there
//! with that value may be somebody else's: nobody is told that it is theirs (EIO).

use std::cell::Cell;
use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, Stat};
use rustix::io::Errno;

use super::nodes::Node;
use super::path_of;

thread_local! {
    static REPEATED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `answer`, which answers a request that was given out before if `repeated`.
pub(crate) fn answering<T>(repeated: bool, answer: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            REPEATED.set(self.0);
        }
    }
    let _before = Before(REPEATED.replace(repeated));
    answer()
}

/// True while a request is answered that was given out before.
pub(super) fn is_repeated() -> bool {
    REPEATED.get()
}

/// What a change comes to: `refusal` is no failure if the request is repeated and `is_done`.
pub(super) fn settle(
    result: rustix::io::Result<()>,
    refusal: Errno,
    is_done: impl FnOnce() -> io::Result<bool>,
) -> io::Result<()> {
    match result {
        Err(e) if e == refusal && is_repeated() && is_done()? => Ok(()),
        result => Ok(result?),
    }
}

/// A file as it is asked for.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub kind: FileType,
    /// Without its type; not yet masked.
    pub mode: u32,
    pub mask: u32,
    pub device: u64,
    /// Of a symbolic link.
    pub target: Option<&'a CStr>,
}

/// True if `name` in `dir` is as if it had just been made for this caller, and nobody has used it.
pub(super) fn is_made(dir: &Node, name: &CStr, caller: &Context, wanted: &Wanted<'_>) -> io::Result<bool> {
    let st = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let above = rustix::fs::fstat(dir)?;
    let kind = FileType::from_raw_mode(st.st_mode);
    // A directory may hand its group on.
    let group = st.st_gid == caller.gid || (above.st_mode & libc::S_ISGID != 0 && st.st_gid == above.st_gid);
    if kind != wanted.kind || st.st_uid != caller.uid || !group {
        return Ok(false);
    }
    Ok(match kind {
        FileType::Symlink => {
            rustix::fs::readlinkat(dir, name, Vec::new())?.as_c_str() == wanted.target.unwrap_or_default()
        }
        FileType::Directory => has_mode(dir, &st, wanted)? && is_empty(dir, name)?,
        FileType::CharacterDevice | FileType::BlockDevice => {
            has_mode(dir, &st, wanted)? && st.st_rdev == wanted.device && st.st_nlink == 1
        }
        _ => has_mode(dir, &st, wanted)? && st.st_size == 0 && st.st_nlink == 1,
    })
}

/// Set-group-id comes with a directory or goes with its group; a default ACL has its own idea of permissions.
fn has_mode(dir: &Node, st: &Stat, wanted: &Wanted<'_>) -> io::Result<bool> {
    let permissions = match rustix::fs::getxattr(path_of(dir), c"system.posix_acl_default", &mut [0; 0][..]) {
        Ok(_) => 0,
        Err(Errno::NODATA | Errno::NOTSUP) => 0o777,
        Err(e) => return Err(e.into()),
    };
    let compared = libc::S_ISUID | libc::S_ISVTX | permissions;
    Ok(st.st_mode & compared == wanted.mode & !wanted.mask & compared)
}

fn is_empty(dir: &Node, name: &CStr) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let mut buffer = Vec::with_capacity(1 << 10);
    let mut entries = RawDir::new(&made, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// True if a rename was done before; it must not be done again then.
///
/// # Errors
/// EIO: nobody knows.
pub(super) fn is_renamed(
    (old_dir, old): (&Node, &CStr),
    (new_dir, new): (&Node, &CStr),
    flags: RenameFlags,
) -> io::Result<bool> {
    if !is_repeated() {
        return Ok(false);
    }
    if flags.contains(RenameFlags::EXCHANGE) {
        return Err(io::Error::from_raw_os_error(libc::EIO));
    }
    let left = look(old_dir, old)?;
    let left_over = match left {
        // What it leaves behind, if that was asked for.
        Some(st) if flags.contains(RenameFlags::WHITEOUT) => {
            FileType::from_raw_mode(st.st_mode) == FileType::CharacterDevice && st.st_rdev == 0
        }
        Some(_) => false,
        None => true,
    };
    Ok(left_over && look(new_dir, new)?.is_some())
}

/// True if `name` is one more name of `file`.
pub(super) fn is_linked(file: impl AsFd, dir: &Node, name: &CStr) -> io::Result<bool> {
    let file = rustix::fs::fstat(file)?;
    Ok(look(dir, name)?.is_some_and(|st| (st.st_dev, st.st_ino) == (file.st_dev, file.st_ino)))
}

fn look(dir: &Node, name: &CStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(st) => Ok(Some(st)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
