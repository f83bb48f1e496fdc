//! One tar file read as a set of named objects (`oci-archive:`, `docker-archive:`).
//!
//! The headers are read once; afterwards any object is read at its offset with `pread`, by
//! as many threads as like. Nothing is unpacked.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

/// Most entries an image archive may have: far beyond 127 layers and their metadata.
const MAX_ENTRIES: usize = 1 << 16;
/// Most symlinks followed from one name (older `docker save` links equal layers).
const MAX_LINKS: usize = 8;

#[derive(Clone, Debug)]
enum Entry {
    File { offset: u64, size: u64 },
    Link(String),
}

/// An indexed tar file.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    file: Arc<File>,
    entries: HashMap<String, Entry>,
}

impl Archive {
    /// Opens `path` and reads its headers.
    ///
    /// # Errors
    /// `NotFound`, `Io`: the file. `Corrupt`: not a tar. `Unsupported`: a compressed tar.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("archive {}", path.display());
        let file = File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("{}: no such file", what())),
            _ => Error::io(what(), e),
        })?;
        let mut magic = [0u8; 4];
        let got = file.read_at(&mut magic, 0).map_err(|e| Error::io(what(), e))?;
        if magic[..got].starts_with(&[0x1f, 0x8b]) || magic[..got] == [0x28, 0xb5, 0x2f, 0xfd] {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: the archive itself is compressed; decompress it first (gunzip, unzstd)", what()),
            ));
        }
        let len = file.metadata().map_err(|e| Error::io(what(), e))?.len();
        let corrupt = |e: io::Error| {
            Error::new(ErrorKind::Corrupt, format!("{}: not a tar file", what())).with_source(e)
        };
        let mut tar = tar::Archive::new(BufReader::new(&file));
        let mut entries = HashMap::new();
        for entry in tar.entries_with_seek().map_err(corrupt)? {
            let entry = entry.map_err(corrupt)?;
            let Some(name) = normalise(&entry.path_bytes()) else { continue };
            let kind = entry.header().entry_type();
            let value = if kind.is_file() {
                let (offset, size) = (entry.raw_file_position(), entry.size());
                if offset.checked_add(size).is_none_or(|end| end > len) {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!("{}: entry {name} is cut short", what()),
                    ));
                }
                Entry::File { offset, size }
            } else if kind.is_symlink() || kind.is_hard_link() {
                let target = entry.link_name_bytes().unwrap_or_default();
                let resolved = if kind.is_symlink() { resolve(&name, &target) } else { normalise(&target) };
                match resolved {
                    Some(target) => Entry::Link(target),
                    None => continue,
                }
            } else {
                continue;
            };
            entries.insert(name, value);
            if entries.len() > MAX_ENTRIES {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("{}: more than {MAX_ENTRIES} entries", what()),
                ));
            }
        }
        drop(tar);
        Ok(Self { path: path.to_owned(), file: Arc::new(file), entries })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the objects, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.entries.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A reader over object `name` and its length in bytes.
    ///
    /// # Errors
    /// `NotFound`: no such object, or links that lead nowhere.
    pub fn open_object(&self, name: &str) -> Result<(ObjectReader, u64)> {
        let mut at = name;
        for _ in 0..=MAX_LINKS {
            match self.entries.get(at) {
                Some(Entry::File { offset, size }) => {
                    let reader =
                        ObjectReader { file: Arc::clone(&self.file), position: *offset, end: offset + size };
                    return Ok((reader, *size));
                }
                Some(Entry::Link(target)) => at = target,
                None => break,
            }
        }
        Err(Error::new(ErrorKind::NotFound, format!("archive {}: no file {name} in it", self.path.display())))
    }
}

/// Reads one object of an archive.
#[derive(Debug)]
pub struct ObjectReader {
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl Read for ObjectReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let want = buf.len().min(left);
        if want == 0 {
            return Ok(0);
        }
        let got = self.file.read_at(&mut buf[..want], self.position)?;
        if got == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive shrank while it was read"));
        }
        self.position += got as u64;
        Ok(got)
    }
}

/// `./a//b` → `a/b`; `None` for names that leave the archive or are not UTF-8 (no object is named so).
fn normalise(name: &[u8]) -> Option<String> {
    let mut out: Vec<&str> = Vec::new();
    for part in std::str::from_utf8(name).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                out.pop()?;
            }
            part => out.push(part),
        }
    }
    (!out.is_empty()).then(|| out.join("/"))
}

fn resolve(link: &str, target: &[u8]) -> Option<String> {
    if target.starts_with(b"/") {
        return normalise(target);
    }
    let parent = link.rsplit_once('/').map_or("", |(parent, _)| parent);
    normalise(&[parent.as_bytes(), b"/", target].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_with(entries: &[(&str, tar::EntryType, &[u8])]) -> tempfile::NamedTempFile {
        let out = tempfile::NamedTempFile::new().unwrap();
        let mut tar = tar::Builder::new(out.reopen().unwrap());
        for (name, kind, body) in entries {
            let mut h = tar::Header::new_gnu();
            h.set_entry_type(*kind);
            h.set_mode(0o644);
            if kind.is_file() {
                h.set_size(body.len() as u64);
                tar.append_data(&mut h, name, *body).unwrap();
            } else {
                h.set_size(0);
                tar.append_link(&mut h, name, std::str::from_utf8(body).unwrap()).unwrap();
            }
        }
        tar.finish().unwrap();
        out
    }

    #[test]
    fn objects_are_found_through_links() {
        use tar::EntryType::{Regular, Symlink};
        let tar = tar_with(&[
            ("./a/layer.tar", Regular, b"hello"),
            ("b/layer.tar", Symlink, b"../a/layer.tar"),
            ("loop", Symlink, b"loop"),
            ("out", Symlink, b"../../etc/passwd"),
        ]);
        let archive = Archive::open(tar.path()).unwrap();
        let mut text = String::new();
        let (mut reader, size) = archive.open_object("b/layer.tar").unwrap();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), size), ("hello", 5));
        for missing in ["loop", "out", "nope"] {
            assert_eq!(archive.open_object(missing).unwrap_err().kind(), ErrorKind::NotFound, "{missing}");
        }
    }

    #[test]
    fn what_is_not_a_tar_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (bytes, kind) in [
            (b"\x1f\x8b\x08\0\0\0\0\0".as_slice(), ErrorKind::Unsupported),
            (&[0x28, 0xb5, 0x2f, 0xfd, 0], ErrorKind::Unsupported),
            (&[7; 4096], ErrorKind::Corrupt),
        ] {
            std::fs::write(file.path(), bytes).unwrap();
            assert_eq!(Archive::open(file.path()).unwrap_err().kind(), kind);
        }
        let tar = tar_with(&[("a", tar::EntryType::Regular, &[1; 4096])]);
        tar.as_file().set_len(1024).unwrap();
        assert_eq!(Archive::open(tar.path()).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
