//! OCI images as sources and targets of a conversion.
//!
//! ```text
//! transport.rs   what the user wrote
//! source.rs      config and layers of one image   ◀─ objects.rs (directory, archive.rs), registry
//!   manifest.rs    which manifest; what is refused
//!   layer.rs       one layer, decompressed and verified while it streams
//! layout_writer.rs   a layout or an archive; nothing is named before it is whole
//!   spool.rs           finished blobs on their way to the target
//! ```

pub mod archive;
pub mod layer;
pub mod layout_writer;
pub mod manifest;
pub mod media;
pub mod objects;
pub mod platform;
pub mod source;
pub mod spool;
pub mod transport;
