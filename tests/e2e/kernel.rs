//! The Linux kernel and `fsck.erofs` judge our bootstraps, and the kernel our cache files too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::command::run;
use tests::daemon::DaemonOptions;
use tests::journey::Journey;
use tests::layout::Layout;
use tests::mount::{Mount, device_copy};
use tests::tree::{Overlook, assert_same, scan};
use tests::{Context, Result, needs_mounts, needs_programs, recipes};

/// Mounts the bootstrap with the kernel's EROFS, the daemon's decoded blobs as devices, and finds
/// the same tree again.
#[test]
fn the_kernel_mounts_our_bootstrap() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "fsck.erofs", "losetup");
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    kernel_judges(&nydus, journey.scratch(), &journey.reference()?)
}

/// What [`the_kernel_mounts_our_bootstrap`] does, for any image: also for the large ones.
pub fn kernel_judges(nydus: &Layout, scratch: &Path, wanted: &Path) -> Result<()> {
    let bootstrap = scratch.join("image.boot");
    nydus.save_bootstrap(&bootstrap)?;
    let cache = scratch.join("kernel-cache");
    {
        // Reading everything decodes every blob into the cache.
        let daemon = DaemonOptions::image(&nydus.reference(), &cache).start()?;
        scan(daemon.root())?;
    }
    let devices = devices(&bootstrap, &cache, scratch)?;
    run(Command::new("fsck.erofs")
        .args(devices.iter().map(|path| format!("--device={}", path.display())))
        .arg(&bootstrap))?;
    let mount = Mount::erofs(&bootstrap, &devices, &scratch.join("erofs"))?;
    assert_same(wanted, mount.path(), Overlook::default())?;
    mount.unmount()
}

/// The decoded blobs in the order of the bootstrap's table, padded to whole blocks.
fn devices(bootstrap: &Path, cache: &Path, scratch: &Path) -> Result<Vec<PathBuf>> {
    let ids = blob_ids(bootstrap)?;
    let mut devices = Vec::new();
    for (number, id) in ids.iter().enumerate() {
        let device = scratch.join(format!("device-{number}"));
        let decoded =
            find(cache, &format!("{id}.blob.data"))?.with_context(|| format!("no decoded blob {id}"))?;
        device_copy(&decoded, &device)?;
        devices.push(device);
    }
    Ok(devices)
}

/// The ids in the bootstrap's device table (EROFS: slots of 128 bytes from 1408 on, the tag of 64
/// bytes first; the count is at 86 of the superblock).
fn blob_ids(bootstrap: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(bootstrap)?;
    let count = usize::from(u16::from_le_bytes([bytes[1024 + 86], bytes[1024 + 87]]));
    (0..count)
        .map(|slot| {
            let tag = bytes
                .get(1408 + slot * 128..)
                .and_then(|rest| rest.get(..64))
                .context("a short bootstrap")?;
            Ok(String::from_utf8_lossy(tag).trim_end_matches('\0').to_owned())
        })
        .collect()
}

fn find(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if path.file_name().is_some_and(|file| file == name) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
