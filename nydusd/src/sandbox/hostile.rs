//! What a daemon that was taken over might ask of its broker, and what becomes of it. `.ssh` stands for all that is
//! never admitted.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::host::{Answer, Host, Places};
use super::protocol::{Refusal, Reply, Request};
use super::socket::Socket;

/// Attempts to get between a check and what follows it.
const ATTEMPTS: usize = 2000;

struct Scene {
    _scratch: tempfile::TempDir,
    dir: PathBuf,
}

impl Scene {
    /// `None`, with a line that says so, where there can be no jail.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().canonicalize().unwrap();
        for name in ["way/mnt", ".ssh/mnt", "own"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        Some(Self { _scratch: scratch, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The host of a daemon that is in a jail.
    fn host(&self) -> Host {
        let places = Places {
            mountpoint: Some(self.path("way/mnt")),
            apisock: Some(self.path("way/api.sock")),
            supervisor: Some(self.path("way/supervisor.sock")),
            ..Places::default()
        };
        let host = Host::new(places);
        let namespace = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            OwnedFd::from(File::open("/proc/thread-self/ns/mnt").unwrap())
        });
        let root = OwnedFd::from(File::open(self.path("own")).unwrap());
        host.answer(Request::Jail, vec![namespace.join().unwrap(), root]).unwrap();
        host
    }

    /// Puts a link to what is forbidden on the way to mountpoint and sockets.
    fn lead_astray(&self) {
        fs::rename(self.path("way"), self.path("was")).unwrap();
        symlink(".ssh", self.path("way")).unwrap();
    }

    fn lead_back(&self) {
        fs::remove_file(self.path("way")).unwrap();
        fs::rename(self.path("was"), self.path("way")).unwrap();
    }

    /// What is where nothing may be changed.
    fn forbidden(&self) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(self.path(".ssh")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort_unstable();
        names
    }
}

fn ask(host: &Host, request: Request) -> Result<Answer, Refusal> {
    host.answer(request, Vec::new())
}

fn is_mount(path: &Path) -> bool {
    fs::metadata(path).unwrap().dev() != fs::metadata(path.join("..")).unwrap().dev()
}

/// All the ways to have a directory written to.
fn to_be_written(path: &Path, other: &Path) -> [Request; 5] {
    let (text, other) = (OsString::from(path), OsString::from(other));
    [
        Request::Directory { path: text.clone() },
        Request::Admit { path: text.clone(), writable: true, shown: false },
        Request::Upper { upper: text.clone(), work: other.clone(), make: Some(((0, 0), 0o755)) },
        Request::Upper { upper: other.clone(), work: text.clone(), make: Some(((0, 0), 0o755)) },
        Request::Upper { upper: text, work: other, make: None },
    ]
}

#[test]
fn links_and_parents_lead_to_nothing_forbidden() {
    let Some(scene) = Scene::new() else { return };
    let host = scene.host();
    symlink(".ssh", scene.path("link")).unwrap();
    symlink("link", scene.path("link-to-link")).unwrap();
    symlink("../.ssh/mnt", scene.path("own/below")).unwrap();
    symlink("/etc", scene.path("own/system")).unwrap();
    for path in [
        ".ssh",
        ".ssh/new",
        "link",
        "link/new",
        "link-to-link/new/er",
        "own/below",
        "own/below/new",
        "own/../link/new",
        "own/missing/../../link/new",
        "own/system",
        "own/system/nydusd-of-a-test",
    ] {
        for request in to_be_written(&scene.path(path), &scene.path("other")) {
            let told = format!("{request:?}");
            assert!(ask(&host, request).is_err(), "{told}");
        }
    }
    fs::write(scene.path(".ssh/key"), "secret").unwrap();
    for path in ["link/key", "link-to-link/key", ".ssh/key"] {
        let open = Request::Open { path: scene.path(path).into(), device: false };
        assert!(ask(&host, open).unwrap_err().message.contains("--no-jail"), "{path}");
    }
    assert_eq!(scene.forbidden(), ["key", "mnt"]);
    assert!(!Path::new("/etc/nydusd-of-a-test").exists());

    // What a user's links lead to is what the user means.
    symlink("own", scene.path("mine")).unwrap();
    ask(&host, Request::Directory { path: scene.path("mine/made").into() }).unwrap();
    assert!(scene.path("own/made").is_dir());
    let (reply, _) =
        ask(&host, Request::Admit { path: scene.path("mine/made").into(), writable: true, shown: true })
            .unwrap();
    assert_eq!(reply, Reply::Path(scene.path("own/made").into()));
}

/// A directory becomes a link, and a directory again, all the time.
#[test]
fn nothing_comes_between_check_and_use() {
    let Some(scene) = Scene::new() else { return };
    let host = scene.host();
    let (swapped, link) = (scene.path("own/swapped"), scene.path("own/link"));
    fs::create_dir(&swapped).unwrap();
    symlink("../.ssh", &link).unwrap();
    let ended = AtomicBool::new(false);
    let (mut done, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                renameat_with(CWD, &swapped, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            }
        });
        for attempt in 0.. {
            let new = swapped.join(format!("new-{attempt}"));
            let make = Some(((1, 1), 0o777));
            let request = match attempt % 2 {
                0 => Request::Directory { path: new.into() },
                _ => Request::Upper { upper: new.into(), work: scene.path("work").into(), make },
            };
            match ask(&host, request) {
                Ok(_) => done += 1,
                Err(_) => refused += 1,
            }
            if attempt >= ATTEMPTS && done > 0 && refused > 0 {
                break;
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(scene.forbidden(), ["mnt"], "{done} done, {refused} refused");
}

#[test]
fn the_apis_socket_is_made_and_removed_in_its_directory() {
    let Some(scene) = Scene::new() else { return };
    let host = scene.host();
    let (_, socket) = ask(&host, Request::SocketBind(Socket::Api)).unwrap();
    assert!(socket.is_some() && scene.path("way/api.sock").exists());
    // A socket that was made for another, at the end of a way that was changed.
    let _other = UnixListener::bind(scene.path(".ssh/api.sock")).unwrap();
    let _keeper = UnixListener::bind(scene.path(".ssh/supervisor.sock")).unwrap();
    let there = scene.forbidden();
    scene.lead_astray();
    assert!(ask(&host, Request::SocketRemove(Socket::Api)).is_err());
    assert!(ask(&host, Request::SocketBind(Socket::Api)).is_err());
    assert!(ask(&host, Request::Keeper { holder: false }).is_err());
    assert_eq!(ask(&host, Request::SocketCheck(Socket::Api)).unwrap().0, Reply::Yes(false));
    assert_eq!(scene.forbidden(), there);
    scene.lead_back();
    ask(&host, Request::SocketRemove(Socket::Api)).unwrap();
    assert!(!scene.path("way/api.sock").exists());
    // A link in its own place is no socket.
    symlink("../.ssh/api.sock", scene.path("way/api.sock")).unwrap();
    for request in [Request::SocketCheck(Socket::Api), Request::SocketBind(Socket::Api)] {
        assert!(ask(&host, request).unwrap_err().message.contains("is no socket"));
    }
    assert_eq!(scene.forbidden(), there);
}

#[test]
fn a_mount_is_made_and_removed_where_it_belongs() {
    let Some(scene) = Scene::new() else { return };
    let host = scene.host();
    scene.lead_astray();
    assert!(ask(&host, Request::Usable).is_err());
    assert!(ask(&host, Request::Mount { writable: false }).is_err());
    assert!(!is_mount(&scene.path(".ssh/mnt")));
    scene.lead_back();
    let (_, connection) = ask(&host, Request::Mount { writable: false }).unwrap();

    let none = None::<&str>;
    mount(Some("other"), &scene.path(".ssh/mnt"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    scene.lead_astray();
    let unmounted = ask(&host, Request::Unmount { ended: false });
    ask(&host, Request::Abort).unwrap();
    let other_is_there = is_mount(&scene.path(".ssh/mnt"));
    umount2(&scene.path(".ssh/mnt"), MntFlags::MNT_DETACH).unwrap();
    scene.lead_back();
    let again = ask(&host, Request::Unmount { ended: false });
    drop(connection);
    assert!(unmounted.is_err() && other_is_there);
    again.unwrap();
    assert!(!is_mount(&scene.path("way/mnt")));
}

#[test]
fn only_a_mount_of_ours_is_inherited() {
    let Some(scene) = Scene::new() else { return };
    let host = scene.host();
    let number = |path: &Path| {
        let device = fs::metadata(path).unwrap().dev();
        nix::sys::stat::major(device) << 20 | nix::sys::stat::minor(device)
    };
    let mountpoint = scene.path("way/mnt");
    // What the directory itself is part of, and somebody else's mount there.
    assert!(ask(&host, Request::Inherit { number: number(&mountpoint) }).is_err());
    mount(Some("rafs"), &mountpoint, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let inherited = ask(&host, Request::Inherit { number: number(&mountpoint) });
    let unmounted = ask(&host, Request::Unmount { ended: false });
    let is_there = is_mount(&mountpoint);
    umount2(&mountpoint, MntFlags::MNT_DETACH).unwrap();
    assert!(inherited.is_err() && unmounted.is_err() && is_there);
}
