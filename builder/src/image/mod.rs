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
pub use open::{Opened, inside, open, open_bare, open_inside, open_named, stated_id};
pub use stream::{ChunkStream, Fetched};
