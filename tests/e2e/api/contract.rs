//! Transport, errors, daemon info, events: contract 3.1 to 3.4 and 3.6.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::json;
use tests::{Result, binaries, command, needs_mounts};

use super::{Site, Wire, ask, get, go, header};

/// Info has every member that a client decodes, with its type; `version` is that of `--version`.
#[test]
fn daemon_info_is_what_clients_decode() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    // kata's agent, a shell, a supervisor.
    for request in [
        &b"GET /api/v1/daemon HTTP/1.1\r\nHost: nydusd\r\n\r\n"[..],
        b"GET /api/v1/daemon HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n",
        b"GET http://unix/api/v1/daemon HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n",
        b"GET /api/v1/daemon HTTP/1.1\r\nhost:x\r\ncontent-type: application/json\r\ncontent-length: 0\r\n\r\n",
    ] {
        let answer = Wire::open(daemon.socket())?.ask(request)?;
        ensure!(answer.status == 200, "{answer:?}");
        ensure!(header(&answer.head, "content-type") == Some("application/json"), "{answer:?}");
        ensure!(header(&answer.head, "connection") == Some("keep-alive"), "{answer:?}");
        let info = answer.json()?;
        ensure!(info["state"] == "RUNNING" && info["id"].is_null() && info["supervisor"].is_null(), "{info}");
        for key in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
            ensure!(info["version"][key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {info}");
        }
        let instance = &info["backend_collection"]["/"];
        ensure!(instance["backend_type"] == "Rafs" && instance["mountpoint"] == "/", "{info}");
        ensure!(instance["mounted_time"].is_string() && instance["config"]["version"] == 2, "{info}");
        ensure!(instance["config"]["id"] == "/site", "{info}");
    }
    let printed = command::run(Command::new(binaries::nydusd()).arg("--version"))?;
    let commit =
        printed.split("Git Commit:").nth(1).and_then(|rest| rest.lines().next()).context("no commit")?;
    let info = get(&daemon, "/api/v2/daemon")?;
    ensure!(info["version"]["git_commit"] == commit.trim(), "{printed} {info}");
    ensure!(info["state"] == "RUNNING" && info["backend_collection"].is_null(), "{info}");
    Ok(())
}

