//! The way back: a Nydus image in, a plain OCI image out.
//!
//! ```text
//! manifest ─▶ bootstrap ─▶ tree ─┬─▶ tar stream ─▶ gzip or zstd ─▶ the one layer
//! blobs ─▶ chunks, verified ─────┘                                    │
//! config: diff ids and history of that layer ◀────────────────────────┘
//! ```
//!
//! The plain image has one layer with the tree as a mount shows it. The bootstrap of an image is
//! merged: it does not say which layer an entry came from, nor what a layer removed, and the
//! layers that it was made from may have been in any order of entries. So the original layers
//! can not be had back, only what they add up to.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};

use flate2::{Compression, GzBuilder};
use rafs::bootstrap::OpenOptions;
use serde_json::{Map, Value, json};
use storage::backend::ReadContext;
use storage::backend::registry::Rewrite;
use storage::digest::{Digest, DigestAlgorithm, Hasher};
use storage::engine::{Engine, EngineConfig};
use storage::oci::image::{Image, ImageName};
use storage::oci::manifest::{MAX_CONFIG_SIZE, NYDUS_OS_FEATURE, Platform};
use storage::oci::nydus::{FetchOptions, NydusImage};
use tokio_util::sync::CancellationToken;

use crate::image::{DataOptions, ImageData};
use crate::oci::manifest::SourceConfig;
use crate::oci::media;
use crate::oci::registry::{RegistryOptions, client_options};
use crate::oci::spool::{Spool, SpooledBlob};
use crate::oci::target::Target;
use crate::progress::{Activity, Observer, check};
use crate::unpack::{UnpackOptions, unpack};
use crate::{Error, ErrorKind, Result};

/// gzip level of the layer: that of `docker build`.
const GZIP_LEVEL: u32 = 6;
/// Bytes gathered before they are hashed and compressed.
const WRITE_BUFFER: usize = 256 << 10;
/// What all annotations about the Nydus format begin with.
const NYDUS_ANNOTATIONS: &str = "containerd.io/snapshot/nydus-";

/// How the layer is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayerCodec {
    /// gzip, which every runtime reads.
    #[default]
    Gzip,
    /// zstd, for runtimes that read it.
    Zstd,
}

impl LayerCodec {
    fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => media::OCI_LAYER_GZIP,
            Self::Zstd => media::OCI_LAYER_ZSTD,
        }
    }
}

/// How an image is restored.
pub struct RestoreOptions<'a> {
    /// Compression of the layer.
    pub codec: LayerCodec,
    /// Hears of progress.
    pub observer: &'a dyn Observer,
    /// Ends the work; nothing is published then.
    pub cancel: &'a CancellationToken,
}

/// The result.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Digest of the layer.
    pub layer: Digest,
    /// Bytes of the layer.
    pub size: u64,
    /// Digest of the layer's tar.
    pub diff_id: Digest,
    /// Entries of the layer.
    pub entries: u64,
    /// Sockets, which a layer can not hold.
    pub sockets: u64,
}

/// A Nydus image to restore.
pub struct NydusSource {
    engine: std::sync::Arc<Engine>,
    image: Image,
    nydus: NydusImage,
    context: ReadContext,
    /// The bootstrap's file goes with it.
    _dir: tempfile::TempDir,
}

impl NydusSource {
    /// Fetches manifest and bootstrap of the image called `name` (`oci:…` or `docker://…`).
    ///
    /// # Errors
    /// `Unsupported`: not a Nydus image. Those of the source; `Corrupt`: metadata that does not
    /// match its digests.
    pub fn open(name: &str, platform: Option<&Platform>, registry: &RegistryOptions) -> Result<Self> {
        let name: ImageName = name.parse()?;
        let options = match &name {
            ImageName::Registry(reference) => client_options(reference.host(), registry),
            ImageName::Layout { .. } => Default::default(),
        };
        let engine = Engine::new(EngineConfig::default())?;
        let image = Image::open(name, options)?;
        let context = ReadContext { cancel: registry.cancel.clone(), ..ReadContext::on_demand(None) };
        let dir = tempfile::tempdir().map_err(|e| Error::io("temporary directory for the bootstrap", e))?;
        let fetch = FetchOptions {
            platform: platform.cloned().unwrap_or_else(Platform::host),
            bootstrap: dir.path().join("image.boot"),
            rewrite: Rewrite::default(),
        };
        let nydus = engine.block_on(NydusImage::fetch(&image, fetch, &context))?;
        Ok(Self { engine, image, nydus, context, _dir: dir })
    }

