//! Writing an image into an OCI layout directory or an OCI archive.
//!
//! The order makes a crash harmless: blobs first, under temporary names until they are whole
//! and durable; `index.json` last, replaced by one rename. Until that rename the layout says
//! what it said before. Images of other names in it are kept.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::{Map, Value, json};
use storage::digest::Digest;
use storage::oci::manifest::MAX_MANIFEST_SIZE;

use super::archive::Archive;
use super::media;
use super::objects::{Objects, blob_name};
use super::spool::{self, SpooledBlob, TEMP_PREFIX};
use crate::durable::sync_dir;
use crate::{Error, ErrorKind, Result};

const LAYOUT_MARKER: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// The manifest that a layout is to name.
#[derive(Debug)]
pub struct NamedManifest<'a> {
    /// Media type of the manifest.
    pub media_type: &'a str,
    /// Its blob.
    pub digest: Digest,
    /// Its length.
    pub size: u64,
}

/// An OCI layout directory that is about to get one more image.
#[derive(Debug)]
pub struct LayoutWriter {
    root: PathBuf,
    tag: Option<String>,
    pending: Mutex<Vec<SpooledBlob>>,
    /// Directories made by this writer, outermost first; removed if nothing is published.
    created: Vec<PathBuf>,
    published: bool,
}

impl LayoutWriter {
    /// Prepares `root` for an image named `tag`; the directory is made if it is not there.
    ///
    /// # Errors
    /// `Invalid`: a directory with other things in it. `Io`.
    pub fn open(root: &Path, tag: Option<&str>) -> Result<Self> {
        let failed = |e: io::Error| Error::io(format!("layout {}", root.display()), e);
        if root.is_dir() && !root.join("oci-layout").exists() {
            let foreign = fs::read_dir(root).map_err(failed)?.next().is_some();
            // What an interrupted first write leaves is a layout in the making.
            if foreign && !root.join("blobs/sha256").is_dir() {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "{}: a directory, but neither empty nor an OCI layout; choose another path",
                        root.display()
                    ),
                ));
            }
        }
        let mut writer = Self {
            root: root.to_owned(),
            tag: tag.map(str::to_owned),
            pending: Mutex::default(),
            created: Vec::new(),
            published: false,
        };
        let blobs = writer.blobs();
        let missing: Vec<&Path> =
            blobs.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
        for dir in missing.into_iter().rev() {
            fs::create_dir(dir).map_err(|e| Error::io(format!("directory {}", dir.display()), e))?;
            writer.created.push(dir.to_owned());
        }
        spool::sweep(&blobs);
        Ok(writer)
    }

    /// Where blobs are spooled: temporary files here become blobs by a rename.
    pub fn spool_dir(&self) -> PathBuf {
        self.blobs()
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    /// Takes a finished blob and says what became of it. It gets its name when the image is
    /// published.
    ///
    /// # Errors
    /// `Io`: the bytes cannot be made durable.
    pub fn put(&self, blob: SpooledBlob) -> Result<&'static str> {
        let there = fs::metadata(self.root.join(blob_name(&blob.digest())));
        if there.is_ok_and(|m| m.is_file() && m.len() == blob.size()) {
            return Ok("exists already");
        }
        blob.make_durable()?;
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(blob);
        Ok("")
    }

    /// Names the blobs, then the image.
    ///
    /// # Errors
    /// `Io`; the layout still says what it said before.
    pub fn publish(mut self, manifest: &NamedManifest<'_>) -> Result<()> {
        let lock =
            File::open(&self.root).map_err(|e| Error::io(format!("layout {}", self.root.display()), e))?;
        lock.lock().map_err(|e| Error::io(format!("locking layout {}", self.root.display()), e))?;
        let objects = Objects::directory(&self.root);
        let index = updated_index(&objects, self.tag.as_deref(), manifest)?;
        let pending =
            std::mem::take(&mut *self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for blob in pending {
            let path = self.root.join(blob_name(&blob.digest()));
            blob.persist(&path)?;
        }
        sync_dir(&self.blobs())?;
        if !self.root.join("oci-layout").exists() {
            SpooledBlob::from_bytes(&self.root, LAYOUT_MARKER)?.persist(&self.root.join("oci-layout"))?;
        }
        self.published = true;
        SpooledBlob::from_bytes(&self.root, &index)?.persist(&self.root.join("index.json"))?;
        sync_dir(&self.root)
    }
}

