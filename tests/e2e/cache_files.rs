//! What `create --blob-cache-dir` writes is what the cache of a daemon holds that has fetched it all.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::json;
use tests::command::run;
use tests::daemon::DaemonOptions;
use tests::image::{Entry, Image, sha256_hex, tar_bytes};
use tests::journey::{Journey, nydus_image};
use tests::recipes::{noise, prose};
use tests::{Context, Result, ensure, needs_mounts};

fn layer() -> Vec<Entry> {
    let mut entries = vec![
        Entry::dir("./"),
        Entry::file("noise", noise(1, (2 << 20) + 17)),
        Entry::file("prose", prose(2, (3 << 20) + 4097)),
        Entry::file("same", noise(1, 1 << 20)),
        Entry::file("zeros", vec![0; 3 << 20]),
        Entry::file("empty", ""),
    ];
    entries.extend((0..200).map(|n| Entry::file(format!("small{n}"), prose(n, n as usize * 37))));
    entries
}

#[test]
fn files_are_those_that_a_daemon_leaves() -> Result<()> {
    needs_mounts!();
    for (kind, flags, has_context) in [
        ("targz-ref", &[][..], true),
        ("tar-rafs", &[][..], true),
        ("tar-rafs", &["--batch-size", "0x10000"][..], true),
        ("tar-rafs", &["-v", "5"][..], false),
    ] {
        equal(kind, flags, has_context).with_context(|| format!("{kind} {flags:?}"))?;
    }
    Ok(())
}

fn equal(kind: &str, flags: &[&str], has_context: bool) -> Result<()> {
    let journey = Journey::start(&Image::new(vec![]))?;
    let source = journey.path("layer");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar_bytes(&layer())?)?;
    let bytes = encoder.finish()?;
    fs::write(&source, &bytes)?;
    let [boot, blobs, json] = ["boot", "blobs", "json"].map(|name| journey.path(name));
    let create = |boot: &Path, place: &str, dir: &Path| {
        let mut create = nydus_image("create", ["-l", "warn", "--type", kind]);
        create.args(flags).arg("-J").arg(&json).arg("-B").arg(boot).arg(place).arg(dir).arg(&source);
        run(&mut create).map(drop)
    };
    create(&boot, "--blob-dir", &blobs)?;
    fs::write(blobs.join(sha256_hex(&bytes)), &bytes)?;
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(&json)?)?;
    let id = summary["blobs"][0].as_str().context("no blob")?;

    let (again, ours) = (journey.path("again"), journey.path("ours"));
    create(&again, "--blob-cache-dir", &ours)?;
    ensure!(fs::read(&again)? == fs::read(&boot)?, "another image");
    let mut names = Vec::new();
    for entry in fs::read_dir(&ours)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let mut wanted = vec![format!("{id}.blob.data")];
    wanted.extend(has_context.then(|| format!("{id}.blob.meta")));
    ensure!(names == wanted, "{names:?}");

    let (config, cache) = (journey.path("config.json"), journey.path("cache"));
    let text = json!({
        "device": {
            "backend": { "type": "localfs", "config": { "dir": blobs } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
        "fs_prefetch": { "enable": true, "threads_count": 4, "prefetch_all": true },
    });
    fs::write(&config, text.to_string())?;
    // Nothing is read through the mount.
    let daemon = DaemonOptions::bootstrap(&boot, &config).start()?;
    for name in wanted {
        let ours = fs::read(ours.join(&name))?;
        daemon.wait_until(&name, |_| {
            let theirs = fs::read(cache.join(&name)).unwrap_or_default();
            Ok((theirs == ours).then_some(()))
        })?;
    }
    Ok(())
}
