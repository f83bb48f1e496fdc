//! Images that are unmounted, or mounted, while their registry does not answer: nobody else notices,
//! and the daemon can always be ended.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::within;
use tests::mount::connection_file;
use tests::recipes::noise;
use tests::relay::Rule;
use tests::scene::Scene;
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// What takes no source takes, on a loaded machine with two cores. Behind the outage it would be for ever.
const AT_ONCE: Duration = Duration::from_secs(5);

/// An image in a registry, and what an API client says to mount it.
struct Stage {
    scene: Scene,
    bootstrap: PathBuf,
}

impl Stage {
    fn set(flags: &[&str]) -> Result<Self> {
        let image = Image::new(vec![vec![
            Entry::dir("./"),
            Entry::file("file", noise(1, 400_000)),
            Entry::file("small-a", noise(2, 5000)),
            Entry::file("small-b", noise(3, 5000)),
        ]]);
        let scene = Scene::set(&image, flags)?;
        // The same image once more, for its bootstrap.
        let bootstrap = scene.journey.path("image.boot");
        scene.journey.convert("nydus", flags)?.save_bootstrap(&bootstrap)?;
        Ok(Self { scene, bootstrap })
    }

    /// Mounts it at `mountpoint`; its readers wait for ever.
    fn post(&self, daemon: &Daemon, mountpoint: &str) -> Result<(u16, Value)> {
        let config = json!({
            "device": {
                "backend": { "type": "registry", "config": {
                    "scheme": "http", "host": self.scene.relay.address().to_string(), "repo": "scene",
                } },
                "cache": { "type": "blobcache", "config": { "work_dir": self.scene.cache() } },
            },
            "mode": "direct", "read_timeout": 2, "on_outage": "wait", "amplify_io": 0, "trace": "off",
            "fs_prefetch": { "enable": false },
            // A body that is not taken at any time.
            "padding": "x".repeat(100_000),
        });
        let body = json!({ "fs_type": "rafs", "source": self.bootstrap, "config": config.to_string() });
        daemon.request("POST", &format!("/api/v1/mount?mountpoint={mountpoint}"), &body)
    }
}

/// Ends a connection that a failed test may leave stuck, and everybody who is stuck in it.
struct Abort(PathBuf);

impl Abort {
    fn guard(root: &Path) -> Result<Self> {
        let minor = nix::sys::stat::minor(fs::metadata(root)?.dev());
        Ok(Self(connection_file(minor, "abort")?))
    }
}

impl Drop for Abort {
    fn drop(&mut self) {
        // It is gone after a test that went well.
        let _ = fs::write(&self.0, "1");
    }
}

/// A reader of `path` that begins to wait for the registry and is killed: its pages wait on.
fn leave_a_read_behind(daemon: &Daemon, path: &Path) -> Result<()> {
    let mut reader = Command::new("cat").arg(path).stdout(Stdio::null()).spawn()?;
    daemon.wait_until("a read waits for the registry", |daemon| {
        let (status, _) = daemon.request("GET", "/api/v1/metrics/inflight", &Value::Null)?;
        Ok((status == 200).then_some(()))
    })?;
    reader.kill()?;
    within(AT_ONCE, "the end of a killed reader", move || Ok(reader.wait()?))?;
    Ok(())
}

fn look(daemon: &Daemon, names: &[&str]) -> Result<()> {
    let root = daemon.root().to_owned();
    let mut found = within(AT_ONCE, "ls", move || {
        fs::read_dir(root)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()
    })?;
    found.sort_unstable();
    ensure!(found == names, "{found:?}, wanted {names:?}");
    Ok(())
}

