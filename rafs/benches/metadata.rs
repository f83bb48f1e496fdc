//! Opening and asking a bootstrap of the size of a language runtime's image: 200 directories
//! of 140 files, 28,201 entries, one chunk a file.

use std::hint::black_box;
use std::ops::ControlFlow;

use criterion::{Criterion, criterion_group, criterion_main};
use rafs::bootstrap::{Bootstrap, OpenOptions, from_bytes};
use rafs::format::blob_table::{BlobRecord, compression};
use rafs::format::chunk::ChunkInfo;
use rafs::format::dirent::{Dirent, FT_DIRECTORY, FT_REGULAR};
use rafs::format::features::{BlobFeatures, ImageFlags};
use rafs::format::inode::{
    CHUNK_FORMAT_INDEXES, ChunkIndexRecord, ExtendedInode, LAYOUT_CHUNK_BASED, LAYOUT_FLAT_PLAIN,
    extended_format,
};
use rafs::format::superblock::{
    COMPAT_RAFS_V6, DEVICE_TABLE_OFFSET, DEVT_SLOTOFF, DeviceSlot, EROFS_MAGIC, EXT_SUPERBLOCK_OFFSET,
    ExtSuperblock, INCOMPAT, SUPERBLOCK_OFFSET, Superblock,
};
use rafs::merkle::image_root;
use zerocopy::{FromZeros, Immutable, IntoBytes};

const DIRS: u32 = 200;
const FILES: u32 = 140;
const CHUNKS: u32 = DIRS * FILES;
const BLOCK: usize = 4096;
const META: usize = 2 * BLOCK;
/// A file: inode and one chunk index, rounded up to slots of 32.
const FILE_STRIDE: usize = 96;
const ROOT_NID: u64 = 128;

fn put<T: IntoBytes + Immutable>(bytes: &mut Vec<u8>, at: usize, value: &T) {
    let end = at + size_of::<T>();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(value.as_bytes());
}

/// Directory blocks of entries that are sorted already.
fn blocks(entries: &[(String, u64, u8)]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = rest.iter().take_while(|(name, _, _)| {
            used += size_of::<Dirent>() + name.len();
            used <= BLOCK
        });
        let (block, tail) = rest.split_at(fits.count());
        let start = data.len().next_multiple_of(BLOCK);
        data.resize(start, 0);
        let mut nameoff = size_of_val(block) / size_of::<(String, u64, u8)>() * size_of::<Dirent>();
        for (i, (name, nid, file_type)) in block.iter().enumerate() {
            let mut dirent = Dirent::new_zeroed();
            dirent.nid.set(*nid);
            dirent.nameoff.set(nameoff as u16);
            dirent.file_type = *file_type;
            put(&mut data, start + i * size_of::<Dirent>(), &dirent);
            nameoff += name.len();
        }
        block.iter().for_each(|(name, _, _)| data.extend_from_slice(name.as_bytes()));
        rest = tail;
    }
    data
}

fn inode(layout: u16, mode: u16, size: u64, i_u: u32, nlink: u32) -> ExtendedInode {
    let mut inode = ExtendedInode::new_zeroed();
    inode.i_format.set(extended_format(layout));
    inode.i_mode.set(mode);
    inode.i_size.set(size);
    inode.i_u.set(i_u);
    inode.i_nlink.set(nlink);
    inode
}

fn directory(bytes: &mut Vec<u8>, at: usize, children: Vec<(String, u64, u8)>, nid: u64, parent: u64) {
    let mut entries = vec![(".".to_owned(), nid, FT_DIRECTORY), ("..".to_owned(), parent, FT_DIRECTORY)];
    let nlink = 2 + children.iter().filter(|c| c.2 == FT_DIRECTORY).count() as u32;
    entries.extend(children);
    entries.sort();
    let data = blocks(&entries);
    let place = bytes.len().next_multiple_of(BLOCK);
    bytes.resize(place, 0);
    bytes.extend_from_slice(&data);
    let raw = inode(LAYOUT_FLAT_PLAIN, 0o40755, data.len() as u64, (place / BLOCK) as u32, nlink);
    put(bytes, at, &raw);
}

