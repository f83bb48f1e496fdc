//! `nydusd`: serves images through host FUSE.

fn main() {}
