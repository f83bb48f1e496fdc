//! A directory without a kernel in front of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};

use super::*;
use crate::node::MountIndex;

fn place(index: u32) -> Place {
    Place { index: MountIndex(index), ..Place::unseen() }
}

fn serve(dir: &Path, mountpoint: &str) -> Arc<HostMount> {
    let spec = HostSpec {
        mountpoint: mountpoint.to_owned(),
        command: None,
        source: dir.to_owned(),
        expected: None,
        plain: false,
    };
    Arc::new(open(spec, &OwnDevice::default()).unwrap().at(place(3)))
}

fn name(text: &str) -> CString {
    CString::new(text).unwrap()
}

/// Whoever runs this: others need root.
fn me() -> fuse_backend_rs::api::filesystem::Context {
    let mut me = fuse_backend_rs::api::filesystem::Context::default();
    (me.uid, me.gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    me
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn nothing_outside_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let (outside, inside) = (dir.path().join("outside"), dir.path().join("inside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "s").unwrap();
    fs::create_dir_all(inside.join("d")).unwrap();
    symlink(&outside, inside.join("link")).unwrap();
    symlink("../../outside", inside.join("d/link")).unwrap();
    let host = serve(&inside, "/");
    for bad in ["..", ".", "", "d/link", "../outside", "/", "/etc"] {
        assert_eq!(errno(host.lookup(ROOT, &name(bad))), libc::EINVAL, "{bad:?}");
        let made = host.mkdir(&me(), ROOT, &name(bad), 0o755, 0);
        assert_eq!(errno(made), libc::EINVAL, "{bad:?}");
        assert_eq!(errno(host.remove(ROOT, &name(bad), rustix::fs::AtFlags::empty())), libc::EINVAL);
        assert_eq!(errno(host.rename((ROOT, c"d"), (ROOT, &name(bad)), 0)), libc::EINVAL);
        assert_eq!(errno(host.rename((ROOT, &name(bad)), (ROOT, c"e"), 0)), libc::EINVAL);
        assert_eq!(errno(host.link(ROOT, ROOT, &name(bad))), libc::EINVAL);
    }
    let d = host.lookup(ROOT, c"d").unwrap().unwrap();
    for link in [host.lookup(ROOT, c"link"), host.lookup(d.nid(), c"link")] {
        let link = link.unwrap().unwrap();
        assert!(host.read_link(link.nid()).unwrap().ends_with(b"outside"));
        assert_eq!(errno(host.lookup(link.nid(), c"secret")), libc::ENOTDIR);
        assert_eq!(errno(host.read(link.nid(), 0, &mut [0; 9])), libc::ELOOP);
        assert_eq!(errno(host.list(link.nid(), 0, &BTreeSet::new(), &mut |_| Ok(true))), libc::ENOTDIR);
    }
    // A pipe is never opened: there may be nobody at its other end.
    let pipe = host.mknod(&me(), ROOT, c"pipe", (libc::S_IFIFO | 0o600, 0), 0).unwrap();
    assert_eq!(errno(host.read(pipe.nid(), 0, &mut [0; 9])), libc::EINVAL);
}

#[test]
fn a_file_keeps_its_number_also_in_a_successor() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    fs::write(dir.path().join("a/b/file"), "content").unwrap();
    fs::hard_link(dir.path().join("a/b/file"), dir.path().join("other")).unwrap();
    let find = |host: &Arc<HostMount>, path: &str| {
        let mut at = host.again(ROOT).unwrap();
        for part in path.split('/') {
            at = host.lookup(at.nid(), &name(part)).unwrap().unwrap();
        }
        at
    };
    let host = serve(dir.path(), "/x");
    let file = find(&host, "a/b/file");
    assert_eq!(file.nid(), find(&host, "other").nid());
    assert_eq!(host.stat_held(&file).unwrap().st_nlink, 2);
    assert_eq!(host.node(file.nid()).unwrap().nid(), file.nid());

    // It is known as long as somebody holds it, and no longer.
    let nid = file.nid();
    host.give(&file);
    drop(file);
    let mut text = [0; 100];
    assert_eq!(host.read(nid, 0, &mut text).unwrap(), 7);
    host.forget(nid, 1);
    assert_eq!(errno(host.read(nid, 0, &mut text)), libc::ESTALE);
    assert_eq!(host.nodes.len(), 1, "the root remains");
    assert_eq!(host.place().lookups.held(), 1, "its mount counts on its own");

    // A successor is asked for it by number, under another name.
    fs::rename(dir.path().join("a"), dir.path().join("moved")).unwrap();
    fs::remove_file(dir.path().join("other")).unwrap();
    let successor = serve(dir.path(), "/x");
    assert_eq!(errno(successor.read(nid, 0, &mut text)), libc::ESTALE, "nothing was taken over");
    successor.set_restored();
    assert_eq!(successor.read(nid, 3, &mut text).unwrap(), 4);
    assert_eq!(find(&successor, "moved/b/file").nid(), nid);
    fs::remove_file(dir.path().join("moved/b/file")).unwrap();
    assert_eq!(successor.stat(nid).unwrap().st_nlink, 0, "open, and removed");
    let third = serve(dir.path(), "/x");
    third.set_restored();
    assert_eq!(errno(third.stat(nid)), libc::ESTALE, "removed");
    assert_eq!(errno(third.stat(nid)), libc::ESTALE, "once and for all");
    fs::write(dir.path().join("moved/b/file"), "another file").unwrap();
    assert_ne!(find(&third, "moved/b/file").nid(), nid);
    assert!(host.saved().command.is_none() && host.saved().bootstrap.is_empty());
}

#[test]
fn what_a_predecessor_did_is_not_refused() {
    use rustix::fs::{AtFlags, RenameFlags};
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let host = serve(dir.path(), "/");
    let again = |work: &dyn Fn() -> io::Result<()>| {
        // Not for who is first to ask.
        let refused = work().unwrap_err().raw_os_error().unwrap();
        repeat::answering(true, work).map_err(|e| (refused, e.raw_os_error().unwrap()))
    };
    let (file, fifo) = (libc::S_IFREG | 0o666, libc::S_IFIFO | 0o600);
    let mkdir = |name: &'static CStr| {
        let host = Arc::clone(&host);
        move || host.mkdir(&me(), ROOT, name, 0o777, 0o027).map(drop)
    };
    let mknod = |name: &'static CStr, mode| {
        let host = Arc::clone(&host);
        move || host.mknod(&me(), ROOT, name, (mode, 0o022), 0).map(drop)
    };
    let link_to = |target: &'static CStr| {
        let host = Arc::clone(&host);
        move || host.symlink(&me(), target, ROOT, c"link").map(drop)
    };
    mkdir(c"d")().unwrap();
    mknod(c"f", file)().unwrap();
    mknod(c"pipe", fifo)().unwrap();
    link_to(c"f")().unwrap();
    again(&mkdir(c"d")).unwrap();
    again(&mknod(c"f", file)).unwrap();
    again(&mknod(c"pipe", fifo)).unwrap();
    again(&link_to(c"f")).unwrap();
    // Made by somebody else, or used since.
    let exists = Err((libc::EEXIST, libc::EEXIST));
    assert_eq!(again(&link_to(c"elsewhere")), exists);
    assert_eq!(again(&mkdir(c"f")), exists);
    assert_eq!(again(&mknod(c"d", file)), exists);
    fs::write(path("f"), "content").unwrap();
    fs::write(path("d/f"), "").unwrap();
    assert_eq!((again(&mkdir(c"d")), again(&mknod(c"f", file))), (exists, exists));
    fs::create_dir(path("other")).unwrap();
    fs::set_permissions(path("other"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    assert_eq!(again(&mkdir(c"other")), exists);

    let f = host.lookup(ROOT, c"f").unwrap().unwrap();
    host.link(f.nid(), ROOT, c"second").unwrap();
    again(&|| host.link(f.nid(), ROOT, c"second").map(drop)).unwrap();
    assert_eq!(again(&|| host.link(f.nid(), ROOT, c"d").map(drop)), exists);
    let remove = |name: &'static CStr, flags| {
        let host = Arc::clone(&host);
        move || host.remove(ROOT, name, flags)
    };
    for (name, flags) in [(c"second", AtFlags::empty()), (c"other", AtFlags::REMOVEDIR)] {
        remove(name, flags)().unwrap();
        again(&remove(name, flags)).unwrap();
    }
    assert_eq!(again(&remove(c"d", AtFlags::REMOVEDIR)), Err((libc::ENOTEMPTY, libc::ENOTEMPTY)));

    let rename = |old: &'static CStr, new: &'static CStr, flags: RenameFlags| {
        let host = Arc::clone(&host);
        move || host.rename((ROOT, old), (ROOT, new), flags.bits())
    };
    rename(c"f", c"moved", RenameFlags::empty())().unwrap();
    again(&rename(c"f", c"moved", RenameFlags::empty())).unwrap();
    again(&rename(c"f", c"moved", RenameFlags::NOREPLACE)).unwrap();
    let absent = Err((libc::ENOENT, libc::ENOENT));
    assert_eq!(again(&rename(c"f", c"nowhere", RenameFlags::empty())), absent);
    // Done twice it would be undone.
    let swap = rename(c"moved", c"d", RenameFlags::EXCHANGE);
    swap().unwrap();
    assert_eq!(repeat::answering(true, &swap).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(path("moved").is_dir() && path("d").is_file());
    if nix::unistd::geteuid().is_root() {
        let whiteout = rename(c"d", c"f", RenameFlags::WHITEOUT);
        whiteout().unwrap();
        repeat::answering(true, &whiteout).unwrap();
        assert_eq!(fs::read(path("f")).unwrap(), b"content", "not covered by what it left behind");
    }

    let set = |value: &'static [u8]| {
        let (host, nid) = (Arc::clone(&host), f.nid());
        move || host.setxattr(nid, c"user.one", value, libc::XATTR_CREATE.cast_unsigned())
    };
    set(b"value")().unwrap();
    assert_eq!(again(&set(b"value")), Err((libc::EEXIST, libc::EIO)), "whose is it?");
    assert_eq!((again(&set(b"valu")), again(&set(b"other"))), (exists, exists));
    host.removexattr(f.nid(), c"user.one").unwrap();
    again(&|| host.removexattr(f.nid(), c"user.one")).unwrap();
}

