//! The restrictions of the systemd unit, without systemd.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;
use tests::command::run;
use tests::journey::Journey;
use tests::mount::mounted;
use tests::successor::Place;
use tests::{Context, Result, ensure, needs_mounts, needs_programs, recipes};

/// Capabilities that the unit leaves, as setpriv wants them.
fn left() -> Result<String> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../misc/packaging/nydusd@.service");
    let unit = fs::read_to_string(&unit).with_context(|| unit.display().to_string())?;
    let lines = unit.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let names: Vec<String> = lines
        .flat_map(str::split_whitespace)
        .map(|name| name.trim_start_matches("CAP_").to_ascii_lowercase())
        .collect();
    ensure!(!names.is_empty() && unit.contains("NoNewPrivileges=yes"), "another unit than this test knows");
    Ok(names.iter().fold("-all".to_owned(), |all, name| format!("{all},+{name}")))
}

/// With these and no others a supervised daemon mounts an image from a cache of another owner, makes files of any kind
/// and owner in a directory of the host, is upgraded, and ends.
#[test]
fn its_capabilities_suffice() -> Result<()> {
    needs_mounts!();
    needs_programs!("setpriv", "python3");
    let journey = Journey::start(&recipes::tiny())?;
    let layout = journey.convert("nydus", &[])?;
    let (bootstrap, cache) = (journey.path("image.boot"), journey.path("cache"));
    layout.save_bootstrap(&bootstrap)?;
    fs::set_permissions(&bootstrap, Permissions::from_mode(0o400))?;
    fs::create_dir(&cache)?;
    for path in [&bootstrap, &cache] {
        chown(path, Some(1234), Some(1234))?;
    }
    let host = journey.path("host");
    fs::create_dir(&host)?;
    fs::set_permissions(&host, Permissions::from_mode(0o777))?;
    let config = json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": layout.path().join("blobs/sha256") } },
        "cache": { "type": "filecache", "filecache": { "work_dir": cache } },
    });

    let bounds = format!("--bounding-set={}", left()?);
    let place = Place::new(&["--writable"])?.through(&["setpriv", &bounds, "--no-new-privs"]);
    let mut holder = place.supervise("api.sock")?;
    holder.wait_state("RUNNING", &["INIT", "READY"])?;
    for (at, kind, source, config) in
        [("/image", "rafs", &bootstrap, config.to_string()), ("/host", "passthroughfs", &host, String::new())]
    {
        let body = json!({ "fs_type": kind, "source": source, "config": config }).to_string();
        holder.expect("POST", &format!("/api/v1/mount?mountpoint={at}"), &body, 204, "")?;
    }
    let (image, root) = (place.root().join("image"), place.root().join("host"));
    let content = fs::read(image.join("data/one-chunk"))?;

    let file = root.join("file");
    fs::write(&file, "content")?;
    chown(&file, Some(77), Some(78))?;
    fs::set_permissions(&file, Permissions::from_mode(0o6000))?;
    // The empty set of capabilities, in the encoding of version 2.
    xattr::set(&file, "security.capability", &[&[0, 0, 0, 2][..], &[0; 16]].concat())?;
    ensure!(fs::read(&file)? == b"content");
    let made = fs::metadata(host.join("file"))?;
    ensure!((made.uid(), made.gid(), made.mode() & 0o7777) == (77, 78, 0o6000), "{made:?}");
    mknod(&root.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(1, 3))?;
    let mut python = Command::new("python3");
    fs::set_permissions(
        place.root().parent().context("a mountpoint is in a directory")?,
        Permissions::from_mode(0o755),
    )?;
    run(python.args(["-c", "import os; os.mkdir('theirs')"]).current_dir(&root).uid(4321).gid(4321))?;
    ensure!(fs::metadata(host.join("theirs"))?.uid() == 4321);

    holder.signal(Signal::SIGHUP)?;
    place.wait_child(2)?;
    holder.wait_state("RUNNING", &["INIT", "READY", "STOPPED"])?;
    ensure!(fs::read(image.join("data/one-chunk"))? == content && fs::read(&file)? == b"content");
    fs::write(root.join("later"), "later")?;
    holder.signal(Signal::SIGTERM)?;
    let status = holder.wait()?;
    ensure!(status.code() == Some(0) && !mounted(place.root()), "{status}: {}", place.log());
    Ok(())
}
