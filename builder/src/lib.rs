//! Trees in, an image out.

pub mod error;
pub mod content;
pub mod overlay;
pub mod tree;

pub use error::{Error, ErrorKind, Result};
