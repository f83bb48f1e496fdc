//! An image to convert: its config and its layers in order, from any [`Transport`].

use std::path::Path;

use oci_spec::image::{Descriptor, ImageManifest};
use serde::Deserialize;
use storage::digest::Digest;
use storage::oci::manifest::{MAX_CONFIG_SIZE, MAX_MANIFEST_SIZE, Manifest, Platform, annotation};

use super::layer::{LayerPromise, LayerReader};
use super::manifest::{self, SourceConfig};
use super::media;
use super::objects::{Object, Objects};
use super::registry::{RegistryOptions, Repository};
use super::transport::{DockerArchiveImage, Transport};
use crate::{Error, ErrorKind, Result};

/// Where the bytes of blobs come from once the image is known.
pub trait BlobStore: Send + Sync {
    /// Reads and verifies a small blob.
    ///
    /// # Errors
    /// `NotFound`, `Limit`, `Mismatch`, `Io` or the source's own.
    fn read(&self, digest: &Digest, cap: u64) -> Result<Vec<u8>>;

    /// A reader over the stored bytes of a blob, not verified.
    ///
    /// # Errors
    /// `NotFound`, `Io` or the source's own.
    fn open(&self, digest: &Digest, size: u64) -> Result<Object>;
}

impl BlobStore for Objects {
    fn read(&self, digest: &Digest, cap: u64) -> Result<Vec<u8>> {
        self.read_blob(digest, cap)
    }

    fn open(&self, digest: &Digest, _size: u64) -> Result<Object> {
        self.open_blob(digest)
    }
}

enum Origin {
    Blobs(Box<dyn BlobStore>),
    /// `docker save`: the entry that holds each layer.
    Named(Objects, Vec<String>),
}

/// One source image.
pub struct ImageSource {
    name: String,
    config: SourceConfig,
    layers: Vec<LayerPromise>,
    annotations: Vec<(String, String)>,
    origin: Origin,
}

impl ImageSource {
    /// Opens an image, `platform`'s (`None`: the host's) if there are several.
    ///
    /// # Errors
    /// `NotFound`: the path or the tag; `Corrupt`, `Mismatch`: the metadata; `Unsupported`: an
    /// image that cannot be converted; `Storage`: the registry.
    pub fn open(
        transport: &Transport,
        platform: Option<&Platform>,
        options: &RegistryOptions,
    ) -> Result<Self> {
        match transport {
            Transport::Layout { path, tag } => {
                Self::from_layout(transport, Objects::directory(path), tag.as_deref(), platform)
            }
            Transport::LayoutArchive { path, tag } => {
                Self::from_layout(transport, Objects::archive(path)?, tag.as_deref(), platform)
            }
            Transport::DockerArchive { path, image } => {
                Self::from_docker_archive(transport, path, image, platform)
            }
            Transport::Registry(reference) => {
                Repository::new(reference, options, |_| {})?.into_source(transport.to_string(), platform)
            }
        }
    }