#[test]
fn a_listing_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..500 {
        fs::write(dir.path().join(format!("file {number}")), "").unwrap();
    }
    let host = serve(dir.path(), "/");
    let covered: BTreeSet<&[u8]> = BTreeSet::from([b"file 7".as_slice(), b"not there"]);
    let (mut seen, mut at, mut rounds) = (BTreeMap::new(), 0, 0);
    loop {
        let mut room = 7;
        let whole = host
            .list(ROOT, at, &covered, &mut |entry| {
                if room == 0 {
                    return Ok(false);
                }
                room -= 1;
                at = entry.next;
                let is_dot = entry.held.is_none();
                assert!(is_dot || entry.kind == u32::from(libc::DT_REG));
                assert!(seen.insert(entry.name.to_vec(), is_dot).is_none(), "{:?} twice", entry.name);
                Ok(true)
            })
            .unwrap();
        rounds += 1;
        if whole {
            break;
        }
    }
    assert!(rounds > 70);
    assert_eq!((seen.len(), seen.values().filter(|dot| **dot).count()), (501, 2));
    assert!(!seen.contains_key(b"file 7".as_slice()));
    assert_eq!(host.nodes.len(), 1, "what was only looked at is not kept");
}

#[test]
fn nothing_is_made_for_whom_it_can_not_be() {
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path(), "/");
    // Nobody can be made the last id, not even by root.
    let (mut no_user, mut no_group) = (me(), me());
    (no_user.uid, no_group.gid) = (u32::MAX, u32::MAX);
    for caller in [no_user, no_group] {
        assert_eq!(errno(host.mkdir(&caller, ROOT, c"dir", 0o777, 0)), libc::EPERM);
        assert!(!dir.path().join("dir").exists());
    }
    drop(host.mkdir(&me(), ROOT, c"dir", 0o777, 0).unwrap());
}

