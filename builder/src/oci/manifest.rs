//! Reading image manifests, indexes and configs of a *source* image.
//!
//! Everything that a converter cannot carry over is refused here, by name: foreign layers,
//! encrypted layers, artifacts, docker schema 1, images that are Nydus images already.

use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageManifest};
use serde_json::{Map, Value};
use storage::digest::{Digest, DigestAlgorithm, TaggedDigest};
use storage::oci::manifest::{
    Document, Flavor, MAX_INDEX_DEPTH, Manifest, Platform, descriptor_digest, is_marked_nydus, select,
};

use super::layer::LayerPromise;
use super::media;
use crate::{Error, ErrorKind, Result};

/// Fetches a manifest or index by descriptor, verified: its bytes.
pub type Fetch<'a> = &'a dyn Fn(&Descriptor) -> Result<Vec<u8>>;

/// Parses the bytes of a manifest or index, called `name` in messages.
///
/// # Errors
/// `Corrupt`: not JSON or not of the shape. `Unsupported`: docker schema 1, an artifact.
pub fn parse(name: &str, media_type: &str, bytes: Vec<u8>) -> Result<Manifest> {
    let parsed = Document::new(Bytes::from(bytes), media_type, None).and_then(|document| document.parse());
    parsed.map_err(|e| Error::from(e).context(name))
}

/// Follows indexes down to the manifest for `platform` (`None`: the host's).
///
/// # Errors
/// `NotFound`: no image for the platform; the message lists those there are. Otherwise as
/// [`parse`] and `fetch`.
pub fn resolve(
    name: &str,
    manifest: Manifest,
    platform: Option<&Platform>,
    fetch: Fetch<'_>,
) -> Result<Box<ImageManifest>> {
    let host = Platform::host();
    let want = platform.unwrap_or(&host);
    let mut manifest = manifest;
    for _ in 0..=MAX_INDEX_DEPTH {
        let index = match manifest {
            Manifest::Image(image) => return Ok(image),
            Manifest::Index(index) => index,
        };
        let chosen = select(&index, want, Flavor::Plain)
            .map_err(|e| Error::from(e).context(format!("{name}: choose one with --platform")))?;
        if is_marked_nydus(chosen) {
            return Err(already_nydus(name));
        }
        manifest = parse(name, chosen.media_type().as_ref(), fetch(chosen)?)?;
    }
    Err(Error::new(ErrorKind::Corrupt, format!("{name}: indexes are nested deeper than {MAX_INDEX_DEPTH}")))
}

fn already_nydus(name: &str) -> Error {
    let why = format!("{name}: is a Nydus image already; nothing to convert (mount it as it is)");
    Error::new(ErrorKind::Unsupported, why)
}

/// The SHA-256 of a descriptor and its size.
///
/// # Errors
/// `Unsupported`: another digest algorithm.
pub fn digest_of(name: &str, descriptor: &Descriptor) -> Result<(Digest, u64)> {
    match descriptor_digest(descriptor) {
        Ok(TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest }) => Ok((digest, descriptor.size())),
        _ => Err(not_sha256(name, descriptor.digest().as_ref())),
    }
}

fn not_sha256(name: &str, text: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{name}: digest {text:?} is not of the form sha256:HEX"))
}

fn parse_sha256(name: &str, text: &str) -> Result<Digest> {
    match text.parse() {
        Ok(TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest }) => Ok(digest),
        _ => Err(not_sha256(name, text)),
    }
}

/// Checks that `manifest` is an image that can be converted.
///
/// # Errors
/// `Unsupported`, naming the layer and why.
pub fn check_convertible(name: &str, manifest: &ImageManifest) -> Result<()> {
    let unsupported = |why: String| Err(Error::new(ErrorKind::Unsupported, format!("{name}: {why}")));
    for layer in manifest.layers() {
        let nydus = |key: &str| layer.annotations().as_ref().is_some_and(|a| a.contains_key(key));
        if layer.media_type().to_string() == media::NYDUS_BLOB
            || nydus(media::ANNOTATION_BOOTSTRAP)
            || nydus(media::ANNOTATION_BLOB)
        {
            return Err(already_nydus(name));
        }
    }
    let config = manifest.config().media_type().to_string();
    if !matches!(config.as_str(), media::OCI_CONFIG | media::DOCKER_CONFIG) {
        return unsupported(format!("its config is {config}: an artifact, not a container image"));
    }
    for (index, layer) in manifest.layers().iter().enumerate() {
        let kind = layer.media_type().to_string();
        let place = format!("layer {} of {} ({})", index + 1, manifest.layers().len(), layer.digest());
        if kind.contains("nondistributable") || kind.contains("foreign") {
            return unsupported(format!(
                "{place} is a foreign layer ({kind}), which may not be stored elsewhere"
            ));
        }
        if kind.contains("+encrypted") {
            return unsupported(format!(
                "{place} is encrypted ({kind}); decrypt the image first (skopeo copy --decryption-key)"
            ));
        }
        if !media::is_layer(&kind) {
            return unsupported(format!("{place} is {kind}, not a tar layer (plain, gzip or zstd)"));
        }
    }
    Ok(())
}

/// A source image's config with the promises it makes about its layers.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// The whole document, unknown members included.
    pub document: Map<String, Value>,
    /// `rootfs.diff_ids`.
    pub diff_ids: Vec<Digest>,
}

impl SourceConfig {
    /// Parses a config that must describe `layer_count` layers.
    ///
    /// # Errors
    /// `Corrupt`: not a config, or another number of layers. `Unsupported`: another digest algorithm.
    pub fn parse(name: &str, bytes: &[u8], layer_count: usize) -> Result<Self> {
        let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, format!("config of {name}: {why}"));
        let document: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| corrupt("not JSON").with_source(e))?;
        let listed = document
            .get("rootfs")
            .and_then(|rootfs| rootfs.get("diff_ids"))
            .and_then(Value::as_array)
            .ok_or_else(|| corrupt("no rootfs.diff_ids"))?;
        let diff_ids = listed
            .iter()
            .map(|id| {
                parse_sha256(&format!("config of {name}: rootfs.diff_ids"), id.as_str().unwrap_or_default())
            })
            .collect::<Result<Vec<_>>>()?;
        if diff_ids.len() != layer_count {
            return Err(corrupt(&format!(
                "rootfs.diff_ids lists {} layers, the manifest {layer_count}",
                diff_ids.len()
            )));
        }
        Ok(Self { document, diff_ids })
    }
}

/// Names and promises of the layers of a manifest.
///
/// # Errors
/// As [`digest_of`].
pub fn promises(name: &str, manifest: &ImageManifest, config: &SourceConfig) -> Result<Vec<LayerPromise>> {
    let count = manifest.layers().len();
    manifest
        .layers()
        .iter()
        .zip(&config.diff_ids)
        .enumerate()
        .map(|(index, (layer, diff_id))| {
            Ok(LayerPromise {
                name: format!("layer {} of {count} ({})", index + 1, layer.digest()),
                stored: Some(digest_of(name, layer)?),
                diff_id: *diff_id,
            })
        })
        .collect()
}