/// With a read of an image under way that its registry does not answer, the image is unmounted and
/// mounted again beside others, which are looked at all the while. Then the daemon is killed: it is gone.
#[test]
fn an_unmount_during_an_outage_holds_nobody_up() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let stage = Stage::set(&["--chunk-size", "0x10000"])?;
    let mut daemon = DaemonOptions::empty().start()?;
    let abort = Abort::guard(daemon.root())?;
    for at in ["/out", "/stays"] {
        let (status, answer) = stage.post(&daemon, at)?;
        ensure!(status == 204, "{answer}");
    }
    stage.scene.relay.set(Rule::Stall);
    leave_a_read_behind(&daemon, &daemon.root().join("out/file"))?;

    let delete = |at: &str| -> Result<()> {
        let (socket, path) = (daemon.socket().to_owned(), format!("/api/v1/mount?mountpoint={at}"));
        within(AT_ONCE, "DELETE", move || {
            use std::io::{Read as _, Write as _};
            let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
            write!(stream, "DELETE {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer.starts_with("HTTP/1.1 204"), "{answer}");
            Ok(())
        })
    };
    delete("/out")?;
    look(&daemon, &["stays"])?;
    let path = daemon.root().join("stays/file");
    within(AT_ONCE, "stat", move || Ok(fs::symlink_metadata(path)?))?;
    // Names come and go in the same directory.
    let (status, answer) = stage.post(&daemon, "/new")?;
    ensure!(status == 204, "{answer}");
    look(&daemon, &["new", "stays"])?;
    delete("/new")?;
    look(&daemon, &["stays"])?;
    // What nobody mounts any more waits no longer than its read timeout, and the kernel drops it.
    let waiting = abort.0.with_file_name("waiting");
    daemon.wait_until("the read of the unmounted image has ended", |_| {
        Ok((fs::read_to_string(&waiting)?.trim() == "0").then_some(()))
    })?;
    look(&daemon, &["stays"])?;
    // The same again, and a daemon that is killed meanwhile.
    let (status, answer) = stage.post(&daemon, "/out")?;
    ensure!(status == 204, "{answer}");
    leave_a_read_behind(&daemon, &daemon.root().join("out/file"))?;
    delete("/out")?;
    let mut ended = within(AT_ONCE, "the end of a killed daemon", move || {
        daemon.kill()?;
        Ok(daemon)
    })?;
    ended.wait_ended()?;
    Ok(())
}

/// An image whose context is in a registry that takes connections and answers nobody: the mount call ends
/// with an error that says why, though its readers would wait for ever. Many such calls leave room for
/// others, and are forgotten.
#[test]
fn a_mount_whose_registry_is_out_ends_with_an_error() -> Result<()> {
    needs_mounts!();
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let scratch = tempfile::tempdir()?;
    let daemon = DaemonOptions::empty().start()?;
    let config = json!({
        "device": {
            "backend": { "type": "registry", "config": {
                "scheme": "http", "host": silent.local_addr()?.to_string(), "repo": "silent",
            } },
            "cache": { "type": "blobcache", "config": { "work_dir": scratch.path() } },
        },
        "mode": "direct", "read_timeout": 1, "on_outage": "wait",
        // A body that is not taken at any time.
        "padding": "x".repeat(100_000),
    });
    let bootstrap = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/batch/image.boot");
    let body = json!({ "fs_type": "rafs", "source": bootstrap, "config": config.to_string() });
    // More than there are places for.
    let answers = thread::scope(|scope| {
        let (daemon, body) = (&daemon, &body);
        let call =
            move |number: u32| daemon.request("POST", &format!("/api/v1/mount?mountpoint=/{number}"), body);
        let calls: Vec<_> = (0..6).map(|number| scope.spawn(move || call(number))).collect();
        calls.into_iter().map(|call| call.join().expect("it does not panic")).collect::<Result<Vec<_>>>()
    })?;
    for (status, answer) in answers {
        let message = answer["message"].as_str().context("no message")?;
        ensure!(status == 500 && message.contains("fetch the context of blob"), "{status} {answer}");
    }
    ensure!(fs::read_dir(daemon.root())?.count() == 0, "something is left");
    Ok(())
}