/// Every way to ask wrongly has its status and the text that clients search for.
#[test]
fn errors_have_their_status_and_text() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let level = r#"{"log_level":"info"}"#;
    for (method, path, body, status, message) in [
        ("GET", "/", "", 404, "NoRoute"),
        ("GET", "/api/v1/nothing", "", 404, "NoRoute"),
        ("GET", "/api/v1/daemon/", "", 404, "NoRoute"),
        ("DELETE", "/api/v1/daemon", "", 400, "BadRequest"),
        ("POST", "/api/v1/daemon", level, 400, "BadRequest"),
        ("GET", "/api/v1/mount", "", 400, "BadRequest"),
        ("PUT", "/api/v1/metrics", "", 400, "BadRequest"),
        // A body where none belongs, none where one does.
        ("PUT", "/api/v1/daemon/exit", level, 400, "BadRequest"),
        ("PUT", "/api/v1/daemon/start", level, 400, "BadRequest"),
        ("PUT", "/api/v1/daemon", "", 400, "BadRequest"),
        ("POST", "/api/v1/mount?mountpoint=/x", "", 400, "BadRequest"),
        ("PUT", "/api/v1/config?id=/", "", 400, "BadRequest"),
        ("PUT", "/api/v2/blobs", "", 400, "BadRequest"),
        ("DELETE", "/api/v1/mount", "", 400, "QueryString("),
        // Bytes that are no text, which would make two mountpoints one.
        ("DELETE", "/api/v1/mount?mountpoint=%FF", "", 400, "QueryString("),
        ("GET", "/api/v1/metrics?id=/a%C3", "", 400, "QueryString("),
        ("POST", "/api/v1/mount", "{}", 400, "QueryString("),
        ("GET", "/api/v1/daemon/backend", "", 400, "QueryString("),
        ("PUT", "/api/v1/daemon", "{", 400, "ParseBody("),
        ("PUT", "/api/v1/daemon", "{}", 400, "ParseBody("),
        ("PUT", "/api/v2/daemon", "[]", 400, "ParseBody("),
        ("PUT", "/api/v1/config?id=/", r#"{"registry_auth":7}"#, 400, "ParseBody("),
        ("PUT", "/api/v2/blobs", "no", 400, "ParseBody("),
        ("PUT", "/api/v1/daemon", r#"{"log_level":"loud"}"#, 500, "Configure(ResponsePayloadType)"),
        ("PUT", "/api/v1/config?id=/", r#"{"registry_aut":"x"}"#, 500, "Configure(ResponsePayloadType)"),
        ("PUT", "/api/v1/daemon/start", "", 400, r#"Configure(DaemonAbnormal(UnexpectedEvent("Start")))"#),
        (
            "PUT",
            "/api/v1/daemon/fuse/takeover",
            "",
            400,
            r#"Upgrade(DaemonAbnormal(UnexpectedEvent("Takeover")))"#,
        ),
        (
            "POST",
            "/api/v1/mount?mountpoint=/x",
            r#"{"fs_type":"rafs","source":"/x","config":" "}"#,
            500,
            "Mount(MountFilesystem(Other(\"invalid argument: `config` is empty, and an image needs one: the text of a \
             configuration file, which says where its blobs are and where its cache is (",
        ),
        ("GET", "/api/v1/metrics?id=/none", "", 404, "GlobalMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/files?id=/none", "", 404, "FsFilesMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/pattern?id=/none", "", 404, "Pattern(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/backend?id=/none", "", 404, "BackendMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/blobcache?id=/none", "", 404, "BlobcacheMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/daemon/backend?mountpoint=/none", "", 500, "FsBackendInfo("),
        ("GET", "/api/v2/blobs?domain_id=d", "", 501, "GetBlobObjects(DaemonAbnormal(Unsupported))"),
        (
            "PUT",
            "/api/v2/blobs",
            r#"{"type":"bootstrap","id":"a","domain_id":"d"}"#,
            501,
            "CreateBlobObject(DaemonAbnormal(Unsupported))",
        ),
        (
            "DELETE",
            "/api/v2/blobs?domain_id=d&blob_id=b",
            "",
            501,
            "DeleteBlobObject(DaemonAbnormal(Unsupported))",
        ),
    ] {
        let answer = ask(&daemon, method, path, body)?;
        ensure!(answer.status == status, "{method} {path}: {answer:?}");
        let found = answer.message()?;
        let is_whole = !message.ends_with('(');
        ensure!(
            if is_whole { found == message } else { found.starts_with(message) },
            "{method} {path}: {found}"
        );
    }
    Ok(())
}

/// What is no HTTP is told so in the shape of all errors, and let go.
#[test]
fn what_is_no_http_is_an_error_like_others() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(70_000));
    for (request, status) in [
        (&b"GET\r\n\r\n"[..], 400),
        (b"GET /api/v1/daemon HTTP/1.1\r\nHost x\r\n\r\n", 400),
        (b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n", 400),
        (long.as_bytes(), 0),
    ] {
        let mut wire = Wire::open(daemon.socket())?;
        // A server that has seen enough may not take all of it.
        let _ = wire.send(request);
        let answer = wire.answer()?;
        ensure!((400..500).contains(&answer.status) && [0, answer.status].contains(&status), "{answer:?}");
        ensure!(answer.message()? == "BadRequest", "{answer:?}");
        ensure!(header(&answer.head, "content-type") == Some("application/json"), "{answer:?}");
        wire.wait_closed()?;
    }
    Ok(())
}

/// 204 has neither a body nor its length, and the connection goes on.
#[test]
fn nothing_to_say_is_204_without_a_length() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let mut wire = Wire::open(daemon.socket())?;
    for (method, path, body) in [
        ("GET", "/api/v1/metrics/inflight", ""),
        ("PUT", "/api/v1/daemon", r#"{"log_level":"info"}"#),
        ("PUT", "/api/v2/daemon", r#"{"log_level":"info","more":1}"#),
        ("PUT", "/api/v1/config?id=%2F", r#"{"registry_auth":""}"#),
        ("DELETE", "/api/v2/blobs?blob_id=abc", ""),
    ] {
        let answer = wire.ask(&go(method, path, body))?;
        ensure!(answer.status == 204 && header(&answer.head, "content-length").is_none(), "{answer:?}");
    }
    let answer = wire.ask(&go("PUT", "/api/v1/daemon/exit", ""))?;
    ensure!(answer.status == 204, "{answer:?}");
    Ok(())
}

/// A mountpoint may be written in any way that a URL allows; a body may wait to be asked for.
#[test]
fn urls_and_bodies_come_in_all_shapes() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    for id in ["?id=/", "?id=%2F", "?id=%2f", "?x=1&id=%2Fsite", "?id=/site&latest=true", "", "?id="] {
        let metrics = get(&daemon, &format!("/api/v1/metrics{id}"))?;
        ensure!(metrics["id"] == "/", "{id}: {metrics}");
    }
    let mut wire = Wire::open(daemon.socket())?;
    wire.send(
        b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\nExpect: 100-continue\r\n\r\n",
    )?;
    ensure!(wire.answer()?.status == 100, "no permission to go on");
    ensure!(wire.ask(br#"{"log_level":"info"}"#)?.status == 204, "not done");
    wire.send(b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    ensure!(
        wire.ask(b"8\r\n{\"log_le\r\nc\r\nvel\":\"info\"}\r\n0\r\n\r\n")?.status == 204,
        "not done in pieces"
    );
    Ok(())
}

/// The superblock of the image, as its own bytes have it.
#[test]
fn backend_info_is_the_superblock() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let found = get(&daemon, "/api/v1/daemon/backend?mountpoint=/")?;
    let bytes = fs::read(&site.bootstrap)?;
    let number = |at: usize, len: usize| {
        let mut word = [0; 8];
        word[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(word)
    };
    for (key, value) in [
        ("magic", 3_774_210_530),
        ("version", 1536),
        ("root_nid", number(1024 + 14, 2)),
        ("root_inode", number(1024 + 14, 2)),
        ("inodes_count", number(1024 + 16, 8)),
        ("meta_blkaddr", number(1024 + 40, 4)),
        ("blob_device_table_count", number(1024 + 86, 2)),
        ("blob_device_table_offset", number(1024 + 88, 2) * 128),
        ("blob_table_offset", number(1152 + 8, 8)),
        ("blob_table_size", number(1152 + 16, 4)),
        ("chunk_size", number(1152 + 20, 4)),
        ("chunk_table_offset", number(1152 + 24, 8)),
        ("chunk_table_size", number(1152 + 32, 8)),
    ] {
        ensure!(found[key] == value, "{key}: {value}: {found}");
    }
    ensure!(found["flags"] == json!({ "bits": number(1152, 8) }), "{found}");
    ensure!(found["entry_timeout"] == json!({ "secs": 1_u64 << 32, "nanos": 0 }), "{found}");
    Ok(())
}

/// An error that a reader met is told: what, where, and within bounds.
#[test]
fn events_hold_the_errors_that_were_met() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let before = get(&daemon, "/api/v1/daemon/events")?;
    ensure!(before["max_errors"] == 500 && before["max_size"] == 51_200, "{before}");
    ensure!(before["errors"] == json!([]) && before["total_size"] == 0, "{before}");
    for blob in site.layout.data_blobs()? {
        fs::remove_file(site.layout.blob_path(&blob.digest))?;
    }
    ensure!(fs::read(daemon.root().join("data/noise-a")).is_err(), "a blob that is gone was read");
    let events = daemon.wait_until("the error is an event", |daemon| {
        let events = get(daemon, "/api/v1/daemon/events")?;
        Ok((events["total_errors"] != 0).then_some(events))
    })?;
    let errors: Vec<&str> =
        events["errors"].as_array().into_iter().flatten().filter_map(|e| e.as_str()).collect();
    ensure!(errors.iter().any(|error| error.contains("/data/noise-a")), "{events}");
    ensure!(events["total_errors"] == errors.len(), "{events}");
    ensure!(events["total_size"] == errors.iter().map(|error| error.len()).sum::<usize>(), "{events}");
    Ok(())
}

/// The threshold of the log changes at once, in both directions.
#[test]
fn the_log_level_is_that_of_the_last_request() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let prefetch =
        |files: &str| ask(&daemon, "POST", "/api/v1/prefetch", &format!(r#"{{"files":["{files}"]}}"#));
    let set = |level: &str| ask(&daemon, "PUT", "/api/v1/daemon", &format!(r#"{{"log_level":"{level}"}}"#));
    // A job that ends says so at level info; the error that follows proves that its line could
    // have been there.
    for (level, wanted) in [("error", false), ("debug", true), ("warn", false), ("info", true)] {
        ensure!(set(level)?.status == 204, "{level}");
        let before = daemon.log().lines().filter(|line| line.contains("INFO")).count();
        let answer = prefetch("/etc/hostname")?;
        let id = answer.json()?["id"].as_u64().with_context(|| format!("{answer:?}"))?;
        daemon.wait_until("the job ends", |daemon| {
            let job = get(daemon, &format!("/api/v1/prefetch?id={id}"))?;
            Ok((job["state"] == "done").then_some(()))
        })?;
        let informed = || daemon.log().lines().filter(|line| line.contains("INFO")).count() > before;
        match wanted {
            true => daemon.wait_until("an informing line", |_| Ok(informed().then_some(())))?,
            false => ensure!(!informed(), "{level}: {}", daemon.log()),
        }
    }
    Ok(())
}

/// The socket is its owner's; a stale one is replaced; the end of the process is the end of its
/// connections, and of nothing before.
#[test]
fn the_socket_lives_as_long_as_the_daemon() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let mut daemon = site.options().start()?;
    let mode = fs::metadata(daemon.socket())?.permissions().mode();
    ensure!(mode & 0o7777 == 0o600, "{mode:o}");
    let mut silent = Wire::open(daemon.socket())?;
    get(&daemon, "/api/v1/daemon")?;
    ensure!(!silent.is_closed()?, "a silent connection was closed");
    daemon.kill()?;
    silent.wait_closed()?;
    ensure!(daemon.socket().exists() && Wire::open(daemon.socket()).is_err(), "a dead daemon's socket");

    // At the path of the dead one.
    let mountpoint = site.journey.path("again");
    fs::create_dir(&mountpoint)?;
    let mount = tests::mount::Mount::guard(&mountpoint);
    let mut next = Command::new(binaries::nydusd());
    next.arg("--mountpoint").arg(mount.path()).arg("--apisock").arg(daemon.socket());
    let mut child = next.arg("--config").arg(&site.config).arg("--bootstrap").arg(&site.bootstrap).spawn()?;
    let answered = daemon.wait_until("the next daemon answers", |daemon| {
        Ok(get(daemon, "/api/v1/daemon").ok().filter(|info| info["state"] == "RUNNING"))
    });
    let exit = ask(&daemon, "PUT", "/api/v1/daemon/exit", "");
    if answered.is_err() || exit.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    ensure!(answered?["backend_collection"]["/"]["mountpoint"] == "/", "no mount");
    ensure!(exit?.status == 204 && status.code() == Some(0), "{status}");
    ensure!(!daemon.socket().exists(), "the socket is left");
    Ok(())
}
