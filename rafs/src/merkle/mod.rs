//! The image root digest: one value that commits to the whole tree, data and metadata.
//!
//! ```text
//! root ◀─ node of / ◀─ directory ◀─ (name, node) of every child
//!             │                              │
//!             └ mode, owner, mtime, xattrs,  └─ node ◀─ file: size and chunk digests,
//!               names of the hard-link group            or link target, device, …
//! ```
//!
//! The encoding is FORMAT.md's, exactly. It is canonical: children, xattrs and link names
//! are sorted by their bytes. It is domain-separated: every input starts with a tag of
//! its own. It depends on digester and chunk size, and on nothing else of how an image is
//! built. [`Merkle`] holds the functions over plain values that both the builder, while
//! it streams, and [`image_root`] use.

mod proof;
mod root;

use smallvec::SmallVec;
use storage::digest::{Digest, DigestAlgorithm, Hasher, TaggedDigest};

use crate::bootstrap::digester_code;

pub use proof::Proof;
pub use root::{image_root, prove};

/// What `links` is for an inode with one name.
pub const NO_LINKS: Digest = Digest([0; 32]);

/// The digest functions of the tree under one algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merkle(pub DigestAlgorithm);

/// What the digest of an inode covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFields {
    /// `st_mode` with type bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// 0 to 999,999,999.
    pub mtime_nsec: u32,
    /// [`Merkle::xattrs`].
    pub xattrs: Digest,
    /// [`Merkle::links`].
    pub links: Digest,
    /// One of [`Merkle::file`], [`Merkle::symlink`], [`Merkle::device`], [`Merkle::special`],
    /// [`Merkle::directory`].
    pub data: Digest,
}

impl Merkle {
    /// Digest of all xattrs of an inode, given sorted by full name.
    pub fn xattrs<N: AsRef<[u8]>, V: AsRef<[u8]>>(self, sorted: &[(N, V)]) -> Digest {
        let mut hasher = self.tagged(b"rafs-xattrs-v1\0");
        count(&mut hasher, sorted.len());
        for (name, value) in sorted {
            bytes(&mut hasher, name.as_ref());
            bytes(&mut hasher, value.as_ref());
        }
        hasher.finish()
    }

    /// Digest of the names of an inode that is not a directory, given sorted by their bytes:
    /// paths without leading slash. Fewer than two names are [`NO_LINKS`].
    pub fn links<P: AsRef<[u8]>>(self, sorted: &[P]) -> Digest {
        if sorted.len() < 2 {
            return NO_LINKS;
        }
        let mut hasher = self.tagged(b"rafs-links-v1\0");
        count(&mut hasher, sorted.len());
        for path in sorted {
            bytes(&mut hasher, path.as_ref());
        }
        hasher.finish()
    }

    /// Digest of a regular file's data: its size and the digests of its chunks in file order.
    pub fn file(self, size: u64, chunks: impl ExactSizeIterator<Item = Digest>) -> Digest {
        let mut hasher = self.tagged(b"rafs-file-v1\0");
        hasher.update(&size.to_le_bytes());
        count(&mut hasher, chunks.len());
        chunks.for_each(|chunk| hasher.update(chunk.as_bytes()));
        hasher.finish()
    }

    /// Digest of a symlink's target.
    pub fn symlink(self, target: &[u8]) -> Digest {
        let mut hasher = self.tagged(b"rafs-symlink-v1\0");
        hasher.update(target);
        hasher.finish()
    }

    /// Digest of a character or block device's number.
    pub fn device(self, major: u32, minor: u32) -> Digest {
        let mut hasher = self.tagged(b"rafs-device-v1\0");
        hasher.update(&major.to_le_bytes());
        hasher.update(&minor.to_le_bytes());
        hasher.finish()
    }

    /// Digest of a fifo's or socket's absent data.
    pub fn special(self) -> Digest {
        self.tagged(b"rafs-special-v1\0").finish()
    }

    /// Starts the digest of a directory of `children` entries.
    pub fn directory(self, children: u32) -> DirectoryDigest {
        let mut hasher = self.tagged(b"rafs-directory-v1\0");
        hasher.update(&children.to_le_bytes());
        DirectoryDigest(hasher)
    }

    /// Digest of an inode: its metadata and the digest of its data.
    pub fn node(self, fields: &NodeFields) -> Digest {
        let mut hasher = self.tagged(b"rafs-node-v1\0");
        hasher.update(&fields.mode.to_le_bytes());
        hasher.update(&fields.uid.to_le_bytes());
        hasher.update(&fields.gid.to_le_bytes());
        hasher.update(&fields.mtime.to_le_bytes());
        hasher.update(&fields.mtime_nsec.to_le_bytes());
        for digest in [fields.xattrs, fields.links, fields.data] {
            hasher.update(digest.as_bytes());
        }
        hasher.finish()
    }

