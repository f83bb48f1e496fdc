//! A bootstrap read back into a tree and chunks, to be merged or compared.

use std::collections::HashMap;
use std::ops::ControlFlow;

use rafs::bootstrap::{Attr, Bootstrap, FileType, Nid};
use rafs::format::blob_table::BlobRecord;
use rafs::format::limits::MAX_DEPTH;

use crate::content::{ChunkId, ChunkRow, ChunkSource};
use crate::id_table::IdTable;
use crate::tree::{
    Children, Content, FileId, Inode, InodeId, LayerIndex, Metadata, Tree, Xattr, XattrPool, Xattrs, shown,
};
use crate::{Error, ErrorKind, Result};

/// Chunks and blobs of loaded bootstraps; equal blobs of several bootstraps are one.
#[derive(Default)]
pub struct LoadedChunks {
    /// Blob records by place, their names already final.
    pub blobs: Vec<BlobRecord>,
    by_id: HashMap<[u8; 64], u32>,
    rows: Vec<ChunkRow>,
    /// Rows by blob and number there, as they were loaded.
    by_place: IdTable,
    /// Per layer: where each file's chunks start in `refs`.
    files: Vec<Vec<usize>>,
    refs: Vec<ChunkId>,
}

impl ChunkSource for LoadedChunks {
    fn file_chunks(&self, file: FileId) -> &[ChunkId] {
        let starts = &self.files[usize::from(file.layer.0)];
        let start = starts[file.index as usize];
        // The files of a layer are loaded in one go, so the next start ends this one.
        &self.refs[start..starts[file.index as usize + 1]]
    }

    fn row(&self, id: ChunkId) -> ChunkRow {
        self.rows[id.0 as usize]
    }

    fn chunk_count(&self) -> usize {
        self.rows.len()
    }
}

impl LoadedChunks {
    /// Reads `bootstrap` as the next layer; `records` are its blobs under their final names.
    ///
    /// # Errors
    /// `Corrupt`: the bootstrap is broken in a way its door check can not see, or a chunk has
    /// no record. `Limit`: too many layers or blobs.
    pub fn load(&mut self, bootstrap: &dyn Bootstrap, records: &[BlobRecord]) -> Result<Tree> {
        Ok(self.load_image(bootstrap, records)?.0)
    }

    /// As [`Self::load`], and the inodes of the bootstrap's prefetch table in its order, each once;
    /// entries that name no inode are left out.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_image(
        &mut self,
        bootstrap: &dyn Bootstrap,
        records: &[BlobRecord],
    ) -> Result<(Tree, Vec<InodeId>)> {
        let layer =
            u16::try_from(self.files.len()).map_err(|_| Error::limit("more than 65536 bootstraps"))?;
        let blobs = records.iter().map(|record| self.blob(record)).collect();
        self.files.push(Vec::new());
        let mut loader = Loader {
            bootstrap,
            chunks: self,
            blobs,
            layer: LayerIndex(layer),
            tree: Tree::new(),
            links: HashMap::new(),
            prefetch: bootstrap.prefetch().into_iter().map(|nid| (nid, None)).collect(),
            pool: XattrPool::default(),
        };
        loader.run()?;
        let Loader { tree, mut prefetch, .. } = loader;
        let end = self.refs.len();
        self.files[usize::from(layer)].push(end);
        let named = bootstrap.prefetch().iter().filter_map(|nid| prefetch.remove(nid).flatten()).collect();
        Ok((tree, named))
    }

    /// Chunks of the files of a layer, one file behind the other, equal ones repeated.
    pub(crate) fn layer_chunks(&self, layer: LayerIndex) -> &[ChunkId] {
        let starts = &self.files[usize::from(layer.0)];
        match (starts.first(), starts.last()) {
            (Some(&first), Some(&end)) => &self.refs[first..end],
            _ => &[],
        }
    }

    /// Lets all files use `instead[id]` in place of chunk `id`.
    pub(crate) fn replace(&mut self, instead: &[ChunkId]) {
        self.refs.iter_mut().for_each(|id| *id = instead[id.0 as usize]);
    }

    /// Says that chunk `id` lies elsewhere now.
    pub(crate) fn place(&mut self, id: ChunkId, row: ChunkRow) {
        self.rows[id.0 as usize] = row;
    }

    /// The place of a blob: of several layers that know it, the lowest describes it.
    fn blob(&mut self, record: &BlobRecord) -> u32 {
        let next = self.blobs.len() as u32;
        let place = *self.by_id.entry(record.blob_id).or_insert(next);
        if place == next {
            self.blobs.push(*record);
        }
        place
    }
}

struct Loader<'a> {
    bootstrap: &'a dyn Bootstrap,
    chunks: &'a mut LoadedChunks,
    /// Row of the bootstrap's blob table → place in `chunks.blobs`.
    blobs: Vec<u32>,
    layer: LayerIndex,
    tree: Tree,
    /// Everything but directories, whatever link count it states: an inode is read once, so that
    /// many names of a large one cost no more than their entries.
    links: HashMap<Nid, InodeId>,
    /// What is looked for, and what it has become.
    prefetch: HashMap<Nid, Option<InodeId>>,
    pool: XattrPool,
}

