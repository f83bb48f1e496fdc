//! Silent, slow, impatient and hostile clients: none of them is in another's way.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tests::{Result, command, needs_mounts, needs_programs};

use super::{Site, Wire, ask, get, go};

/// Nobody who is silent is closed or in the way, however many there are.
#[test]
fn silent_connections_stay_open() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let mut silent = (0..300).map(|_| Wire::open(daemon.socket())).collect::<Result<Vec<_>>>()?;
    for _ in 0..20 {
        get(&daemon, "/api/v1/daemon")?;
    }
    for wire in &mut silent {
        ensure!(!wire.is_closed()?, "a silent connection was closed");
    }
    // And any of them may speak at last, more than once.
    let last = silent.last_mut().context("none")?;
    for _ in 0..2 {
        ensure!(last.ask(&go("GET", "/api/v1/daemon", ""))?.status == 200, "no answer");
    }
    Ok(())
}

/// Requests that come together are answered in their order; one that comes in pieces is waited
/// for, and nobody waits with it.
#[test]
fn impatient_and_slow_clients_are_served() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let mut wire = Wire::open(daemon.socket())?;
    let requests = [
        go("GET", "/api/v1/nothing", ""),
        go("PUT", "/api/v1/daemon", r#"{"log_level":"info"}"#),
        go("GET", "/api/v1/daemon", ""),
        go("PUT", "/api/v1/daemon", "{"),
    ];
    wire.send(&requests.concat())?;
    for status in [404, 204, 200, 400] {
        ensure!(wire.answer()?.status == status, "out of order");
    }
    let request = go("PUT", "/api/v2/daemon", r#"{"log_level":"info"}"#);
    for byte in &request[..request.len() - 1] {
        wire.send(&[*byte])?;
    }
    get(&daemon, "/api/v1/daemon")?;
    ensure!(!wire.is_closed()?, "a slow client was closed");
    ensure!(wire.ask(&request[request.len() - 1..])?.status == 204, "no answer to a slow client");
    Ok(())
}

/// What is no HTTP, has no end or is too large ends its own connection and nothing else.
#[test]
fn hostile_requests_end_their_own_connection() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let mut silent = Wire::open(daemon.socket())?;
    let endless = [b"GET /api/v1/daemon HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 1 << 20]].concat();
    let many = [b"GET / HTTP/1.1\r\n".to_vec(), b"A: b\r\n".repeat(5000)].concat();
    let long = [b"GET /".to_vec(), vec![b'a'; 1 << 20]].concat();
    for bytes in
        [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..], b"GET\r\n\r\n", &endless, &many, &long]
    {
        let mut wire = Wire::open(daemon.socket())?;
        // It may be refused before its end.
        let _ = wire.send(bytes);
        wire.wait_closed()?;
    }
    let mut wire = Wire::open(daemon.socket())?;
    let head = "PUT /api/v1/config?id=/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4194305\r\n\r\n";
    let answer = wire.ask(head.as_bytes())?;
    ensure!(answer.status == 413 && answer.message()?.starts_with("BadRequest("), "{answer:?}");
    // In pieces without an end, so that no length tells.
    let mut wire = Wire::open(daemon.socket())?;
    wire.send(b"PUT /api/v1/config?id=/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    let piece = [b"100000\r\n".to_vec(), vec![b' '; 1 << 20], b"\r\n".to_vec()].concat();
    for _ in 0..5 {
        let _ = wire.send(&piece);
    }
    ensure!(wire.answer()?.status == 413, "no end of a body");
    // One that is large and allowed.
    let value = "x".repeat(2 << 20);
    let answer = ask(&daemon, "PUT", "/api/v1/config?id=/", &format!(r#"{{"registry_auth":"{value}"}}"#))?;
    ensure!(
        answer.status == 500 && answer.message()?.starts_with("Configure(InvalidArguments("),
        "{answer:?}"
    );
    get(&daemon, "/api/v1/daemon")?;
    ensure!(!silent.is_closed()?, "another connection was closed");
    Ok(())
}

/// One connection too many is told so; those that are open stay, and who closes makes room.
#[test]
fn the_number_of_connections_is_bounded() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    // A quarter of its descriptors: 256 connections, which every client may count on.
    let daemon = site.options().flag("--rlimit-nofile", "1024").start()?;
    let mut silent = (0..256).map(|_| Wire::open(daemon.socket())).collect::<Result<Vec<_>>>()?;
    let mut refused = Wire::open(daemon.socket())?;
    let answer = refused.answer()?;
    ensure!(answer.status == 503 && answer.message()?.contains("connections"), "{answer:?}");
    refused.wait_closed()?;
    for wire in &mut silent {
        ensure!(!wire.is_closed()?, "an open connection was closed");
    }
    silent.pop();
    daemon.wait_until("there is room again", |daemon| {
        let answer = ask(daemon, "GET", "/api/v1/daemon", "");
        Ok(answer.ok().filter(|answer| answer.status == 200))
    })?;
    Ok(())
}

/// Another user is refused even where the socket's mode would let them in.
#[test]
fn other_users_are_refused() -> Result<()> {
    needs_mounts!();
    needs_programs!("python3");
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let directory = daemon.socket().parent().context("a socket in no directory")?;
    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    fs::set_permissions(daemon.socket(), Permissions::from_mode(0o666))?;
    let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                  data = b''\nwhile piece := s.recv(4096):\n    data += piece\nsys.stdout.write(data.decode())";
    let mut nobody = Command::new("python3");
    let answer = command::run(nobody.arg("-c").arg(script).arg(daemon.socket()).uid(65534).current_dir("/"))?;
    ensure!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    let body: Value = serde_json::from_str(body)?;
    ensure!(body["code"] == "UNDEFINED" && body["message"].is_string(), "{body}");
    get(&daemon, "/api/v1/daemon").map(drop)
}
