//! Images whose data are the original layers: nothing but metadata is made, and the daemon fetches
//! slices of the layers that the registry has anyway.

use std::path::Path;

use rafs::blob_file::BlobFile;
use serde_json::json;
use storage::ids::ByteRange;
use tests::command::run;
use tests::daemon::DaemonOptions;
use tests::image::{Compression, Entry, Image};
use tests::journey::{Journey, nydus_image};
use tests::recipes::{noise, prose};
use tests::reference::copy;
use tests::registry::Registry;
use tests::relay::Relay;
use tests::tree::{Overlook, assert_same};
use tests::{Context as _, Result, bail, ensure, needs_mounts, needs_programs};

/// The bootstrap at the end of a blob.
fn bootstrap_in(blob: &[u8]) -> Result<Vec<u8>> {
    let mut read = |range: ByteRange| Ok(blob[range.start() as usize..range.end() as usize].to_vec());
    Ok(BlobFile::read(blob.len() as u64, &mut read)?.bootstrap(&mut read)?.to_vec())
}

/// Two layers that name every directory they put something into: what a bootstrap of a layer says of
/// a directory replaces what layers below say.
fn image() -> Image {
    let base = vec![
        Entry::dir("./").mode(0o755),
        Entry::dir("data").mode(0o750),
        Entry::file("data/noise", noise(1, (5 << 20) + 17)),
        Entry::file("data/prose", prose(2, (9 << 20) + 5)),
        Entry::file("data/removed", prose(3, 100_000)),
        Entry::file("data/empty", ""),
        Entry::hard_link("data/again", "data/prose"),
        Entry::symlink("data/link", "noise"),
        Entry::file("data/noted", "noted\n").xattr("user.note", vec![b'v'; 300]).xattr("user.more", "x"),
    ];
    let small = (0..300).map(|n| Entry::file(format!("small/{n}"), prose(n, n as usize * 31)));
    let top = [Entry::dir("./").mode(0o755), Entry::dir("data").mode(0o751), Entry::dir("small")]
        .into_iter()
        .chain(small)
        .chain([Entry::file("data/.wh.removed", ""), Entry::file("data/noise", noise(9, 3 << 20))]);
    Image::new(vec![base, top.collect()])
}

/// Layers in a real registry, as they were pushed; the image made of them equals their unpack.
#[test]
fn original_layers_are_mounted_lazily() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "skopeo", "docker-registry", "python3");
    for compression in [Compression::Gzip, Compression::Plain] {
        let journey = Journey::start(&image().compressed(compression))?;
        let wanted = journey.reference()?;
        let registry = Registry::open()?;
        let flags = ["--dest-tls-verify=false", "--preserve-digests"];
        copy(&journey.source.reference(), &registry.reference("original"), &flags)?;
        // As converters call it: the context and the bootstrap of a layer in one blob.
        let (mut layers, mut metas) = (Vec::new(), Vec::new());
        for layer in journey.source.layers()? {
            let hex = layer.digest.trim_start_matches("sha256:").to_owned();
            let meta = journey.path(&format!("{hex}.meta"));
            let create = ["--type", "targz-ref", "--features", "blob-toc", "--blob-inline-meta", "--blob"];
            let file = journey.source.blob_path(&layer.digest);
            run(nydus_image("create", create).arg(&meta).arg(&file))?;
            metas.push(registry.push("original", &meta)?);
            let boot = journey.path(&hex);
            std::fs::write(&boot, bootstrap_in(&std::fs::read(&meta)?)?)?;
            layers.push(boot);
        }
        let merged = journey.path("image.boot");
        let mut merge = nydus_image("merge", ["--blob-digests", &metas.join(","), "--bootstrap"]);
        run(merge.arg(&merged).args(&layers))?;

        let relay = Relay::start(registry.address())?;
        let config = journey.path("config.json");
        let backend = json!({
            "scheme": "http", "host": relay.address().to_string(), "repo": "original",
        });
        let text = json!({
            "device": {
                "backend": { "type": "registry", "config": backend },
                "cache": { "type": "blobcache", "config": { "work_dir": journey.path("cache") } },
            },
            "mode": "direct",
        });
        std::fs::write(&config, text.to_string())?;
        let daemon = DaemonOptions::bootstrap(&merged, &config).start()?;
        let mounted = relay.bytes();
        assert_same(&wanted, daemon.root(), Overlook::default())?;
        ensure!(mounted < relay.bytes() / 2, "{mounted} of {} bytes came before a read", relay.bytes());
    }
    Ok(())
}

