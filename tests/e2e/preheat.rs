//! Fetching ahead of readers: by configuration, by request, and without a mount.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tests::command::{finish, run, run_refused};
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::{Journey, convert, within};
use tests::layout::Layout;
use tests::recipes::noise;
use tests::registry::Registry;
use tests::relay::{Relay, Rule};
use tests::tree::{Overlook, assert_same};
use tests::{Result, binaries, ensure, needs_mounts, needs_programs, recipes};

/// Files of the image that is fetched in part, and bytes of each.
const FILES: u64 = 16;
const SIZE: usize = 1 << 20;
/// What a read takes at most while the registry sits on other requests for an hour.
const AT_ONCE: Duration = Duration::from_secs(30);

/// An image in a registry behind a relay.
struct Scene {
    journey: Journey,
    nydus: Layout,
    relay: Relay,
    registry: Registry,
}

impl Scene {
    fn set(image: &Image) -> Result<Self> {
        let journey = Journey::start(image)?;
        let registry = Registry::open()?;
        let relay = Relay::start(registry.address())?;
        let flags = ["--chunk-size", "0x40000"];
        let nydus = journey.convert("nydus", &flags)?;
        convert(&journey.source.reference(), &registry.reference("warm"), &flags)?;
        Ok(Self { journey, nydus, relay, registry })
    }

    /// Many files of noise: `d/0` to `d/15`, and `other` beside them.
    fn files() -> Result<Self> {
        let mut entries = vec![Entry::dir("./"), Entry::dir("d"), Entry::symlink("link", "d/3")];
        entries.extend((0..FILES).map(|n| Entry::file(format!("d/{n}"), noise(n, SIZE))));
        entries.push(Entry::file("other", noise(99, SIZE)));
        Self::set(&Image::new(vec![entries]))
    }

    fn options(&self) -> DaemonOptions {
        DaemonOptions::image(&self.relay.reference("warm"), &self.journey.path("cache"))
    }

    /// A list of files on disk.
    fn list(&self, paths: &str) -> Result<PathBuf> {
        let path = self.journey.path("list");
        fs::write(&path, paths)?;
        Ok(path)
    }

    /// `nydusd prefetch` of this image, from the relay.
    fn prefetch(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binaries::nydusd());
        command.args(["prefetch", "--image", &self.relay.reference("warm"), "--cache-dir"]);
        command.arg(self.journey.path("cache")).args(arguments);
        command
    }

    /// Digests of data blobs that were asked for.
    fn data_fetches(&self) -> Result<usize> {
        let blobs = self.nydus.data_blobs()?;
        let is_data = |digest: &str| blobs.iter().any(|blob| blob.digest == digest);
        Ok(self.relay.fetches().iter().filter(|fetch| is_data(&fetch.digest)).count())
    }
}

/// The only job of a daemon, once it has ended.
fn ended(daemon: &Daemon) -> Result<Value> {
    daemon.wait_until("the prefetch has ended", |daemon| {
        let jobs = daemon.get("/api/v1/prefetch")?;
        Ok((jobs[0]["finished"] == true).then(|| jobs[0].clone()))
    })
}

fn nydusctl(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(binaries::nydusctl());
    command.arg("--sock").arg(daemon.socket()).args(arguments);
    command
}

