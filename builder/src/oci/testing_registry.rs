//! Debian's `docker-registry` on a free loopback port, a line to it that can be cut, and a
//! registry of our own that keeps what a cut request brought.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A running registry with empty storage.
pub struct Registry {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Registry {
    /// Starts one; `None`, with a word about it, where it is not installed.
    pub fn start() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: \
             127.0.0.1:0\n",
            dir.path().join("data").display()
        );
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let started = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = started else {
            println!("skipped: docker-registry is not installed");
            return None;
        };
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the registry ended before it listened");
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ' ', '\n']).next().unwrap().to_owned();
            }
        };
        // The pipe must not fill up.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Some(Self { child, address, _dir: dir })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A TCP line to `upstream` that breaks whenever the client has sent so many bytes.
pub struct Line {
    address: String,
    /// Bytes sent by clients in all.
    sent: Arc<AtomicU64>,
}

impl Line {
    /// Breaks `cuts` times, each time after `every` more bytes of one connection.
    pub fn new(upstream: &str, every: u64, cuts: i64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let sent = Arc::new(AtomicU64::new(0));
        let (upstream, counter, cuts) =
            (upstream.to_owned(), Arc::clone(&sent), Arc::new(AtomicI64::new(cuts)));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(&upstream)) else { break };
                let (counter, cuts) = (Arc::clone(&counter), Arc::clone(&cuts));
                let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                std::thread::spawn(move || forward(client, server, every, &counter, &cuts));
            }
        });
        Self { address, sent }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }
}

fn forward(mut client: TcpStream, mut server: TcpStream, every: u64, sent: &AtomicU64, cuts: &AtomicI64) {
    let mut buf = [0; 16 << 10];
    let mut passed = 0;
    while let Ok(got) = client.read(&mut buf) {
        if got == 0 || server.write_all(&buf[..got]).is_err() {
            break;
        }
        passed += got as u64;
        sent.fetch_add(got as u64, Ordering::SeqCst);
        if passed >= every && cuts.fetch_sub(1, Ordering::SeqCst) > 0 {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

/// Takes one blob, over connections of one request each. Every second PATCH is cut in the middle
/// of its body; the bytes before the cut are kept, as the specification allows.
pub struct FakeRegistry {
    pub address: String,
    pub state: Arc<Mutex<FakeState>>,
}

#[derive(Default)]
pub struct FakeState {
    pub stored: Vec<u8>,
    pub sessions: u32,
    /// Body bytes of all requests.
    pub received: u64,
    patches: u32,
}

impl FakeRegistry {
    pub fn start(takes_parts: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(FakeState::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { break };
                // A client that goes away is the client's affair.
                let _ = answer(stream, takes_parts, &mut shared.lock().unwrap());
            }
        });
        Self { address, state }
    }
}

fn answer(stream: TcpStream, takes_parts: bool, state: &mut FakeState) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    let (mut head, mut length) = (String::new(), 0u64);
    while !head.ends_with("\r\n\r\n") {
        let start = head.len();
        if input.read_line(&mut head)? == 0 {
            return Ok(());
        }
        let line = head[start..].to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let method = head.split(' ').next().unwrap();
    let cut = method == "PATCH" && takes_parts && {
        state.patches += 1;
        state.patches.is_multiple_of(2)
    };
    let mut body = Vec::new();
    input.take(if cut { length / 2 } else { length }).read_to_end(&mut body)?;
    state.received += body.len() as u64;
    let range = |state: &FakeState| format!("Range: 0-{}\r\n", state.stored.len().max(1) - 1);
    let (status, headers) = match method {
        "HEAD" => ("404 Not Found", String::new()),
        "POST" => {
            state.sessions += 1;
            state.stored.clear();
            ("202 Accepted", String::new())
        }
        "GET" => ("204 No Content", range(state)),
        "PATCH" if !takes_parts => ("405 Method Not Allowed", String::new()),
        "PATCH" => {
            state.stored.extend_from_slice(&body);
            ("202 Accepted", range(state))
        }
        _ => {
            state.stored.extend_from_slice(&body);
            ("201 Created", String::new())
        }
    };
    if cut {
        return stream.shutdown(Shutdown::Both);
    }
    let length = if status.starts_with("204") { "" } else { "Content-Length: 0\r\n" };
    write!(
        &stream,
        "HTTP/1.1 {status}\r\nLocation: /v2/session?x=1\r\nConnection: close\r\n{headers}{length}\r\n"
    )
}
