//! What of the host a daemon in a jail does not get, unless its command line says so.

use std::path::{Component, Path, PathBuf};

use super::host::Places;
use super::place;

/// Not admitted to be written to: what root runs, or reads to know what to run. Nor is anything below, nor a directory
/// that one of these is in.
const SYSTEM: [&str; 36] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix",
    "/proc",
    "/run/containerd",
    "/run/crio",
    "/run/dbus",
    "/run/docker",
    "/run/docker.sock",
    "/run/podman",
    "/run/systemd",
    "/run/udev",
    "/run/user",
    "/sbin",
    "/snap",
    "/sys",
    "/usr",
    "/var/lib/apt",
    "/var/lib/containerd/io.containerd.content.v1.content",
    "/var/lib/containerd/io.containerd.metadata.v1.bolt",
    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs",
    "/var/lib/dbus",
    "/var/lib/docker",
    "/var/lib/dpkg",
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet/pki",
    "/var/lib/kubelet/plugins",
    "/var/lib/rpm",
    "/var/lib/systemd",
    "/var/spool",
];
/// Not admitted to be written to themselves: what is below them has many owners.
const SHARED: [&str; 11] = [
    "/home",
    "/media",
    "/mnt",
    "/opt",
    "/run/lock",
    "/srv",
    "/tmp",
    "/var/cache",
    "/var/lib",
    "/var/log",
    "/var/tmp",
];
/// Never opened: no image, login or certificate is there.
const SECRET: [&str; 8] = [
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/sudoers",
    "/etc/ssh",
    "/proc",
    "/sys",
];
/// Where keys of users are.
const KEYS: &str = ".ssh";

/// What one daemon does not get.
#[derive(Debug)]
pub(super) struct Rules {
    /// Whatever else is said: these and all below.
    admitted: Vec<PathBuf>,
    /// To be read, and if true to be written to.
    shared: Option<(PathBuf, bool)>,
    /// Directories of programs.
    programs: Vec<PathBuf>,
    /// This program.
    own: Option<PathBuf>,
}

impl Rules {
    /// For a daemon with these places, which are settled.
    pub fn new(places: &Places) -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let programs = std::env::split_paths(&path).filter(|path| path.is_absolute());
        Self {
            admitted: places.admit.clone(),
            shared: places.shared_dir.clone().map(|path| (path, places.writable)),
            programs: programs.filter_map(|path| place::settle(&path).ok()).collect(),
            own: std::env::current_exe().ok(),
        }
    }

    /// True if the command line says that `real` is admitted.
    pub fn admit(&self, real: &Path) -> bool {
        self.admitted.iter().any(|path| real.starts_with(path))
    }

    /// Why a daemon does not get what is at `real`, an absolute path without links.
    pub fn refusal(&self, real: &Path, writable: bool) -> Option<&'static str> {
        let is_shared =
            self.shared.as_ref().is_some_and(|(path, to_write)| path == real && (*to_write || !writable));
        if is_shared || self.admit(real) {
            return None;
        }
        if real == Path::new("/") {
            return Some("all of the host");
        }
        if is_secret(real) || holds_keys(real) {
            return Some("nothing that an image needs");
        }
        if !writable {
            return None;
        }
        let near = |path: &Path| real.starts_with(path) || path.starts_with(real);
        if SYSTEM.iter().any(|path| near(Path::new(path)))
            || SHARED.iter().any(|path| real == Path::new(path))
        {
            return Some("a directory of the system");
        }
        if self.programs.iter().any(|path| near(path)) || self.own.as_ref().is_some_and(|own| near(own)) {
            return Some("a directory of programs");
        }
        is_personal(real).then_some("what a user's programs are told by")
    }
}

/// True for files that no daemon needs, and directories that have some.
fn is_secret(real: &Path) -> bool {
    let near = |secret: &&str| real.starts_with(secret) || Path::new(secret).starts_with(real);
    SECRET.iter().any(near) || real.components().any(|component| component.as_os_str() == KEYS)
}

/// What is below a user's home, or nothing for the home itself.
fn in_home(real: &Path) -> Option<std::path::Components<'_>> {
    let mut components = real.components();
    components.next().filter(|root| *root == Component::RootDir)?;
    match components.next()?.as_os_str().as_encoded_bytes() {
        b"root" => Some(components),
        b"home" => components.next().map(|_| components),
        _ => None,
    }
}

/// True for homes, and for what is below a directory of theirs that begins with a dot.
fn is_personal(real: &Path) -> bool {
    in_home(real).is_some_and(|mut below| {
        below.next().is_none_or(|first| first.as_os_str().as_encoded_bytes().starts_with(b"."))
    })
}

