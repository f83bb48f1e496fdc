//! A layer as a source: a tar stream, plain or compressed.
//!
//! One pass over the stream yields the tree of the layer and feeds file data to the pipeline;
//! nothing is staged on disk. Overlay markers (whiteouts) stay ordinary entries of the tree, see
//! [`crate::overlay`].
//!
//! What the archive says is not trusted: paths are normalised and may not leave the tree, nothing
//! is put beneath a symlink or a file, hard links point at what precedes them in the same archive or
//! lies in a layer below,
//! extension headers, sparse maps and the number of entries are bounded, and a stream that is
//! shorter than its headers say is an error. Of several entries with one path the last one stays,
//! as in extraction.

mod fields;
mod member;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

use std::io::{BufReader, Read};

use rafs::format::limits;

use self::member::{Kind, Member, Members};
use crate::layout;
use crate::pipeline::Layer;
use crate::source::decompress::Decompressor;
use crate::source::stargz;
use crate::tree::{Children, Content, Inode, Metadata, Tree, XattrPool, Xattrs, components, shown};
use crate::{Error, Result};

/// Bytes read ahead of the decompressor.
const INPUT_BUFFER: usize = 256 << 10;

/// Bytes of an inode in a bootstrap, without name and data.
const INODE_SIZE: usize = 64;

/// How a tar stream is read.
#[derive(Clone, Copy, Debug)]
pub struct TarOptions {
    /// Entries of one archive, duplicates and implied directories included.
    pub max_entries: u32,
    /// Refuse a stream that ends between two entries, without end marker. Not needed where a
    /// digest vouches for the stream; some layers in registries lack the marker.
    pub require_end: bool,
    /// Leave hard links whose target is not in this archive to [`Tree::resolve_links`]; else they
    /// are refused. Layers may name files of the layers below so.
    pub links_below: bool,
    /// The stream is the tar itself: one that is compressed is damaged.
    pub plain: bool,
    /// Leave out the files that belong to the format of eStargz.
    pub estargz: bool,
}

impl Default for TarOptions {
    fn default() -> Self {
        // 16 Mi entries are ten times the largest images known; at 256 bytes an entry they bound
        // what a hostile layer can make the builder hold.
        Self { max_entries: 1 << 24, require_end: true, links_below: false, plain: false, estargz: false }
    }
}

/// Reads the layer `input` to its end: tar, tar.gz or tar.zst, told by the first bytes. File data
/// goes to `layer`, which the caller finishes, or aborts with the error.
///
/// `name` is what messages call the layer.
///
/// # Errors
/// `Corrupt`: the archive is damaged, cut short or hostile. `Unsupported`, `Limit`: an entry that
/// the format or this build can not take. Otherwise what `input` fails with, or the first error of
/// the build. Messages name layer and entry.
pub fn read_layer(name: &str, input: impl Read, layer: &mut Layer, options: TarOptions) -> Result<Tree> {
    let mut reader = LayerReader {
        layer,
        tree: Tree::new(),
        pool: XattrPool::default(),
        options,
        entries: 0,
        metadata: 0,
        seen: None,
    };
    match reader.read(input) {
        Ok(()) => Ok(reader.tree),
        Err(error) => Err(match reader.seen {
            Some(path) => error.context(format_args!("{name}: after entry {}", shown(&path))),
            None => error.context(name),
        }),
    }
}

struct LayerReader<'a> {
    layer: &'a mut Layer,
    tree: Tree,
    pool: XattrPool,
    options: TarOptions,
    entries: u32,
    /// Bytes that the entries so far take in a bootstrap, at least.
    metadata: u64,
    /// The last entry that was complete, for errors between entries.
    seen: Option<Vec<u8>>,
}

