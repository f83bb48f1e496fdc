//! The records of RAFS v6, and in [`v5`] those of v5, as they lie on disk: one family a file, no I/O.
//!
//! Every record is `repr(C)`, unaligned, little-endian, and both read and written
//! through the same type. A record is only bytes; who reads one checks its bounds
//! before trusting it. The whole format is described in `FORMAT.md`.

pub mod blob_context;
pub mod blob_table;
pub mod chunk;
pub mod dirent;
pub mod features;
pub mod inode;
pub mod limits;
pub mod superblock;
pub mod tar_header;
pub mod toc;
pub mod v5;
pub mod xattr;
