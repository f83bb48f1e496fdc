//! The main job: convert, push, mount lazily, compare, run.

use tests::daemon::DaemonOptions;
use tests::journey::{Journey, convert};
use tests::mount::{Mount, chroot};
use tests::registry::Registry;
use tests::relay::Relay;
use tests::tree::{Overlook, assert_same};
use tests::{Result, image, needs_mounts, needs_programs, recipes};

/// The whole mounted tree equals the reference unpack in every byte, attribute, xattr and hard link.
#[test]
fn a_pushed_image_mounts_equal_to_its_unpack() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry");
    for compression in [image::Compression::Gzip, image::Compression::Zstd, image::Compression::Plain] {
        let journey = Journey::start(&recipes::tiny().compressed(compression))?;
        // umoci of Debian 12 knows no zstd; the trees of the other two are the same.
        let plain = Journey::start(&recipes::tiny())?;
        let wanted = plain.reference()?;
        let registry = Registry::open()?;
        let reference = registry.reference("tests/tiny:latest");
        convert(&journey.source.reference(), &reference, &[])?;
        let daemon = DaemonOptions::image(&reference, &journey.path("cache")).start()?;
        assert_same(&wanted, daemon.root(), Overlook::default())?;
    }
    Ok(())
}

/// A program starts from a lazy mount and leaves most of the image where it is.
#[test]
fn a_program_runs_over_a_lazy_mount() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry", "chroot");
    for (image, program) in [
        (recipes::shell()?, ["/bin/sh", "/srv/main.sh"]),
        (recipes::python()?, ["/usr/bin/python3", "/srv/app/main.py"]),
    ] {
        let journey = Journey::start(&image)?;
        let registry = Registry::open()?;
        let relay = Relay::start(registry.address())?;
        convert(&journey.source.reference(), &registry.reference("app"), &[])?;
        let daemon = DaemonOptions::image(&relay.reference("app"), &journey.path("cache")).start()?;
        let overlay = Mount::overlay(daemon.root(), &journey.path("overlay"))?;
        let printed = chroot(overlay.path(), &program)?;
        assert!(printed.starts_with("ready"), "{printed}");
        let total = std::fs::read_dir(journey.source.path().join("blobs/sha256"))?
            .map(|file| Ok(file?.metadata()?.len()))
            .sum::<Result<u64>>()?;
        assert!(relay.bytes() < total, "{} of {total} bytes were fetched", relay.bytes());
        overlay.unmount()?;
    }
    Ok(())
}

/// The same from an OCI layout on disk, no server anywhere.
#[test]
fn a_layout_on_disk_mounts_too() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let journey = Journey::start(&recipes::tiny())?;
    let wanted = journey.reference()?;
    for (name, flags) in [
        ("default", &[][..]),
        ("lz4", &["--compressor", "lz4_block", "--chunk-size", "0x1000"]),
        ("none", &["--compressor", "none", "--digester", "blake3"]),
        ("units", &["--batch-size", "0x40000"]),
    ] {
        let nydus = journey.convert(name, flags)?;
        let daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
        assert_same(&wanted, daemon.root(), Overlook::default())?;
    }
    Ok(())
}