impl LayerReader<'_> {
    fn read(&mut self, input: impl Read) -> Result<()> {
        let input = BufReader::with_capacity(INPUT_BUFFER, input);
        if self.options.plain {
            return self.members(Members::new(input));
        }
        let input = Decompressor::new(input).map_err(|e| Error::io("read the first bytes", e))?;
        self.members(Members::new(input))
    }

    fn members<R: Read>(&mut self, mut members: Members<R>) -> Result<()> {
        while let Some(member) = members.next(self.options.require_end)? {
            self.entries += 1;
            let path = member.path.clone();
            self.bound(&member)
                .and_then(|()| self.entry(member, &mut members))
                .map_err(|e| e.context(format_args!("entry {}", shown(&path))))
                .inspect_err(|_| self.seen = None)?;
            self.seen = Some(path);
        }
        members.drain()
    }

    /// Refuses what no bootstrap can hold before it takes memory: a small archive can decompress to
    /// endless xattrs, link targets, implied parents, or sparse files without data.
    fn bound(&mut self, member: &Member) -> Result<()> {
        let max = self.options.max_entries;
        if self.entries > max || self.tree.inode_count() > max as usize {
            return Err(Error::limit(format!("more than {max} entries, those their paths imply included")));
        }
        let name = member.path.len().min(limits::MAX_NAME_LEN);
        let target = if member.kind == Kind::Symlink { member.link.len() } else { 0 };
        let xattrs: usize = member.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        let chunks = layout::chunk_count(member.size, self.layer.chunk_size());
        let need = chunks.saturating_mul(8).saturating_add((name + target + xattrs + INODE_SIZE) as u64);
        self.metadata = self.metadata.saturating_add(need);
        if self.metadata > limits::MAX_BOOTSTRAP_SIZE {
            return Err(Error::limit(format!(
                "its entries take more than the {} bytes of the largest bootstrap",
                limits::MAX_BOOTSTRAP_SIZE
            )));
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, member: Member, members: &mut Members<R>) -> Result<()> {
        // Refused before any of its data is stored.
        let path = components(&member.path)?.join(&b'/');
        if self.options.estargz && stargz::is_own_file(&path) {
            return Ok(());
        }
        let (major, minor) = member.device;
        let content = match member.kind {
            Kind::HardLink => return self.hard_link(&path, &member.link),
            Kind::Regular => {
                let position = members.position();
                let mut data = members.data();
                let file = match &member.extents {
                    Some(extents) => self.layer.add_sparse_file(&mut data, member.size, extents)?,
                    None => self.layer.add_file_at(&mut data, member.size, position)?,
                };
                Content::Regular { file, size: member.size }
            }
            Kind::Directory => Content::Directory(Children::new()),
            Kind::Symlink => Content::Symlink(member.link.into()),
            Kind::CharDevice => Content::CharDevice { major, minor },
            Kind::BlockDevice => Content::BlockDevice { major, minor },
            Kind::Fifo => Content::Fifo,
        };
        let xattrs = self.pool.intern(Xattrs::new(member.xattrs)?);
        let metadata = Metadata {
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            mtime: member.mtime.0,
            mtime_nsec: member.mtime.1,
            xattrs,
            directory_size: 0,
        };
        self.tree.insert(&path, Inode::new(metadata, content))?;
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let refused = |why: &str| Error::bad_source(format!("hard link to {}, which {why}", shown(target)));
        let inside = components(target).map_err(|e| e.context("hard link"))?.join(&b'/');
        let Some(id) = self.tree.lookup(&inside) else {
            if self.options.links_below {
                return self.tree.link_below(path, &inside);
            }
            return Err(refused("does not precede it in this layer"));
        };
        if let Some(target) = self.tree.open_link(id) {
            let target = target.to_vec();
            return self.tree.link_below(path, &target);
        }
        let inode = self.tree.inode(id);
        if inode.is_dir() {
            return Err(refused("is a directory"));
        }
        if inode.is_regular() {
            return self.tree.link(path, id);
        }
        // Only regular files keep several names (rafs-v6 section 4.5); of anything else the
        // second name is an inode of its own.
        let copy = inode.clone();
        self.tree.insert(path, copy)?;
        Ok(())
    }
}
