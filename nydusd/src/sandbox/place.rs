//! What a path leads to, looked up once.
//!
//! Who checks a path and then uses it looks it up twice. A daemon that may write to a directory on the way can put a
//! link there in between, and would have its broker do to another directory what was allowed for this one. So a path is
//! made a descriptor first; what that is gets checked, and that is what is used.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawMode, ResolveFlags, mkdirat, openat, openat2, unlinkat};
use rustix::io::Errno;

/// What the kernel appends to the name of a file that has none any more.
const GONE: &str = " (deleted)";

/// A file, directory or socket, by a descriptor that can only name it (`O_PATH`): it stays the same one whatever
/// becomes of its path. Asks nothing of a file system that is mounted there.
#[derive(Debug)]
pub(crate) struct Place {
    file: File,
    real: PathBuf,
}

impl Place {
    /// What `path` leads to. Links are followed, but not those that the kernel makes in `/proc`: some lead into
    /// mounts of other processes, where paths mean something else.
    ///
    /// # Errors
    /// The system's; `ELOOP` for such a link.
    pub fn find(path: &Path) -> io::Result<Self> {
        Self::of(open(path, ResolveFlags::NO_MAGICLINKS)?)
    }

    /// What `path`, which [`settle`] answered, leads to: none of its directories has become a link since.
    ///
    /// # Errors
    /// The system's; `ELOOP` for links.
    pub fn fixed(path: &Path) -> io::Result<Self> {
        Ok(Self::at(open(path, ResolveFlags::NO_SYMLINKS)?, path))
    }

    /// What a descriptor stands for, which is at `real` of another mount.
    pub fn at(fd: OwnedFd, real: &Path) -> Self {
        Self { file: fd.into(), real: real.to_owned() }
    }

    /// What a descriptor stands for.
    fn of(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let real = std::fs::read_link(link(&file))?;
        let place = Self { file, real };
        // A name that ends so may be one, too.
        if place.real.as_os_str().as_encoded_bytes().ends_with(GONE.as_bytes()) {
            let (named, meta) = (place.real.symlink_metadata()?, place.metadata()?);
            if (named.dev(), named.ino()) != (meta.dev(), meta.ino()) {
                return Err(io::ErrorKind::NotFound.into());
            }
        }
        Ok(place)
    }

