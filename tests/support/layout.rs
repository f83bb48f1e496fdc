//! Reading an OCI layout the way a stranger would: index, manifest, layers, the bootstrap inside.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::image::sha256_hex;

/// An OCI layout directory with one tagged manifest.
#[derive(Clone, Debug)]
pub struct Layout {
    path: PathBuf,
}

/// One layer of a manifest.
#[derive(Clone, Debug)]
pub struct Layer {
    /// `sha256:…`.
    pub digest: String,
    /// Stored length.
    pub size: u64,
    /// Media type.
    pub media_type: String,
    /// Annotations, an object or null.
    pub annotations: Value,
}

impl Layout {
    /// The layout at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `oci:PATH:latest`, as the programs want it.
    pub fn reference(&self) -> String {
        format!("oci:{}:latest", self.path.display())
    }

    /// The file of `digest`.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.path.join("blobs").join(digest.replacen(':', "/", 1))
    }

    /// The bytes of `digest`, which must match it.
    ///
    /// # Errors
    /// Missing, or not what its name promises.
    pub fn blob(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        ensure!(format!("sha256:{}", sha256_hex(&bytes)) == digest, "{} has other bytes", path.display());
        Ok(bytes)
    }

    /// Digest of the only manifest.
    ///
    /// # Errors
    /// The index is unreadable or does not list exactly one.
    pub fn manifest_digest(&self) -> Result<String> {
        let index: Value = serde_json::from_slice(&fs::read(self.path.join("index.json"))?)?;
        let Some([manifest]) = index["manifests"].as_array().map(Vec::as_slice) else {
            bail!("the index does not list one manifest: {index}");
        };
        Ok(manifest["digest"].as_str().context("a manifest without a digest")?.to_owned())
    }

    /// The only manifest.
    ///
    /// # Errors
    /// As [`Layout::manifest_digest`], or it is no JSON.
    pub fn manifest(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.blob(&self.manifest_digest()?)?)?)
    }

    /// The image configuration.
    ///
    /// # Errors
    /// Missing or no JSON.
    pub fn config(&self) -> Result<Value> {
        let manifest = self.manifest()?;
        let digest = manifest["config"]["digest"].as_str().context("a manifest without a config")?;
        Ok(serde_json::from_slice(&self.blob(digest)?)?)
    }

    /// The layers in order.
    ///
    /// # Errors
    /// The manifest is malformed.
    pub fn layers(&self) -> Result<Vec<Layer>> {
        let manifest = self.manifest()?;
        manifest["layers"]
            .as_array()
            .context("a manifest without layers")?
            .iter()
            .map(|layer| {
                Ok(Layer {
                    digest: layer["digest"].as_str().context("a layer without a digest")?.to_owned(),
                    size: layer["size"].as_u64().context("a layer without a size")?,
                    media_type: layer["mediaType"].as_str().unwrap_or_default().to_owned(),
                    annotations: layer["annotations"].clone(),
                })
            })
            .collect()
    }

    /// The Nydus data blobs: every layer but the last.
    ///
    /// # Errors
    /// As [`Layout::layers`].
    pub fn data_blobs(&self) -> Result<Vec<Layer>> {
        let mut layers = self.layers()?;
        layers.pop().context("no layers")?;
        Ok(layers)
    }

    /// A file of the bootstrap layer by its exact name, for example `image/image.boot`.
    ///
    /// # Errors
    /// The last layer is no gzip tar, or has no such file.
    pub fn bootstrap_file(&self, name: &str) -> Result<Vec<u8>> {
        let layers = self.layers()?;
        let stored = self.blob(&layers.last().context("no layers")?.digest)?;
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(stored.as_slice()));
        for entry in archive.entries()? {
            let mut entry = entry?;
            if entry.path_bytes().as_ref() == name.as_bytes() {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                return Ok(bytes);
            }
        }
        bail!("the bootstrap layer has no {name}")
    }

    /// Writes the bootstrap itself to the file `to`.
    ///
    /// # Errors
    /// As [`Layout::bootstrap_file`], and those of writing.
    pub fn save_bootstrap(&self, to: &Path) -> Result<()> {
        Ok(std::fs::write(to, self.bootstrap_file("image/image.boot")?)?)
    }

    /// The root digest from `image/root.json`.
    ///
    /// # Errors
    /// The file is missing or malformed.
    pub fn root_digest(&self) -> Result<String> {
        let root: Value = serde_json::from_slice(&self.bootstrap_file("image/root.json")?)?;
        Ok(root["root"].as_str().context("root.json without a root")?.to_owned())
    }
}
