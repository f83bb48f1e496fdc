//! One daemon, many images: mounted, remounted and unmounted through the API while it serves.
//!
//! The client speaks literal bytes on the socket and shares no type with the server.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::Journey;
use tests::recipes::{self, noise};
use tests::tree::{self, Overlook};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// An image with its blobs, ready to be mounted by an API client.
pub(super) struct Ready {
    journey: Journey,
    pub(super) bootstrap: PathBuf,
    pub(super) config: String,
}

impl Ready {
    pub(super) fn new(image: &Image) -> Result<Self> {
        let journey = Journey::start(image)?;
        let nydus = journey.convert("nydus", &["--chunk-size", "0x10000"])?;
        let bootstrap = journey.path("image.boot");
        nydus.save_bootstrap(&bootstrap)?;
        let (blobs, cache) = (nydus.path().join("blobs/sha256"), journey.path("cache"));
        // What the snapshotter sends, members that nobody knows among them.
        let config = format!(
            r#"{{"device":{{"id":"","backend":{{"type":"localfs","config":{{"dir":"{}","readahead":false}}}},"cache":{{"type":"blobcache","config":{{"work_dir":"{}"}}}}}},"mode":"direct","digest_validate":false,"enable_xattr":true,"fs_prefetch":{{"enable":false}}}}"#,
            blobs.display(),
            cache.display()
        );
        Ok(Self { journey, bootstrap, config })
    }

    /// A small image whose files say `word`.
    pub(super) fn saying(word: &str) -> Result<Self> {
        Self::new(&Image::new(vec![vec![
            Entry::dir("./").mode(0o755),
            Entry::file("word", word),
            Entry::file(format!("only-{word}"), ""),
            Entry::dir("d").mode(0o711),
            Entry::file("d/deep", word.repeat(1000)),
            Entry::dir("d/e"),
            Entry::hard_link("d/e/word", "word"),
        ]]))
    }

    fn body(&self) -> String {
        let config = self.config.replace('"', "\\\"");
        format!(
            r#"{{"fs_type":"rafs","source":"{}","config":"{config}","overlay":"{{}}"}}"#,
            self.bootstrap.display()
        )
    }

    pub(super) fn post(&self, daemon: &Daemon, mountpoint: &str) -> Result<()> {
        expect(daemon, "POST", mountpoint, &self.body(), 204, "")
    }

    pub(super) fn put(&self, daemon: &Daemon, mountpoint: &str) -> Result<()> {
        expect(daemon, "PUT", mountpoint, &self.body(), 204, "")
    }

    /// The next mount finds nothing of it on this machine.
    pub(super) fn forget_cache(&self) -> Result<()> {
        match fs::remove_dir_all(self.journey.path("cache")) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }
}

