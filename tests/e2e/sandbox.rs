//! The daemon parses what strangers send: what it could do if they took it over, and that nobody misses what it can not.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::Journey;
use tests::mount::mounted;
use tests::recipes;
use tests::tree::{self, Overlook};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

mod broker;

/// An image, and what an API client says to mount it.
struct Scene {
    journey: Journey,
    bootstrap: PathBuf,
}

impl Scene {
    fn new() -> Result<Self> {
        let journey = Journey::start(&recipes::tiny())?;
        let nydus = journey.convert("nydus", &[])?;
        let bootstrap = journey.path("image.boot");
        nydus.save_bootstrap(&bootstrap)?;
        Ok(Self { journey, bootstrap })
    }

    fn post(&self, daemon: &Daemon, mountpoint: &str, cache: &Path) -> Result<(u16, Value)> {
        let blobs = self.journey.path("nydus").join("blobs/sha256");
        let config = json!({"device": {
            "backend": {"type": "localfs", "config": {"dir": blobs}},
            "cache": {"type": "blobcache", "config": {"work_dir": cache}},
        }});
        let body = json!({"fs_type": "rafs", "source": self.bootstrap, "config": config.to_string()});
        daemon.request("POST", &format!("/api/v1/mount?mountpoint={mountpoint}"), &body)
    }
}

fn post_directory(daemon: &Daemon, mountpoint: &str, source: &Path) -> Result<(u16, Value)> {
    let body = json!({"fs_type": "passthrough_fs", "source": source, "config": ""});
    daemon.request("POST", &format!("/api/v1/mount?mountpoint={mountpoint}"), &body)
}

/// A field of the daemon's status.
fn status(daemon: &Daemon, field: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {field}"))?.trim().to_owned())
}

/// The broker of a daemon.
fn broker(daemon: &Daemon) -> Result<Option<Pid>> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.pid()))?;
    for child in children.split_whitespace() {
        if fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|comm| comm.trim() == "nydusd-broker")
        {
            return Ok(Some(Pid::from_raw(child.parse()?)));
        }
    }
    Ok(None)
}

/// A path as the daemon sees it.
fn seen(daemon: &Daemon, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{path}", daemon.pid()))
}

/// Runs a shell of the host where the daemon is: its mounts and its root directory, and more rights than it has.
fn probe(daemon: &Daemon, script: &str) -> Result<Output> {
    let shell = format!(
        "import ctypes,os\n\
         pid={}\n\
         root=os.open(f'/proc/{{pid}}/root',os.O_PATH)\n\
         ns=os.open(f'/proc/{{pid}}/ns/mnt',os.O_RDONLY)\n\
         assert ctypes.CDLL(None).setns(ns,0) == 0\n\
         os.fchdir(root)\n\
         {script}\n",
        daemon.pid()
    );
    Ok(Command::new("python3").arg("-c").arg(shell).output()?)
}

