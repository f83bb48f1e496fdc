//! The RAFS format, and a file system that speaks no FUSE.

pub mod bootstrap;
pub mod error;
pub mod format;
pub mod fs;

pub use error::{Error, ErrorKind, Result};
