//! The RAFS format, and a file system that speaks no FUSE.
//!
//! * [`mod@format`]: the records as they lie on disk.
//! * [`bootstrap`]: bytes in, a validated tree out.
//! * [`blob_context`], [`blob_file`]: where the chunks of a blob lie, and its other sections.
//! * [`fs`]: lookup, attributes, directories, reads and xattrs of one image.
//! * [`merkle`]: the image root digest and proofs against it.
//! * [`check`]: every fault of an image, not the first.
//! * [`hints`]: the files that a start of an image surely reads.
//!
#![doc = include_str!("../FORMAT.md")]

pub mod blob_context;
pub mod blob_file;
pub mod bootstrap;
pub mod check;
pub mod disk;
pub mod error;
pub mod format;
pub mod fs;
pub mod hints;
pub mod merkle;
#[expect(unsafe_code, reason = "mapping a file and giving its pages back have no safe form")]
mod sys;

pub use error::{Error, ErrorKind, Result};
