//! The programs that start `nydusd`: their command lines, word for word, and what they see of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::command::finish;
use tests::journey::Journey;
use tests::mount::{Mount, mounted};
use tests::{Context, Result, bail, binaries, ensure, needs_mounts, recipes};

/// How long a daemon may take to be ready, or to end, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the clients' command lines name: an image on disk, its configuration, and places.
struct World {
    journey: Journey,
    mount: Mount,
}

impl World {
    fn new() -> Result<Self> {
        let journey = Journey::start(&recipes::tiny())?;
        let nydus = journey.convert("nydus", &[])?;
        nydus.save_bootstrap(&journey.path("image.boot"))?;
        let blobs = journey.path("blobs");
        fs::create_dir(&blobs)?;
        for layer in nydus.data_blobs()? {
            let id = layer.digest.strip_prefix("sha256:").context("a digest")?;
            fs::write(blobs.join(id), nydus.blob(&layer.digest)?)?;
        }
        // As nydus-snapshotter writes it, with what means nothing to us.
        let config = json!({
            "device": {
                "id": "/1",
                "backend": { "type": "localfs", "config": { "dir": blobs } },
                "cache": { "type": "blobcache", "config": { "work_dir": journey.path("cache") } },
            },
            "mode": "direct", "digest_validate": false, "iostats_files": false, "enable_xattr": true,
            "amplify_io": 1048576, "readahead": true, "readahead_sec": 300, "warmup": 0,
            "fs_prefetch": { "enable": true, "threads_count": 4, "merging_size": 131072, "prefetch_all": true },
        });
        fs::write(journey.path("config.json"), config.to_string())?;
        fs::create_dir(journey.path("mnt"))?;
        let mount = Mount::guard(journey.path("mnt"));
        Ok(Self { journey, mount })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.journey.path(name)
    }

    /// The words of `line`, with `@NAME` for a path of this world.
    fn words(&self, line: &str) -> Vec<String> {
        let word = |word: &str| match word.strip_prefix('@') {
            Some(name) => self.path(name).to_string_lossy().into_owned(),
            None => word.to_owned(),
        };
        line.split_whitespace().map(word).collect()
    }

    /// Starts `nydusd` as a client does.
    fn start(&self, line: &str) -> Result<Started> {
        let errors = fs::File::create(self.path("stderr"))?;
        let child = Command::new(binaries::nydusd())
            .args(self.words(line))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()?;
        Ok(Started(child))
    }

    /// Polls for RUNNING, as they all do.
    fn wait_running(&self, daemon: &mut Started) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let socket = self.path("api.sock");
            let asked =
                finish(Command::new(binaries::nydusctl()).arg("-S").arg(socket).args(["-r", "info"]))?;
            if let Ok(info) = serde_json::from_str::<Value>(&asked.stdout)
                && info["state"] == "RUNNING"
            {
                return Ok(info);
            }
            let said = fs::read_to_string(self.path("stderr"))?;
            if let Some(status) = daemon.0.try_wait()? {
                bail!("nydusd ended with {status}: {said}");
            }
            ensure!(Instant::now() < deadline, "not RUNNING within {PATIENCE:?}: {said}");
            // The state is only to be asked for; there is nothing to wait on.
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A daemon that is killed when the test ends before it.
struct Started(Child);

impl Started {
    fn terminate(&mut self) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM)?;
        self.wait()
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "does not end within {PATIENCE:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn reads_right(root: &Path) -> Result<()> {
    ensure!(fs::read(root.join("etc/hostname"))? == b"tiny\n", "wrong bytes");
    Ok(())
}

