//! Images that are written to: an overlay covers them, and keeps what changes in a directory.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use serde_json::json;
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::Journey;
use tests::mount::mounted;
use tests::recipes;
use tests::tree::{self, Overlook};
use tests::{Result, ensure, needs_mounts, needs_programs};

/// An image and where its changes go.
pub(crate) struct Scene {
    pub journey: Journey,
    pub bootstrap: PathBuf,
}

impl Scene {
    pub fn new() -> Result<Self> {
        let journey = Journey::start(&recipes::tiny())?;
        let nydus = journey.convert("nydus", &[])?;
        let bootstrap = journey.path("image.boot");
        nydus.save_bootstrap(&bootstrap)?;
        Ok(Self { journey, bootstrap })
    }

    pub fn upper(&self) -> PathBuf {
        // A name that overlayfs would take for three.
        self.journey.path("up,per:a\\b")
    }

    /// The image with its changes in `upper`, overlayfs's own in `work`.
    fn config(&self, upper: &Path, work: &Path) -> String {
        json!({
            "version": 2,
            "backend": {"type": "localfs", "localfs": {"dir": self.journey.path("nydus").join("blobs/sha256")}},
            "cache": {"type": "filecache", "filecache": {"work_dir": self.journey.path("cache")}},
            "overlay": {"upper_dir": upper, "work_dir": work},
        })
        .to_string()
    }

    pub fn options(&self, upper: &Path, work: &Path) -> Result<DaemonOptions> {
        let file = self.journey.path("config.json");
        fs::write(&file, self.config(upper, work))?;
        Ok(DaemonOptions::bootstrap(&self.bootstrap, &file))
    }

    /// The command line of a daemon whose changes go to [`Scene::upper`].
    pub fn arguments(&self) -> Result<Vec<String>> {
        let file = self.journey.path("own.json");
        fs::write(&file, self.config(&self.upper(), &self.journey.path("work")))?;
        let (bootstrap, file) = (self.bootstrap.to_string_lossy(), file.to_string_lossy());
        Ok(["--writable", "--bootstrap", &bootstrap, "--config", &file].map(str::to_owned).to_vec())
    }

    fn start(&self) -> Result<Daemon> {
        self.options(&self.upper(), &self.journey.path("work"))?.switch("--writable").start()
    }
}

fn is_whiteout(path: &Path) -> Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    Ok(meta.file_type().is_char_device() && meta.rdev() == 0)
}

