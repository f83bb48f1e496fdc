//! `nydusctl mount`.

use anyhow::Context as _;
use serde_json::json;

use crate::cli::Mount;
use crate::client::Client;

/// Has the daemon mount an image or a directory.
///
/// # Errors
/// The configuration can not be read, or the daemon refuses.
pub fn mount(client: &Client<'_>, options: &Mount) -> anyhow::Result<()> {
    let config = match &options.config {
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("configuration {}", file.display()))?
        }
        None => String::new(),
    };
    // The daemon has another working directory.
    let source = std::path::absolute(&options.source)
        .with_context(|| format!("source {}", options.source.display()))?;
    let source =
        source.to_str().with_context(|| format!("{}: the API takes UTF-8 only", source.display()))?;
    let command = json!({ "source": source, "fs_type": options.kind, "config": config });
    client.mount(&options.mountpoint, &command)
}