    fn config(&self) -> Result<SourceConfig> {
        let manifest = &self.nydus.manifest;
        let read = self.image.read_blob(manifest.config(), MAX_CONFIG_SIZE, &self.context);
        let bytes = self.engine.block_on(read)?;
        SourceConfig::parse(&self.image.name().to_string(), &bytes, manifest.layers().len())
    }

    /// The tree with its data; the root digest that the image states has been compared.
    fn data(&self, cancel: &CancellationToken) -> Result<ImageData> {
        let bootstrap = rafs::bootstrap::open(&self.nydus.bootstrap, &OpenOptions::default())?;
        if let Some(stated) = self.nydus.root_digest {
            let found = rafs::merkle::image_root(&*bootstrap)?;
            if found != stated {
                return Err(Error::new(
                    ErrorKind::Mismatch,
                    format!("{}: its root digest is {found}, its manifest says {stated}", self.image.name()),
                ));
            }
        }
        let options = DataOptions { cancel: cancel.clone(), ..DataOptions::default() };
        ImageData::open(self.engine.clone(), bootstrap.into(), &*self.nydus.source, options)
    }
}

/// Writes the image `source` to `target` with one plain layer.
///
/// # Errors
/// Those of the source and of [`unpack`]; `Unsupported`: the tree holds names that mark removed
/// entries in layers; those of the target; `Cancelled`. Nothing is published then.
pub fn restore(source: &NydusSource, target: Target, options: &RestoreOptions<'_>) -> Result<Restored> {
    let config = source.config()?;
    let image = source.data(options.cancel)?;
    let dir = target.spool_dir();
    let meter = options.observer.begin(Activity::Read, &source.image.name().to_string(), None);
    let compressed = Compressed::new(options.codec, Spool::new_in(&dir)?)?;
    let hashing = Hashing { inner: compressed, hasher: DigestAlgorithm::Sha256.hasher() };
    let mut out = BufWriter::with_capacity(WRITE_BUFFER, hashing);
    let unpacked =
        unpack(&image, &mut out, UnpackOptions { refuse_whiteouts: true }, &|bytes| meter.advance(bytes))?;
    let hashing = out.into_inner().map_err(|e| Error::io("write the layer", e.into_error()))?;
    let layer = hashing.inner.finish()?;
    let diff_id = hashing.hasher.finish();
    meter.finish(&format!("{} entries", unpacked.entries));
    check(options.cancel)?;

    let (layer_digest, size) = (layer.digest(), layer.size());
    let config = SpooledBlob::from_bytes(&dir, &plain_config(config.document, diff_id)?)?;
    let mut annotations = source.nydus.manifest.annotations().clone().unwrap_or_default();
    annotations.retain(|key, _| !key.starts_with(NYDUS_ANNOTATIONS));
    let descriptor = |media_type: &str, digest: Digest, size: u64| json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size});
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "config": descriptor(media::OCI_CONFIG, config.digest(), config.size()),
        "layers": [descriptor(options.codec.media_type(), layer_digest, size)],
    });
    if !annotations.is_empty() {
        // In order of keys: the bytes must not depend on that of a hash table.
        manifest["annotations"] = json!(annotations.into_iter().collect::<BTreeMap<_, _>>());
    }
    target.put(layer, "layer", options.observer)?;
    target.put(config, "config", options.observer)?;
    check(options.cancel)?;
    let manifest = target.publish(&to_json(&manifest)?)?;
    Ok(Restored {
        manifest,
        layer: layer_digest,
        size,
        diff_id,
        entries: unpacked.entries,
        sockets: unpacked.socket_count,
    })
}

