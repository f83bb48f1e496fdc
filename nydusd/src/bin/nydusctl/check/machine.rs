//! Kernel, FUSE, privileges, limits.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// Oldest kernel that has all of FUSE that the daemon relies on (protocol 7.31).
const KERNEL: (u32, u32) = (5, 4);
/// First kernel that sends the requests of a dead daemon again (FUSE_NOTIFY_RESEND).
const KERNEL_RESENDS: (u32, u32) = (6, 9);
/// Bit of CAP_SYS_ADMIN in the capability sets of `/proc/self/status`.
const CAP_SYS_ADMIN: u32 = 21;
/// Open files that a daemon with some hundred mounts and connections needs.
const OPEN_FILES: u64 = 65_536;

/// Everything but the cache directory.
pub fn look() -> Vec<Finding> {
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let (may_mount, may_be_helped) = may_mount();
    let mut findings = vec![kernel(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())];
    findings.extend([
        device(Path::new("/dev/fuse")),
        fuse(&file_systems),
        privileges(may_mount, helper().filter(|_| may_mount || may_be_helped)),
    ]);
    findings.extend([overlay(&file_systems), open_files()]);
    findings
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn kernel(release: &str) -> Finding {
    let (name, release) = ("kernel", release.trim());
    match version(release) {
        Some(version) if version < KERNEL => {
            Finding::missing(name, release, format!("Linux {}.{} or newer", KERNEL.0, KERNEL.1))
        }
        Some(version) if version < KERNEL_RESENDS => Finding::warning(
            name,
            release,
            format!(
                "from Linux {}.{} on, reads that were under way when a daemon died are asked again",
                KERNEL_RESENDS.0, KERNEL_RESENDS.1
            ),
        ),
        Some(_) => Finding::ok(name, release),
        None => Finding::warning(name, format!("release {release:?}"), "a kernel whose version can be read"),
    }
}

fn device(path: &Path) -> Finding {
    let name = "FUSE device";
    let shown = path.display();
    match path.metadata() {
        Err(e) => Finding::missing(
            name,
            format!("{shown}: {e}"),
            "`modprobe fuse`; in a container also `--device /dev/fuse`",
        ),
        Ok(metadata) if !metadata.file_type().is_char_device() => {
            Finding::missing(name, format!("{shown} is no device"), "`mknod /dev/fuse c 10 229`")
        }
        Ok(_) => match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path) {
            Ok(_) => Finding::ok(name, shown.to_string()),
            Err(e) => Finding::missing(
                name,
                format!("{shown}: {e}"),
                "run as root, or `chmod 666 /dev/fuse`; in a container `--device /dev/fuse`",
            ),
        },
    }
}

fn has_file_system(list: &str, name: &str) -> bool {
    list.lines().any(|line| line.split_whitespace().next_back() == Some(name))
}

fn fuse(file_systems: &str) -> Finding {
    match has_file_system(file_systems, "fuse") {
        true => Finding::ok("FUSE in the kernel", "registered"),
        false => Finding::missing("FUSE in the kernel", "not registered", "`modprobe fuse`"),
    }
}

/// A number in hexadecimal of `/proc/self/status`.
fn status(status: &str, key: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    u64::from_str_radix(value?.trim(), 16).ok()
}

/// May this process mount, and may a set-uid program mount for it?
fn may_mount() -> (bool, bool) {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let has = |set| status(&text, set).is_some_and(|set| set >> CAP_SYS_ADMIN & 1 == 1);
    (has("CapEff"), has("CapBnd") && status(&text, "NoNewPrivs") == Some(0))
}

fn privileges(may_mount: bool, helper: Option<PathBuf>) -> Finding {
    let name = "privilege to mount";
    match (may_mount, helper) {
        (true, Some(helper)) => {
            Finding::ok(name, format!("CAP_SYS_ADMIN ({} is not needed)", helper.display()))
        }
        (true, None) => Finding::ok(name, "CAP_SYS_ADMIN (fusermount3 is not there, and not needed)"),
        (false, Some(helper)) => {
            Finding::ok(name, format!("no CAP_SYS_ADMIN; {} mounts for this user", helper.display()))
        }
        (false, None) => Finding::missing(
            name,
            "no CAP_SYS_ADMIN, and no fusermount3 that may have it",
            "install fuse3, or run as root; in a container `--privileged`",
        ),
    }
}

/// `fusermount3`, if it can mount for others.
fn helper() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found =
        std::env::split_paths(&path).map(|dir| dir.join("fusermount3")).find(|file| file.is_file())?;
    found.metadata().is_ok_and(|metadata| metadata.mode() & 0o4000 != 0).then_some(found)
}

fn overlay(file_systems: &str) -> Finding {
    let name = "overlayfs";
    match has_file_system(file_systems, "overlay") {
        true => Finding::ok(name, "registered"),
        false => Finding::warning(
            name,
            "not registered",
            "`modprobe overlay`: containers write to an overlay over the mounted image",
        ),
    }
}

fn open_files() -> Finding {
    let name = "open files";
    let system =
        fs::read_to_string("/proc/sys/fs/file-max").ok().and_then(|text| text.trim().parse::<u64>().ok());
    match (getrlimit(Resource::RLIMIT_NOFILE), system) {
        (Err(e), _) => Finding::warning(name, format!("limit unknown: {e}"), "a limit that can be read"),
        (Ok(_), Some(system)) if system < OPEN_FILES => Finding::warning(
            name,
            format!("{system} in the whole system"),
            format!("`sysctl -w fs.file-max={}`", OPEN_FILES * 16),
        ),
        // Root raises its own.
        (Ok((_, hard)), _) if hard < OPEN_FILES && !nix::unistd::geteuid().is_root() => Finding::warning(
            name,
            format!("at most {hard}"),
            format!("`ulimit -Hn {OPEN_FILES}`, or LimitNOFILE= in the unit, for many mounts"),
        ),
        (Ok((soft, hard)), _) => Finding::ok(name, format!("{soft}, raised up to {hard}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        for (release, state) in [
            ("4.19.0-26-amd64\n", State::Missing),
            ("5.3", State::Missing),
            ("5.4.0-150-generic", State::Warning),
            ("6.8.12", State::Warning),
            ("6.9-rc1", State::Ok),
            ("10.0.1", State::Ok),
            ("odd", State::Warning),
        ] {
            let finding = kernel(release);
            assert_eq!(finding.state, state, "{release}");
            assert_eq!(finding.remedy.is_some(), state != State::Ok, "{release}");
        }
    }

    #[test]
    fn a_device_must_be_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(device(&dir.path().join("fuse")).state, State::Missing);
        fs::write(dir.path().join("fuse"), "").unwrap();
        assert!(device(&dir.path().join("fuse")).found.contains("no device"));
        assert_eq!(device(Path::new("/dev/null")).state, State::Ok);
    }

    #[test]
    fn file_systems_are_found_by_their_whole_name() {
        let list = "nodev\tsysfs\n\text4\nnodev\tfusectl\nnodev\toverlay\n";
        assert_eq!((fuse(list).state, overlay(list).state), (State::Missing, State::Ok));
        assert_eq!(fuse("nodev\tfuse\n").state, State::Ok);
    }

    #[test]
    fn whoever_may_not_mount_is_told() {
        let helper = || Some(PathBuf::from("/bin/fusermount3"));
        assert_eq!(privileges(true, None).state, State::Ok);
        assert_eq!(privileges(false, helper()).state, State::Ok);
        assert_eq!(privileges(false, None).state, State::Missing);
    }
}
