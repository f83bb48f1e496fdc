//! Extended attributes of what a descriptor stands for. Some take rights that a sandboxed daemon has given up: those it
//! has somebody else see to.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::XattrFlags;
use serde::{Deserialize, Serialize};

use super::path_of;

/// Longest value, and longest list of names, that the kernel takes.
pub(super) const XATTR_MAX: usize = 64 << 10;

/// What is to be done with them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum XattrCall {
    /// The value of one.
    Get { name: CString },
    /// The names of all, each ended by a zero.
    List,
    /// One gets a value; the flags are the kernel's.
    Set {
        /// Its name.
        name: CString,
        /// Its value.
        #[serde(with = "crate::sandbox::packed")]
        value: Vec<u8>,
        /// XATTR_CREATE, XATTR_REPLACE.
        flags: u32,
    },
    /// One goes.
    Remove { name: CString },
}

impl XattrCall {
    /// True if it takes rights over the whole system.
    fn is_privileged(&self) -> bool {
        let trusted = |name: &CStr| name.to_bytes().starts_with(b"trusted.");
        match self {
            // Others are not told of names that they may not read.
            Self::List => true,
            Self::Get { name } => trusted(name),
            Self::Set { name, .. } | Self::Remove { name } => {
                trusted(name) || name.to_bytes().starts_with(b"security.")
            }
        }
    }

    /// Does it for whoever asks the daemon; what was asked for, if anything was.
    ///
    /// # Errors
    /// The system's.
    pub fn run(self, file: impl AsFd) -> io::Result<Vec<u8>> {
        match crate::sandbox::outside().filter(|_| self.is_privileged()) {
            Some(outside) => {
                let is_list = self == Self::List;
                match outside.xattr(self, file.as_fd()) {
                    // Most names need no rights, and nobody is left to tell the others.
                    Err(_) if is_list && outside.has_ended() => Self::List.run_here(file.as_fd()),
                    answer => answer,
                }
            }
            None => self.run_here(file.as_fd()),
        }
    }

    /// The same for a sandboxed daemon: only what that may not do itself.
    ///
    /// # Errors
    /// The system's; EPERM.
    pub fn run_for(self, file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        if !self.is_privileged() {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.run_here(file)
    }

    fn run_here(self, file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        let path = path_of(file);
        let mut found = vec![0; if matches!(self, Self::Get { .. } | Self::List) { XATTR_MAX } else { 0 }];
        match self {
            Self::Get { name } => {
                let len = rustix::fs::getxattr(path, &name, &mut found[..])?;
                found.truncate(len);
            }
            Self::List => {
                let len = rustix::fs::listxattr(path, &mut found[..])?;
                found.truncate(len);
            }
            Self::Set { name, value, flags } => {
                rustix::fs::setxattr(path, &name, &value, XattrFlags::from_bits_retain(flags))?;
            }
            Self::Remove { name } => rustix::fs::removexattr(path, &name)?,
        }
        Ok(found)
    }
}

/// As the kernel asks: a list of bytes, or how many they are if `size` is 0.
///
/// # Errors
/// ERANGE: there are more than `size`.
pub(super) fn fit(found: Vec<u8>, size: u32) -> io::Result<Result<Vec<u8>, u32>> {
    let len = u32::try_from(found.len()).unwrap_or(u32::MAX);
    match size {
        0 => Ok(Err(len)),
        size if len > size => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        _ => Ok(Ok(found)),
    }
}