/// What is not there can not be read, and what is there not be changed.
#[test]
fn a_daemon_sees_and_may_do_little() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "python3");
    let scene = Scene::new()?;
    let mut daemon = DaemonOptions::empty().start()?;
    let secret = scene.journey.path("secret");
    fs::write(&secret, "secret")?;
    ensure!(status(&daemon, "NoNewPrivs")? == "1" && status(&daemon, "Seccomp")? == "2");
    let capabilities = u64::from_str_radix(&status(&daemon, "CapEff")?, 16)?;
    let bounding = u64::from_str_radix(&status(&daemon, "CapBnd")?, 16)?;
    // CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_SYS_MODULE, CAP_NET_ADMIN.
    for capability in [21, 19, 16, 12] {
        ensure!(capabilities & 1 << capability == 0, "capability {capability}: {capabilities:x}");
    }
    ensure!(bounding == capabilities, "{bounding:x}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid()))?;
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).context("no limit")?;
    ensure!(cores.split_whitespace().filter(|word| *word == "0").count() == 2, "{cores}");

    let names = |path: &str| -> Result<Vec<String>> {
        let entries = fs::read_dir(seen(&daemon, path))?;
        entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
    };
    // Beside what every daemon needs, only the names of its working directory and of what it was told of at start.
    let mut known: Vec<_> = ["etc", "proc", "sys", "usr", "var"].map(String::from).to_vec();
    for named in [&std::env::current_dir()?, daemon.root()] {
        let top = named.iter().nth(1).context("no absolute path")?;
        known.push(top.to_string_lossy().into_owned());
    }
    let root = names("/")?;
    ensure!(root.iter().all(|name| known.contains(name)), "{root:?}, not of {known:?}");
    let mut processes = names("/proc")?;
    processes.sort_unstable();
    ensure!(processes == [daemon.pid().to_string(), "self".to_owned()], "{processes:?}");
    for hidden in ["/etc/shadow", "/etc/passwd", "/root/.ssh", "/etc/ssl/private", "/dev", "/run", "/bin"] {
        ensure!(!seen(&daemon, hidden).exists(), "{hidden}");
    }
    ensure!(secret.exists() && !seen(&daemon, &secret.to_string_lossy()).exists());
    for script in
        ["open('new','w')", "os.mkdir('tmp/new')", "open('proc/self/comm','w')", "open('../../etc/shadow')"]
    {
        let tried = probe(&daemon, script)?;
        let why = String::from_utf8_lossy(&tried.stderr);
        let refused =
            ["Read-only file system", "No such file", "Permission denied"].iter().any(|e| why.contains(e));
        ensure!(!tried.status.success() && refused, "{script}: {why}");
    }

    // It is told of by its own process, and nothing but that is admitted.
    let cache = scene.journey.path("named/only/now");
    let (code, answer) = scene.post(&daemon, "/tiny", &cache)?;
    ensure!(code == 204, "{answer}");
    tree::assert_same(&scene.journey.reference()?, &daemon.root().join("tiny"), Overlook::default())?;
    ensure!(seen(&daemon, &cache.to_string_lossy()).is_dir());
    ensure!(fs::metadata(&cache)?.permissions().mode() & 0o777 == 0o700);
    let tried = probe(&daemon, &format!("open('{}/../outside','w')", &cache.display().to_string()[1..]))?;
    ensure!(!tried.status.success() && !cache.join("../outside").exists());
    ensure!(!seen(&daemon, &secret.to_string_lossy()).exists());
    daemon.wait_for_log(&format!("admitted {}, writable", cache.display()))?;

    let root = daemon.root().to_owned();
    let broker = broker(&daemon)?.context("no broker")?;
    ensure!(daemon.terminate()?.code() == Some(0) && !mounted(&root) && !daemon.socket().exists());
    gone(broker)
}

/// Waits for the end of a process that nobody here is the parent of.
fn gone(process: Pid) -> Result<()> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let lives = || {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        !status.is_empty() && !status.contains("State:\tZ")
    };
    while lives() {
        ensure!(std::time::Instant::now() < deadline, "process {process} goes on");
        // Its end is only to be asked for; there is nothing to wait on.
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}

/// Directories of the host are shown where they are asked for, and those of the system are not to be written to.
#[test]
fn directories_are_admitted_by_name() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    let shown = scene.journey.path("shown");
    fs::create_dir_all(shown.join("d"))?;
    fs::write(shown.join("d/word"), "word")?;
    let link = scene.journey.path("link");
    std::os::unix::fs::symlink(&shown, &link)?;
    let daemon = DaemonOptions::empty().switch("--writable").start()?;
    for (mountpoint, source) in [("/a", &shown), ("/b", &link), ("/c", &shown.join("d/.."))] {
        let (code, answer) = post_directory(&daemon, mountpoint, source)?;
        ensure!(code == 204, "{}: {answer}", source.display());
        let name = daemon.root().join(&mountpoint[1..]).join("d/word");
        ensure!(fs::read_to_string(&name)? == "word", "{mountpoint}");
    }
    fs::write(daemon.root().join("b/new"), "new")?;
    ensure!(fs::read_to_string(shown.join("new"))? == "new");
    xattr::set(daemon.root().join("a/new"), "trusted.overlay.opaque", b"y")?;
    ensure!(xattr::get(shown.join("new"), "trusted.overlay.opaque")?.as_deref() == Some(&b"y"[..]));
    for system in ["/", "/etc", "/proc", "/usr/share"] {
        let (code, answer) = post_directory(&daemon, "/system", Path::new(system))?;
        ensure!(code == 500 && answer.to_string().contains("--no-jail"), "{system}: {code} {answer}");
    }
    // What is not served is not there afterwards either.
    let file = scene.journey.path("file");
    fs::write(&file, "")?;
    let (code, answer) = post_directory(&daemon, "/file", &file)?;
    ensure!(code == 500 && answer.to_string().contains("Not a directory"), "{code} {answer}");
    ensure!(!seen(&daemon, &file.to_string_lossy()).exists());
    let (code, answer) = scene.post(&daemon, "/image", Path::new("/etc/cache-of-a-test"))?;
    ensure!(code == 500 && answer.to_string().contains("--no-jail"), "{code} {answer}");
    ensure!(!Path::new("/etc/cache-of-a-test").exists());

    // A directory that was replaced is another one.
    let cache = scene.journey.path("cache");
    ensure!(scene.post(&daemon, "/one", &cache)?.0 == 204);
    let (code, _) = daemon.request("DELETE", "/api/v1/mount?mountpoint=/one", &Value::Null)?;
    ensure!(code == 204);
    fs::remove_dir_all(&cache)?;
    let (code, answer) = scene.post(&daemon, "/one", &cache)?;
    ensure!(code == 204, "{answer}");
    ensure!(fs::read_dir(&cache)?.count() > 0);
    tree::assert_same(&scene.journey.reference()?, &daemon.root().join("one"), Overlook::default())
}

