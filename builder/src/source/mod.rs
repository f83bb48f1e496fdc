//! Where entries come from.

pub(crate) mod ahead;
pub mod decompress;
pub mod dir;
pub mod gzip_index;
pub(crate) mod hashed;
pub mod stargz;
pub mod tar;