/// One request on a connection of its own: status and body.
pub(super) fn call(daemon: &Daemon, method: &str, mountpoint: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(daemon.socket())?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    write!(
        stream,
        "{method} /api/v1/mount?mountpoint={mountpoint} HTTP/1.1\r\nHost: unix\r\n{length}Connection: close\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    Ok((head.split(' ').nth(1).context("no status")?.parse()?, body.to_owned()))
}

/// The same, with the answer that is wanted.
fn expect(
    daemon: &Daemon,
    method: &str,
    mountpoint: &str,
    body: &str,
    status: u16,
    text: &str,
) -> Result<()> {
    let (found, answer) = call(daemon, method, mountpoint, body)?;
    ensure!(found == status, "{method} {mountpoint}: {found}, wanted {status}: {answer}");
    ensure!(answer.contains(text), "{method} {mountpoint}: no {text:?} in {answer}");
    let refusal = r#"{"code":"UNDEFINED","message":""#;
    ensure!(if status == 204 { answer.is_empty() } else { answer.starts_with(refusal) }, "{answer}");
    Ok(())
}

pub(super) fn delete(daemon: &Daemon, mountpoint: &str) -> Result<()> {
    expect(daemon, "DELETE", mountpoint, "", 204, "")
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    fs::read_dir(dir)
        .with_context(|| format!("list {}", dir.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn is(dir: &Path, wanted: &[&str]) -> Result<()> {
    let found = names(dir)?;
    let wanted: BTreeSet<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
    ensure!(found == wanted, "{}: {found:?}, wanted {wanted:?}", dir.display());
    Ok(())
}

fn says(dir: &Path, word: &str) -> Result<()> {
    let found = fs::read_to_string(dir.join("word"))?;
    ensure!(found == word, "{} says {found:?}, wanted {word:?}", dir.display());
    is(dir, &["word", &format!("only-{word}"), "d"])?;
    ensure!(dir.join(format!("only-{word}")).exists());
    Ok(())
}

fn absent(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => tests::bail!("{}: {other:?}, wanted ENOENT", path.display()),
    }
}

/// As nydus-snapshotter uses a shared daemon: started without an image, images mounted and unmounted
/// beside each other.
#[test]
fn a_shared_daemon_serves_many_images() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let (tiny, other) = (Ready::new(&recipes::tiny())?, Ready::saying("other")?);
    let mut daemon = DaemonOptions::empty().start()?;
    let root = daemon.root().to_owned();
    is(&root, &[])?;
    let meta = fs::metadata(&root)?;
    ensure!((meta.mode(), meta.uid(), meta.gid()) == (0o40777, 0, 0), "the root is {meta:?}");
    // The kernel remembers that there is no such name, until it is told otherwise.
    absent(&root.join("tiny"))?;
    tiny.post(&daemon, "/tiny")?;
    other.post(&daemon, "%2Fother")?;
    is(&root, &["tiny", "other"])?;
    let reference = tiny.journey.reference()?;
    tree::assert_same(&reference, &root.join("tiny"), Overlook::default())?;
    says(&root.join("other"), "other")?;
    let info = daemon.get("/api/v1/daemon")?;
    for mountpoint in ["/tiny", "/other"] {
        let mount = &info["backend_collection"][mountpoint];
        ensure!(mount["backend_type"] == "Rafs" && mount["mountpoint"] == mountpoint, "{info}");
    }
    // Inodes of one mount are not those of another.
    let inos = |name: &str| -> Result<BTreeSet<u64>> {
        let dir = root.join(name);
        fs::read_dir(&dir)?.map(|e| Ok(e?.ino())).collect()
    };
    ensure!(inos("tiny")?.is_disjoint(&inos("other")?), "two images share inode numbers");

    // What is open stays readable; names and listings are gone at once.
    let open = File::open(root.join("tiny/data/noise-a"))?;
    delete(&daemon, "/tiny")?;
    absent(&root.join("tiny"))?;
    absent(&root.join("tiny/etc/hostname"))?;
    is(&root, &["other"])?;
    let mut bytes = Vec::new();
    (&open).read_to_end(&mut bytes)?;
    ensure!(bytes == noise(1, (3 << 20) + 17), "an open file of an unmounted image has other bytes");
    drop(open);
    tiny.post(&daemon, "/tiny")?;
    tree::assert_same(&reference, &root.join("tiny"), Overlook::default())?;
    let status = daemon.terminate()?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}

/// Mountpoints below each other, below directories of images, and at the root, in any order.
#[test]
fn mounts_nest() -> Result<()> {
    needs_mounts!();
    let (a, b, c) = (Ready::saying("a")?, Ready::saying("b")?, Ready::saying("c")?);
    let daemon = DaemonOptions::empty().start()?;
    let root = daemon.root().to_owned();
    // The contract's own: unmount and mount again, and stat without looking at the parents in between.
    for word in [&a, &b] {
        word.post(&daemon, "/n/m/o")?;
        let meta = fs::metadata(root.join("n/m/o/only-a"));
        ensure!(meta.is_ok() == std::ptr::eq(word, &a), "{meta:?}");
        delete(&daemon, "/n/m/o")?;
        is(&root, &[])?;
    }
    // Below a directory of an image, and where it has none.
    a.post(&daemon, "/x")?;
    is(&root.join("x/d"), &["deep", "e"])?;
    b.post(&daemon, "/x/d/n")?;
    c.post(&daemon, "/x/new/n")?;
    is(&root.join("x"), &["word", "only-a", "d", "new"])?;
    is(&root.join("x/d"), &["deep", "e", "n"])?;
    ensure!(fs::metadata(root.join("x/d"))?.mode() == 0o40711, "the image's own directory is covered");
    says(&root.join("x/d/n"), "b")?;
    says(&root.join("x/new/n"), "c")?;
    // `..` and `.` of a listing are the directories that they name.
    for (dir, parent) in [("x/d/n", "x/d"), ("x/new", "x"), ("x/d", "x"), ("x", "")] {
        let listed = raw_inos(&root.join(dir))?;
        let wanted = (fs::metadata(root.join(dir))?.ino(), fs::metadata(root.join(parent))?.ino());
        ensure!(listed == wanted, "{dir}: {listed:?}, wanted {wanted:?}");
    }
    // A mount in the place of a directory of the image, and away again.
    c.post(&daemon, "/x/d/e")?;
    says(&root.join("x/d/e"), "c")?;
    is(&root.join("x/d"), &["deep", "e", "n"])?;
    delete(&daemon, "/x/d/e")?;
    is(&root.join("x/d/e"), &["word"])?;
    // At the root, beside what is there.
    c.post(&daemon, "/")?;
    is(&root, &["word", "only-c", "d", "x"])?;
    says(&root.join("x/d/n"), "b")?;
    b.post(&daemon, "/d/e/f")?;
    is(&root.join("d/e"), &["word", "f"])?;
    says(&root.join("d/e/f"), "b")?;
    // The outer ones first.
    delete(&daemon, "/x")?;
    is(&root.join("x"), &["d", "new"])?;
    says(&root.join("x/d/n"), "b")?;
    delete(&daemon, "/")?;
    is(&root, &["x", "d"])?;
    says(&root.join("d/e/f"), "b")?;
    for mountpoint in ["/d/e/f", "/x/new/n", "/x/d/n"] {
        delete(&daemon, mountpoint)?;
    }
    is(&root, &[])
}

/// The inode numbers that a listing gives for `.` and `..`, which std leaves out.
fn raw_inos(dir: &Path) -> Result<(u64, u64)> {
    let mut listed = nix::dir::Dir::open(dir, nix::fcntl::OFlag::O_RDONLY, nix::sys::stat::Mode::empty())?;
    let entries = listed.iter().collect::<Result<Vec<_>, _>>()?;
    let of = |name: &[u8]| {
        let found = entries.iter().find(|entry| entry.file_name().to_bytes() == name);
        found.map(nix::dir::Entry::ino).context("no dots")
    };
    Ok((of(b".")?, of(b"..")?))
}

/// PUT swaps a v6 image under the same kernel mount: names, listings and contents are the new ones at
/// once, what is open stays what it was. A PUT that fails changes nothing.
#[test]
fn a_remount_swaps_the_tree() -> Result<()> {
    needs_mounts!();
    let (old, new) = (Ready::saying("old")?, Ready::saying("new")?);
    let daemon = DaemonOptions::empty().start()?;
    for mountpoint in ["/p/q", "/"] {
        let dir = daemon.root().join(&mountpoint[1..]);
        expect(&daemon, "PUT", mountpoint, &old.body(), 500, "not found")?;
        old.post(&daemon, mountpoint)?;
        // All that a kernel caches: entries, negative ones, a listing, attributes, pages.
        says(&dir, "old")?;
        absent(&dir.join("only-new"))?;
        ensure!(fs::read_to_string(dir.join("d/deep"))? == "old".repeat(1000));
        let open = File::open(dir.join("d/deep"))?;
        let bad = old.body().replace("image.boot", "no-such.boot");
        expect(&daemon, "PUT", mountpoint, &bad, 500, "no-such.boot")?;
        says(&dir, "old")?;
        new.put(&daemon, mountpoint)?;
        says(&dir, "new")?;
        absent(&dir.join("only-old"))?;
        ensure!(fs::read_to_string(dir.join("d/deep"))? == "new".repeat(1000));
        daemon.drop_pages(&PathBuf::from(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&open)
        )))?;
        let mut bytes = [0; 6];
        open.read_exact_at(&mut bytes, 300)?;
        ensure!(&bytes == b"oldold", "an open file changed: {bytes:?}");
        let info = daemon.get("/api/v1/daemon")?;
        ensure!(info["backend_collection"].as_object().is_some_and(|all| all.len() == 1), "{info}");
        delete(&daemon, mountpoint)?;
        is(daemon.root(), &[])?;
    }
    Ok(())
}

