//! What the tests of built images share.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use builder::create::{BuiltLayer, LayerOptions, LayerSource, Version, build_layer};
use builder::overlay::WhiteoutSpec;
use builder::pipeline::DataOptions;
use builder::prefetch::Patterns;
use builder::sink::BlobSink;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Bootstrap, OpenOptions};
use rafs::fs::{Rafs, RafsOptions};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::ByteRange;

/// A file of the golden set.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(path)
}

/// Unpacks a golden source as its README says; `None` without the rights for it.
pub fn unpacked(name: &str) -> Option<tempfile::TempDir> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: unpacking devices and trusted xattrs needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-xpf"])
        .arg(golden(&format!("src/{name}.tar.gz")))
        .arg("-C")
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(status.success());
    Some(dir)
}

/// Plain options: no table of content, separate bootstrap, OCI whiteouts.
pub fn options(codec: Codec, chunk_size: u32) -> LayerOptions {
    LayerOptions {
        version: Version::V6,
        data: DataOptions {
            codec,
            digester: DigestAlgorithm::Blake3,
            chunk_size,
            threads: 2,
            placement: builder::pipeline::Placement::Blob,
            batch_size: 0,
            cipher: None,
        },
        toc: false,
        inline_bootstrap: false,
        blob_id: None,
        whiteouts: WhiteoutSpec::Oci,
        prefetch: Patterns::default(),
        prefetch_table: true,
        explicit_ids: true,
        keep_context: false,
    }
}

/// A blob kept in memory.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Memory {
    /// What was written.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Reports the first difference instead of dumping two images.
pub fn assert_same(what: &str, ours: &[u8], theirs: &[u8]) {
    let differs = ours.iter().zip(theirs).position(|(a, b)| a != b);
    assert!(
        differs.is_none() && ours.len() == theirs.len(),
        "{what}: first difference at {differs:?}, lengths {} and {}",
        ours.len(),
        theirs.len()
    );
}

/// Decodes every chunk of an image with one blob and compares it with its digest.
pub fn verify(bootstrap: &[u8], blob: &[u8]) {
    let bootstrap: Arc<dyn Bootstrap> =
        rafs::bootstrap::from_bytes(bootstrap.to_vec(), &OpenOptions::default()).unwrap().into();
    let range = stored_range(&bootstrap.blobs()[0]).unwrap();
    let stored = &blob[range.start() as usize..range.end() as usize];
    let context = BlobContext::from_stored(&bootstrap.blobs()[0], stored).unwrap();
    let chunks = u64::from(context.chunk_count());
    let rafs = Rafs::new(bootstrap, vec![Some(context)], RafsOptions::default()).unwrap();
    let mut read = |range: ByteRange| Ok(blob[range.start() as usize..range.end() as usize].to_vec());
    let report = rafs::check::data(&rafs, 0, &mut read).unwrap();
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert_eq!((report.verified, report.unreferenced_bytes), (chunks, 0));
}

/// Builds a layer in memory and checks what must hold for every one.
pub fn build(source: LayerSource<'_>, options: &LayerOptions) -> (BuiltLayer, Vec<u8>) {
    let memory = Memory::default();
    let built = build_layer(source, options, BlobSink::new("memory", memory.clone())).unwrap();
    let blob = std::mem::take(&mut *memory.0.lock().unwrap());
    let opened = rafs::bootstrap::from_bytes(built.bootstrap.clone(), &OpenOptions::default()).unwrap();
    assert_eq!(rafs::merkle::image_root(&*opened).unwrap(), built.root);
    assert_eq!(built.blob.size, blob.len() as u64);
    assert_eq!(built.blob.file_digest, DigestAlgorithm::Sha256.digest(&blob));
    (built, blob)
}

/// Sections of a blob by name, found by walking the tar headers back from its end.
pub fn sections(blob: &[u8]) -> Vec<(String, &[u8])> {
    let (mut out, mut end) = (Vec::new(), blob.len());
    while end > 0 {
        let header = tar::Header::from_byte_slice(&blob[end - 512..end]);
        let size = header.size().unwrap() as usize;
        let name = header.path().unwrap().display().to_string();
        out.push((name, &blob[end - 512 - size..end - 512]));
        end -= 512 + size;
    }
    out
}
