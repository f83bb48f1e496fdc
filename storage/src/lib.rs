//! Blobs in, verified bytes out.
//!
//! `storage` knows blobs, chunks and bytes. It is handed chunk extents as plain
//! values and has never heard of an inode.
//!
//! # The life of one read
//!
//! A front end turns a file range into [`read::ReadSlice`]s (which blob, which
//! chunk extent, which bytes of it) and asks a [`read::Reader`]:
//!
//! 1. [`read::Reader::try_read`] answers from the cache and never blocks.
//! 2. On a miss [`read::Reader::submit`] hands the slices to the fetch engine
//!    with a completion. The engine elects one leader per chunk (across threads
//!    and processes), merges what is missing into few compressed ranges, streams
//!    them from the [`backend::Backend`], decodes each fetch unit, and compares
//!    every chunk with its digest before any reader or the cache sees it.
//! 3. Verified bytes go to the waiting readers at once and to the sparse data
//!    file behind the blob; a ready mark reaches the disk only after the data
//!    it vouches for is durable.
//!
//! Async code stays inside this crate; callers see blocking calls and
//! completions.

pub mod backend;
mod budget;
pub mod cache;
pub mod cipher;
pub mod codec;
pub mod config;
pub mod digest;
pub mod engine;
pub mod error;
pub mod extent;
#[expect(unsafe_code, reason = "the allocator's settings have the C interface only")]
pub mod heap;
pub mod ids;
#[expect(unsafe_code, reason = "the only inflate that tells where blocks begin has the C interface of zlib")]
pub mod inflate;
pub mod leftovers;
mod link;
pub mod log;
pub mod metrics;
pub mod observe;
pub mod oci;
pub mod outside;
pub mod prefetch;
pub mod read;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use error::{Error, ErrorKind, Result};
