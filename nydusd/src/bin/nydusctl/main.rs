//! `nydusctl`: talks to a running `nydusd`.

fn main() {}
