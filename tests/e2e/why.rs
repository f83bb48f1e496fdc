//! Why a start was slow: the daemon's own account of one, in words, in JSON and drawn.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rafs::bootstrap::{Bootstrap, OpenOptions};
use rafs::fs::{Rafs, RafsOptions};
use serde_json::{Value, json};
use storage::read::ReadSlice;
use tests::command::{finish, run};
use tests::daemon::Daemon;
use tests::image::{Entry, Image};
use tests::recipes::noise;
use tests::relay::Rule;
use tests::scene::Scene;
use tests::{Context, Result, binaries, ensure, needs_mounts, needs_programs};

/// How much longer the one chunk takes.
const DELAY: Duration = Duration::from_secs(2);

/// An image of one layer, in chunks of 64 KiB.
fn scene(entries: Vec<Entry>) -> Result<Scene> {
    Scene::set(&Image::new(vec![entries]), &["--chunk-size", "0x10000"])
}

fn nydusctl(daemon: &Daemon, arguments: &[&str]) -> Result<String> {
    run(Command::new(binaries::nydusctl()).arg("--sock").arg(daemon.socket()).args(arguments))
}

/// Reads `count` bytes of a file from `offset` on with a process of that name. No readahead
/// goes beyond what is asked for.
fn read_with(program: &str, file: &Path, offset: u64, count: u64) -> Result<()> {
    let mut command = Command::new(program);
    let input = format!("if={}", file.display());
    command.args([&input, "of=/dev/null", "bs=4096", "iflag=direct", "status=none"]);
    command.args([format!("skip={}", offset / 4096), format!("count={}", count / 4096)]);
    run(&mut command).map(drop)
}

/// The chunk under a byte of a file, according to the image that a daemon has put into `cache`.
fn chunk_of(cache: &Path, file: &str, offset: u64) -> Result<ReadSlice> {
    let bootstrap = fs::read_dir(cache)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "boot"))
        .context("no bootstrap in the cache")?;
    let bootstrap: Arc<dyn Bootstrap> =
        Arc::from(rafs::bootstrap::open(&bootstrap, &OpenOptions::default())?);
    let mut nid = bootstrap.root();
    for name in file.split('/') {
        nid = bootstrap.lookup(nid, name.as_bytes())?.context(file.to_owned())?.nid;
    }
    let mut slices = Vec::new();
    Rafs::new(bootstrap, Vec::new(), RafsOptions::default())?.read(nid, offset, 4096, &mut slices)?;
    slices.first().cloned().context("no chunk there")
}

/// A copy of `dd` under a name that no other process has.
fn reader_called(name: &str, directory: &Path) -> Result<String> {
    let path = directory.join(name);
    fs::copy("/bin/dd", &path)?;
    Ok(path.to_string_lossy().into_owned())
}

/// One chunk of a start is late: it, its file and its process come first.
#[test]
fn a_late_chunk_is_named_first() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    // Chunks of 64 KiB that do not compress: stored as they are, one behind the other.
    let scene = scene(vec![
        Entry::dir("./"),
        Entry::dir("srv"),
        Entry::file("srv/first", noise(1, 400_000)),
        Entry::file("srv/victim", noise(2, 8 << 20)),
        Entry::file("srv/last <b>", noise(3, 400_000)),
    ])?;
    let quick = reader_called("quick-reader", scene.journey.scratch())?;
    let late = reader_called("late-reader", scene.journey.scratch())?;
    let daemon = scene.options().start()?;
    let root = daemon.root().to_owned();
    let middle = 4u64 << 20;
    let wanted = chunk_of(&scene.cache(), "srv/victim", middle)?;
    let stored = wanted.extent.unit.compressed;
    // From the start on: whoever fetches it, and whatever else comes with it.
    scene.relay.set(Rule::Late(stored.start(), stored.end() - 1, DELAY));
    read_with(&quick, &root.join("srv/first"), 0, 65536)?;
    read_with(&late, &root.join("srv/victim"), middle, 4096)?;
    read_with(&quick, &root.join("srv/last <b>"), 0, 65536)?;

    let report: Value = serde_json::from_str(&nydusctl(&daemon, &["why", "--json"])?)?;
    let first = &report["reads"][0];
    let at = |list: &str, key: &str| -> Result<Value> {
        let place = usize::try_from(first[key].as_u64().context("no place")?)?;
        Ok(report[list][place].clone())
    };
    let us = |key: &str| first[key].as_u64().unwrap_or(0);
    // It may have been on its way already when the reader came.
    ensure!(us("took_us") > 0 && us("network_us") > us("took_us") / 2, "{first}");
    ensure!(at("files", "file")?["path"] == "/srv/victim", "{first} {}", report["files"]);
    ensure!(report["files"][0]["path"] == "/srv/victim", "{}", report["files"]);
    ensure!(at("processes", "process")?["name"] == "late-reader", "{first} {}", report["processes"]);
    ensure!(first["source"] == "origin" && first["offset"] == middle, "{first}");
    ensure!(first["chunk"] == json!({ "blob": wanted.blob, "index": wanted.extent.index.0 }), "{first}");
    ensure!(report["totals"]["blocked_us"].as_u64() >= Some(us("took_us")), "{}", report["totals"]);

    let text = nydusctl(&daemon, &["why"])?;
    let line = text.lines().skip_while(|line| !line.contains("WAITED")).nth(1).context("no table")?;
    ensure!(line.contains("late-reader") && line.contains("/srv/victim"), "{text}");
    eprintln!("{text}");

    looks_right(&daemon, &scene, &report)
}