/// Made, changed, renamed and removed; kept over restarts, in an upper directory like any other. The image stays.
#[test]
fn changes_are_kept_and_the_image_is_not_changed() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    let reference = scene.journey.reference()?;
    let overlook = Overlook { root_mtime: true };
    let mut daemon = scene.start()?;
    let root = daemon.root().to_owned();
    tree::assert_same(&reference, &root, overlook)?;
    let info = daemon.get("/api/v1/daemon")?;
    let shown = &info["backend_collection"]["/"]["config"]["overlay"]["upper_dir"];
    ensure!(*shown == json!(scene.upper()), "{info}");

    // The same to the mount and to a copy of the image's tree.
    for tree in [&root, &reference] {
        fs::write(tree.join("new"), "new")?;
        OpenOptions::new().append(true).open(tree.join("data/noise-a"))?.write_all(b"more")?;
        xattr::set(tree.join("etc/hostname"), "user.changed", b"1")?;
        fs::rename(tree.join("odd/setuid"), tree.join("etc/setuid"))?;
        fs::hard_link(tree.join("odd/setgid"), tree.join("another"))?;
        fs::remove_dir_all(tree.join("odd"))?;
        // Overlayfs does not count that it has other names in there.
        fs::remove_file(tree.join("linked-c"))?;
        fs::create_dir(tree.join("odd"))?;
        fs::write(tree.join("odd/only"), "this")?;
        fs::create_dir(tree.join("etc/made"))?;
        fs::write(tree.join("etc/made/a\nb"), "")?;
        // Times of directories are not what this is about.
        for dir in ["", "etc", "data", "odd", "etc/made"] {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            fs::File::open(tree.join(dir))?.set_modified(time)?;
        }
        for file in ["new", "data/noise-a", "odd/only", "etc/made/a\nb"] {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_001);
            fs::File::open(tree.join(file))?.set_modified(time)?;
        }
    }
    tree::assert_same(&reference, &root, overlook)?;
    let upper = scene.upper();
    ensure!(fs::read_to_string(upper.join("new"))? == "new");
    ensure!(xattr::get(upper.join("odd"), "trusted.overlay.opaque")?.as_deref() == Some(&b"y"[..]));
    ensure!(!upper.join("data/noise-b").exists(), "what was not touched is not copied");
    fs::remove_file(root.join("new"))?;
    fs::remove_file(root.join("etc/hostname"))?;
    ensure!(is_whiteout(&upper.join("etc/hostname"))? && !upper.join("new").exists());
    fs::remove_file(reference.join("new"))?;
    fs::remove_file(reference.join("etc/hostname"))?;

    // Again, and whoever unmounts the overlay ends the daemon.
    ensure!(daemon.terminate()?.code() == Some(0) && !mounted(&root));
    let mut daemon = scene.start()?;
    let root = daemon.root().to_owned();
    for tree in [&root, &reference] {
        for dir in ["", "etc"] {
            fs::File::open(tree.join(dir))?.set_modified(std::time::UNIX_EPOCH)?;
        }
    }
    tree::assert_same(&reference, &root, overlook)?;
    umount2(&root, MntFlags::empty())?;
    ensure!(daemon.wait_ended()?.code() == Some(0) && !mounted(&root));

    // The image by itself.
    let untouched = tempfile::tempdir()?;
    let reference = tests::reference::unpack(&scene.journey.source, untouched.path())?;
    let file = scene.journey.path("plain.json");
    let mut plain: serde_json::Value = serde_json::from_str(&scene.config(&upper, &upper))?;
    plain["overlay"] = serde_json::Value::Null;
    fs::write(&file, plain.to_string())?;
    let daemon = DaemonOptions::bootstrap(&scene.bootstrap, &file).switch("--writable").start()?;
    tree::assert_same(&reference, daemon.root(), overlook)?;
    let refused = fs::write(daemon.root().join("new"), "");
    ensure!(refused.is_err_and(|e| e.raw_os_error() == Some(libc::EROFS)), "nothing keeps changes here");
    Ok(())
}

/// What can not be is said, and nothing stays mounted.
#[test]
fn what_can_not_be_written_is_refused() -> Result<()> {
    needs_mounts!();
    let scene = Scene::new()?;
    let (upper, work) = (scene.upper(), scene.journey.path("work"));
    let (code, log) = scene.options(&upper, &work)?.refused()?;
    ensure!(code == Some(1) && log.contains("needs --writable"), "{log}");
    // Another file system, as far as overlayfs is concerned.
    let elsewhere = Path::new("/proc/self/task");
    let (code, log) = scene.options(&upper, elsewhere)?.switch("--writable").switch("--no-jail").refused()?;
    ensure!(code == Some(1) && log.contains("one file system"), "{log}");
    let (code, log) = scene.options(Path::new("upper"), &work)?.switch("--writable").refused()?;
    ensure!(
        code == Some(1) && log.contains("`overlay.upper_dir`: \"upper\": want an absolute path"),
        "{log}"
    );

    let daemon = scene.start()?;
    let (code, log) = scene.options(&upper, &scene.journey.path("work2"))?.switch("--writable").refused()?;
    ensure!(code == Some(1) && log.contains("in use by another daemon"), "{log}");
    let config = scene.config(&scene.journey.path("other"), &work);
    let body = json!({"fs_type": "rafs", "source": scene.bootstrap, "config": config});
    for (at, text) in [("/", "an overlay covers it"), ("/new", "an overlay covers it")] {
        for method in ["POST", "PUT"] {
            let (status, answer) =
                daemon.request(method, &format!("/api/v1/mount?mountpoint={at}"), &body)?;
            let message = answer["message"].as_str().unwrap_or_default();
            ensure!(status == 500 && message.contains(text), "{method} {at}: {status} {answer}");
        }
    }
    let daemon = DaemonOptions::empty().switch("--writable").start()?;
    let (status, answer) = daemon.request("POST", "/api/v1/mount?mountpoint=/a", &body)?;
    let message = answer["message"].as_str().unwrap_or_default();
    ensure!(
        status == 500 && message.contains("`overlay` is for the image that a daemon is started with"),
        "{answer}"
    );
    Ok(())
}
