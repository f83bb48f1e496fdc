//! OCI distribution: names, logins, manifests, and the places images lie in.
//!
//! ```text
//!   reference ─┐                      ┌─ registry: client ── token ── challenge, auth
//!              ├─ image: one image ───┤
//!   manifest ──┘      │               └─ disk: layout
//!                     └─ nydus: its bootstrap, and a source of its blobs
//! ```
//!
//! [`referrers`] finds and stores small documents that belong to an image, with [`upload`].
//!
//! Nothing a server or a layout says is believed before its size and digest are checked.

pub mod auth;
pub mod challenge;
pub mod client;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod nydus;
pub mod reference;
pub mod referrers;
pub mod stream;
pub mod token;
pub mod upload;
