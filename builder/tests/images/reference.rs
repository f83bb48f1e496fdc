//! Layers that stay as they are: what refers to them, against the reference builder and the kernel.

use std::io::{Cursor, Write as _};
use std::sync::Arc;

use builder::reference::{BuiltReference, ReferenceKind, build_reference};
use builder::sink::BlobSink;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Bootstrap, OpenOptions, from_bytes};
use rafs::format::features::EntryFlags;
use rafs::fs::{Rafs, RafsOptions};
use storage::codec::Codec;
use storage::ids::{ByteRange, ChunkIndex};

use crate::common::{Memory, assert_same, golden, options};
use crate::layers::{Workshop, done, refused};

fn built(kind: ReferenceKind, input: &[u8], chunk_size: u32) -> (BuiltReference, Vec<u8>) {
    let memory = Memory::default();
    let sink = BlobSink::new("memory", memory.clone());
    let built =
        build_reference("layer", Cursor::new(input.to_vec()), kind, &options(Codec::Zstd, chunk_size), sink)
            .unwrap();
    (built, memory.take())
}

fn open(bytes: &[u8]) -> Arc<dyn Bootstrap> {
    from_bytes(bytes.to_vec(), &OpenOptions::default()).unwrap().into()
}

fn context(bootstrap: &dyn Bootstrap, meta: &[u8]) -> BlobContext {
    let blob = &bootstrap.blobs()[0];
    let range = stored_range(blob).unwrap();
    BlobContext::from_stored(blob, &meta[range.start() as usize..range.end() as usize]).unwrap()
}

/// Decodes every chunk from `data` and compares it with its digest.
fn verify(bootstrap: Arc<dyn Bootstrap>, context: Option<BlobContext>, data: &[u8]) -> u64 {
    let rafs = Rafs::new(bootstrap.clone(), vec![context], RafsOptions::default()).unwrap();
    let mut read = |range: ByteRange| Ok(data[range.start() as usize..range.end() as usize].to_vec());
    let report = rafs::check::data(&rafs, 0, &mut read).unwrap();
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert_eq!((report.verified, report.unverified), (bootstrap.blobs()[0].chunk_count.into(), 0));
    report.verified
}

/// The order of xattrs is the reference builder's own, so one file may differ.
#[test]
fn a_gzip_layer_is_referred_to_as_the_reference_builder_does() {
    let layer = std::fs::read(golden("src/mini.tar.gz")).unwrap();
    let (ours, meta) = built(ReferenceKind::Layer, &layer, 0x10_0000);
    let bootstrap = open(&ours.layer.bootstrap);
    let theirs = open(&std::fs::read(golden("zran/image.boot")).unwrap());
    let their_meta = std::fs::read(golden("zran/rafs.blob")).unwrap();
    let (a, b) = (&bootstrap.blobs()[0], &theirs.blobs()[0]);
    assert_eq!((&a.id, a.features, a.compressed_size), (&b.id, b.features, b.compressed_size));
    assert_eq!((a.chunk_count, a.codec, a.digester), (b.chunk_count, b.codec, b.digester));
    assert_eq!(a.record.blob_meta_size.get(), meta.len() as u64);
    let (ours_read, theirs_read) = (context(&*bootstrap, &meta), context(&*theirs, &their_meta));
    for index in (0..a.chunk_count).map(ChunkIndex) {
        let (a, b) = (ours_read.entry(index).unwrap(), theirs_read.entry(index).unwrap());
        assert_eq!(
            (a.uncompressed_offset, a.uncompressed_size, a.flags, a.data),
            (b.uncompressed_offset, b.uncompressed_size, b.flags, b.data)
        );
        assert!(a.flags.contains(EntryFlags::ZRAN));
        let digest = |image: &dyn Bootstrap| image.chunk_info(0, index).unwrap().digest;
        assert_eq!(digest(&*bootstrap), digest(&*theirs));
    }
    assert_eq!(bootstrap.summary().flags, theirs.summary().flags);
    assert_eq!(verify(bootstrap, Some(ours_read), &layer), 7);
}

#[test]
fn a_plain_tar_is_referred_to_as_the_reference_builder_does() {
    let tar = std::fs::read(golden("src/mini.tar")).unwrap();
    let (ours, blob) = built(ReferenceKind::Tarfs, &tar, 0x10_0000);
    assert!(blob.is_empty(), "nothing but the bootstrap is made");
    let bootstrap = open(&ours.layer.bootstrap);
    let theirs = std::fs::read(golden("tarfs/image.boot")).unwrap();
    // All but the xattrs of one file, whose order is random there, and the records of chunks,
    // which have no digests there.
    let chunks = bootstrap.summary().chunk_table.0 as usize;
    assert_eq!(open(&theirs).summary().chunk_table.0 as usize, chunks);
    assert_same("tables", &ours.layer.bootstrap[..1176], &theirs[..1176]);
    assert_same("slots", &ours.layer.bootstrap[1192..8192], &theirs[1192..8192]);
    let differing = ours.layer.bootstrap[8192..chunks].iter().zip(&theirs[8192..chunks]);
    assert!(differing.filter(|(a, b)| a != b).count() < 200);
    assert_eq!(verify(bootstrap, None, &tar), 7);
}

