//! Images as disks of virtual machines.

use nix::sys::signal::Signal;
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use tests::command::run;
use tests::guest::device::Device;
use tests::guest::machine::{LISTING, Machine, disk, listing, same_listing, virtiofs};
use tests::guest::monitor::{Descriptor, Guest, Monitor, NEXT, WRITE};
use tests::image::Image;
use tests::journey::{Journey, nydus_image};
use tests::layout::Layout;
use tests::scene::Scene;
use tests::{Context, Result, ensure, needs_guest, needs_mounts, needs_programs, recipes};
use vm_memory::{Bytes as _, GuestAddress};

/// VIRTIO_F_IN_ORDER is not wanted.
const FEATURES: u64 = !(1 << 35);
/// VIRTIO_BLK_F_RO.
const READ_ONLY: u64 = 1 << 5;
/// VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_GET_ID.
const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;

/// A driver of one disk.
struct Driver {
    guest: Guest,
    monitor: Monitor,
}

impl Driver {
    fn connect(socket: &std::path::Path) -> Result<Self> {
        let guest = Guest::new(1)?;
        let mut monitor = Monitor::connect(socket, 1, FEATURES)?;
        ensure!(monitor.features & READ_ONLY != 0, "{:#x}", monitor.features);
        monitor.start(&guest)?;
        Ok(Self { guest, monitor })
    }

    /// Bytes of the disk.
    fn size(&mut self) -> Result<u64> {
        let config = self.monitor.config(60)?;
        Ok(u64::from_le_bytes(config[..8].try_into()?) * 512)
    }

    /// The data and the status that come of a request.
    fn ask(&mut self, kind: u32, sector: u64, room: u32) -> Result<(Vec<u8>, u8)> {
        let heap = self.guest.heap();
        let mut head = kind.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend(sector.to_le_bytes());
        let (data, status) = (heap + 4096, heap + (8 << 20));
        self.guest.memory.write_slice(&head, GuestAddress(heap))?;
        self.guest.memory.write_obj(77_u8, GuestAddress(status))?;
        let descriptors = [
            Descriptor { address: heap, len: 16, flags: NEXT, next: 1 },
            Descriptor { address: data, len: room, flags: NEXT | WRITE, next: 2 },
            Descriptor { address: status, len: 1, flags: WRITE, next: 0 },
        ];
        for (index, descriptor) in (0..).zip(descriptors) {
            self.guest.describe(0, index, descriptor)?;
        }
        self.guest.offer(0, 0)?;
        self.guest.kick(0)?;
        let (_, len) = self.guest.take(0)?;
        ensure!(len == room + 1, "{len} bytes of {}", room + 1);
        let mut bytes = vec![0; room.min(4 << 20) as usize];
        self.guest.memory.read_slice(&mut bytes, GuestAddress(data))?;
        Ok((bytes, self.guest.memory.read_obj(GuestAddress(status))?))
    }

    /// All of it.
    fn read(&mut self) -> Result<Vec<u8>> {
        let size = self.size()?;
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size {
            let len = (size - bytes.len() as u64).min(1 << 20);
            let (data, status) = self.ask(IN, bytes.len() as u64 / 512, u32::try_from(len)?)?;
            ensure!(status == 0, "status {status} at {}", bytes.len());
            bytes.extend(data);
        }
        Ok(bytes)
    }
}

fn text(path: &std::path::Path) -> Result<String> {
    Ok(path.to_str().context("a path that is no text")?.to_owned())
}

/// The disk is, byte for byte, what `export --block` writes; so are the parts of one that is split.
#[test]
fn a_disk_is_what_an_export_writes() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let scene = Scene::set(&recipes::tiny(), &["--chunk-size", "0x10000"])?;
    let layout: Layout = scene.journey.convert("local", &["--chunk-size", "0x10000"])?;
    let (bootstrap, exported) = (scene.journey.path("image.boot"), scene.journey.path("image.disk"));
    layout.save_bootstrap(&bootstrap)?;
    run(nydus_image("export", ["--block", "--bootstrap"])
        .arg(&bootstrap)
        .arg("--localfs-dir")
        .arg(layout.path().join("blobs/sha256"))
        .arg("--output")
        .arg(&exported))?;
    let wanted = fs::read(&exported)?;

    let (reference, cache) = (scene.reference(), text(&scene.cache())?);
    let arguments = ["--image", &reference, "--cache-dir", &cache];
    let device = Device::start("blk", &arguments)?;
    let mut driver = Driver::connect(&device.socket())?;
    ensure!(driver.read()? == wanted, "another disk");
    let (id, status) = driver.ask(GET_ID, 0, 20)?;
    ensure!(status == 0 && id.iter().all(u8::is_ascii_hexdigit), "{id:?}");
    // What is beyond, no multiple of a sector, too much, or written.
    let end = wanted.len() as u64 / 512;
    for (kind, sector, room, status) in [
        (IN, end, 512, 1),
        (IN, u64::MAX, 512, 1),
        (IN, 0, 100, 1),
        (IN, 0, 5 << 20, 1),
        (OUT, 0, 512, 2),
        (99, 0, 512, 2),
    ] {
        let (_, found) = driver.ask(kind, sector, room)?;
        ensure!(found == status, "{kind} at {sector}: status {found}");
    }
    ensure!(driver.ask(IN, 0, 4096)?.0 == wanted[..4096], "it goes on");

    let mut split = Device::start("blk", &[&arguments[..], &["--split"]].concat())?;
    let socket = |number: usize| -> PathBuf {
        let first = split.socket();
        if number == 0 { first } else { first.with_extension(format!("sock.{number}")) }
    };
    let count = (0..).take_while(|number| socket(*number).exists()).count();
    ensure!(count > 1, "{count} disks");
    let metadata = Driver::connect(&socket(0))?.read()?;
    ensure!(metadata == fs::read(&bootstrap)?);
    let blobs: Vec<_> =
        (1..count).map(|number| Driver::connect(&socket(number))?.read()).collect::<Result<_>>()?;
    for blob in &blobs {
        // Wherever that is.
        ensure!(wanted.windows(blob.len()).step_by(4096).any(|window| window == blob), "another blob");
    }
    let sockets: Vec<_> = (0..count).map(socket).collect();
    ensure!(split.end(Signal::SIGTERM)?.code() == Some(0) && sockets.iter().all(|one| !one.exists()));
    Ok(())
}

