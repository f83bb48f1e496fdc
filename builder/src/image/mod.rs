//! An image that exists already: its bootstrap wherever it is, its data verified.
//!
//! ```text
//! open: bootstrap file, or blob with its bootstrap inside
//!   └─▶ ImageData: tree, contexts, one backend a blob
//!         └─▶ ChunkStream: chunks in the order asked for, fetched and decoded ahead
//! ```

mod data;
mod files;
mod open;
mod plan;
mod stream;

pub use data::{DataOptions, ImageData};
pub use files::FileChunks;
pub use open::{Opened, blob_id, inside, open};
pub use stream::{ChunkStream, Fetched};
