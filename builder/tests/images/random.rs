//! Random trees: written, checked, read back, compared. Whatever the tree, the bootstrap is
//! clean and holds exactly that tree.

use builder::bootstrap_v5;
use builder::bootstrap_writer::{self, Bootstrap, Image, padded_id};
use builder::compare::{CompareOptions, Side, compare};
use builder::content::{ChunkId, ChunkRow, ChunkSource};
use builder::load::LoadedChunks;
use builder::root::{RootOptions, image_root};
use builder::tree::{Children, Content, FileId, Inode, LayerIndex, Metadata, Tree, Xattr, Xattrs};
use rafs::bootstrap::OpenOptions;
use rafs::format::blob_table::{BlobRecord, compression, digest};
use rafs::format::features::{BlobFeatures, ChunkFlags};
use storage::codec::Codec;
use storage::digest::{Digest, DigestAlgorithm};
use zerocopy::FromZeros as _;
use zerocopy::byteorder::little_endian::{U32, U64};

const CHUNK_SIZE: u32 = 0x1000;
const BLOBS: u32 = 3;

/// Numbers from a seed (splitmix64).
pub struct Dice(u64);

impl Dice {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 0 to `below` - 1.
    pub fn roll(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 32) as u32 % below
    }

    /// Mostly small, sometimes up to `max`.
    fn len(&mut self, max: u32) -> usize {
        let top = if self.roll(8) == 0 { max } else { max.min(24) };
        self.roll(top) as usize + 1
    }

    fn bytes(&mut self, len: usize, allowed: fn(u8) -> bool) -> Box<[u8]> {
        let mut byte = || loop {
            let byte = self.roll(256) as u8;
            if allowed(byte) {
                return byte;
            }
        };
        (0..len).map(|_| byte()).collect()
    }
}

/// Chunks without data: rows are all a bootstrap needs.
#[derive(Default)]
struct Rows {
    rows: Vec<ChunkRow>,
    files: Vec<Vec<ChunkId>>,
    ends: [(u32, u64, u64); BLOBS as usize],
}

impl ChunkSource for Rows {
    fn file_chunks(&self, file: FileId) -> &[ChunkId] {
        &self.files[file.index as usize]
    }

    fn row(&self, id: ChunkId) -> ChunkRow {
        self.rows[id.0 as usize]
    }

    fn chunk_count(&self) -> usize {
        self.rows.len()
    }
}

impl Rows {
    /// A chunk of `len` bytes: new, or one of that length from before.
    fn chunk(&mut self, dice: &mut Dice, len: u32) -> ChunkId {
        let known = self.rows.iter().rposition(|row| row.uncompressed_size == len);
        if let Some(known) = known.filter(|_| dice.roll(4) == 0) {
            return ChunkId(known as u32);
        }
        let blob = dice.roll(BLOBS);
        let (index, stored, decoded) = &mut self.ends[blob as usize];
        let compressed_size = if len > 1 && dice.roll(2) == 0 { len - 1 } else { len };
        let id = ChunkId(self.rows.len() as u32);
        let flags = if compressed_size < len { ChunkFlags::COMPRESSED } else { ChunkFlags::empty() };
        self.rows.push(ChunkRow {
            digest: DigestAlgorithm::Blake3.digest(&id.0.to_le_bytes()),
            blob,
            index: *index,
            flags: (flags | ChunkFlags::HAS_CRC32).bits(),
            compressed_offset: *stored,
            compressed_size,
            uncompressed_size: len,
            uncompressed_offset: *decoded,
            crc32: id.0 + 1,
        });
        *index += 1;
        *stored += u64::from(compressed_size);
        *decoded += u64::from(len).next_multiple_of(4096);
        id
    }

