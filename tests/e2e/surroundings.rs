//! What a build is made in does not change what it makes: threads, umask, time zone, locale, and the
//! order in which the file system lists directories.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use tests::command::run;
use tests::image::{Entry, sha256_hex, tar_bytes};
use tests::recipes::{noise, prose};
use tests::tree::regular_files;
use tests::{Context, Result, binaries, ensure, tree};

/// Enough for many batches, in directories of many names; the order of names is `backwards` or not.
fn entries(backwards: bool) -> Vec<Entry> {
    let mut entries = vec![
        Entry::dir("./").mode(0o755),
        Entry::file("large", noise(3, (5 << 20) + 3)).xattr("user.b", b"2").xattr("user.a", b"1"),
    ];
    for dir in 0..4 {
        entries.push(Entry::dir(format!("d{dir}")).mtime(86_399, 7));
        entries.push(Entry::hard_link(format!("d{dir}/large"), "large"));
        entries.extend((0..60u64).map(|n| {
            let n = if backwards { 59 - n } else { n };
            let bytes = prose(n, 1 + 977 * n as usize);
            Entry::file(format!("d{dir}/{}", sha256_hex(&[dir, n as u8])), bytes).mtime(1_700_000_000, 5)
        }));
    }
    entries.push(Entry::file("ärger", prose(7, 3 << 20)));
    entries
}

/// Writes `entries` as `NAME.tar` and unpacks it into the new directory `NAME`.
fn unpacked(name: &Path, entries: &[Entry]) -> Result<()> {
    let tar = name.with_extension("tar");
    fs::write(&tar, tar_bytes(entries)?)?;
    fs::create_dir(name)?;
    let flags = ["--xattrs", "--xattrs-include=*", "--same-owner", "-xpf"];
    run(Command::new("tar").args(flags).arg(&tar).arg("-C").arg(name)).map(drop)
}

/// Names as the file system lists them.
fn listed(directory: &Path) -> Result<Vec<String>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Every file below `directory` by its path there.
fn files(directory: &Path) -> Result<BTreeMap<String, String>> {
    regular_files(&tree::scan(directory)?, directory)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(directory)?.to_string_lossy().into_owned();
            Ok((name, sha256_hex(&fs::read(&path)?)))
        })
        .collect()
}

/// `nydus-image ARGS`: as the tests run, or alone on one processor with everything else odd.
fn build(odd: bool, args: &[&str]) -> Result<()> {
    let mut command = if odd {
        let status = fs::read_to_string("/proc/self/status")?;
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let first: String = allowed
            .context("no list of processors")?
            .trim()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        let mut command = Command::new("sh");
        command.args(["-c", "umask 0077; exec taskset -c \"$0\" \"$@\"", &first]);
        command.arg(binaries::nydus_image());
        command.envs([("TZ", "Asia/Kathmandu"), ("LC_ALL", "tr_TR.UTF-8"), ("LANG", "tr_TR.UTF-8")]);
        command
    } else {
        let mut command = Command::new(binaries::nydus_image());
        command.envs([("TZ", "UTC"), ("LC_ALL", "C")]);
        command
    };
    run(command.args(args)).map(drop)
}

#[test]
fn builds_do_not_depend_on_their_surroundings() -> Result<()> {
    // A tmpfs lists names by their age.
    let scratch = tempfile::tempdir_in("/dev/shm")?;
    let (here, there) = (scratch.path().join("here"), scratch.path().join("there"));
    unpacked(&here, &entries(false))?;
    unpacked(&there, &entries(true))?;
    ensure!(listed(&here.join("d0"))? != listed(&there.join("d0"))?, "both list names in the same order");
    let tar = here.with_extension("tar");
    run(Command::new("gzip").arg("-kn").arg(&tar))?;
    let gzipped = here.with_extension("tar.gz");

    let directory = [here.as_path(), there.as_path()];
    let (tar, gzipped) = ([tar.as_path(); 2], [gzipped.as_path(); 2]);
    let builds: [(&str, &[&str], [&Path; 2]); 8] = [
        ("directory", &[], directory),
        ("directory, v5", &["--fs-version", "5"], directory),
        ("directory, batches", &["--batch-size", "0x10000", "--compressor", "lz4_block"], directory),
        ("directory, toc", &["--features", "blob-toc", "--chunk-size", "0x10000"], directory),
        ("tar", &["--type", "tar-rafs"], tar),
        ("gzip", &["--type", "targz-rafs", "--digester", "sha256"], gzipped),
        ("zran", &["--type", "targz-ref"], gzipped),
        ("tarfs", &["--type", "tar-tarfs"], tar),
    ];
    for (number, (what, flags, sources)) in builds.into_iter().enumerate() {
        let mut made = Vec::new();
        for (odd, source) in [false, true].into_iter().zip(sources) {
            let out = scratch.path().join(format!("out{number}{odd}"));
            fs::create_dir(&out)?;
            let at = |name: &str| out.join(name).to_string_lossy().into_owned();
            let (bootstrap, blobs) = (at("bootstrap"), at("blobs"));
            let source = source.to_string_lossy();
            let fixed =
                ["create", "--log-level", "warn", "--bootstrap", &bootstrap, "--blob-dir", &blobs, &source];
            build(odd, &[&fixed[..], flags].concat())?;
            made.push(files(&out)?);
        }
        ensure!(!made[0].is_empty() && made[0] == made[1], "{what}: {:?} and {:?}", made[0], made[1]);
    }
    Ok(())
}