/// What can not be done is refused, leaves nothing behind, and works once it is put right.
#[test]
fn refused_commands_leave_nothing_behind() -> Result<()> {
    needs_mounts!();
    let (one, two) = (Ready::saying("one")?, Ready::saying("two")?);
    let daemon = DaemonOptions::empty().start()?;
    let root = daemon.root().to_owned();
    let good = one.body();
    for (method, mountpoint, body, status, text) in [
        ("POST", "/m", good.replace("\"rafs\"", "\"erofs\""), 500, "invalid argument"),
        ("POST", "/m", good.replace("\"fs_type\":\"rafs\",", ""), 500, "invalid argument"),
        ("POST", "m", good.clone(), 500, "invalid argument"),
        ("POST", "/m/../n", good.clone(), 500, "invalid argument"),
        ("POST", "/m", good.replace("image.boot", "missing.boot"), 500, "missing.boot"),
        ("POST", "/m", good.replace("blobcache", "nonsense"), 500, "nonsense"),
        (
            "POST",
            "/m",
            good.replace("\"overlay\":\"{}\"", "\"prefetch_files\":[\"relative\"]"),
            500,
            "relative",
        ),
        ("POST", "/m", good.replace("\"rafs\"", "\"passthrough_fs\""), 500, "Not a directory"),
        ("POST", "/m", r#"{"fs_type":"rafs","source":"/x"}"#.to_owned(), 400, "ParseBody"),
        ("POST", "/m", "{".to_owned(), 400, "ParseBody"),
        ("POST", "/m", String::new(), 400, "BadRequest"),
        ("DELETE", "/m", String::new(), 500, "not found"),
        ("PUT", "/m", good.clone(), 500, "not found"),
        ("GET", "/m", String::new(), 400, "BadRequest"),
    ] {
        expect(&daemon, method, mountpoint, &body, status, text)?;
        is(&root, &[])?;
    }
    // A bootstrap that is none, then the right one under the same name.
    let good_bytes = fs::read(&one.bootstrap)?;
    let mut bad_bytes = good_bytes.clone();
    bad_bytes[1024..2048].fill(0xff);
    for (bytes, status) in [(&bad_bytes, 500), (&good_bytes, 204)] {
        fs::write(&one.bootstrap, bytes)?;
        expect(&daemon, "POST", "/m", &good, status, "")?;
    }
    says(&root.join("m"), "one")?;
    // Occupied: by whatever.
    for body in [&good, &two.body()] {
        expect(&daemon, "POST", "/m", body, 500, "already exists")?;
        expect(&daemon, "POST", "//m/", body, 500, "already exists")?;
        says(&root.join("m"), "one")?;
    }
    Ok(())
}

/// What a successor has to be told is bounded, and nothing is mounted that it could not be told.
#[test]
fn what_can_not_be_kept_for_a_successor_is_not_mounted() -> Result<()> {
    needs_mounts!();
    let image = Ready::saying("one")?;
    let daemon = DaemonOptions::empty().start()?;
    let padded =
        image.body().replace(r#"\"mode\""#, &format!(r#"\"pad\":\"{}\",\"mode\""#, "x".repeat(3 << 20)));
    ensure!(padded.len() > 3 << 20, "nothing was padded");
    for mountpoint in ["/a", "/b"] {
        expect(&daemon, "POST", mountpoint, &padded, 204, "")?;
    }
    expect(&daemon, "POST", "/c", &padded, 500, "another daemon")?;
    is(daemon.root(), &["a", "b"])?;
    // In the place of one as long there is room.
    expect(&daemon, "PUT", "/b", &padded, 204, "")?;
    image.post(&daemon, "/c")?;
    says(&daemon.root().join("c"), "one")
}

/// 300 mounts and unmounts at new names while another image is read: no reader notices, and no descriptor
/// or thread is left.
#[test]
fn mounts_come_and_go() -> Result<()> {
    needs_mounts!();
    let (stays, comes) = (Ready::saying("stays")?, Ready::saying("comes")?);
    let daemon = DaemonOptions::empty().flag("--log-level", "warn").start()?;
    let root = daemon.root().to_owned();
    // What is opened at the first read, or once by each process, is open when descriptors are counted.
    stays.post(&daemon, "/stays")?;
    says(&root.join("stays"), "stays")?;
    comes.post(&daemon, "/c/first")?;
    says(&root.join("c/first"), "comes")?;
    delete(&daemon, "/c/first")?;
    let count =
        |what: &str| -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/{what}", daemon.pid()))?.count()) };
    let descriptors = count("fd")?;
    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                says(&root.join("stays"), "stays")?;
                daemon.drop_pages(&root.join("stays/word"))?;
                reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let cycles = || -> Result<()> {
            for cycle in 0..300 {
                let mountpoint = format!("/c/{cycle}");
                let dir = root.join(&mountpoint[1..]);
                absent(&dir)?;
                comes.post(&daemon, &mountpoint)?;
                says(&dir, "comes")?;
                delete(&daemon, &mountpoint)?;
                absent(&dir)?;
            }
            Ok(())
        };
        let result = cycles();
        over.store(true, Ordering::Relaxed);
        reader.join().expect("the reader does not panic")?;
        result
    })?;
    ensure!(reads.load(Ordering::Relaxed) > 0, "nothing was read meanwhile");
    daemon.wait_until("the descriptors of unmounted images are closed", |_| {
        Ok((count("fd")? <= descriptors).then_some(()))
    })?;
    is(&root, &["stays"])
}

