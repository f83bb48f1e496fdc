//! Trees in, an image out.

pub mod error;

pub use error::{Error, ErrorKind, Result};
