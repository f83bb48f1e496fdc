//! The real binaries on real mounts of golden images.

mod common;
mod life;
mod metrics;
mod tree;
