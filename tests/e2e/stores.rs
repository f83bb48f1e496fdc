//! Blobs outside registries: an object store, a partitioned disk, a plain HTTP server. The same image
//! comes out of each, byte by byte; what is refused is EIO.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::Journey;
use tests::mount::LoopDevice;
use tests::plain::{self, Objects};
use tests::recipes::{noise, prose};
use tests::s3::S3Server;
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

/// An image of two layers, its bootstrap, and its blobs by id.
struct Scene {
    journey: Journey,
    files: Vec<(&'static str, Vec<u8>)>,
    bootstrap: PathBuf,
    blobs: Vec<(String, Vec<u8>)>,
}

impl Scene {
    fn set() -> Result<Self> {
        let files =
            vec![("d/noise", noise(1, 700_000)), ("d/prose", prose(2, 300_000)), ("top", noise(3, 100_000))];
        let entry = |index: usize| Entry::file(files[index].0, files[index].1.as_slice());
        let layers = vec![
            vec![Entry::dir("./"), Entry::dir("d"), entry(0), entry(1)],
            vec![Entry::dir("./"), entry(2)],
        ];
        let journey = Journey::start(&Image::new(layers))?;
        let nydus = journey.convert("nydus", &["--chunk-size", "0x10000"])?;
        let bootstrap = journey.path("image.boot");
        nydus.save_bootstrap(&bootstrap)?;
        let blobs = nydus
            .data_blobs()?
            .iter()
            .map(|layer| {
                let id = layer.digest.strip_prefix("sha256:").context("a digest")?.to_owned();
                Ok((id, nydus.blob(&layer.digest)?))
            })
            .collect::<Result<Vec<_>>>()?;
        ensure!(blobs.len() == 2, "two layers should make two blobs");
        Ok(Self { journey, files, bootstrap, blobs })
    }

    /// A daemon with an empty cache called `name` and blobs from `backend`.
    fn options(&self, name: &str, kind: &str, backend: &Value) -> Result<DaemonOptions> {
        let config = self.journey.path(&format!("{name}.json"));
        let text = json!({
            "version": 2,
            "backend": { "type": kind, kind: backend },
            "cache": { "type": "filecache", "filecache": { "work_dir": self.journey.path(name) } },
            "rafs": { "read_timeout": 20 },
        });
        fs::write(&config, text.to_string())?;
        Ok(DaemonOptions::bootstrap(&self.bootstrap, &config))
    }

    fn check(&self, daemon: &Daemon) -> Result<()> {
        for (name, bytes) in &self.files {
            let found = fs::read(daemon.root().join(name)).with_context(|| daemon.log())?;
            ensure!(&found == bytes, "{name}: wrong bytes");
        }
        Ok(())
    }

