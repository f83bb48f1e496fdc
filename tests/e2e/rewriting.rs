//! Images whose chunks move to other blobs: compacted, built with a dictionary, optimized. The daemon
//! shows the same tree, and fetches first what was put together for that.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tests::command::run;
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image, sha256_hex, tar_bytes};
use tests::journey::{Journey, nydus_image};
use tests::recipes::{noise, prose};
use tests::tree::{Overlook, assert_same};
use tests::{Context, Result, binaries, ensure, needs_mounts, needs_programs};

/// Two layers; the upper one hides most of the lower one.
fn image() -> Image {
    let base = vec![
        Entry::dir("./").mode(0o755),
        Entry::dir("data").mode(0o750),
        Entry::file("data/noise", noise(1, (3 << 20) + 17)),
        Entry::file("data/prose", prose(2, (2 << 20) + 5)),
        Entry::hard_link("data/again", "data/prose"),
        Entry::file("data/noted", "noted\n").xattr("user.note", vec![b'v'; 300]),
    ];
    let small = (0..200).map(|n| Entry::file(format!("small/{n}"), prose(n, n as usize * 31)));
    let top = [Entry::dir("./").mode(0o755), Entry::dir("data").mode(0o751), Entry::dir("small")]
        .into_iter()
        .chain(small)
        .chain([Entry::file("data/noise", noise(9, 1 << 20)), Entry::symlink("data/link", "noise")]);
    Image::new(vec![base, top.collect()])
}

/// The layers of a journey as bootstraps, with all blobs in one directory.
struct Scene {
    journey: Journey,
    layers: Vec<String>,
}

impl Scene {
    fn set() -> Result<Self> {
        let journey = Journey::start(&image())?;
        let mut scene = Self { journey, layers: Vec::new() };
        for (n, layer) in scene.journey.source.layers()?.into_iter().enumerate() {
            let name = format!("layer{n}");
            scene.build(&name, &scene.journey.source.blob_path(&layer.digest), &[])?;
            scene.layers.push(scene.at(&name));
        }
        Ok(scene)
    }

    fn at(&self, name: &str) -> String {
        self.journey.path(name).to_string_lossy().into_owned()
    }

    fn build(&self, name: &str, tar: &Path, flags: &[&str]) -> Result<()> {
        let fixed = ["--log-level", "warn", "--whiteout-spec", "none", "--type", "tar-rafs"];
        let mut create = nydus_image("create", [&fixed[..], &["--chunk-size", "0x10000"], flags].concat());
        create.args(["--bootstrap", &self.at(name), "--blob-dir", &self.at("blobs")]).arg(tar);
        run(&mut create).map(drop)
    }

    fn merge(&self, name: &str, layers: &[String]) -> Result<()> {
        let flags = ["--log-level", "warn", "--bootstrap", &self.at(name)];
        run(nydus_image("merge", flags).args(layers)).map(drop)
    }

    /// A daemon that shows the image `name` from nothing but the blobs, with an empty cache.
    fn mount(&self, name: &str) -> Result<Daemon> {
        let config = self.journey.path(&format!("{name}.json"));
        let document = json!({
            "device": {
                "backend": { "type": "localfs", "config": { "dir": self.at("blobs") } },
                "cache": { "type": "blobcache", "config": { "work_dir": self.at(&format!("{name}.cache")) } },
            },
            "mode": "direct",
        });
        std::fs::write(&config, document.to_string())?;
        DaemonOptions::bootstrap(&self.journey.path(name), &config).start()
    }

    fn blobs(&self, name: &str) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&run(&mut nydus_image("inspect", [&self.at(name), "--request", "blobs"]))?)?)
    }
}

/// One blob instead of two, the same tree; what a start reads, as the daemon tells it, in another one,
/// which the next daemon fetches although nobody reads.
#[test]
fn compacted_and_optimized_images_are_mounted() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::set()?;
    let wanted = scene.journey.reference()?;
    scene.merge("boot", &scene.layers)?;
    let (boot, blobs, list) = (scene.at("boot"), scene.at("blobs"), scene.at("list.json"));
    let flags = ["--log-level", "warn", "--min-used-ratio", "80", "--blob-dir", &blobs];
    run(nydus_image("compact", flags).args(["--bootstrap", &boot]))?;
    let old = scene.blobs("boot")?;
    ensure!((old.len(), scene.blobs("boot.compact")?.len()) == (2, 1), "{old:?}");
    for blob in old {
        let id = blob["blob_id"].as_str().context("no id")?;
        std::fs::rename(scene.journey.path("blobs").join(id), scene.journey.path(id))?;
    }
    let daemon = scene.mount("boot.compact")?;
    let hot = ["small/150", "data/noise"];
    for file in hot {
        std::fs::read(daemon.root().join(file))?;
    }
    let mut nydusctl = Command::new(binaries::nydusctl());
    let trace = run(nydusctl.arg("--sock").arg(daemon.socket()).args(["trace", "--optimize"]))?;
    assert_same(&wanted, daemon.root(), Overlook::default())?;
    drop(daemon);

    std::fs::write(&list, &trace)?;
    let (compact, out) = (scene.at("boot.compact"), scene.at("optimized"));
    let flags = ["--log-level", "warn", "--prefetch-files", &list, "--bootstrap", &compact];
    let places = ["--output-blob-dir", &blobs, "--output-bootstrap", &out, "--blob-dir", &blobs];
    run(nydus_image("optimize", flags).args(places))?;
    let optimized = scene.blobs("optimized")?;
    ensure!(optimized.len() == 2 && optimized[0] == scene.blobs("boot.compact")?[0], "{optimized:?}");
    let daemon = scene.mount("optimized")?;
    let job = daemon.wait_until("the hot blob is fetched", |daemon| {
        let jobs = daemon.get("/api/v1/prefetch")?;
        Ok((jobs[0]["finished"] == true).then(|| jobs[0].clone()))
    })?;
    // 16 chunks of one file, one of the other.
    ensure!(job["what"] == "hints" && job["state"] == "done" && job["chunks"] == 17, "{job}");
    for file in hot {
        std::fs::read(daemon.root().join(file))?;
    }
    let metrics = daemon.get("/api/v1/metrics/blobcache")?;
    ensure!(metrics["misses"] == 0 && metrics["partial_hits"] == 0, "{metrics}");
    assert_same(&wanted, daemon.root(), Overlook::default())
}