    fn from_layout(
        transport: &Transport,
        objects: Objects,
        tag: Option<&str>,
        platform: Option<&Platform>,
    ) -> Result<Self> {
        let name = transport.to_string();
        let index = read_index(&name, &objects)?;
        let matching: Vec<&Descriptor> = match tag {
            Some(tag) => index.iter().filter(|d| ref_name(d) == Some(tag)).collect(),
            None => index.iter().collect(),
        };
        let names = || {
            let names: Vec<&str> = index.iter().filter_map(ref_name).collect();
            if names.is_empty() {
                "it has no named images".to_owned()
            } else {
                format!("it has: {}", names.join(", "))
            }
        };
        let bytes = |d: &Descriptor| {
            let (digest, _) = manifest::digest_of(&name, d)?;
            objects.read_blob(&digest, MAX_MANIFEST_SIZE)
        };
        let document = match matching[..] {
            [one] => manifest::parse(&name, one.media_type().as_ref(), bytes(one)?)?,
            [] => return Err(Error::new(ErrorKind::NotFound, format!("{name}: no such image; {}", names()))),
            _ if tag.is_none() => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{name}: several images, name one with :TAG; {}", names()),
                ));
            }
            // One name for several platforms: the entries are an index of their own.
            _ => {
                let mut several = oci_spec::image::ImageIndex::default();
                several.set_manifests(matching.into_iter().cloned().collect());
                Manifest::Index(Box::new(several))
            }
        };
        let asked = asked_of_config(&document, platform);
        let chosen = manifest::resolve(&name, document, platform, &bytes)?;
        Self::from_store(name, &chosen, asked, Box::new(objects))
    }

    /// An image whose manifest is known and whose blobs come from `store`. Its config must be
    /// for `platform`, if there is one.
    ///
    /// # Errors
    /// `Unsupported`: cannot be converted; `Corrupt`: manifest and config disagree; otherwise
    /// what reading the config fails with.
    pub fn from_store(
        name: String,
        manifest: &ImageManifest,
        platform: Option<&Platform>,
        store: Box<dyn BlobStore>,
    ) -> Result<Self> {
        manifest::check_convertible(&name, manifest)?;
        let (digest, size) = manifest::digest_of(&name, manifest.config())?;
        if size > MAX_CONFIG_SIZE {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("{name}: its config has {size} bytes, at most {MAX_CONFIG_SIZE} are read"),
            ));
        }
        let config =
            store.read(&digest, MAX_CONFIG_SIZE).map_err(|e| e.context(format!("config of {name}")))?;
        let config = SourceConfig::parse(&name, &config, manifest.layers().len())?;
        check_platform(&name, &config, platform)?;
        let layers = manifest::promises(&name, manifest, &config)?;
        let mut annotations: Vec<_> =
            manifest.annotations().clone().unwrap_or_default().into_iter().collect();
        annotations.sort();
        Ok(Self { name, config, layers, annotations, origin: Origin::Blobs(store) })
    }

    fn from_docker_archive(
        transport: &Transport,
        path: &Path,
        image: &DockerArchiveImage,
        platform: Option<&Platform>,
    ) -> Result<Self> {
        let name = transport.to_string();
        let objects = Objects::archive(path)?;
        let bytes = objects.read("manifest.json", MAX_MANIFEST_SIZE).map_err(|e| {
            let remedy = "a docker-archive is what `docker save` writes; for an OCI layout use oci-archive:";
            if e.kind() == ErrorKind::NotFound { e.context(remedy) } else { e }
        })?;
        let saved: Vec<SavedImage> = serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(ErrorKind::Corrupt, format!("{name}: manifest.json")).with_source(e))?;
        let chosen = match image {
            DockerArchiveImage::Only if saved.len() == 1 => saved.first(),
            DockerArchiveImage::Only => None,
            DockerArchiveImage::Tag(tag) => saved.iter().find(|i| i.has_tag(tag)),
            DockerArchiveImage::Index(n) => saved.get(*n),
        };
        let chosen = chosen.ok_or_else(|| {
            let tags: Vec<&str> = saved.iter().flat_map(SavedImage::tags).collect();
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "{name}: {} images in the archive, name one with :REPO:TAG or :@INDEX; it has: {}",
                    saved.len(),
                    tags.join(", ")
                ),
            )
        })?;
        let config = objects.read(&chosen.config, MAX_CONFIG_SIZE)?;
        let config = SourceConfig::parse(&name, &config, chosen.layers.len())?;
        check_platform(&name, &config, platform)?;
        let count = chosen.layers.len();
        let layers = chosen
            .layers
            .iter()
            .zip(&config.diff_ids)
            .enumerate()
            .map(|(index, (entry, diff_id))| LayerPromise {
                name: format!("layer {} of {count} ({entry})", index + 1),
                stored: None,
                diff_id: *diff_id,
            })
            .collect();
        let origin = Origin::Named(objects, chosen.layers.clone());
        Ok(Self { name, config, layers, annotations: Vec::new(), origin })
    }

    /// The image as the user wrote it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its config.
    pub fn config(&self) -> &SourceConfig {
        &self.config
    }

    /// Its layers, lowest first.
    pub fn layers(&self) -> &[LayerPromise] {
        &self.layers
    }

    /// Annotations of its manifest, sorted.
    pub fn annotations(&self) -> &[(String, String)] {
        &self.annotations
    }

    /// Stored bytes of all layers, as far as the source tells.
    pub fn stored_size(&self) -> u64 {
        self.layers.iter().filter_map(|l| l.stored).map(|(_, size)| size).sum()
    }

    /// Opens layer `index` as a stream of tar bytes; `watch` is put around its stored bytes
    /// (progress, cancellation).
    ///
    /// # Errors
    /// `Invalid`: no such layer; otherwise what opening the blob fails with.
    pub fn open_layer(
        &self,
        index: usize,
        watch: impl FnOnce(Box<dyn std::io::Read + Send>) -> Box<dyn std::io::Read + Send>,
    ) -> Result<LayerReader> {
        let layer = self
            .layers
            .get(index)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{}: no layer {index}", self.name)))?;
        let (stored, _) = match (&self.origin, layer.stored) {
            (Origin::Blobs(store), Some((digest, size))) => store.open(&digest, size),
            (Origin::Named(objects, names), _) => match names.get(index) {
                Some(name) => objects.open(name),
                None => Err(Error::new(ErrorKind::NotFound, "no entry for it in manifest.json")),
            },
            (Origin::Blobs(_), None) => Err(Error::new(ErrorKind::Corrupt, "no digest for it")),
        }
        .map_err(|e| e.context(format!("{} of {}", layer.name, self.name)))?;
        let named = LayerPromise { name: format!("{}: {}", self.name, layer.name), ..layer.clone() };
        LayerReader::new(watch(stored), &named)
    }
}

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl SavedImage {
    fn tags(&self) -> impl Iterator<Item = &str> {
        self.repo_tags.iter().flatten().map(String::as_str)
    }

    /// `x` means `x:latest`; docker's own prefixes may be left out or written.
    fn has_tag(&self, wanted: &str) -> bool {
        let full = |tag: &str| {
            let tag = tag.strip_prefix("docker.io/").unwrap_or(tag);
            let tag = tag.strip_prefix("library/").unwrap_or(tag);
            let last = tag.rsplit('/').next().unwrap_or(tag);
            if last.contains(':') { tag.to_owned() } else { format!("{tag}:latest") }
        };
        self.tags().any(|tag| full(tag) == full(wanted))
    }
}