impl Drop for LayoutWriter {
    fn drop(&mut self) {
        if !self.published {
            self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
            for dir in self.created.iter().rev() {
                // Fails when somebody else put something there, which is theirs to keep.
                let _ = fs::remove_dir(dir);
            }
        }
    }
}

/// An OCI archive that is about to be written.
#[derive(Debug)]
pub struct ArchiveWriter {
    path: PathBuf,
    tag: Option<String>,
    spool: tempfile::TempDir,
    blobs: Mutex<Vec<SpooledBlob>>,
}

impl ArchiveWriter {
    /// Prepares archive `path` for an image named `tag`. An archive that is there keeps its
    /// other images.
    ///
    /// # Errors
    /// `Io`: no temporary directory beside it.
    pub fn open(path: &Path, tag: Option<&str>) -> Result<Self> {
        spool::sweep(parent_of(path));
        let spool = tempfile::Builder::new()
            .prefix(TEMP_PREFIX)
            .tempdir_in(parent_of(path))
            .map_err(|e| Error::io(format!("temporary directory beside {}", path.display()), e))?;
        Ok(Self { path: path.to_owned(), tag: tag.map(str::to_owned), spool, blobs: Mutex::default() })
    }

    /// Where blobs are spooled.
    pub fn spool_dir(&self) -> PathBuf {
        self.spool.path().to_owned()
    }

    /// Takes a finished blob and says what became of it.
    pub fn put(&self, blob: SpooledBlob) -> &'static str {
        let mut blobs = self.blobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if blobs.iter().any(|b| b.digest() == blob.digest()) {
            return "exists already";
        }
        blobs.push(blob);
        ""
    }

    /// Writes the archive under a temporary name and renames it.
    ///
    /// # Errors
    /// `Io`; `Corrupt`: an archive is there and is not one. A file that is there is unchanged.
    pub fn publish(self, manifest: &NamedManifest<'_>) -> Result<()> {
        let failed = |e: io::Error| Error::io(format!("archive {}", self.path.display()), e);
        let old = if self.path.exists() { Some(Objects::archive(&self.path)?) } else { None };
        let index = match &old {
            Some(objects) => updated_index(objects, self.tag.as_deref(), manifest)?,
            None => updated_index(&Objects::directory(self.spool.path()), self.tag.as_deref(), manifest)?,
        };
        let mut blobs = self.blobs.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        blobs.sort_by_key(SpooledBlob::digest);
        let out = tempfile::Builder::new()
            .prefix(TEMP_PREFIX)
            .tempfile_in(parent_of(&self.path))
            .map_err(failed)?;
        let mut tar = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, out));
        append(&mut tar, "oci-layout", LAYOUT_MARKER.len() as u64, LAYOUT_MARKER).map_err(failed)?;
        append(&mut tar, "index.json", index.len() as u64, &index[..]).map_err(failed)?;
        for blob in &blobs {
            append(&mut tar, &blob_name(&blob.digest()), blob.size(), blob.reader()?).map_err(failed)?;
        }
        if let Some(Objects::Archive(old)) = &old {
            let new: Vec<String> = blobs.iter().map(|b| blob_name(&b.digest())).collect();
            keep_old_blobs(old, &new, &mut tar)?;
        }
        let out = tar
            .into_inner()
            .and_then(|w| w.into_inner().map_err(io::IntoInnerError::into_error))
            .map_err(failed)?;
        let size = out.as_file().metadata().map_err(failed)?.len();
        // Its digest is nobody's concern: the archive itself is not a blob.
        SpooledBlob::adopt(out, Digest([0; 32]), size).persist(&self.path)?;
        sync_dir(parent_of(&self.path))
    }
}

fn keep_old_blobs<W: io::Write>(old: &Archive, new: &[String], tar: &mut tar::Builder<W>) -> Result<()> {
    for name in old.names().into_iter().filter(|n| n.starts_with("blobs/")) {
        if new.iter().any(|n| n == name) {
            continue;
        }
        let (reader, size) = old.open_object(name)?;
        append(tar, name, size, reader)
            .map_err(|e| Error::io(format!("archive {}", old.path().display()), e))?;
    }
    Ok(())
}

