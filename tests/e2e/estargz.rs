//! eStargz layers, written by a generator that shares nothing with the builder: converted, referred to
//! as they are, and by their index alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tests::command::{finish, run};
use tests::daemon::DaemonOptions;
use tests::image::{Entry, Image, Kind, sha256_hex, tar_bytes};
use tests::journey::{Journey, nydus_image};
use tests::recipes::{noise, prose};
use tests::registry::Registry;
use tests::relay::Relay;
use tests::tree::{Overlook, assert_same};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// Chunks of the layers.
const CHUNK: &str = "0x100000";

/// Whole seconds and names in UTF-8, which is what an index can hold.
fn layers() -> Vec<Vec<Entry>> {
    let mut base = vec![
        Entry::dir("./"),
        Entry::dir("data").mode(0o750).owner(7, 8),
        Entry::file("data/noise", noise(1, (3 << 20) + 17)),
        Entry::file("data/prose", prose(2, 4 << 20)),
        Entry::file("data/same", noise(1, 1 << 20)),
        Entry::file("data/empty", ""),
        Entry::hard_link("data/again", "data/prose"),
        Entry::symlink("data/link", "noise"),
        Entry::file("data/noted", "noted\n")
            .mode(0o4755)
            .xattr("user.note", vec![0xff; 300])
            .xattr("user.more", "x"),
        Entry::new("data/null", Kind::CharDevice(1, 3)).mode(0o666),
        Entry::new("data/pipe", Kind::Fifo),
        Entry::file("data/gone", "gone later\n"),
        Entry::dir("many"),
    ];
    base.extend((0..300).map(|n| Entry::file(format!("many/{n}"), prose(n, n as usize * 31))));
    // Headers only, behind the last chunk.
    base.extend((0..300).map(|n| Entry::symlink(format!("many/link{n}"), "x".repeat(90))));
    let top = vec![
        Entry::dir("./").mode(0o755),
        Entry::dir("data").mode(0o751),
        Entry::file("data/.wh.gone", ""),
        Entry::file("data/noise", noise(9, 2 << 20)),
    ];
    vec![base, top]
}

/// One layer in all its forms.
struct Layer {
    tar: PathBuf,
    estargz: PathBuf,
    index: PathBuf,
    /// SHA-256 of the eStargz file.
    id: String,
    size: u64,
}

impl Layer {
    fn write(journey: &Journey, name: &str, entries: &[Entry]) -> Result<Self> {
        let at = |suffix: &str| journey.path(&format!("{name}.{suffix}"));
        let (tar, estargz, index) = (at("tar"), at("esgz"), at("json"));
        fs::write(&tar, tar_bytes(entries)?)?;
        let generator = concat!(env!("CARGO_MANIFEST_DIR"), "/support/estargz.py");
        run(Command::new("python3").arg(generator).args([&tar, &estargz, &index]).arg(CHUNK))?;
        let bytes = fs::read(&estargz)?;
        let blobs = journey.path("blobs");
        fs::create_dir_all(&blobs)?;
        let id = sha256_hex(&bytes);
        fs::write(blobs.join(&id), &bytes)?;
        Ok(Self { tar, estargz, index, id, size: bytes.len() as u64 })
    }

    /// As nydus-snapshotter's stargz adaptor calls it, with what it leaves out.
    fn describe(&self, source: &Path, bootstrap: &Path, meta: &Path) -> Result<()> {
        let words = ["--source-type", "stargz_index", "--repeatable", "--disable-check", "--fs-version", "6"];
        let mut create = nydus_image("create", words);
        create.args(["--log-level", "warn", "--chunk-size", CHUNK, "--blob-id", &self.id]);
        create.args(["--blob-data-size", &format!("{:#x}", self.size)]);
        create.arg("--bootstrap").arg(bootstrap).arg("--blob-meta").arg(meta);
        run(create.arg(source)).map(drop)
    }
}

fn two_layers(journey: &Journey) -> Result<Vec<Layer>> {
    let layers = layers();
    layers
        .iter()
        .enumerate()
        .map(|(n, entries)| Layer::write(journey, &format!("layer{n}"), entries))
        .collect()
}

/// Converted, it is what the plain tar converts to, byte for byte: nothing of the format stays.
#[test]
fn an_estargz_layer_converts_like_its_tar() -> Result<()> {
    needs_programs!("python3");
    let journey = Journey::start(&Image::new(vec![]))?;
    for layer in two_layers(&journey)? {
        for version in ["5", "6"] {
            let mut made = Vec::new();
            for (kind, source) in [("tar-rafs", &layer.tar), ("estargz-rafs", &layer.estargz)] {
                let [boot, blob] = ["boot", "blob"].map(|name| journey.path(name));
                let words = ["-l", "warn", "--type", kind, "-v", version, "--whiteout-spec", "none", "-B"];
                run(nydus_image("create", words).arg(&boot).arg("-b").arg(&blob).arg(source))?;
                made.push((fs::read(boot)?, fs::read(blob)?));
            }
            ensure!(made[0] == made[1], "version {version}: not the same bytes");
        }
        // As an ordinary tar it has files of its own at the root.
        let boot = journey.path("boot");
        let words = ["-l", "warn", "--type", "tar-rafs", "-b", "/dev/null", "-B"];
        run(nydus_image("create", words).arg(&boot).arg(&layer.estargz))?;
        let listed = run(nydus_image("inspect", ["-R ls"]).arg(&boot))?;
        ensure!(listed.contains("stargz.index.json") && listed.contains(".no.prefetch.landmark"), "{listed}");
    }
    Ok(())
}