/// Each client's line leads to a mount that reads right, and SIGTERM ends it with 0, unmounted.
#[test]
fn command_lines_of_clients_mount() -> Result<()> {
    needs_mounts!();
    for line in [
        // nydus-snapshotter, a daemon for each image.
        "fuse --thread-num 8 --config @config.json --bootstrap @image.boot --mountpoint @mnt --apisock @api.sock \
         --log-level info --log-rotation-size 100 --log-file @logs/nydusd.log --failover-policy resend",
        "fuse --config @config.json --bootstrap @image.boot --mountpoint @mnt --apisock @api.sock --log-level warn \
         --log-rotation-size 100 --prefetch-files @list --backend-source http://localhost/source --failover-policy flush",
        // nydusify.
        "--config @config.json --mountpoint @mnt --bootstrap @image.boot --apisock @api.sock --log-level warn",
        // The smoke suite.
        "--mountpoint @mnt --apisock @api.sock --log-level error --thread-num 10 --config @config.json \
         --bootstrap @image.boot",
        // People.
        "-M @mnt -A @api.sock -B @image.boot -D @blobs -l info --rlimit-nofile 0",
    ] {
        let world = World::new()?;
        fs::write(world.path("list"), "/data\n\n/etc/hostname\n")?;
        let mut daemon = world.start(line)?;
        let info = world.wait_running(&mut daemon).context(line)?;
        ensure!(info["version"]["git_commit"].as_str().is_some_and(|commit| !commit.is_empty()), "{info}");
        reads_right(world.mount.path()).context(line)?;
        let status = daemon.terminate()?;
        ensure!(status.code() == Some(0), "{line}: {status}");
        ensure!(
            !mounted(world.mount.path()) && !world.path("api.sock").exists(),
            "{line}: something is left"
        );
        ensure!(!line.contains("--log-file") || world.path("logs/nydusd.log").exists(), "{line}: no log");
    }
    Ok(())
}

/// nydus-snapshotter's shared daemon starts empty; `nydusctl` mounts in it, shows each mount by
/// itself, and takes it away.
#[test]
fn a_shared_daemon_gets_its_mounts_later() -> Result<()> {
    needs_mounts!();
    let world = World::new()?;
    let line = "fuse --thread-num 8 --mountpoint @mnt --apisock @api.sock --log-level info --log-rotation-size 100 \
                --log-file @logs/nydusd.log --failover-policy resend";
    let mut daemon = world.start(line)?;
    let info = world.wait_running(&mut daemon)?;
    ensure!(info["backend_collection"] == json!({}), "{info}");
    let ctl = |line: &str| {
        let line = format!("-S @api.sock {line}");
        finish(
            Command::new(binaries::nydusctl()).args(world.words(&line)).current_dir(world.journey.scratch()),
        )
    };
    // The source as people type it, relative to where they are.
    for at in ["/one", "/two"] {
        let mounted = ctl(&format!("mount -s image.boot -c @config.json -m {at} -t rafs"))?;
        ensure!(mounted.code == Some(0), "{mounted:?}");
        reads_right(&world.mount.path().join(&at[1..]))?;
    }
    let again = ctl("mount --source image.boot --config @config.json --mountpoint /one")?;
    ensure!(again.code == Some(1) && again.stderr.contains("lready"), "{again:?}");
    let info = ctl("info")?;
    ensure!(info.stdout.contains("Instance /one:") && info.stdout.contains("Instance /two:"), "{info:?}");
    let mounts = ctl("mounts")?;
    for at in ["one", "two"] {
        let path = world.mount.path().join(at).display().to_string();
        ensure!(mounts.stdout.contains(&path) && mounts.stdout.contains("localfs"), "{mounts:?}");
    }
    let top = ctl("top --once -r")?;
    ensure!(serde_json::from_str::<Value>(&top.stdout)?.as_array().is_some_and(|m| m.len() == 2), "{top:?}");
    let gone = ctl("umount -m /one")?;
    ensure!(gone.code == Some(0) && !world.mount.path().join("one/etc").exists(), "{gone:?}");
    let gone = ctl("umount -m /one")?;
    ensure!(gone.code == Some(1) && gone.stderr.starts_with("Error:"), "{gone:?}");
    reads_right(&world.mount.path().join("two"))?;
    ensure!(daemon.terminate()?.code() == Some(0), "ended badly");
    Ok(())
}

