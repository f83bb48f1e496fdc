//! Which processes have files of a directory open or mapped, as far as this user may see.
//!
//! A file is known by its device and inode, for a daemon in a container may know it under another name, or
//! under none any more. Both are asked of the kernel's tables and never of the file: it may be on a mount
//! that does not answer.
//!
//! To list what a process has mapped waits for its memory's lock, and a process that stands in a page
//! fault on a stalled mount may keep that for ever: only daemons are asked, which read no mount.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use storage::cache::stock::{Item, Kind};

use crate::discover::DAEMON;

/// Device as the mount table has it, and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Identity {
    device: (u32, u32),
    inode: u64,
}

/// Process ids and names by file.
pub struct Users {
    /// Of the directory, and so of all files in it.
    device: Option<(u32, u32)>,
    by_file: BTreeMap<Identity, BTreeSet<(u32, String)>>,
    /// There are daemons whose files this user may not see.
    unseen: bool,
}

impl Users {
    /// Looks at all processes for who uses one of `items`, which are in `dir`.
    pub fn of(dir: &Path, items: &[Item]) -> Self {
        let device = device_of(dir).ok();
        let inodes: BTreeSet<u64> = items.iter().filter_map(sign).collect();
        let mut users = Self { device, by_file: BTreeMap::new(), unseen: device.is_none() };
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            users.look_at(pid, &process.path(), &inodes);
        }
        users
    }

    fn look_at(&mut self, pid: u32, process: &Path, inodes: &BTreeSet<u64>) {
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        let is_daemon = name.starts_with(DAEMON);
        let seen = opened(process, inodes).and_then(|mut files| {
            if is_daemon {
                files.extend(mapped(process, inodes)?);
            }
            Ok(files)
        });
        let files = seen.unwrap_or_else(|e| {
            // One that has just ended uses nothing.
            let is_over = e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(nix::libc::ESRCH);
            self.unseen |= is_daemon && !is_over;
            BTreeSet::new()
        });
        // A program chooses its own name.
        let name = name.trim_end().escape_debug().to_string();
        for file in files {
            self.by_file.entry(file).or_default().insert((pid, name.clone()));
        }
    }

    /// Who uses an item: of a blob its chunk map, of a bootstrap the file itself.
    pub fn of_item(&self, item: &Item) -> Vec<&(u32, String)> {
        let identity = self.device.zip(sign(item)).map(|(device, inode)| Identity { device, inode });
        identity.and_then(|identity| self.by_file.get(&identity)).into_iter().flatten().collect()
    }

    /// True if an item without users may have some all the same.
    pub fn may_be_more(&self) -> bool {
        self.unseen
    }
}

/// The inode of the file that tells who uses an item.
fn sign(item: &Item) -> Option<u64> {
    let sign = match item.kind {
        Kind::Blob => ".chunk_map",
        Kind::Bootstrap => ".boot",
    };
    let file = item.files.iter().find(|file| file.to_string_lossy().ends_with(sign))?;
    file.symlink_metadata().ok().map(|meta| meta.ino())
}

/// The device of the file system that `dir` is on, as the mount table has it: what stat says of a file is
/// another number on some file systems.
fn device_of(dir: &Path) -> io::Result<(u32, u32)> {
    let place = File::options().read(true).custom_flags(nix::libc::O_PATH).open(dir)?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", place.as_raw_fd()))?;
    let mount = field(&info, "mnt_id:").ok_or_else(|| io::Error::other("no mount id in fdinfo"))?;
    let table = std::fs::read("/proc/self/mountinfo")?;
    device_in(&table, mount).ok_or_else(|| io::Error::other("the mount is not in the mount table"))
}

