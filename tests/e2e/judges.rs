//! The judges agree about our own test images before we are judged with them.

use tests::layout::Layout;
use tests::mount::chroot;
use tests::{Result, image, needs_programs, recipes, reference, tree};

/// umoci unpacks every recipe, and the same tree whatever the compression of the layers.
/// (umoci of Debian 12 knows no zstd; skopeo turns it into gzip first.)
#[test]
fn reference_unpacks_agree() -> Result<()> {
    needs_programs!("umoci", "skopeo");
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: unpacking devices and owners needs root");
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let mut trees = Vec::new();
    for compression in [image::Compression::Plain, image::Compression::Gzip, image::Compression::Zstd] {
        let directory = scratch.path().join(format!("{compression:?}"));
        let layout = Layout::new(directory.join("layout"));
        recipes::tiny().compressed(compression).write_layout(layout.path())?;
        let layout = if compression == image::Compression::Zstd {
            let gzip = Layout::new(directory.join("gzip"));
            let target = gzip.reference();
            reference::copy(&layout.reference(), &target, &["--dest-compress-format", "gzip"])?;
            gzip
        } else {
            layout
        };
        let root = reference::unpack(&layout, &directory)?;
        trees.push(tree::scan(&root)?);
    }
    for other in &trees[1..] {
        let lines = tree::differences(&trees[0], other, tree::Overlook::default());
        assert!(lines.is_empty(), "{}", lines.join("\n"));
    }
    let wanted = &trees[0];
    let has = |name: &str| wanted.contains_key(std::ffi::OsStr::new(name));
    assert!(has("etc/added") && !has("etc/removed-later"));
    assert!(has("opaque/above") && !has("opaque/below") && !has("opaque/deep"));
    assert!(has("was-file/inside") && !has("was-directory/inside"));
    assert_eq!(wanted[std::ffi::OsStr::new("linked-c")].nlink, 3);
    Ok(())
}

/// The images with programs run where they are unpacked.
#[test]
fn recipes_run_in_a_chroot() -> Result<()> {
    needs_programs!("umoci", "chroot");
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: chroot needs root");
        return Ok(());
    }
    for (image, program) in [
        (recipes::shell()?, ["/bin/sh", "/srv/main.sh"]),
        (recipes::python()?, ["/usr/bin/python3", "/srv/app/main.py"]),
    ] {
        let scratch = tempfile::tempdir()?;
        let layout = Layout::new(scratch.path().join("layout"));
        image.write_layout(layout.path())?;
        let root = reference::unpack(&layout, scratch.path())?;
        let printed = chroot(&root, &program)?;
        assert!(printed.starts_with("ready"), "{printed}");
    }
    Ok(())
}
