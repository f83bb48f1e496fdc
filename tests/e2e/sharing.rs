//! Several daemons, one cache directory.

use std::collections::BTreeMap;

use tests::daemon::DaemonOptions;
use tests::journey::{Journey, convert};
use tests::registry::Registry;
use tests::relay::{Fetch, Relay};
use tests::tree::{Overlook, assert_same};
use tests::{Context, Result, ensure, needs_mounts, needs_programs, recipes};

/// Two daemons start the same image at once on one cache directory: each byte of chunk data is
/// fetched once, and both trees are right.
#[test]
fn two_daemons_fetch_each_chunk_once() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry");
    let journey = Journey::start(&recipes::tiny())?;
    let wanted = journey.reference()?;
    let registry = Registry::open()?;
    let relay = Relay::start(registry.address())?;
    let flags = ["--chunk-size", "0x10000"];
    convert(&journey.source.reference(), &registry.reference("shared"), &flags)?;
    let nydus = journey.convert("nydus", &flags)?;
    let (bootstrap, config) = (journey.path("image.boot"), journey.path("config.json"));
    nydus.save_bootstrap(&bootstrap)?;
    let text = serde_json::json!({
        "version": 2,
        // A late answer is asked for once more, which is no fault.
        "backend": { "type": "registry", "registry": {
            "scheme": "http", "host": relay.address().to_string(), "repo": "shared", "hedge": false,
        } },
        "cache": { "type": "filecache", "filecache": { "work_dir": journey.path("cache") } },
    });
    std::fs::write(&config, text.to_string())?;
    let options = DaemonOptions::bootstrap(&bootstrap, &config);
    let (first, second) = (options.start()?, options.start()?);
    relay.forget();
    std::thread::scope(|scope| -> Result<()> {
        let readers: Vec<_> = [&first, &second]
            .map(|daemon| scope.spawn(|| assert_same(&wanted, daemon.root(), Overlook::default())))
            .into_iter()
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("readers do not panic"))
    })?;

    let mut ranges: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
    for Fetch { digest, range } in relay.fetches() {
        ranges.entry(digest).or_default().extend(range);
    }
    let mut blobs = 0;
    for blob in nydus.data_blobs()? {
        let Some(mut asked) = ranges.remove(&blob.digest) else { continue };
        blobs += 1;
        let data = data_size(&nydus.blob(&blob.digest)?)?;
        // Behind the chunk data stand tables, which every daemon may want for itself.
        asked.retain(|(start, _)| *start < data);
        asked.sort_unstable();
        for pair in asked.windows(2) {
            ensure!(pair[0].1 < pair[1].0, "{} was asked for {:?} and {:?}", blob.digest, pair[0], pair[1]);
        }
    }
    ensure!(blobs > 0, "no blob was fetched through the relay");
    Ok(())
}

/// Length of the chunk data at the start of a blob file: the size in the tar header that follows
/// it, named `image.blob`.
fn data_size(blob: &[u8]) -> Result<u64> {
    let name = b"image.blob\0";
    let is_header = |place: usize| blob.get(place + 257..place + 262) == Some(b"ustar");
    let header = (0..blob.len().saturating_sub(512))
        .find(|place| blob[*place..].starts_with(name) && is_header(*place))
        .context("no header of the data")?;
    let digits = &blob[header + 124..header + 135];
    Ok(u64::from_str_radix(std::str::from_utf8(digits)?.trim_matches('\0').trim(), 8)?)
}
