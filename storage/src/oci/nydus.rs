//! A Nydus image: its bootstrap, fetched and verified, and a source of its blobs.
//!
//! ```text
//!   manifest ─▶ last layer ─▶ bytes ─▶ gunzip ─▶ tar ─▶ image/image.boot, image/root.json
//!                             digest,            diff_id,
//!                             size               sizes capped
//! ```
//!
//! The bootstrap gets its name only after the layer's digest and diff_id have been
//! compared, so a file of that name is whole and right. It is not synced, which a start would wait
//! for: whoever keeps it longer than that looks at its digest again.

use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageManifest};
use serde::Deserialize;
use tokio::runtime::Handle;

use super::image::Image;
use super::manifest::{Flavor, MAX_CONFIG_SIZE, Platform, annotation};
use super::referrers::Subject;
use super::stream::BlockingReader;
use crate::backend::localfs::blocking;
use crate::backend::registry::Rewrite;
use crate::backend::{BlobSource, ReadContext};
use crate::digest::{DigestAlgorithm, Hasher, TaggedDigest};
use crate::{Error, ErrorKind, Result};

/// Marks the bootstrap layer (rafs-v6 section 10.2).
pub const BOOTSTRAP_ANNOTATION: &str = "containerd.io/snapshot/nydus-bootstrap";
/// The image root digest, on the bootstrap layer and the manifest.
pub const ROOT_ANNOTATION: &str = "containerd.io/snapshot/nydus-root-digest";
/// The bootstrap in its layer.
const BOOTSTRAP_NAME: &[u8] = b"image/image.boot";
/// What the image root digest was computed over.
const ROOT_NAME: &[u8] = b"image/root.json";
/// Largest bootstrap accepted: as the format's own bound.
const MAX_BOOTSTRAP_SIZE: u64 = 2 << 30;
/// `root.json` is a few hundred bytes.
const MAX_ROOT_SIZE: u64 = 64 << 10;
/// Other files of the bootstrap layer may add this much.
const MAX_OTHER_SIZE: u64 = 64 << 20;
/// Largest bootstrap layer as stored: compression that does not help adds little.
const MAX_LAYER_SIZE: u64 = MAX_BOOTSTRAP_SIZE + 2 * MAX_OTHER_SIZE;
/// Entries of the bootstrap layer: a handful.
const MAX_ENTRIES: usize = 1024;
/// Bytes copied at once.
const COPY_SIZE: usize = 128 << 10;

/// What is fetched, and where it goes.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// The platform chosen from an index.
    pub platform: Platform,
    /// The file the bootstrap is written to; an old one is replaced, with mode 0600.
    pub bootstrap: PathBuf,
    /// How blob redirects are changed.
    pub rewrite: Rewrite,
}

/// A Nydus image whose bootstrap is on local disk.
#[derive(Clone, Debug)]
pub struct NydusImage {
    /// Digest of the image manifest.
    pub manifest_digest: TaggedDigest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The bootstrap's file.
    pub bootstrap: PathBuf,
    /// SHA-256 of that file.
    pub bootstrap_digest: TaggedDigest,
    /// `image/root.json`, if the image has one; not interpreted here.
    pub root_json: Option<Vec<u8>>,
    /// The image root digest by annotation, if the image has one.
    pub root_digest: Option<TaggedDigest>,
    /// The manifest, for others to refer to; `None` in a layout.
    pub subject: Option<Subject>,
    /// The place of the blobs.
    pub source: Arc<dyn BlobSource>,
}