    /// The directory at `path`, made with its parents and `mode` if it is not there. `allow` is asked before anything
    /// is made, for what is there of the path and for the real path, and again for what came out.
    ///
    /// # Errors
    /// Those of `allow`, the system's, or `..` behind what does not exist.
    pub fn make(
        path: &Path,
        mode: u32,
        allow: impl Fn(&Self, &Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let absolute = std::path::absolute(path)?;
        let mut missing = Vec::new();
        let mut above = absolute.as_path();
        let found = loop {
            match Self::find(above) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                found => break found?,
            }
            match (above.parent(), above.components().next_back()) {
                (Some(parent), Some(Component::Normal(name))) => {
                    missing.push(name);
                    above = parent;
                }
                _ => bail!("{}: `..` behind what does not exist", path.display()),
            }
        };
        missing.reverse();
        let real = missing.iter().fold(found.real.clone(), |path, name| path.join(name));
        allow(&found, &real)?;
        let mut place = found;
        for name in missing {
            place = place.make_one(name, mode)?;
        }
        if !place.metadata()?.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory).into());
        }
        allow(&place, &place.real)?;
        Ok(place)
    }

    /// The directory `name` in this one, made if it is not there. A link is none.
    fn make_one(&self, name: &OsStr, mode: u32) -> io::Result<Self> {
        match mkdirat(self, name, Mode::from_raw_mode(mode as RawMode)) {
            Ok(()) | Err(Errno::EXIST) => self.enter(name),
            Err(e) => Err(e.into()),
        }
    }

    /// The directory `name` in this one. A link is none.
    ///
    /// # Errors
    /// The system's.
    pub fn enter(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Self::of(openat(self, name, flags, Mode::empty())?)
    }

    /// What is `name` in this directory, be it a link.
    ///
    /// # Errors
    /// The system's.
    pub fn look(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self::at(openat(self, name, flags, Mode::empty())?, &self.real.join(name)))
    }

    /// Removes `name`, which is no directory, from this directory.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(self, name, AtFlags::empty())?)
    }

    /// Opens the regular file `name` in this directory to be appended to, made if it is not there.
    ///
    /// # Errors
    /// The system's, or it is a link or no regular file.
    pub fn append(&self, name: &OsStr) -> io::Result<File> {
        // Nobody waits for the other end of a fifo.
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let to_end = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
        let file = File::from(openat(self, name, flags | to_end, Mode::from_raw_mode(0o666))?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Where it is, an absolute path without links: as it was when it was looked up.
    pub fn real(&self) -> &Path {
        &self.real
    }

    /// A path that leads nowhere but here while this value lives, in this process.
    pub fn link(&self) -> PathBuf {
        link(&self.file)
    }

    /// # Errors
    /// The system's.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// # Errors
    /// The system's.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, real: self.real.clone() })
    }

    /// Opens it to be read.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self, flags: i32) -> io::Result<File> {
        File::options().read(true).custom_flags(flags).open(self.link())
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn link(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Opens what is only to be named. Linux before 5.6, and some containers, have no `openat2`: there links are followed.
fn open(path: &Path, resolve: ResolveFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    loop {
        return Ok(match openat2(CWD, path, flags, Mode::empty(), resolve) {
            Err(Errno::INTR) => continue,
            Err(Errno::NOSYS | Errno::PERM) => openat(CWD, path, flags, Mode::empty())?,
            opened => opened?,
        });
    }
}

/// The absolute path that `path` means now, links resolved as far as it exists: [`Place::fixed`] follows none later.
///
/// # Errors
/// The system's, or `..` behind what does not exist.
pub(crate) fn settle(path: &Path) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let there = absolute.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    let (above, real) = there.context("there is no root directory")?;
    let rest = absolute.strip_prefix(above)?;
    if !rest.components().all(|component| matches!(component, Component::Normal(_))) {
        bail!("{}: `..` behind what does not exist", path.display());
    }
    // Nothing joined would be a slash at the end.
    Ok(rest.iter().fold(real, |path, name| path.join(name)))
}

/// The same for a file that may be replaced, so that its own name stays as it is.
///
/// # Errors
/// Those of [`settle`], or it is no name of a file.
pub(crate) fn settle_parent(path: &Path) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(settle(parent)?.join(name)),
        _ => bail!("{} is no name of a file", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn anything(_: &Place, _: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().canonicalize().unwrap();
        (scratch, path)
    }

    #[test]
    fn a_place_is_where_it_really_is() {
        let (_scratch, dir) = scratch();
        fs::create_dir(dir.join("d")).unwrap();
        symlink("d", dir.join("link")).unwrap();
        let place = Place::find(&dir.join("link/../link")).unwrap();
        assert_eq!(place.real(), dir.join("d"));
        // It stays the same one.
        fs::rename(dir.join("d"), dir.join("e")).unwrap();
        symlink("/", dir.join("d")).unwrap();
        fs::write(dir.join("e/file"), "e").unwrap();
        assert!(place.look(OsStr::new("file")).unwrap().metadata().unwrap().is_file());
        assert_eq!(Place::find(&dir.join("nothing")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn links_into_other_processes_lead_nowhere() {
        for path in ["/proc/self/root/etc", "/proc/self/cwd", "/proc/self/fd/0"] {
            let refused = Place::find(Path::new(path)).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ELOOP), "{path}");
        }
    }

    #[test]
    fn what_has_no_name_any_more_is_not_there() {
        let (_scratch, dir) = scratch();
        let odd = dir.join(format!("odd{GONE}"));
        fs::write(&odd, "").unwrap();
        assert_eq!(Place::find(&odd).unwrap().real(), odd);
        let open = fs::File::open(&odd).unwrap();
        fs::remove_file(&odd).unwrap();
        assert_eq!(Place::of(open.into()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_was_settled_is_reached_through_no_link() {
        let (_scratch, dir) = scratch();
        fs::create_dir_all(dir.join("d/e")).unwrap();
        symlink("d", dir.join("link")).unwrap();
        let settled = settle(&dir.join("link/e/not/yet")).unwrap();
        assert_eq!(settled, dir.join("d/e/not/yet"));
        assert_eq!(settle(&dir).unwrap().as_os_str(), dir.as_os_str(), "no slash at the end");
        assert!(settle(&dir.join("nothing/../x")).is_err());
        symlink("/nowhere", dir.join("d/last")).unwrap();
        assert_eq!(settle_parent(&dir.join("link/last")).unwrap(), dir.join("d/last"));
        assert!(settle_parent(Path::new("/")).is_err());

        let settled = settle(&dir.join("link/e")).unwrap();
        Place::fixed(&settled).unwrap();
        for link in [dir.join("d"), dir.join("f/e")] {
            if dir.join("f").exists() {
                fs::remove_file(dir.join("d")).unwrap();
                fs::rename(dir.join("f"), dir.join("d")).unwrap();
            }
            fs::rename(dir.join("d"), dir.join("f")).unwrap();
            symlink(&link, dir.join("d")).unwrap();
            assert!(Place::fixed(&settled).is_err(), "{}", link.display());
        }
    }

    #[test]
    fn directories_are_made_where_they_may_be() {
        let (_scratch, dir) = scratch();
        let made = Place::make(&dir.join("a/b/c"), 0o700, anything).unwrap();
        assert_eq!(made.real(), dir.join("a/b/c"));
        assert_eq!(fs::metadata(dir.join("a/b")).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(Place::make(&dir.join("a/b/c"), 0o700, anything).is_ok(), "again");
        symlink("a", dir.join("link")).unwrap();
        assert_eq!(Place::make(&dir.join("link/d"), 0o700, anything).unwrap().real(), dir.join("a/d"));

        let asked = std::cell::RefCell::new(Vec::new());
        let refuse = |_: &Place, real: &Path| {
            asked.borrow_mut().push(real.to_owned());
            bail!("not here")
        };
        assert!(Place::make(&dir.join("link/x/y"), 0o700, refuse).is_err());
        assert_eq!(*asked.borrow(), [dir.join("a/x/y")]);
        assert!(!dir.join("a/x").exists());

        fs::write(dir.join("file"), "").unwrap();
        symlink("nowhere", dir.join("dangling")).unwrap();
        for path in ["a/../no/../x", "file", "file/x", "dangling", "dangling/x"] {
            assert!(Place::make(&dir.join(path), 0o700, anything).is_err(), "{path}");
        }
        assert!(!dir.join("x").exists() && !dir.join("nowhere").exists());
    }

    #[test]
    fn only_files_are_appended_to() {
        let (_scratch, dir) = scratch();
        let place = Place::find(&dir).unwrap();
        for text in ["a", "b"] {
            std::io::Write::write_all(&mut place.append(OsStr::new("log")).unwrap(), text.as_bytes())
                .unwrap();
        }
        assert_eq!(fs::read_to_string(dir.join("log")).unwrap(), "ab");
        symlink("log", dir.join("link")).unwrap();
        nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["link", "fifo", "."] {
            assert!(place.append(OsStr::new(name)).is_err(), "{name}");
        }
    }
}