    /// The image root digest over the node of the root directory.
    pub fn root(self, chunk_size: u32, node: Digest) -> TaggedDigest {
        let mut hasher = self.tagged(b"rafs-image-v1\0");
        hasher.update(&digester_code(self.0).to_le_bytes());
        hasher.update(&chunk_size.to_le_bytes());
        hasher.update(node.as_bytes());
        TaggedDigest { algorithm: self.0, digest: hasher.finish() }
    }

    fn tagged(self, tag: &[u8]) -> Input {
        let mut input = Input { algorithm: self.0, start: SmallVec::new(), hasher: None };
        input.update(tag);
        input
    }
}

/// The input of one digest. Nearly all are short: they are gathered and hashed in one call,
/// which is several times faster than a running hasher.
struct Input {
    algorithm: DigestAlgorithm,
    /// Room for a node, and for a file of a few chunks.
    start: SmallVec<[u8; 192]>,
    hasher: Option<Hasher>,
}

impl Input {
    /// One BLAKE3 chunk.
    const GATHER: usize = 1024;

    fn update(&mut self, data: &[u8]) {
        match &mut self.hasher {
            Some(hasher) => hasher.update(data),
            None if self.start.len() + data.len() <= Self::GATHER => self.start.extend_from_slice(data),
            None => {
                let mut hasher = self.algorithm.hasher();
                hasher.update(&self.start);
                hasher.update(data);
                self.start = SmallVec::new();
                self.hasher = Some(hasher);
            }
        }
    }

    fn finish(self) -> Digest {
        match self.hasher {
            Some(hasher) => hasher.finish(),
            None => self.algorithm.digest(&self.start),
        }
    }
}

/// The digest of a directory, growing child by child.
pub struct DirectoryDigest(Input);

impl DirectoryDigest {
    /// Adds the next child in byte order of names.
    pub fn push(&mut self, name: &[u8], node: Digest) {
        bytes(&mut self.0, name);
        self.0.update(node.as_bytes());
    }

    /// The digest, once as many children as announced were pushed.
    pub fn finish(self) -> Digest {
        self.0.finish()
    }
}

/// A count; no list of an image reaches 2^32 (names, xattrs and chunks are bounded far below).
fn count(hasher: &mut Input, n: usize) {
    hasher.update(&(n as u32).to_le_bytes());
}

fn bytes(hasher: &mut Input, bytes: &[u8]) {
    count(hasher, bytes.len());
    hasher.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_encoding() {
        let merkle = Merkle(DigestAlgorithm::Sha256);
        let direct = |input: &[u8]| DigestAlgorithm::Sha256.digest(input);
        assert_eq!(merkle.special(), direct(b"rafs-special-v1\0"));
        assert_eq!(merkle.symlink(b"a/b"), direct(b"rafs-symlink-v1\0a/b"));
        assert_eq!(merkle.device(8, 1), direct(b"rafs-device-v1\0\x08\0\0\0\x01\0\0\0"));
        assert_eq!(
            merkle.xattrs(&[(b"user.a", b"xy")]),
            direct(b"rafs-xattrs-v1\0\x01\0\0\0\x06\0\0\0user.a\x02\0\0\0xy")
        );
        assert_eq!(merkle.links(&["only"]), NO_LINKS);
        assert_eq!(merkle.links(&["a", "b/c"]), direct(b"rafs-links-v1\0\x02\0\0\0\x01\0\0\0a\x03\0\0\0b/c"));
        assert_eq!(
            merkle.file(5, [Digest([7; 32])].into_iter()),
            direct(&[b"rafs-file-v1\0\x05\0\0\0\0\0\0\0\x01\0\0\0".as_slice(), &[7; 32]].concat())
        );
        let mut directory = merkle.directory(1);
        directory.push(b"x", Digest([9; 32]));
        let data = directory.finish();
        assert_eq!(
            data,
            direct(&[b"rafs-directory-v1\0\x01\0\0\0\x01\0\0\0x".as_slice(), &[9; 32]].concat())
        );
        // Long inputs take the other path of `Input`.
        let chunks = vec![Digest([7; 32]); 100];
        let long = [&b"rafs-file-v1\0\x05\0\0\0\0\0\0\0\x64\0\0\0"[..], &[7; 3200]].concat();
        assert_eq!(merkle.file(5, chunks.into_iter()), direct(&long));
        let fields = NodeFields {
            mode: 0o40755,
            uid: 1,
            gid: 2,
            mtime: -1,
            mtime_nsec: 3,
            xattrs: Digest([4; 32]),
            links: NO_LINKS,
            data,
        };
        let node = merkle.node(&fields);
        let mut input = b"rafs-node-v1\0".to_vec();
        input
            .extend_from_slice(b"\xed\x41\0\0\x01\0\0\0\x02\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\x03\0\0\0");
        for digest in [[4; 32], [0; 32], data.0] {
            input.extend_from_slice(&digest);
        }
        assert_eq!(node, direct(&input));
        assert_eq!(
            merkle.root(0x1000, node).digest,
            direct(&[b"rafs-image-v1\0\x01\0\0\0\0\x10\0\0".as_slice(), &node.0].concat())
        );
    }
}
