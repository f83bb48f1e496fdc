//! Why a start was slow: which process read which file when, and what each read waited for.
//!
//! ```text
//!  FUSE threads ──reads──▶ record.rs ◀──fetched chunks── engine (as its observer)
//!                              │ asked: GET /api/v1/why
//!                              ▼
//!  the image ──paths, chunks─▶ build.rs ──▶ report.rs ──▶ nydusctl why
//!                              │ nobody has waited for a while
//!                              ▼
//!                           start.rs: one line in the log
//! ```
//!
//! Recording is cheap and bounded: a hit is counted, a wait is kept as 40 bytes, the first
//! and the last few thousand of them. Everything else is worked out when somebody asks.

mod build;
mod events;
mod processes;
mod record;
pub mod report;
mod start;

pub use build::build;
pub use record::{Recorder, Wait};
pub use report::Report;
pub use start::log_start;
