//! `nydus-image unpack` as the image converter of containerd drives it: into a FIFO, from a
//! server behind a unix socket.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;

use tests::command::{finish, run};
use tests::image::tar_bytes;
use tests::journey::nydus_image;
use tests::plain::{self, Objects};
use tests::{Context, Result, ensure, recipes};

/// One layer as the converter leaves it: its bootstrap, and a server of its blob.
struct Scene {
    dir: tempfile::TempDir,
    bootstrap: PathBuf,
    backend: String,
}

impl Scene {
    fn set() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name);
        let layer = recipes::tiny().layers.into_iter().next().context("no layer")?;
        fs::write(at("layer.tar"), tar_bytes(&layer)?)?;
        let create = ["--log-level", "warn", "--whiteout-spec", "none", "--type", "tar-rafs"];
        let mut command = nydus_image("create", create);
        command.arg("--bootstrap").arg(at("boot")).arg("--blob").arg(at("blob")).arg(at("layer.tar"));
        run(&mut command)?;
        let blobs = run(nydus_image("inspect", ["-R blobs"]).arg(at("boot")))?;
        let blobs: serde_json::Value = serde_json::from_str(&blobs)?;
        let id = blobs[0]["blob_id"].as_str().context("no blob")?;
        let objects: Objects = HashMap::from([(format!("/{id}"), fs::read(at("blob"))?)]);
        plain::serve_unix(&at("sock"), objects)?;
        run(std::process::Command::new("mkfifo").arg(at("out")))?;
        let backend = serde_json::json!({ "addr": at("sock") }).to_string();
        Ok(Self { bootstrap: at("boot"), backend, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unpack(&self) -> Result<Child> {
        let mut command = nydus_image("unpack", ["--log-level", "warn", "--bootstrap"]);
        command.arg(&self.bootstrap).args([
            "--backend-type",
            "http-proxy",
            "--backend-config",
            &self.backend,
        ]);
        command.arg("--output").arg(self.path("out"));
        Ok(command.stderr(std::process::Stdio::null()).spawn()?)
    }

    /// Whether `archive` holds the image's tree.
    fn check(&self, archive: &Path) -> Result<()> {
        let mut check = nydus_image("check", ["--log-level", "warn", "--source"]);
        let finished = finish(check.arg(archive).arg(&self.bootstrap))?;
        ensure!(finished.code == Some(0), "{finished:?}");
        Ok(())
    }
}

/// The stream that the converter reads is the layer's tree, and the FIFO ends.
#[test]
fn a_layer_streams_through_fifo_and_socket() -> Result<()> {
    let scene = Scene::set()?;
    let mut child = scene.unpack()?;
    let fifo = scene.path("out");
    let archive = thread::spawn(move || {
        let mut archive = Vec::new();
        File::open(fifo)?.read_to_end(&mut archive).map(|_| archive)
    });
    let archive = archive.join().map_err(|_| tests::Error::msg("the reader panicked"))??;
    ensure!(child.wait()?.success(), "unpack fails");
    fs::write(scene.path("streamed.tar"), &archive)?;
    scene.check(&scene.path("streamed.tar"))
}

/// A converter that dies takes the tool with it: exit 1, no signal, no hang.
#[test]
fn a_reader_that_leaves_ends_the_work() -> Result<()> {
    let scene = Scene::set()?;
    let mut child = scene.unpack()?;
    let mut first = [0; 512];
    let mut fifo = File::open(scene.path("out"))?;
    fifo.read_exact(&mut first)?;
    drop(fifo);
    let status = child.wait()?;
    ensure!(status.code() == Some(1), "{status:?}");
    Ok(())
}
