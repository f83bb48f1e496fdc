//! `nydus-image` that is told to stop: `convert` in the middle of its push, `compact` and `optimize` in the
//! middle of what they read.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::command::run;
use tests::image::{Entry, Image, tar_bytes};
use tests::journey::{Journey, convert, nydus_image, within};
use tests::recipes::noise;
use tests::registry::Registry;
use tests::{Context, Result, ensure, needs_programs};

/// Bytes that still go through.
const PASSED: usize = 1 << 20;
/// How long a program may take to come to its first MiB, or to its end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which bytes are counted.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

/// Hands on what comes until [`PASSED`] bytes have gone one way, and nothing that way after that.
struct Clogged {
    address: SocketAddr,
    /// Told once when it is full.
    full: Receiver<()>,
}

impl Clogged {
    fn start(upstream: SocketAddr, way: Way) -> Result<Self> {
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
                let (counted, other) = match way {
                    Way::Up => (client, server),
                    Way::Down => (server, client),
                };
                thread::spawn(move || relay(counted, other, &passed, &told));
            }
        });
        Ok(Self { address, full })
    }
}

fn relay(
    mut counted: TcpStream,
    mut other: TcpStream,
    passed: &AtomicUsize,
    told: &Mutex<Sender<()>>,
) -> std::io::Result<()> {
    let (mut from, mut to) = (other.try_clone()?, counted.try_clone()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut buffer = vec![0; 16 << 10];
    loop {
        let len = counted.read(&mut buffer)?;
        if len == 0 {
            return other.shutdown(Shutdown::Write);
        }
        if passed.fetch_add(len, Ordering::Relaxed) >= PASSED {
            let _ = told.lock().expect("nobody panics with it").send(());
            // Holds both connections open and takes nothing more.
            loop {
                thread::park();
            }
        }
        other.write_all(&buffer[..len])?;
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

/// Sends `signal` to a program, which must say that it was interrupted, and end with 1.
fn stop(mut child: Child, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(child.id().cast_signed()), signal)?;
    let output = within(PATIENCE, "the end of the program", move || {
        let mut text = String::new();
        child.stderr.take().context("a pipe")?.read_to_string(&mut text)?;
        Ok((child.wait()?, text))
    })?;
    ensure!(output.0.code() == Some(1) && output.1.contains("interrupted"), "{signal}: {output:?}");
    Ok(())
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
        let clogged = Clogged::start(registry.address(), Way::Up)?;
        let spool = journey.path(name);
        fs::create_dir(&spool)?;
        let target = format!("docker://{}/{name}:latest", clogged.address);
        let child = nydus_image("convert", [&source, &target])
            .env("TMPDIR", &spool)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        clogged.full.recv_timeout(PATIENCE).context("the push does not begin")?;
        stop(child, signal)?;
        ensure!(fs::read_dir(&spool)?.next().is_none(), "{signal}: a temporary file is left");
        let status = manifest_status(&registry, name)?;
        ensure!(status.contains(" 404 "), "{signal}: the tag exists: {status}");
        convert(&source, &registry.reference(name), &[])?;
        let status = manifest_status(&registry, name)?;
        ensure!(status.contains(" 200 "), "{signal}: the next push left no tag: {status}");
    }
    Ok(())
}

/// Images whose blobs are in a registry are compacted and optimized; a signal while a blob is read leaves
/// neither blob nor bootstrap.
#[test]
fn rewriting_from_a_registry_can_be_interrupted() -> Result<()> {
    needs_programs!("docker-registry", "python3");
    let journey = Journey::start(&Image::new(vec![]))?;
    let at = |name: &str| journey.path(name).to_string_lossy().into_owned();
    let registry = Registry::open()?;
    let (blobs, list) = (at("blobs"), at("list"));
    let mut layers = Vec::new();
    for seed in 1..3 {
        let (tar, boot) = (at("tar"), at(&format!("layer{seed}")));
        let data = noise(seed, 3 << 20);
        let entries = [Entry::dir("./"), Entry::file(format!("data{seed}"), data.as_slice())];
        fs::write(&tar, tar_bytes(&entries)?)?;
        let flags = ["--log-level", "warn", "--type", "tar-rafs", "-B", &boot, "-D", &blobs, &tar];
        run(&mut nydus_image("create", flags))?;
        layers.push(boot);
    }
    let boot = at("boot");
    run(nydus_image("merge", ["--log-level", "warn", "-B", &boot]).args(&layers))?;
    for blob in fs::read_dir(&blobs)? {
        registry.push("image", &blob?.path())?;
    }
    fs::write(&list, json!({ "version": "v1", "files": [{ "path": "/data2" }] }).to_string())?;
    let archive = |boot: &str, blobs: &str| {
        run(&mut nydus_image("unpack", ["-B", boot, "-D", blobs, "-o", &at("archive")]))?;
        Ok::<_, tests::Error>(fs::read(at("archive"))?)
    };
    let wanted = archive(&boot, &blobs)?;
    for (command, place) in [
        (&["compact", "-D"][..], "compacted"),
        (&["optimize", "-p", &list, "--output-blob-dir"], "optimized"),
    ] {
        let (dir, out) = (at(place), at(&format!("{place}.boot")));
        let from = |address: SocketAddr| {
            let fields =
                json!({ "scheme": "http", "host": address.to_string(), "repo": "image" }).to_string();
            let places =
                [&dir, "-B", &boot, "-O", &out, "--backend-type", "registry", "--backend-config", &fields];
            nydus_image(command[0], [&command[1..], &places, &["--log-level", "warn"]].concat())
        };
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let clogged = Clogged::start(registry.address(), Way::Down)?;
            let child = from(clogged.address).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
            clogged.full.recv_timeout(PATIENCE).context("nothing is read")?;
            stop(child, signal)?;
            ensure!(fs::read_dir(&dir)?.next().is_none(), "{place}, {signal}: a file is left");
            ensure!(!fs::exists(&out)?, "{place}, {signal}: there is a bootstrap");
        }
        run(&mut from(registry.address()))?;
        let new = fs::read_dir(&dir)?.collect::<std::io::Result<Vec<_>>>()?;
        ensure!(new.len() == 1, "{place}: {new:?}");
        fs::copy(new[0].path(), journey.path("blobs").join(new[0].file_name()))?;
        ensure!(archive(&out, &blobs)? == wanted, "{place}: another tree");
    }
    Ok(())
}
