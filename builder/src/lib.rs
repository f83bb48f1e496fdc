//! Trees in, an image out.

pub mod blob_writer;
pub mod bootstrap_v5;
pub mod bootstrap_writer;
pub mod chunkdict;
pub mod chunks;
pub mod compare;
pub mod content;
pub mod convert;
pub mod create;
mod dedup;
pub mod durable;
pub mod error;
pub mod export;
pub mod hints;
mod id_table;
pub mod image;
pub mod layered;
pub mod layout;
pub mod load;
pub mod merge;
pub mod oci;
pub mod overlay;
pub mod pipeline;
pub mod prefetch;
pub mod progress;
pub mod reference;
pub mod restore;
pub mod rewrite;
pub mod root;
pub mod sink;
pub mod source;
pub mod stat;
pub mod tree;
pub mod unpack;
pub mod write_back;

pub use error::{Error, ErrorKind, Result};
