//! Directories of the host beside images: shown as they are, written through, and changed behind our back.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::stat::{Mode, SFlag, mknod, umask};
use serde_json::{Value, json};
use tests::command::run;
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::{Journey, within};
use tests::mount::Mount;
use tests::recipes::{self, noise};
use tests::tree::{self, Overlook};
use tests::{Context, Result, bail, ensure, needs_mounts, needs_programs};

/// Longer than anything here takes, shorter than a hang.
const PATIENCE: Duration = Duration::from_secs(30);

fn post(daemon: &Daemon, mountpoint: &str, source: &Path) -> Result<()> {
    let body = json!({"fs_type": "passthrough_fs", "source": source, "config": ""});
    let (status, answer) =
        daemon.request("POST", &format!("/api/v1/mount?mountpoint={mountpoint}"), &body)?;
    ensure!(status == 204, "{status}: {answer}");
    Ok(())
}

fn delete(daemon: &Daemon, mountpoint: &str) -> Result<()> {
    let path = format!("/api/v1/mount?mountpoint={mountpoint}");
    let (status, answer) = daemon.request("DELETE", &path, &Value::Null)?;
    ensure!(status == 204, "{status}: {answer}");
    Ok(())
}

fn same(wanted: &Path, found: &Path) -> Result<()> {
    tree::assert_same(wanted, found, Overlook::default())
}

fn fails<T: std::fmt::Debug>(result: std::io::Result<T>, errno: i32) -> Result<()> {
    match result {
        Err(e) if e.raw_os_error() == Some(errno) => Ok(()),
        other => bail!("{other:?}, wanted errno {errno}"),
    }
}

/// A directory with two files in it.
fn directory(at: PathBuf, word: &str) -> Result<PathBuf> {
    fs::create_dir_all(at.join("d"))?;
    fs::write(at.join("word"), word)?;
    fs::write(at.join("d/big"), noise(7, (2 << 20) + 5))?;
    Ok(at)
}

/// Every byte, attribute, xattr and link, through a mount that nobody may write.
#[test]
fn a_directory_is_shown_as_it_is() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let journey = Journey::start(&recipes::tiny())?;
    let reference = journey.reference()?;
    let other = directory(journey.path("other"), "other")?;
    mknod(&other.join("pipe"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0)?;
    mknod(
        &other.join("zero"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        nix::sys::stat::makedev(300, 70_000),
    )?;
    xattr::set(other.join("word"), "trusted.overlay.opaque", b"y")?;
    xattr::set(other.join("d"), "user.empty", b"")?;
    symlink("d/../../../etc/passwd", other.join("up"))?;
    fs::hard_link(other.join("word"), other.join("d/word"))?;
    let mut daemon = DaemonOptions::empty().start()?;
    let root = daemon.root().to_owned();
    post(&daemon, "/tiny", &reference)?;
    post(&daemon, "/n/other", &other)?;
    same(&reference, &root.join("tiny"))?;
    same(&other, &root.join("n/other"))?;
    ensure!(
        fs::metadata(root.join("n/other/word"))?.ino() == fs::metadata(root.join("n/other/d/word"))?.ino()
    );
    let info = daemon.get("/api/v1/daemon")?;
    let shown = &info["backend_collection"]["/n/other"];
    ensure!(shown["backend_type"] == "PassthroughFs" && shown["config"].is_null(), "{info}");
    ensure!(shown["source"] == json!(other) && shown["mountpoint"] == "/n/other", "{info}");
    let counted = daemon.get("/api/v1/metrics?id=/n/other")?;
    // `word` has two names and one content, which the kernel keeps.
    let bytes = (2 << 20) + 5 + 5;
    ensure!(counted["data_read"] == bytes && counted["id"] == "/n/other", "{counted}");

    // Nobody may write.
    fails(fs::write(root.join("n/other/word"), "x"), libc::EROFS)?;
    fails(fs::create_dir(root.join("n/other/new")), libc::EROFS)?;
    // In each other's place; what is open stays.
    let mut open = File::open(root.join("n/other/d/big"))?;
    let body = json!({"fs_type": "passthrough", "source": reference, "config": ""});
    let (status, answer) = daemon.request("PUT", "/api/v1/mount?mountpoint=/n/other", &body)?;
    ensure!(status == 204, "{status}: {answer}");
    same(&reference, &root.join("n/other"))?;
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes)?;
    ensure!(bytes == noise(7, (2 << 20) + 5), "an open file has other bytes");
    drop(open);
    delete(&daemon, "/n/other")?;
    ensure!(fs::symlink_metadata(root.join("n")).is_err_and(|e| e.kind() == ErrorKind::NotFound));
    ensure!(daemon.terminate()?.code() == Some(0));
    Ok(())
}