    fn file(&mut self, dice: &mut Dice) -> Content {
        let size = if dice.roll(5) == 0 { 0 } else { dice.len(40_000) as u64 };
        let sizes =
            (0..size).step_by(CHUNK_SIZE as usize).map(|at| (size - at).min(CHUNK_SIZE.into()) as u32);
        let chunks = sizes.map(|len| self.chunk(dice, len)).collect();
        self.files.push(chunks);
        let file = FileId { layer: LayerIndex(0), index: self.files.len() as u32 - 1 };
        Content::Regular { file, size }
    }

    fn records(&self) -> Vec<BlobRecord> {
        let record = |(n, &(count, stored, decoded)): (usize, &(u32, u64, u64))| {
            let mut record = BlobRecord::new_zeroed();
            record.blob_id = padded_id(&Digest([n as u8; 32]).to_string());
            record.chunk_size = U32::new(CHUNK_SIZE);
            record.chunk_count = U32::new(count);
            record.compression_algo = U32::new(compression::ZSTD);
            record.digest_algo = U32::new(digest::BLAKE3);
            record.features = U32::new((BlobFeatures::ALIGNED | BlobFeatures::CAP_TAR_TOC).bits());
            record.compressed_size = U64::new(stored + u64::from(count) * 16 + 4096);
            record.uncompressed_size = U64::new(decoded);
            record.ci_offset = U64::new(stored);
            record.ci_compressed_size = U64::new(u64::from(count) * 16);
            record.ci_uncompressed_size = U64::new(u64::from(count) * 16);
            record
        };
        self.ends.iter().enumerate().map(record).collect()
    }
}

fn metadata(dice: &mut Dice) -> Metadata {
    let mut xattrs = Vec::new();
    for _ in 0..dice.roll(4) {
        let prefix = [&b"user."[..], b"trusted.", b"security."][dice.roll(3) as usize];
        let suffix = dice.bytes(2, |b| b != 0);
        let top = if dice.roll(20) == 0 { 5000 } else { 40 };
        let len = dice.roll(top) as usize;
        xattrs.push(Xattr { name: [prefix, &suffix].concat().into(), value: dice.bytes(len, |_| true) });
    }
    Metadata {
        mode: dice.roll(0o10000),
        uid: [0, 1000, u32::MAX - 1][dice.roll(3) as usize],
        gid: dice.roll(u32::MAX),
        mtime: [0, -1, i64::from(u32::MAX) + 5, -9_000_000_000][dice.roll(4) as usize],
        mtime_nsec: dice.roll(1_000_000_000),
        xattrs: Xattrs::new(xattrs).unwrap(),
        directory_size: 0,
    }
}

fn tree(dice: &mut Dice, rows: &mut Rows) -> Tree {
    let mut tree = Tree::new();
    let (mut directories, mut files) = (vec![Vec::new()], Vec::new());
    let root = Inode::new(metadata(dice), Content::Directory(Children::new()));
    tree.insert(b"", root).unwrap();
    for _ in 0..dice.len(1500) {
        let parent: &Vec<u8> = &directories[dice.roll(directories.len() as u32) as usize];
        let len = dice.len(255);
        let name = dice.bytes(len, |b| b != 0 && b != b'/');
        if matches!(&*name, b"." | b"..") {
            continue;
        }
        let path = [parent, &b"/"[..], &name].concat();
        if tree.lookup(&path).is_some() {
            continue;
        }
        let (major, minor) = (dice.roll(4096), dice.roll(1 << 20));
        let content = match dice.roll(10) {
            0 | 1 => Content::Directory(Children::new()),
            2 => {
                let len = dice.len(4096);
                Content::Symlink(dice.bytes(len, |b| b != 0).into())
            }
            3 => match dice.roll(4) {
                0 => Content::CharDevice { major, minor },
                1 => Content::BlockDevice { major, minor },
                2 => Content::Fifo,
                _ => Content::Socket,
            },
            4 if !files.is_empty() => {
                let target = files[dice.roll(files.len() as u32) as usize];
                tree.link(&path, target).unwrap();
                continue;
            }
            _ => rows.file(dice),
        };
        let inode = Inode::new(metadata(dice), content);
        let (is_dir, is_file) = (inode.is_dir(), inode.is_regular());
        let id = tree.insert(&path, inode).unwrap();
        if is_dir {
            directories.push(path);
        } else if is_file {
            files.push(id);
        }
    }
    tree
}

