//! Start-up traces: what one start reads is fetched ahead of the next one, on this node and on others.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tests::command::run;
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::{Journey, convert};
use tests::oci_server::OciServer;
use tests::recipes::BIG_FILES;
use tests::registry::Registry;
use tests::{Result, binaries, needs_mounts, needs_programs, recipes};

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
    daemon.wait_until("the chunks come by themselves", |daemon| {
        let ready = daemon.get("/api/v1/metrics/blobcache")?["entries_count"].as_u64();
        Ok((ready >= Some(count)).then_some(()))
    })
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

/// Requests and of these those for readers, of one daemon's source. What is fetched ahead counts before its answer
/// has come.
fn requests(daemon: &Daemon) -> Result<(u64, u64)> {
    let all = daemon.get("/api/v1/metrics/backend")?["read_count"].as_u64().context("read_count")?;
    let cache = daemon.get("/api/v1/metrics/blobcache")?;
    let ahead = cache["prefetch_requests_count"].as_u64().context("prefetch_requests_count")?;
    Ok((all, all.saturating_sub(ahead)))
}

/// What one node read at the start, pushed as a referrer, is fetched ahead on another node that
/// has nothing of the image: its reads wait for nothing.
fn a_pushed_trace_helps_another_node(reference: &str) -> Result<()> {
    let journey = Journey::start(&recipes::tiny())?;
    convert(&journey.source.reference(), reference, &["--hints", "off"])?;
    let files = [BIG_FILES[0], "etc/hostname", BIG_FILES[2]];
    let read = |daemon: &Daemon| -> Result<Vec<Vec<u8>>> {
        files.iter().map(|file| Ok(std::fs::read(daemon.root().join(file))?)).collect()
    };

    let mut first = DaemonOptions::image(reference, &journey.path("first")).start()?;
    let expected = read(&first)?;
    // It has nothing to go by. A request counts when all of its answer has come.
    first.wait_until("a request for a reader", |daemon| {
        let (_, demanded) = requests(daemon)?;
        Ok((demanded > 0).then_some(()))
    })?;
    let trace: Value = serde_json::from_str(&nydusctl_trace(&first, &["--json"])?)?;
    let said = nydusctl_trace(&first, &["push"])?;
    ensure!(said.starts_with("pushed as sha256:"), "{said}");
    let again = nydusctl_trace(&first, &["push"])?;
    ensure!(again.contains("knows as much"), "{again}");
    first.terminate()?;

    let second = DaemonOptions::image(reference, &journey.path("second")).start()?;
    wait_for_chunks(&second, chunks(&trace))?;
    let (before, _) = requests(&second)?;
    ensure!(read(&second)? == expected);
    let (after, demanded) = requests(&second)?;
    ensure!((after, demanded) == (before, 0), "{before} requests, then {after}, {demanded} of them demanded");
    let cache = second.get("/api/v1/metrics/blobcache")?;
    ensure!(cache["misses"] == 0 && cache["partial_hits"] == 0, "{cache}");
    Ok(())
}

/// Debian's registry does not know the referrers API: the index under the image's tag does it.
#[test]
fn a_trace_is_shared_by_tag() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let registry = Registry::open()?;
    a_pushed_trace_helps_another_node(&registry.reference("app:1"))
}

/// With the referrers API nothing is tagged.
#[test]
fn a_trace_is_shared_by_the_referrers_api() -> Result<()> {
    needs_mounts!();
    let registry = OciServer::start()?;
    a_pushed_trace_helps_another_node(&registry.reference("app:1"))?;
    let asked = registry.asked();
    ensure!(!asked.iter().any(|request| request.contains("/manifests/sha256-")), "{asked:?}");
    ensure!(asked.iter().any(|request| request.starts_with("GET /v2/app/referrers/sha256:")), "{asked:?}");
    Ok(())
}

/// A start that was recorded is pushed by itself, if that is asked for.
#[test]
fn a_daemon_pushes_what_it_recorded() -> Result<()> {
    needs_mounts!();
    let registry = OciServer::start()?;
    let reference = registry.reference("app:1");
    let journey = Journey::start(&recipes::tiny())?;
    convert(&journey.source.reference(), &reference, &[])?;
    // The recording ends soon after the first read.
    let daemon = DaemonOptions::image(&reference, &journey.path("cache"))
        .flag("--trace-seconds", "0.1")
        .switch("--push-trace")
        .start()?;
    std::fs::read(daemon.root().join("etc/hostname"))?;
    daemon.wait_for_log("the trace was pushed as sha256:").map(drop)
}

/// What lies beside the image in the registry is nobody's word: a trace of another image, garbage
/// and one without end are ignored, and the mount serves.
#[test]
fn a_bad_trace_in_the_registry_does_no_harm() -> Result<()> {
    needs_mounts!();
    let registry = OciServer::start()?;
    let reference = registry.reference("app:1");
    let journey = Journey::start(&recipes::tiny())?;
    convert(&journey.source.reference(), &reference, &["--hints", "off"])?;
    let mut first = DaemonOptions::image(&reference, &journey.path("cache")).start()?;
    let expected = std::fs::read(first.root().join("etc/hostname"))?;
    nydusctl_trace(&first, &["push"])?;
    let good = nydusctl_trace(&first, &["--json"])?;
    first.terminate()?;
    let bootstrap = serde_json::from_str::<Value>(&good)?["bootstrap"].to_string();
    for (number, (bad, why)) in [
        (good.replace(&bootstrap, "\"sha256:00\"").into_bytes(), "another image"),
        (b"[[[[".to_vec(), "not a trace"),
        (vec![b' '; 5 << 20], "bytes: want 1 to"),
    ]
    .into_iter()
    .enumerate()
    {
        registry.replace_referrer(&bad)?;
        let daemon = DaemonOptions::image(&reference, &journey.path(&number.to_string())).start()?;
        ensure!(std::fs::read(daemon.root().join("etc/hostname"))? == expected);
        daemon.wait_for_log(why)?;
        ensure!(!daemon.log().contains("fetching ahead"), "{}", daemon.log());
    }
    Ok(())
}