/// The platform that an image's own config must state: an index, where there is one, has chosen by
/// its own entries, and its word counts.
pub(super) fn asked_of_config<'a>(found: &Manifest, asked: Option<&'a Platform>) -> Option<&'a Platform> {
    match found {
        Manifest::Image(_) => asked,
        Manifest::Index(_) => None,
    }
}

/// A single image is taken as it is, unless another platform was asked for.
fn check_platform(name: &str, config: &SourceConfig, platform: Option<&Platform>) -> Result<()> {
    let Some(want) = platform else { return Ok(()) };
    let member = |key: &str| config.document.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
    let (Some(os), Some(architecture)) = (member("os"), member("architecture")) else { return Ok(()) };
    let variant = member("variant").filter(|v| !v.is_empty()).map(|v| format!("/{v}")).unwrap_or_default();
    let found: Platform = format!("{os}/{architecture}{variant}").parse()?;
    if !want.accepts(&found) {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{name}: the image is for {found}, not for {want}"),
        ));
    }
    Ok(())
}

/// The entries of a layout's `index.json`, after a look at its `oci-layout`.
///
/// # Errors
/// `NotFound`: not a layout; `Corrupt`: either file; `Unsupported`: another layout version.
pub(super) fn read_index(name: &str, objects: &Objects) -> Result<Vec<Descriptor>> {
    let marker = objects.read("oci-layout", 4096).map_err(|e| {
        if e.kind() == ErrorKind::NotFound { e.context(format!("{name}: not an OCI layout")) } else { e }
    })?;
    let version = serde_json::from_slice::<serde_json::Value>(&marker)
        .ok()
        .and_then(|v| v.get("imageLayoutVersion")?.as_str().map(str::to_owned));
    if !version.as_deref().is_some_and(|v| v.starts_with("1.")) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{name}: oci-layout names version {version:?}, want 1.0.0"),
        ));
    }
    let index = objects.read("index.json", MAX_MANIFEST_SIZE)?;
    match manifest::parse(&format!("{name}: index.json"), media::OCI_INDEX, index)? {
        Manifest::Index(index) => Ok(index.manifests().clone()),
        Manifest::Image(_) => {
            Err(Error::new(ErrorKind::Corrupt, format!("{name}: index.json is not an index")))
        }
    }
}

pub(super) fn ref_name(descriptor: &Descriptor) -> Option<&str> {
    annotation(descriptor, media::ANNOTATION_REF_NAME)
}

#[cfg(test)]
mod tests;
