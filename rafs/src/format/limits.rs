//! Every bound on input and its origin.

/// EROFS block of every RAFS v6 image but tarfs ones.
pub const BLOCK_SIZE: u64 = 4096;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_BITS: u8 = 12;
/// log2 of the block size of a tarfs image, whose data is a plain tar.
pub const TARFS_BLOCK_BITS: u8 = 9;
/// Inodes start on multiples of this; a nid counts in it.
pub const SLOT_SIZE: u64 = 32;
/// Smallest chunk size.
pub const MIN_CHUNK_SIZE: u32 = 0x1000;
/// Largest chunk size, and so the largest chunk or fetch unit, decoded.
pub const MAX_CHUNK_SIZE: u32 = 0x100_0000;
/// True if an image may have chunks of `size` bytes.
pub const fn is_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && size >= MIN_CHUNK_SIZE && size <= MAX_CHUNK_SIZE
}
/// The contract's default chunk size.
pub const DEFAULT_CHUNK_SIZE: u32 = 0x10_0000;
/// Blobs of one bootstrap: `device_id` carries blob index + 1 in 8 bits and the reference
/// writer keeps one value free.
pub const MAX_BLOBS: usize = 254;
/// Most chunks of all blobs of an image: what says of each whether it is there takes memory for all that are claimed.
/// 64 TiB in chunks of 1 MiB.
pub const MAX_IMAGE_CHUNKS: u64 = 1 << 26;
/// Chunks of one blob a writer may produce (24-bit index, the last one unused).
pub const MAX_CHUNKS: u32 = 0x00ff_ffff;
/// Stored length of a blob.
pub const MAX_BLOB_COMPRESSED: u64 = 1 << 40;
/// Decoded length of a blob.
pub const MAX_BLOB_DECODED: u64 = 1 << 44;
/// Longest file name (EROFS).
pub const MAX_NAME_LEN: usize = 255;
/// Longest symlink target.
pub const MAX_SYMLINK_LEN: usize = 4096;
/// Deepest directory nesting accepted when walking an image: PATH_MAX / 2.
pub const MAX_DEPTH: usize = 2048;
/// nid of the root in images written here and by the reference builder.
pub const ROOT_NID: u64 = 128;
/// Alignment of `mapped_blkaddr` ranges on a flat device.
pub const MAPPED_ALIGNMENT: u64 = 512 * 1024;
/// Largest uncompressed blob context accepted, and all that one mount needs together: 2^24 entries of 24 bytes plus as many batch
/// contexts of 40 bytes would be 1 GiB; real images stay far below this cap.
pub const MAX_CONTEXT_SIZE: u64 = 512 << 20;
/// Largest bootstrap accepted.
pub const MAX_BOOTSTRAP_SIZE: u64 = 2 << 30;
/// Blob id stored in a bootstrap that is inlined in its own blob.
pub const INLINED_BLOB_ID: [u8; 64] = [b'x'; 64];
/// Memory for the names of hard-linked files while the image root is computed.
pub const MAX_LINK_PATH_BYTES: usize = 512 << 20;
/// Largest table of content, without its tar header.
pub const MAX_TOC_SIZE: u32 = 0x1_0000;
