//! OCI images made from nothing: layers as lists of entries, written as an OCI layout.
//!
//! A layer is written entry by entry in the caller's order, so a recipe controls everything that a
//! converter must cope with: order, duplicates, whiteouts, long and non-UTF-8 names.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::json;
use sha2::{Digest, Sha256};

/// What an entry of a layer is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file and its bytes.
    File(Vec<u8>),
    /// A symlink and its target.
    Symlink(Vec<u8>),
    /// A hard link to an earlier path of the same layer.
    HardLink(Vec<u8>),
    /// A character device.
    CharDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
    /// A fifo.
    Fifo,
}

/// One tar entry. The constructors set what most entries have; the rest is set by field.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Path without a leading slash, as bytes.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid, sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time: seconds (may be negative) and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes by full name.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// The modification time of entries that do not say otherwise: 2024-02-29 12:34:56 UTC.
pub const MTIME: i64 = 1_709_210_096;

impl Entry {
    /// An entry of `kind` at `path`, owned by root.
    pub fn new(path: impl AsRef<[u8]>, kind: Kind) -> Self {
        let mode = match kind {
            Kind::Directory => 0o755,
            Kind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        let path = path.as_ref().to_vec();
        Self { path, kind, mode, uid: 0, gid: 0, mtime: (MTIME, 0), xattrs: Vec::new() }
    }

    /// A directory.
    pub fn dir(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::Directory)
    }

    /// A regular file.
    pub fn file(path: impl AsRef<[u8]>, bytes: impl Into<Vec<u8>>) -> Self {
        Self::new(path, Kind::File(bytes.into()))
    }

    /// A symlink.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::Symlink(target.as_ref().to_vec()))
    }

    /// A hard link to `target`, a path of the same layer.
    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::HardLink(target.as_ref().to_vec()))
    }

    /// The same with other permission bits.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// The same with another owner.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// The same with another modification time.
    pub fn mtime(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.mtime = (seconds, nanoseconds);
        self
    }

    /// The same with one more extended attribute.
    pub fn xattr(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.xattrs.push((name.to_owned(), value.as_ref().to_vec()));
        self
    }
}

/// How layers are compressed on their way into the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Plain tar.
    Plain,
    /// As registries mostly hold them.
    Gzip,
    /// The newer kind.
    Zstd,
}

/// An image: its layers, lowest first, and how they are stored.
#[derive(Clone, Debug)]
pub struct Image {
    /// Layers, lowest first.
    pub layers: Vec<Vec<Entry>>,
    /// How each is compressed.
    pub compression: Compression,
}

/// The bytes of `entries` as a tar stream.
///
/// # Errors
/// An entry does not fit the format.
pub fn tar_bytes(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        append(&mut tar, entry)?;
    }
    Ok(tar.into_inner()?)
}

fn append(tar: &mut tar::Builder<Vec<u8>>, entry: &Entry) -> Result<()> {
    let mut pax: Vec<(String, Vec<u8>)> = Vec::new();
    let (seconds, nanoseconds) = entry.mtime;
    if nanoseconds != 0 || seconds < 0 {
        pax.push(("mtime".into(), pax_time(seconds, nanoseconds).into_bytes()));
    }
    for (name, value) in &entry.xattrs {
        pax.push((format!("SCHILY.xattr.{name}"), value.clone()));
    }
    if !pax.is_empty() {
        tar.append_pax_extensions(pax.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
    }

    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.mode);
    header.set_uid(entry.uid);
    header.set_gid(entry.gid);
    header.set_mtime(u64::try_from(seconds).unwrap_or(0));
    header.set_size(0);
    header.set_entry_type(match entry.kind {
        Kind::Directory => tar::EntryType::Directory,
        Kind::File(_) => tar::EntryType::Regular,
        Kind::Symlink(_) => tar::EntryType::Symlink,
        Kind::HardLink(_) => tar::EntryType::Link,
        Kind::CharDevice(..) => tar::EntryType::Char,
        Kind::BlockDevice(..) => tar::EntryType::Block,
        Kind::Fifo => tar::EntryType::Fifo,
    });
    let mut path = entry.path.clone();
    if matches!(entry.kind, Kind::Directory) && !path.ends_with(b"/") {
        path.push(b'/');
    }
    let (data, target): (&[u8], Option<&[u8]>) = match &entry.kind {
        Kind::File(bytes) => (bytes, None),
        Kind::Symlink(target) | Kind::HardLink(target) => (&[], Some(target)),
        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
            header.set_device_major(*major)?;
            header.set_device_minor(*minor)?;
            (&[], None)
        }
        Kind::Directory | Kind::Fifo => (&[], None),
    };
    header.set_size(data.len() as u64);
    if path.len() <= SHORT && target.is_none_or(|target| target.len() <= SHORT) {
        // By hand: the crate refuses `..` and absolute paths, which hostile images hold.
        header.as_old_mut().name[..path.len()].copy_from_slice(&path);
        if let Some(target) = target {
            header.set_link_name_literal(target)?;
        }
        header.set_cksum();
        tar.append(&header, data)?;
    } else if let Some(target) = target {
        tar.append_link(&mut header, as_path(&path), as_path(target))?;
    } else {
        tar.append_data(&mut header, as_path(&path), data)?;
    }
    Ok(())
}

