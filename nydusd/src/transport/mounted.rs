//! Which mount is ours, in the kernel's own numbers: a path tells only what is on top of it now.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags, openat};

use super::seat::SOURCE;
use crate::sandbox::place::Place;

/// The mounts that this process sees; see proc_pid_mountinfo(5).
const TABLE: &str = "/proc/self/mountinfo";

/// One mount, as long as it lasts: the kernel gives its numbers away again afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountIdentity {
    /// Of the mount.
    id: Vec<u8>,
    /// Of what is mounted, `major:minor`.
    device: Vec<u8>,
    /// Of the FUSE connection that an overlay of ours covers.
    covers: Option<u64>,
}

/// A row of a mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Of the mount.
    pub id: u64,
    /// Of the mount that it is on.
    pub parent: u64,
    /// Where it is.
    pub at: PathBuf,
    /// See [`MountIdentity::connection`].
    pub connection: Option<u64>,
}

impl Row {
    fn of(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        let at = unescaped(fields.nth(2)?);
        let connection = identity_of(line, SOURCE)?.connection();
        Some(Self { id, parent, at, connection })
    }
}

/// The mounts that a thread sees, whose own directory in a proc file system `process` is.
///
/// # Errors
/// The system's.
pub(crate) fn rows_at(process: impl AsFd) -> io::Result<Vec<Row>> {
    let mut table = Vec::new();
    let file = openat(process, "mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    File::from(file).read_to_end(&mut table)?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(Row::of).collect())
}

/// The mount of a row; overlays of ours cover one of `source`.
fn identity_of(row: &[u8], source: &str) -> Option<MountIdentity> {
    let (id, device) = rows(row).next()?;
    Some(MountIdentity { id: id.to_vec(), device: device.to_vec(), covers: covered(row, source) })
}

/// Source in the mount table of an overlay that covers FUSE connection `number` of `source`.
pub(super) fn covering(source: &str, number: u64) -> String {
    format!("{source}:{number}")
}

/// Behind the optional fields of a row and a dash: type and source.
fn kind_of(row: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut fields = row.split(|byte| *byte == b' ').skip_while(|field| *field != b"-").skip(1);
    Some((fields.next()?, fields.next()?))
}

/// The connection that an overlay of ours covers.
fn covered(row: &[u8], source: &str) -> Option<u64> {
    let (kind, name) = kind_of(row)?;
    let number = name.strip_prefix(source.as_bytes())?.strip_prefix(b":").filter(|_| kind == b"overlay")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// True if a row is a FUSE mount of `source`, or covers one.
fn is_mount_of(row: &[u8], source: &str) -> bool {
    let fuse =
        kind_of(row).is_some_and(|(kind, name)| kind.starts_with(b"fuse") && name == source.as_bytes());
    fuse || covered(row, source).is_some()
}

impl MountIdentity {
    /// The topmost mount at `path`, which has no links. Asks nothing of the file system mounted there.
    ///
    /// # Errors
    /// No such path, or no proc file system.
    pub fn at(path: &Path) -> io::Result<Self> {
        Self::of(&Place::fixed(path)?)
    }

    /// The mount that `place` is in. Asks nothing of its file system.
    ///
    /// # Errors
    /// No proc file system.
    pub fn of(place: &Place) -> io::Result<Self> {
        Ok(Self::look(place, SOURCE)?.0)
    }

    /// The same if it begins there and is a FUSE mount of `source`, or covers one.
    ///
    /// # Errors
    /// No proc file system.
    pub fn of_ours(place: &Place, source: &str) -> io::Result<Option<Self>> {
        let (here, ours) = Self::look(place, source)?;
        Ok(ours.then_some(here))
    }

    /// The mount of FUSE connection `number` of `source` at `path`, which has no links, or the overlay that covers it,
    /// whatever else lies on top. Asks nothing of either.
    ///
    /// # Errors
    /// No proc file system.
    pub fn of_connection(path: &Path, source: &str, number: u64) -> io::Result<Option<Self>> {
        Ok(Self::listed(&std::fs::read(TABLE)?, path, source, number))
    }

    fn listed(table: &[u8], path: &Path, source: &str, number: u64) -> Option<Self> {
        let path = escaped(path);
        let ours =
            table.split(|byte| *byte == b'\n').filter(|row| is_at(row, &path) && is_mount_of(row, source));
        let identities = ours.filter_map(|row| identity_of(row, source));
        identities.filter(|one| one.connection() == Some(number)).max_by_key(Self::is_cover)
    }

    fn look(place: &Place, source: &str) -> io::Result<(Self, bool)> {
        let info = std::fs::read(format!("/proc/self/fdinfo/{}", place.as_fd().as_raw_fd()))?;
        let id = info
            .split(|byte| *byte == b'\n')
            .find_map(|line| line.strip_prefix(b"mnt_id:"))
            .ok_or_else(|| io::Error::other("no mount id in fdinfo"))?
            .trim_ascii();
        let table = std::fs::read(TABLE)?;
        let row = table.split(|byte| *byte == b'\n').find(|line| rows(line).any(|(row, _)| row == id));
        let (row, here) = row
            .and_then(|row| Some((row, identity_of(row, source)?)))
            .ok_or_else(|| io::Error::other("the mount is not in the mount table"))?;
        Ok((here, is_at(row, &escaped(place.real())) && is_mount_of(row, source)))
    }

    /// True if it is an overlay that covers a FUSE mount.
    pub fn is_cover(&self) -> bool {
        self.covers.is_some()
    }

    /// The kernel's number of what is mounted, major << 20 | minor; of a FUSE mount it names the
    /// connection. Of an overlay that covers one of ours, the number of that.
    pub fn connection(&self) -> Option<u64> {
        if self.covers.is_some() {
            return self.covers;
        }
        let (major, minor) = std::str::from_utf8(&self.device).ok()?.split_once(':')?;
        Some(major.parse::<u64>().ok()? << 20 | minor.parse::<u64>().ok()?)
    }

    /// Waits until it is mounted no more; false if it still is after `limit`.
    ///
    /// # Errors
    /// The mount table can not be read.
    pub fn wait_gone(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        let mut file = File::open(TABLE)?;
        let mut table = Vec::new();
        loop {
            table.clear();
            file.rewind()?;
            file.read_to_end(&mut table)?;
            if !rows(&table).any(|row| row == (&self.id, &self.device)) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // The table is always readable; what changes it is urgent. Whatever ends the wait,
            // the table is read again.
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout);
        }
    }
}

/// The absolute path of a mountpoint, links resolved. Asks nothing of what is mounted there, which
/// may have nobody to answer.
///
/// # Errors
/// No such path.
pub(crate) fn resolve(path: &Path) -> io::Result<PathBuf> {
    // Without a slash at the end, which follows links.
    let path: PathBuf = path.components().collect();
    // Neither reading a link nor resolving one looks at the directory behind the last name.
    match (path.read_link(), path.parent(), path.file_name()) {
        (Err(_), Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(parent.canonicalize()?.join(name))
        }
        _ => path.canonicalize(),
    }
}

/// True if the mount table has a FUSE mount of `source` at exactly `path`, which has no links. Asks nothing of it.
///
/// # Errors
/// No proc file system.
pub(crate) fn is_listed(path: &Path, source: &str) -> io::Result<bool> {
    let path = escaped(path);
    let table = std::fs::read(TABLE)?;
    Ok(table.split(|byte| *byte == b'\n').any(|line| is_at(line, &path) && is_mount_of(line, source)))
}

/// True if a row is of a mount at `path`, as the table writes it.
fn is_at(row: &[u8], path: &[u8]) -> bool {
    row.split(|byte| *byte == b' ').nth(4) == Some(path)
}

/// A path as the mount table writes it.
fn escaped(path: &Path) -> Vec<u8> {
    let mut escaped = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => escaped.extend(format!("\\{byte:03o}").bytes()),
            other => escaped.push(*other),
        }
    }
    escaped
}