/// What the lists refuse is had by who writes the command line, and by nobody else.
#[test]
fn the_command_line_admits_what_else_is_refused() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    // A home's directories that begin with a dot hold what tells programs what to do.
    let home = tempfile::Builder::new().prefix(".nydusd-of-a-test-").tempdir_in("/root")?;
    let cache = home.path().join("cache");
    let daemon = DaemonOptions::empty().start()?;
    let (code, answer) = scene.post(&daemon, "/tiny", &cache)?;
    ensure!(code == 500 && answer.to_string().contains("--admit") && !cache.exists(), "{code} {answer}");
    drop(daemon);
    let daemon = DaemonOptions::empty().flag("--admit", home.path()).start()?;
    let (code, answer) = scene.post(&daemon, "/tiny", &cache)?;
    ensure!(code == 204, "{answer}");
    tree::assert_same(&scene.journey.reference()?, &daemon.root().join("tiny"), Overlook::default())?;
    let (code, answer) = scene.post(&daemon, "/other", Path::new("/root/.nydusd-of-no-test/cache"))?;
    ensure!(code == 500, "{code} {answer}");
    Ok(())
}

/// A directory that was admitted keeps its rights when one above it is admitted with fewer.
#[test]
fn a_cache_below_what_is_shown_is_still_written_to() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    let shown = scene.journey.path("shown");
    let cache = shown.join("cache");
    let daemon = DaemonOptions::empty().start()?;
    ensure!(scene.post(&daemon, "/one", &cache)?.0 == 204);
    let (code, answer) = post_directory(&daemon, "/shown", &shown)?;
    ensure!(code == 204, "{answer}");
    let (code, answer) = daemon.request("DELETE", "/api/v1/mount?mountpoint=/one", &Value::Null)?;
    ensure!(code == 204, "{answer}");
    let (code, answer) = scene.post(&daemon, "/two", &cache)?;
    ensure!(code == 204, "{answer}");
    tree::assert_same(&scene.journey.reference()?, &daemon.root().join("two"), Overlook::default())
}

/// A link that is put on the way of mountpoint and socket while a daemon runs: nothing behind it is touched.
#[test]
fn a_link_on_the_way_leads_no_broker_astray() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    for own in ["--no-sandbox", "--core-dumps"] {
        let mut daemon = DaemonOptions::empty().switch(own).start()?;
        let (code, answer) = scene.post(&daemon, "/tiny", &scene.journey.path("cache"))?;
        ensure!(code == 204, "{answer}");
        let way = daemon.socket().parent().context("no directory")?.to_owned();
        let was = way.with_extension("was");
        let elsewhere = tempfile::tempdir()?;
        let (mountpoint, socket) = (elsewhere.path().join("mount"), elsewhere.path().join("api.sock"));
        fs::create_dir(&mountpoint)?;
        let _listener = UnixListener::bind(&socket)?;
        let none = None::<&str>;
        nix::mount::mount(Some("rafs"), &mountpoint, Some("tmpfs"), nix::mount::MsFlags::empty(), none)?;

        fs::rename(&way, &was)?;
        std::os::unix::fs::symlink(elsewhere.path(), &way)?;
        kill(daemon.pid(), Signal::SIGTERM)?;
        let ended = daemon.wait_ended();
        let is_there = mounted(&mountpoint);
        let detached = nix::mount::umount2(&mountpoint, nix::mount::MntFlags::MNT_DETACH);
        // Back, so that the daemon's guard finds what is to be cleaned up.
        fs::remove_file(&way)?;
        fs::rename(&was, &way)?;
        ended?;
        detached?;
        ensure!(is_there && socket.exists(), "{own}: {is_there}");
        ensure!(daemon.socket().exists(), "{own}: what was not found was not removed");
    }
    Ok(())
}

