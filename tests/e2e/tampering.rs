//! Bytes that changed where they are stored reach nobody.

use std::fs;
use std::os::unix::fs::FileExt;

use tests::daemon::DaemonOptions;
use tests::image::{Entry, Image};
use tests::journey::{Journey, convert};
use tests::recipes::noise;
use tests::registry::Registry;
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// One flipped byte in the registry's storage: that read is EIO with a log line that names blob,
/// chunk and file; other files read on; the byte restored, it reads.
#[test]
fn a_flipped_byte_is_never_read() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let (victim, bystander) = (noise(21, 200_000), noise(22, 200_000));
    let image = Image::new(vec![vec![
        Entry::dir("./"),
        Entry::dir("d"),
        Entry::file("d/victim", victim.as_slice()),
        Entry::file("d/bystander", bystander.as_slice()),
    ]]);
    let journey = Journey::start(&image)?;
    let registry = Registry::open()?;
    // Noise does not compress, so that its bytes can be found in the blob.
    let flags = ["--compressor", "none", "--chunk-size", "0x10000"];
    let nydus = journey.convert("nydus", &flags)?;
    convert(&journey.source.reference(), &registry.reference("flip"), &flags)?;
    let blob = nydus.data_blobs()?.pop().context("the image has no data blob")?;
    let stored = registry.blob_path(&blob.digest);
    let bytes = fs::read(&stored)?;
    // In the third chunk of the victim.
    let needle = &victim[140_000..140_032];
    let offset =
        bytes.windows(needle.len()).position(|window| window == needle).context("not in the blob")?;
    let storage = fs::File::options().write(true).open(&stored)?;
    storage.write_all_at(&[needle[0] ^ 0x40], offset as u64)?;

    let daemon = DaemonOptions::image(&registry.reference("flip"), &journey.path("cache"))
        .flag("--read-timeout", "5")
        .start()?;
    let path = daemon.root().join("d/victim");
    let error = fs::read(&path).err().context("the damaged file should not read")?;
    ensure!(error.raw_os_error() == Some(libc::EIO), "{error}");
    let log = daemon.log();
    let hex = blob.digest.strip_prefix("sha256:").unwrap_or(&blob.digest);
    let line = log
        .lines()
        .find(|line| line.contains(hex) && line.contains("chunk") && line.contains("victim"))
        .with_context(|| format!("no log line names blob, chunk and file:\n{log}"))?;
    eprintln!("logged: {line}");
    ensure!(fs::read(daemon.root().join("d/bystander"))? == bystander, "a bystander was hurt");
    let mut first = vec![0; 65_536];
    fs::File::open(&path)?.read_exact_at(&mut first, 0)?;
    ensure!(first == victim[..65_536], "an undamaged chunk of the damaged file reads wrong");

    storage.write_all_at(&needle[..1], offset as u64)?;
    ensure!(fs::read(&path)? == victim, "the restored file reads wrong");
    Ok(())
}

/// A bootstrap that is not the one the operator expects is refused before anything is mounted.
#[test]
fn another_bootstrap_is_refused() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&tests::recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let bootstrap = journey.path("image.boot");
    let bytes = nydus.bootstrap_file("image/image.boot")?;
    fs::write(&bootstrap, &bytes)?;
    let config = journey.path("config.json");
    let blobs = nydus.path().join("blobs/sha256");
    let text = serde_json::json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": blobs } },
        "cache": { "type": "filecache", "filecache": { "work_dir": journey.path("cache") } },
        "rafs": { "mode": "direct" },
    });
    fs::write(&config, text.to_string())?;
    let options = DaemonOptions::bootstrap(&bootstrap, &config);
    let digest = format!("sha256:{}", tests::image::sha256_hex(&bytes));
    options.clone().flag("--expect-bootstrap", &digest).start()?;

    let other = format!("sha256:{}", tests::image::sha256_hex(b"another"));
    let (code, log) = options.clone().flag("--expect-bootstrap", &other).refused()?;
    ensure!(code == Some(1) && log.contains("bootstrap"), "{code:?} {log}");

    let mut damaged = bytes;
    damaged[1024] ^= 1;
    fs::write(&bootstrap, &damaged)?;
    let (code, log) = options.refused()?;
    ensure!(code == Some(1) && log.contains("Error:"), "{code:?} {log}");
    Ok(())
}