#[test]
fn a_plain_tar_takes_no_slices() {
    let tar = std::fs::read(golden("src/mini.tar")).unwrap();
    let (ours, meta) = built(ReferenceKind::Layer, &tar, 0x1000);
    let bootstrap = open(&ours.layer.bootstrap);
    let context = context(&*bootstrap, &meta);
    assert!(verify(bootstrap, Some(context), &tar) > 7);
}

/// Several slices, chunks that pass from one to the next, several gzip members.
#[test]
fn large_layers_are_cut_into_slices() {
    let mut state = 7u32;
    let mut noise = |len: usize| -> Vec<u8> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8 & 0x3f
            })
            .collect()
    };
    let mut archive = tar::Builder::new(Vec::new());
    for n in 0..40usize {
        let data = noise(n * 37_000 % 1_500_000 + 5);
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        archive.append_data(&mut header, format!("file{n}"), &data[..]).unwrap();
    }
    let tar = archive.into_inner().unwrap();
    let gzip = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let middle = tar.len() / 3;
    for layer in [gzip(&tar), [gzip(&tar[..middle]), gzip(&tar[middle..]), vec![0; 1000]].concat()] {
        for chunk_size in [0x1000, 0x10_0000] {
            let (ours, meta) = built(ReferenceKind::Layer, &layer, chunk_size);
            let bootstrap = open(&ours.layer.bootstrap);
            let context = context(&*bootstrap, &meta);
            let units: std::collections::HashSet<_> = (0..context.chunk_count())
                .map(|n| context.unit(&context.entry(ChunkIndex(n)).unwrap()).unwrap().0.compressed)
                .collect();
            assert!(units.len() >= 4, "{}", units.len());
            assert!(units.iter().all(|unit| unit.len() < 8 << 20));
            verify(bootstrap, Some(context), &layer);
        }
    }
    // Damage anywhere is found while the index is made.
    for cut in [100, gzip(&tar).len() / 2] {
        let sink = BlobSink::new("nowhere", std::io::sink());
        let layer = Cursor::new(gzip(&tar)[..cut].to_vec());
        assert!(
            build_reference("cut", layer, ReferenceKind::Layer, &options(Codec::Zstd, 0x1000), sink).is_err()
        );
    }
}

#[test]
fn what_does_not_lie_in_the_layer_as_it_is_is_refused() {
    let refused = |kind, layer: &[u8], chunk_size| {
        let sink = BlobSink::new("nowhere", std::io::sink());
        let built = build_reference(
            "layer",
            Cursor::new(layer.to_vec()),
            kind,
            &options(Codec::Zstd, chunk_size),
            sink,
        );
        built.err().expect("refused").to_string()
    };
    let gzip = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let tar = std::fs::read(golden("src/mini.tar")).unwrap();
    // Compressed twice; a member behind padding; a sparse file, even one without a hole.
    let twice = refused(ReferenceKind::Layer, &gzip(&gzip(&tar)), 0x1000);
    assert!(twice.contains("checksum"), "{twice}");
    let padded = [&gzip(&tar[..1024])[..], &[0; 50], &gzip(&tar[1024..])].concat();
    let padded = refused(ReferenceKind::Layer, &padded, 0x1000);
    assert!(padded.contains("compression is damaged"), "{padded}");
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_size(512);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(b"00000000000\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000001000\0");
    gnu.realsize.copy_from_slice(b"00000001000\0");
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let sparse = [&header.as_bytes()[..], &[7; 512], &[0; 1024]].concat();
    for kind in [ReferenceKind::Layer, ReferenceKind::Tarfs] {
        let sparse = refused(kind, &sparse, 0x1000);
        assert!(sparse.contains("sparse"), "{sparse}");
    }
    assert!(refused(ReferenceKind::Layer, &tar, 0x100_0000).contains("chunk size"));
}

/// The file with the bootstrap says where chunks lie, but has none of them.
#[test]
fn an_absent_layer_is_not_looked_for_in_its_reference() {
    let shop = Workshop::open();
    let layer = golden("src/mini.tar.gz").to_str().unwrap().to_owned();
    let (meta, empty, blobs) = (shop.at("meta"), shop.at("empty"), shop.at("blobs"));
    done(&[
        "create",
        "--log-level",
        "warn",
        "--type",
        "targz-ref",
        "--blob-inline-meta",
        "-b",
        &meta,
        &layer,
    ]);
    let held = std::fs::read(&meta).unwrap();
    let named = shop.at(&storage::digest::DigestAlgorithm::Sha256.digest(&held).to_string());
    std::fs::write(&named, held).unwrap();
    std::fs::create_dir(&empty).unwrap();
    std::fs::create_dir(&blobs).unwrap();
    let id = storage::digest::DigestAlgorithm::Sha256.digest(&std::fs::read(&layer).unwrap()).to_string();
    std::fs::write(shop.path("list"), r#"{"version": "v1", "files": [{"path": "/"}]}"#).unwrap();
    let (list, out) = (shop.at("list"), shop.at("out"));
    let commands = [
        &["check"][..],
        &["unpack", "--output", &out],
        &["optimize", "-p", &list, "-O", &out, "--output-blob-dir", &blobs],
    ];
    for command in commands {
        let said = refused(&[command, &["-D", &empty, "-B", &named]].concat());
        assert!(
            said.contains("No such file") && said.contains(&format!("{empty}/{id}")),
            "{command:?}: {said}"
        );
    }
    std::fs::copy(&layer, shop.path("blobs").join(&id)).unwrap();
    done(&["check", "--log-level", "warn", "-D", &blobs, "-B", &named]);
}