/// A new version of an image, built with what two earlier ones share.
#[test]
fn images_built_with_a_dictionary_are_mounted() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::set()?;
    let wanted = scene.journey.reference()?;
    for version in ["app:v1", "app:v2"] {
        std::fs::create_dir(scene.journey.path(version))?;
        scene.merge(&format!("{version}/nydus_bootstrap"), &scene.layers)?;
    }
    let sources = ["app:v1", "app:v2"].map(|version| scene.at(&format!("{version}/nydus_bootstrap")));
    let (dict, json) = (scene.at("dict"), scene.at("out.json"));
    let database = format!("sqlite://{}", scene.at("database.db"));
    let flags = ["generate", "--log-level", "warn", "--bootstrap", &dict, "--database", &database];
    run(nydus_image("chunkdict", flags).args(["--output-json", &json]).args(&sources))?;
    let (dictionary, mut layers) = (format!("bootstrap={dict}"), Vec::new());
    for (n, layer) in scene.journey.source.layers()?.iter().enumerate() {
        let name = format!("new{n}");
        scene.build(&name, &scene.journey.source.blob_path(&layer.digest), &["--chunk-dict", &dictionary])?;
        layers.push(scene.at(&name));
    }
    scene.merge("new", &layers)?;
    let shared = scene.blobs("dict")?;
    // All that the image shows is in its dictionary, so it has no blob of its own.
    let ids = |blobs: &[Value]| blobs.iter().map(|blob| blob["blob_id"].to_string()).collect::<Vec<_>>();
    let (mut new, mut known) = (ids(&scene.blobs("new")?), ids(&shared));
    new.sort();
    known.sort();
    ensure!(new == known && new.len() == 2, "{new:?}, the dictionary has {known:?}");
    assert_same(&wanted, scene.mount("new")?.root(), Overlook::default())
}

/// Data in an original layer, by slices of it or by its own index: what is hot leaves the layer, the rest
/// stays, and compacting changes nothing.
#[test]
fn original_layers_are_optimized_but_not_compacted() -> Result<()> {
    needs_programs!("python3");
    let journey = Journey::start(&Image::new(vec![]))?;
    let at = |name: &str| journey.path(name).to_string_lossy().into_owned();
    let (tar, layer, index, list) = (at("tar"), at("esgz"), at("index"), at("list.json"));
    std::fs::write(&tar, tar_bytes(&image().layers[0])?)?;
    let generator = concat!(env!("CARGO_MANIFEST_DIR"), "/support/estargz.py");
    run(Command::new("python3").arg(generator).args([&tar, &layer, &index, "0x100000"]))?;
    let bytes = std::fs::read(&layer)?;
    let (id, blobs) = (sha256_hex(&bytes), at("blobs"));
    std::fs::create_dir(&blobs)?;
    std::fs::write(Path::new(&blobs).join(&id), &bytes)?;
    std::fs::write(&list, json!({ "version": "v1", "files": [{ "path": "/data/prose" }] }).to_string())?;
    let size = format!("{:x}", bytes.len());
    let by_index = ["--type", "estargztoc-ref", "--chunk-size", "0x100000", "--blob-id", &id];
    let by_index = [&by_index[..], &["--blob-data-size", &size, &index]].concat();
    let by_slices = vec!["--type", "estargz-ref", "--blob-dir", &blobs, &layer];
    for (name, arguments) in [("by-index", by_index), ("by-slices", by_slices)] {
        let (boot, new) = (at(name), at("new"));
        run(nydus_image("create", ["--log-level", "warn", "-B", &boot]).args(&arguments))?;
        let flags = ["--log-level", "warn", "-B", &boot, "-D", &blobs, "-O", &new];
        run(nydus_image("compact", flags).args(["--min-used-ratio", "99"]))?;
        ensure!(!Path::new(&new).exists(), "{name}: compacted");
        run(nydus_image("optimize", flags).args(["-p", &list]))?;
        let mut archives = Vec::new();
        for boot in [&boot, &new] {
            let out = at("out.tar");
            run(&mut nydus_image("unpack", ["-B", boot, "-D", &blobs, "-o", &out]))?;
            archives.push(std::fs::read(out)?);
        }
        ensure!(archives[0] == archives[1], "{name}: another tree");
        let described = run(&mut nydus_image("inspect", [&new, "--request", "blobs"]))?;
        let described: Vec<Value> = serde_json::from_str(&described)?;
        ensure!(described.len() == 2 && described[0]["blob_id"] == id.as_str(), "{name}: {described:?}");
        std::fs::remove_file(&new)?;
    }
    Ok(())
}
