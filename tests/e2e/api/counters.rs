//! Counters to the last one: contract 3.8.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tests::relay::Rule;
use tests::scene::Scene;
use tests::{Result, needs_mounts, needs_programs, recipes};

use super::{Site, ask, get};

/// Two small files read once are two reads and their bytes, everywhere.
#[test]
fn a_read_counts_once_and_with_its_own_bytes() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let metrics = get(&daemon, "/api/v1/metrics?id=/")?;
    for key in [
        "files_account_enabled",
        "access_pattern_enabled",
        "record_latest_read_files_enabled",
        "measure_latency",
    ] {
        ensure!(metrics[key] == true, "{key}: {metrics}");
    }
    ensure!(get(&daemon, "/api/v1/metrics/files?latest=true")? == json!([]), "read before anybody read");
    ensure!(get(&daemon, "/api/v1/metrics/pattern")? == json!([]), "a pattern of nothing");

    let mut inodes = Vec::new();
    let mut total = 0;
    for (number, (file, class)) in [("etc/hostname", 0), ("data/one-byte", 0)].into_iter().enumerate() {
        let path = daemon.root().join(file);
        let read = fs::read(&path)?.len();
        total += read;
        inodes.push(fs::metadata(&path)?.ino());
        let metrics = get(&daemon, "/api/v1/metrics")?;
        ensure!(metrics["data_read"] == total, "{metrics}");
        ensure!(metrics["fop_hits"][4] == number + 1 && metrics["fop_errors"][4] == 0, "{metrics}");
        ensure!(metrics["block_count_read"][class] == number + 1, "{metrics}");
        ensure!(sum(&metrics["read_latency_dist"]) == number as u64 + 1, "{metrics}");
        ensure!(metrics["nr_opens"] == 0, "{metrics}");
        let files = get(&daemon, "/api/v1/metrics/files?id=/")?;
        let own = &files[inodes[number].to_string()];
        ensure!(
            own["data_read"] == read && own["fop_hits"][4] == 1 && own["block_count_read"][class] == 1,
            "{files}"
        );
        ensure!(own["total_fops"] == sum(&own["fop_hits"]) + sum(&own["fop_errors"]), "{files}");
    }
    let pattern = get(&daemon, "/api/v1/metrics/pattern?id=/")?;
    ensure!(pattern == get(&daemon, "/api/v1/metrics/pattern")?, "{pattern}");
    let read: Vec<_> =
        pattern.as_array().into_iter().flatten().map(|file| (&file["ino"], &file["nr_read"])).collect();
    ensure!(
        read == inodes
            .iter()
            .map(|ino| (json!(ino), json!(1)))
            .collect::<Vec<_>>()
            .iter()
            .map(|(a, b)| (a, b))
            .collect::<Vec<_>>(),
        "{pattern}"
    );

    let latest = get(&daemon, "/api/v1/metrics/files?latest=true")?;
    let mut listed: Vec<u64> = latest
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|run| {
            let run: Vec<u64> = run.as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
            run[0]..=run[run.len() - 1]
        })
        .collect();
    listed.sort_unstable();
    inodes.sort_unstable();
    ensure!(listed == inodes, "{latest}");
    ensure!(get(&daemon, "/api/v1/metrics/files?latest=true")? == json!([]), "told twice");
    Ok(())
}

/// Sizes fall into their classes; a read at the end of the file is one of no bytes.
#[test]
fn reads_fall_into_classes_by_what_they_got() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let path = daemon.root().join("data/noise-a");
    let size = fs::metadata(&path)?.len();
    // Past the page cache: each read is one request.
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
    let mut expected = [0_u64; 8];
    let mut total = 0;
    for (len, class) in [(512, 0), (1024, 1), (4096, 2), (16 << 10, 3), (64 << 10, 4), (128 << 10, 5)] {
        let mut buffer = vec![0; len];
        file.read_exact_at(&mut buffer, 0)?;
        expected[class] += 1;
        total += len as u64;
    }
    // 17 bytes are left behind the last whole piece, then nothing is.
    let mut buffer = vec![0; 4096];
    let tail = file.read_at(&mut buffer, size - 17)?;
    ensure!(tail == 17, "{tail}");
    expected[0] += 1;
    total += 17;
    let metrics = get(&daemon, "/api/v1/metrics")?;
    ensure!(metrics["block_count_read"] == json!(expected), "{metrics}");
    ensure!(
        metrics["data_read"] == total && metrics["fop_hits"][4] == expected.iter().sum::<u64>(),
        "{metrics}"
    );
    let before = metrics["fop_hits"][4].as_u64().context("no number")?;
    ensure!(file.read_at(&mut buffer, size + 4096)? == 0, "bytes behind the end");
    let metrics = get(&daemon, "/api/v1/metrics")?;
    ensure!(
        metrics["data_read"] == total && metrics["fop_hits"][4].as_u64() <= Some(before + 1),
        "{metrics}"
    );
    Ok(())
}

fn sum(counters: &Value) -> u64 {
    counters.as_array().into_iter().flatten().filter_map(Value::as_u64).sum()
}

