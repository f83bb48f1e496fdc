//! Where entries come from.

pub mod dir;
