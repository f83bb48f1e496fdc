//! An OCI image layout on disk: `oci-layout`, `index.json`, `blobs/ALGORITHM/HEX`.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex};

use super::manifest::{Document, MAX_MANIFEST_SIZE, OCI_INDEX, annotation, descriptor_digest};
use crate::backend::localfs::open_regular;
use crate::digest::TaggedDigest;
use crate::{Error, ErrorKind, Result};

/// The annotation of an index entry that holds its tag.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// `oci-layout` is a few dozen bytes.
const MAX_MARKER_SIZE: u64 = 4096;

/// A layout opened for reading.
#[derive(Clone, Debug)]
pub struct OciLayout {
    root: PathBuf,
    index: ImageIndex,
}

impl OciLayout {
    /// Opens the layout in the directory `root`.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Io`; `Invalid`: not a layout; `Unsupported`: another version;
    /// `Corrupt`: a malformed index.
    pub fn open(root: &Path) -> Result<Self> {
        let inner = || {
            let marker = read_capped(&root.join("oci-layout"), MAX_MARKER_SIZE).map_err(|e| match e.kind() {
                ErrorKind::NotFound => Error::new(
                    ErrorKind::NotFound,
                    "no file oci-layout is there, so it is no image layout; name the directory that one is in, such as \
                     `skopeo copy docker://IMAGE oci:DIR` makes",
                ),
                _ => e,
            })?;
            let version = serde_json::from_slice::<serde_json::Value>(&marker)
                .ok()
                .and_then(|v| v.get("imageLayoutVersion")?.as_str().map(str::to_owned))
                .ok_or_else(|| Error::new(ErrorKind::Invalid, "oci-layout: no imageLayoutVersion in it"))?;
            if !version.starts_with("1.") {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("layout version {version:?}: want 1.x"),
                ));
            }
            let bytes = Bytes::from(read_capped(&root.join("index.json"), MAX_MANIFEST_SIZE)?);
            match Document::new(bytes, OCI_INDEX, None)?.parse()? {
                super::manifest::Manifest::Index(index) => Ok(Self { root: root.to_owned(), index: *index }),
                super::manifest::Manifest::Image(_) => {
                    Err(Error::new(ErrorKind::Corrupt, "index.json: an image where an index must be"))
                }
            }
        };
        inner().map_err(|e: Error| e.context(format_args!("OCI layout {}", root.display())))
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory that holds blobs named by SHA-256.
    pub fn blobs_dir(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    /// The entry with `tag`, or the only entry.
    ///
    /// # Errors
    /// `NotFound`: no such tag; `Invalid`: no tag given and several entries. Both messages
    /// list the tags there are.
    pub fn find(&self, tag: Option<&str>) -> Result<&Descriptor> {
        let entries = self.index.manifests();
        let found = match (tag, entries.as_slice()) {
            (Some(tag), entries) => entries.iter().find(|d| annotation(d, REF_NAME) == Some(tag)),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        found.ok_or_else(|| {
            let mut tags: Vec<_> = entries.iter().filter_map(|d| annotation(d, REF_NAME)).collect();
            tags.sort_unstable();
            let there = if tags.is_empty() { "none".to_owned() } else { tags.join(", ") };
            let (kind, why) = match tag {
                Some(tag) => (ErrorKind::NotFound, format!("no tag {tag:?}")),
                None => (ErrorKind::Invalid, format!("{} images, name one by its tag", entries.len())),
            };
            Error::new(kind, format!("OCI layout {}: {why}; tags: {there}", self.root.display()))
        })
    }

    /// The path of a blob; whether it is there shows when it is opened.
    pub fn blob_path(&self, digest: TaggedDigest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm.name()).join(digest.digest.to_string())
    }

    /// Opens a blob of the size its descriptor says.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Io`; `Corrupt`: another size. The digest is the reader's to verify.
    pub fn open_blob(&self, descriptor: &Descriptor) -> Result<File> {
        let path = self.blob_path(descriptor_digest(descriptor)?);
        let (file, size) = open_regular(&path)?;
        if size != descriptor.size() {
            let why = format!("{}: {size} bytes, its descriptor says {}", path.display(), descriptor.size());
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        Ok(file)
    }

    /// Reads and verifies the manifest or index that `descriptor` names.
    ///
    /// # Errors
    /// Those of [`OciLayout::open_blob`] and [`Document::new`].
    pub fn document(&self, descriptor: &Descriptor) -> Result<Document> {
        let digest = descriptor_digest(descriptor)?;
        let bytes = read_capped(&self.blob_path(digest), MAX_MANIFEST_SIZE)?;
        Document::new(bytes.into(), descriptor.media_type().as_ref(), Some(digest))
            .map_err(|e| e.context(format_args!("OCI layout {}", self.root.display())))
    }
}

/// Reads a whole regular file of at most `cap` bytes.
fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let (file, size) = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(format!("read {}", path.display()), e))?;
    if bytes.len() as u64 > cap {
        let why = format!("{}: {size} bytes, at most {cap} are accepted", path.display());
        return Err(Error::new(ErrorKind::Invalid, why));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, marker: &str, entries: &[(&str, &[u8])]) {
        std::fs::create_dir_all(root.join("blobs/sha256")).unwrap();
        std::fs::write(root.join("oci-layout"), marker).unwrap();
        let list: Vec<_> = entries
            .iter()
            .map(|(tag, bytes)| {
                let digest = crate::digest::DigestAlgorithm::Sha256.digest(bytes);
                std::fs::write(root.join(format!("blobs/sha256/{digest}")), bytes).unwrap();
                format!(
                    r#"{{"mediaType":"{}","digest":"sha256:{digest}","size":{},"annotations":{{"{REF_NAME}":"{tag}"}}}}"#,
                    super::super::manifest::OCI_MANIFEST,
                    bytes.len()
                )
            })
            .collect();
        std::fs::write(
            root.join("index.json"),
            format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, list.join(",")),
        )
        .unwrap();
    }

    const MARKER: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

    #[test]
    fn tags_are_found_and_contents_verified() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), MARKER, &[("a", b"{\"a\":1}"), ("b", b"{\"b\":2}")]);
        let layout = OciLayout::open(dir.path()).unwrap();
        let b = layout.find(Some("b")).unwrap();
        let document = layout.document(b).unwrap();
        assert_eq!(&document.bytes[..], b"{\"b\":2}");
        assert_eq!(layout.find(None).unwrap_err().kind(), ErrorKind::Invalid);
        let err = layout.find(Some("c")).unwrap_err();
        assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("a, b"), "{err}");

        let path = layout.blob_path(document.digest);
        std::fs::write(&path, b"{\"b\":3}").unwrap();
        assert_eq!(layout.document(b).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::write(&path, b"{}").unwrap();
        assert_eq!(layout.open_blob(b).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(layout.open_blob(b).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_layout_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(OciLayout::open(dir.path()).unwrap_err().kind(), ErrorKind::NotFound);
        for (marker, kind) in [
            (r#"{"imageLayoutVersion":"2.0.0"}"#, ErrorKind::Unsupported),
            ("{}", ErrorKind::Invalid),
            ("x", ErrorKind::Invalid),
        ] {
            write(dir.path(), marker, &[]);
            assert_eq!(OciLayout::open(dir.path()).unwrap_err().kind(), kind, "{marker}");
        }
        write(dir.path(), MARKER, &[]);
        assert_eq!(OciLayout::open(dir.path()).unwrap().find(None).unwrap_err().kind(), ErrorKind::Invalid);
    }
}
