//! Reading image manifests, indexes and configs of a *source* image.
//!
//! Everything that a converter cannot carry over is refused here, by name: foreign layers,
//! encrypted layers, artifacts, docker schema 1, images that are Nydus images already.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde_json::{Map, Value};
use storage::digest::{Digest, TaggedDigest};

use super::layer::LayerPromise;
use super::media;
use super::platform::Platform;
use crate::{Error, ErrorKind, Result};

/// Largest manifest or index read: 4 MiB, the limit registries agree on.
pub const MAX_MANIFEST_SIZE: u64 = 4 << 20;
/// Largest config read: 8 MiB; real ones have tens of KiB.
pub const MAX_CONFIG_SIZE: u64 = 8 << 20;
/// Indexes inside indexes that are followed.
const MAX_INDEX_DEPTH: usize = 4;

/// A manifest or an index, told apart by its media type or, without one, by its members.
#[derive(Debug)]
pub enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// Several images.
    Index(Box<ImageIndex>),
}

/// Fetches a manifest or index by descriptor, verified.
pub type Fetch<'a> = &'a dyn Fn(&Descriptor) -> Result<Vec<u8>>;

/// Parses `bytes`, called `name` in messages.
///
/// # Errors
/// `Corrupt`: not JSON or not of the shape. `Unsupported`: docker schema 1, an artifact.
pub fn parse_document(name: &str, media_type: Option<&str>, bytes: &[u8]) -> Result<Document> {
    let corrupt = |e: serde_json::Error| {
        Error::new(ErrorKind::Corrupt, format!("{name}: not an image manifest")).with_source(e)
    };
    let value: Value = serde_json::from_slice(bytes).map_err(corrupt)?;
    let own = value.get("mediaType").and_then(Value::as_str);
    let kind = own.or(media_type).unwrap_or_default();
    let is_index = matches!(kind, media::OCI_INDEX | media::DOCKER_LIST)
        || (!media::is_manifest(kind) && value.get("manifests").is_some());
    if value.get("schemaVersion").and_then(Value::as_u64) != Some(2) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{name}: docker schema 1 or an unknown manifest version; push the image again with a current tool"
            ),
        ));
    }
    if is_index {
        return Ok(Document::Index(Box::new(serde_json::from_value(value).map_err(corrupt)?)));
    }
    if !kind.is_empty() && !media::is_manifest(kind) {
        return Err(Error::new(ErrorKind::Unsupported, format!("{name}: {kind} is not a container image")));
    }
    Ok(Document::Manifest(Box::new(serde_json::from_value(value).map_err(corrupt)?)))
}

/// Follows indexes down to the manifest for `platform` (`None`: the host's).
///
/// # Errors
/// `NotFound`: no image for the platform; the message lists those there are. Otherwise as
/// [`parse_document`] and `fetch`.
pub fn select(
    name: &str,
    document: Document,
    platform: Option<&Platform>,
    fetch: Fetch<'_>,
) -> Result<Box<ImageManifest>> {
    let host = Platform::host();
    let want = platform.unwrap_or(&host);
    let mut document = document;
    for _ in 0..=MAX_INDEX_DEPTH {
        let index = match document {
            Document::Manifest(manifest) => return Ok(manifest),
            Document::Index(index) => index,
        };
        let chosen = choose(name, index.manifests(), want)?;
        let bytes = fetch(chosen)?;
        document = parse_document(name, Some(chosen.media_type().as_ref()), &bytes)?;
    }
    Err(Error::new(ErrorKind::Corrupt, format!("{name}: indexes are nested deeper than {MAX_INDEX_DEPTH}")))
}

/// The descriptor that serves `want` best; the first of equals.
fn choose<'a>(name: &str, descriptors: &'a [Descriptor], want: &Platform) -> Result<&'a Descriptor> {
    let mut best: Option<(u8, &Descriptor)> = None;
    let mut known = Vec::new();
    for descriptor in descriptors {
        if descriptor
            .artifact_type()
            .as_ref()
            .is_some_and(|t| t.to_string() == media::NYDUS_MANIFEST_ARTIFACT)
        {
            continue;
        }
        let rank = match descriptor.platform() {
            Some(p) => {
                let found = Platform {
                    os: p.os().to_string(),
                    architecture: p.architecture().to_string(),
                    variant: p.variant().clone().filter(|v| !v.is_empty()),
                };
                known.push(found.to_string());
                want.rank(&found)
            }
            // An index of one entry may leave the platform out.
            None if descriptors.len() == 1 => Some(0),
            None => None,
        };
        if let Some(rank) = rank
            && best.is_none_or(|(other, _)| rank > other)
        {
            best = Some((rank, descriptor));
        }
    }
    best.map(|(_, descriptor)| descriptor).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "{name}: no image for {want} in its index; choose one with --platform, there are: {}",
                known.join(", ")
            ),
        )
    })
}

/// The SHA-256 of a descriptor and its size.
///
/// # Errors
/// `Unsupported`: another digest algorithm.
pub fn digest_of(name: &str, descriptor: &Descriptor) -> Result<(Digest, u64)> {
    let text = descriptor.digest().to_string();
    Ok((parse_sha256(name, &text)?, descriptor.size()))
}

fn parse_sha256(name: &str, text: &str) -> Result<Digest> {
    let tagged: Option<TaggedDigest> = text.starts_with("sha256:").then(|| text.parse().ok()).flatten();
    tagged.map(|t| t.digest).ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, format!("{name}: digest {text:?} is not of the form sha256:HEX"))
    })
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
            return unsupported("is a Nydus image already; nothing to convert (mount it as it is)".into());
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