/// What this build does not do ends at once, with the code of the contract and a word that helps.
#[test]
fn other_command_lines_are_refused() -> Result<()> {
    needs_mounts!();
    let world = World::new()?;
    for (line, code, words) in [
        ("virtiofs --hybrid-mode --apisock @api.sock", 2, "--sock"),
        ("virtiofs --sock @v.sock --id x --supervisor @s.sock", 2, "leave --supervisor"),
        ("virtiofs --sock @v.sock --mountpoint @mnt", 2, "--mountpoint"),
        // nydus-snapshotter with fscache.
        ("singleton --fscache @cache --fscache-threads 4 --apisock @api.sock", 1, "fusedev"),
        ("nbd /dev/nbd15 -B @image.boot -D @blobs", 1, "nydusd fuse"),
        (
            "uffd --sock @u.sock --bootstrap @image.boot --localfs-dir @blobs --log-level info --threads 4 \
             --rlimit-nofile 0 --apisock @api.sock",
            1,
            "no service `uffd`",
        ),
        ("", 2, "Usage"),
        ("fuse", 2, "--mountpoint"),
        ("--mountpoint @mnt --id x", 2, "--supervisor"),
        ("--mountpoint @mnt --supervisor @s.sock", 2, "--id"),
        ("--mountpoint @mnt --thread-num 0", 2, "0"),
        ("--mountpoint @mnt --fuse-threads 1025", 2, "1025"),
        ("--mountpoint @mnt --failover-policy hope", 2, "resend"),
        ("--mountpoint @mnt --log-level loud", 2, "loud"),
        (
            "--mountpoint @mnt --config @config.json --localfs-dir @blobs --bootstrap @image.boot",
            2,
            "--localfs-dir",
        ),
        ("--mountpoint @mnt --no-such-flag", 2, "--no-such-flag"),
        ("--mountpoint @nowhere --bootstrap @image.boot --config @config.json", 1, "nowhere"),
        ("--mountpoint @mnt --bootstrap @image.boot", 1, "--config"),
        ("--mountpoint @mnt --bootstrap @config.json --config @config.json", 1, "config.json"),
    ] {
        let finished = finish(Command::new(binaries::nydusd()).args(world.words(line)))?;
        ensure!(finished.code == Some(code), "{line}: {finished:?}");
        ensure!(finished.stderr.contains(words), "{line}: {finished:?}");
        ensure!(
            code == 2 || finished.stderr.lines().any(|line| line.starts_with("Error:")),
            "{line}: {finished:?}"
        );
        ensure!(!mounted(world.mount.path()), "{line}: mounted");
    }
    for flag in ["--version", "-V", "--help", "-h"] {
        let finished = finish(Command::new(binaries::nydusd()).arg(flag))?;
        ensure!(
            finished.code == Some(0) && !finished.stdout.is_empty() && finished.stderr.is_empty(),
            "{finished:?}"
        );
    }
    Ok(())
}

/// The log in JSON: an object a line, in the file that was named, whose name gets its extension.
#[test]
fn the_log_can_be_json() -> Result<()> {
    needs_mounts!();
    let world = World::new()?;
    let line = "--config @config.json --mountpoint @mnt --bootstrap @image.boot --apisock @api.sock \
                --log-format json --log-file @logs/deep/nydusd";
    let mut daemon = world.start(line)?;
    world.wait_running(&mut daemon)?;
    daemon.terminate()?;
    let log = fs::read_to_string(world.path("logs/deep/nydusd.log"))?;
    let lines =
        log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>().context(log.clone())?;
    ensure!(lines.len() > 3, "{log}");
    for line in &lines {
        ensure!(
            line["level"].is_string() && line["message"].is_string() && line["timestamp"].is_string(),
            "{line}"
        );
    }
    ensure!(lines[0]["message"].as_str().is_some_and(|first| first.starts_with("nydusd v")), "{}", lines[0]);
    let said = fs::read_to_string(world.path("stderr"))?;
    ensure!(said.is_empty(), "the log is on standard error, too: {said}");
    Ok(())
}

/// Lines of the log for people begin as the contract says.
#[test]
fn the_log_is_lines_of_text() -> Result<()> {
    needs_mounts!();
    let world = World::new()?;
    let mut daemon = world.start("-M @mnt -A @api.sock -B @image.boot -D @blobs")?;
    world.wait_running(&mut daemon)?;
    daemon.terminate()?;
    let log = fs::read_to_string(world.path("stderr"))?;
    let first = log.lines().next().unwrap_or_default();
    // [2026-01-31 12:00:00.123456 +00:00] INFO nydusd v…
    let (stamp, rest) =
        first.strip_prefix('[').and_then(|line| line.split_once("] ")).context(first.to_owned())?;
    ensure!(
        stamp.len() == "2026-01-31 12:00:00.123456 +00:00".len() && rest.starts_with("INFO nydusd v"),
        "{first}"
    );
    Ok(())
}
