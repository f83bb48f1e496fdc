//! What makes a set of blobs a Nydus OCI image: bootstrap layer, config and manifest
//! (rafs-v6 section 10).
//!
//! The image is written with OCI media types, whatever family the source uses: annotations,
//! which carry its meaning, exist in OCI manifests only. All bytes depend on the source and the
//! options alone; nothing here reads a clock.

use std::io::{self, Write};
use std::path::Path;

use flate2::{Compression, GzBuilder};
use serde_json::{Map, Value, json};
use storage::digest::{Digest, DigestAlgorithm, Hasher, TaggedDigest};

use super::manifest::SourceConfig;
use super::media;
use super::spool::{Spool, SpooledBlob};
use crate::{Error, ErrorKind, Result};

/// Level of the bootstrap layer's gzip: everybody waits for it at the end of a conversion, and level 6
/// takes half as long again for 0.2 %.
const GZIP_LEVEL: u32 = 5;

/// The last layer of a Nydus image.
#[derive(Debug)]
pub struct BootstrapLayer {
    /// The compressed tar.
    pub blob: SpooledBlob,
    /// SHA-256 of the tar.
    pub diff_id: Digest,
}

/// The statement about the image root that lies beside the bootstrap.
#[derive(Clone, Debug)]
pub struct RootStatement {
    /// The image root digest.
    pub root: TaggedDigest,
    /// Chunk size of the image.
    pub chunk_size: u32,
    /// SHA-256 of the bootstrap.
    pub bootstrap: Digest,
}

impl RootStatement {
    /// The bytes of `image/root.json`.
    ///
    /// # Errors
    /// None that can be met; the type leaves room for the encoder's.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let value = json!({
            "version": 1,
            "root": self.root.to_string(),
            "digester": self.root.algorithm.name(),
            "chunk_size": self.chunk_size,
            "bootstrap": format!("sha256:{}", self.bootstrap),
        });
        to_json(&value)
    }
}

/// Packs the bootstrap layer into a temporary file in `dir`: a gzip tar of `image/`,
/// `image/image.boot` and `image/root.json`.
///
/// # Errors
/// `Io`: writing.
pub fn pack_bootstrap(dir: &Path, bootstrap: &[u8], root: &RootStatement) -> Result<BootstrapLayer> {
    let failed = |e: io::Error| Error::io("bootstrap layer", e);
    let gzip = GzBuilder::new()
        .mtime(0)
        .operating_system(255)
        .write(Spool::new_in(dir)?, Compression::new(GZIP_LEVEL));
    let mut tar = tar::Builder::new(HashingWriter { inner: gzip, hasher: DigestAlgorithm::Sha256.hasher() });
    let statement = root.to_json()?;
    for (name, mode, data) in [
        ("image/", 0o755, None),
        ("image/image.boot", 0o444, Some(bootstrap)),
        ("image/root.json", 0o444, Some(&statement[..])),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.map_or(0, |d| d.len() as u64));
        header.set_entry_type(if data.is_some() {
            tar::EntryType::Regular
        } else {
            tar::EntryType::Directory
        });
        tar.append_data(&mut header, name, data.unwrap_or_default()).map_err(failed)?;
    }
    let hashing = tar.into_inner().map_err(failed)?;
    let spool = hashing.inner.finish().map_err(failed)?;
    Ok(BootstrapLayer { blob: spool.finish()?, diff_id: hashing.hasher.finish() })
}

/// A blob layer of the manifest.
#[derive(Clone, Copy, Debug)]
pub struct BlobLayer {
    /// SHA-256 of the file, which is also its diff id.
    pub digest: Digest,
    /// Bytes of the file.
    pub size: u64,
}

/// The config: the source's, with `rootfs.diff_ids` of the new layers and one history item more.
///
/// The item's time is the image's own, so that the same source gives the same bytes.
///
/// # Errors
/// `Corrupt`: the source's `history` is not a list.
pub fn config(source: &SourceConfig, blobs: &[BlobLayer], bootstrap_diff_id: Digest) -> Result<Vec<u8>> {
    let mut document = source.document.clone();
    let diff_ids: Vec<String> = blobs
        .iter()
        .map(|blob| blob.digest)
        .chain([bootstrap_diff_id])
        .map(|digest| format!("sha256:{digest}"))
        .collect();
    document.insert("rootfs".into(), json!({"type": "layers", "diff_ids": diff_ids}));
    let mut item = Map::new();
    if let Some(created) = document.get("created") {
        item.insert("created".into(), created.clone());
    }
    item.insert("created_by".into(), json!("Nydus Converter"));
    item.insert("comment".into(), json!(media::BOOTSTRAP_COMMENT));
    let history = document.entry("history").or_insert_with(|| json!([]));
    if history.is_null() {
        *history = json!([]);
    }
    history
        .as_array_mut()
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "config of the source: history is not a list"))?
        .push(Value::Object(item));
    to_json(&Value::Object(document))
}

