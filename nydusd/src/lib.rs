//! The daemon as a library, so that its parts can be tested.
//!
//! `nydusd` stands between the kernel and the operator:
//!
//! ```text
//! kernel ── /dev/fuse ──▶ transport::fusedev ──▶ adapter ──▶ rafs::fs ──▶ storage::read
//! operator ── unix socket ──▶ api ──▶ daemon ──▶ mount (one image and all it owns)
//! ```
//!
//! Metadata is answered inline by the FUSE threads. A read that misses the cache is handed to
//! storage with a completion that writes the reply itself, so no FUSE thread ever waits for a
//! source.

pub mod adapter;
pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod echo;
pub mod failover;
pub mod failures;
pub mod follow;
pub mod image;
pub mod limits;
pub mod logging;
pub mod metrics;
pub mod mount;
pub mod node;
#[path = "../../misc/pages.rs"]
pub mod pages;
pub mod passthrough;
pub mod pending;
pub mod preheat;
mod process;
pub mod sandbox;
pub mod trace;
pub mod transport;
pub mod version;
pub mod vfs;
pub mod why;
pub mod words;
pub mod writable;

#[expect(
    unsafe_code,
    reason = "a C struct without a constructor, settings of C's allocator, descriptors from a socket, fork, a system call \
              that no library has"
)]
mod sys;
