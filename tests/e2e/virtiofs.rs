//! Images and directories of the host as a device of virtual machines.

use std::path::{Path, PathBuf};

use serde_json::json;
use tests::guest::device::Device;
use tests::image::Image;
use tests::journey::Journey;
use tests::layout::Layout;
use tests::{Context, Result, ensure};

mod guests;
mod hostile;
mod life;

/// An image whose blobs are local.
struct Local {
    journey: Journey,
    layout: Layout,
    bootstrap: PathBuf,
}

impl Local {
    fn new(image: &Image) -> Result<Self> {
        let journey = Journey::start(image)?;
        let layout = journey.convert("nydus", &[])?;
        let bootstrap = journey.path("image.boot");
        layout.save_bootstrap(&bootstrap)?;
        Ok(Self { journey, layout, bootstrap })
    }

    fn blobs(&self) -> PathBuf {
        self.layout.path().join("blobs/sha256")
    }

    /// What runtimes send as the configuration of a mount.
    fn config(&self) -> String {
        json!({
            "device": {
                "backend": {"type": "localfs", "config": {"dir": self.blobs()}},
                "cache": {"type": "blobcache", "config": {"work_dir": self.journey.path("cache")}},
            },
            "mode": "direct",
            "digest_validate": true,
            "enable_xattr": true,
        })
        .to_string()
    }
}

fn mount(device: &Device, at: &str, fs_type: &str, source: &Path, config: &str) -> Result<()> {
    let body = json!({"fs_type": fs_type, "source": source, "config": config}).to_string();
    device
        .process()
        .expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &body, 204, "")
        .with_context(|| device.log())
}

fn umount(device: &Device, at: &str) -> Result<()> {
    device.process().expect("DELETE", &format!("/api/v1/mount?mountpoint={at}"), "", 204, "")
}

/// Text of a path for a command line.
fn text(path: &Path) -> Result<String> {
    let text = path.to_str().context("a path that is no text")?;
    ensure!(!text.is_empty());
    Ok(text.to_owned())
}
