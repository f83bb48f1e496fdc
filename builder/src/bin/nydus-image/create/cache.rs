//! The files that a daemon's cache holds of a blob when all of it was fetched.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use builder::create::BuiltLayer;
use builder::export;
use builder::image::{DataOptions, ImageData};
use rafs::bootstrap::{Bootstrap, OpenOptions};
use storage::engine::EngineConfig;
use storage::ids::BlobId;

use crate::data::{self, OneBlob};
use crate::output::{self, Output};

/// Writes `<id>.blob.data`, the decoded space of the blob `id` of `built`, and `<id>.blob.meta`, its
/// context, into `dir`.
///
/// `blob` is the file that was built. If its data stays in an original layer, that is `layer`.
pub fn write(
    dir: &Path,
    id: &str,
    built: &BuiltLayer,
    blob: &Path,
    layer: Option<&PathBuf>,
) -> anyhow::Result<()> {
    let bootstrap: Arc<dyn Bootstrap> =
        rafs::bootstrap::from_bytes(built.bootstrap.clone(), &OpenOptions::default())?.into();
    let number = bootstrap.blobs().iter().position(|blob| blob.id.as_str() == id);
    let number = number.and_then(|number| u32::try_from(number).ok());
    let number = number.with_context(|| format!("the new image does not name its blob {id}"))?;
    let source = match layer {
        Some(layer) => OneBlob::with_context(BlobId::new(id)?, layer, blob)?,
        None => OneBlob::with_context(BlobId::new(id)?, blob, blob)?,
    };
    let engine = data::engine(EngineConfig::default())?;
    let image = ImageData::open(engine, bootstrap, &source, DataOptions::default())?;
    let mut decoded = Output::private(&dir.join(format!("{id}.blob.data")))?;
    export::decode_blob(&image, number, &decoded.writer()?)?;
    decoded.commit("")?;
    if let Some(context) = &built.blob.local_context {
        output::write_private(&dir.join(format!("{id}.blob.meta")), context)?;
    }
    Ok(())
}
