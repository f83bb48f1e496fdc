//! Trees in, an image out.

pub mod bootstrap_writer;
pub mod content;
pub mod error;
pub mod layout;
pub mod load;
pub mod merge;
pub mod oci;
pub mod overlay;
pub mod prefetch;
pub mod source;
pub mod tree;

pub use error::{Error, ErrorKind, Result};