/// All that can be done to files, done through the mount; what that is is seen on both sides.
#[test]
fn what_is_written_is_the_hosts() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let host = directory(scratch.path().join("host"), "one")?;
    let mut daemon = DaemonOptions::empty().flag("--shared-dir", &host).switch("--writable").start()?;
    let root = daemon.root().to_owned();
    same(&host, &root)?;

    // Content: new, longer, shorter, with holes, at its end, through a mapping of pages.
    fs::write(root.join("new"), noise(1, 3 << 20))?;
    let mut file = OpenOptions::new().append(true).open(root.join("new"))?;
    // Somebody else's line in between is not overwritten.
    OpenOptions::new().append(true).open(host.join("new"))?.write_all(b"host")?;
    file.write_all(b"mount")?;
    ensure!(fs::read(host.join("new"))? == [&noise(1, 3 << 20)[..], b"hostmount"].concat());
    let mut file = OpenOptions::new().read(true).write(true).open(root.join("d/big"))?;
    file.set_len(100)?;
    file.write_all_at(b"far", 1 << 20)?;
    nix::fcntl::fallocate(
        &file,
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        50,
    )?;
    file.sync_all()?;
    let hole = nix::unistd::lseek(&file, 4096, nix::unistd::Whence::SeekData)?;
    ensure!(hole == 1 << 20, "data goes on at {hole}");
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = vec![0; 100];
    file.read_exact(&mut bytes)?;
    ensure!(bytes == [&[0; 50][..], &noise(7, 200)[50..100]].concat());
    run(Command::new("sh")
        .arg("-ec")
        .arg("exec 9>>\"$1/locked\"; flock -n 9; echo a >&9; ! flock -n \"$1/locked\" true")
        .arg("-")
        .arg(&root))?;
    run(Command::new("python3").arg("-c").arg(
        "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\nm[3:6]=b'MAP'\nm.flush()\n",
    ).arg(root.join("new")))?;
    ensure!(fs::read(host.join("new"))?[..6] == *[&noise(1, 3)[..], b"MAP"].concat());

    // Attributes.
    fs::set_permissions(root.join("word"), Permissions::from_mode(0o4751))?;
    std::os::unix::fs::chown(root.join("word"), Some(12), Some(34))?;
    let meta = fs::metadata(host.join("word"))?;
    ensure!((meta.mode() & 0o7777, meta.uid(), meta.gid()) == (0o751, 12, 34), "{meta:?}");
    let then = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::open(root.join("word"))?.set_times(fs::FileTimes::new().set_modified(then).set_accessed(then))?;
    ensure!(fs::metadata(host.join("word"))?.modified()? == then);
    for name in ["user.a", "trusted.overlay.opaque", "security.mine"] {
        xattr::set(root.join("word"), name, b"y")?;
        ensure!(xattr::get(host.join("word"), name)?.as_deref() == Some(&b"y"[..]), "{name}");
    }
    xattr::remove(root.join("word"), "user.a")?;
    ensure!(
        xattr::get(root.join("word"), "user.a")?.is_none()
            && xattr::get(host.join("word"), "user.a")?.is_none()
    );

    // Names.
    let mask = umask(Mode::from_bits_truncate(0o027));
    let made = fs::create_dir(root.join("made"));
    umask(mask);
    made?;
    ensure!(fs::metadata(host.join("made"))?.mode() & 0o7777 == 0o750);
    symlink("anywhere/../else", root.join("made/link"))?;
    fs::hard_link(root.join("word"), root.join("made/word"))?;
    fs::hard_link(root.join("made/link"), root.join("link"))?;
    ensure!(fs::symlink_metadata(host.join("link"))?.file_type().is_symlink());
    // A whiteout, as overlayfs makes them.
    mknod(&root.join("gone"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), 0)?;
    mknod(&root.join("pipe"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0)?;
    ensure!(fs::symlink_metadata(host.join("gone"))?.file_type().is_char_device());
    for name in ["a\nb", "\u{fffd}ä", " ", "...", "-rf", &"n".repeat(255)] {
        fs::write(root.join("made").join(name), name)?;
        ensure!(fs::read_to_string(host.join("made").join(name))? == name);
    }
    fs::rename(root.join("made"), root.join("d/moved"))?;
    fs::write(root.join("over"), "over")?;
    fs::rename(root.join("over"), root.join("d/moved/word"))?;
    ensure!(fs::read_to_string(host.join("d/moved/word"))? == "over" && !host.join("over").exists());
    let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
    let cwd = nix::fcntl::AT_FDCWD;
    nix::fcntl::renameat2(cwd, &root.join("new"), cwd, &root.join("word"), exchange)?;
    ensure!(fs::read_to_string(host.join("new"))? == "one" && fs::read_to_string(root.join("new"))? == "one");
    // Removed while it is open.
    let mut open = OpenOptions::new().read(true).write(true).create_new(true).open(root.join("temporary"))?;
    fs::remove_file(root.join("temporary"))?;
    open.write_all(b"still here")?;
    open.rewind()?;
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    ensure!(text == "still here" && !host.join("temporary").exists());
    fails(OpenOptions::new().write(true).create_new(true).open(root.join("new")).map(drop), libc::EEXIST)?;
    fails(fs::remove_dir(root.join("d")), libc::ENOTEMPTY)?;
    fs::remove_dir_all(root.join("d/moved"))?;
    ensure!(!host.join("d/moved").exists());
    let numbers = |path: &Path| Ok::<_, nix::Error>(nix::sys::statvfs::statvfs(path)?.blocks());
    ensure!(numbers(&root)? == numbers(&host)?);
    same(&host, &root)?;

    // As somebody else: the kernel says no, and what is made is theirs.
    fs::create_dir(host.join("theirs"))?;
    std::os::unix::fs::chown(host.join("theirs"), Some(1234), Some(1234))?;
    let script = "echo mine > \"$1/theirs/file\"; ! cat \"$1/secret\"; ! echo > \"$1/not\"";
    fs::write(host.join("secret"), "s")?;
    fs::set_permissions(host.join("secret"), Permissions::from_mode(0o600))?;
    fs::set_permissions(scratch.path(), Permissions::from_mode(0o755))?;
    fs::set_permissions(root.parent().context("a parent")?, Permissions::from_mode(0o755))?;
    run(Command::new("setpriv")
        .args(["--reuid=1234", "--regid=1234", "--clear-groups", "sh", "-c", script, "-"])
        .arg(&root))?;
    let meta = fs::metadata(host.join("theirs/file"))?;
    ensure!((meta.uid(), meta.gid()) == (1234, 1234) && !host.join("not").exists());
    ensure!(daemon.terminate()?.code() == Some(0));
    Ok(())
}

