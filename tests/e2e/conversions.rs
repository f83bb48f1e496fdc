//! What `nydus-image convert` promises: the same bytes every time, the config kept, no half image,
//! and a clear refusal of what is damaged.

use std::fs;
use std::path::Path;

use tests::image::{Entry, Image};
use tests::journey::{Journey, convert, try_nydus_image};
use tests::recipes;
use tests::registry::Registry;
use tests::{Context, Result, ensure, needs_programs};

/// Same input and flags, same bytes: at any thread count, twice, and to a registry too.
#[test]
fn conversion_is_reproducible() -> Result<()> {
    needs_programs!("docker-registry");
    let journey = Journey::start(&recipes::tiny())?;
    let first = journey.convert("first", &["--threads", "1"])?.manifest_digest()?;
    for (name, threads) in [("second", "2"), ("third", "7")] {
        let digest = journey.convert(name, &["--threads", threads])?.manifest_digest()?;
        ensure!(digest == first, "{threads} threads make another image");
    }
    let registry = Registry::open()?;
    convert(&journey.source.reference(), &registry.reference("same"), &[])?;
    let stored = registry.blob_path(&first);
    ensure!(stored.exists(), "the registry holds another manifest than the layout");
    Ok(())
}

/// The image is what section 10 of the format says: media types, annotations, diff ids, the
/// configuration kept, one more item of history.
#[test]
fn a_converted_image_is_well_formed() -> Result<()> {
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let layers = nydus.layers()?;
    let (bootstrap, blobs) = layers.split_last().context("no layers")?;
    ensure!(bootstrap.media_type == "application/vnd.oci.image.layer.v1.tar+gzip", "{bootstrap:?}");
    ensure!(bootstrap.annotations["containerd.io/snapshot/nydus-bootstrap"] == "true", "{bootstrap:?}");
    ensure!(bootstrap.annotations["containerd.io/snapshot/nydus-fs-version"] == "6", "{bootstrap:?}");
    ensure!(!blobs.is_empty(), "no blob layers");
    let config = nydus.config()?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().context("no diff ids")?;
    ensure!(diff_ids.len() == layers.len(), "{} diff ids for {} layers", diff_ids.len(), layers.len());
    for (blob, diff_id) in blobs.iter().zip(diff_ids) {
        ensure!(blob.media_type == "application/vnd.oci.image.layer.nydus.blob.v1", "{blob:?}");
        ensure!(blob.annotations["containerd.io/snapshot/nydus-blob"] == "true", "{blob:?}");
        ensure!(diff_id == &blob.digest, "{blob:?} has the diff id {diff_id}");
        nydus.blob(&blob.digest)?;
    }
    let before = journey.source.config()?;
    for key in ["config", "architecture", "os", "author"] {
        ensure!(config[key] == before[key], "{key} is {} and was {}", config[key], before[key]);
    }
    let history = config["history"].as_array().context("no history")?;
    ensure!(history.last().is_some_and(|item| item["comment"] == "Nydus Bootstrap Layer"), "{history:?}");
    Ok(())
}

/// Blobs and manifests that are not what they claim: exit 1, the object named, no target left.
#[test]
fn damaged_sources_are_refused() -> Result<()> {
    type Damage = fn(&Journey) -> Result<String>;
    let damages: [(&str, Damage); 5] = [
        ("a layer cut short", |journey| {
            let digest = first_layer(journey)?;
            let path = journey.source.blob_path(&digest);
            let bytes = fs::read(&path)?;
            fs::write(&path, &bytes[..bytes.len() / 2])?;
            Ok(digest)
        }),
        ("a flipped bit in a layer", |journey| {
            let digest = first_layer(journey)?;
            let path = journey.source.blob_path(&digest);
            let mut bytes = fs::read(&path)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            fs::write(&path, bytes)?;
            Ok(digest)
        }),
        ("a missing layer", |journey| {
            let digest = first_layer(journey)?;
            fs::remove_file(journey.source.blob_path(&digest))?;
            Ok(digest)
        }),
        ("a manifest with other bytes", |journey| {
            let digest = journey.source.manifest_digest()?;
            let path = journey.source.blob_path(&digest);
            let text = fs::read_to_string(&path)?;
            fs::write(&path, text.replacen("schemaVersion", "SchemaVersion", 1))?;
            Ok(digest)
        }),
        ("an index that is no JSON", |journey| {
            fs::write(journey.source.path().join("index.json"), "{")?;
            Ok("index.json".into())
        }),
    ];
    for (name, damage) in damages {
        let journey = Journey::start(&recipes::tiny())?;
        let object = damage(&journey)?;
        refused(&journey, &object).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// Tar entries that would leave the tree: refused by name, never followed.
#[test]
fn paths_that_escape_are_refused() -> Result<()> {
    for (path, link) in [("../escape", None), ("a/../../escape", None), ("d/link", Some("../../etc/passwd"))]
    {
        let mut entries = vec![Entry::dir("./"), Entry::dir("d")];
        entries.push(match link {
            Some(target) => Entry::hard_link(path, target),
            None => Entry::file(path, "out of the tree\n"),
        });
        let journey = Journey::start(&Image::new(vec![entries]))?;
        let target = format!("oci:{}:latest", journey.path("nydus").display());
        let finished = try_nydus_image("convert", [journey.source.reference().as_str(), &target])?;
        ensure!(finished.code == Some(1), "{path}: {finished:?}");
    }
    Ok(())
}

fn first_layer(journey: &Journey) -> Result<String> {
    Ok(journey.source.layers()?.first().context("no layers")?.digest.clone())
}

fn refused(journey: &Journey, object: &str) -> Result<()> {
    let directory = journey.path("nydus");
    let target = format!("oci:{}:latest", directory.display());
    let finished = try_nydus_image("convert", [journey.source.reference().as_str(), &target])?;
    ensure!(finished.code == Some(1), "{finished:?}");
    let named = object.strip_prefix("sha256:").unwrap_or(object);
    ensure!(finished.stderr.contains(named), "{named} is not named: {}", finished.stderr);
    ensure!(!tagged(&directory), "a refused conversion left a tagged image");
    Ok(())
}

/// Whether the layout lists any image: blobs without a name are no image.
fn tagged(directory: &Path) -> bool {
    fs::read_to_string(directory.join("index.json")).is_ok_and(|text| text.contains("sha256:"))
}
