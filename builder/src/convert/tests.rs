//! Conversions of small images, judged by the reader, by `compare`, and by skopeo.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::*;
use crate::ErrorKind;
use crate::compare::{CompareOptions, Differences, Side, compare};
use crate::load::LoadedChunks;
use crate::merge::{MergeSource, OwnBlob, merge};
use crate::oci::media;
use crate::oci::objects::Objects;
use crate::oci::registry::RegistryOptions;
use crate::oci::testing::{Item, Layout, TAR, sha256, tar_of};
use crate::oci::transport::Transport;
use crate::prefetch::Patterns;
use crate::progress::Silent;

fn options(cancel: &CancellationToken, threads: usize, jobs: usize) -> ConvertOptions<'_> {
    let data = DataOptions { chunk_size: 4096, threads, ..default_data_options() };
    ConvertOptions { data, jobs, hints: true, observer: &Silent, cancel }
}

fn convert_to(source: &ImageSource, to: &Path, threads: usize, jobs: usize) -> Result<Converted> {
    let target: Transport = format!("oci:{}:nydus", to.display()).parse().unwrap();
    convert(
        source,
        Target::open(&target, &RegistryOptions::default())?,
        &options(&CancellationToken::new(), threads, jobs),
    )
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n / 7) as u8 ^ (n % 251) as u8 ^ seed).collect()
}

/// Three layers with what layers can do to each other.
fn layers() -> Vec<Vec<u8>> {
    let (big, other) = (pattern(40_000, 1), pattern(9000, 2));
    vec![
        tar_of(&[
            ("etc/", 0o755, Item::Dir),
            ("etc/gone", 0o644, Item::File(b"gone")),
            ("etc/big", 0o600, Item::File(&big)),
            ("etc/link", 0, Item::HardLink("etc/big")),
            ("opaque/", 0o755, Item::Dir),
            ("opaque/below", 0o644, Item::File(b"below")),
            ("dir/", 0o700, Item::Dir),
            ("dir/inside", 0o644, Item::File(b"inside")),
            ("null", 0o666, Item::Device(1, 3)),
            ("fifo", 0o622, Item::Fifo),
            ("empty", 0o644, Item::File(b"")),
        ]),
        tar_of(&[
            ("etc/", 0o711, Item::Dir),
            ("etc/.wh.gone", 0o644, Item::File(b"")),
            ("etc/same-as-big", 0o644, Item::File(&big)),
            ("opaque/", 0o751, Item::Dir),
            ("opaque/.wh..wh..opq", 0o644, Item::File(b"")),
            ("opaque/above", 0o644, Item::File(&other)),
            (".wh.nothing", 0o644, Item::File(b"")),
        ]),
        tar_of(&[
            ("dir", 0o777, Item::Symlink("etc/big")),
            ("etc/copy", 0o644, Item::File(&big)),
            ("etc/copy-link", 0, Item::HardLink("etc/copy")),
        ]),
    ]
}

fn layout_of(layers: &[Vec<u8>]) -> Layout {
    let mut layout = Layout::new();
    let image = layout.image(&layers.iter().map(|l| (TAR, &l[..])).collect::<Vec<_>>());
    layout.add(image, "src");
    layout
}

struct Read {
    manifest: Value,
    config: Value,
    bootstrap: Box<dyn rafs::bootstrap::Bootstrap>,
}

/// Reads a converted image as a stranger would: through the layout and the bootstrap layer.
fn read_back(root: &Path) -> Read {
    use std::io::Read as _;
    let objects = Objects::directory(root);
    let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
    let blob = |descriptor: &Value| {
        let hex = &descriptor["digest"].as_str().unwrap()[7..];
        let bytes = objects.read_blob(&Digest::from_hex(hex).unwrap(), 1 << 30).unwrap();
        assert_eq!(bytes.len() as u64, descriptor["size"].as_u64().unwrap());
        bytes
    };
    let index = json(&objects.read("index.json", 1 << 20).unwrap());
    let manifest = json(&blob(&index["manifests"][0]));
    let config = json(&blob(&manifest["config"]));
    let layers = manifest["layers"].as_array().unwrap();
    for (layer, diff_id) in layers.iter().zip(config["rootfs"]["diff_ids"].as_array().unwrap()) {
        if layer["mediaType"] == media::NYDUS_BLOB {
            assert_eq!(layer["digest"], *diff_id);
            blob(layer);
        }
    }
    let packed = blob(layers.last().unwrap());
    let mut tar = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut tar).unwrap();
    assert_eq!(*config["rootfs"]["diff_ids"].as_array().unwrap().last().unwrap(), sha256(&tar));
    let mut bootstrap = Vec::new();
    for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        if *entry.path_bytes() == *b"image/image.boot" {
            entry.read_to_end(&mut bootstrap).unwrap();
        }
    }
    let bootstrap = rafs::bootstrap::from_bytes(bootstrap, &rafs::bootstrap::OpenOptions::default()).unwrap();
    Read { manifest, config, bootstrap }
}