fn field(info: &str, name: &str) -> Option<u64> {
    info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// The device of the mount with this id.
fn device_in(table: &[u8], mount: u64) -> Option<(u32, u32)> {
    String::from_utf8_lossy(table).lines().find_map(|line| {
        let mut fields = line.split(' ');
        let is_it = fields.next()?.parse() == Ok(mount);
        let (major, minor) = fields.nth(1)?.split_once(':')?;
        is_it.then_some((major.parse().ok()?, minor.parse().ok()?))
    })
}

/// Open files of a process that have one of these inode numbers.
fn opened(process: &Path, inodes: &BTreeSet<u64>) -> io::Result<BTreeSet<Identity>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(process.join("fdinfo"))?.flatten() {
        // It may have been closed since.
        let Ok(info) = std::fs::read_to_string(entry.path()) else { continue };
        if let Some(inode) = field(&info, "ino:").filter(|inode| inodes.contains(inode)) {
            found.extend(field(&info, "mnt_id:").map(|mount| (mount, inode)));
        }
    }
    if found.is_empty() {
        return Ok(BTreeSet::new());
    }
    let table = std::fs::read(process.join("mountinfo"))?;
    let identity = |(mount, inode)| Some(Identity { device: device_in(&table, mount)?, inode });
    Ok(found.into_iter().filter_map(identity).collect())
}

/// The same of those that it has mapped.
fn mapped(process: &Path, inodes: &BTreeSet<u64>) -> io::Result<BTreeSet<Identity>> {
    let maps = std::fs::read(process.join("maps"))?;
    let found = String::from_utf8_lossy(&maps)
        .lines()
        .filter_map(|line| {
            // Address, permissions, offset, device, inode, and what the rest of the line is.
            let mut fields = line.split_ascii_whitespace();
            let (major, minor) = fields.nth(3)?.split_once(':')?;
            let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
            let inode = fields.next()?.parse().ok()?;
            Some(Identity { device, inode })
        })
        .filter(|identity| inodes.contains(&identity.inode))
        .collect();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::SystemTime;

    use storage::cache::stock::Usage;

    use super::*;

    fn item(kind: Kind, file: PathBuf) -> Item {
        Item {
            kind,
            name: "a".to_owned(),
            files: vec![file],
            allocated_size: 0,
            decoded_size: 0,
            chunks: None,
            last_use: SystemTime::UNIX_EPOCH,
            usage: Usage::Free,
        }
    }

    /// A file is found whatever it is called, and not by its number alone.
    #[test]
    fn a_file_is_known_by_its_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let (here, other) = (dir.path().join("a.blob.data.chunk_map"), dir.path().join("b.chunk_map"));
        std::fs::write(&here, "x").unwrap();
        std::fs::write(&other, "x").unwrap();
        let open = File::open(&here).unwrap();
        std::fs::rename(&here, dir.path().join("moved.chunk_map")).unwrap();
        let items = [item(Kind::Blob, dir.path().join("moved.chunk_map")), item(Kind::Blob, other.clone())];
        let users = Users::of(dir.path(), &items);
        let pids = |users: &Users, item| users.of_item(item).iter().map(|user| user.0).collect::<Vec<_>>();
        assert_eq!(pids(&users, &items[0]), [std::process::id()]);
        assert!(pids(&users, &items[1]).is_empty());
        let elsewhere = Users { device: Some((0, 0)), ..users };
        assert!(pids(&elsewhere, &items[0]).is_empty());
        drop(open);
        assert!(pids(&Users::of(dir.path(), &items), &items[0]).is_empty());
    }

    #[test]
    fn tables_are_read_as_the_kernel_writes_them() {
        let table = b"30 1 259:1 / / rw - ext4 /dev/root rw\n39 30 0:37 / /a\\040b ro - fuse rafs ro\n";
        assert_eq!(device_in(table, 39), Some((0, 37)));
        assert_eq!((device_in(table, 30), device_in(table, 1)), (Some((259, 1)), None));
        assert_eq!(field("pos:\t0\nflags:\t02\nmnt_id:\t30\nino:\t17\n", "ino:"), Some(17));
        assert!(device_of(Path::new("/proc")).unwrap() != device_of(Path::new("/")).unwrap());
    }
}
