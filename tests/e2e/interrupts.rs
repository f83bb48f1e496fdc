//! `nydus-image convert` that is told to stop in the middle of its push.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::image::{Entry, Image};
use tests::journey::{Journey, convert, nydus_image, within};
use tests::recipes::noise;
use tests::registry::Registry;
use tests::{Context, Result, ensure, needs_programs};

/// Bytes of the push that still go through.
const PASSED: usize = 1 << 20;
/// How long a pushing program may take to come to its first MiB, or to its end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Hands on what comes until the clients have sent [`PASSED`] bytes, and nothing after that.
struct Clogged {
    address: SocketAddr,
    /// Told once when it is full.
    full: Receiver<()>,
}

impl Clogged {
    fn start(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (told, full) = channel();
        let passed = Arc::new(AtomicUsize::new(0));
        let told = Arc::new(Mutex::new(told));
        // Ends with the test program, like the threads of the connections.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(upstream) else { return };
                let (passed, told) = (Arc::clone(&passed), Arc::clone(&told));
                thread::spawn(move || relay(client, server, &passed, &told));
            }
        });
        Ok(Self { address, full })
    }
}

fn relay(
    mut client: TcpStream,
    mut server: TcpStream,
    passed: &AtomicUsize,
    told: &Mutex<Sender<()>>,
) -> std::io::Result<()> {
    let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut buffer = vec![0; 16 << 10];
    loop {
        let len = client.read(&mut buffer)?;
        if len == 0 {
            return server.shutdown(Shutdown::Write);
        }
        if passed.fetch_add(len, Ordering::Relaxed) >= PASSED {
            let _ = told.lock().expect("nobody panics with it").send(());
            // Holds both connections open and takes nothing more.
            loop {
                thread::park();
            }
        }
        server.write_all(&buffer[..len])?;
    }
}

/// The status line for the manifest `latest` of `name`.
fn manifest_status(registry: &Registry, name: &str) -> Result<String> {
    let mut stream = TcpStream::connect(registry.address())?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    write!(stream, "GET /v2/{name}/manifests/latest HTTP/1.0\r\nHost: registry\r\nAccept: {kind}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().next().context("no answer")?.to_owned())
}

/// SIGINT and SIGTERM in mid-push: exit 1, no tag, no temporary file; the next run succeeds.
#[test]
fn a_push_that_is_interrupted_leaves_nothing_half_valid() -> Result<()> {
    needs_programs!("docker-registry");
    let data = noise(7, 8 << 20);
    let image = Image::new(vec![vec![Entry::dir("./"), Entry::file("data", data.as_slice())]]);
    let journey = Journey::start(&image)?;
    let registry = Registry::open()?;
    let source = journey.source.reference();
    for (signal, name) in [(Signal::SIGINT, "int"), (Signal::SIGTERM, "term")] {
        let clogged = Clogged::start(registry.address())?;
        let spool = journey.path(name);
        fs::create_dir(&spool)?;
        let target = format!("docker://{}/{name}:latest", clogged.address);
        let mut child = nydus_image("convert", [&source, &target])
            .env("TMPDIR", &spool)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        clogged.full.recv_timeout(PATIENCE).context("the push does not begin")?;
        kill(Pid::from_raw(child.id().cast_signed()), signal)?;
        let output = within(PATIENCE, "the end of the push", move || {
            let mut text = String::new();
            child.stderr.take().context("a pipe")?.read_to_string(&mut text)?;
            Ok((child.wait()?, text))
        })?;
        ensure!(output.0.code() == Some(1) && output.1.contains("interrupted"), "{signal}: {output:?}");
        ensure!(fs::read_dir(&spool)?.next().is_none(), "{signal}: a temporary file is left");
        let status = manifest_status(&registry, name)?;
        ensure!(status.contains(" 404 "), "{signal}: the tag exists: {status}");
        convert(&source, &registry.reference(name), &[])?;
        let status = manifest_status(&registry, name)?;
        ensure!(status.contains(" 200 "), "{signal}: the next push left no tag: {status}");
    }
    Ok(())
}