/// The bootstrap against the layers it was made from, read once more.
fn differences(bootstrap: &dyn rafs::bootstrap::Bootstrap, source: &ImageSource) -> Differences {
    let cancel = CancellationToken::new();
    let (tree, content) =
        crate::oci::read::read_tree(source, bootstrap.summary(), 1, &Silent, &cancel).unwrap();
    let records: Vec<_> = bootstrap.blobs().iter().map(|b| b.record).collect();
    let mut chunks = LoadedChunks::default();
    let image = chunks.load(bootstrap, &records).unwrap();
    compare(
        Side { tree: &tree, chunks: &content },
        Side { tree: &image, chunks: &chunks },
        CompareOptions { chunk_size: bootstrap.summary().chunk_size, limit: 10, ignore_root_mtime: false },
    )
}

#[test]
fn small_files_of_every_layer_share_units() {
    let layout = layout_of(&layers());
    let source = layout.open("", None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let convert_with = |name: &str, batch_size, threads| {
        let path = dir.path().join(name);
        let target: Transport = format!("oci:{}:nydus", path.display()).parse().unwrap();
        let cancel = CancellationToken::new();
        let mut options = options(&cancel, threads, 3);
        options.data.batch_size = batch_size;
        let done =
            convert(&source, Target::open(&target, &RegistryOptions::default()).unwrap(), &options).unwrap();
        (path, done)
    };
    let (path, one) = convert_with("one", 4096, 1);
    assert_eq!(convert_with("more", 4096, 4).1.manifest, one.manifest);
    let (_, alone) = convert_with("alone", 0, 2);
    assert_eq!(alone.root, one.root);
    let read = read_back(&path);
    assert_eq!(differences(&*read.bootstrap, &source).count, 0);
    let batches = |blob: &rafs::bootstrap::Blob| blob.record.features.get() & BlobFeatures::BATCH.bits() != 0;
    assert!(read.bootstrap.blobs().iter().any(batches));
}

#[test]
fn layers_merge_and_share_chunks() {
    let layout = layout_of(&layers());
    let source = layout.open("", None).unwrap();
    let out = tempfile::tempdir().unwrap();
    let done = convert_to(&source, out.path(), 2, 2).unwrap();
    let read = read_back(out.path());
    let found = differences(&*read.bootstrap, &source);
    assert_eq!(found.first, []);
    assert_eq!(found.entries, done.entry_count);

    // The third layer's only file is stored in the first already.
    let chunks: Vec<u64> = done.layers.iter().map(|l| l.chunk_count).collect();
    assert!(chunks[0] >= 10 && chunks[1] == 3 && chunks[2] == 0, "{chunks:?}");
    assert_eq!(done.layers.iter().map(|l| l.used).collect::<Vec<_>>(), [true, true, false]);
    let names: Vec<&str> = read.bootstrap.blobs().iter().map(|b| b.id.as_str()).collect();
    assert_eq!(names, done.blobs);
    for (blob, layer) in read.bootstrap.blobs().iter().zip(&done.layers) {
        assert_eq!(blob.compressed_size, layer.size);
    }

    let layers = read.manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 4);
    assert_eq!(layers[0]["annotations"][media::ANNOTATION_BLOB], "true");
    let last = &layers[3]["annotations"];
    assert_eq!(
        (&last[media::ANNOTATION_BOOTSTRAP], &last[media::ANNOTATION_FS_VERSION]),
        (&"true".into(), &"6".into())
    );
    assert_eq!(read.manifest["annotations"][media::ANNOTATION_ROOT_DIGEST], done.root.to_string());
    assert_eq!(read.config["x-kept"], 1);
    assert_eq!(read.config["config"]["Cmd"][0], "/hello");
}