/// Who may not keep set-user-id or set-group-id of a file that is changed loses it, exactly where the host's own file
/// system would take it away; but for set-group-id without execution, which the kernel leaves on FUSE.
#[test]
fn set_id_bits_go_as_on_the_host() -> Result<()> {
    /// Run where the files are, as a user who is in no group but their own.
    const CHANGES: &str = r#"
import os, struct
# An access ACL with an entry for user 7; with a mask, as there has to be.
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in [
    (1, 7, 0xffffffff), (2, 5, 7), (4, 5, 0xffffffff), (0x10, 7, 0xffffffff), (0x20, 5, 0xffffffff)])
with open("written", "r+b", buffering=0) as file:
    file.write(b"x")
with open("truncated", "r+b") as file:
    file.truncate(1)
os.truncate("cut", 1)
with open("allocated", "r+b") as file:
    os.posix_fallocate(file.fileno(), 0, 100)
for name in ["mode-other", "mode-own"]:
    os.chmod(name, 0o2770)
for name in ["acl-other", "acl-own", "acl-dir"]:
    os.setxattr(name, "system.posix_acl_access", acl)
os.chown("given", -1, os.getgid())
"#;
    const USER: u32 = 1234;
    const OTHERS: u32 = 99;
    needs_mounts!();
    needs_programs!("python3");
    let scratch = tempfile::tempdir()?;
    fs::set_permissions(scratch.path(), Permissions::from_mode(0o755))?;
    let (wanted, host) = (scratch.path().join("wanted"), scratch.path().join("host"));
    let files = [
        ("written", 0, 0, 0o6777),
        ("truncated", 0, 0, 0o6777),
        ("cut", 0, 0, 0o6777),
        ("allocated", 0, 0, 0o6777),
        ("mode-other", USER, OTHERS, 0o2775),
        ("mode-own", USER, USER, 0o2775),
        ("acl-other", USER, OTHERS, 0o2775),
        ("acl-own", USER, USER, 0o2775),
        ("acl-dir", USER, OTHERS, 0o2775),
        ("given", USER, OTHERS, 0o6775),
    ];
    for directory in [&wanted, &host] {
        fs::create_dir(directory)?;
        for (name, uid, gid, mode) in files {
            let path = directory.join(name);
            match name {
                "acl-dir" => fs::create_dir(&path)?,
                _ => fs::write(&path, "content")?,
            }
            std::os::unix::fs::chown(&path, Some(uid), Some(gid))?;
            fs::set_permissions(&path, Permissions::from_mode(mode))?;
        }
    }
    let daemon = DaemonOptions::empty().switch("--writable").start()?;
    post(&daemon, "/host", &host)?;
    let mounted = daemon.root().join("host");
    // The way there is another user's, too.
    let above = daemon.root().parent().context("a mountpoint is in a directory")?;
    fs::set_permissions(above, Permissions::from_mode(0o755))?;
    for directory in [&wanted, &mounted] {
        let mut command = Command::new("python3");
        run(command.args(["-c", CHANGES]).current_dir(directory).uid(USER).gid(USER))?;
    }
    let modes = |directory: &Path| -> Result<Vec<String>> {
        let mode = |(name, ..): (&str, u32, u32, u32)| {
            Ok(format!("{name} {:o}", fs::metadata(directory.join(name))?.mode() & 0o7777))
        };
        files.into_iter().map(mode).collect()
    };
    ensure!(modes(&host)? == modes(&wanted)?, "{:?}, wanted {:?}", modes(&host)?, modes(&wanted)?);
    ensure!(modes(&mounted)? == modes(&wanted)?, "{:?}, wanted {:?}", modes(&mounted)?, modes(&wanted)?);
    ensure!(modes(&wanted)?.contains(&"acl-other 775".to_owned()), "{:?}", modes(&wanted)?);
    Ok(())
}

