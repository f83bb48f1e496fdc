//! Images whose data are the original layers: nothing but metadata is made, and the daemon fetches
//! slices of the layers that the registry has anyway.

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
use tests::{Result, ensure, needs_mounts, needs_programs};

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