/// Some dozens of live mounts, or as many as `NYDUS_TEST_MOUNTS` says (`make soak`: 1000), with their cost.
#[test]
fn many_mounts_live_side_by_side() -> Result<()> {
    needs_mounts!();
    let mounts: usize = match std::env::var("NYDUS_TEST_MOUNTS") {
        Ok(text) => text.parse().context("NYDUS_TEST_MOUNTS")?,
        Err(_) => 48,
    };
    let images =
        ["one", "two", "three"].iter().map(|word| Ready::saying(word)).collect::<Result<Vec<_>>>()?;
    let daemon = DaemonOptions::empty().flag("--log-level", "warn").start()?;
    let root = daemon.root().to_owned();
    let empty = memory(&daemon)?;
    let mut times = Vec::with_capacity(mounts);
    for number in 0..mounts {
        let began = Instant::now();
        images[number % 3].post(&daemon, &format!("/all/{number}"))?;
        times.push(began.elapsed());
    }
    let threads = fs::read_dir(format!("/proc/{}/task", daemon.pid()))?.count();
    let mounted = memory(&daemon)?;
    for number in 0..mounts {
        let dir = root.join(format!("all/{number}"));
        says(&dir, ["one", "two", "three"][number % 3])?;
    }
    ensure!(names(&root.join("all"))?.len() == mounts, "the listing has other names");
    let read = memory(&daemon)?;
    times.sort_unstable();
    eprintln!(
        "{mounts} mounts: median {:?}, slowest {:?}; memory {empty} kB without, {mounted} kB with, {read} kB after \
         a read of each; {threads} threads",
        times[mounts / 2],
        times[mounts - 1]
    );
    ensure!(threads < 100, "{threads} threads for {mounts} mounts");
    ensure!(read < 12 * 1024 + 1024 * mounts as u64, "{read} kB for {mounts} mounts");
    for number in 0..mounts {
        delete(&daemon, &format!("/all/{number}"))?;
    }
    is(&root, &[])
}

