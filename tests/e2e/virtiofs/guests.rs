//! Real kernels in virtual machines.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use nix::sys::signal::Signal;
use tests::guest::device::Device;
use tests::guest::machine::{LISTING, Machine, listing, same_listing, virtiofs};
use tests::{needs_guest, needs_programs, recipes};

use super::*;

/// The calls of Kata's runtime, in its order, while the guest runs: the shared directory, an image for each container, an
/// overlay of both, the end.
#[test]
fn containers_come_and_go_in_a_running_guest() -> Result<()> {
    needs_guest!();
    needs_programs!("umoci", "busybox");
    let (tiny, python) = (Local::new(&recipes::tiny())?, Local::new(&recipes::python()?)?);
    let wanted = listing(&tiny.journey.reference()?)?;
    let shared = tempfile::tempdir()?;
    let path = |name: &str| shared.path().join(name);
    let mut device = Device::start("virtiofs", &["--hybrid-mode", "--log-level", "info"])?;

    mount(&device, "/containers", "passthrough_fs", shared.path(), "")?;
    let job = format!(
        r#"{LISTING}
        mount -t virtiofs myfs /mnt || exit 3
        ls -A /mnt > /mnt/containers/first
        echo "guest: mounted"
        until [ -e /mnt/containers/go ]; do sleep 0.05; done
        # Nothing was there when it was looked at before.
        (listing /mnt/rafs/c1/lowerdir) > /mnt/containers/listing || exit 4
        mkdir /mnt/containers/upper /mnt/containers/work /root
        mount -t overlay -o index=off,lowerdir=/mnt/rafs/c2/lowerdir,upperdir=/mnt/containers/upper,workdir=/mnt/containers/work \
            overlay /root || exit 5
        mount -t proc proc /root/proc
        chroot /root /usr/bin/python3 /srv/app/main.py || exit 6
        echo changed > /root/srv/app/main.py
        rm /root/usr/bin/sh && mv /root/srv/app /root/srv/moved && mkdir /root/srv/app || exit 7
        umount /root/proc /root || exit 8
        echo "guest: ran"
        until [ -e /mnt/containers/gone ]; do sleep 0.05; done
        ls /mnt/rafs/c1/lowerdir 2>/dev/null && exit 9
        ls -A /mnt/rafs > /mnt/containers/last
        umount /mnt
        "#
    );
    let mut guest = Machine::start(&job, &virtiofs(&device.socket()))?;
    guest.wait_for("guest: mounted").with_context(|| device.log())?;
    mount(&device, "/rafs/c1/lowerdir", "rafs", &tiny.bootstrap, &tiny.config())?;
    mount(&device, "/rafs/c2/lowerdir", "rafs", &python.bootstrap, &python.config())?;
    fs::write(path("go"), "")?;
    let said = guest.wait_for("ready").with_context(|| device.log())?;
    ensure!(said == "[1, 2] 0.5", "{said}");
    guest.wait_for("guest: ran").with_context(|| device.log())?;
    umount(&device, "/rafs/c1/lowerdir")?;
    fs::write(path("gone"), "")?;
    guest.end().with_context(|| device.log())?;

    ensure!(fs::read_to_string(path("first"))? == "containers\n");
    same_listing(&wanted, &fs::read(path("listing"))?)?;
    ensure!(fs::read_to_string(path("last"))? == "c2\n");
    // What an overlay keeps of a change.
    ensure!(fs::read_to_string(path("upper/srv/moved/main.py"))? == "changed\n");
    let removed = fs::symlink_metadata(path("upper/usr/bin/sh"))?;
    ensure!(removed.file_type().is_char_device() && removed.rdev() == 0, "no whiteout");
    let status = device.end(Signal::SIGTERM)?;
    ensure!(status.code() == Some(0) && !device.socket().exists() && !device.process().socket().exists());
    Ok(())
}
