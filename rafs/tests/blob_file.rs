//! Blob files read from their end.

mod support;

use std::sync::Arc;

use rafs::blob_file::BlobFile;
use rafs::bootstrap::{Bootstrap, OpenOptions, from_bytes};
use rafs::format::tar_header;
use rafs::{Error, Result};
use storage::digest::{Digest, DigestAlgorithm};
use storage::ids::{BlobId, ByteRange};
use support::{GoldenImage, expected, golden_bytes};

fn reader(bytes: &[u8]) -> impl FnMut(ByteRange) -> Result<Vec<u8>> + '_ {
    |range| {
        let part = bytes.get(range.start() as usize..range.end() as usize);
        part.map(<[u8]>::to_vec).ok_or_else(|| Error::corrupt("beyond the file"))
    }
}

/// The bootstrap inside a blob, with the blob's own name.
fn inlined(blob: &[u8], id: &str) -> Arc<dyn Bootstrap> {
    let file = BlobFile::read(blob.len() as u64, &mut reader(blob)).unwrap();
    let boot = file.bootstrap(&mut reader(blob)).unwrap();
    let options = OpenOptions { inlined_blob_id: Some(BlobId::new(id).unwrap()) };
    Arc::from(from_bytes(boot, &options).unwrap())
}

#[test]
fn inlined_bootstraps_list_and_decode() {
    for (name, list) in [("inline-toc", "tree"), ("upper-inline-toc", "upper")] {
        let blob = golden_bytes(&format!("{name}/layer.blob"));
        let bootstrap = inlined(&blob, name);
        assert_eq!(bootstrap.blobs()[0].id.as_str(), name);
        assert_eq!(GoldenImage::new(bootstrap, vec![blob]).list(), expected(list));
    }
    // Without whiteouts there is no listing, but all content must match its digests.
    let blob = golden_bytes("inline-old/layer.blob");
    let listed = GoldenImage::new(inlined(&blob, "old"), vec![blob]).list();
    let upper = expected("upper");
    let kept = upper.lines().filter(|line| !line.contains("/.wh.") && line.contains("\tf\t"));
    assert!(kept.clone().count() > 3);
    kept.for_each(|line| assert!(listed.lines().any(|l| l == line), "{line}"));
}

#[test]
fn sections_are_those_of_the_golden_files() {
    let names = |file: &str| {
        let blob = golden_bytes(file);
        let found = BlobFile::read(blob.len() as u64, &mut reader(&blob)).unwrap();
        for section in found.sections() {
            if section.name != "image.blob" {
                found.decode(section.name, 1 << 30, &mut reader(&blob)).unwrap();
            }
        }
        found.sections().iter().map(|s| s.name).collect::<Vec<_>>()
    };
    assert_eq!(names("default/image.blob"), ["image.blob", "blob.meta"]);
    assert_eq!(names("inline-old/layer.blob"), ["image.blob", "blob.meta", "image.boot"]);
    let toc = ["image.blob", "blob.meta", "blob.meta.header", "blob.digest"];
    assert_eq!(names("toc-sha256/image.blob"), toc);
    assert_eq!(names("inline-toc/layer.blob"), [&toc[..], &["image.boot"]].concat());
}

#[test]
fn a_record_states_its_table_of_content() {
    let blob = golden_bytes("toc-sha256/image.blob");
    let file = BlobFile::read(blob.len() as u64, &mut reader(&blob)).unwrap();
    let boot = from_bytes(golden_bytes("toc-sha256/image.boot"), &OpenOptions::default()).unwrap();
    let record = &boot.blobs()[0].record;
    let stated = (record.blob_toc_size.get(), Digest(record.blob_toc_digest));
    assert_eq!(file.toc(), Some(stated));
    // The digest array holds what the chunk records hold.
    let digests = file.decode("blob.digest", 1 << 20, &mut reader(&blob)).unwrap();
    for (index, digest) in (0u32..).zip(digests.chunks_exact(32)) {
        assert_eq!(boot.chunk_info(0, storage::ids::ChunkIndex(index)).unwrap().digest, digest);
    }
}

#[test]
fn written_tar_headers_are_those_of_the_reference() {
    let blob = golden_bytes("inline-toc/layer.blob");
    let file = BlobFile::read(blob.len() as u64, &mut reader(&blob)).unwrap();
    let boot = file.section("image.boot").unwrap();
    let at = boot.stored.end() as usize;
    assert_eq!(tar_header::write("image.boot", boot.stored.len()), blob[at..at + 512]);
}

/// The blob that holds the context of an original layer is the one that holds the bootstrap; who
/// does not say which that is has no context.
#[test]
fn a_reference_takes_its_context_from_the_blob_it_came_from() {
    let blob = golden_bytes("zran-inline/layer.blob");
    let file = BlobFile::read(blob.len() as u64, &mut reader(&blob)).unwrap();
    let boot = file.bootstrap(&mut reader(&blob)).unwrap();
    let opened = |id| from_bytes(boot.clone(), &OpenOptions { inlined_blob_id: id }).unwrap();
    let id = storage::ids::BlobId::new("some-name").unwrap();
    assert_eq!(opened(None).blobs()[0].context_id, None);
    assert_eq!(opened(Some(id.clone())).blobs()[0].context_id, Some(id));
}

/// Any damaged byte of bootstrap, table or headers is noticed; damage elsewhere is not hidden
/// by a panic.
#[test]
fn damage_is_noticed() {
    for name in ["inline-toc", "inline-old"] {
        let blob = golden_bytes(&format!("{name}/layer.blob"));
        let intact = DigestAlgorithm::Sha256.digest(&blob);
        for at in (0..blob.len()).step_by(97).chain(blob.len() - 1200..blob.len()) {
            let mut damaged = blob.clone();
            damaged[at] ^= 0x10;
            assert_ne!(DigestAlgorithm::Sha256.digest(&damaged), intact);
            if let Ok(file) = BlobFile::read(damaged.len() as u64, &mut reader(&damaged)) {
                let boot = file.bootstrap(&mut reader(&damaged));
                let in_boot = file.section("image.boot").is_some_and(|s| {
                    s.digest.is_some() && s.stored.contains(ByteRange::new(at as u64, 1).unwrap())
                });
                assert!(!(in_boot && boot.is_ok()), "byte {at}");
            }
        }
        for len in [0, 1, 511, 512, 4096, blob.len() - 1, blob.len() / 2] {
            let cut = &blob[..len];
            let read = BlobFile::read(len as u64, &mut reader(cut));
            assert!(read.and_then(|file| file.bootstrap(&mut reader(cut))).is_err(), "{len} bytes");
        }
    }
}
