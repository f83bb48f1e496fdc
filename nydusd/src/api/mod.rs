//! The HTTP API on a unix socket: the snapshotter's contract.
//!
//! ```text
//!  server.rs      moves bytes within limits; who may connect
//!  routes.rs      which request gets which answer
//!  counters.rs hot.rs mounts.rs prefetch.rs superblock.rs     the answers of one family each
//!  reply.rs refusals.rs query.rs types.rs                       answers and errors, parameters, documents
//!  exporter.rs    the counters on a TCP address
//! ```

mod counters;
mod exporter;
mod hot;
mod mounts;
mod prefetch;
mod query;
mod refusals;
mod reply;
mod routes;
mod server;
mod superblock;
mod types;

pub use exporter::Exporter;
pub use hot::{HotConfig, Settings};
pub use server::Server;