/// A path that the mount table wrote.
fn unescaped(written: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(written.len());
    let mut rest = written;
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *byte == b'\\');
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(code.unwrap_or(*byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(path).into()
}

/// Takes the mount that begins at `place` out of the tree at once, whoever still uses it.
///
/// # Errors
/// The kernel refuses, and so does `fusermount3` where only that may.
pub(crate) fn detach(place: &Place) -> io::Result<()> {
    match umount2(&place.link(), MntFlags::MNT_DETACH) {
        Err(Errno::EPERM) => {
            let mut helper = std::process::Command::new("fusermount3");
            let status = helper.args(["-u", "-z", "--"]).arg(place.real()).status()?;
            if status.success() { Ok(()) } else { Err(io::Error::other(format!("fusermount3: {status}"))) }
        }
        result => Ok(result?),
    }
}

/// Mount id and device of every row.
fn rows(table: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        Some((fields.next()?, fields.nth(1)?))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn paths_are_resolved_but_for_what_they_name() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("a b")).unwrap();
        std::os::unix::fs::symlink("a b", real.join("link")).unwrap();
        for path in ["a b", "a b/", "link", "link/", "a b/../a b", "a b/."] {
            assert_eq!(resolve(&real.join(path)).unwrap(), real.join("a b"), "{path}");
        }
        assert_eq!(escaped(Path::new("/a b\\")), br"/a\040b\134");
        assert_eq!(unescaped(br"/a\040b\134"), Path::new("/a b\\"));
        assert_eq!(unescaped(br"/a\9"), Path::new("/a\\9"));
    }

    #[test]
    fn an_overlay_of_ours_is_told_from_others() {
        let row =
            |kind: &str| format!("36 25 0:52 / /m rw,noatime shared:1 - {kind} rw,lowerdir=/proc/self/fd/3");
        let ours = covering("rafs", (1 << 20) + 52);
        assert_eq!(covered(row(&format!("overlay {ours}")).as_bytes(), "rafs"), Some((1 << 20) + 52));
        for other in ["overlay overlay", "overlay rafs", "overlay rafs:", "overlay rafs:1x", "fuse rafs:5"] {
            assert_eq!(covered(row(other).as_bytes(), "rafs"), None, "{other}");
        }
        assert!(is_mount_of(row("fuse rafs").as_bytes(), "rafs"));
        assert!(is_mount_of(row("overlay rafs:7").as_bytes(), "rafs"));
        assert!(!is_mount_of(row("fuse other").as_bytes(), "rafs") && !is_mount_of(b"", "rafs"));
    }

    #[test]
    fn a_mount_of_ours_is_found_below_others() {
        let row = |id: u32, device: u32, rest: &str| {
            format!("{id} 25 0:{device} / /a\\040b rw shared:1 - {rest}\n")
        };
        let find = |rows: &[String], number| {
            let found = MountIdentity::listed(rows.concat().as_bytes(), Path::new("/a b"), "rafs", number);
            found.map(|found| String::from_utf8(found.id).unwrap())
        };
        let rows = [
            row(30, 52, "fuse rafs rw"),
            row(31, 53, "overlay rafs:52 rw"),
            row(32, 54, "fuse rafs rw"),
            row(33, 55, "tmpfs tmpfs rw"),
        ];
        assert_eq!(find(&rows, 52).as_deref(), Some("31"));
        assert_eq!(find(&rows[..1], 52).as_deref(), Some("30"));
        assert_eq!(find(&rows, 54).as_deref(), Some("32"));
        for number in [53, 55, 56] {
            assert_eq!(find(&rows, number), None, "{number}");
        }
        let row = Row { id: 31, parent: 25, at: "/a b".into(), connection: Some(52) };
        assert_eq!(Row::of(rows[1].trim_end().as_bytes()), Some(row));
        assert_eq!(Row::of(b""), None);
        assert_eq!(MountIdentity::listed(rows[0].as_bytes(), Path::new("/a"), "rafs", 52), None);
    }

    #[test]
    fn a_mount_is_found_by_its_path_and_not_gone() {
        let proc = MountIdentity::at(Path::new("/proc")).unwrap();
        let own = PathBuf::from(format!("/proc/{}", std::process::id()));
        assert_eq!(proc, MountIdentity::at(&own).unwrap());
        assert_ne!(proc, MountIdentity::at(Path::new("/")).unwrap());
        assert!(!proc.wait_gone(Duration::ZERO).unwrap());
        let place = Place::fixed(Path::new("/proc")).unwrap();
        assert_eq!(MountIdentity::of_ours(&place, "proc").unwrap(), None);
        assert!(!is_listed(Path::new("/proc"), "proc").unwrap());
        let device = std::fs::metadata("/proc").unwrap().dev();
        let number = nix::sys::stat::major(device) << 20 | nix::sys::stat::minor(device);
        assert_eq!(proc.connection(), Some(number));
        assert!(MountIdentity { id: b"0".into(), ..proc.clone() }.wait_gone(Duration::MAX / 4).unwrap());
        assert!(MountIdentity { device: b"0:0".into(), ..proc }.wait_gone(Duration::MAX / 4).unwrap());
    }
}
