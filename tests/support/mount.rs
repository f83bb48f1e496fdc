//! Mounts that end with the test.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::command::run;

/// A mount point of ours. Dropped, it is unmounted, lazily if it is busy.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
    devices: Vec<LoopDevice>,
}

impl Mount {
    /// Watches over whatever is, or will be, mounted at `path`.
    pub fn guard(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), devices: Vec::new() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Mounts `bootstrap` with the kernel's own EROFS, `blobs` as its devices in table order.
    ///
    /// Kernels from 6.12 mount files; older ones get loop devices.
    ///
    /// # Errors
    /// The kernel refuses the image.
    pub fn erofs(bootstrap: &Path, blobs: &[PathBuf], at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let flags = MsFlags::MS_RDONLY;
        let options = |devices: &mut dyn Iterator<Item = &Path>| {
            devices.map(|path| format!("device={}", path.display())).collect::<Vec<_>>().join(",")
        };
        let direct = options(&mut blobs.iter().map(PathBuf::as_path));
        match mount(Some(bootstrap), at, Some("erofs"), flags, Some(direct.as_str())) {
            Ok(()) => return Ok(Self::guard(at)),
            Err(Errno::ENOTBLK) => {}
            Err(errno) => {
                return Err(errno).with_context(|| format!("mount {} as EROFS", bootstrap.display()));
            }
        }
        let source = LoopDevice::attach(bootstrap)?;
        let devices: Vec<LoopDevice> =
            blobs.iter().map(|blob| LoopDevice::attach(blob)).collect::<Result<_>>()?;
        let through = options(&mut devices.iter().map(|device| device.path.as_path()));
        mount(Some(&source.path), at, Some("erofs"), flags, Some(through.as_str()))
            .with_context(|| format!("mount {} as EROFS", bootstrap.display()))?;
        let mut guard = Self::guard(at);
        guard.devices = devices;
        guard.devices.push(source);
        Ok(guard)
    }

    /// Mounts an overlay of `lower`, upper and work below `scratch`, at `scratch/merged`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn overlay(lower: &Path, scratch: &Path) -> Result<Self> {
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| scratch.join(name));
        for directory in [&upper, &work, &merged] {
            fs::create_dir_all(directory)?;
        }
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("mount an overlay over {}", lower.display()))?;
        Ok(Self::guard(merged))
    }

    /// Unmounts now, and fails if something still uses it.
    ///
    /// # Errors
    /// Busy, or not mounted.
    pub fn unmount(self) -> Result<()> {
        umount2(&self.path, MntFlags::empty()).with_context(|| format!("unmount {}", self.path.display()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        while mounted(&self.path) && umount2(&self.path, MntFlags::MNT_DETACH).is_ok() {}
    }
}

/// A file that tells what is on top from what is below it.
const MARK: &str = "on-top";

/// A file system of somebody else's over whatever is mounted. Dropped, it goes again, and nothing else does.
#[derive(Debug)]
pub struct Cover(PathBuf);

impl Cover {
    /// Mounts it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn over(path: &Path) -> Result<Self> {
        mount(Some("another"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount over {}", path.display()))?;
        let cover = Self(path.to_owned());
        fs::write(path.join(MARK), "")?;
        Ok(cover)
    }

    /// True if it is on top.
    pub fn is_there(&self) -> bool {
        self.is_at(&self.0)
    }

    /// True if it is what is seen at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        path.join(MARK).exists()
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}

/// Runs a program with `root` as its root directory and returns what it printed.
///
/// # Errors
/// It failed.
pub fn chroot(root: &Path, program: &[&str]) -> Result<String> {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    run(Command::new("chroot").arg(root).args(program).env_clear().env("PATH", path))
}

/// Whether something is mounted at exactly `path`.
pub fn mounted(path: &Path) -> bool {
    row(path).is_some()
}

/// Ends the FUSE connection of what is mounted at `path`, whoever serves it and whoever waits for it:
/// requests fail from then on. Asks nothing of the mount. Fine if nothing is mounted.
///
/// # Errors
/// It is no FUSE mount, or the kernel refuses.
pub fn abort(path: &Path) -> Result<()> {
    let Some(row) = row(path) else { return Ok(()) };
    let fields: Vec<&str> = row.split(' ').collect();
    // An overlay of nydusd names what it covers: "rafs:NUMBER".
    let covered = fields.iter().rev().find_map(|field| field.strip_prefix("rafs:")?.parse::<u64>().ok());
    let device = fields.get(2).and_then(|device| device.rsplit(':').next()?.parse().ok());
    let connection = covered.or(device).context("a row without a device")?;
    let file = connection_file(connection, "abort")?;
    fs::write(&file, "1").with_context(|| format!("end the connection of {}", path.display()))
}

/// A file that the kernel has of FUSE connection `number`: in a mount of our own, as not every machine has one where it
/// belongs, and those that have none are to stay so.
///
/// # Errors
/// The kernel refuses the mount.
pub fn connection_file(number: u64, name: &str) -> Result<PathBuf> {
    static CONTROL: OnceLock<OwnedFd> = OnceLock::new();
    let control = match CONTROL.get() {
        Some(control) => control,
        None => {
            let settings = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(&settings)?;
            let made = fsmount(&settings, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
            CONTROL.get_or_init(|| made)
        }
    };
    Ok(PathBuf::from(format!("/proc/self/fd/{}/{number}/{name}", control.as_raw_fd())))
}

/// The topmost mount at exactly `path` in the mount table.
fn row(path: &Path) -> Option<String> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let escaped: Vec<u8> = path
        .as_os_str()
        .as_bytes()
        .iter()
        .flat_map(|byte| match byte {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
            other => vec![*other],
        })
        .collect();
    let row = table
        .split(|byte| *byte == b'\n')
        .rfind(|line| line.split(|byte| *byte == b' ').nth(4) == Some(&escaped))?;
    Some(String::from_utf8_lossy(row).into_owned())
}

/// A read-only block device over a file; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a free device over `file`.
    ///
    /// # Errors
    /// losetup fails.
    pub fn attach(file: &Path) -> Result<Self> {
        // Another test may take the free device between losetup's look and its grip.
        let mut last = None;
        for _ in 0..16 {
            match run(Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(file)) {
                Ok(path) => return Ok(Self { path: path.trim().into() }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("losetup was never tried")?)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.path));
    }
}

/// Copies a decoded blob so that the kernel takes it as a device: whole blocks of 4096 bytes.
///
/// # Errors
/// It cannot be copied.
pub fn device_copy(blob: &Path, target: &Path) -> Result<()> {
    fs::copy(blob, target).with_context(|| format!("copy {}", blob.display()))?;
    let file = File::options().write(true).open(target)?;
    let size = file.metadata()?.len();
    file.set_len(size.next_multiple_of(4096))?;
    ensure!(size > 0, "{} is empty", blob.display());
    Ok(())
}
