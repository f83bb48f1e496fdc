//! OCI images as sources and targets of a conversion.
//!
//! ```text
//! transport.rs   what the user wrote
//! source.rs      config and layers of one image   ◀─ objects.rs (directory, archive.rs), registry.rs
//!   read.rs        all its layers through one build session
//!   manifest.rs    which manifest; what is refused
//!   layer.rs       one layer, decompressed and verified while it streams
//! target.rs          where the result goes         ─▶ layout_writer.rs, push.rs
//! layout_writer.rs   a layout or an archive; nothing is named before it is whole
//!   image.rs           manifest, config and bootstrap layer of the Nydus image
//!   spool.rs           finished blobs on their way to the target
//! ```

pub mod archive;
pub mod image;
pub mod layer;
pub mod layout_writer;
pub mod manifest;
pub mod media;
pub mod objects;
pub mod push;
pub mod read;
pub mod registry;
pub mod source;
pub mod spool;
pub mod target;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
pub(crate) mod testing_registry;
pub mod transport;
