//! `GET /api/v1/daemon/backend`: what the superblock of a mounted image says (contract 3.6).
//!
//! The names are those of both RAFS formats; what the image's version does not have is 0.

use std::time::Duration;

use rafs::format::blob_table::BlobRecord;
use rafs::format::chunk::ChunkInfo;
use rafs::format::superblock::{DEVICE_TABLE_OFFSET, EROFS_MAGIC, Superblock};
use rafs::format::v5;
use serde::Serialize;

use super::reply::Reply;
use super::routes::find_mount;
use crate::adapter::FOR_EVER;
use crate::daemon::Daemon;
use crate::mount::Mount;

/// `version` of RAFS v6.
const VERSION_6: u32 = 0x600;

#[derive(Debug, Serialize)]
struct Description {
    magic: u32,
    version: u32,
    sb_size: u32,
    root_inode: u64,
    chunk_size: u32,
    /// Reads are widened to so many bytes.
    batch_size: u32,
    inodes_count: u64,
    flags: Flags,
    inode_table_entries: u32,
    inode_table_offset: u64,
    blob_table_size: u64,
    blob_table_offset: u64,
    extended_blob_table_offset: u64,
    extended_blob_table_entries: u32,
    blob_device_table_count: u64,
    blob_device_table_offset: u64,
    prefetch_table_offset: u64,
    prefetch_table_entries: u32,
    attr_timeout: Seconds,
    entry_timeout: Seconds,
    is_chunk_dict: bool,
    meta_blkaddr: u32,
    root_nid: u64,
    chunk_table_offset: u64,
    chunk_table_size: u64,
}

#[derive(Debug, Serialize)]
struct Flags {
    bits: u64,
}

#[derive(Debug, Serialize)]
struct Seconds {
    secs: u64,
    nanos: u32,
}

impl From<Duration> for Seconds {
    fn from(duration: Duration) -> Self {
        Self { secs: duration.as_secs(), nanos: duration.subsec_nanos() }
    }
}

/// Describes the image mounted at `mountpoint`.
pub(super) fn answer(daemon: &Daemon, mountpoint: &str) -> Reply {
    match find_mount(daemon, Some(mountpoint)) {
        Some(mount) => Reply::json(&describe(&mount)),
        None => Reply::error(500, &format!("FsBackendInfo(MountNotFound({mountpoint:?}))")),
    }
}

fn describe(mount: &Mount) -> Description {
    let bootstrap = mount.rafs().bootstrap();
    let summary = bootstrap.summary();
    let blobs = bootstrap.blobs().len() as u64;
    let description = Description {
        magic: EROFS_MAGIC,
        version: VERSION_6,
        sb_size: size_of::<Superblock>() as u32,
        root_inode: bootstrap.root().0,
        chunk_size: summary.chunk_size,
        batch_size: mount.config().read_ahead.amplify,
        inodes_count: summary.inode_count,
        flags: Flags { bits: summary.flags.bits() },
        inode_table_entries: 0,
        inode_table_offset: 0,
        blob_table_size: summary.blob_table.1 * size_of::<BlobRecord>() as u64,
        blob_table_offset: summary.blob_table.0,
        extended_blob_table_offset: 0,
        extended_blob_table_entries: 0,
        blob_device_table_count: blobs,
        blob_device_table_offset: DEVICE_TABLE_OFFSET as u64,
        prefetch_table_offset: summary.prefetch_table.0,
        prefetch_table_entries: summary.prefetch_table.1,
        attr_timeout: FOR_EVER.into(),
        entry_timeout: FOR_EVER.into(),
        is_chunk_dict: false,
        meta_blkaddr: summary.meta_blkaddr,
        root_nid: bootstrap.root().0,
        chunk_table_offset: summary.chunk_table.0,
        chunk_table_size: summary.chunk_table.1 * size_of::<ChunkInfo>() as u64,
    };
    match summary.v5 {
        None => description,
        Some(tables) => Description {
            magic: v5::MAGIC,
            version: v5::VERSION,
            sb_size: v5::SUPERBLOCK_SIZE as u32,
            inodes_count: tables.inodes,
            inode_table_entries: tables.inode_table.1,
            inode_table_offset: tables.inode_table.0,
            blob_table_size: tables.blob_table_size,
            extended_blob_table_offset: tables.extended_blob_table.0,
            extended_blob_table_entries: tables.extended_blob_table.1,
            blob_device_table_count: 0,
            blob_device_table_offset: 0,
            root_nid: 0,
            chunk_table_size: 0,
            ..description
        },
    }
}
