//! A proof for one path: what must be known to recompute the root digest from it.
//!
//! For the entry itself it holds everything its digest covers, for each directory above
//! the metadata and the digests of all children. Bytes that need not be UTF-8 (names,
//! values, targets) are percent-encoded.

use serde::{Deserialize, Serialize};
use storage::digest::{Digest, DigestAlgorithm, TaggedDigest};

use super::{Merkle, NO_LINKS, NodeFields};
use crate::bootstrap::{Attr, FileType};
use crate::{Error, ErrorKind, Result};

/// The one version there is.
const VERSION: u32 = 1;

/// Proves one entry of an image against the image root digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    version: u32,
    /// The root digest it was made for; [`Proof::verify`] believes only its argument.
    root: String,
    digester: String,
    chunk_size: u32,
    path: String,
    /// From the root to the parent of the entry.
    directories: Vec<Directory>,
    target: Target,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
    mtime_nsec: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Directory {
    pub attributes: Attributes,
    pub xattrs: String,
    pub children: Vec<Child>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Child {
    name: String,
    node: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Xattr {
    name: String,
    value: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Target {
    pub attributes: Attributes,
    pub xattrs: Vec<Xattr>,
    pub links: Vec<String>,
    pub data: Data,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Data {
    Regular { size: u64, chunks: Vec<String> },
    Directory { children: Vec<Child> },
    Symlink { target: String },
    Device { major: u32, minor: u32 },
    Special,
}

impl Attributes {
    pub fn new(attr: &Attr) -> Self {
        Self { mode: attr.mode, uid: attr.uid, gid: attr.gid, mtime: attr.mtime, mtime_nsec: attr.mtime_nsec }
    }

    fn node(&self, merkle: Merkle, xattrs: Digest, links: Digest, data: Digest) -> Digest {
        let Self { mode, uid, gid, mtime, mtime_nsec } = *self;
        merkle.node(&NodeFields { mode, uid, gid, mtime, mtime_nsec, xattrs, links, data })
    }
}

impl Child {
    pub fn new(name: &[u8], node: Digest) -> Self {
        Self { name: encode(name), node: node.to_string() }
    }
}

impl Xattr {
    pub fn new(name: &[u8], value: &[u8]) -> Self {
        Self { name: encode(name), value: encode(value) }
    }
}

impl Data {
    pub fn regular(size: u64, chunks: &[Digest]) -> Self {
        Self::Regular { size, chunks: chunks.iter().map(Digest::to_string).collect() }
    }

    pub fn symlink(target: &[u8]) -> Self {
        Self::Symlink { target: encode(target) }
    }

    fn digest(&self, merkle: Merkle, chunk_size: u32) -> Result<Digest> {
        Ok(match self {
            Self::Regular { size, chunks } => {
                if chunks.len() as u64 != size.div_ceil(chunk_size.max(1).into()) {
                    return Err(bad("the number of chunks does not fit the size"));
                }
                let chunks = chunks.iter().map(|c| hex(c)).collect::<Result<Vec<_>>>()?;
                merkle.file(*size, chunks.into_iter())
            }
            Self::Directory { children } => directory(merkle, children)?,
            Self::Symlink { target } => merkle.symlink(&decode(target)?),
            Self::Device { major, minor } => merkle.device(*major, *minor),
            Self::Special => merkle.special(),
        })
    }

    fn fits(&self, mode: u32) -> bool {
        match FileType::from_mode(mode) {
            Some(FileType::Regular) => matches!(self, Self::Regular { .. }),
            Some(FileType::Directory) => matches!(self, Self::Directory { .. }),
            Some(FileType::Symlink) => matches!(self, Self::Symlink { .. }),
            Some(FileType::CharDevice | FileType::BlockDevice) => matches!(self, Self::Device { .. }),
            Some(FileType::Fifo | FileType::Socket) => matches!(self, Self::Special),
            None => false,
        }
    }
}

impl Proof {
    pub(super) fn new(
        root: TaggedDigest,
        chunk_size: u32,
        path: &[u8],
        directories: Vec<Directory>,
        target: Target,
    ) -> Result<Self> {
        let proof = Self {
            version: VERSION,
            root: root.to_string(),
            digester: root.algorithm.to_string(),
            chunk_size,
            path: encode(path),
            directories,
            target,
        };
        proof.verify(&root)?;
        Ok(proof)
    }

    /// The path it speaks of: components joined by `/`, percent-encoded; empty for the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Recomputes the root digest from the proof alone and compares it with `root`.
    ///
    /// # Errors
    /// `Mismatch`: the entry is not part of the image with that root digest. `Invalid`: the
    /// proof is malformed.
    pub fn verify(&self, root: &TaggedDigest) -> Result<()> {
        if self.version != VERSION {
            return Err(bad(&format!("version {} is unknown", self.version)));
        }
        let digester: DigestAlgorithm =
            self.digester.parse().map_err(|e: storage::Error| bad("digester").with_source(e))?;
        if digester != root.algorithm {
            return Err(mismatch(&format!("made with {digester}, the root digest with {}", root.algorithm)));
        }
        let merkle = Merkle(digester);
        let path = decode(&self.path)?;
        let names: Vec<&[u8]> = path.split(|&b| b == b'/').filter(|name| !name.is_empty()).collect();
        if names.len() != self.directories.len() {
            return Err(bad("path and directories differ in length"));
        }
        let mut node = self.target.digest(merkle, self.chunk_size, &path)?;
        for (above, name) in self.directories.iter().zip(names).rev() {
            if FileType::from_mode(above.attributes.mode) != Some(FileType::Directory) {
                return Err(bad("an entry above is not a directory"));
            }
            let name = encode(name);
            if !above.children.iter().any(|c| c.name == name && c.node == node.to_string()) {
                return Err(mismatch(&format!("{name} is not that entry of its directory")));
            }
            let data = directory(merkle, &above.children)?;
            node = above.attributes.node(merkle, hex(&above.xattrs)?, NO_LINKS, data);
        }
        let found = merkle.root(self.chunk_size, node);
        if found != *root {
            return Err(mismatch(&format!("it leads to {found}, not to {root}")));
        }
        Ok(())
    }
}

impl Target {
    fn digest(&self, merkle: Merkle, chunk_size: u32, path: &[u8]) -> Result<Digest> {
        if !self.data.fits(self.attributes.mode) {
            return Err(bad("mode and data differ in type"));
        }
        let xattrs = self
            .xattrs
            .iter()
            .map(|x| Ok((decode(&x.name)?, decode(&x.value)?)))
            .collect::<Result<Vec<_>>>()?;
        let links = self.links.iter().map(|link| decode(link)).collect::<Result<Vec<_>>>()?;
        let sorted = xattrs.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && links.windows(2).all(|pair| pair[0] < pair[1]);
        let own = links.is_empty() || links.len() > 1 && links.iter().any(|link| link == path);
        if !sorted || !own || !links.is_empty() && matches!(self.data, Data::Directory { .. }) {
            return Err(bad("xattrs or link names are out of order, or not those of the entry"));
        }
        let data = self.data.digest(merkle, chunk_size)?;
        Ok(self.attributes.node(merkle, merkle.xattrs(&xattrs), merkle.links(&links), data))
    }
}

fn directory(merkle: Merkle, children: &[Child]) -> Result<Digest> {
    let count = u32::try_from(children.len()).map_err(|_| bad("too many children"))?;
    let mut digest = merkle.directory(count);
    let mut last: Option<Vec<u8>> = None;
    for child in children {
        let name = decode(&child.name)?;
        if last.is_some_and(|last| last >= name) {
            return Err(bad("children are out of order"));
        }
        digest.push(&name, hex(&child.node)?);
        last = Some(name);
    }
    Ok(digest.finish())
}

fn bad(why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("proof: {why}"))
}

fn mismatch(why: &str) -> Error {
    Error::new(ErrorKind::Mismatch, format!("proof: {why}"))
}

fn hex(text: &str) -> Result<Digest> {
    Digest::from_hex(text).map_err(|e| bad("digest").with_source(e))
}

/// Bytes outside the graphic ASCII characters, and `%`, as `%XX`.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &b in bytes {
        if b.is_ascii_graphic() && b != b'%' {
            text.push(b.into());
        } else {
            text.push_str(&format!("%{b:02X}"));
        }
    }
    text
}

/// The inverse of [`encode`]; refuses any other spelling, so that one text stands for one
/// string of bytes.
fn decode(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2).ok_or_else(|| bad("percent-encoding"))?;
        rest = tail;
        let byte = std::str::from_utf8(digits).ok().and_then(|d| u8::from_str_radix(d, 16).ok());
        bytes.push(byte.ok_or_else(|| bad("percent-encoding"))?);
    }
    if encode(&bytes) != text {
        return Err(bad("percent-encoding is not canonical"));
    }
    Ok(bytes)
}