/// A guest's kernel mounts the metadata itself, with a disk for each blob; the tree is the image's, and a program runs.
#[test]
fn a_guest_mounts_disks_as_erofs() -> Result<()> {
    needs_guest!();
    needs_programs!("umoci", "busybox");
    let listed = guest_sees(&recipes::tiny(), "")?;
    same_listing(&listing(&listed.journey.reference()?)?, &listed.listing)?;
    let ran = guest_sees(
        &recipes::python()?,
        "mkdir -p /o /root && mount -t tmpfs t /o && mkdir /o/u /o/w || exit 4
        mount -t overlay -o lowerdir=/mnt,upperdir=/o/u,workdir=/o/w o /root && mount -t proc proc /root/proc || exit 5
        chroot /root /usr/bin/python3 /srv/app/main.py || exit 6",
    )?;
    ensure!(ran.printed.contains("ready [1, 2] 0.5"), "{}", ran.printed);
    Ok(())
}

struct Seen {
    journey: Journey,
    listing: Vec<u8>,
    printed: String,
}

/// What a guest sees of `image`, and what it prints when it runs `more` with the image at /mnt.
fn guest_sees(image: &Image, more: &str) -> Result<Seen> {
    let journey = Journey::start(image)?;
    let layout = journey.convert("nydus", &[])?;
    let (reference, cache) = (layout.reference(), text(&journey.path("cache"))?);
    let device = Device::start("blk", &["--split", "--image", &reference, "--cache-dir", &cache])?;
    let shared = tempfile::tempdir()?;
    let results = Device::start("virtiofs", &["--shared-dir", &text(shared.path())?])?;
    let mut devices = disk(0, &device.socket());
    let mut options = vec!["ro".to_owned()];
    for number in 1.. {
        let socket = device.socket().with_extension(format!("sock.{number}"));
        if !socket.exists() {
            break;
        }
        devices.extend(disk(number, &socket));
        options.push(format!("device=/dev/vd{}", char::from(b'a' + u8::try_from(number)?)));
    }
    devices.extend(virtiofs(&results.socket()));
    let job = format!(
        r#"{LISTING}
        mkdir /results && mount -t virtiofs myfs /results || exit 2
        mount -t erofs -o {} /dev/vda /mnt || exit 3
        (listing /mnt) > /results/listing || exit 3
        {more}
        "#,
        options.join(",")
    );
    let printed = Machine::start(&job, &devices)?.end().with_context(|| device.log())?;
    Ok(Seen { listing: fs::read(shared.path().join("listing"))?, journey, printed })
}

/// What makes no disk is refused with a reason.
#[test]
fn what_is_no_disk_is_refused() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let (source, blobs, bootstrap) = (journey.path("tree"), journey.path("blobs"), journey.path("v5.boot"));
    fs::create_dir_all(&source)?;
    fs::create_dir_all(&blobs)?;
    fs::write(source.join("file"), "content")?;
    run(nydus_image("create", ["--fs-version", "5", "--blob-dir"])
        .arg(&blobs)
        .arg("--bootstrap")
        .arg(&bootstrap)
        .arg(&source))?;
    let refused = Device::start("blk", &["--bootstrap", &text(&bootstrap)?, "--localfs-dir", &text(&blobs)?]);
    let why = format!("{:#}", refused.err().context("RAFS v5 was served as a disk")?);
    ensure!(why.contains("RAFS v6"), "{why}");
    let (layout, cache) = (journey.convert("v6", &[])?, text(&journey.path("cache"))?);
    let device = Device::start("blk", &["--image", &layout.reference(), "--cache-dir", &cache])?;
    let body = json!({"fs_type": "passthrough_fs", "source": journey.scratch(), "config": ""}).to_string();
    let (code, answer) = device.process().send("POST", "/api/v1/mount?mountpoint=/a", &body)?;
    ensure!(code == 500 && answer.contains("as a disk"), "{code} {answer}");
    Ok(())
}
