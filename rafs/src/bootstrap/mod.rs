//! From bytes to a tree that can be asked: the one interface over every RAFS version.
//!
//! A bootstrap is checked once at the door and then answered from in place: no object
//! is made per inode. Names, symlink targets and xattrs are bytes.
//!
//! ```text
//! adopt: copy under its digest ─▶ open: header ─▶ blobs ─▶ chunk rows ─▶ tree walk ─▶ V6
//!                                       └──────── every rule of section 12 ────────┘
//!                                 open: header ─▶ blobs ─▶ slots ─▶ chunk rows ─▶ V5
//! ```
//!
//! What stays in memory beside the mapping: the blob table, 4 bytes a chunk from chunk
//! to digest row, and one bit per 32 bytes of bootstrap that says where an inode starts.

mod blobs;
mod buffer;
mod bytes;
mod chunks;
mod faults;
mod header;
mod open;
mod v5;
mod v6;
mod validate;
mod view;
mod walk;
mod xattr_names;

use blobs::blob_name;
pub use blobs::{codec, codec_code, codec_of_context, digester_code};
pub use buffer::Buffer;
pub use chunks::{lies_in_context, stored_size};
pub use faults::Faults;
pub use open::{OpenOptions, adopt, adopt_own, digest, from_bytes, open, read};
pub(crate) use v5::validate as validate_v5;
pub use v5::{Record as V5Record, V5};
pub use v6::V6;
pub(crate) use validate::validate;
pub use walk::{Step, Walk};

use std::borrow::Cow;
use std::fmt;
use std::ops::ControlFlow;

use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::extent::Cipher;
use storage::ids::{BlobId, ChunkIndex};

use crate::Result;
use crate::format::chunk::ChunkInfo;
use crate::format::features::{BlobFeatures, ImageFlags};

/// Number of an inode in its image: in v6 the EROFS nid, below 2^40, in v5 the inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(pub u64);

impl fmt::Display for Nid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The seven types of inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileType {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Fifo.
    Fifo,
    /// Socket.
    Socket,
}

impl FileType {
    /// The type in the upper bits of `st_mode`.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Self::Regular,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFBLK => Self::BlockDevice,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            _ => return None,
        })
    }
}

/// Attributes of an inode as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The inode.
    pub nid: Nid,
    /// Its type, equal to the upper bits of `mode`.
    pub file_type: FileType,
    /// `st_mode` with type bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Regular: bytes; directory: bytes of entries (in v5 a sum over names); symlink: bytes of target; else 0.
    pub size: u64,
    /// Link count, at least 1.
    pub nlink: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// 0 to 999,999,999.
    pub mtime_nsec: u32,
    /// Devices: number in the kernel's 32-bit encoding (section 4.4); else 0.
    pub rdev: u32,
}

impl Attr {
    /// Major and minor number behind `rdev`.
    pub fn device(&self) -> (u32, u32) {
        (self.rdev >> 8 & 0xfff, self.rdev & 0xff | self.rdev >> 12 & 0xfff00)
    }
}

/// One entry of a directory, `.` and `..` left out.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Name, 1 to 255 bytes without `/` and NUL.
    pub name: &'a [u8],
    /// Its inode.
    pub nid: Nid,
    /// The inode's type.
    pub file_type: FileType,
    /// Cursor that continues behind this entry.
    pub next: u64,
}

/// One extended attribute: its name is `prefix` followed by `suffix`.
#[derive(Clone, Copy, Debug)]
pub struct Xattr<'a> {
    /// `user.`, `trusted.`, `security.` or a whole ACL name.
    pub prefix: &'static [u8],
    /// Rest of the name.
    pub suffix: &'a [u8],
    /// Value.
    pub value: &'a [u8],
}

/// One data blob of the image: the checked form of a blob record.
#[derive(Clone, Debug)]
pub struct Blob {
    /// Name. For a bootstrap inlined in its own blob, the caller supplies it.
    pub id: BlobId,
    /// Chunks, 1 to 2^24; 0 if a v5 image says nothing of the blob and uses none of it.
    pub chunk_count: u32,
    /// Compressor of chunks that are marked compressed.
    pub codec: Codec,
    /// Algorithm of chunk digests.
    pub digester: DigestAlgorithm,
    /// Features.
    pub features: BlobFeatures,
    /// `compressed_size` of the record: length of the file, see FORMAT.md.
    pub compressed_size: u64,
    /// Bytes of chunk data at the start of the file; every unit lies below.
    pub data_size: u64,
    /// Length of the decoded space.
    pub decoded_size: u64,
    /// Byte on a flat device where the decoded space starts; `None` in formats that know no such
    /// device.
    pub flat_offset: Option<u64>,
    /// Chunk indexes of files whose chunk has no record, hence no digest.
    pub unverified_chunks: u64,
    /// The blob that holds the context, if it is not this one: the data is an original layer.
    pub context_id: Option<BlobId>,
    /// Encryption of chunks and context.
    pub cipher: Cipher,
    /// The raw record. That of v5 is filled as far as that format goes: without a context.
    pub record: crate::format::blob_table::BlobRecord,
}