/// The page, looked at in a real browser: everything is drawn, and nothing else happens.
fn looks_right(daemon: &Daemon, scene: &Scene, report: &Value) -> Result<()> {
    let page = scene.journey.path("why.html");
    nydusctl(daemon, &["why", "--html", &page.to_string_lossy()])?;
    needs_programs!("chromium");
    let url = format!("file://{}", page.display());
    let browse = |mode: &[&str]| {
        let profile = tempfile::tempdir()?;
        let mut chromium = Command::new("chromium");
        chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]);
        chromium.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
        chromium.args(["--disable-dev-shm-usage", "--enable-logging=stderr", "--window-size=1400,1100"]);
        chromium.arg(format!("--user-data-dir={}", profile.path().display())).args(mode).arg(&url);
        let finished = finish(&mut chromium)?;
        ensure!(finished.code == Some(0), "chromium: {finished:?}");
        // What a page does wrong (a script that fails, a policy that is broken) is logged here.
        ensure!(!finished.stderr.contains("CONSOLE"), "{}", finished.stderr);
        Ok(finished.stdout)
    };
    let dom = browse(&["--dump-dom"])?;
    let bars = |class: &str| dom.matches(&format!("<g class=\"{class}")).count();
    let count = |list: &str| report[list].as_array().map_or(0, Vec::len);
    // The second report is of the same life and a moment later: reads do not go away.
    ensure!(bars("read") >= count("reads") && bars("fetch") >= count("fetches"), "bars are missing");
    ensure!(count("reads") > 0 && count("fetches") > 0, "nothing to draw");
    let worst =
        dom.split("<tbody>").nth(1).and_then(|body| body.split("</tr>").next()).context("no table")?;
    ensure!(worst.contains("/srv/victim") && worst.contains("late-reader"), "{worst}");
    ensure!(dom.contains("/srv/last &lt;b&gt;") && !dom.contains("last <b>"), "a name is markup");

    let picture = scene.journey.path("why.png");
    browse(&[&format!("--screenshot={}", picture.display())])?;
    // Compressed pixels of one colour are few; the drawn page is far above.
    let drawn = fs::metadata(&picture)?.len();
    ensure!(drawn > 30_000, "the screenshot has {drawn} bytes: is it blank?");
    if let Some(kept) = std::env::var_os("NYDUS_TEST_SCREENSHOT") {
        fs::copy(&picture, kept)?;
    }
    Ok(())
}

/// A mount that everything was read of is called what it is.
#[test]
fn a_mount_that_is_not_lazy_is_called_so() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let bytes = noise(4, 3 << 20);
    let scene = scene(vec![Entry::dir("./"), Entry::file("all", bytes.as_slice())])?;
    {
        let daemon = scene.options().start()?;
        ensure!(
            nydusctl(&daemon, &["why"])?.contains("nobody has read anything"),
            "{}",
            nydusctl(&daemon, &["why"])?
        );
        ensure!(fs::read(daemon.root().join("all"))? == bytes, "wrong bytes");
        let text = nydusctl(&daemon, &["why"])?;
        ensure!(text.contains("not lazy: ") && text.contains("% of the image was fetched"), "{text}");
        // The start is over once nobody has waited for a while; then the log says what it cost.
        let line = daemon.wait_for_log("start of /: ")?;
        ensure!(line.contains("MiB fetched in") && line.contains("nydusctl why"), "{line}");
    }
    let again = scene.options().start()?;
    let file = fs::File::open(again.root().join("all"))?;
    file.read_exact_at(&mut [0; 10], 0)?;
    let text = nydusctl(&again, &["why"])?;
    ensure!(text.contains("in the cache before it was mounted"), "{text}");
    // A busy disk may be waited for; the network may not.
    ensure!(text.contains("Fetched 0 B in 0 requests"), "{text}");
    Ok(())
}
