//! Many images in one daemon.

pub mod command;
mod control;
pub mod error;
pub mod path;
