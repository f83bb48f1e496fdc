//! What the journeys share.
//!
//! ```text
//!  image ──▶ OCI layout ──▶ nydus-image convert ──▶ registry ◀── relay ◀── nydusd ──▶ mount
//!    │                                          (docker-registry)  │                    │
//!    └──▶ reference (umoci) ──▶ tree::scan ═══════ equal? ═════════╪═══════ tree::scan ◀┘
//!                                                     counts, stalls, cuts, asks for tokens
//! ```
//!
//! [`image`] writes OCI images from nothing, with everything that a converter must cope with.
//! [`registry`] starts Debian's `docker-registry`; [`relay`] stands between it and the daemon.
//! [`scene`] sets up these four for journeys with faults.
//! [`daemon`] owns one `nydusd` and its mount point, [`mount`] every other mount: what a test
//! mounts is gone when the test ends, however it ends. [`tree`] tells two trees apart.
//!
//! [`guest`] has virtual machines, and a front end without one.
//!
//! Every fixture uses directories and ports of its own, so tests run side by side.

pub mod binaries;
pub mod command;
pub mod daemon;
pub mod guest;
pub mod image;
pub mod journey;
pub mod layout;
pub mod link;
pub mod mount;
pub mod need;
pub mod oci_server;
pub mod plain;
pub mod recipes;
pub mod reference;
pub mod registry;
pub mod relay;
pub mod s3;
pub mod scene;
pub mod successor;
pub mod tree;

/// The error of tests: any, with its story.
pub use anyhow::{Context, Error, Result, bail, ensure};