/// Bytes of a name that fit the header itself.
const SHORT: usize = 100;

/// `-1.25 s` is written as POSIX wants it, `-1.25`: the fraction counts away from zero.
fn pax_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds < 0 && nanoseconds > 0 {
        let whole = -(seconds + 1);
        return format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds);
    }
    format!("{seconds}.{nanoseconds:09}")
}

fn as_path(bytes: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

/// The SHA-256 of `bytes` in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Image {
    /// An image of `layers`, gzip-compressed.
    pub fn new(layers: Vec<Vec<Entry>>) -> Self {
        Self { layers, compression: Compression::Gzip }
    }

    /// The same, stored another way.
    pub fn compressed(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Writes the image as a new OCI layout at `directory`, tagged `latest`.
    ///
    /// # Errors
    /// A layer does not fit tar, or writing failed.
    pub fn write_layout(&self, directory: &Path) -> Result<()> {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let store = |bytes: &[u8]| -> Result<String> {
            let hex = sha256_hex(bytes);
            fs::write(blobs.join(&hex), bytes)?;
            Ok(format!("sha256:{hex}"))
        };
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for entries in &self.layers {
            let tar = tar_bytes(entries)?;
            diff_ids.push(format!("sha256:{}", sha256_hex(&tar)));
            let (media_type, stored) = self.compress(tar)?;
            layers.push(json!({ "mediaType": media_type, "digest": store(&stored)?, "size": stored.len() }));
        }
        let config = serde_json::to_vec(&json!({
            "architecture": "amd64", "os": "linux", "created": "2024-02-29T12:34:56Z",
            "author": "tests",
            "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/", "Labels": { "kept": "yes" } },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": diff_ids.iter().map(|_| json!({ "created_by": "tests" })).collect::<Vec<_>>(),
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": store(&config)?, "size": config.len(),
            },
            "layers": layers,
        }))?;
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": store(&manifest)?, "size": manifest.len(),
                "annotations": { "org.opencontainers.image.ref.name": "latest" },
            }],
        });
        fs::write(directory.join("index.json"), serde_json::to_vec(&index)?)?;
        fs::write(directory.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(())
    }

    fn compress(&self, tar: Vec<u8>) -> Result<(&'static str, Vec<u8>)> {
        Ok(match self.compression {
            Compression::Plain => ("application/vnd.oci.image.layer.v1.tar", tar),
            Compression::Gzip => {
                // The fastest level makes one block of all, which nothing can refer into.
                let level = flate2::Compression::new(2);
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(&tar)?;
                ("application/vnd.oci.image.layer.v1.tar+gzip", encoder.finish()?)
            }
            Compression::Zstd => {
                ("application/vnd.oci.image.layer.v1.tar+zstd", zstd::encode_all(tar.as_slice(), 1)?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::pax_time;

    #[test]
    fn pax_times_count_away_from_zero() {
        for (seconds, nanoseconds, text) in [
            (0, 1, "0.000000001"),
            (5, 0, "5.000000000"),
            (-2, 750_000_000, "-1.250000000"),
            (-1, 500_000_000, "-0.500000000"),
            (-3, 0, "-3.000000000"),
        ] {
            assert_eq!(pax_time(seconds, nanoseconds), text);
        }
    }
}