#[test]
fn what_is_made_is_its_callers() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root makes files for others");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path(), "/");
    let mut caller = fuse_backend_rs::api::filesystem::Context::default();
    (caller.uid, caller.gid) = (1234, 5678);
    let meta = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap();
    let made = |path: &CStr| {
        let meta = meta(path.to_str().unwrap());
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    // Not writable for the caller: that is the kernel's business, which knows all groups.
    drop(host.mkdir(&caller, ROOT, c"dir", 0o777, 0o027).unwrap());
    assert_eq!(made(c"dir"), (1234, 5678, 0o750));
    drop(host.mknod(&caller, ROOT, c"file", (libc::S_IFREG | 0o666, 0), 0).unwrap());
    assert_eq!(made(c"file"), (1234, 5678, 0o666), "no umask but the caller's");
    drop(host.mknod(&caller, ROOT, c"null", (libc::S_IFCHR | 0o600, 0), 0x103).unwrap());
    assert_eq!((meta("null").rdev(), meta("null").uid()), (0x103, 1234));
    drop(host.symlink(&caller, c"any/../where", ROOT, c"link").unwrap());
    assert_eq!(meta("link").uid(), 1234);
    // Where a directory hands its group on.
    fs::create_dir(dir.path().join("shared")).unwrap();
    nix::unistd::chown(&dir.path().join("shared"), None, Some(42.into())).unwrap();
    fs::set_permissions(dir.path().join("shared"), std::os::unix::fs::PermissionsExt::from_mode(0o2775))
        .unwrap();
    let shared = host.lookup(ROOT, c"shared").unwrap().unwrap();
    drop(host.mkdir(&caller, shared.nid(), c"d", 0o777, 0o022).unwrap());
    assert_eq!(made(c"shared/d"), (1234, 42, 0o2755));
    // The thread is itself again.
    fs::write(dir.path().join("own"), "").unwrap();
    assert_eq!(meta("own").uid(), 0);
}