/// Each layer has its flag, and nothing but that layer goes with it.
#[test]
fn every_layer_can_be_left_out() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    let reference = scene.journey.reference()?;
    let all = ["broker", "jail", "capabilities", "landlock", "seccomp"];
    for (flag, missing) in [
        ("--no-jail", "jail"),
        ("--keep-capabilities", "capabilities"),
        ("--no-landlock", "landlock"),
        ("--no-seccomp", "seccomp"),
    ] {
        let mut daemon = DaemonOptions::empty().switch(flag).start()?;
        let line = daemon.wait_for_log("sandboxed: ")?;
        for layer in all {
            ensure!(line.contains(layer) == (layer != missing), "{flag}: {line}");
        }
        ensure!((status(&daemon, "Seccomp")? == "2") == (missing != "seccomp"));
        ensure!(seen(&daemon, "/etc/passwd").exists() == (missing == "jail"));
        let admin = u64::from_str_radix(&status(&daemon, "CapEff")?, 16)? & 1 << 21;
        ensure!((admin != 0) == (missing == "capabilities"));
        let (code, answer) = scene.post(&daemon, "/tiny", &scene.journey.path(missing))?;
        ensure!(code == 204, "{flag}: {answer}");
        tree::assert_same(&reference, &daemon.root().join("tiny"), Overlook::default())?;
        let root = daemon.root().to_owned();
        ensure!(daemon.terminate()?.code() == Some(0) && !mounted(&root), "{flag}");
    }
    let daemon = DaemonOptions::empty().switch("--no-sandbox").start()?;
    ensure!(broker(&daemon)?.is_none() && status(&daemon, "Seccomp")? == "0");
    ensure!(seen(&daemon, "/etc/passwd").exists());
    ensure!(scene.post(&daemon, "/tiny", &scene.journey.path("bare"))?.0 == 204);
    tree::assert_same(&reference, &daemon.root().join("tiny"), Overlook::default())
}

/// The API's socket is the daemon's for whoever asks, and somebody else's file in its place is left alone.
#[test]
fn the_api_is_the_daemons_own() -> Result<()> {
    needs_mounts!();
    let mut daemon = DaemonOptions::empty().start()?;
    let meta = fs::metadata(daemon.socket())?;
    ensure!(meta.file_type().is_socket() && meta.permissions().mode() & 0o777 == 0o600);
    let stream = std::os::unix::net::UnixStream::connect(daemon.socket())?;
    let peer = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)?;
    ensure!(peer.pid() == daemon.pid().as_raw(), "{peer:?}");
    fs::remove_file(daemon.socket())?;
    let _listener = UnixListener::bind(daemon.socket())?;
    ensure!(daemon.terminate()?.code() == Some(0));
    ensure!(daemon.socket().exists());
    Ok(())
}

/// Starts what its arguments from the third on say without the system call of the first, which fails with the second.
const WITHOUT: &str = "\
import ctypes,os,struct,sys
number,errno=int(sys.argv[1]),int(sys.argv[2])
step=lambda code,yes,no,value: struct.pack('HBBI',code,yes,no,value)
steps=step(0x20,0,0,0)+step(0x15,0,1,number)+step(0x06,0,0,0x50000|errno)+step(0x06,0,0,0x7fff0000)
buffer=ctypes.create_string_buffer(steps)
class Filter(ctypes.Structure): _fields_=[('len',ctypes.c_ushort),('steps',ctypes.c_void_p)]
assert ctypes.CDLL(None).prctl(22,2,ctypes.byref(Filter(4,ctypes.addressof(buffer))),0,0)==0
os.execv(sys.argv[3],sys.argv[3:])
";