/// `prefetch_all` of the snapshotter's configuration fills the cache although nobody reads; then
/// the registry goes away, and the whole tree reads right.
#[test]
fn prefetch_all_fills_the_cache_by_itself() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry");
    let scene = Scene::set(&recipes::tiny())?;
    let wanted = scene.journey.reference()?;
    let bootstrap = scene.journey.path("image.boot");
    scene.nydus.save_bootstrap(&bootstrap)?;
    let config = scene.journey.path("config.json");
    let document = json!({
        "device": {
            "id": "warm",
            "backend": { "type": "registry", "config": {
                "scheme": "http", "host": scene.relay.address().to_string(), "repo": "warm",
            } },
            "cache": { "type": "blobcache", "config": { "work_dir": scene.journey.path("cache") } },
        },
        "mode": "direct",
        "fs_prefetch": { "enable": true, "threads_count": 4 },
    });
    fs::write(&config, document.to_string())?;
    let daemon = DaemonOptions::bootstrap(&bootstrap, &config).start()?;
    let job = ended(&daemon)?;
    ensure!(
        job["what"] == "start" && job["state"] == "done" && job["chunks"] == job["total_chunks"],
        "{job}"
    );
    daemon.wait_until("all chunks are ready", |daemon| {
        let cache = daemon.get("/api/v1/metrics/blobcache?id=warm")?;
        // Its blobs hold chunks of files that upper layers hide, too; those do not count.
        Ok((cache["data_all_ready"] == true && cache["entries_count"] == job["total_chunks"]).then_some(()))
    })?;
    for blob in scene.nydus.data_blobs()? {
        let hex = blob.digest.trim_start_matches("sha256:");
        let path = scene.journey.path("cache").join(format!("{hex}.blob.meta"));
        daemon.wait_until("the blob context is kept", |_| Ok(path.exists().then_some(())))?;
    }
    drop((scene.relay, scene.registry));
    assert_same(&wanted, daemon.root(), Overlook::default())
}

/// A list of files is there afterwards, through its links, and the rest of the image is not.
#[test]
fn a_list_of_files_is_fetched_and_no_more() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::files()?;
    let daemon = scene.options().start()?;
    scene.relay.forget();
    let list = scene.list("/link\n\n/d/7\n")?;
    let list = list.to_str().expect("scratch paths are text");
    let said = run(&mut nydusctl(&daemon, &["prefetch", "--files", list, "--wait"]))?;
    ensure!(said.contains("done"), "{said}");
    let limit = 8 * SIZE as u64;
    ensure!(scene.relay.bytes() >= 2 * SIZE as u64 && scene.relay.bytes() < limit, "{}", scene.relay.bytes());
    scene.relay.set(Rule::Refuse(503));
    for number in [3, 7] {
        let found = fs::read(daemon.root().join(format!("d/{number}")))?;
        ensure!(found == noise(number, SIZE), "d/{number} has wrong bytes");
    }

    // A file that the image does not have is named, and the exit code tells.
    let list = scene.list("/d/3\n/d/3.txt\n")?;
    let list = list.to_str().expect("scratch paths are text");
    let error = run_refused(&mut nydusctl(&daemon, &["prefetch", "--files", list, "--wait"]))?;
    ensure!(error.contains("/d/3.txt") && error.contains("incomplete"), "{error}");
    let code = finish(&mut nydusctl(&daemon, &["prefetch"]))?.code;
    ensure!(code == Some(2), "neither --all nor --files ended with {code:?}");
    Ok(())
}

/// `--prefetch-files` is fetched after the mount, which does not wait for it.
#[test]
fn a_mount_does_not_wait_for_its_prefetch() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::files()?;
    // The bootstrap comes from a file, so that all that stalls is data.
    let bootstrap = scene.journey.path("image.boot");
    scene.nydus.save_bootstrap(&bootstrap)?;
    let config = scene.journey.path("config.toml");
    let text = format!(
        "version = 2\n[backend]\ntype = 'registry'\nregistry = {{ scheme = 'http', host = '{}', repo = 'warm' }}\n\
         [cache]\ntype = 'filecache'\nfilecache = {{ work_dir = {:?} }}\n[rafs.prefetch]\nenable = true\n",
        scene.relay.address(),
        scene.journey.path("cache"),
    );
    fs::write(&config, text)?;
    scene.relay.set(Rule::Stall);
    let list = scene.list("/d/1\n/d/2\n")?;
    let daemon = DaemonOptions::bootstrap(&bootstrap, &config).flag("--prefetch-files", list).start()?;
    scene.relay.wait_stalled(1)?;
    let job = &daemon.get("/api/v1/prefetch")?[0];
    ensure!(job["state"] == "running" && job["what"] == "start", "{job}");
    scene.relay.set(Rule::Pass);
    let job = ended(&daemon)?;
    ensure!(job["state"] == "done" && job["chunks"] == job["total_chunks"], "{job}");
    scene.relay.set(Rule::Refuse(503));
    ensure!(fs::read(daemon.root().join("d/2"))? == noise(2, SIZE), "d/2 has wrong bytes");
    Ok(())
}

