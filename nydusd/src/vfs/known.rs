//! Images that this process has validated: mounting one again is a matter of its digest.
//!
//! A validated bootstrap is mapped from a private copy, so that nobody changes it under us. What is
//! asked of a file that somebody wants to be mounted is only whether it is the same one: by its numbers
//! if they tell (nothing can change a file without its change time, unless it was just written), else by
//! its digest.

use std::collections::{HashSet, VecDeque};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rafs::fs::Rafs;
use storage::digest::Digest;

/// Images that are remembered. One costs a few bits per inode and a few bytes per chunk, beside pages
/// of the file that the system takes back when it needs them.
const REMEMBERED: usize = 64;

/// How long ago a file must have changed for its numbers to tell: clocks of file systems are coarse.
const SETTLED: Duration = Duration::from_secs(2);

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Stamp {
    /// `None` if the file was changed less than `settled` ago, or can not be looked at.
    fn of(path: &Path, settled: Duration) -> Option<Self> {
        let file = storage::outside::open(path).ok()?;
        let meta = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let changed = Duration::from_secs(u64::try_from(meta.ctime()).ok()?);
        let tells = now.checked_sub(changed).is_some_and(|age| age >= settled);
        tells.then_some(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            changed: (meta.ctime(), meta.ctime_nsec()),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

#[derive(Debug)]
struct Image {
    digest: Digest,
    /// Where the copy lies, which a successor needs.
    work_dir: PathBuf,
    allow_unverified: bool,
    /// Files that are this image.
    stamps: Vec<Stamp>,
    rafs: Arc<Rafs>,
}

/// The images, and the cache directories that were tidied.
#[derive(Debug)]
pub struct Known {
    /// The last used first. Held for look-ups only.
    images: Mutex<VecDeque<Image>>,
    tidied: Mutex<HashSet<PathBuf>>,
    /// See [`SETTLED`].
    settled: Duration,
}

impl Default for Known {
    fn default() -> Self {
        Self { images: Mutex::default(), tidied: Mutex::default(), settled: SETTLED }
    }
}

impl Known {
    /// The image that the file `source` is, if it is known, for mounts with this cache directory. At
    /// most reads the file.
    pub fn find(
        &self,
        source: &Path,
        work_dir: &Path,
        allow_unverified: bool,
    ) -> Option<(Arc<Rafs>, Digest)> {
        let fits = |image: &Image| image.work_dir == work_dir && image.allow_unverified == allow_unverified;
        let stamp = Stamp::of(source, self.settled);
        let by_stamp =
            stamp.and_then(|stamp| self.take(|image| fits(image) && image.stamps.contains(&stamp)));
        let found = match by_stamp {
            Some(found) => found,
            None => {
                if !self.lock().iter().any(fits) {
                    return None;
                }
                let digest = rafs::bootstrap::digest(source).ok()?;
                let found = self.take(|image| fits(image) && image.digest == digest)?;
                // Only if it is still the file that was read.
                if let Some(stamp) = stamp.filter(|stamp| Stamp::of(source, self.settled) == Some(*stamp)) {
                    self.note(digest, work_dir, stamp);
                }
                found
            }
        };
        // The copy may have been cleaned away.
        work_dir.join(format!("{}.boot", found.1)).is_file().then_some(found)
    }

    /// Remembers an image that was just validated. Which file it is is found out when it is asked for again:
    /// the one it was read from may have changed since.
    pub fn remember(&self, rafs: &Arc<Rafs>, digest: Digest, work_dir: &Path, allow_unverified: bool) {
        let image = Image {
            digest,
            work_dir: work_dir.to_owned(),
            allow_unverified,
            stamps: Vec::new(),
            rafs: Arc::clone(rafs),
        };
        let mut images = self.lock();
        images.retain(|known| {
            known.digest != digest || known.work_dir != work_dir || known.allow_unverified != allow_unverified
        });
        images.push_front(image);
        images.truncate(REMEMBERED);
    }

    /// True the first time for each cache directory.
    pub fn is_untidied(&self, work_dir: &Path) -> bool {
        self.tidied.lock().unwrap_or_else(PoisonError::into_inner).insert(work_dir.to_owned())
    }

    fn take(&self, is_it: impl Fn(&Image) -> bool) -> Option<(Arc<Rafs>, Digest)> {
        let mut images = self.lock();
        let at = images.iter().position(is_it)?;
        let image = images.remove(at)?;
        let found = (Arc::clone(&image.rafs), image.digest);
        images.push_front(image);
        Some(found)
    }

    fn note(&self, digest: Digest, work_dir: &Path, stamp: Stamp) {
        for image in self.lock().iter_mut() {
            if image.digest == digest && image.work_dir == work_dir && !image.stamps.contains(&stamp) {
                // Of files that come and go only the last few can be there.
                image.stamps.truncate(3);
                image.stamps.insert(0, stamp);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Image>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use rafs::bootstrap::{Bootstrap, OpenOptions};
    use rafs::fs::RafsOptions;

    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name).join("image.boot")
    }

    fn open(path: &Path) -> (Arc<Rafs>, Digest) {
        let bytes = std::fs::read(path).unwrap();
        let digest = rafs::bootstrap::digest(path).unwrap();
        let bootstrap: Arc<dyn Bootstrap> =
            Arc::from(rafs::bootstrap::from_bytes(bytes, &OpenOptions::default()).unwrap());
        (Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap()), digest)
    }

    #[test]
    fn an_image_is_known_by_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (source, work_dir) = (dir.path().join("source"), dir.path());
        std::fs::copy(golden("empty"), &source).unwrap();
        let known = Known::default();
        assert!(known.find(&source, work_dir, false).is_none());
        let (rafs, digest) = open(&source);
        known.remember(&rafs, digest, work_dir, false);
        assert!(known.find(&source, work_dir, false).is_none(), "there is no copy");
        std::fs::copy(&source, work_dir.join(format!("{digest}.boot"))).unwrap();
        let found = known.find(&source, work_dir, false).unwrap();
        assert!(Arc::ptr_eq(&found.0, &rafs) && found.1 == digest);
        assert!(known.find(&source, work_dir, true).is_none(), "other demands");
        assert!(known.find(&source, Path::new("/elsewhere"), false).is_none());
        // Another image under the same name.
        std::fs::copy(golden("none-4k"), &source).unwrap();
        assert!(known.find(&source, work_dir, false).is_none());
        assert!(known.is_untidied(work_dir) && !known.is_untidied(work_dir));
    }

    #[test]
    fn an_image_is_known_by_its_file_without_a_look_at_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (source, work_dir) = (dir.path().join("source"), dir.path());
        std::fs::copy(golden("empty"), &source).unwrap();
        let (rafs, digest) = open(&source);
        // Bytes that nobody finds the image by: what knows it now knows it by its numbers.
        let other = Digest([7; 32]);
        for (settled, is_known) in [(Duration::ZERO, true), (Duration::from_secs(3600), false)] {
            let known = Known { settled, ..Known::default() };
            known.remember(&rafs, digest, work_dir, false);
            std::fs::copy(&source, work_dir.join(format!("{digest}.boot"))).unwrap();
            assert!(known.find(&source, work_dir, false).is_some(), "by its bytes");
            known.lock()[0].digest = other;
            std::fs::copy(&source, work_dir.join(format!("{other}.boot"))).unwrap();
            assert_eq!(known.find(&source, work_dir, false).is_some(), is_known, "{settled:?}");
            // The same bytes, but what they were when they were read is over.
            let bytes = std::fs::read(&source).unwrap();
            std::fs::remove_file(&source).unwrap();
            std::fs::write(&source, bytes).unwrap();
            assert!(known.find(&source, work_dir, false).is_none());
        }
    }
}
