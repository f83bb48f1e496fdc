//! What clients rely on beyond the API's answers: when things appear, what stays, and how files are called.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::daemon::DaemonOptions;
use tests::image::{Entry, Image};
use tests::journey::Journey;
use tests::layout::Layout;
use tests::mount::{Mount, mounted};
use tests::tree::{self, Overlook};
use tests::{Context, Result, binaries, command, ensure, needs_mounts, needs_programs, recipes};

/// How long a daemon may take to be ready on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// An image on disk and the directory of its blobs.
struct World {
    journey: Journey,
    nydus: Layout,
}

impl World {
    fn new(image: &Image) -> Result<Self> {
        let journey = Journey::start(image)?;
        let nydus = journey.convert("nydus", &[])?;
        nydus.save_bootstrap(&journey.path("image.boot"))?;
        Ok(Self { journey, nydus })
    }

    /// Writes a configuration for its blobs, with the members of `more` at its top.
    fn config(&self, more: Value) -> Result<std::path::PathBuf> {
        let mut config = json!({
            "device": {
                "backend": { "type": "localfs", "config": { "dir": self.nydus.path().join("blobs/sha256") } },
                "cache": { "type": "blobcache", "config": { "work_dir": self.journey.path("deep/cache") } },
            },
            "mode": "direct", "enable_xattr": true, "trace": "off", "amplify_io": 0,
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let path = self.journey.path("config.json");
        fs::write(&path, config.to_string())?;
        Ok(path)
    }
}

struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn row_of(mountpoint: &Path) -> Result<String> {
    let at = format!(" {} ", mountpoint.display());
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().rfind(|line| line.contains(&at)).context("not mounted")?.to_owned())
}

/// Who can connect to the API socket finds a daemon that runs and a mount that answers; the mount is the
/// one that clients know, read-only and for everybody. A stale socket is replaced.
#[test]
fn the_socket_appears_last() -> Result<()> {
    needs_mounts!();
    let world = World::new(&recipes::tiny())?;
    let config = world.config(json!({}))?;
    let (root, socket) = (world.journey.path("mnt"), world.journey.path("api.sock"));
    fs::create_dir(&root)?;
    let mount = Mount::guard(&root);
    // Left by one that was killed.
    drop(std::os::unix::net::UnixListener::bind(&socket)?);
    let child = Command::new(binaries::nydusd())
        .args(["--mountpoint".as_ref(), root.as_os_str(), "--apisock".as_ref(), socket.as_os_str()])
        .args(["--config".as_ref(), config.as_os_str(), "--bootstrap".as_ref()])
        .arg(world.journey.path("image.boot"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let _daemon = Started(child);
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match std::os::unix::net::UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(e) => ensure!(Instant::now() < deadline, "{e}"),
        }
    };
    ensure!(mounted(&root) && fs::metadata(root.join("etc/hostname"))?.len() == 5, "no mount that answers");
    {
        use std::io::{Read as _, Write as _};
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.contains(r#""state":"RUNNING""#), "{answer}");
    }
    let meta = fs::symlink_metadata(&socket)?;
    ensure!(meta.file_type().is_socket() && meta.mode() & 0o777 == 0o600, "{meta:?}");
    let row = row_of(mount.path())?;
    for option in [
        " ro,nosuid,nodev,noatime ",
        " - fuse rafs ",
        "user_id=0,group_id=0,default_permissions,allow_other,max_read=1052672",
    ] {
        ensure!(row.contains(option), "no {option:?} in {row}");
    }
    Ok(())
}

/// A configuration without a bootstrap is not opened.
#[test]
fn a_configuration_without_a_bootstrap_is_not_opened() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let config = scratch.path().join("config.json");
    fs::write(&config, "neither JSON {{{ nor TOML")?;
    for path in [config, scratch.path().join("not-there")] {
        let daemon = DaemonOptions::empty().flag("--config", &path).start()?;
        ensure!(fs::read_dir(daemon.root())?.count() == 0, "something is mounted");
    }
    Ok(())
}

/// PUT exit ends the process with 0, takes the socket away, and leaves the mount to who comes next.
#[test]
fn exit_leaves_the_mount() -> Result<()> {
    needs_mounts!();
    let world = World::new(&recipes::tiny())?;
    let config = world.config(json!({}))?;
    let mut daemon = DaemonOptions::bootstrap(&world.journey.path("image.boot"), &config).start()?;
    let row = row_of(daemon.root())?;
    let (status, answer) = daemon.request("PUT", "/api/v1/daemon/exit", &Value::Null)?;
    ensure!(status == 204 && answer.is_null(), "{status} {answer}");
    let ended = daemon.wait_ended()?;
    ensure!(ended.code() == Some(0), "{ended}");
    ensure!(!daemon.socket().exists(), "the socket is left");
    ensure!(row_of(daemon.root())? == row, "another mount, or none");
    Ok(())
}

/// Every member that a client is known to send, and that means nothing here, is passed over at every
/// level, and named in the log.
#[test]
fn members_that_mean_nothing_are_passed_over() -> Result<()> {
    needs_mounts!();
    let world = World::new(&recipes::tiny())?;
    let blobs = world.nydus.path().join("blobs/sha256");
    let config = world.config(json!({
        // nydus-snapshotter, the smoke suite, and files that were written years ago.
        "readahead": true, "readahead_sec": 30, "warmup": 1, "id": "top-level",
        "device": {
            "id": "/known", "external_backend": { "meta_path": "" }, "unheard-of": [1, { "a": null }],
            "backend": { "type": "localfs", "config": {
                "dir": blobs, "readahead": false,
                "mirrors": [{ "host": "http://m", "headers": {}, "ping_url": "", "health_check_interval": 5, "failure_limit": 5 }],
            } },
            "cache": { "type": "blobcache", "compressed": false, "config": {
                "work_dir": world.journey.path("deep/cache"), "compressed": false, "work-dir": "/nowhere",
            } },
        },
        "fs_prefetch": { "enable": false, "threads_count": 8, "merging_size": 0, "warm": 7 },
    }))?;
    let daemon = DaemonOptions::bootstrap(&world.journey.path("image.boot"), &config).start()?;
    ensure!(fs::read(daemon.root().join("etc/hostname"))? == b"tiny\n", "wrong bytes");
    let log = daemon.log();
    ensure!(log.contains("unheard-of") && log.contains("work-dir"), "not named:\n{log}");
    Ok(())
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    let names = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    names.map(|name| Ok(name?.file_name().to_string_lossy().into_owned())).collect()
}

/// The files of a cache are called as those who clean up and count know them; the directory is made with
/// its parents.
#[test]
fn cache_files_are_called_as_clients_know_them() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let world = World::new(&recipes::tiny())?;
    let (config, cache) = (world.config(json!({}))?, world.journey.path("deep/cache"));
    let daemon = DaemonOptions::bootstrap(&world.journey.path("image.boot"), &config).start()?;
    tree::assert_same(&world.journey.reference()?, daemon.root(), Overlook::default())?;
    drop(daemon);
    let found = names(&cache)?;
    let mut known = BTreeSet::new();
    for blob in world.nydus.data_blobs()? {
        let id = blob.digest.trim_start_matches("sha256:").to_owned();
        for end in [".blob.data", ".blob.data.chunk_map"] {
            ensure!(found.contains(&format!("{id}{end}")), "no {id}{end} in {found:?}");
        }
        known.insert(id);
    }
    let ends = [".blob.data", ".blob.data.chunk_map", ".blob.meta"];
    let is_known = |name: &str| {
        let blob = ends.iter().find_map(|end| name.strip_suffix(end));
        // Our own beside them: bootstraps, and what is hidden.
        blob.is_some_and(|id| known.contains(id)) || name.ends_with(".boot") || name.starts_with('.')
    };
    let stranger = found.iter().find(|name| !is_known(name));
    ensure!(stranger.is_none(), "{stranger:?} is unknown to those who clean up");
    Ok(())
}