impl NydusImage {
    /// Finds the Nydus manifest of `image` and fetches its bootstrap.
    ///
    /// # Errors
    /// `Unsupported`: not a Nydus image; `Corrupt`: size, digest, diff_id or tar are wrong;
    /// those of [`Image::manifest`] and [`Image::open_blob`]; `Io`: the file can not be written.
    pub async fn fetch(image: &Image, options: FetchOptions, context: &ReadContext) -> Result<Self> {
        let inner = async {
            let (document, manifest) = image.manifest(&options.platform, Flavor::Nydus, context).await?;
            let layer = bootstrap_layer(&manifest)?;
            let root_digest = root_digest(&manifest, layer)?;
            let packing = Packing::of(layer)?;
            if layer.size() > MAX_LAYER_SIZE {
                let (digest, size) = (layer.digest(), layer.size());
                let why = format!("layer {digest}: {size} bytes, at most {MAX_LAYER_SIZE} are accepted");
                return Err(Error::new(ErrorKind::Invalid, why));
            }
            // The layer first: it is the longer one, and there may be one connection.
            let (stream, config) = tokio::try_join!(
                image.open_blob(layer, context),
                image.read_blob(manifest.config(), MAX_CONFIG_SIZE, context),
            )?;
            let diff_id = bootstrap_diff_id(&config, manifest.layers().len())?;
            let reader = BlockingReader::new(Handle::current(), stream);
            let target = options.bootstrap.clone();
            let unpacked =
                blocking(context, "fetch the bootstrap", move || unpack(reader, packing, diff_id, &target))
                    .await
                    .map_err(|e| e.context(format_args!("bootstrap layer {}", layer.digest())))?;
            let beside = options.bootstrap.parent().filter(|dir| !dir.as_os_str().is_empty());
            let spool_dir = beside.map_or_else(|| PathBuf::from("."), Path::to_path_buf);
            Ok(Self {
                manifest_digest: document.digest,
                subject: image.subject(&document),
                bootstrap: options.bootstrap,
                bootstrap_digest: unpacked.digest,
                root_json: unpacked.root_json,
                root_digest,
                source: image.blob_source(options.rewrite, spool_dir)?,
                manifest,
            })
        };
        inner.await.map_err(|e: Error| e.context(format_args!("image {}", image.name())))
    }
}

/// The bootstrap layer: the last one, and marked so.
fn bootstrap_layer(manifest: &ImageManifest) -> Result<&Descriptor> {
    manifest
        .layers()
        .last()
        .filter(|layer| annotation(layer, BOOTSTRAP_ANNOTATION) == Some("true"))
        .ok_or_else(|| {
            let why =
                "not a Nydus image: its last layer is no bootstrap; convert it with `nydus-image convert`";
            Error::new(ErrorKind::Unsupported, why)
        })
}

/// The root digest of layer and manifest, which must agree.
fn root_digest(manifest: &ImageManifest, layer: &Descriptor) -> Result<Option<TaggedDigest>> {
    let on_layer = annotation(layer, ROOT_ANNOTATION);
    let on_manifest =
        manifest.annotations().as_ref().and_then(|all| all.get(ROOT_ANNOTATION)).map(String::as_str);
    if let (Some(a), Some(b)) = (on_layer, on_manifest)
        && a != b
    {
        let why = format!("{ROOT_ANNOTATION} is {a} on the bootstrap layer and {b} on the manifest");
        return Err(Error::new(ErrorKind::Corrupt, why));
    }
    on_layer.or(on_manifest).map(str::parse).transpose().map_err(|e: Error| e.context(ROOT_ANNOTATION))
}

/// The diff_id of the last of `layers` layers.
fn bootstrap_diff_id(config: &[u8], layers: usize) -> Result<TaggedDigest> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<String>,
    }
    let config: Config = serde_json::from_slice(config)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "image configuration: no rootfs in it").with_source(e))?;
    let ids = config.rootfs.diff_ids;
    match ids.last() {
        Some(last) if ids.len() == layers => last.parse(),
        _ => {
            let why = format!("image configuration: {} diff_ids for {layers} layers", ids.len());
            Err(Error::new(ErrorKind::Corrupt, why))
        }
    }
}

/// Compression of the bootstrap layer.
#[derive(Clone, Copy, Debug)]
enum Packing {
    Tar,
    Gzip,
}

impl Packing {
    fn of(layer: &Descriptor) -> Result<Self> {
        let media_type = layer.media_type().to_string();
        if media_type.ends_with("+gzip") || media_type.ends_with(".gzip") {
            Ok(Self::Gzip)
        } else if media_type.ends_with(".tar") {
            Ok(Self::Tar)
        } else {
            let why = format!("bootstrap layer of type {media_type}: want tar, plain or with gzip");
            Err(Error::new(ErrorKind::Unsupported, why))
        }
    }
}