/// One file says all about a layer, whatever it is called: where data lies is told beside the layer itself.
#[test]
fn metadata_of_a_layer_works_under_any_name() -> Result<()> {
    needs_programs!("python3");
    let journey = Journey::start(&image().compressed(Compression::Gzip))?;
    let [layer, ..] = &journey.source.layers()?[..] else { bail!("no layer") };
    let hex = layer.digest.trim_start_matches("sha256:");
    let file = journey.source.blob_path(&layer.digest);
    let blobs = file.parent().context("no directory")?;
    let (made, plain) = (journey.path("layer"), journey.path("plain.tar"));
    let create = ["--type", "targz-ref", "--features", "blob-toc", "--blob-inline-meta", "--blob"];
    run(nydus_image("create", create).arg(&made).arg(&file))?;
    let boot = journey.path("plain.boot");
    run(nydus_image("create", ["--type", "targz-rafs", "--blob-dir"])
        .arg(journey.path(""))
        .arg("-B")
        .args([&boot, &file]))?;
    run(nydus_image("unpack", ["-D"]).arg(journey.path("")).arg("-B").arg(&boot).arg("-o").arg(&plain))?;

    let digest = storage::digest::DigestAlgorithm::Sha256.digest(&std::fs::read(&made)?);
    for name in ["layer.meta", &format!("{hex}.meta"), &format!("{digest}"), &format!("{digest}.meta")] {
        let meta = journey.path(name);
        std::fs::copy(&made, &meta)?;
        let backend = json!({ "dir": blobs }).to_string();
        let places: [(&[&str], Option<&Path>); 3] = [
            (&["--blob"], Some(&file)),
            (&["--blob-dir"], Some(blobs)),
            (&["--backend-type", "localfs", "--backend-config", &backend], None),
        ];
        for (flags, path) in places {
            let checked = run(nydus_image("check", flags.iter().copied()).args(path).arg(&meta))?;
            ensure!(checked.contains("chunks match their digests, 0 faults"), "{name} {flags:?}: {checked}");
            let tar = journey.path("unpacked.tar");
            run(nydus_image("unpack", flags.iter().copied()).args(path).arg("-o").args([&tar, &meta]))?;
            ensure!(std::fs::read(&tar)? == std::fs::read(&plain)?, "{name} {flags:?}: another archive");
        }
    }
    Ok(())
}

/// Blobs that hold their bootstraps are merged as bootstraps are, and the image names them by their digests.
#[test]
fn blobs_are_merged_under_their_digests() -> Result<()> {
    needs_programs!("python3");
    let journey = Journey::start(&image().compressed(Compression::Gzip))?;
    let [layer, ..] = &journey.source.layers()?[..] else { bail!("no layer") };
    let file = journey.source.blob_path(&layer.digest);
    for kind in ["targz-ref", "targz-rafs"] {
        let (blobs, merged) = (journey.path(&format!("{kind}.blobs")), journey.path(&format!("{kind}.boot")));
        std::fs::create_dir(&blobs)?;
        let made = journey.path(&format!("{kind}.made"));
        let create = ["--type", kind, "--features", "blob-toc", "--blob-inline-meta", "--blob"];
        run(nydus_image("create", create).arg(&made).arg(&file))?;
        run(nydus_image("merge", ["-B"]).args([&merged, &made]))?;
        let digest = storage::digest::DigestAlgorithm::Sha256.digest(&std::fs::read(&made)?);
        std::fs::copy(&made, blobs.join(digest.to_string()))?;
        std::fs::copy(&file, blobs.join(layer.digest.trim_start_matches("sha256:")))?;
        let checked = run(nydus_image("check", ["--blob-dir"]).args([&blobs, &merged]))?;
        ensure!(checked.contains("chunks match their digests, 0 faults"), "{kind}: {checked}");
        if kind == "targz-ref" {
            // What is called by its caller is the layer, not the blob that says where its data is.
            let named = journey.path("named.boot");
            let id = ["--original-blob-ids", layer.digest.trim_start_matches("sha256:")];
            run(nydus_image("merge", ["-B"]).arg(&named).args(id).arg(&made))?;
            ensure!(std::fs::read(&named)? == std::fs::read(&merged)?, "another image with the same name");
        }
    }
    Ok(())
}
