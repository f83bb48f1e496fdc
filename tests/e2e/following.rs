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

/// A program that is linked with nothing but an interpreter that is not there (elf(5)).
fn program() -> Vec<u8> {
    const INTERPRETER: &[u8] = b"/lib/ld.so\0";
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let header: [(u64, usize); 13] = [
        (3, 2),
        (62, 2),
        (1, 4),
        (0, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (1, 2),
        (0, 2),
        (0, 2),
        (0, 2),
    ];
    let (at, len) = (64 + 56, INTERPRETER.len() as u64);
    let segment = [(3, 4), (4, 4), (at, 8), (at, 8), (at, 8), (len, 8), (len, 8), (1, 8)];
    for (value, size) in header.into_iter().chain(segment) {
        file.extend_from_slice(&value.to_le_bytes()[..size]);
    }
    [file.as_slice(), INTERPRETER].concat()
}

fn ready(daemon: &Daemon) -> Result<u64> {
    daemon.get("/api/v1/metrics/blobcache")?["entries_count"].as_u64().context("entries_count")
}

/// With nothing read ahead for lying near: the script of a program brings what it loads and nothing else. Then
/// the source is emptied, and all of that reads right.
#[test]
fn a_script_brings_its_modules() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let mut files: Vec<(&str, &str)> = SCRIPT.to_vec();
    files.push(("srv/lib/unused.js", "'unused'"));
    let mut entries = vec![Entry::dir("./"), Entry::file("bin/node", program())];
    entries.push(Entry::file("noise/first", noise(99, APART)));
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
    // A script says nothing without the program that runs it, and is opened first by the kernel.
    ensure!(read(SCRIPT[0].0)? == SCRIPT[0].1);
    ensure!(fs::read(daemon.root().join("bin/node"))? == program());
    let all = SCRIPT.len() as u64 + 1;
    daemon
        .wait_until("the modules come by themselves", |daemon| Ok((ready(daemon)? >= all).then_some(())))?;
    for blob in nydus.data_blobs()? {
        fs::write(blobs.join(blob.digest.trim_start_matches("sha256:")), "")?;
    }
    for (path, text) in SCRIPT {
        ensure!(read(path)? == text, "{path}");
    }
    ensure!(ready(&daemon)? == all, "more than it leads to: {}", ready(&daemon)?);
    let unused = read("srv/lib/unused.js");
    ensure!(unused.is_err(), "{unused:?}");
    Ok(())
}
