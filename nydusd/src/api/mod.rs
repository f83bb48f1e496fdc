//! The HTTP API on a unix socket: the snapshotter's contract.
//!
//! [`Server`] moves bytes, [`routes`] decides ([`prefetch`] for its own path), [`types`] are the documents.

mod exporter;
mod prefetch;
mod routes;
mod server;
mod types;

pub use exporter::Exporter;
pub use server::Server;