/// What the backend gave is what the cache took; what is fetched ahead shows when, how much and
/// by how many.
#[test]
fn backend_and_cache_tell_the_same_story() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let backend = get(&daemon, "/api/v1/metrics/backend?id=/")?;
    ensure!(backend["backend_type"] == "localfs" && backend["read_errors"] == 0, "{backend}");
    fs::read(daemon.root().join("data/one-chunk"))?;
    // Readers are answered before what they read is kept.
    let cache = daemon.wait_until("what was read is kept", |daemon| {
        let cache = get(daemon, "/api/v1/metrics/blobcache")?;
        Ok((cache["entries_count"].as_u64() > Some(0)).then_some(cache))
    })?;
    let backend = get(&daemon, "/api/v1/metrics/backend")?;
    let count = backend["read_count"].as_u64().context("no count")?;
    ensure!(count > 0 && sum(&backend["read_count_block_size_dist"]) == count, "{backend}");
    let by_both: u64 = backend["read_latency_sizes_dist"].as_array().into_iter().flatten().map(sum).sum();
    ensure!(by_both == count, "{backend}");
    let millis = &backend["read_cumulative_latency_millis_total"];
    ensure!(*millis == sum(&backend["read_cumulative_latency_millis_dist"]), "{backend}");
    ensure!(backend["read_amount_total"] == cache["fetched_bytes"], "{backend} {cache}");
    ensure!(cache["prefetch_data_amount"] == 0 && cache["prefetch_begin_time_secs"] == 0, "{cache}");
    ensure!(cache["data_all_ready"] == false, "{cache}");
    ensure!(
        cache["total"]
            == cache["whole_hits"].as_u64().unwrap_or(0)
                + cache["partial_hits"].as_u64().unwrap_or(0)
                + cache["misses"].as_u64().unwrap_or(0),
        "{cache}"
    );

    let began = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let answer = ask(&daemon, "POST", "/api/v1/prefetch", r#"{"all":true}"#)?;
    ensure!(answer.status == 200, "{answer:?}");
    let cache = daemon.wait_until("all is there", |daemon| {
        let cache = get(daemon, "/api/v1/metrics/blobcache?id=/site")?;
        Ok((cache["data_all_ready"] == true && cache["prefetch_workers"] == 0).then_some(cache))
    })?;
    let number = |key: &str| cache[key].as_u64().with_context(|| format!("{key}: {cache}"));
    ensure!(number("prefetch_data_amount")? > 0 && number("prefetch_requests_count")? > 0, "{cache}");
    ensure!(number("prefetch_unmerged_chunks")? <= number("prefetch_requests_count")?, "{cache}");
    let (first, last) = (number("prefetch_begin_time_secs")?, number("prefetch_end_time_secs")?);
    ensure!((began..=last).contains(&first) && number("prefetch_begin_time_millis")? < 1000, "{cache}");
    ensure!(cache["store_path"] == site.journey.path("cache").display().to_string(), "{cache}");
    let files = cache["underlying_files"].as_array().context("no files")?;
    ensure!(!files.is_empty(), "{cache}");
    for file in files {
        let path = site.journey.path("cache").join(file.as_str().context("no name")?);
        ensure!(path.exists(), "{} is not there", path.display());
    }
    Ok(())
}

/// A read that waits for its source is in flight, with its inode and since when; then it is not.
/// The server that it waits for is counted by name.
#[test]
fn a_read_in_flight_is_told_while_it_is() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::set(&recipes::tiny(), &[])?;
    let daemon = scene.options().flag("--trace", "off").start()?;
    ensure!(ask(&daemon, "GET", "/api/v1/metrics/inflight", "")?.status == 204, "a read before the first");
    let path = daemon.root().join("data/one-chunk");
    let inode = fs::metadata(&path)?.ino();
    // What the mount fetches by itself goes first.
    daemon.wait_until("nothing is fetched ahead", |daemon| {
        Ok((get(daemon, "/api/v1/metrics/blobcache")?["prefetch_workers"] == 0).then_some(()))
    })?;
    scene.relay.set(Rule::Stall);
    let reader = std::thread::spawn(move || fs::read(path));
    let entries = daemon.wait_until("the read is in flight", |daemon| {
        let answer = ask(daemon, "GET", "/api/v1/metrics/inflight", "")?;
        if answer.status == 204 { Ok(None) } else { answer.json().map(Some) }
    })?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    for entry in entries.as_array().context("no list")? {
        ensure!(entry["inode"] == inode && entry["opcode"] == 15, "{entries}");
        ensure!(entry["unique"].is_u64(), "{entries}");
        ensure!(entry["timestamp_secs"].as_u64().is_some_and(|at| at <= now && at + 600 > now), "{entries}");
    }
    scene.relay.set(Rule::Pass);
    ensure!(reader.join().is_ok_and(|read| read.is_ok()), "the read failed");
    ensure!(ask(&daemon, "GET", "/api/v1/metrics/inflight", "")?.status == 204, "still in flight");

    let name = format!("http://{}", scene.relay.address());
    // What is guessed at may still be on its way between two looks.
    daemon.wait_until("both tell the same", |daemon| {
        let backend = get(daemon, "/api/v1/metrics/backend")?;
        let origins = backend["origins"].as_array().into_iter().flatten();
        let origin = origins.clone().find(|origin| origin["origin"] == name.as_str());
        let origin = origin.with_context(|| format!("{name}: {backend}"))?;
        let requests = origin["requests"].as_u64().context("no number")?;
        ensure!(requests > 0 && origin["bytes"].as_u64() > Some(0), "{backend}");
        let text = String::from_utf8(ask(daemon, "GET", "/metrics", "")?.body)?;
        let sample = format!("nydus_origin_requests_total{{mount=\"/\",origin=\"{name}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&sample)).context("no sample")?;
        Ok((line.parse::<f64>()? == requests as f64).then_some(()))
    })?;
    Ok(())
}