#[test]
fn the_result_does_not_depend_on_threads() {
    let layout = layout_of(&layers());
    let source = layout.open("", None).unwrap();
    let results: Vec<String> = [(1, 1), (1, 3), (2, 1), (2, 3)]
        .into_iter()
        .map(|(threads, jobs)| {
            let out = tempfile::tempdir().unwrap();
            convert_to(&source, out.path(), threads, jobs).unwrap().manifest.to_string()
        })
        .collect();
    assert!(results.iter().all(|r| *r == results[0]), "{results:?}");
}

/// A layer may link to what only a layer below has: the names form one group, unless nothing is
/// left of the old ones.
#[test]
fn hard_links_reach_into_lower_layers() {
    let big = pattern(20_000, 3);
    let upper = tar_of(&[
        // Marked as removed in this very layer: the link keeps the file, under its new name.
        (".wh.moved", 0o644, Item::File(b"")),
        ("new", 0, Item::HardLink("moved")),
        ("dir/again", 0, Item::HardLink("new")),
        ("third", 0, Item::HardLink("kept")),
        ("sym2", 0, Item::HardLink("sym")),
        ("replaced", 0, Item::HardLink("no/such")),
        ("replaced", 0o600, Item::File(b"later")),
    ]);
    let layout = layout_of(&[
        tar_of(&[
            ("moved", 0o640, Item::File(&big)),
            ("kept", 0o644, Item::File(b"kept")),
            ("kept2", 0, Item::HardLink("kept")),
            ("sym", 0o777, Item::Symlink("kept")),
        ]),
        upper,
    ]);
    let source = layout.open("", None).unwrap();
    let out = tempfile::tempdir().unwrap();
    convert_to(&source, out.path(), 2, 2).unwrap();
    let read = read_back(out.path());
    assert_eq!(differences(&*read.bootstrap, &source).count, 0);
    let attr = |path: &str| {
        let find = |dir, name: &str| read.bootstrap.lookup(dir, name.as_bytes()).unwrap().unwrap().nid;
        read.bootstrap.attr(path.split('/').fold(read.bootstrap.root(), find)).unwrap()
    };
    assert!(read.bootstrap.lookup(read.bootstrap.root(), b"moved").unwrap().is_none());
    assert_eq!((attr("new").nid, attr("new").nlink), (attr("dir/again").nid, 2));
    assert_eq!((attr("new").mode, attr("new").size), (0o100640, 20_000));
    assert_eq!((attr("third").nid, attr("third").nlink), (attr("kept").nid, 3));
    assert_eq!(attr("kept2").nid, attr("kept").nid);
    assert_eq!((attr("sym").nlink, attr("sym2").nlink), (1, 1));
    assert_eq!(attr("replaced").size, 5);

    for (target, why) in [("no/such", "nor is in a layer below"), ("d", "is a directory")] {
        let layout =
            layout_of(&[tar_of(&[("d/", 0o755, Item::Dir)]), tar_of(&[("l", 0, Item::HardLink(target))])]);
        let out = tempfile::tempdir().unwrap();
        let err = convert_to(&layout.open("", None).unwrap(), out.path(), 1, 1).unwrap_err();
        assert!(err.kind() == ErrorKind::Corrupt && err.to_string().contains(why), "{err}");
        assert!(err.to_string().contains("layer 2 of 2: \"l\""), "{err}");
    }
}

#[test]
fn every_change_of_the_source_is_a_difference() {
    let plain = |mode, data: &'static [u8], target: Item<'static>| {
        layout_of(&[tar_of(&[
            ("a", mode, Item::File(data)),
            ("b", 0o644, target),
            ("c", 0o644, Item::File(b"abc")),
        ])])
    };
    let layout = plain(0o644, b"abc", Item::HardLink("a"));
    let out = tempfile::tempdir().unwrap();
    convert_to(&layout.open("", None).unwrap(), out.path(), 1, 1).unwrap();
    let read = read_back(out.path());
    for (changed, want) in [
        (plain(0o600, b"abc", Item::HardLink("a")), "\"a\": mode 100600 in the source, 100644 in the image"),
        (plain(0o644, b"abd", Item::HardLink("a")), "\"a\": bytes 0 to 3 differ"),
        (plain(0o644, b"ab", Item::HardLink("a")), "\"a\": size 2 in the source, 3 in the image"),
        (plain(0o644, b"abc", Item::File(b"abc")), "\"b\": has other hard links"),
        (plain(0o644, b"abc", Item::Symlink("a")), "\"b\": mode 120644 in the source, 100644 in the image"),
        (layout_of(&[tar_of(&[("x", 0o644, Item::File(b""))])]), "\"a\": is in the image, not in the source"),
    ] {
        let found = differences(&*read.bootstrap, &changed.open("", None).unwrap());
        let text: Vec<String> = found.first.iter().map(ToString::to_string).collect();
        assert!(text.iter().any(|t| t.contains(want)), "{want}: {text:?}");
    }
}