    /// No file can be read: EIO, and the log says `why`.
    fn check_refused(&self, daemon: &Daemon, why: &str) -> Result<()> {
        for (name, _) in &self.files {
            let error =
                fs::read(daemon.root().join(name)).err().with_context(|| format!("{name} was read"))?;
            ensure!(error.raw_os_error() == Some(libc::EIO), "{name}: {error}");
        }
        // Readers are answered before the reason is written.
        daemon.wait_for_log(why).map(drop)
    }
}

/// moto checks the signature of every request: no keys or wrong ones read nothing.
#[test]
fn an_s3_bucket_serves_an_image() -> Result<()> {
    needs_mounts!();
    if let Some(reason) = S3Server::missing() {
        eprintln!("skipped {}: {reason}", module_path!());
        return Ok(());
    }
    let scene = Scene::set()?;
    let server = S3Server::start()?;
    let account = server.account("images")?;
    server.put("/images", b"")?;
    for (id, blob) in &scene.blobs {
        server.put(&format!("/images/node/v1-{id}"), blob)?;
    }
    server.guard()?;

    let address = server.address().to_string();
    let store = |extra: Value| {
        let mut store = json!({
            "scheme": "http", "endpoint": address, "region": "us-east-1",
            "bucket_name": "images", "object_prefix": "node/v1-",
        });
        store.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
        store
    };
    let keys = json!({ "access_key_id": account.id, "access_key_secret": account.secret });
    // The library that signs would tell the keys at this level.
    let daemon = scene.options("keys", "s3", &store(keys))?.flag("--log-level", "trace").start()?;
    scene.check(&daemon)?;
    let shown = format!("{} {}", daemon.get("/api/v1/daemon")?, daemon.log());
    ensure!(!shown.contains(&account.secret) && !shown.contains(&account.id), "a secret is shown");

    let environment = json!({ "credentials_from_environment": true });
    let daemon = scene
        .options("environment", "s3", &store(environment))?
        .environment("AWS_ACCESS_KEY_ID", &account.id)
        .environment("AWS_SECRET_ACCESS_KEY", &account.secret)
        .start()?;
    scene.check(&daemon)?;

    let wrong = json!({ "access_key_id": account.id, "access_key_secret": "another" });
    scene.check_refused(&scene.options("wrong", "s3", &store(wrong))?.start()?, "403")?;
    scene.check_refused(&scene.options("nobody", "s3", &store(json!({})))?.start()?, "403")?;
    let elsewhere = json!({
        "access_key_id": account.id, "access_key_secret": account.secret, "object_prefix": "other/"
    });
    scene.check_refused(&scene.options("elsewhere", "s3", &store(elsewhere))?.start()?, "404")
}

/// One partition per blob, named in both ways; a damaged first table is made good by the second.
#[test]
fn a_partitioned_disk_serves_an_image() -> Result<()> {
    needs_mounts!();
    needs_programs!("sfdisk", "losetup");
    let scene = Scene::set()?;
    let disk = scene.journey.path("disk.img");
    partition(&disk, &scene.blobs)?;
    let backend = json!({ "device_path": disk });
    scene.check(&scene.options("file", "localdisk", &backend)?.start()?)?;

    let device = LoopDevice::attach(&disk)?;
    let on_device = json!({ "device_path": device.path() });
    scene.check(&scene.options("device", "localdisk", &on_device)?.start()?)?;
    drop(device);

    let file = File::options().write(true).open(&disk)?;
    file.write_all_at(&[0; 64], 512)?;
    scene.check(&scene.options("second-table", "localdisk", &backend)?.start()?)?;
    let size = file.metadata()?.len();
    file.write_all_at(&[0; 64], size - 512)?;
    scene.check_refused(&scene.options("no-table", "localdisk", &backend)?.start()?, "partition table")
}

/// A disk image with a GPT by sfdisk: the first blob in a partition of basic data, the others
/// with their ids in name and GUID.
fn partition(disk: &Path, blobs: &[(String, Vec<u8>)]) -> Result<()> {
    const SECTOR: u64 = 512;
    let file = File::create(disk)?;
    let (mut script, mut start) = ("label: gpt\n".to_owned(), 2048);
    for (number, (id, blob)) in blobs.iter().enumerate() {
        file.write_all_at(blob, start * SECTOR)?;
        let (name, rest) = id.split_at(32);
        let sectors = (blob.len() as u64).div_ceil(SECTOR);
        let (kind, guid) = match number {
            0 => ("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", String::new()),
            _ => {
                let parts = [&rest[..8], &rest[8..12], &rest[12..16], &rest[16..20], &rest[20..]];
                ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", format!(", uuid={}", parts.join("-")))
            }
        };
        script += &format!("start={start}, size={sectors}, type={kind}, name=\"{name}\"{guid}\n");
        start += sectors.next_multiple_of(2048);
    }
    file.set_len((start + 2048) * SECTOR)?;
    let path = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";
    let mut sfdisk = Command::new("sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel"])
        .arg(disk)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .spawn()?;
    std::io::Write::write_all(&mut sfdisk.stdin.take().context("stdin")?, script.as_bytes())?;
    ensure!(sfdisk.wait()?.success(), "sfdisk fails on:\n{script}");
    Ok(())
}

/// Over TCP and over a unix socket, as the image converter of containerd serves it.
#[test]
fn a_plain_http_server_serves_an_image() -> Result<()> {
    needs_mounts!();
    let scene = Scene::set()?;
    let objects = |prefix: &str| -> Objects {
        scene.blobs.iter().map(|(id, blob)| (format!("{prefix}{id}"), blob.clone())).collect()
    };
    let host = plain::serve_tcp(objects("/blobs/v1/"))?;
    let backend = json!({ "addr": format!("http://{host}/blobs"), "path": "v1" });
    scene.check(&scene.options("tcp", "http-proxy", &backend)?.start()?)?;
    let socket = scene.journey.path("http.sock");
    plain::serve_unix(&socket, objects("/"))?;
    let backend = json!({ "addr": socket, "path": "not/used" });
    scene.check(&scene.options("unix", "http-proxy", &backend)?.start()?)?;
    let backend = json!({ "addr": format!("http://{host}") });
    scene.check_refused(&scene.options("missing", "http-proxy", &backend)?.start()?, "404")
}
