//! An image as a tar stream.
//!
//! One pass over the tree writes entries in byte order of names, parents before children; file
//! data is read ahead in the same order ([`crate::image`]) and every chunk is compared with its
//! digest before a byte of it is written. The stream holds all that an image does, but sockets:
//! tar has no entry for them.

mod entry;

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::ops::ControlFlow;

use rafs::bootstrap::{Attr, Bootstrap, FileType, Nid, Step, Walk};
use rafs::format::limits::MAX_LINK_PATH_BYTES;

use self::entry::{Entry, Kind, TarWriter};
use crate::image::{FileChunks, ImageData};
use crate::tree::shown;
use crate::{Error, Result};

/// How a tree becomes a stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnpackOptions {
    /// Refuse names that a container runtime would take for marks of removed entries (`.wh.…`).
    pub refuse_whiteouts: bool,
}

/// What was written.
#[derive(Clone, Debug, Default)]
pub struct Unpacked {
    /// Entries, hard links counted each.
    pub entries: u64,
    /// Bytes of file data.
    pub data: u64,
    /// Paths of sockets, which were left out: the first of them.
    pub sockets: Vec<String>,
    /// All sockets.
    pub socket_count: u64,
}

/// Sockets that are named in [`Unpacked`].
const NAMED_SOCKETS: usize = 10;

/// Writes the image to `out` as a tar stream with its end mark. What is written before an error
/// has no end mark.
///
/// `progress` is told the bytes of file data as they are written.
///
/// # Errors
/// `Io`: `out` failed. `Mismatch`, `Corrupt`, `Storage`: a chunk can not be read, or is damaged.
/// `Unsupported`: an xattr whose name tar can not hold; a whiteout where they are refused.
/// `Corrupt`: the tree holds names that no tree may. `Limit`: too many bytes in the paths of
/// hard-linked files.
pub fn unpack(
    image: &ImageData,
    out: impl Write,
    options: UnpackOptions,
    progress: &dyn Fn(u64),
) -> Result<Unpacked> {
    let bootstrap = &**image.rafs().bootstrap();
    let linked = linked_files(bootstrap)?;
    let mut chunks = image.stream(FileChunks::new(image.rafs(), &linked));
    let mut tar = TarWriter::new(out);
    let mut links = Links { linked: &linked, first: HashMap::new(), bytes: 0 };
    let mut done = Unpacked::default();
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    while let Some(step) = walk.step()? {
        let entry = match step {
            Step::Enter(entry) | Step::Leaf(entry) => entry,
            Step::Leave(_) => continue,
        };
        let path = walk.path();
        let is_root = path.is_empty();
        if !is_root {
            check_name(entry.name, options).map_err(|e| e.context(shown(path)))?;
        }
        let attr = bootstrap.attr(entry.nid)?;
        let xattrs = xattrs(bootstrap, entry.nid)?;
        if is_root && is_implied(&attr, &xattrs) {
            continue;
        }
        let kind = match attr.file_type {
            FileType::Regular => match links.target(entry.nid, path)? {
                Some(target) => Kind::HardLink(target),
                None => Kind::Regular(attr.size),
            },
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink(bootstrap.read_link(entry.nid)?),
            FileType::CharDevice => Kind::CharDevice(attr.device()),
            FileType::BlockDevice => Kind::BlockDevice(attr.device()),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => {
                done.socket_count += 1;
                if done.sockets.len() < NAMED_SOCKETS {
                    done.sockets.push(shown(path));
                }
                continue;
            }
        };
        let data = match kind {
            Kind::Regular(size) => size,
            _ => 0,
        };
        let path = if is_root { b"." } else { path };
        let header = Entry { path, kind, attr: &attr, xattrs: &xattrs };
        tar.header(&header).map_err(|e| e.context(shown(path)))?;
        done.entries += 1;
        let mut left = data;
        while left > 0 {
            let bytes = chunks.next_chunk().map_err(|e| e.context(shown(path)))?;
            let bytes = bytes.filter(|bytes| bytes.len() as u64 <= left).ok_or_else(|| {
                Error::bad_source(format!("{}: its chunks are not those of its size", shown(path)))
            })?;
            tar.data(&bytes).map_err(|e| e.context(shown(path)))?;
            left -= bytes.len() as u64;
            progress(bytes.len() as u64);
        }
        tar.pad(data)?;
        done.data += data;
    }
    tar.finish()?;
    Ok(done)
}

/// Regular files with several names, whatever link count they state.
fn linked_files(bootstrap: &dyn Bootstrap) -> Result<HashSet<Nid>> {
    let mut seen = HashSet::new();
    let mut linked = HashSet::new();
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    while let Some(step) = walk.step()? {
        if let Step::Leaf(entry) = step
            && entry.file_type == FileType::Regular
            && !seen.insert(entry.nid)
        {
            linked.insert(entry.nid);
        }
    }
    Ok(linked)
}

/// First names of files that have several.
struct Links<'a> {
    linked: &'a HashSet<Nid>,
    first: HashMap<Nid, Box<[u8]>>,
    bytes: usize,
}

impl Links<'_> {
    /// The name to link `path` to, if it is not the file's first.
    fn target(&mut self, nid: Nid, path: &[u8]) -> Result<Option<Vec<u8>>> {
        if !self.linked.contains(&nid) {
            return Ok(None);
        }
        if let Some(first) = self.first.get(&nid) {
            return Ok(Some(first.to_vec()));
        }
        self.bytes += path.len();
        if self.bytes > MAX_LINK_PATH_BYTES {
            let why = format!("the paths of hard-linked files take more than {MAX_LINK_PATH_BYTES} bytes");
            return Err(Error::limit(why));
        }
        self.first.insert(nid, path.into());
        Ok(None)
    }
}

/// Refuses what would leave the directory that the stream is extracted to.
fn check_name(name: &[u8], options: UnpackOptions) -> Result<()> {
    let bad = name.is_empty() || name == b"." || name == b".." || name.iter().any(|&b| b == b'/' || b == 0);
    if bad {
        return Err(Error::bad_source("no entry may have this name"));
    }
    if options.refuse_whiteouts && name.starts_with(b".wh.") {
        return Err(Error::new(
            crate::ErrorKind::Unsupported,
            "in a layer this name marks a removed entry; the image can not be expressed as layers, unpack it instead",
        ));
    }
    Ok(())
}

/// An extended attribute with its full name.
type OwnedXattr = (Vec<u8>, Vec<u8>);

fn xattrs(bootstrap: &dyn Bootstrap, nid: Nid) -> Result<Vec<OwnedXattr>> {
    let mut all = Vec::new();
    bootstrap.xattrs(nid, &mut |xattr| {
        all.push(([xattr.prefix, xattr.suffix].concat(), xattr.value.to_vec()));
        ControlFlow::Continue(())
    })?;
    all.sort_unstable();
    Ok(all)
}

/// True for a root that says nothing: extractors make such a directory by themselves.
fn is_implied(attr: &Attr, xattrs: &[OwnedXattr]) -> bool {
    let owner = attr.uid == 0 && attr.gid == 0;
    owner && attr.mode & 0o7777 == 0o755 && attr.mtime == 0 && attr.mtime_nsec == 0 && xattrs.is_empty()
}
