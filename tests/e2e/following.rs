//! A start of which nothing is known: what the opened files lead to comes by itself.

use std::fs;

use anyhow::Context as _;
use serde_json::json;
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::Journey;
use tests::recipes::noise;
use tests::{Result, ensure, needs_mounts, needs_programs};

/// Larger than a gap that is read over, so that nothing comes for lying beside something.
const APART: usize = 1 << 20;

/// A script and the modules that it leads to, each on its own in the blob, and one that it does not.
const SCRIPT: [(&str, &str); 6] = [
    ("srv/main.js", "require('./lib/a'); require('p');"),
    ("srv/lib/a.js", "require('../b.json'); // require('./unused')"),
    ("srv/b.json", "{}"),
    ("srv/node_modules/p/package.json", r#"{"main": "m.js"}"#),
    ("srv/node_modules/p/m.js", "import c from './c.mjs'"),
    ("srv/node_modules/p/c.mjs", "export default 1"),
];

fn ready(daemon: &Daemon) -> Result<u64> {
    daemon.get("/api/v1/metrics/blobcache")?["entries_count"].as_u64().context("entries_count")
}

/// With nothing read ahead for lying near: one read of a script brings what it loads and nothing else. Then
/// the source is emptied, and all of that reads right.
#[test]
fn a_script_brings_its_modules() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let mut files: Vec<(&str, &str)> = SCRIPT.to_vec();
    files.push(("srv/lib/unused.js", "'unused'"));
    let mut entries = vec![Entry::dir("./")];
    for (number, (path, text)) in (0..).zip(&files) {
        entries.push(Entry::file(*path, *text));
        entries.push(Entry::file(format!("noise/{number}"), noise(number, APART)));
    }
    let journey = Journey::start(&Image::new(vec![entries]))?;
    let nydus = journey.convert("nydus", &[])?;
    let (bootstrap, blobs) = (journey.path("image.boot"), nydus.path().join("blobs/sha256"));
    nydus.save_bootstrap(&bootstrap)?;
    let config = journey.path("config.json");
    let document = json!({
        "device": {
            "backend": { "type": "localfs", "config": { "dir": blobs } },
            "cache": { "type": "blobcache", "config": { "work_dir": journey.path("cache") } },
        },
        "mode": "direct", "amplify_io": 0, "read_timeout": 1,
    });
    fs::write(&config, document.to_string())?;

    let daemon = DaemonOptions::bootstrap(&bootstrap, &config).start()?;
    let read = |path: &str| fs::read_to_string(daemon.root().join(path));
    ensure!(read(SCRIPT[0].0)? == SCRIPT[0].1);
    daemon.wait_until("the modules come by themselves", |daemon| {
        Ok((ready(daemon)? >= SCRIPT.len() as u64).then_some(()))
    })?;
    for blob in nydus.data_blobs()? {
        fs::write(blobs.join(blob.digest.trim_start_matches("sha256:")), "")?;
    }
    for (path, text) in SCRIPT {
        ensure!(read(path)? == text, "{path}");
    }
    ensure!(ready(&daemon)? == SCRIPT.len() as u64, "more than it leads to: {}", ready(&daemon)?);
    let unused = read("srv/lib/unused.js");
    ensure!(unused.is_err(), "{unused:?}");
    Ok(())
}