/// What a manifest is made of.
#[derive(Debug)]
pub struct ManifestParts<'a> {
    /// Digest and length of the config.
    pub config: (Digest, u64),
    /// Blob layers, lowest first.
    pub blobs: &'a [BlobLayer],
    /// Digest and length of the bootstrap layer.
    pub bootstrap: (Digest, u64),
    /// The image root digest.
    pub root: TaggedDigest,
    /// Annotations of the source's manifest, which are kept.
    pub annotations: &'a [(String, String)],
}

/// The manifest's bytes.
///
/// # Errors
/// None that can be met; the type leaves room for the encoder's.
pub fn manifest(parts: &ManifestParts<'_>) -> Result<Vec<u8>> {
    let descriptor = |media_type: &str, digest: Digest, size: u64| json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size});
    let root = parts.root.to_string();
    let mut layers: Vec<Value> = Vec::with_capacity(parts.blobs.len() + 1);
    for blob in parts.blobs {
        let mut layer = descriptor(media::NYDUS_BLOB, blob.digest, blob.size);
        layer["annotations"] = json!({media::ANNOTATION_BLOB: "true"});
        layers.push(layer);
    }
    let mut bootstrap = descriptor(media::OCI_LAYER_GZIP, parts.bootstrap.0, parts.bootstrap.1);
    bootstrap["annotations"] = json!({
        media::ANNOTATION_BOOTSTRAP: "true",
        media::ANNOTATION_FS_VERSION: "6",
        media::ANNOTATION_ROOT_DIGEST: root,
    });
    layers.push(bootstrap);
    let mut annotations: Map<String, Value> =
        parts.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    annotations.insert(media::ANNOTATION_ROOT_DIGEST.into(), json!(root));
    to_json(&json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "config": descriptor(media::OCI_CONFIG, parts.config.0, parts.config.1),
        "layers": layers,
        "annotations": annotations,
    }))
}

fn to_json(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::new(ErrorKind::Invalid, "encoding JSON").with_source(e))
}

struct HashingWriter<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buf)?;
        self.hasher.update(&buf[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn statement() -> RootStatement {
        RootStatement {
            root: TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest: Digest([7; 32]) },
            chunk_size: 4096,
            bootstrap: Digest([1; 32]),
        }
    }

    #[test]
    fn the_bootstrap_layer_is_plain_and_reproducible() {
        let dir = tempfile::tempdir().unwrap();
        let layer = pack_bootstrap(dir.path(), &[9; 8192], &statement()).unwrap();
        let again = pack_bootstrap(dir.path(), &[9; 8192], &statement()).unwrap();
        assert_eq!(layer.blob.digest(), again.blob.digest());
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(layer.blob.reader().unwrap()).read_to_end(&mut bytes).unwrap();
        assert_eq!(DigestAlgorithm::Sha256.digest(&bytes), layer.diff_id);
        let seen: Vec<_> = tar::Archive::new(&bytes[..])
            .entries()
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                let path = e.path().unwrap().to_str().unwrap().to_owned();
                (path, e.header().mode().unwrap(), e.header().mtime().unwrap(), e.size())
            })
            .collect();
        let json = statement().to_json().unwrap().len() as u64;
        assert_eq!(
            seen,
            [
                ("image/".into(), 0o755, 0, 0),
                ("image/image.boot".into(), 0o444, 0, 8192),
                ("image/root.json".into(), 0o444, 0, json)
            ]
        );
    }

    #[test]
    fn a_config_keeps_what_it_does_not_know() {
        let text = json!({"os": "linux", "x-unknown": {"a": [1]}, "created": "2020-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", "0".repeat(64))]},
            "history": [{"created_by": "a"}, {"created_by": "b", "empty_layer": true}]});
        let source = SourceConfig::parse("x", text.to_string().as_bytes(), 1).unwrap();
        let blob = BlobLayer { digest: Digest([2; 32]), size: 5 };
        let out: Value = serde_json::from_slice(&config(&source, &[blob], Digest([3; 32])).unwrap()).unwrap();
        assert_eq!(out["x-unknown"], text["x-unknown"]);
        let ids = json!([format!("sha256:{}", Digest([2; 32])), format!("sha256:{}", Digest([3; 32]))]);
        assert_eq!(out["rootfs"], json!({"type": "layers", "diff_ids": ids}));
        assert_eq!(
            out["history"][2],
            json!({"created": "2020-01-01T00:00:00Z", "created_by": "Nydus Converter",
                "comment": "Nydus Bootstrap Layer"})
        );
        for (bad, layers) in
            [(json!({}), 0), (text.clone(), 2), (json!({"rootfs": {"diff_ids": ["md5:1"]}}), 1)]
        {
            assert!(SourceConfig::parse("x", bad.to_string().as_bytes(), layers).is_err());
        }
    }
}
