//! The daemon's life as its clients see it: start, API, signals, refusals.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{PROMPT, Site};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn site() -> Site {
    Site::new("none-4k/image.boot", &["none-4k/image.blob"])
}

#[test]
fn sigterm_unmounts_and_ends_with_0() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    let mut daemon = site.start(&[]);
    // A user in the mount does not hold it.
    let held = std::fs::File::open(site.mount().join("files/exact_1m")).unwrap();
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(begin.elapsed().as_secs() < 2, "{:?}", begin.elapsed());
    assert!(!site.is_mounted());
    assert!(!daemon.socket.exists());
    drop(held);
}

#[test]
fn an_outside_unmount_ends_the_daemon() {
    if !crate::common::can_mount() {
        return;
    }
    for flags in [MntFlags::empty(), MntFlags::MNT_DETACH] {
        let site = site();
        let mut daemon = site.start(&[]);
        std::fs::read(site.mount().join("files/exact_4k")).unwrap();
        let begin = Instant::now();
        // The kernel ends its own read-ahead only after the read was answered.
        while let Err(e) = umount2(&site.mount(), flags) {
            assert!(e == Errno::EBUSY && begin.elapsed() < PROMPT, "{e}");
            std::thread::yield_now();
        }
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(!daemon.socket.exists());
    }
}

#[test]
fn exit_leaves_the_mount_and_the_next_start_says_what_to_do() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    let mut daemon = site.start(&[]);
    assert_eq!(daemon.request("PUT", "/api/v1/daemon/exit", "").0, 204);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(site.is_mounted());
    assert!(!daemon.socket.exists());
    let output = site.command(&[]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.lines().any(|line| line.starts_with("Error:") && line.contains("umount -l")), "{stderr}");
}

#[test]
fn the_api_answers_as_its_clients_expect() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    // One read is one chunk.
    site.configure("batch_size = 0");
    let daemon = site.start(&[]);
    assert_eq!(std::fs::metadata(&daemon.socket).unwrap().permissions().mode() & 0o777, 0o600);

    // A silent connection stays open whatever else happens.
    let mut silent = UnixStream::connect(&daemon.socket).unwrap();

    let info = daemon.get("/api/v1/daemon");
    assert_eq!(info["state"], "RUNNING");
    assert_eq!(info["version"]["git_commit"], nydusd::version::GIT_COMMIT);
    assert_eq!(info["backend_collection"]["/"]["backend_type"], "Rafs");
    assert_eq!(info["backend_collection"]["/"]["config"]["id"], "test");

    assert_eq!(std::fs::read(site.mount().join("files/one_byte")).unwrap().len(), 1);
    for path in ["/api/v1/metrics", "/api/v1/metrics?id=/", "/api/v1/metrics?id=%2F"] {
        let metrics = daemon.get(path);
        assert_eq!((&metrics["data_read"], &metrics["nr_opens"]), (&1.into(), &0.into()), "{path}");
        assert_eq!((&metrics["fop_hits"][4], &metrics["block_count_read"][0]), (&1.into(), &1.into()));
    }
    let cache = daemon.get("/api/v1/metrics/blobcache?id=test");
    assert_eq!((&cache["fetched_chunks"], &cache["data_all_ready"]), (&1.into(), &false.into()));
    assert_eq!(daemon.get("/api/v1/metrics/backend")["backend_type"], "localfs");
    assert_eq!(daemon.request("GET", "/api/v1/metrics/inflight", ""), (204, String::new()));

    for (method, path, body, status, text) in [
        ("GET", "/api/v1/metrics?id=/nowhere", "", 404, "GlobalMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/pattern?id=/nowhere", "", 404, "Pattern(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/nothing", "", 404, "NoRoute"),
        ("POST", "/api/v1/daemon", "", 400, "BadRequest"),
        ("DELETE", "/api/v2/blobs?blob_id=abc", "", 204, ""),
        ("DELETE", "/api/v2/blobs?domain_id=d&blob_id=abc", "", 501, "DeleteBlobObject("),
        ("POST", "/api/v1/mount", "{}", 400, "QueryString("),
        ("POST", "/api/v1/mount?mountpoint=/x", "{}", 400, "missing field `source`"),
        ("PUT", "/api/v1/daemon/start", "", 400, "UnexpectedEvent(\\\"Start\\\")"),
        ("PUT", "/api/v1/daemon/fuse/takeover", "", 400, "UnexpectedEvent(\\\"Takeover\\\")"),
        ("PUT", "/api/v1/daemon", "no json", 400, "ParseBody("),
        ("PUT", "/api/v1/daemon", "{\"log_level\":\"loud\"}", 500, "Configure(ResponsePayloadType)"),
        ("PUT", "/api/v1/daemon", "{\"log_level\":\"debug\"}", 204, ""),
    ] {
        let (found, body) = daemon.request(method, path, body);
        assert_eq!(found, status, "{method} {path}: {body}");
        assert!(body.contains(text), "{method} {path}: {body}");
        assert!(status == 204 || body.starts_with("{\"code\":\"UNDEFINED\",\"message\":"), "{body}");
    }

    silent.set_read_timeout(Some(PROMPT)).unwrap();
    silent.write_all(b"GET /api/v1/metrics/inflight HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut head = [0; 12];
    silent.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 204");

    for arguments in
        [&["info"][..], &["metrics", "fsstats"], &["metrics", "backend"], &["--raw", "metrics", "cache"]]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_nydusctl"))
            .arg("--sock")
            .arg(&daemon.socket)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success() && !output.stdout.is_empty(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn an_image_that_is_not_the_demanded_one_is_refused() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    let zeros = "0".repeat(64);
    let bootstrap = std::fs::read(&site.bootstrap).unwrap();
    let digest = storage::digest::DigestAlgorithm::Sha256.digest(&bootstrap);
    let image = rafs::bootstrap::from_bytes(bootstrap, &rafs::bootstrap::OpenOptions::default()).unwrap();
    let root = rafs::merkle::image_root(&*image).unwrap();

    let refused = |extra: &[&str], text: &str| {
        let output = site.command(extra).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{extra:?}: {stderr}");
        assert!(stderr.lines().any(|l| l.starts_with("Error:") && l.contains(text)), "{extra:?}: {stderr}");
        assert!(!site.is_mounted());
    };
    refused(&["--expect-root", &format!("sha256:{zeros}")], "root digest");
    refused(&["--expect-root", &format!("blake3:{zeros}")], "root digest");
    refused(&["--expect-bootstrap", &format!("sha256:{zeros}")], &zeros);
    site.configure(&format!("expect_root = 'blake3:{zeros}'"));
    refused(&[], "root digest");
    site.configure(&format!("expect_bootstrap = 'sha256:{zeros}'"));
    refused(&[], &zeros);

    // The command line goes before the document.
    let extra = ["--expect-bootstrap", &format!("sha256:{digest}"), "--expect-root", &root.to_string()];
    let _daemon = site.start(&extra.map(|argument| argument));
}

#[test]
fn a_damaged_blob_is_an_error_and_one_line_and_heals() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    let daemon = site.start(&[]);
    let blob = std::fs::read_dir(site.path("blobs")).unwrap().next().unwrap().unwrap().path();
    let good = std::fs::read(&blob).unwrap();
    std::fs::write(&blob, vec![b'!'; good.len()]).unwrap();
    let file = site.mount().join("files/exact_4k");
    assert_eq!(std::fs::read(&file).unwrap_err().raw_os_error(), Some(libc::EIO));
    let line = daemon.wait_for_line("/files/exact_4k");
    let id = blob.file_name().unwrap().to_str().unwrap();
    assert!(line.contains("ERROR") && line.contains(id) && line.contains("chunk"), "{line}");
    std::fs::write(&blob, good).unwrap();
    assert_eq!(std::fs::read(&file).unwrap().len(), 4096);
}

