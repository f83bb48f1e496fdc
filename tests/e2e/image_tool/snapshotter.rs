//! nydus-snapshotter's tarfs chain: layers as they are, one disk for the kernel.

use std::fs;

use tests::image::{sha256_hex, tar_bytes};
use tests::{Context, Result, ensure};

use super::client::{Input, Place, joined, lower, upper, word};

#[test]
fn tars_become_one_verified_disk() -> Result<()> {
    let place = Place::empty()?;
    fs::create_dir(place.path("cache"))?;
    let cache = word(&place.path("cache"));
    let mut layers = Vec::new();
    for (number, entries) in [lower(), upper()].iter().enumerate() {
        let tar = tar_bytes(entries)?;
        let id = sha256_hex(&tar);
        // Through a pipe, while the snapshotter stores the tar itself.
        let pipe = format!("layer{number}");
        let feeder = place.feed(&pipe, tar.clone())?;
        let source = word(&place.path(&pipe));
        let meta = word(&place.path(&id));
        let line = format!(
            "create --type tar-tarfs --log-level warn --bootstrap {meta} --blob-id {id} --blob-dir {cache} {source}"
        );
        place.quiet(&line, Input::Silent)?;
        joined(feeder)?;
        ensure!(place.names("cache")?.len() == number, "the tar is written by its caller alone");
        fs::write(place.path("cache").join(&id), tar)?;
        let asked = place.call(&["inspect", "-R blobs", &meta], Input::Silent)?;
        ensure!(asked.code == Some(0) && asked.stderr.is_empty(), "{asked:?}");
        let blobs: serde_json::Value = serde_json::from_str(&asked.stdout)?;
        ensure!(blobs[0]["blob_id"] == id, "{blobs}");
        layers.push(meta);
    }
    let line = format!("merge --log-level warn --bootstrap image.boot {}", layers.join(" "));
    place.quiet(&line, Input::Silent)?;
    let export =
        format!("export --log-level warn --block --localfs-dir {cache} --bootstrap image.boot --output");
    place.quiet(&format!("{export} plain.disk"), Input::Silent)?;
    let said = place.quiet(&format!("{export} verity.disk --verity"), Input::Silent)?.stdout;
    let options = verity_options(&said).with_context(|| said.clone())?;
    let (plain, verity) = (place.read("plain.disk")?, place.read("verity.disk")?);
    ensure!(options.block_size == 512, "{said}");
    ensure!(options.blocks * 512 == plain.len() as u64 && verity.starts_with(&plain), "{said}");
    ensure!(options.offset >= plain.len() as u64 && options.offset < verity.len() as u64, "{said}");
    ensure!(options.root.len() == 64 && options.root.bytes().all(|byte| byte.is_ascii_hexdigit()), "{said}");
    Ok(())
}

struct VerityOptions {
    block_size: u64,
    blocks: u64,
    offset: u64,
    root: String,
}

/// Reads the line as `Sscanf` does: literal words, numbers and one word between them.
fn verity_options(line: &str) -> Option<VerityOptions> {
    let rest = line.strip_prefix(
        "dm-verity options: --no-superblock --format=1 -s \"\" --hash=sha256 --data-block-size=",
    )?;
    let (block_size, rest) = rest.split_once(" --hash-block-size=4096 --data-blocks ")?;
    let (blocks, rest) = rest.split_once(" --hash-offset ")?;
    let (offset, root) = rest.strip_suffix('\n')?.split_once(' ')?;
    Some(VerityOptions {
        block_size: block_size.parse().ok()?,
        blocks: blocks.parse().ok()?,
        offset: offset.parse().ok()?,
        root: root.to_owned(),
    })
}