/// True for homes that have keys, and the directory of such.
fn holds_keys(real: &Path) -> bool {
    let has = |home: &Path| home.join(KEYS).symlink_metadata().is_ok();
    if real == Path::new("/home") {
        return std::fs::read_dir(real)
            .is_ok_and(|mut homes| homes.any(|home| home.is_ok_and(|home| has(&home.path()))));
    }
    in_home(real).is_some_and(|mut below| below.next().is_none()) && has(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_not_admitted() {
        let rules = Rules { programs: vec!["/opt/tool/bin".into()], ..Rules::new(&Places::default()) };
        for (path, readable, writable) in [
            ("/", false, false),
            ("/etc", false, false),
            ("/etc/nydus", true, false),
            ("/etc/ssh", false, false),
            ("/etc/shadow", false, false),
            ("/root/.ssh/id_ed25519", false, false),
            ("/home/a/.ssh", false, false),
            ("/proc/1/root/var", false, false),
            ("/sys/fs", false, false),
            ("/dev", true, false),
            ("/usr/share/images", true, false),
            ("/usrlocal", true, true),
            ("/lib32", true, false),
            ("/nix/store", true, false),
            ("/run", true, false),
            ("/run/systemd/system", true, false),
            ("/run/docker.sock", true, false),
            ("/run/dragonfly/proxy.sock", true, true),
            ("/run/user/0", true, false),
            ("/run/nydus", true, true),
            ("/run/containerd-nydus", true, true),
            ("/run/kata-containers/shared", true, true),
            ("/var", true, false),
            ("/var/lib", true, false),
            ("/var/log", true, false),
            ("/var/log/nydus", true, true),
            ("/var/spool/cron/crontabs", true, false),
            ("/var/lib/containerd", true, false),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1", true, false),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.nydus/cache", true, true),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.nydus/snapshots/7/fs", true, true),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.nydus/logs", true, true),
            ("/var/lib/containerd-nydus/cache", true, true),
            ("/var/lib/kubelet", true, false),
            ("/var/lib/kubelet/pods/1/volumes", true, true),
            ("/var/lib/nydus/cache", true, true),
            ("/home", true, false),
            ("/home/nobody-of-a-test", true, false),
            ("/home/nobody-of-a-test/.config/x", true, false),
            ("/home/nobody-of-a-test/images", true, true),
            ("/root/.cache/nydus", true, false),
            ("/root/images", true, true),
            ("/opt", true, false),
            ("/opt/tool", true, false),
            ("/opt/tool/bin/x", true, false),
            ("/opt/tool/data", true, true),
            ("/opt/other/bin", true, true),
            ("/srv/x", true, true),
            ("/data", true, true),
            ("/tmp", true, false),
            ("/tmp/x", true, true),
        ] {
            // Whether there are keys is this machine's affair.
            if path != "/home" {
                assert_eq!(rules.refusal(Path::new(path), false).is_none(), readable, "read {path}");
            }
            assert_eq!(rules.refusal(Path::new(path), true).is_none(), writable, "write {path}");
        }
        let own = std::env::current_exe().unwrap();
        for above in own.ancestors() {
            assert!(rules.refusal(above, true).is_some(), "write {}", above.display());
        }
    }

    #[test]
    fn the_command_line_is_believed() {
        let places = Places {
            admit: vec!["/etc/nydus-cache".into()],
            shared_dir: Some("/usr/share/shown".into()),
            ..Places::default()
        };
        let rules = Rules::new(&places);
        let refused = |path: &str, writable| rules.refusal(Path::new(path), writable).is_some();
        assert!(!refused("/etc/nydus-cache", true) && !refused("/etc/nydus-cache/below", true));
        assert!(refused("/etc/nydus-cache2", true) && refused("/etc", true) && refused("/etc", false));
        assert!(refused("/usr/share/shown", true), "to be read only");
        let rules = Rules::new(&Places { writable: true, ..places });
        assert!(rules.refusal(Path::new("/usr/share/shown"), true).is_none());
        assert!(rules.refusal(Path::new("/usr/share/shown/below"), true).is_some());
        let all = Rules::new(&Places { shared_dir: Some("/".into()), ..Places::default() });
        assert!(all.refusal(Path::new("/"), false).is_none());
    }

    #[test]
    fn homes_with_keys_are_not_shown() {
        assert!(in_home(Path::new("/root")).unwrap().next().is_none());
        assert!(in_home(Path::new("/home/a")).unwrap().next().is_none());
        assert!(in_home(Path::new("/home")).is_none() && in_home(Path::new("/srv/root")).is_none());
        let has = |home: &str| Path::new(home).join(KEYS).symlink_metadata().is_ok();
        assert_eq!(holds_keys(Path::new("/root")), has("/root"));
        assert!(!holds_keys(Path::new("/home/nobody-of-a-test")) && !holds_keys(Path::new("/root/x")));
    }
}