/// A prefetch whose requests hang holds up no reader; it can be asked about and cancelled, and no
/// more than a few run at once.
#[test]
fn a_hanging_prefetch_delays_nobody_and_can_be_cancelled() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::files()?;
    let daemon = scene.options().start()?;
    let before = scene.relay.arrived();
    scene.relay.set(Rule::Slow(Duration::from_secs(3600)));
    let (status, answer) = daemon.request("POST", "/api/v1/prefetch", &json!({ "files": ["/d"] }))?;
    ensure!(status == 200 && answer["id"] == 1, "{status} {answer}");
    scene.relay.wait_arrived(before + 1)?;
    // What has come until now hangs; what comes from now on passes.
    scene.relay.set(Rule::Pass);
    let other = daemon.root().join("other");
    let found = within(AT_ONCE, "a read beside a hanging prefetch", move || Ok(fs::read(other)?))?;
    ensure!(found == noise(99, SIZE), "wrong bytes beside a hanging prefetch");
    let job = daemon.get("/api/v1/prefetch?id=1")?;
    ensure!(job["state"] == "running" && job["bandwidth"] == Value::Null, "{job}");

    scene.relay.set(Rule::Stall);
    let slow = json!({ "all": true, "mountpoint": "/", "bandwidth": 1 });
    let mut statuses = Vec::new();
    for _ in 0..17 {
        statuses.push(daemon.request("POST", "/api/v1/prefetch", &slow)?.0);
    }
    ensure!(statuses[..15] == [200; 15] && statuses[15..] == [429; 2], "{statuses:?}");
    let jobs = daemon.get("/api/v1/prefetch")?;
    for job in jobs.as_array().into_iter().flatten() {
        let (status, answer) =
            daemon.request("DELETE", &format!("/api/v1/prefetch?id={}", job["id"]), &Value::Null)?;
        ensure!(status == 204, "{status} {answer}");
    }
    daemon.wait_until("every job has ended", |daemon| {
        let jobs = daemon.get("/api/v1/prefetch")?;
        let mut jobs = jobs.as_array().into_iter().flatten();
        Ok(jobs.all(|job| job["finished"] == true && job["state"] == "cancelled").then_some(()))
    })?;
    Ok(())
}

/// The trace of one daemon preheats the cache of another, before it mounts and while it is mounted;
/// a trace of another image is refused.
#[test]
fn a_trace_preheats_other_nodes() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::files()?;
    let first = scene.options().start()?;
    for name in ["d/5", "other"] {
        fs::read(first.root().join(name))?;
    }
    let document = run(&mut nydusctl(&first, &["trace", "--json"]))?;
    let trace = scene.list(&document)?;
    let trace = trace.to_str().expect("scratch paths are text");

    for mounted in [false, true] {
        let cache = scene.journey.path(if mounted { "mounted" } else { "fresh" });
        let options = DaemonOptions::image(&scene.relay.reference("warm"), &cache);
        let daemon = match mounted {
            true => {
                let daemon = options.start()?;
                run(&mut nydusctl(&daemon, &["prefetch", "--trace", trace, "--wait"]))?;
                daemon
            }
            false => {
                let mut prefetch = Command::new(binaries::nydusd());
                prefetch.args(["prefetch", "--image", &scene.relay.reference("warm"), "--cache-dir"]);
                run(prefetch.arg(&cache).args(["--trace", trace]))?;
                options.start()?
            }
        };
        scene.relay.forget();
        for (name, seed) in [("d/5", 5), ("other", 99)] {
            ensure!(fs::read(daemon.root().join(name))? == noise(seed, SIZE), "{name} has wrong bytes");
        }
        ensure!(scene.data_fetches()? == 0, "{:?}", scene.relay.fetches());
        let mut other: Value = serde_json::from_str(&document)?;
        other["bootstrap"] = json!(format!("sha256:{}", "0".repeat(64)));
        let (status, answer) = daemon.request("POST", "/api/v1/prefetch", &json!({ "trace": other }))?;
        ensure!(
            status == 400 && answer["message"].to_string().contains("another image"),
            "{status} {answer}"
        );
    }
    Ok(())
}