#[test]
fn a_layer_that_is_not_what_it_should_be_leaves_nothing() {
    let tars = layers();
    let mut layout = Layout::new();
    let stored: Vec<Value> = tars.iter().map(|t| layout.blob(TAR, t)).collect();
    let mut diff_ids: Vec<String> = tars.iter().map(|t| sha256(t)).collect();
    diff_ids[1] = sha256(b"other");
    let image = layout.image_of(&stored, &diff_ids);
    layout.add(image, "wrong-diff-id");
    diff_ids[1] = sha256(&tars[1]);
    let damaged = {
        let mut descriptor = stored[1].clone();
        descriptor["digest"] = sha256(b"other").into();
        let name = sha256(b"other");
        fs::write(layout.path().join("blobs/sha256").join(&name[7..]), &tars[1]).unwrap();
        layout.image_of(&[stored[0].clone(), descriptor, stored[2].clone()], &diff_ids)
    };
    layout.add(damaged, "wrong-digest");
    for tag in ["wrong-diff-id", "wrong-digest"] {
        let source = layout.open(&format!(":{tag}"), None).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("out");
        let err = convert_to(&source, &out, 2, 3).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Mismatch, "{err}");
        assert!(err.to_string().contains("layer 2 of 3"), "{err}");
        assert!(!out.exists(), "{tag}: the target was left");
    }
}

/// What the converters of others do: take the bootstraps out of the blobs and merge them.
#[test]
fn the_bootstraps_in_the_blobs_merge_to_the_image() {
    use rafs::bootstrap::{OpenOptions, from_bytes};

    // Every directory is listed: a bootstrap cannot say that its layer only implied one.
    let mut layers = layers();
    layers[2] = tar_of(&[("etc/", 0o750, Item::Dir), ("etc/copy", 0o644, Item::File(&pattern(40_000, 1)))]);
    let layout = layout_of(&layers);
    let out = tempfile::tempdir().unwrap();
    let done = convert_to(&layout.open("", None).unwrap(), out.path(), 1, 2).unwrap();
    let objects = Objects::directory(out.path());
    let mut sources = Vec::new();
    for layer in &done.layers {
        let bytes = objects.read_blob(&layer.blob, 1 << 20).unwrap();
        let mut read =
            |range: storage::ids::ByteRange| Ok(bytes[range.start() as usize..range.end() as usize].to_vec());
        let file = rafs::blob_file::BlobFile::read(bytes.len() as u64, &mut read).unwrap();
        let names: Vec<&str> = file.sections().iter().map(|s| s.name).collect();
        let all = ["image.blob", "blob.meta", "blob.meta.header", "blob.digest", "image.boot"];
        assert_eq!(names, if layer.chunk_count > 0 { &all[..] } else { &all[4..] });
        let name = layer.blob.to_string();
        let opened = OpenOptions { inlined_blob_id: Some(storage::ids::BlobId::new(&name).unwrap()) };
        let bootstrap = from_bytes(file.bootstrap(&mut read).unwrap(), &opened).unwrap();
        let own = OwnBlob { size: Some(layer.size), ..OwnBlob::default() };
        sources.push(MergeSource { name, bootstrap: bootstrap.into(), own });
    }
    let merged = merge(&sources, None, &Patterns::default()).unwrap();
    assert_eq!((merged.root, merged.blobs), (Some(done.root), done.blobs));
}

