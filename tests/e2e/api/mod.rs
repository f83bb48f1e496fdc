//! The HTTP API as its clients meet it: bytes on a socket, and nothing shared with the server.

mod contract;
mod counters;
mod hot;
mod limits;
mod openapi;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::Journey;
use tests::layout::Layout;
use tests::{Result, recipes};

/// How long an answer may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A local image with everything counted that can be counted; reads are not widened.
struct Site {
    journey: Journey,
    layout: Layout,
    bootstrap: PathBuf,
    config: PathBuf,
}

impl Site {
    fn new() -> Result<Self> {
        let journey = Journey::start(&recipes::tiny())?;
        let layout = journey.convert("nydus", &[])?;
        let (bootstrap, config) = (journey.path("image.boot"), journey.path("config.json"));
        layout.save_bootstrap(&bootstrap)?;
        // As a client writes it, with keys that mean nothing.
        let text = r#"{"device":{"id":"/site","backend":{"type":"localfs","config":{"dir":"BLOBS","readahead":false}},
            "cache":{"type":"blobcache","config":{"work_dir":"CACHE"}},"external_backend":{}},
            "mode":"direct","digest_validate":false,"iostats_files":true,"enable_xattr":true,
            "access_pattern":true,"latest_read_files":true,"amplify_io":0,"fs_prefetch":{"enable":false}}"#;
        let blobs = layout.path().join("blobs/sha256");
        let text = text.replace("BLOBS", &blobs.display().to_string());
        std::fs::write(&config, text.replace("CACHE", &journey.path("cache").display().to_string()))?;
        Ok(Self { journey, layout, bootstrap, config })
    }

    fn options(&self) -> DaemonOptions {
        DaemonOptions::bootstrap(&self.bootstrap, &self.config)
    }
}

/// One connection.
struct Wire(UnixStream);

/// One answer.
struct Answer {
    status: u16,
    /// Status line and headers in lower case.
    head: String,
    body: Vec<u8>,
}

impl Wire {
    fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.0.write_all(bytes)?)
    }

    /// The next answer, and nothing behind it.
    fn answer(&mut self) -> Result<Answer> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            ensure!(self.0.read(&mut byte)? == 1, "the end in {:?}", String::from_utf8_lossy(&head));
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?.to_lowercase();
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        let len = header(&head, "content-length").map_or(Ok(0), str::parse)?;
        let mut body = vec![0; len];
        self.0.read_exact(&mut body)?;
        Ok(Answer { status, head, body })
    }

    fn ask(&mut self, bytes: &[u8]) -> Result<Answer> {
        self.send(bytes)?;
        self.answer()
    }

    /// True if the server has closed it, false if it is open and silent.
    fn is_closed(&mut self) -> Result<bool> {
        self.0.set_nonblocking(true)?;
        let found = self.0.read(&mut [0]);
        self.0.set_nonblocking(false)?;
        match found {
            Ok(0) => Ok(true),
            Ok(_) => bail!("an answer that nobody asked for"),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for the server to close it.
    fn wait_closed(&mut self) -> Result<()> {
        match self.0.read_to_end(&mut Vec::new()) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// The value of a header of a head in lower case.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

impl Answer {
    fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("{self:?}"))
    }

    /// The message of an error, which is all that an error has but its constant code.
    fn message(&self) -> Result<String> {
        let document = self.json()?;
        let members = document.as_object().context("no object")?;
        ensure!(members.len() == 2 && document["code"] == "UNDEFINED", "{document}");
        Ok(document["message"].as_str().context("no message")?.to_owned())
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.head, String::from_utf8_lossy(&self.body))
    }
}

/// What Go's HTTP client sends over a unix socket.
fn go(method: &str, path: &str, body: &str) -> Vec<u8> {
    let agent = "Host: unix\r\nUser-Agent: Go-http-client/1.1\r\n";
    let content = match (method, body) {
        ("GET" | "DELETE", "") => String::new(),
        (_, "") => "Content-Length: 0\r\n".to_owned(),
        _ => format!("Content-Length: {}\r\nContent-Type: application/json\r\n", body.len()),
    };
    format!("{method} {path} HTTP/1.1\r\n{agent}{content}Accept-Encoding: gzip\r\n\r\n{body}").into_bytes()
}

/// Asks as Go's client does, on a connection of its own.
fn ask(daemon: &Daemon, method: &str, path: &str, body: &str) -> Result<Answer> {
    Wire::open(daemon.socket())?.ask(&go(method, path, body))
}

/// The document of a GET that is answered with 200.
fn get(daemon: &Daemon, path: &str) -> Result<Value> {
    let answer = ask(daemon, "GET", path, "")?;
    ensure!(answer.status == 200, "{path}: {answer:?}");
    answer.json()
}
