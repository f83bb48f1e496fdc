//! Whole journeys: real binaries, a real registry, real mounts, and judges that nobody here wrote.
//!
//! One program, so that it links once and its tests share two cores. What this machine cannot run
//! is listed in `tests/README.md`; a test that is skipped prints why.

mod api;
mod backing;
mod blk;
mod cache_files;
mod clients;
mod conversions;
mod corpus;
mod ctl;
mod dedup;
mod digests;
mod estargz;
mod failover;
mod faults;
mod following;
mod image_tool;
mod interrupts;
mod judges;
mod kernel;
mod kills;
mod lazy;
mod lifetime;
mod memory;
mod mounts;
mod outages;
mod own_mount;
mod preheat;
mod promises;
mod references;
mod registries;
mod restoring;
mod retirement;
mod rewriting;
mod rings;
mod sandbox;
mod sharing;
mod steady;
mod stores;
mod surroundings;
mod tampering;
mod traces;
mod unit;
mod unpacking;
mod virtiofs;
mod why;
mod writable;