fn image() -> Vec<u8> {
    let nid_of = |at: usize| ((at - META) / 32) as u64;
    let root_at = META + BLOCK;
    let dir_at = |dir: u32| root_at + 64 + dir as usize * 64;
    let file_at = |number: u32| dir_at(DIRS).next_multiple_of(32) + number as usize * FILE_STRIDE;
    let mut bytes = vec![0; file_at(CHUNKS)];
    for number in 0..CHUNKS {
        put(
            &mut bytes,
            file_at(number),
            &inode(LAYOUT_CHUNK_BASED, 0o100_644, 4000, CHUNK_FORMAT_INDEXES.into(), 1),
        );
        let mut index = ChunkIndexRecord::new_zeroed();
        index.index_low.set(number as u16);
        index.index_high = (number >> 16) as u8;
        index.device_id = 1;
        index.blkaddr.set(number);
        put(&mut bytes, file_at(number) + 64, &index);
    }
    let mut dirs = Vec::new();
    for dir in 0..DIRS {
        let files = (0..FILES)
            .map(|f| (format!("some-file-{f:04}.js"), nid_of(file_at(dir * FILES + f)), FT_REGULAR))
            .collect();
        directory(&mut bytes, dir_at(dir), files, nid_of(dir_at(dir)), ROOT_NID);
        dirs.push((format!("package-{dir:04}"), nid_of(dir_at(dir)), FT_DIRECTORY));
    }
    directory(&mut bytes, root_at, dirs, ROOT_NID, ROOT_NID);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    let chunk_table = bytes.len();
    for number in 0..CHUNKS {
        let mut record = ChunkInfo::new_zeroed();
        record.digest[..4].copy_from_slice(&number.to_be_bytes());
        record.compressed_size.set(4000);
        record.uncompressed_size.set(4000);
        record.compressed_offset.set(u64::from(number) * 4000);
        record.uncompressed_offset.set(u64::from(number) * 4096);
        record.index.set(number);
        put(&mut bytes, chunk_table + number as usize * size_of::<ChunkInfo>(), &record);
    }
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    tables(&mut bytes, chunk_table);
    bytes
}

fn tables(bytes: &mut Vec<u8>, chunk_table: usize) {
    let mut blob = BlobRecord::new_zeroed();
    blob.blob_id = [b'b'; 64];
    blob.chunk_size.set(4096);
    blob.chunk_count.set(CHUNKS);
    blob.compression_algo.set(compression::NONE);
    blob.features.set((BlobFeatures::ALIGNED | BlobFeatures::CAP_TAR_TOC).bits());
    let context = u64::from(CHUNKS) * 16;
    blob.ci_offset.set(u64::from(CHUNKS) * 4000);
    blob.ci_compressed_size.set(context);
    blob.ci_uncompressed_size.set(context);
    blob.compressed_size.set(u64::from(CHUNKS) * 4000 + context + 4096);
    blob.uncompressed_size.set(u64::from(CHUNKS) * 4096);
    put(bytes, BLOCK, &blob);
    let mut slot = DeviceSlot::new_zeroed();
    slot.tag = blob.blob_id;
    slot.blocks.set(CHUNKS);
    slot.mapped_blkaddr.set((bytes.len().next_multiple_of(512 << 10) / BLOCK) as u32);
    put(bytes, DEVICE_TABLE_OFFSET, &slot);
    let mut ext = ExtSuperblock::new_zeroed();
    let flags = ImageFlags::COMPRESSION_NONE | ImageFlags::HASH_BLAKE3 | ImageFlags::EXPLICIT_UID_GID;
    ext.flags.set(flags.bits());
    ext.blob_table_offset.set(BLOCK as u64);
    ext.blob_table_size.set(256);
    ext.chunk_size.set(4096);
    ext.chunk_table_offset.set(chunk_table as u64);
    ext.chunk_table_size.set(u64::from(CHUNKS) * size_of::<ChunkInfo>() as u64);
    put(bytes, EXT_SUPERBLOCK_OFFSET, &ext);
    let mut sb = Superblock::new_zeroed();
    sb.magic.set(EROFS_MAGIC);
    sb.feature_compat.set(COMPAT_RAFS_V6);
    sb.feature_incompat.set(INCOMPAT);
    sb.blkszbits = 12;
    sb.root_nid.set(ROOT_NID as u16);
    sb.inos.set(u64::from(CHUNKS + DIRS + 1));
    sb.blocks.set(CHUNKS);
    sb.meta_blkaddr.set((META / BLOCK) as u32);
    sb.extra_devices.set(1);
    sb.devt_slotoff.set(DEVT_SLOTOFF);
    put(bytes, SUPERBLOCK_OFFSET, &sb);
}

fn metadata(c: &mut Criterion) {
    let bytes = image();
    let options = OpenOptions::default();
    c.bench_function("open and validate, 28201 entries", |b| {
        b.iter_with_setup(|| bytes.clone(), |bytes| from_bytes(bytes, &options).expect("the image is sound"));
    });
    let image: Box<dyn Bootstrap> = from_bytes(bytes, &options).expect("the image is sound");
    let dir = image.lookup(image.root(), b"package-0123").ok().flatten().expect("it is there").nid;
    c.bench_function("lookup in 140 entries", |b| {
        b.iter(|| image.lookup(black_box(dir), black_box(b"some-file-0077.js")).is_ok());
    });
    c.bench_function("lookup of a missing name", |b| {
        b.iter(|| image.lookup(black_box(dir), black_box(b"some-file-0077.ts")).is_ok());
    });
    c.bench_function("readdir of 140 entries with attributes", |b| {
        b.iter(|| {
            let mut size = 0;
            let visited = image.children(black_box(dir), 0, &mut |entry| {
                size += image.attr(entry.nid).map_or(0, |attr| attr.size);
                ControlFlow::Continue(())
            });
            (visited.is_ok(), size)
        });
    });
    c.bench_function("image root, 28201 entries", |b| b.iter(|| image_root(&*image).is_ok()));
}

criterion_group!(benches, metadata);
criterion_main!(benches);