#[test]
fn any_tree_survives_its_bootstrap() {
    survives(bootstrap_writer::write);
}

#[test]
fn any_tree_survives_its_v5_bootstrap() {
    survives(bootstrap_v5::write);
}

fn survives(write: fn(&Image<'_>) -> builder::Result<Bootstrap>) {
    for seed in 0..60 {
        let mut dice = Dice::new(seed);
        let mut rows = Rows::default();
        let tree = tree(&mut dice, &mut rows);
        let blobs = rows.records();
        let image = Image {
            tree: &tree,
            chunks: &rows,
            blobs: &blobs,
            chunk_size: CHUNK_SIZE,
            codec: Codec::Zstd,
            digester: DigestAlgorithm::Blake3,
            explicit_ids: true,
            tarfs: false,
            kept: &[],
            force_xattr_flag: false,
            prefetch: &[tree.root()],
            prefetch_sizes: &[],
        };
        let written = write(&image).unwrap();
        assert!(written.bytes == write(&image).unwrap().bytes);

        let options = OpenOptions::default();
        let report = rafs::check::structure(written.bytes.clone(), &options).unwrap();
        assert!(report.is_clean(), "seed {seed}: {:?}", report.faults);
        let opened = rafs::bootstrap::from_bytes(written.bytes, &options).unwrap();
        let mut chunks = LoadedChunks::default();
        let records: Vec<_> = opened.blobs().iter().map(|b| b.record).collect();
        let read = chunks.load(&*opened, &records).unwrap();
        let options = CompareOptions { chunk_size: CHUNK_SIZE, limit: 5, ignore_root_mtime: false };
        let source = Side { tree: &tree, chunks: &rows };
        let found = compare(source, Side { tree: &read, chunks: &chunks }, options);
        assert_eq!(found.count, 0, "seed {seed}: {:?}", found.first);
        assert_eq!(found.entries, written.entry_count);

        let options =
            RootOptions { digester: DigestAlgorithm::Blake3, chunk_size: CHUNK_SIZE, explicit_ids: true };
        let root = image_root(&tree, &rows, options).unwrap();
        assert_eq!(root, rafs::merkle::image_root(&*opened).unwrap());
    }
}

#[test]
fn limits_are_clear_errors() {
    let (mut dice, mut rows) = (Dice::new(0), Rows::default());
    let mut tree = Tree::new();
    let mut blobs = Vec::new();
    let record = rows.records()[0];
    for n in 0..255u32 {
        let id = ChunkId(n);
        rows.chunk(&mut dice, 1 + n);
        rows.rows[n as usize].blob = n;
        rows.files.push(vec![id]);
        let file = FileId { layer: LayerIndex(0), index: n };
        let content = Content::Regular { file, size: u64::from(1 + n) };
        tree.insert(format!("{n}").as_bytes(), Inode::new(Metadata::implied_directory(), content)).unwrap();
        blobs.push(record);
    }
    let mut image = Image {
        tree: &tree,
        chunks: &rows,
        blobs: &blobs,
        chunk_size: CHUNK_SIZE,
        codec: Codec::Zstd,
        digester: DigestAlgorithm::Blake3,
        explicit_ids: true,
        tarfs: false,
        kept: &[],
        force_xattr_flag: false,
        prefetch: &[],
        prefetch_sizes: &[],
    };
    let error = bootstrap_writer::write(&image).unwrap_err();
    assert_eq!(error.kind(), builder::ErrorKind::Limit);
    assert!(error.to_string().contains("254 blobs"), "{error}");
    image.chunk_size = 0x200_0000;
    image.blobs = &[];
    assert_eq!(bootstrap_writer::write(&image).unwrap_err().kind(), builder::ErrorKind::Corrupt);
}
