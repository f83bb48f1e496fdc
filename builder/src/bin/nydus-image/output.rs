//! Output files: nothing half-written ever stands under its final name.
//!
//! A regular file is written beside its place and renamed when complete; bytes and name are durable
//! before anything else is named. A FIFO or device is opened once and written front to back.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use builder::durable::sync_dir;
use builder::oci::spool;
use serde_json::{Value, json};
use storage::digest::DigestAlgorithm;
use tempfile::NamedTempFile;

use crate::version;

/// Mode of files under a name the caller chose, before the umask.
const NAMED_MODE: u32 = 0o666;
/// Mode of files in a blob directory.
const BLOB_DIR_MODE: u32 = 0o600;
/// Bytes of two files that are compared at a time.
const COMPARED: usize = 256 << 10;

/// A file being written.
pub enum Output {
    /// A FIFO or device.
    Stream(PathBuf, Option<File>),
    /// A file that gets its name when complete.
    Whole {
        /// As the caller wrote it.
        path: PathBuf,
        /// Where it leads.
        place: PathBuf,
        /// What is written.
        file: NamedTempFile,
    },
    /// A file whose name follows from its content.
    InDir(PathBuf, NamedTempFile),
}

impl Output {
    /// A file at `path`.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        let special = std::fs::metadata(path).is_ok_and(|m| {
            let kind = m.file_type();
            kind.is_fifo() || kind.is_char_device() || kind.is_block_device()
        });
        if special {
            let file = OpenOptions::new()
                .write(true)
                .open(path)
                .with_context(|| format!("open {} for writing", path.display()))?;
            return Ok(Self::Stream(path.to_owned(), Some(file)));
        }
        // What a symlink names is replaced, not the symlink: it may be /dev/stdout.
        let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let file = temporary(parent_of(&place), NAMED_MODE)?;
        Ok(Self::Whole { path: path.to_owned(), place, file })
    }

    /// A file at `path` that nobody else may read or write, as in a daemon's cache. What has the name is
    /// replaced.
    pub fn private(path: &Path) -> anyhow::Result<Self> {
        let file = temporary(parent_of(path), BLOB_DIR_MODE)?;
        Ok(Self::Whole { path: path.to_owned(), place: path.to_owned(), file })
    }

    /// Where the bytes are before the file has its name.
    pub fn path(&self) -> &Path {
        match self {
            Self::Stream(path, _) => path,
            Self::Whole { file, .. } | Self::InDir(_, file) => file.path(),
        }
    }

    /// A file in `dir`, which is made if it does not exist.
    pub fn in_dir(dir: &Path) -> anyhow::Result<Self> {
        let new: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
        std::fs::create_dir_all(dir).with_context(|| format!("make directory {}", dir.display()))?;
        // The last one of a relative path is the working directory, which has a name.
        for made in new.iter().filter(|made| !made.as_os_str().is_empty()) {
            sync_dir(parent_of(made))?;
        }
        Ok(Self::InDir(dir.to_owned(), temporary(dir, BLOB_DIR_MODE)?))
    }

    /// What to call it in messages.
    pub fn name(&self) -> String {
        match self {
            Self::Stream(path, _) | Self::Whole { path, .. } => path.display().to_string(),
            Self::InDir(dir, _) => format!("in {}", dir.display()),
        }
    }

    /// The one handle to write through.
    pub fn writer(&mut self) -> anyhow::Result<File> {
        match self {
            Self::Stream(path, file) => {
                file.take().with_context(|| format!("{} is opened only once", path.display()))
            }
            Self::Whole { file, .. } | Self::InDir(_, file) => {
                file.as_file().try_clone().with_context(|| format!("reopen {}", file.path().display()))
            }
        }
    }

    /// Has what was written so far on the disk.
    fn sync(&self) -> anyhow::Result<()> {
        match self {
            Self::Stream(..) => Ok(()),
            Self::Whole { file, .. } | Self::InDir(_, file) => synced(file),
        }
    }

    /// Gives the complete file its name, durably; in a directory that is `name`. What has it already
    /// stays if it has the same bytes, and is replaced if not. Returns the path.
    pub fn commit(self, name: &str) -> anyhow::Result<PathBuf> {
        match self {
            Self::Stream(path, _) => Ok(path),
            Self::Whole { path, place, file } => {
                synced(&file)?;
                file.persist(&place).with_context(|| format!("name {}", path.display()))?;
                sync_dir(parent_of(&place))?;
                Ok(path)
            }
            Self::InDir(dir, file) => {
                let path = dir.join(name);
                synced(&file)?;
                match file.persist_noclobber(&path) {
                    Ok(_) => {}
                    Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => {
                        // What can not be read is of no use to anybody.
                        if !is_same(e.file.path(), &path).unwrap_or(false) {
                            tracing::warn!(
                                "{} is replaced: it has other bytes than the new file of that name",
                                path.display()
                            );
                            e.file.persist(&path).with_context(|| format!("name {}", path.display()))?;
                        }
                    }
                    Err(e) => return Err(e).with_context(|| format!("name {}", path.display())),
                }
                sync_dir(&dir)?;
                Ok(path)
            }
        }
    }

    /// Nothing is to be stored: a regular file of that name goes away.
    pub fn discard(self) -> anyhow::Result<()> {
        if let Self::Whole { path, .. } = &self
            && std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file())
        {
            std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }
}