/// The context of a blob that a client has put into the cache directory is used and not fetched; a damaged
/// one is fetched, and nobody notices.
#[test]
fn a_context_in_the_cache_is_used_if_it_is_whole() -> Result<()> {
    needs_mounts!();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/batch");
    let scratch = tempfile::tempdir()?;
    let (cache, blob) = (scratch.path().join("cache"), scratch.path().join("blob"));
    let whole = fs::read(golden.join("image.blob"))?;
    fs::write(&blob, &whole)?;
    let config = scratch.path().join("config.json");
    let document = json!({
        "device": {
            "backend": { "type": "localfs", "config": { "blob_file": blob } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct", "trace": "off",
    });
    fs::write(&config, document.to_string())?;
    let options = DaemonOptions::bootstrap(&golden.join("image.boot"), &config);
    drop(options.start()?);
    let meta = names(&cache)?.into_iter().find(|name| name.ends_with(".blob.meta")).context("no context")?;
    let meta = cache.join(meta);
    let right = fs::read(&meta)?;
    fs::remove_dir_all(&cache)?;
    fs::create_dir(&cache)?;
    // As nydus-snapshotter copies it; the source has nothing to give.
    fs::write(&meta, &right)?;
    fs::write(&blob, "")?;
    drop(options.start().context("with the context that lies there")?);
    // What a copy that was cut off leaves.
    fs::write(&meta, &right[..right.len() - 4096])?;
    fs::write(&blob, whole)?;
    let daemon = options.start()?;
    ensure!(fs::read(&meta)? == right, "the damaged context is left");
    ensure!(fs::read(daemon.root().join("files/one_byte"))?.len() == 1, "wrong bytes");
    Ok(())
}

/// A process that holds a user namespace.
struct UserNamespace(Child);

impl UserNamespace {
    /// One with the same line in both of its maps.
    fn new(map: &str) -> Result<Self> {
        let child = Command::new("unshare").args(["--user", "sleep", "60"]).stdin(Stdio::null()).spawn()?;
        let namespace = Self(child);
        let process = std::path::PathBuf::from(format!("/proc/{}", namespace.0.id()));
        let deadline = Instant::now() + PATIENCE;
        while fs::read_link(process.join("ns/user"))? == fs::read_link("/proc/self/ns/user")? {
            ensure!(Instant::now() < deadline, "no user namespace");
            std::thread::yield_now();
        }
        fs::write(process.join("uid_map"), map)?;
        fs::write(process.join("gid_map"), map)?;
        Ok(namespace)
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ids of the image are shown as `id_mapping` says, and the kernel judges by what is shown: to the users of
/// a user namespace with that mapping the image is as it was built.
#[test]
fn ids_are_mapped_for_user_namespaces() -> Result<()> {
    needs_mounts!();
    needs_programs!("unshare", "nsenter", "setpriv");
    let world = World::new(&Image::new(vec![vec![
        Entry::dir("./").mode(0o755),
        Entry::file("roots", "root only").mode(0o600),
        Entry::file("users", "users only").mode(0o600).owner(1000, 1001),
        Entry::file("nobodys", "outside").mode(0o644).owner(70_000, 70_000),
    ]]))?;
    let config = world.config(json!({ "id_mapping": [0, 100_000, 65_536] }))?;
    let daemon = DaemonOptions::bootstrap(&world.journey.path("image.boot"), &config).start()?;
    let ids = |name: &str| fs::metadata(daemon.root().join(name)).map(|meta| (meta.uid(), meta.gid()));
    ensure!(ids("roots")? == (100_000, 100_000), "{:?}", ids("roots"));
    ensure!(ids("users")? == (101_000, 101_001), "{:?}", ids("users"));
    ensure!(ids("nobodys")? == (70_000, 70_000), "{:?}", ids("nobodys"));
    ensure!(ids("")? == (100_000, 100_000), "{:?}", ids(""));

    // By their numbers outside; the way to the mount is open to them.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(daemon.root().parent().context("a parent")?, open)?;
    let cat = |user: &str, name: &str| {
        let mut program = Command::new("setpriv");
        program.args(["--reuid", user, "--regid", user, "--clear-groups", "cat"]);
        command::finish(program.arg(daemon.root().join(name)))
    };
    ensure!(cat("100000", "roots")?.stdout == "root only", "the mapped owner can not read");
    ensure!(cat("101000", "users")?.stdout == "users only", "the mapped owner can not read");
    for (user, name) in [("1000", "users"), ("101000", "roots"), ("100000", "users")] {
        let refused = cat(user, name)?;
        ensure!(refused.code == Some(1) && refused.stderr.contains("ermission denied"), "{refused:?}");
    }

    // Inside.
    let namespace = UserNamespace::new("0 100000 65536")?;
    let seen = command::finish(
        Command::new("nsenter")
            .args(["--user", "--target", &namespace.0.id().to_string(), "sh", "-c"])
            .arg("cd \"$1\" && stat -c '%n %u %g' roots users nobodys && cat roots users")
            .arg("sh")
            .arg(daemon.root()),
    )?;
    let wanted = "roots 0 0\nusers 1000 1001\nnobodys 65534 65534\nroot onlyusers only";
    ensure!(seen.code == Some(0) && seen.stdout == wanted, "{seen:?}");
    Ok(())
}

/// Where the kernel was told that there are no extended attributes, an image that has some is refused; it is
/// mounted, and they are shown, where nobody has asked before.
#[test]
fn extended_attributes_are_shown_or_the_mount_is_refused() -> Result<()> {
    needs_mounts!();
    let plain = World::new(&Image::new(vec![vec![Entry::dir("./"), Entry::file("file", "plain")]]))?;
    let other = World::new(&Image::new(vec![vec![
        Entry::dir("./"),
        Entry::file("file", "other").xattr("user.word", "value"),
    ]]))?;
    let bootstrap = other.journey.path("image.boot");
    let config = fs::read_to_string(other.config(json!({}))?)?;
    let command = json!({ "fs_type": "rafs", "source": bootstrap, "config": config });
    for is_told in [true, false] {
        let options = DaemonOptions::bootstrap(&plain.journey.path("image.boot"), &plain.config(json!({}))?);
        let daemon = options.start()?;
        if is_told {
            let none = xattr::get(daemon.root().join("file"), "user.word");
            ensure!(!matches!(none, Ok(Some(_))), "{none:?}");
        }
        let (status, answer) = daemon.request("POST", "/api/v1/mount?mountpoint=/other", &command)?;
        if is_told {
            ensure!(status == 500 && answer.to_string().contains("extended attributes"), "{answer}");
            ensure!(!daemon.root().join("other").exists(), "mounted all the same");
        } else {
            ensure!(status == 204, "{answer}");
            let found = xattr::get(daemon.root().join("other/file"), "user.word")?;
            ensure!(found.as_deref() == Some(b"value"), "{found:?}");
            let none = xattr::get(daemon.root().join("file"), "user.word")?;
            ensure!(none.is_none(), "{none:?}");
        }
    }
    Ok(())
}
