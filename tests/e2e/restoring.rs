//! `nydus-image convert` back to a plain image.

use tests::image::sha256_hex;
use tests::journey::{Journey, convert, nydus_image, try_nydus_image};
use tests::layout::Layout;
use tests::registry::Registry;
use tests::{Context, Result, command, ensure, needs_programs, recipes};

/// OCI to Nydus to OCI to Nydus: the same root digest, one layer that holds what the three held,
/// a configuration that describes it.
#[test]
fn a_plain_image_comes_back_with_the_same_contents() -> Result<()> {
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    for (name, flags, kind) in
        [("gzip", &[][..], "tar+gzip"), ("zstd", &["--layer-compressor", "zstd"], "tar+zstd")]
    {
        let plain = Layout::new(journey.path(name));
        let target = format!("oci:{}:latest", plain.path().display());
        convert(&nydus.reference(), &target, flags)?;
        let layers = plain.layers()?;
        let [layer] = &layers[..] else { tests::bail!("{} layers", layers.len()) };
        ensure!(layer.media_type.ends_with(kind), "{layer:?}");
        ensure!(format!("sha256:{}", sha256_hex(&plain.blob(&layer.digest)?)) == layer.digest, "{layer:?}");

        let (before, config) = (journey.source.config()?, plain.config()?);
        for key in ["config", "architecture", "os", "author"] {
            ensure!(config[key] == before[key], "{key} is {} and was {}", config[key], before[key]);
        }
        let history = config["history"].as_array().context("no history")?;
        let steps = history.iter().filter(|item| item["empty_layer"] != true).count();
        ensure!(steps == 1, "{steps} steps with layers in {history:?}");
        ensure!(!plain.manifest()?.to_string().contains("nydus"), "{}", plain.manifest()?);

        let bootstrap = journey.path("boot");
        nydus.save_bootstrap(&bootstrap)?;
        command::run(nydus_image("check", ["--source", &target]).arg(&bootstrap))?;
        let again = Layout::new(journey.path(&format!("{name}-again")));
        convert(&target, &format!("oci:{}:latest", again.path().display()), &[])?;
        ensure!(again.root_digest()? == nydus.root_digest()?, "{name}: another root digest");

        let twice = Layout::new(journey.path(&format!("{name}-twice")));
        convert(&nydus.reference(), &format!("oci:{}:latest", twice.path().display()), flags)?;
        ensure!(twice.manifest_digest()? == plain.manifest_digest()?, "{name}: twice, two images");
    }
    Ok(())
}

/// From a registry and to one.
#[test]
fn a_registry_restores_to_a_registry() -> Result<()> {
    needs_programs!("docker-registry");
    let journey = Journey::start(&recipes::tiny())?;
    let registry = Registry::open()?;
    convert(&journey.source.reference(), &registry.reference("nydus"), &[])?;
    convert(&registry.reference("nydus"), &registry.reference("plain"), &[])?;
    let local = Layout::new(journey.path("local"));
    convert(&registry.reference("plain"), &format!("oci:{}:latest", local.path().display()), &[])?;
    let nydus = journey.convert("direct", &[])?;
    ensure!(local.root_digest()? == nydus.root_digest()?, "another tree");
    Ok(())
}

/// A damaged blob: exit 1, the blob named, nothing published.
#[test]
fn damage_is_found_before_anything_is_published() -> Result<()> {
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let blobs = nydus.data_blobs()?;
    let digest = &blobs.first().context("no blob")?.digest;
    let path = nydus.blob_path(digest);
    let mut bytes = std::fs::read(&path)?;
    bytes[1000] ^= 1;
    std::fs::write(&path, bytes)?;
    let target = journey.path("plain");
    let finished = try_nydus_image(
        "convert",
        [nydus.reference().as_str(), &format!("oci:{}:latest", target.display())],
    )?;
    ensure!(finished.code == Some(1), "{finished:?}");
    let named = digest.strip_prefix("sha256:").unwrap_or(digest);
    ensure!(finished.stderr.contains(named), "{finished:?}");
    let index = std::fs::read_to_string(target.join("index.json")).unwrap_or_default();
    ensure!(!index.contains("sha256:"), "something was published");
    Ok(())
}