/// Writes a result to stdout. A reader that has gone (`| head`) is no failure of the work.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("write to stdout"),
    }
}

/// Writes `bytes` to `path` at once.
pub fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut output = Output::at(path)?;
    output.writer()?.write_all(bytes).with_context(|| format!("write {}", path.display()))?;
    output.commit("")?;
    Ok(())
}

/// Writes `bytes` to `path` at once, for nobody else to read or write.
pub fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut output = Output::private(path)?;
    output.writer()?.write_all(bytes).with_context(|| format!("write {}", path.display()))?;
    output.commit("")?;
    Ok(())
}

/// Writes the bootstrap to `path`, or into `dir` under its SHA-256; returns where.
pub fn write_bootstrap(path: Option<&Path>, dir: Option<&Path>, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    StagedBootstrap::new(path, dir, bytes)?.commit()
}

/// A bootstrap that is on the disk, but that nobody can see yet.
pub struct StagedBootstrap<'a> {
    output: Output,
    bytes: &'a [u8],
}

impl<'a> StagedBootstrap<'a> {
    /// `bytes` for `path`, or for a file in `dir` that is named by their SHA-256.
    pub fn new(path: Option<&Path>, dir: Option<&Path>, bytes: &'a [u8]) -> anyhow::Result<Self> {
        let output = match (path, dir) {
            (Some(path), _) => Output::at(path)?,
            (None, Some(dir)) => Output::in_dir(dir)?,
            (None, None) => anyhow::bail!("no place for the bootstrap: give --bootstrap or --blob-dir"),
        };
        let mut this = Self { output, bytes };
        if !matches!(this.output, Output::Stream(..)) {
            this.write()?;
            this.output.sync()?;
        }
        Ok(this)
    }

    /// Gives the file its name, or the bytes to whoever reads them; returns the path.
    pub fn commit(mut self) -> anyhow::Result<PathBuf> {
        if let Output::Stream(..) = self.output {
            self.write()?;
        }
        self.output.commit(&DigestAlgorithm::Sha256.digest(self.bytes).to_string())
    }

    fn write(&mut self) -> anyhow::Result<()> {
        let name = self.output.name();
        self.output.writer()?.write_all(self.bytes).with_context(|| format!("write bootstrap {name}"))
    }
}

/// The summary that `-J` asks for.
pub struct Summary<'a> {
    /// Path of the bootstrap, empty if it is inlined.
    pub bootstrap: &'a str,
    /// Ids of data blobs in table order.
    pub blobs: &'a [String],
    /// Version of the format: 5 or 6.
    pub fs_version: u32,
    /// Default compressor.
    pub compressor: &'a str,
    /// Image root digest, if the image has one.
    pub root: Option<&'a str>,
    /// Seconds the work took.
    pub seconds: f64,
}

