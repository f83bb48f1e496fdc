//! Where entries come from.

pub mod decompress;
pub mod dir;
pub mod tar;