/// What holds for the whole image.
#[derive(Clone, Debug)]
pub struct Summary {
    /// 5 or 6.
    pub fs_version: u32,
    /// Superblock flags.
    pub flags: ImageFlags,
    /// Default compressor.
    pub codec: Codec,
    /// Digest algorithm.
    pub digester: DigestAlgorithm,
    /// Chunk size.
    pub chunk_size: u32,
    /// EROFS block size; in v5 what `statfs` counts in.
    pub block_size: u32,
    /// Directory entries with root (hard links counted each).
    pub inode_count: u64,
    /// First block of the inode area; 0 in v5.
    pub meta_blkaddr: u32,
    /// Byte offset of the blob table and its number of records.
    pub blob_table: (u64, u64),
    /// Byte offset of the first chunk-info record and its number of records; in v5 they lie behind their
    /// files, and the offset is 0.
    pub chunk_table: (u64, u64),
    /// Byte offset of the prefetch table and its number of entries.
    pub prefetch_table: (u64, u32),
    /// True if any inode has xattrs.
    pub has_xattrs: bool,
    /// Length of the bootstrap.
    pub bootstrap_size: u64,
    /// What only the superblock of RAFS v5 says.
    pub v5: Option<V5Tables>,
}

/// Counts and places of tables that RAFS v5 alone has.
#[derive(Clone, Copy, Debug)]
pub struct V5Tables {
    /// Distinct inodes as stated.
    pub inodes: u64,
    /// Byte offset of the inode table and its number of slots.
    pub inode_table: (u64, u32),
    /// Bytes of the blob table.
    pub blob_table_size: u64,
    /// Byte offset of the extended blob table and its number of rows.
    pub extended_blob_table: (u64, u32),
}

/// A chunk of a file: which blob, which chunk of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// Row of the blob table.
    pub blob: u32,
    /// Chunk of that blob.
    pub index: ChunkIndex,
    /// Decoded offset the index states.
    pub decoded_offset: u64,
}

/// A validated image tree. Answers come from the mapped bytes.
///
/// Methods that take a `Nid` accept any value: one that is not an inode of the image
/// is an error, never a panic.
pub trait Bootstrap: Send + Sync + fmt::Debug {
    /// What holds for the whole image.
    fn summary(&self) -> &Summary;

    /// The blob table, in order.
    fn blobs(&self) -> &[Blob];

    /// All of it as it is stored, if that is a file system which a kernel mounts.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// The root directory.
    fn root(&self) -> Nid;

    /// Attributes of `nid`.
    fn attr(&self, nid: Nid) -> Result<Attr>;

    /// Parent of directory `dir`; the root's is the root.
    fn parent(&self, dir: Nid) -> Result<Nid>;

    /// The entry `name` of directory `dir`, by binary search. `.` and `..` are not found.
    fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<DirEntry<'_>>>;

    /// Cursor before the first entry of directory `dir` whose name is not below `name`.
    fn cursor_at(&self, dir: Nid, name: &[u8]) -> Result<u64>;

    /// Visits the entries of `dir` in byte order of names, from `cursor` (0 = first), until
    /// the visitor breaks.
    fn children<'a>(
        &'a self,
        dir: Nid,
        cursor: u64,
        visit: &mut dyn FnMut(DirEntry<'a>) -> ControlFlow<()>,
    ) -> Result<()>;

    /// Target of symlink `nid`.
    fn read_link(&self, nid: Nid) -> Result<Cow<'_, [u8]>>;

    /// Visits the xattrs of `nid` in stored order until the visitor breaks.
    fn xattrs<'a>(&'a self, nid: Nid, visit: &mut dyn FnMut(Xattr<'a>) -> ControlFlow<()>) -> Result<()>;

    /// The chunk at `position` of regular file `nid`: bytes from `position * chunk_size`.
    fn chunk(&self, nid: Nid, position: u32) -> Result<ChunkRef>;

    /// The chunk-info record of a chunk: digest, and location unless it is a batch member.
    /// `None` if the image's table does not have it.
    fn chunk_info(&self, blob: u32, index: ChunkIndex) -> Option<&ChunkInfo>;

    /// Inodes of the prefetch table, in order; `[root]` means everything.
    fn prefetch(&self) -> Vec<Nid>;
}