#[test]
fn nothing_can_be_written_and_nothing_is_left_of_a_bad_start() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    {
        let _daemon = site.start(&[]);
        let error = std::fs::write(site.mount().join("new"), "x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }
    std::fs::write(site.path("bad.boot"), vec![7; 8192]).unwrap();
    let mut bad = site;
    bad.bootstrap = bad.path("bad.boot");
    let output = bad.command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(!bad.is_mounted());
}

/// A daemon that was told to end while it started used to leave a dead mount, or a process that
/// nothing could kill: it waited for the answer of its own mount.
#[test]
fn a_signal_during_the_start_leaves_nothing() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    for number in 0..40u64 {
        let mut child = site.command(&[]).stderr(std::process::Stdio::null()).spawn().unwrap();
        // Not to wait for something, but to hit every moment of the start.
        std::thread::sleep(Duration::from_micros(number * 700));
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(child.wait().unwrap()));
        let status = ended.recv_timeout(PROMPT).expect("the daemon does not end");
        // Before its first instructions the signal kills it.
        assert!(status.code() == Some(0) || status.signal() == Some(libc::SIGTERM), "{status}");
        assert!(!site.is_mounted(), "round {number}");
    }
}

/// A typing mistake in `--apisock` used to delete the file it named.
#[test]
fn a_file_that_is_no_socket_is_not_replaced() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    std::fs::write(site.path("api.sock"), "precious").unwrap();
    let output = site.command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is no socket"), "{output:?}");
    assert_eq!(std::fs::read(site.path("api.sock")).unwrap(), b"precious");
    assert!(!site.is_mounted());
}

/// Supervisors hold silent connections and take their end for the daemon's death.
#[test]
fn silent_and_slow_connections_hold_nobody_up() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site();
    let mut daemon = site.start(&[]);
    let mut connections: Vec<_> = (0..256).map(|_| UnixStream::connect(&daemon.socket).unwrap()).collect();
    for slow in connections.iter_mut().step_by(2) {
        slow.write_all(b"PUT /api/v1/daemon HTTP/1.1\r\nContent-Length: 99\r\n\r\n{").unwrap();
    }
    assert_eq!(daemon.get("/api/v1/daemon")["state"], "RUNNING");
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(begin.elapsed().as_secs() < 2, "{:?}", begin.elapsed());
}