impl Summary<'_> {
    /// Writes it to `path`, if any.
    pub fn write(&self, path: Option<&Path>) -> anyhow::Result<()> {
        let Some(path) = path else { return Ok(()) };
        let value: Value = json!({
            "version": version::describe(),
            "bootstrap": self.bootstrap,
            "blobs": self.blobs,
            "external_bootstrap": "",
            "external_blobs": [],
            "trace": { "consumed_time": { "total": self.seconds }, "registered_events": {} },
            "fs_version": self.fs_version.to_string(),
            "compressor": self.compressor,
            "root": self.root,
        });
        write_file(path, value.to_string().as_bytes())
    }
}

/// Says that there is nothing to do, and what that means for files of earlier runs.
pub fn nothing_to_do(why: &str, outputs: &[&Path]) {
    tracing::info!("nothing to do: {why}; no file is written");
    for path in outputs.iter().filter(|path| path.exists()) {
        tracing::warn!("{} is left as it was: nothing was to do, so it is not of this run", path.display());
    }
}

/// True if two regular files have the same bytes.
fn is_same(one: &Path, other: &Path) -> std::io::Result<bool> {
    let (one_is, other_is) = (std::fs::metadata(one)?, std::fs::metadata(other)?);
    if !other_is.is_file() || one_is.len() != other_is.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut ours, mut theirs) = (vec![0; COMPARED], vec![0; COMPARED]);
    loop {
        let count = one.read(&mut ours)?;
        if count == 0 {
            return Ok(true);
        }
        other.read_exact(&mut theirs[..count])?;
        if ours[..count] != theirs[..count] {
            return Ok(false);
        }
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn temporary(dir: &Path, mode: u32) -> anyhow::Result<NamedTempFile> {
    spool::sweep(dir);
    tempfile::Builder::new()
        .prefix(spool::TEMP_PREFIX)
        .permissions(std::fs::Permissions::from_mode(mode))
        .tempfile_in(dir)
        .with_context(|| format!("make a file in {}", dir.display()))
}

fn synced(file: &NamedTempFile) -> anyhow::Result<()> {
    file.as_file().sync_data().with_context(|| format!("sync {}", file.path().display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_appear_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut output = Output::at(&path).unwrap();
        output.writer().unwrap().write_all(b"abc").unwrap();
        assert!(!path.exists());
        drop(output);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        write_file(&path, b"whole").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("out", &link).unwrap();
        write_file(&link, b"through").unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&path).unwrap(), b"through");
        Output::at(&path).unwrap().discard().unwrap();
        assert!(!path.exists());

        let blobs = dir.path().join("blobs");
        for _ in 0..2 {
            let mut output = Output::in_dir(&blobs).unwrap();
            output.writer().unwrap().write_all(b"x").unwrap();
            assert_eq!(output.commit("id").unwrap(), blobs.join("id"));
        }
        assert_eq!(std::fs::metadata(blobs.join("id")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 1);
    }

    #[test]
    fn what_has_the_name_stays_only_if_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("new/blobs");
        let (path, bytes) = (blobs.join("id"), vec![7; 2 * COMPARED + 5]);
        let commit = || {
            let mut output = Output::in_dir(&blobs).unwrap();
            output.writer().unwrap().write_all(&bytes).unwrap();
            assert_eq!(output.commit("id").unwrap(), path);
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
            assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 1);
        };
        commit();
        let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
        let first = inode();
        commit();
        assert_eq!(inode(), first, "the same bytes stay as they are");
        let mut flipped = bytes.clone();
        flipped[COMPARED + 1] ^= 1;
        for other in [&bytes[..100], &flipped, &[]] {
            std::fs::write(&path, other).unwrap();
            commit();
        }
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        commit();
    }
}