/// The index as JSON and the layer itself give one image, which is verified.
#[test]
fn an_index_describes_its_layer() -> Result<()> {
    needs_programs!("python3");
    let journey = Journey::start(&Image::new(vec![]))?;
    let layer = Layer::write(&journey, "layer", &layers()[0])?;
    let (boot, meta) = (journey.path("boot"), journey.path("meta"));
    layer.describe(&layer.index, &boot, &meta)?;
    let (first, first_meta) = (fs::read(&boot)?, fs::read(&meta)?);
    ensure!(first_meta.len().is_multiple_of(4096), "{} bytes", first_meta.len());
    layer.describe(&layer.estargz, &boot, &meta)?;
    // All that differs is where the last chunk ends at the latest.
    let differing =
        |a: &[u8], b: &[u8]| a.len().abs_diff(b.len()) + a.iter().zip(b).filter(|(a, b)| a != b).count();
    let (boots, metas) = (differing(&first, &fs::read(&boot)?), differing(&first_meta, &fs::read(&meta)?));
    ensure!(boots <= 8 && metas <= 8, "{boots} and {metas} bytes differ");

    // Owners are not compared: the adaptor asks for none. Everything else is, chunks included.
    let boot = journey.path("owned");
    let size = format!("{:x}", layer.size);
    let words =
        ["-l", "warn", "--type", "estargztoc-ref", "--chunk-size", CHUNK, "--blob-id", &layer.id, "-B"];
    let mut create = nydus_image("create", words);
    run(create.arg(&boot).args(["--blob-data-size", &size]).arg(&layer.index))?;
    let blobs = journey.path("blobs");
    let check = || {
        let mut check = nydus_image("check", ["-l", "error", "-B"]);
        check.arg(&boot).arg("-D").arg(&blobs).arg("--source").arg(&layer.tar);
        check
    };
    run(&mut check())?;
    let archive = journey.path("unpacked.tar");
    run(nydus_image("unpack", ["-l", "warn", "-B"])
        .arg(&boot)
        .arg("-D")
        .arg(&blobs)
        .arg("-o")
        .arg(&archive))?;
    run(nydus_image("check", ["-l", "error", "-B"]).arg(&boot).arg("--source").arg(&archive))?;

    // A byte of the layer that is another is found.
    let blob = blobs.join(&layer.id);
    let mut bytes = fs::read(&blob)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes)?;
    let found = finish(&mut check())?;
    ensure!(found.code == Some(1) && found.stderr.contains("chunk"), "{found:?}");

    // What is missing is asked for.
    for (words, says) in [
        (vec!["--type", "estargztoc-ref", "-B", "x"], "--blob-id"),
        (
            vec!["--type", "estargztoc-ref", "-B", "x", "--blob-id", "a", "--chunk-size", CHUNK],
            "--blob-data-size",
        ),
        (
            vec!["--type", "estargztoc-ref", "-B", "x", "--blob-id", "a", "--blob-data-size", "1"],
            "--chunk-size",
        ),
        (vec!["--type", "estargz-rafs", "-B", "x", "-D", "y", "--blob-data-size", "1"], "estargztoc-ref"),
    ] {
        let refused = finish(nydus_image("create", words).arg(&layer.index).current_dir(journey.scratch()))?;
        ensure!(refused.code == Some(1) && refused.stderr.contains(says), "{says}: {refused:?}");
        ensure!(!journey.path("x").exists(), "something was written");
    }
    Ok(())
}

/// Layers in a registry as they were pushed, mounted by slices of them and by their index.
#[test]
fn estargz_layers_are_mounted_lazily() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry", "python3");
    let journey = Journey::start(&Image::new(layers()))?;
    let wanted = journey.reference()?;
    let registry = Registry::open()?;
    let layers = two_layers(&journey)?;
    for layer in &layers {
        ensure!(registry.push("original", &layer.estargz)? == layer.id, "another digest");
    }
    for kind in ["estargz-ref", "estargztoc-ref"] {
        let mut merge = nydus_image("merge", ["-l", "warn", "--bootstrap"]);
        let merged = journey.path(&format!("{kind}.boot"));
        merge.arg(&merged);
        for layer in &layers {
            let boot = journey.path(&layer.id);
            let mut create =
                nydus_image("create", ["-l", "warn", "--type", kind, "--chunk-size", CHUNK, "-B"]);
            create.arg(&boot);
            if kind == "estargz-ref" {
                let meta = journey.path("meta");
                run(create.arg("--blob").arg(&meta).arg(&layer.estargz))?;
                let digest = registry.push("original", &meta)?;
                fs::copy(&meta, journey.path("blobs").join(digest))?;
            } else {
                run(create.args(["--blob-id", &layer.id]).arg(&layer.estargz))?;
            }
            merge.arg(boot);
        }
        run(&mut merge)?;
        run(nydus_image("check", ["-l", "error", "-D"]).arg(journey.path("blobs")).arg(&merged))?;
        let relay = Relay::start(registry.address())?;
        let config = journey.path("config.json");
        let backend = json!({ "scheme": "http", "host": relay.address().to_string(), "repo": "original" });
        let cache = json!({ "work_dir": journey.path(&format!("{kind}.cache")) });
        let text = json!({
            "device": {
                "backend": { "type": "registry", "config": backend },
                "cache": { "type": "blobcache", "config": cache },
            },
            "mode": "direct",
        });
        fs::write(&config, text.to_string())?;
        let daemon = DaemonOptions::bootstrap(&merged, &config).start()?;
        let mounted = relay.bytes();
        assert_same(&wanted, daemon.root(), Overlook::default()).context(kind)?;
        ensure!(mounted < relay.bytes() / 2, "{mounted} of {} bytes came before a read", relay.bytes());
    }
    Ok(())
}
