//! What the tree knows of one inode.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{FileId, InodeId, Xattrs};

/// Entries of a directory in byte order of names.
pub type Children = BTreeMap<Box<[u8]>, InodeId>;

/// What `stat` tells about an inode, and its xattrs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits (`0o7777`); the type is in the content.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Nanoseconds, below 10^9.
    pub mtime_nsec: u32,
    /// Seconds since the epoch, negative before 1970.
    pub mtime: i64,
    /// Extended attributes.
    pub xattrs: Xattrs,
    /// Directories read back from RAFS v5: the size stated there, which merges keep although it
    /// follows from names. 0: nothing is stated.
    pub directory_size: u64,
}

impl Metadata {
    /// 0755, owned by root, made at the epoch: what a directory gets that the source only
    /// implies.
    pub fn implied_directory() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime_nsec: 0,
            mtime: 0,
            xattrs: Xattrs::default(),
            directory_size: 0,
        }
    }
}

/// Type of an inode and what comes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Directory.
    Directory(Children),
    /// Regular file.
    Regular {
        /// Its bytes among the session's files.
        file: FileId,
        /// Bytes.
        size: u64,
    },
    /// Symbolic link with its target, 1 to 4096 bytes without NUL.
    Symlink(Arc<[u8]>),
    /// Character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Fifo.
    Fifo,
    /// Socket.
    Socket,
}

impl Content {
    /// Type bits of `st_mode`.
    pub fn type_bits(&self) -> u32 {
        match self {
            Self::Directory(_) => libc::S_IFDIR,
            Self::Regular { .. } => libc::S_IFREG,
            Self::Symlink(_) => libc::S_IFLNK,
            Self::CharDevice { .. } => libc::S_IFCHR,
            Self::BlockDevice { .. } => libc::S_IFBLK,
            Self::Fifo => libc::S_IFIFO,
            Self::Socket => libc::S_IFSOCK,
        }
    }

    /// Device number in the kernel's 32-bit encoding (rafs-v6 section 4.4), 0 for others.
    pub fn rdev(&self) -> u32 {
        match *self {
            Self::CharDevice { major, minor } | Self::BlockDevice { major, minor } => {
                (minor & 0xff) | major << 8 | (minor & !0xff) << 12
            }
            _ => 0,
        }
    }
}

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Attributes.
    pub metadata: Metadata,
    /// Type and content.
    pub content: Content,
    /// A directory the source never listed itself, only entries below it: in a merge it
    /// keeps the attributes of the lower directory.
    pub implied: bool,
}

impl Inode {
    /// An inode the source lists.
    pub fn new(metadata: Metadata, content: Content) -> Self {
        Self { metadata, content, implied: false }
    }

    /// `st_mode` with type bits.
    pub fn mode(&self) -> u32 {
        self.content.type_bits() | self.metadata.mode & 0o7777
    }

    /// The entries, if this is a directory.
    pub fn children(&self) -> Option<&Children> {
        match &self.content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.content, Content::Directory(_))
    }

    /// True for a regular file.
    pub fn is_regular(&self) -> bool {
        matches!(self.content, Content::Regular { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_stays_small() {
        // The build promises 256 bytes an entry; half of it is the arena's.
        assert!(size_of::<Inode>() <= 96, "{}", size_of::<Inode>());
    }
}
