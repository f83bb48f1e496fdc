//! Start-up traces: what one start reads is fetched ahead of the next one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tests::command::run;
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::Journey;
use tests::recipes::BIG_FILES;
use tests::{Result, binaries, needs_mounts, recipes};

/// How long a prefetch may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// `nydusctl trace FLAGS`.
fn nydusctl_trace(daemon: &Daemon, flags: &[&str]) -> Result<String> {
    run(Command::new(binaries::nydusctl()).arg("--sock").arg(daemon.socket()).arg("trace").args(flags))
}

/// The trace in `cache`.
fn trace_file(cache: &Path) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(cache)?.map_while(std::io::Result::ok).map(|file| file.path());
    files.find(|path| path.extension().is_some_and(|end| end == "trace")).context("no trace is kept")
}

/// Number of chunks in a trace.
fn chunks(trace: &Value) -> u64 {
    trace["order"].as_array().into_iter().flatten().filter_map(|run| run[2].as_u64()).sum()
}

/// Waits until so many chunks are in the cache: nobody reads, so the daemon fetches them by itself.
fn wait_for_chunks(daemon: &Daemon, count: u64) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while daemon.get("/api/v1/metrics/blobcache")?["entries_count"].as_u64() < Some(count) {
        ensure!(Instant::now() < deadline, "{count} chunks do not come by themselves:\n{}", daemon.log());
        // Progress is only to be asked for; there is nothing to wait on.
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What a start reads is shown in three forms and kept; the next mount fetches it by itself, and
/// no read of the same files waits for the source.
#[test]
fn the_next_start_is_fetched_ahead() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let (cache, fresh) = (journey.path("cache"), journey.path("fresh"));
    let read = |daemon: &Daemon| -> Result<()> {
        for file in ["etc/hostname", BIG_FILES[1], BIG_FILES[0]] {
            std::fs::read(daemon.root().join(file))?;
        }
        Ok(())
    };

    let mut first = DaemonOptions::image(&nydus.reference(), &cache).start()?;
    ensure!(nydusctl_trace(&first, &[]).is_err(), "a trace of nothing");
    read(&first)?;
    let trace: Value = serde_json::from_str(&nydusctl_trace(&first, &["--json"])?)?;
    ensure!(trace["starts"] == 1 && trace["complete"] == false && chunks(&trace) > 0, "{trace}");
    let shown: Value = serde_json::from_str(&nydusctl_trace(&first, &["--optimize"])?)?;
    let size = std::fs::metadata(first.root().join(BIG_FILES[1]))?.len();
    let expected = serde_json::json!({ "path": format!("/{}", BIG_FILES[1]), "ranges": [[0, size]] });
    ensure!(shown["version"] == "v1" && shown["files"][1] == expected, "{shown}");
    let text = nydusctl_trace(&first, &[])?;
    ensure!(text.contains("\n/etc/hostname 0+5\n"), "{text}");
    first.terminate()?;

    std::fs::create_dir(&fresh)?;
    let kept = trace_file(&cache)?;
    let place = fresh.join(kept.file_name().context("a file has a name")?);
    std::fs::copy(&kept, &place)?;
    let mut second = DaemonOptions::image(&nydus.reference(), &fresh).start()?;
    wait_for_chunks(&second, chunks(&trace))?;
    read(&second)?;
    let cache_metrics = second.get("/api/v1/metrics/blobcache")?;
    ensure!(cache_metrics["misses"] == 0 && cache_metrics["partial_hits"] == 0, "{cache_metrics}");
    second.terminate()?;
    let merged: Value = serde_json::from_slice(&std::fs::read(&place)?)?;
    ensure!(merged["starts"] == 2 && merged["complete"] == true && chunks(&merged) == chunks(&trace));

    // Nothing of the sort without traces.
    let off = DaemonOptions::image(&nydus.reference(), &fresh).flag("--trace", "off").start()?;
    ensure!(nydusctl_trace(&off, &[]).is_err());
    Ok(())
}

/// A trace of another image, a forged one and one without end do no harm: a warning, and the
/// mount serves.
#[test]
fn a_trace_that_does_not_fit_is_ignored() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let cache = journey.path("cache");
    let options = DaemonOptions::image(&nydus.reference(), &cache);
    let mut daemon = options.start()?;
    let expected = std::fs::read(daemon.root().join("etc/hostname"))?;
    daemon.terminate()?;
    let path = trace_file(&cache)?;
    let good = std::fs::read_to_string(&path)?;
    let document: Value = serde_json::from_str(&good)?;
    let (bootstrap, order) = (document["bootstrap"].to_string(), document["order"].to_string());
    for (bad, why) in [
        (good.replace(&bootstrap, "\"sha256:00\""), "another image"),
        (good.replace(&order, "[[0,0,4294967295,1]]"), "chunks, but"),
        (good.replace(&order, "[[77,0,1,1]]"), "run of blob 77"),
        ("[".repeat(1 << 20), "not a trace"),
        (" ".repeat(5 << 20), "more than"),
    ] {
        ensure!(bad != good);
        std::fs::write(&path, bad)?;
        let mut daemon = options.start()?;
        ensure!(daemon.log().contains(why), "{why}:\n{}", daemon.log());
        ensure!(!daemon.log().contains("fetching ahead"), "{}", daemon.log());
        ensure!(std::fs::read(daemon.root().join("etc/hostname"))? == expected);
        daemon.terminate()?;
    }
    Ok(())
}