/// The config for one layer: what was done stays in the history, as steps without a layer.
fn plain_config(mut document: Map<String, Value>, diff_id: Digest) -> Result<Vec<u8>> {
    document.insert("rootfs".into(), json!({"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]}));
    if let Some(features) = document.get_mut("os.features").and_then(Value::as_array_mut) {
        features.retain(|feature| feature != NYDUS_OS_FEATURE);
        if features.is_empty() {
            document.remove("os.features");
        }
    }
    let mut item = Map::new();
    if let Some(created) = document.get("created") {
        item.insert("created".into(), created.clone());
    }
    item.insert("created_by".into(), json!("nydus-image convert"));
    item.insert("comment".into(), json!("all layers of a Nydus image as one"));
    let history = document.entry("history").or_insert_with(|| json!([]));
    if history.is_null() {
        *history = json!([]);
    }
    let list = history
        .as_array_mut()
        .ok_or_else(|| Error::bad_source("config of the image: history is not a list"))?;
    list.retain(|item| item.get("comment").and_then(Value::as_str) != Some(media::BOOTSTRAP_COMMENT));
    for item in list.iter_mut().filter_map(Value::as_object_mut) {
        item.insert("empty_layer".into(), json!(true));
    }
    list.push(Value::Object(item));
    to_json(&Value::Object(document))
}

fn to_json(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::new(ErrorKind::Invalid, "encoding JSON").with_source(e))
}

/// A layer's compressor. Its bytes depend on its input alone.
enum Compressed {
    Gzip(flate2::write::GzEncoder<Spool>),
    Zstd(zstd::Encoder<'static, Spool>),
}

impl Compressed {
    fn new(codec: LayerCodec, out: Spool) -> Result<Self> {
        Ok(match codec {
            LayerCodec::Gzip => {
                let gzip = GzBuilder::new().mtime(0).operating_system(255);
                Self::Gzip(gzip.write(out, Compression::new(GZIP_LEVEL)))
            }
            LayerCodec::Zstd => Self::Zstd(
                zstd::Encoder::new(out, storage::codec::ZSTD_LEVEL)
                    .map_err(|e| Error::io("make a zstd compressor", e))?,
            ),
        })
    }

    fn finish(self) -> Result<SpooledBlob> {
        let spool = match self {
            Self::Gzip(gzip) => gzip.finish(),
            Self::Zstd(zstd) => zstd.finish(),
        };
        spool.map_err(|e| Error::io("write the layer", e))?.finish()
    }
}

impl Write for Compressed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(gzip) => gzip.write(bytes),
            Self::Zstd(zstd) => zstd.write(bytes),
        }
    }

    /// Nothing: flushing a compressor would change its bytes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hashes what goes through.
struct Hashing<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_describes_the_one_layer_and_keeps_the_rest() {
        let nydus = json!({
            "os": "linux", "created": "2020-01-01T00:00:00Z", "x-unknown": [1],
            "os.features": ["nydus.remoteimage.v1"],
            "rootfs": {"type": "layers", "diff_ids": ["sha256:1", "sha256:2"]},
            "history": [{"created_by": "a"}, {"created_by": "b", "empty_layer": true},
                {"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}],
        });
        let Value::Object(document) = nydus else { panic!() };
        let plain = plain_config(document, Digest([1; 32])).unwrap();
        let plain: Value = serde_json::from_slice(&plain).unwrap();
        assert_eq!(plain["rootfs"]["diff_ids"], json!([format!("sha256:{}", Digest([1; 32]))]));
        let history = plain["history"].as_array().unwrap();
        let empty: Vec<bool> = history.iter().map(|item| item["empty_layer"] == true).collect();
        assert_eq!(empty, [true, true, false]);
        assert_eq!((&plain["x-unknown"], &plain["os"]), (&json!([1]), &json!("linux")));
        assert!(plain.get("os.features").is_none());
    }
}
