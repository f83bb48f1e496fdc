//! Memory of `nydus-image`: at most 96 MiB, 256 bytes an entry, 64 a chunk, and three chunks a thread.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tests::journey::nydus_image;
use tests::{Context, Result, ensure};

/// Entries of one directory.
const DIRECTORY: u64 = 400;
/// How often memory is looked at; it stays at its peak much longer.
const INTERVAL: Duration = Duration::from_millis(2);

/// A tar of `entries` small files, all different.
fn small_files(path: &Path, entries: u64) -> Result<()> {
    let mut tar = tar::Builder::new(BufWriter::new(File::create(path)?));
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    for number in 0..entries {
        let content = number.to_string();
        header.set_size(content.len() as u64);
        let name = format!("app/node_modules/module-{}/lib/index-{number:08}-util.js", number / DIRECTORY);
        tar.append_data(&mut header, name, content.as_bytes())?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

/// Most kilobytes that the command had for itself.
fn peak<S: AsRef<OsStr>>(log: &Path, command: &str, arguments: impl IntoIterator<Item = S>) -> Result<u64> {
    let mut child =
        nydus_image(command, arguments).stdout(Stdio::null()).stderr(File::create(log)?).spawn()?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let code = loop {
        // The child is there until it was waited for.
        let text = fs::read_to_string(&status)?;
        let lines = text.lines().filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssShmem:"));
        let now = lines.map(|line| {
            let number = line.split_whitespace().nth(1).context("no number")?;
            Ok(number.parse::<u64>()?)
        });
        peak = peak.max(now.sum::<Result<u64>>()?);
        if let Some(code) = child.try_wait()? {
            break code;
        }
        std::thread::sleep(INTERVAL);
    };
    ensure!(code.success(), "{command}: {code}: {}", fs::read_to_string(log)?);
    ensure!(peak > 0, "{command}: nothing was measured");
    Ok(peak)
}

/// For as many entries that these are most of it (`NYDUS_TEST_ENTRIES`; `make soak`: a million).
#[test]
fn memory_is_bounded_by_what_there_is() -> Result<()> {
    let entries: u64 = match std::env::var("NYDUS_TEST_ENTRIES") {
        Ok(text) => text.parse().context("NYDUS_TEST_ENTRIES")?,
        Err(_) => 200_000,
    };
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (source, boot, blobs) = (path("layer.tar"), path("image.boot"), path("blobs"));
    fs::create_dir(&blobs)?;
    small_files(Path::new(&source), entries)?;
    let threads = std::thread::available_parallelism()?.get() as u64;
    let all_entries = entries + entries.div_ceil(DIRECTORY) * 2;
    let most = (96 << 10) + (256 * all_entries + 64 * entries) / 1024 + 3 * 1024 * threads;
    let rows: [(&str, &str); 9] = [
        ("create", "-t tar-rafs -D {blobs} -B {boot} {source}"),
        ("create", "-t tar-rafs -v 5 -D {blobs} -B {boot}.v5 {source}"),
        ("create", "-t tar-rafs --blob-inline-meta --features blob-toc -b {boot}.blob {source}"),
        ("create", "-t targz-ref -D {blobs} -B {boot}.ref {source}"),
        ("create", "-t tar-tarfs -D {blobs} -B {boot}.tarfs {source}"),
        ("merge", "-B {boot}.merged {boot}"),
        ("check", "-B {boot}"),
        ("unpack", "-B {boot} -D {blobs} --output {boot}.tar"),
        ("compact", "-B {boot} -D {blobs} --output-bootstrap {boot}.compact"),
    ];
    for (command, arguments) in rows {
        let arguments =
            arguments.replace("{blobs}", &blobs).replace("{boot}", &boot).replace("{source}", &source);
        let peak = peak(&dir.path().join("log"), command, arguments.split(' '))?;
        println!("{entries} entries: {} MiB of {}: {command} {arguments}", peak >> 10, most >> 10);
        ensure!(peak <= most, "{peak} kB, at most {most} are promised: {command} {arguments}");
    }
    Ok(())
}