/// Whatever the jail fails at, and however far it was made by then, the daemon is back where it was and serves.
#[test]
fn a_jail_that_can_not_be_finished_is_left() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "python3");
    let scene = Scene::new()?;
    let reference = scene.journey.reference()?;
    let namespace = fs::read_link("/proc/self/ns/mnt")?;
    for (number, what) in [
        (libc::SYS_unshare, "a mount namespace"),
        (libc::SYS_setns, "enter a mount namespace"),
        (libc::SYS_open_tree, "what the jail shows"),
        (libc::SYS_mount_setattr, "what the jail shows"),
        (libc::SYS_fsopen, "the jail's root directory"),
        (libc::SYS_move_mount, "mount the root directory"),
        (libc::SYS_pivot_root, "change the root directory"),
        (libc::SYS_umount2, "leave the old root directory"),
    ] {
        let number = number.to_string();
        let launcher = ["python3", "-c", WITHOUT, &number, "1"];
        let mut daemon = DaemonOptions::empty().through(&launcher).start()?;
        let line = daemon.wait_for_log("sandbox without jail")?;
        ensure!(line.contains(what), "{what}: {line}");
        daemon.wait_for_log("sandboxed: broker, capabilities, landlock, seccomp")?;
        let place = |name: &str| fs::read_link(format!("/proc/{}/{name}", daemon.pid()));
        ensure!(place("ns/mnt")? == namespace && place("cwd")? == std::env::current_dir()?, "{what}");
        ensure!(place("root")? == Path::new("/") && seen(&daemon, "/etc/passwd").exists(), "{what}");
        let cache = scene.journey.path(&number);
        let (code, answer) = scene.post(&daemon, "/tiny", &cache)?;
        ensure!(code == 204 && cache.is_dir(), "{what}: {answer}");
        tree::assert_same(&reference, &daemon.root().join("tiny"), Overlook::default())?;
        let root = daemon.root().to_owned();
        // Who may not unmount leaves that to the end of the connection.
        let unmounts = number != libc::SYS_umount2.to_string();
        ensure!(daemon.terminate()?.code() == Some(0), "{what}");
        ensure!(!unmounts || !mounted(&root), "{what}");
    }
    Ok(())
}

/// What a launcher has open, and what it ignores, goes no further.
#[test]
fn nothing_of_the_launcher_stays() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let directory = tempfile::tempdir()?;
    let secret = directory.path().join("secret");
    fs::write(&secret, "secret")?;
    let careless = format!(
        "import os,signal,sys\n\
         for _ in range(20): os.set_inheritable(os.open({secret:?},os.O_RDWR),True)\n\
         signal.signal(signal.SIGCHLD,signal.SIG_IGN)\n"
    );
    let close_range = libc::SYS_close_range.to_string();
    let plain = format!("{careless}os.execv(sys.argv[1],sys.argv[1:])");
    let older = format!("{careless}{WITHOUT}");
    for launcher in [vec!["python3", "-c", &plain], vec!["python3", "-c", &older, &close_range, "38"]] {
        let daemon = DaemonOptions::empty().through(&launcher).start()?;
        let broker = broker(&daemon)?.context("no broker")?;
        for process in [daemon.pid(), broker] {
            for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
                // One that is closed meanwhile is not the one that is looked for.
                let Ok(name) = fs::read_link(entry?.path()) else { continue };
                ensure!(name != secret, "process {process} has it");
            }
        }
        let ignored = |process: Pid| -> Result<u64> {
            let text = fs::read_to_string(format!("/proc/{process}/status"))?;
            let set = text.lines().find_map(|line| line.strip_prefix("SigIgn:")).context("no SigIgn")?;
            Ok(u64::from_str_radix(set.trim(), 16)?)
        };
        let bit = |signal: Signal| 1 << (signal as i32 - 1);
        ensure!(ignored(daemon.pid())? & bit(Signal::SIGCHLD) != 0);
        // What it starts inherits what it ignores.
        let signals = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
        ensure!(signals.iter().all(|signal| ignored(broker).is_ok_and(|set| set & bit(*signal) == 0)));
    }
    Ok(())
}

/// What the daemon sees of its cache does not hold on to the mount that lies below it.
#[test]
fn a_cache_above_the_mountpoint_does_not_keep_the_mount() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    let mut daemon = DaemonOptions::empty().start()?;
    let above = daemon.root().parent().context("no parent")?.to_owned();
    let (code, answer) = scene.post(&daemon, "/tiny", &above)?;
    ensure!(code == 204, "{answer}");
    tree::assert_same(&scene.journey.reference()?, &daemon.root().join("tiny"), Overlook::default())?;
    nix::mount::umount2(daemon.root(), nix::mount::MntFlags::MNT_DETACH)?;
    let status = daemon.wait_ended()?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}