/// What others do in the directory is seen: new names at once, the rest in a second.
#[test]
fn what_the_host_changes_is_seen() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let host = directory(scratch.path().join("host"), "one")?;
    let daemon = DaemonOptions::empty().start()?;
    post(&daemon, "/h", &host)?;
    let root = daemon.root().join("h");
    ensure!(fs::read_to_string(root.join("word"))? == "one" && fs::read_dir(&root)?.count() == 2);
    ensure!(!root.join("late").exists());
    fs::write(host.join("late"), "here")?;
    ensure!(fs::read_to_string(root.join("late"))? == "here", "a name that was not there before");
    // As long as before: only its time says that it is another text.
    fs::write(host.join("word"), "two")?;
    fs::remove_file(host.join("d/big"))?;
    fs::set_permissions(host.join("d"), Permissions::from_mode(0o700))?;
    daemon.wait_until("the changes are seen", |_| {
        let is = fs::read_to_string(root.join("word"))? == "two"
            && fs::read_dir(&root)?.count() == 3
            && !root.join("d/big").exists()
            && fs::metadata(root.join("d"))?.mode() & 0o777 == 0o700;
        Ok(is.then_some(()))
    })?;
    same(&host, &root)
}

/// An image and a directory below each other, and a mount of what this daemon serves itself.
#[test]
fn directories_nest_with_images_and_not_with_themselves() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let bootstrap = journey.path("image.boot");
    nydus.save_bootstrap(&bootstrap)?;
    let config = json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": nydus.path().join("blobs/sha256")}},
            "cache": {"type": "blobcache", "config": {"work_dir": journey.path("cache")}},
        },
        "mode": "direct", "enable_xattr": true,
    });
    let image = json!({"fs_type": "rafs", "source": bootstrap, "config": config.to_string()});
    let host = directory(journey.path("host"), "one")?;
    fs::create_dir_all(host.join("images/hidden"))?;
    for number in 0..3000 {
        fs::write(host.join(format!("d/{number}")), "")?;
    }
    let mut daemon = DaemonOptions::empty().flag("--shared-dir", &host).switch("--writable").start()?;
    let root = daemon.root().to_owned();
    let at = "/api/v1/mount?mountpoint=/images/one";
    ensure!(daemon.request("POST", at, &image)?.0 == 204);
    ensure!(daemon.request("POST", at, &image)?.0 == 500, "twice");
    for inner in ["/d/inner", "/d/second"] {
        post(&daemon, inner, &host.join("images"))?;
    }
    let names = |dir: &Path| -> Result<Vec<String>> {
        let mut names: Vec<_> = fs::read_dir(dir)?
            .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    };
    ensure!(names(&root)? == ["d", "images", "word"] && names(&root.join("images"))? == ["one"]);
    ensure!(names(&root.join("d"))? == ["inner", "second"], "what leads to mountpoints covers the host's");
    ensure!(names(&root.join("d/inner"))? == ["hidden"]);
    ensure!(fs::read(root.join("images/one/data/noise-a"))? == noise(1, (3 << 20) + 17));
    // Mountpoints are not to be removed or renamed, images not to be written; no file is in two places.
    fails(fs::rename(root.join("images"), root.join("moved")), libc::EBUSY)?;
    fails(fs::rename(root.join("word"), root.join("d/inner/word")), libc::EXDEV)?;
    fails(fs::hard_link(root.join("word"), root.join("d/inner/word")), libc::EXDEV)?;
    fails(fs::rename(root.join("word"), root.join("images/one/word")), libc::EROFS)?;
    fails(fs::write(root.join("images/one/new"), ""), libc::EROFS)?;
    fails(fs::remove_file(root.join("images/one/data/noise-a")), libc::EROFS)?;
    for mountpoint in ["/images/one", "/d/inner"] {
        delete(&daemon, mountpoint)?;
    }
    ensure!(names(&root.join("images"))? == ["hidden"] && names(&root.join("d"))? == ["second"]);
    delete(&daemon, "/d/second")?;
    ensure!(names(&root.join("d"))?.len() == 3001, "the host's own again");
    delete(&daemon, "/")?;
    ensure!(names(&root)?.is_empty());

    // A directory that has this very mount below it: no thread waits for itself.
    let above = root.parent().context("a parent")?.to_owned();
    post(&daemon, "/above", &above)?;
    let inside = root.join("above");
    within(PATIENCE, "list what is above the mount", move || {
        ensure!(names(&inside)?.contains(&"mount".to_owned()));
        // What the mount covers.
        ensure!(names(&inside.join("mount"))?.is_empty());
        fails(fs::read_dir(inside.join("mount/above")).map(drop), libc::ENOENT)
    })?;
    for (source, text) in [
        (root.join("above"), "this daemon serves it itself"),
        (root.clone(), "this daemon serves it itself"),
        (host.join("word"), "Not a directory"),
        ("x".into(), "absolute"),
    ] {
        let body = json!({"fs_type": "passthroughfs", "source": source, "config": ""});
        let (status, answer) = daemon.request("POST", "/api/v1/mount?mountpoint=/bad", &body)?;
        ensure!(
            status == 500 && answer["message"].as_str().is_some_and(|m| m.contains(text)),
            "{status} {answer}"
        );
    }
    // Nor does it hold on to the mount.
    nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH)?;
    let status = daemon.wait_ended()?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}

