//! `nydus-image`: builds, checks and converts images.

fn main() {}
