//! Large real images, where they were made: `make soak`, or `NYDUS_TEST_CORPUS` names a directory
//! with the output of `misc/images/make-images`.

use std::path::PathBuf;

use tests::daemon::DaemonOptions;
use tests::journey::convert;
use tests::layout::Layout;
use tests::mount::{Mount, chroot};
use tests::reference::unpack;
use tests::registry::Registry;
use tests::tree::{Overlook, assert_same};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// Converted, pushed, mounted from the registry, equal to the reference unpack, started, and equal
/// again under the kernel's own EROFS.
#[test]
fn corpus_images_go_the_whole_way() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry", "fsck.erofs");
    let Some(corpus) = std::env::var_os("NYDUS_TEST_CORPUS").map(PathBuf::from) else {
        eprintln!("skipped: NYDUS_TEST_CORPUS is not set (`make soak` makes the images and sets it)");
        return Ok(());
    };
    let programs: [(&str, &[&str]); 3] = [
        ("debian", &["/bin/sh", "-c", "echo ready"]),
        ("python", &["/usr/bin/env", "PYTHONDONTWRITEBYTECODE=1", "python3", "/srv/app/main.py"]),
        (
            "node",
            &[
                "/usr/bin/env",
                "-C",
                "/srv/app",
                "NODE_PATH=/usr/share/nodejs:/usr/lib/nodejs",
                "node",
                "main.js",
            ],
        ),
    ];
    let mut seen = 0;
    for (name, program) in programs {
        let source = Layout::new(corpus.join(name));
        if !source.path().exists() {
            continue;
        }
        seen += 1;
        whole_way(name, &source, program).with_context(|| name.to_owned())?;
    }
    ensure!(seen > 0, "{} holds no image", corpus.display());
    Ok(())
}

fn whole_way(name: &str, source: &Layout, program: &[&str]) -> Result<()> {
    let scratch = tempfile::tempdir_in("/var/tmp")?;
    let registry = Registry::open()?;
    let reference = registry.reference(&format!("corpus/{name}"));
    convert(&source.reference(), &reference, &[])?;
    let daemon = DaemonOptions::image(&reference, &scratch.path().join("cache")).start()?;
    let overlay = Mount::overlay(daemon.root(), &scratch.path().join("overlay"))?;
    let printed = chroot(overlay.path(), program)?;
    ensure!(printed.starts_with("ready"), "{printed}");
    overlay.unmount()?;
    let wanted = unpack(source, scratch.path())?;
    assert_same(&wanted, daemon.root(), Overlook::default())?;
    drop(daemon);

    let nydus = Layout::new(scratch.path().join("nydus"));
    convert(&source.reference(), &nydus.reference(), &[])?;
    crate::kernel::kernel_judges(&nydus, scratch.path(), &wanted)
}
