//! Golden images: where they lie, how they are listed.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Bootstrap, FileType, Nid, OpenOptions, Step, Walk, from_bytes};
use rafs::fs::{Rafs, RafsOptions};
use storage::digest::DigestAlgorithm;
use storage::extent::ChunkExtent;
use storage::read::ReadSlice;

/// A file of the golden set.
pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

pub fn golden_bytes(name: &str) -> Vec<u8> {
    let path = golden(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn open_bytes(bytes: Vec<u8>) -> Arc<dyn Bootstrap> {
    Arc::from(from_bytes(bytes, &OpenOptions::default()).unwrap())
}

/// An image with the stored bytes of its blobs, in blob table order.
pub struct GoldenImage {
    pub rafs: Rafs,
    pub blobs: Vec<Vec<u8>>,
}

impl GoldenImage {
    pub fn new(bootstrap: Arc<dyn Bootstrap>, blobs: Vec<Vec<u8>>) -> Self {
        let contexts = blobs.clone();
        Self::separate(bootstrap, blobs, contexts)
    }

    /// An image whose contexts lie in other files than its data.
    pub fn separate(bootstrap: Arc<dyn Bootstrap>, blobs: Vec<Vec<u8>>, contexts: Vec<Vec<u8>>) -> Self {
        assert_eq!(bootstrap.blobs().len(), blobs.len());
        // Every context that there is is read, needed or not: it must agree with the records.
        let contexts = bootstrap
            .blobs()
            .iter()
            .zip(&contexts)
            .map(|(blob, bytes)| {
                if !blob.has_context() {
                    return None;
                }
                let range = stored_range(blob).unwrap();
                let stored = &bytes[range.start() as usize..range.end() as usize];
                let context = BlobContext::from_stored(blob, stored).unwrap();
                let again = BlobContext::from_cache_file(blob, &context.to_cache_file()).unwrap();
                assert_eq!(again.to_cache_file(), context.to_cache_file());
                Some(context)
            })
            .collect();
        let rafs = Rafs::new(bootstrap, contexts, RafsOptions::default()).unwrap();
        Self { rafs, blobs }
    }

    /// Decodes and verifies one chunk.
    pub fn chunk(&self, blob: u32, extent: &ChunkExtent) -> Vec<u8> {
        let unit = &extent.unit;
        let stored =
            &self.blobs[blob as usize][unit.compressed.start() as usize..unit.compressed.end() as usize];
        let mut decoded = vec![0; unit.decoded_len as usize];
        unit.decode(stored, &mut decoded).unwrap();
        let chunk = decoded[extent.offset_in_unit as usize..][..extent.len as usize].to_vec();
        let expected = extent.digest.expect("golden images have digests");
        assert_eq!(expected.algorithm.digest(&chunk), expected.digest);
        chunk
    }

    /// Bytes of a file, read in pieces of `step` bytes.
    pub fn read_file(&self, nid: Nid, step: u32) -> Vec<u8> {
        let mut content = Vec::new();
        loop {
            let mut slices: Vec<ReadSlice> = Vec::new();
            let n = self.rafs.read(nid, content.len() as u64, step, &mut slices).unwrap();
            assert_eq!(slices.iter().map(|s| s.len).sum::<u32>(), n);
            if n == 0 {
                return content;
            }
            for slice in slices {
                let chunk = self.chunk(slice.blob, &slice.extent);
                content.extend_from_slice(&chunk[slice.offset as usize..][..slice.len as usize]);
            }
        }
    }

    /// The image in the form of `list/*.tsv`, without the header line.
    pub fn list(&self) -> String {
        let bootstrap = &**self.rafs.bootstrap();
        let mut walk = Walk::new(bootstrap, bootstrap.root());
        let mut lines = BTreeMap::new();
        while let Some(step) = walk.step().unwrap() {
            if let Step::Enter(entry) | Step::Leaf(entry) = step {
                let mut path = b"/".to_vec();
                path.extend_from_slice(walk.path());
                let line = self.line(&path, entry.nid);
                // Components are compared one by one, as the traversal orders them.
                let key: Vec<Vec<u8>> = walk.path().split(|&b| b == b'/').map(<[u8]>::to_vec).collect();
                assert!(lines.insert(key, line).is_none());
            }
        }
        lines.into_values().collect()
    }

    fn line(&self, path: &[u8], nid: Nid) -> String {
        let bootstrap = self.rafs.bootstrap();
        let attr = bootstrap.attr(nid).unwrap();
        let dash = || "-".to_owned();
        let (kind, target, sha256) = match attr.file_type {
            FileType::Directory => ("d", dash(), dash()),
            FileType::Regular => {
                let content = self.read_file(nid, 1 << 20);
                assert_eq!(content.len() as u64, attr.size);
                ("f", dash(), DigestAlgorithm::Sha256.digest(&content).to_string())
            }
            FileType::Symlink => ("l", percent(&bootstrap.read_link(nid).unwrap()), dash()),
            FileType::CharDevice => ("c", dash(), dash()),
            FileType::BlockDevice => ("b", dash(), dash()),
            FileType::Fifo => ("p", dash(), dash()),
            FileType::Socket => ("s", dash(), dash()),
        };
        let rdev = match attr.file_type {
            FileType::CharDevice | FileType::BlockDevice => {
                let (major, minor) = attr.device();
                format!("{major}:{minor}")
            }
            _ => dash(),
        };
        let mut line = format!(
            "{}\t{kind}\t{:o}\t{}\t{}\t{}\t{}\t{}\t{}\t{rdev}\t{target}\t{sha256}\t",
            percent(path),
            attr.mode & 0o7777,
            attr.uid,
            attr.gid,
            attr.size,
            attr.mtime,
            attr.mtime_nsec,
            attr.nlink,
        );
        let mut xattrs = BTreeMap::new();
        bootstrap
            .xattrs(nid, &mut |xattr| {
                let name = [xattr.prefix, xattr.suffix].concat();
                let hex: String = xattr.value.iter().map(|b| format!("{b:02x}")).collect();
                xattrs.insert(name, hex);
                ControlFlow::Continue(())
            })
            .unwrap();
        let listed: Vec<String> =
            xattrs.iter().map(|(name, hex)| format!("{}={hex}", percent(name))).collect();
        for name in xattrs.keys() {
            assert!(self.rafs.getxattr(nid, name).unwrap().is_some());
        }
        line += &if listed.is_empty() { dash() } else { listed.join(";") };
        line.push('\n');
        line
    }
}

/// Bytes but letters, digits and `/_.-~+!=` as `%XX`.
pub fn percent(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, &b| {
        if b.is_ascii_alphanumeric() || b"/_.-~+!=".contains(&b) {
            out.push(b.into());
        } else {
            let _ = write!(out, "%{b:02X}");
        }
        out
    })
}

/// An expected listing without its header line.
pub fn expected(list: &str) -> String {
    let text = String::from_utf8(golden_bytes(&format!("list/{list}.tsv"))).unwrap();
    let (_, lines) = text.split_once('\n').unwrap();
    lines.to_owned()
}