#[test]
fn images_without_data_are_images() {
    let empty = tar_of(&[]);
    for layers in
        [vec![], vec![empty.clone()], vec![empty.clone(), tar_of(&[("d/", 0o755, Item::Dir)]), empty]]
    {
        let layout = layout_of(&layers);
        let source = layout.open("", None).unwrap();
        let out = tempfile::tempdir().unwrap();
        let done = convert_to(&source, out.path(), 1, 2).unwrap();
        assert_eq!((done.layers.len(), done.blobs.len()), (layers.len(), 0));
        let read = read_back(out.path());
        assert_eq!(read.manifest["layers"].as_array().unwrap().len(), layers.len() + 1);
        assert_eq!(differences(&*read.bootstrap, &source).first, []);
    }
}

#[test]
fn a_layer_that_upper_ones_hide_is_listed_but_not_named() {
    let layout = layout_of(&[
        tar_of(&[("a", 0o644, Item::File(b"hidden"))]),
        tar_of(&[(".wh.a", 0o644, Item::File(b"")), ("b", 0o644, Item::File(b"seen"))]),
    ]);
    let out = tempfile::tempdir().unwrap();
    let done = convert_to(&layout.open("", None).unwrap(), out.path(), 1, 2).unwrap();
    assert_eq!(done.layers.iter().map(|l| l.used).collect::<Vec<_>>(), [false, true]);
    assert_eq!(done.blobs, [done.layers[1].blob.to_string()]);
    assert_eq!(read_back(out.path()).manifest["layers"].as_array().unwrap().len(), 3);
}

#[test]
fn interrupted_work_leaves_nothing() {
    let layout = layout_of(&layers());
    let source = layout.open("", None).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let cancel = CancellationToken::new();
    cancel.cancel();
    let target: Transport = format!("oci-archive:{}/x.tar", parent.path().display()).parse().unwrap();
    let err = convert(
        &source,
        Target::open(&target, &RegistryOptions::default()).unwrap(),
        &options(&cancel, 1, 1),
    )
    .unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Cancelled, "{err}");
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
}

#[test]
fn a_converted_image_is_not_converted_again_and_skopeo_copies_it() {
    let layout = layout_of(&layers());
    let out = tempfile::tempdir().unwrap();
    convert_to(&layout.open("", None).unwrap(), out.path(), 1, 1).unwrap();
    let text = format!("oci:{}:nydus", out.path().display());
    let err = ImageSource::open(&text.parse().unwrap(), None, &RegistryOptions::default()).err().unwrap();
    assert!(err.kind() == ErrorKind::Unsupported && err.to_string().contains("already"), "{err}");
    if Command::new("skopeo").arg("--version").output().is_err() {
        println!("skipped: skopeo is not installed");
        return;
    }
    let copy = format!("oci:{}/copy:x", out.path().display());
    for arguments in [vec!["inspect", &text], vec!["copy", "--quiet", &text, &copy]] {
        let done = Command::new("skopeo").arg("--insecure-policy").args(&arguments).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}

#[test]
fn registries_are_sources_and_targets() {
    use crate::oci::testing_registry::Registry;
    let Some(registry) = Registry::start() else { return };
    let layout = layout_of(&layers());
    let local = layout.open("", None).unwrap();
    let out = tempfile::tempdir().unwrap();
    let expected = convert_to(&local, out.path(), 1, 1).unwrap();

    let source = format!("docker://{}/src/app:v1", registry.address());
    let from = format!("oci:{}:src", layout.path().display());
    let pushed = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", &from, &source])
        .output();
    let Ok(pushed) = pushed else {
        println!("skipped: skopeo is not installed");
        return;
    };
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));

    let open = RegistryOptions::default();
    let remote = ImageSource::open(&source.parse().unwrap(), None, &open).unwrap();
    let target = format!("docker://{}/team/nydus:v1", registry.address());
    let cancel = CancellationToken::new();
    let push = Target::open(&target.parse().unwrap(), &open).unwrap();
    let done = convert(&remote, push, &options(&cancel, 2, 3)).unwrap();
    assert_eq!((done.root, done.blobs), (expected.root, expected.blobs));
    let seen = Command::new("skopeo").args(["inspect", "--tls-verify=false", &target]).output().unwrap();
    let seen: Value = serde_json::from_slice(&seen.stdout).unwrap();
    assert_eq!(seen["Digest"], format!("sha256:{}", done.manifest));
    assert_eq!(seen["Layers"].as_array().unwrap().len(), 4);
}