/// What virtual machines do with it: the upper directory of an overlay, here over an image of the same
/// daemon.
#[test]
fn an_overlay_writes_to_it() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let lower = directory(scratch.path().join("lower"), "one")?;
    let upper = scratch.path().join("upper");
    fs::create_dir(&upper)?;
    let daemon = DaemonOptions::empty().switch("--writable").start()?;
    post(&daemon, "/lower", &lower)?;
    post(&daemon, "/upper", &upper)?;
    let root = daemon.root().to_owned();
    let overlay = Mount::overlay(&root.join("lower"), &root.join("upper"))?;
    fs::write(overlay.path().join("word"), "two")?;
    fs::remove_file(overlay.path().join("d/big"))?;
    fs::remove_dir(overlay.path().join("d"))?;
    fs::create_dir(overlay.path().join("d"))?;
    fs::write(overlay.path().join("d/new"), "new")?;
    overlay.unmount()?;
    ensure!(
        fs::read_to_string(upper.join("upper/word"))? == "two"
            && fs::read_to_string(lower.join("word"))? == "one"
    );
    ensure!(xattr::get(upper.join("upper/d"), "trusted.overlay.opaque")?.as_deref() == Some(&b"y"[..]));
    let overlay = Mount::overlay(&root.join("lower"), &root.join("upper"))?;
    ensure!(fs::read_dir(overlay.path().join("d"))?.count() == 1);
    fs::remove_file(overlay.path().join("word"))?;
    overlay.unmount()?;
    let gone = fs::symlink_metadata(upper.join("upper/word"))?;
    ensure!(gone.file_type().is_char_device() && gone.rdev() == 0, "{gone:?}");
    Ok(())
}