fn append<W: io::Write>(tar: &mut tar::Builder<W>, name: &str, size: u64, data: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(size);
    header.set_mtime(0);
    tar.append_data(&mut header, name, data)
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The index with `manifest` under `tag` in place of what had that name.
fn updated_index(objects: &Objects, tag: Option<&str>, manifest: &NamedManifest<'_>) -> Result<Vec<u8>> {
    let corrupt =
        |why: &str| Error::new(ErrorKind::Corrupt, format!("{}: index.json {why}", objects.path().display()));
    let mut index: Map<String, Value> = match objects.read("index.json", MAX_MANIFEST_SIZE) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| corrupt("is not an index").with_source(e))?,
        Err(e) if e.kind() == ErrorKind::NotFound => Map::new(),
        Err(e) => return Err(e),
    };
    index.insert("schemaVersion".into(), json!(2));
    index.entry("mediaType").or_insert_with(|| json!(media::OCI_INDEX));
    let entries = index.entry("manifests").or_insert_with(|| json!([]));
    let entries = entries.as_array_mut().ok_or_else(|| corrupt("has no list of manifests"))?;
    let name_of = |entry: &Value| {
        entry
            .get("annotations")
            .and_then(|a| a.get(media::ANNOTATION_REF_NAME))
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    entries.retain(|entry| name_of(entry).as_deref() != tag);
    let mut entry = json!({
        "mediaType": manifest.media_type,
        "digest": format!("sha256:{}", manifest.digest),
        "size": manifest.size,
    });
    if let (Some(tag), Some(entry)) = (tag, entry.as_object_mut()) {
        entry.insert("annotations".into(), json!({ media::ANNOTATION_REF_NAME: tag }));
    }
    entries.push(entry);
    serde_json::to_vec(&index).map_err(|e| corrupt("cannot be written").with_source(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::source::read_index;

    fn blob(dir: &Path, bytes: &[u8]) -> (SpooledBlob, NamedManifest<'static>) {
        let blob = SpooledBlob::from_bytes(dir, bytes).unwrap();
        let manifest =
            NamedManifest { media_type: media::OCI_MANIFEST, digest: blob.digest(), size: blob.size() };
        (blob, manifest)
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut out: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        out.sort();
        out
    }

    #[test]
    fn nothing_is_named_before_the_image_is_published() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("a/b");
        {
            let writer = LayoutWriter::open(&root, Some("t")).unwrap();
            writer.put(blob(&writer.spool_dir(), b"one").0).unwrap();
            let seen = files(&writer.spool_dir());
            assert!(seen.len() == 1 && seen[0].starts_with(TEMP_PREFIX), "{seen:?}");
            assert!(!root.join("index.json").exists() && !root.join("oci-layout").exists());
        }
        assert!(files(tmp.path()).is_empty(), "what was made for nothing is removed");
    }

    #[test]
    fn other_images_of_a_layout_are_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("layout");
        for (tag, bytes) in [(Some("a"), "1"), (Some("b"), "2"), (None, "3"), (Some("a"), "4"), (None, "5")] {
            let writer = LayoutWriter::open(&root, tag).unwrap();
            let (blob, manifest) = blob(&writer.spool_dir(), bytes.as_bytes());
            writer.put(blob).unwrap();
            writer.publish(&manifest).unwrap();
        }
        let entries = read_index("x", &Objects::directory(&root)).unwrap();
        let names: Vec<_> = entries.iter().map(crate::oci::source::ref_name).collect();
        assert_eq!(names, [Some("b"), Some("a"), None]);
        assert_eq!(files(&root), ["blobs", "index.json", "oci-layout"]);
        assert!(files(&root.join("blobs/sha256")).iter().all(|n| !n.starts_with(TEMP_PREFIX)));
        fs::write(tmp.path().join("file"), "").unwrap();
        assert_eq!(LayoutWriter::open(tmp.path(), None).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn archives_are_replaced_at_once_and_keep_their_images() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("x.tar");
        for (tag, bytes) in [("a", "1"), ("b", "2"), ("a", "3")] {
            let writer = ArchiveWriter::open(&path, Some(tag)).unwrap();
            let (blob, manifest) = blob(&writer.spool_dir(), bytes.as_bytes());
            let digest = blob.digest();
            writer.put(blob);
            writer.publish(&manifest).unwrap();
            let objects = Objects::archive(&path).unwrap();
            assert_eq!(objects.read_blob(&digest, 10).unwrap(), bytes.as_bytes());
        }
        let entries = read_index("x", &Objects::archive(&path).unwrap()).unwrap();
        assert_eq!(entries.iter().filter_map(crate::oci::source::ref_name).collect::<Vec<_>>(), ["b", "a"]);
        drop(ArchiveWriter::open(&path, None).unwrap());
        assert_eq!(files(tmp.path()), ["x.tar"]);
    }
}