/// What clients may get wrong is refused in the API's shape, and starts nothing.
#[test]
fn bad_requests_are_refused_with_a_reason() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::files()?;
    let daemon = scene.options().start()?;
    let path = "/api/v1/prefetch";
    let many = vec!["/d"; (1 << 16) + 1];
    for (method, path, body, status, part) in [
        ("POST", path, json!({}), 400, "say what"),
        ("POST", path, json!({ "all": true, "files": [] }), 400, "say what"),
        ("POST", path, json!({ "files": ["d/1"] }), 400, "absolute"),
        ("POST", path, json!({ "files": [format!("/{}", "x".repeat(4096))] }), 400, "4096"),
        ("POST", path, json!({ "files": many }), 400, "directories"),
        ("POST", path, json!({ "everything": true }), 400, "everything"),
        ("POST", path, json!({ "trace": { "version": 9 } }), 400, "bootstrap"),
        ("POST", path, json!({ "trace": {}, "all": true }), 400, "version"),
        ("POST", path, json!({ "all": true, "bandwidth": -1 }), 400, "expected u64"),
        ("POST", path, json!(7), 400, "ParseBody"),
        ("POST", path, json!({ "all": true, "mountpoint": "/nowhere" }), 404, "/nowhere"),
        ("GET", "/api/v1/prefetch?id=7", Value::Null, 404, "7"),
        ("GET", "/api/v1/prefetch?id=x", Value::Null, 400, "x"),
        ("DELETE", "/api/v1/prefetch?id=7", Value::Null, 404, "7"),
        ("DELETE", path, Value::Null, 400, "id=N"),
        ("PUT", path, json!({ "all": true }), 400, "BadRequest"),
    ] {
        let (found, answer) = daemon.request(method, path, &body)?;
        let message = answer["message"].as_str().unwrap_or_default();
        ensure!(found == status && message.contains(part), "{method} {path}: {found} {answer}");
        ensure!(answer["code"] == "UNDEFINED", "{answer}");
    }
    let jobs = daemon.get(path)?;
    ensure!(jobs == json!([]), "{jobs}");
    Ok(())
}

/// `nydusd prefetch` fills the cache of an image that is not mounted: the mount that follows asks
/// for no data. What it can not have is told by its exit code.
#[test]
fn an_image_is_preheated_without_a_mount() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry");
    let scene = Scene::set(&recipes::tiny())?;
    let wanted = scene.journey.reference()?;
    let list = scene.list("/data/noise-a\n/data/nothing\n")?;
    let list = list.to_str().expect("scratch paths are text");
    let error = run_refused(&mut scene.prefetch(&["--files", list]))?;
    ensure!(error.contains("Error:") && error.contains("/data/nothing"), "{error}");

    let said = run(&mut scene.prefetch(&["--all", "--bandwidth", "1GiB"]))?;
    ensure!(said.contains("done"), "{said}");
    ensure!(scene.data_fetches()? > 0, "the data came from nowhere");
    scene.relay.forget();
    let daemon = scene.options().start()?;
    assert_same(&wanted, daemon.root(), Overlook::default())?;
    ensure!(scene.data_fetches()? == 0, "{:?}", scene.relay.fetches());
    Ok(())
}