#[test]
fn extended_attributes_tell_their_length() {
    use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let host = serve(dir.path(), "/");
    let file = host.lookup(ROOT, c"file").unwrap().unwrap();
    host.setxattr(file.nid(), c"user.note", b"value", 0).unwrap();
    assert!(matches!(host.getxattr(file.nid(), c"user.note", 0), Ok(GetxattrReply::Count(5))));
    assert!(
        matches!(host.getxattr(file.nid(), c"user.note", 5), Ok(GetxattrReply::Value(v)) if v == b"value")
    );
    assert_eq!(errno(host.getxattr(file.nid(), c"user.note", 4).map(drop)), libc::ERANGE);
    assert_eq!(errno(host.getxattr(file.nid(), c"user.none", 0).map(drop)), libc::ENODATA);
    assert!(matches!(host.listxattr(file.nid(), 0), Ok(ListxattrReply::Count(n)) if n >= 10));
    assert_eq!(errno(host.listxattr(file.nid(), 1).map(drop)), libc::ERANGE);
    host.removexattr(file.nid(), c"user.note").unwrap();
    assert_eq!(errno(host.removexattr(file.nid(), c"user.note")), libc::ENODATA);
}

#[test]
fn what_can_not_be_served_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let refused = |source: &Path, own: &OwnDevice| {
        let spec = HostSpec {
            mountpoint: "/".to_owned(),
            command: None,
            source: source.to_owned(),
            expected: None,
            plain: false,
        };
        format!("{:#}", open(spec, own).unwrap_err())
    };
    let nobody = OwnDevice::default();
    assert!(refused(Path::new("relative"), &nobody).starts_with("invalid argument: source relative"));
    assert!(refused(&dir.path().join("file"), &nobody).contains("file can not be served: Not a directory"));
    assert!(refused(&dir.path().join("none"), &nobody).contains("No such file"));
    // As if the directory were on this daemon's own mount.
    let device = fs::metadata(dir.path()).unwrap().dev();
    let own = OwnDevice::from(OnceLock::from(Device(libc::major(device), libc::minor(device))));
    assert!(refused(dir.path(), &own).contains("this daemon serves it itself"));
}

#[test]
fn a_directory_is_the_one_that_was() {
    let dir = tempfile::tempdir().unwrap();
    let (one, link) = (dir.path().canonicalize().unwrap().join("one"), dir.path().join("link"));
    fs::create_dir(&one).unwrap();
    symlink("one", &link).unwrap();
    let spec = |source: &Path, expected| HostSpec {
        mountpoint: "/".to_owned(),
        command: None,
        source: source.to_owned(),
        expected,
        plain: false,
    };
    let nobody = OwnDevice::default();
    let saved = open(spec(&link, None), &nobody).unwrap().at(place(3)).saved().host.unwrap();
    assert_eq!(saved.path, one);
    drop(open(spec(&saved.path, Some(saved.clone())), &nobody).unwrap());
    fs::rename(&one, dir.path().join("moved")).unwrap();
    fs::create_dir(&one).unwrap();
    let error = open(spec(&saved.path, Some(saved.clone())), &nobody).unwrap_err();
    assert!(error.to_string().contains("another directory"), "{error:#}");
}

#[test]
fn files_of_one_number_have_generations() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let (host, successor) = (serve(dir.path(), "/x"), serve(dir.path(), "/x"));
    let find = |host: &Arc<HostMount>, name| host.lookup(ROOT, name).unwrap().unwrap();
    let (one, two) = (find(&host, c"one"), find(&host, c"two"));
    assert_ne!(host.generation(&one), host.generation(&two));
    assert_eq!(host.generation(&one), successor.generation(&find(&successor, c"one")));
    assert_eq!(host.generation(&one) >> 24, host.place().generation);
    assert_eq!(host.generation(&host.again(ROOT).unwrap()), host.place().generation);
    // Not where a predecessor gave them none, nor in what comes after.
    let early = SavedMount { host: None, ..host.saved() };
    let restored = |saved: &SavedMount| {
        let opened = open(saved.host_spec(dir.path().to_owned()), &OwnDevice::default()).unwrap();
        Arc::new(opened.at(place(3)))
    };
    let second = restored(&early);
    for host in [restored(&second.saved()), second] {
        assert_eq!(host.generation(&find(&host, c"one")), host.place().generation);
    }
}
