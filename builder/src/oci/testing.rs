//! Images for tests, written by hand.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use storage::digest::DigestAlgorithm;
use storage::oci::manifest::Platform;

use super::media;
use super::registry::RegistryOptions;
use super::source::ImageSource;
use crate::Result;

/// Media type of a plain tar layer.
pub const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// An OCI layout in the making.
pub struct Layout {
    dir: tempfile::TempDir,
    manifests: Vec<Value>,
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", DigestAlgorithm::Sha256.digest(bytes))
}

impl Layout {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir, manifests: Vec::new() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Stores a blob and describes it.
    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = sha256(bytes);
        fs::write(self.path().join("blobs/sha256").join(&digest[7..]), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// Stores an image of uncompressed layers.
    pub fn image(&self, layers: &[(&str, &[u8])]) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|(_, bytes)| sha256(bytes)).collect();
        let stored: Vec<Value> = layers.iter().map(|(kind, bytes)| self.blob(kind, bytes)).collect();
        self.image_of(&stored, &diff_ids)
    }

    /// Stores an image of layers that are stored already.
    pub fn image_of(&self, layers: &[Value], diff_ids: &[String]) -> Value {
        let config = json!({"os": "linux", "architecture": "amd64", "x-kept": 1,
            "config": {"Cmd": ["/hello"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
            "config": self.blob(media::OCI_CONFIG, config.to_string().as_bytes()),
            "layers": layers,
        });
        self.blob(media::OCI_MANIFEST, manifest.to_string().as_bytes())
    }

    /// Names an image in the index.
    pub fn add(&mut self, mut descriptor: Value, tag: &str) {
        descriptor["annotations"] = json!({media::ANNOTATION_REF_NAME: tag});
        self.manifests.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// Opens the image named by `tag` (`:TAG` or nothing).
    pub fn open(&self, tag: &str, platform: Option<&str>) -> Result<ImageSource> {
        let platform = platform.map(|p| p.parse::<Platform>().unwrap());
        let text = format!("oci:{}{tag}", self.path().display());
        ImageSource::open(&text.parse().unwrap(), platform.as_ref(), &RegistryOptions::default())
    }
}

/// One entry of a test layer.
pub enum Item<'a> {
    Dir,
    File(&'a [u8]),
    Symlink(&'a str),
    HardLink(&'a str),
    Device(u32, u32),
    Fifo,
}

/// A tar of `(path, mode, item)`; owners and times follow from the place in the list.
pub fn tar_of(entries: &[(&str, u32, Item<'_>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (place, (path, mode, item)) in entries.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_mode(*mode);
        header.set_uid(place as u64);
        header.set_gid(1000 + place as u64);
        header.set_mtime(1_600_000_000 + place as u64);
        header.set_size(0);
        let kind = match item {
            Item::Dir => tar::EntryType::Directory,
            Item::File(data) => {
                header.set_size(data.len() as u64);
                header.set_entry_type(tar::EntryType::Regular);
                tar.append_data(&mut header, path, *data).unwrap();
                continue;
            }
            Item::Symlink(target) | Item::HardLink(target) => {
                let symlink = matches!(item, Item::Symlink(_));
                header.set_entry_type(if symlink { tar::EntryType::Symlink } else { tar::EntryType::Link });
                tar.append_link(&mut header, path, target).unwrap();
                continue;
            }
            Item::Device(major, minor) => {
                header.set_device_major(*major).unwrap();
                header.set_device_minor(*minor).unwrap();
                tar::EntryType::Char
            }
            Item::Fifo => tar::EntryType::Fifo,
        };
        header.set_entry_type(kind);
        tar.append_data(&mut header, path, std::io::empty()).unwrap();
    }
    tar.into_inner().unwrap()
}