/// The uncompressed layer: counted against a cap, and hashed.
struct Counted<R> {
    inner: R,
    hasher: Hasher,
    left: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(dst)?;
        self.left = self.left.checked_sub(len as u64).ok_or_else(|| {
            io::Error::other(Error::new(ErrorKind::Invalid, "more data than a bootstrap layer may hold"))
        })?;
        self.hasher.update(&dst[..len]);
        Ok(len)
    }
}

#[derive(Debug)]
struct Unpacked {
    digest: TaggedDigest,
    root_json: Option<Vec<u8>>,
}

/// Reads the layer to its end, and puts its bootstrap at `target` if everything is right.
fn unpack(layer: impl Read, packing: Packing, diff_id: TaggedDigest, target: &Path) -> Result<Unpacked> {
    let layer = BufReader::with_capacity(COPY_SIZE, layer);
    let tar: Box<dyn Read + '_> = match packing {
        Packing::Tar => Box::new(layer),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(layer)),
    };
    let left = MAX_BOOTSTRAP_SIZE + MAX_OTHER_SIZE;
    let mut archive = tar::Archive::new(Counted { inner: tar, hasher: diff_id.algorithm.hasher(), left });
    let dir = match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    // Made with mode 0600, and removed again unless it gets its name.
    let mut file = tempfile::Builder::new()
        .prefix(".bootstrap-")
        .tempfile_in(dir)
        .map_err(|e| Error::io(format!("create a file in {}", dir.display()), e))?;
    let mut digest = None;
    let mut root_json = None;
    let broken = |e| from_io("not a readable tar", e);
    let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, why);
    // Raw: the names looked for are short, so no extended header is needed, and one of
    // hostile size is passed over instead of being read into memory.
    for (count, entry) in archive.entries().map_err(broken)?.raw(true).enumerate() {
        let mut entry = entry.map_err(broken)?;
        if count >= MAX_ENTRIES {
            return Err(corrupt("more entries than a bootstrap layer has"));
        }
        let name = entry.path_bytes().into_owned();
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        if name != BOOTSTRAP_NAME && name != ROOT_NAME {
            continue;
        }
        if !entry.header().entry_type().is_file() {
            return Err(corrupt(&format!("{} is not a regular file", String::from_utf8_lossy(name))));
        }
        let size = entry.size();
        if name == ROOT_NAME {
            if size > MAX_ROOT_SIZE || root_json.is_some() {
                return Err(corrupt("image/root.json is too long or there twice"));
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(broken)?;
            root_json = Some(bytes);
            continue;
        }
        if size > MAX_BOOTSTRAP_SIZE || digest.is_some() {
            return Err(corrupt("image/image.boot is too long or there twice"));
        }
        let mut hasher = DigestAlgorithm::Sha256.hasher();
        let mut buffer = vec![0; COPY_SIZE];
        let mut copied = 0;
        loop {
            let len = entry.read(&mut buffer).map_err(broken)?;
            if len == 0 {
                break;
            }
            copied += len as u64;
            hasher.update(&buffer[..len]);
            file.write_all(&buffer[..len])
                .map_err(|e| Error::io(format!("write a file in {}", dir.display()), e))?;
        }
        if copied != size {
            return Err(corrupt("image/image.boot is cut short"));
        }
        digest = Some(TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest: hasher.finish() });
    }
    // To the very end: only then have the stream's digest and the diff_id seen every byte.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(broken)?;
    let found = rest.hasher.finish();
    if found != diff_id.digest {
        return Err(corrupt(&format!(
            "its tar has digest {found}, the configuration's diff_id is {diff_id}"
        )));
    }
    let digest = digest.ok_or_else(|| corrupt("no image/image.boot in it"))?;
    file.persist(target).map_err(|e| Error::io(format!("name {}", target.display()), e.error))?;
    Ok(Unpacked { digest, root_json })
}

/// An error met while reading, unwrapped if it is one of ours; other ones are the data's.
fn from_io(what: &str, error: io::Error) -> Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(own) => own.clone(),
        None => Error::new(ErrorKind::Corrupt, what).with_source(error),
    }
}

#[cfg(test)]
mod tests;