/// Kilobytes of memory that belong to the daemon alone.
pub(super) fn memory(daemon: &Daemon) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let of = |key: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).context("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    Ok(of("RssAnon:")? + of("RssShmem:")?)
}

/// What a mount's configuration asks for is fetched for an API mount, too, and is reported under its
/// mountpoint; `--virtual-mountpoint` puts the command line's image beside those of the API.
#[test]
fn api_mounts_are_fetched_ahead() -> Result<()> {
    needs_mounts!();
    let (own, mut ahead) = (Ready::saying("own")?, Ready::saying("ahead")?);
    ahead.config = ahead.config.replace(r#""enable":false"#, r#""enable":true,"prefetch_all":true"#);
    let config = own.journey.path("config.json");
    fs::write(&config, &own.config)?;
    let daemon =
        DaemonOptions::bootstrap(&own.bootstrap, &config).flag("--virtual-mountpoint", "/v/own").start()?;
    ahead.post(&daemon, "/v/ahead")?;
    is(&daemon.root().join("v"), &["own", "ahead"])?;
    says(&daemon.root().join("v/own"), "own")?;
    daemon.wait_until("the prefetch of the mount is done", |daemon| {
        let jobs = daemon.get("/api/v1/prefetch")?;
        let done = |job: &serde_json::Value| job["mountpoint"] == "/v/ahead" && job["state"] == "done";
        Ok(jobs.as_array().is_some_and(|jobs| jobs.iter().any(done)).then_some(()))
    })?;
    let cache = daemon.get("/api/v1/metrics/blobcache?id=/v/ahead")?;
    ensure!(cache["data_all_ready"] == true, "{cache}");
    let files = daemon.get("/api/v1/metrics?id=/v/own")?;
    ensure!(files["id"] == "/v/own" && files["data_read"] == 3, "{files}");
    Ok(())
}
