//! What an image unpacks to, by a program that nobody here wrote.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::command::run;
use crate::layout::Layout;

/// Unpacks the image of `layout` with umoci below `directory`; returns the root of the tree.
///
/// # Errors
/// umoci is missing or refuses the image.
pub fn unpack(layout: &Layout, directory: &Path) -> Result<PathBuf> {
    let bundle = directory.join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:latest", layout.path().display()))
        .arg(&bundle))?;
    let root = bundle.join("rootfs");
    ensure!(root.is_dir(), "umoci made no {}", root.display());
    Ok(root)
}

/// Copies an image with skopeo, for example from a layout to a registry.
///
/// # Errors
/// skopeo is missing or one of the sides refuses.
pub fn copy(source: &str, target: &str, flags: &[&str]) -> Result<()> {
    run(Command::new("skopeo").args(["copy", "--quiet"]).args(flags).args([source, target])).map(drop)
}