impl Loader<'_> {
    fn run(&mut self) -> Result<()> {
        let root = self.bootstrap.root();
        let attr = self.bootstrap.attr(root)?;
        let metadata = self.metadata(&attr)?;
        *self.tree.inode_mut(self.tree.root()) = Inode::new(metadata, Content::Directory(Children::new()));
        self.found(root, self.tree.root());
        let mut stack = vec![(root, self.tree.root(), 0)];
        while let Some((nid, dir, depth)) = stack.pop() {
            if depth > MAX_DEPTH {
                return Err(Error::limit(format!("directories nested deeper than {MAX_DEPTH}")));
            }
            let mut entries = Vec::new();
            self.bootstrap.children(nid, 0, &mut |entry| {
                entries.push((Box::<[u8]>::from(entry.name), entry.nid));
                ControlFlow::Continue(())
            })?;
            for (name, nid) in entries {
                let id = self.inode(nid).map_err(|e| e.context(shown(&name)))?;
                if self.tree.inode(id).is_dir() {
                    stack.push((nid, id, depth + 1));
                }
                self.tree.set_child(dir, &name, id);
            }
        }
        Ok(())
    }

    fn inode(&mut self, nid: Nid) -> Result<InodeId> {
        if let Some(&id) = self.links.get(&nid) {
            let known = self.tree.inode(id);
            if known.is_regular() {
                return Ok(id);
            }
            // Only regular files have several names here (rafs-v6 section 4.5).
            let copy = known.clone();
            return self.tree.add(copy);
        }
        let attr = self.bootstrap.attr(nid)?;
        let metadata = self.metadata(&attr)?;
        let (major, minor) = (attr.rdev >> 8 & 0xfff, attr.rdev & 0xff | attr.rdev >> 12 & 0xf_ff00);
        let content = match attr.file_type {
            FileType::Directory => Content::Directory(Children::new()),
            FileType::Regular => Content::Regular { file: self.file(&attr)?, size: attr.size },
            FileType::Symlink => Content::Symlink(self.bootstrap.read_link(nid)?.into()),
            FileType::CharDevice => Content::CharDevice { major, minor },
            FileType::BlockDevice => Content::BlockDevice { major, minor },
            FileType::Fifo => Content::Fifo,
            FileType::Socket => Content::Socket,
        };
        let id = self.tree.add(Inode::new(metadata, content))?;
        if attr.file_type != FileType::Directory {
            self.links.insert(nid, id);
        }
        self.found(nid, id);
        Ok(id)
    }

    fn found(&mut self, nid: Nid, id: InodeId) {
        if let Some(place) = self.prefetch.get_mut(&nid) {
            *place = Some(id);
        }
    }

    fn metadata(&mut self, attr: &Attr) -> Result<Metadata> {
        let mut list = Vec::new();
        self.bootstrap.xattrs(attr.nid, &mut |x| {
            list.push(Xattr { name: [x.prefix, x.suffix].concat().into(), value: x.value.into() });
            ControlFlow::Continue(())
        })?;
        Ok(Metadata {
            mode: attr.mode & 0o7777,
            uid: attr.uid,
            gid: attr.gid,
            mtime_nsec: attr.mtime_nsec,
            mtime: attr.mtime,
            xattrs: self.pool.intern(Xattrs::new(list)?),
            directory_size: match attr.file_type {
                FileType::Directory if self.bootstrap.summary().fs_version == 5 => attr.size,
                _ => 0,
            },
        })
    }

    fn file(&mut self, attr: &Attr) -> Result<FileId> {
        let starts = &mut self.chunks.files[usize::from(self.layer.0)];
        let file = FileId { layer: self.layer, index: starts.len() as u32 };
        starts.push(self.chunks.refs.len());
        let count = attr.size.div_ceil(u64::from(self.bootstrap.summary().chunk_size));
        let count =
            u32::try_from(count).map_err(|_| Error::limit(format!("a file of {} bytes", attr.size)))?;
        for position in 0..count {
            let chunk = self.bootstrap.chunk(attr.nid, position)?;
            let blob = self.blobs.get(chunk.blob as usize).copied().ok_or_else(|| {
                Error::bad_source(format!("a chunk names blob {}, which the bootstrap has not", chunk.blob))
            })?;
            let id = self.chunk(blob, &chunk)?;
            self.chunks.refs.push(id);
        }
        Ok(file)
    }

    fn chunk(&mut self, blob: u32, chunk: &rafs::bootstrap::ChunkRef) -> Result<ChunkId> {
        let record = self.bootstrap.chunk_info(chunk.blob, chunk.index).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "chunk {} of blob {} has no chunk-info record: images without chunk digests can be neither merged nor \
                     rewritten",
                    chunk.index, chunk.blob
                ),
            )
        })?;
        let rows = &self.chunks.rows;
        let place = (blob, chunk.index.0);
        let of = |id: ChunkId| (rows[id.0 as usize].blob, rows[id.0 as usize].index);
        if let Some(id) = self.chunks.by_place.find(&place, of) {
            let known = &rows[id.0 as usize];
            let same = known.digest.0 == record.digest
                && known.uncompressed_size == record.uncompressed_size.get()
                && known.uncompressed_offset == record.uncompressed_offset.get();
            if !same {
                return Err(Error::bad_source(format!(
                    "chunk {} of blob {} is another one than a lower bootstrap says; one of the two is not of this blob",
                    chunk.index,
                    crate::merge::shown_id(&self.chunks.blobs[blob as usize])
                )));
            }
            return Ok(id);
        }
        let id = ChunkId(u32::try_from(rows.len()).map_err(|_| Error::limit("more than 2^32 chunks"))?);
        self.chunks.by_place.insert(&place, id, of);
        self.chunks.rows.push(ChunkRow {
            digest: storage::digest::Digest(record.digest),
            blob,
            index: chunk.index.0,
            flags: record.flags.get(),
            compressed_offset: record.compressed_offset.get(),
            compressed_size: record.compressed_size.get(),
            uncompressed_size: record.uncompressed_size.get(),
            uncompressed_offset: record.uncompressed_offset.get(),
            crc32: record.crc32.get(),
        });
        Ok(id)
    }
}
