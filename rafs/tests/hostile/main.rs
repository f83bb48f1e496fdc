//! Forged bootstraps: each broken rule is refused with its reason, and no bytes whatever make
//! the reader panic or hang.

mod damaged;
#[path = "../support/mod.rs"]
mod support;
mod v5;

use std::ops::ControlFlow;

use rafs::ErrorKind;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Bootstrap, FileType, Nid, OpenOptions, Step, Walk, from_bytes};
use rafs::fs::{Rafs, RafsOptions, SeekKind};
use rafs::merkle::image_root;
use storage::ids::ChunkIndex;
use support::{golden_bytes, open_bytes};

/// A golden bootstrap to be damaged, with the places of things.
struct Forge {
    bytes: Vec<u8>,
    meta: usize,
    image: std::sync::Arc<dyn Bootstrap>,
}

const SB: usize = 1024;
const EXT: usize = 1152;
const SLOT: usize = 1408;
const BLOBS: usize = 4096;

impl Forge {
    fn new(variant: &str) -> Self {
        let bytes = golden_bytes(&format!("{variant}/image.boot"));
        let image = open_bytes(bytes.clone());
        let meta = image.summary().meta_blkaddr as usize * 4096;
        Self { bytes, meta, image }
    }

    fn nid(&self, path: &str) -> Nid {
        path.split('/')
            .filter(|n| !n.is_empty())
            .fold(self.image.root(), |dir, n| self.image.lookup(dir, n.as_bytes()).unwrap().unwrap().nid)
    }

    /// Byte of the inode at `path`.
    fn inode(&self, path: &str) -> usize {
        self.meta + self.nid(path).0 as usize * 32
    }

    fn chunks(&self) -> usize {
        self.image.summary().chunk_table.0 as usize
    }

    /// Byte of the first dirent of a directory whose data is inlined, without xattrs.
    fn dirents(&self, path: &str) -> usize {
        let at = self.inode(path);
        assert_eq!(self.bytes[at..at + 4], [5, 0, 0, 0], "inlined, no xattrs");
        at + 64
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }
}

fn refused(variant: &str, why: &str, edit: impl FnOnce(&mut Forge)) {
    let mut forge = Forge::new(variant);
    edit(&mut forge);
    assert_refused(forge.bytes, why);
}

/// Of either version.
fn assert_refused(bytes: Vec<u8>, why: &str) {
    match from_bytes(bytes, &OpenOptions::default()) {
        Ok(_) => panic!("accepted, although: {why}"),
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{e}");
            assert!(e.to_string().contains(why), "want {why:?} in: {e}");
        }
    }
}

#[test]
fn forged_superblocks() {
    let zero = |field: &'static str, at: usize| refused("default", field, move |f| f.bytes[at] = 1);
    zero("checksum", SB + 4);
    zero("extra slots", SB + 13);
    zero("shared xattr", SB + 44);
    zero("compression", SB + 84);
    zero("directory block bits", SB + 90);
    refused("default", "not a RAFS bootstrap", |f| f.bytes[SB] ^= 1);
    refused("default", "not a RAFS bootstrap", |f| f.put32(SB + 8, 0));
    refused("default", "block size", |f| f.bytes[SB + 12] = 9);
    refused("default", "inodes", |f| f.put64(SB + 16, 0));
    refused("default", "can not lie", |f| f.put64(SB + 16, u64::MAX));
    refused("default", "more entries than", |f| f.put64(SB + 16, 416));
    refused("default", "nanoseconds", |f| f.put32(SB + 32, 1_000_000_000));
    refused("default", "inode area", |f| f.put32(SB + 40, u32::MAX));
    refused("default", "incompatible features", |f| f.put32(SB + 80, 0xe));
    refused("default", "device slots", |f| f.put16(SB + 86, 2));
    refused("default", "device table at slot", |f| f.put16(SB + 88, 12));
    refused("default", "unknown to this version", |f| f.bytes[EXT + 1] |= 0x80);
    refused("default", "tarfs", |f| f.bytes[EXT + 1] |= 2);
    refused("default", "one compressor", |f| f.bytes[EXT] |= 1);
    refused("default", "one digester", |f| f.bytes[EXT] |= 8);
    for size in [0, 0x800, 0x1001, 0x200_0000] {
        refused("default", "chunk size", |f| f.put32(EXT + 20, size));
    }
    for len in [86015, 86017, 4095, 1200, 10, 0] {
        let mut bytes = golden_bytes("default/image.boot");
        bytes.resize(len, 0);
        assert_eq!(from_bytes(bytes, &OpenOptions::default()).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn forged_tables() {
    refused("default", "blob table", |f| f.put64(EXT + 8, 4097));
    refused("default", "blob table", |f| f.put64(EXT + 8, u64::MAX - 4095));
    refused("default", "blob table", |f| f.put64(EXT + 8, 1 << 20));
    refused("default", "blob table", |f| f.put32(EXT + 16, 255));
    refused("default", "chunk table", |f| f.put64(EXT + 24, 0));
    refused("default", "chunk table", |f| f.put64(EXT + 32, u64::MAX - 79));
    refused("default", "overlap", |f| f.put64(EXT + 24, 4096));
    refused("prefetch", "prefetch table", |f| f.put32(EXT + 48, 4 * 418));
    refused("prefetch", "prefetch table", |f| f.put64(EXT + 40, u64::MAX - 7));
    refused("prefetch", "overlap", |f| f.put64(EXT + 40, 4096));
    // A table at offset 0 is none, whatever size old tools gave it.
    let mut legacy = Forge::new("prefetch");
    legacy.put64(EXT + 40, 0);
    legacy.put32(EXT + 48, u32::MAX);
    assert_eq!(open_bytes(legacy.bytes).prefetch(), []);
    // Numbers that are no inodes are passed over.
    let mut strange = Forge::new("prefetch");
    let table = strange.image.summary().prefetch_table.0 as usize;
    strange.put32(table, u32::MAX);
    assert_eq!(open_bytes(strange.bytes).prefetch().len(), 2);
}

#[test]
fn forged_blobs() {
    refused("default", "different blobs", |f| f.bytes[SLOT] = b'0');
    refused("default", "blocks", |f| f.put32(SLOT + 64, 0));
    refused("default", "mapped blocks", |f| f.put32(SLOT + 68, 1));
    refused("default", "mapped blocks", |f| f.put32(SLOT + 68, u32::MAX));
    refused("parent", "mapped blocks", |f| {
        let first = f.bytes[SLOT + 68..SLOT + 72].to_vec();
        f.put(SLOT + 128 + 68, &first);
    });
    refused("parent", "listed twice", |f| {
        let id = f.bytes[BLOBS..BLOBS + 64].to_vec();
        f.put(BLOBS + 256, &id);
        f.put(SLOT + 128, &id);
    });
    for id in [&b"../../../etc/passwd\0"[..], b".hidden\0", b"a/b\0", b"\0", b"a b\0", b"\xff\0", b"a\0b"] {
        refused("default", "blob", |f| {
            f.put(BLOBS, &[0; 64]);
            f.put(BLOBS, id);
            f.put(SLOT, &[0; 64]);
            f.put(SLOT, id);
        });
    }
    refused("default", "claims to be record", |f| f.put32(BLOBS + 64, 1));
    refused("default", "chunk size", |f| f.put32(BLOBS + 68, 0x1000));
    for count in [0, (1 << 24) + 1, 1 << 24, 479 + 1] {
        refused("default", "chunks", |f| f.put32(BLOBS + 72, count));
    }
    refused("default", "compressor code", |f| f.put32(BLOBS + 76, 9));
    refused("default", "gzip", |f| f.put32(BLOBS + 76, 2));
    refused("default", "digester code", |f| f.put32(BLOBS + 80, 2));
    refused("default", "incompatible bits", |f| f.bytes[BLOBS + 85] |= 0x10);
    refused("default", "set on disk", |f| f.bytes[BLOBS + 87] |= 0x80);
    refused("default", "not aligned", |f| f.bytes[BLOBS + 84] &= !1);
    refused("default", "zran", |f| f.bytes[BLOBS + 84] |= 8);
    refused("batch", "both batch units and slices", |f| f.bytes[BLOBS + 84] |= 8);
    refused("default", "not aligned", |f| f.bytes[BLOBS + 84] |= 0x40);
    refused("tarfs", "not aligned", |f| f.bytes[BLOBS + 84] |= 1);
    refused("tarfs", "decoded size", |f| f.bytes[BLOBS + 84] ^= 0x41);
    refused("default", "disagree", |f| {
        f.bytes[EXT + 1] |= 2;
        f.bytes[SB + 12] = 9;
    });
    refused("tarfs", "decoded size", |f| f.put64(BLOBS + 88, 30720 + 512));
    refused("encrypt", "contradict", |f| f.bytes[BLOBS + 85] &= !1);
    refused("tarfs", "with a context", |f| f.put64(BLOBS + 128, 1 << 60));
    refused("tarfs", "has no units", |f| f.bytes[BLOBS + 84] |= 8);
    refused("encrypt", "contradict", |f| f.put32(BLOBS + 216, 0));
    refused("encrypt", "AES-128-XTS", |f| f.put32(BLOBS + 216, 2));
    refused("encrypt", "halves", |f| f.put(BLOBS + 168, &[7; 32]));
    refused("default", "24-byte", |f| f.bytes[BLOBS + 84] |= 0x80);
    refused("default", "external", |f| f.bytes[BLOBS + 85] |= 8);
    // The mark of a dictionary waives no check.
    refused("default", "other numbers", |f| {
        f.bytes[BLOBS + 85] |= 2;
        f.put32(BLOBS + 72, 478);
    });
    refused("default", "beyond", |f| f.put64(BLOBS + 88, 4096));
    refused("default", "no room", |f| f.put64(BLOBS + 88, 1 << 41));
    refused("default", "decoded size", |f| f.put64(BLOBS + 96, 1961984 + 1));
    refused("default", "decoded size", |f| f.put64(BLOBS + 96, u64::MAX << 12));
    refused("default", "gzip", |f| f.put32(BLOBS + 108, 2));
    refused("default", "beyond", |f| f.put64(BLOBS + 112, u64::MAX));
    refused("default", "context", |f| f.put64(BLOBS + 120, 1 << 20));
    refused("default", "context", |f| f.put64(BLOBS + 128, 1 << 40));
    // Batch contexts have no exact size, hence a cap.
    refused("batch", "context", |f| f.put64(BLOBS + 128, 1 << 30));
    refused("toc-sha256", "no room", |f| {
        f.put64(BLOBS + 112, 511);
        f.put64(BLOBS + 88, 1 << 20);
    });
    refused("default", "contradict", |f| f.put32(BLOBS + 216, 1));
}

#[test]
fn forged_chunk_records() {
    let record = |why: &'static str, offset: usize, value: u64, len: usize| {
        refused("default", why, move |f| {
            let at = f.chunks() + offset;
            f.put(at, &value.to_le_bytes()[..len]);
        });
    };
    record("of 1", 32, 1, 4);
    record("holes", 36, 2, 4);
    record("encryption", 36, 4, 4);
    record("stored 0", 40, 0, 4);
    record("stored", 40, 0x7fff_ffff, 4);
    record("decoded 0", 44, 0, 4);
    record("decoded", 44, 0x20_0000, 4);
    record("stored", 48, u64::MAX, 8);
    record("stored", 48, 1 << 30, 8);
    record("decoded", 56, u64::MAX << 12, 8);
    record("decoded", 56, 4097, 8);
    record("of blob", 72, 163, 4);
    refused("default", "repeats or overlaps", |f| {
        let at = f.chunks();
        let second: Vec<u8> = f.bytes[at + 80 + 72..at + 80 + 76].to_vec();
        f.put(at + 72, &second);
    });
}

/// A blob that claims 2^24 chunks and has few records: accepted, and no memory is spent on
/// the claim (4 bytes a chunk would be 64 MiB).
#[test]
fn a_huge_chunk_count_costs_nothing() {
    let mut f = Forge::new("default");
    let nid = f.nid("files/one_byte");
    let old = f.image.chunk(nid, 0).unwrap().index.0;
    let table = f.chunks();
    let record = (0..163)
        .map(|row| table + row * 80)
        .find(|at| f.bytes[at + 72..at + 76] == old.to_le_bytes())
        .unwrap();
    let last = (1u32 << 24) - 1;
    f.put32(BLOBS + 72, 1 << 24);
    f.put64(BLOBS + 88, 1 << 36);
    f.put64(BLOBS + 96, 1 << 36);
    f.put64(BLOBS + 128, 1 << 28);
    f.put32(SLOT + 64, 1 << 24);
    f.put64(record + 56, u64::from(last) << 12);
    f.put32(record + 72, last);
    let index = f.inode("files/one_byte") + 64;
    f.put(index, &[0xff, 0xff, 1, 0xff]);
    f.put32(index + 4, last);
    let before = resident();
    let image = open_bytes(f.bytes);
    assert!(resident() - before < 16 << 20);
    let chunk = image.chunk(nid, 0).unwrap();
    assert_eq!(chunk.index.0, last);
    assert_eq!(image.chunk_info(0, chunk.index).unwrap().uncompressed_size.get(), 1);
    assert!(image.chunk_info(0, storage::ids::ChunkIndex(last - 1)).is_none());
    assert_eq!(visit_all(&*image), 417);
}

/// Contexts that a mount must hold are bounded together, not only one by one.
#[test]
fn chunks_of_a_unit_do_not_overlap() {
    let bootstrap = open_bytes(golden_bytes("batch/image.boot"));
    let blob = &bootstrap.blobs()[0];
    let stored = golden_bytes("batch/image.blob");
    let range = stored_range(blob).unwrap();
    let stored = &stored[range.start() as usize..range.end() as usize];
    let file = BlobContext::from_stored(blob, stored).unwrap().to_cache_file();
    let context = BlobContext::from_cache_file(blob, &file).unwrap();
    let place = |index| context.unit(&context.entry(ChunkIndex(index)).unwrap()).unwrap();
    let second = (1..blob.chunk_count).find(|index| place(*index).0 == place(index - 1).0).unwrap();
    let mut forged = file.clone();
    // The low half of the second entry's last word: where it is in the decoded unit.
    forged[second as usize * 24 + 16..][..4].fill(0);
    let error = BlobContext::from_cache_file(blob, &forged).unwrap_err();
    assert!(error.to_string().contains("overlaps the chunk before it"), "{error}");
}

#[test]
fn forged_contexts_are_bounded_together() {
    let forged = |mib: u64| {
        let mut f = Forge::new("merged");
        assert_eq!(f.image.blobs().len(), 2);
        for record in [BLOBS, BLOBS + 256] {
            // 24-byte entries, batch units.
            f.bytes[record + 84] |= 0x84;
            f.put64(record + 128, mib << 20);
        }
        from_bytes(f.bytes, &OpenOptions::default())
    };
    assert!(forged(200).is_ok());
    let error = forged(300).unwrap_err();
    assert!(error.to_string().contains("contexts needed to read the image"), "{error}");
}

/// Resident bytes of this process.
fn resident() -> i64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096
}

#[test]
fn forged_inodes() {
    let inode = |why: &'static str, path: &'static str, offset: usize, value: u64, len: usize| {
        refused("default", why, move |f| {
            let at = f.inode(path) + offset;
            f.put(at, &value.to_le_bytes()[..len]);
        });
    };
    let file = "files/one_byte";
    let fields = "not those of an inode";
    refused("default", "not a directory", |f| {
        let nid = f.nid(file).0;
        f.put16(SB + 14, u16::try_from(nid).unwrap());
    });
    refused("default", "root", |f| f.put16(SB + 14, 0));
    inode(fields, file, 0, 0x19, 2);
    inode(fields, file, 0, 0x01, 2);
    inode(fields, file, 4, 0o644, 2);
    inode(fields, file, 6, 1, 2);
    inode("claim more bytes", file, 8, u64::MAX, 8);
    inode("claim more bytes", file, 8, 1 << 50, 8);
    inode(fields, file, 16, 0x40, 4);
    inode(fields, file, 16, 0x1_0028, 4);
    inode(fields, file, 40, 1_000_000_000, 4);
    inode(fields, file, 44, 0, 4);
    inode("beyond the file", file, 2, 0xffff, 2);
    inode(fields, file, 4, 0o10644, 2);
    // The type in the entry and in the inode must agree.
    refused("default", "differ in type", |f| {
        let at = f.inode(file);
        f.put16(at + 4, 0o10644);
        f.put16(at, 1);
        f.put64(at + 8, 0);
    });
    // A directory of chunks; directories whose data lies elsewhere.
    inode(fields, "files", 0, 0x09, 2);
    refused("default", "beyond the file", |f| {
        let at = f.inode("files");
        f.put16(at, 1);
        f.put32(at + 16, 1 << 30);
    });
    inode("bad first entry", "dirs/empty_dir", 8, 4, 8);
    inode("without a tail", "dirs/empty_dir", 8, 4096, 8);
    inode("overlap", "dirs", 8, 1 << 40, 8);
}

#[test]
fn forged_chunk_indexes() {
    let index = |why: &'static str, offset: usize, value: u8| {
        refused("default", why, move |f| {
            let at = f.inode("files/one_byte") + 64 + offset;
            f.bytes[at] = value;
        });
    };
    index("hole", 2, 0);
    index("blob 7 of 1", 2, 8);
    index("of 163 chunks", 3, 1);
    index("bytes at", 7, 0xff);
    refused("default", "record of chunk", |f| {
        let at = f.inode("files/one_byte") + 64;
        f.bytes[at + 4] ^= 1;
    });
}

#[test]
fn forged_symlinks_and_xattrs() {
    let link = |image: &dyn Bootstrap| {
        let mut walk = Walk::new(image, image.root());
        while let Some(step) = walk.step().unwrap() {
            if let Step::Leaf(entry) = step
                && entry.file_type == FileType::Symlink
                && image.attr(entry.nid).unwrap().size < 100
            {
                return String::from_utf8(walk.path().to_vec()).unwrap();
            }
        }
        panic!("no symlink");
    };
    for size in [0u64, 4096, 4097, u64::MAX] {
        refused("default", "", |f| {
            let at = f.inode(&link(&*f.image));
            f.put64(at + 8, size);
        });
    }
    refused("default", "NUL", |f| {
        let at = f.inode(&link(&*f.image));
        f.bytes[at + 64] = 0;
    });
    let with_xattr = |image: &dyn Bootstrap| {
        let mut walk = Walk::new(image, image.root());
        while let Some(step) = walk.step().unwrap() {
            if let Step::Leaf(entry) = step {
                let mut any = false;
                image
                    .xattrs(entry.nid, &mut |_| {
                        any = true;
                        ControlFlow::Break(())
                    })
                    .unwrap();
                if any {
                    return String::from_utf8(walk.path().to_vec()).unwrap();
                }
            }
        }
        panic!("no xattr");
    };
    let xattr = |why: &'static str, offset: usize, value: u8| {
        refused("default", why, move |f| {
            let at = f.inode(&with_xattr(&*f.image)) + 64 + offset;
            f.bytes[at] = value;
        });
    };
    xattr("shared xattrs", 4, 1);
    xattr("xattr entry", 12, 255);
    xattr("xattr entry", 13, 5);
    xattr("xattr entry", 15, 0xff);
}

#[test]
fn forged_directories() {
    let dir = "dirs/empty_dir";
    // The only entries are `.` and `..`; each takes 12 bytes.
    let entry = |why: &'static str, offset: usize, value: u64, len: usize| {
        refused("default", why, move |f| {
            let at = f.dirents(dir) + offset;
            f.put(at, &value.to_le_bytes()[..len]);
        });
    };
    entry("bad first entry", 8, 0, 2);
    entry("bad first entry", 8, 11, 2);
    entry("bad first entry", 8, 13, 2);
    entry("bad first entry", 8, 4092, 2);
    // One entry that is called "." and ends the list.
    refused("default", "no \"..\" entry", |f| {
        let at = f.dirents(dir);
        f.put16(at + 8, 12);
        f.put16(at + 12, u16::from(b'.'));
    });
    entry("bad name offset", 12 + 8, 0, 2);
    entry("bad name offset", 12 + 8, 24, 2);
    entry("bad name offset", 12 + 8, 4000, 2);
    entry("own directory", 0, 0, 8);
    entry("own directory", 10, 1, 1);
    entry("parent directory", 12, 128, 8);
    // A sound directory to take entries from: its children are files.
    let names = |f: &Forge| {
        let at = f.dirents("files");
        let count = usize::from(u16::from_le_bytes([f.bytes[at + 8], f.bytes[at + 9]])) / 12;
        (at, count)
    };
    let last = |why: &'static str, edit: &dyn Fn(&mut Forge, usize)| {
        refused("default", why, |f| {
            let (at, count) = names(f);
            edit(f, at + (count - 1) * 12);
        });
    };
    last("outside the image", &|f, at| f.put64(at, 0));
    last("outside the image", &|f, at| f.put64(at, u64::MAX));
    last("outside the image", &|f, at| f.put64(at, 1 << 40));
    last("differ in type", &|f, at| f.bytes[at + 10] = 7);
    // Back to the root, to itself, and a directory with another parent.
    for target in ["", "files", "dirs/empty_dir"] {
        last("reached twice", &|f, at| {
            let nid = f.nid(target).0;
            f.put64(at, nid);
            f.bytes[at + 10] = 2;
        });
    }
    let name = |why: &'static str, byte: u8| {
        refused("default", why, |f| {
            let (at, count) = names(f);
            let entry = at + (count - 1) * 12;
            let offset = usize::from(u16::from_le_bytes([f.bytes[entry + 8], f.bytes[entry + 9]]));
            f.bytes[at + offset + 1] = byte;
        });
    };
    name("contains /", b'/');
    refused("default", "contains / or NUL", |f| {
        let (at, _) = names(f);
        let offset = usize::from(u16::from_le_bytes([f.bytes[at + 24 + 8], f.bytes[at + 24 + 9]]));
        f.bytes[at + offset + 1] = 0;
    });
    refused("default", "out of order", |f| {
        let (at, count) = names(f);
        let entry = at + (count - 1) * 12;
        let offset = usize::from(u16::from_le_bytes([f.bytes[entry + 8], f.bytes[entry + 9]]));
        f.bytes[at + offset] = b'!';
    });
}

/// A chain of `depth` directories below the root, each of which holds the next.
fn deep(depth: usize) -> Vec<u8> {
    const STRIDE: usize = 128;
    let mut bytes = golden_bytes("empty/image.boot")[..4096].to_vec();
    bytes[SB + 16..SB + 24].copy_from_slice(&(depth as u64 + 1).to_le_bytes());
    let nid = |level: usize| (128 + level * STRIDE / 32) as u64;
    for level in 0..=depth {
        let last = level == depth;
        let mut inode = vec![0u8; STRIDE];
        inode[..2].copy_from_slice(&5u16.to_le_bytes());
        inode[4..6].copy_from_slice(&0o40755u16.to_le_bytes());
        inode[44] = if last { 2 } else { 3 };
        let names: &[(&[u8], u64)] =
            &[(b".", nid(level)), (b"..", nid(level.saturating_sub(1))), (b"d", nid(level + 1))];
        let names = &names[..if last { 2 } else { 3 }];
        let mut offset = names.len() * 12;
        for (i, (name, nid)) in names.iter().enumerate() {
            let at = 64 + i * 12;
            inode[at..at + 8].copy_from_slice(&nid.to_le_bytes());
            inode[at + 8..at + 10].copy_from_slice(&(offset as u16).to_le_bytes());
            inode[at + 10] = 2;
            inode[64 + offset..64 + offset + name.len()].copy_from_slice(name);
            offset += name.len();
        }
        inode[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
        bytes.extend_from_slice(&inode);
    }
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes
}

#[test]
fn depth_is_bounded_without_recursion() {
    let image = open_bytes(deep(2047));
    assert_eq!(visit_all(&*image), 2048);
    let error = from_bytes(deep(2048), &OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("nested too deeply"), "{error}");
}

/// Asks everything about every entry; answers how many there are.
fn visit_all(image: &dyn Bootstrap) -> u64 {
    let mut walk = Walk::new(image, image.root());
    let mut entries = 0;
    while let Some(step) = walk.step().unwrap() {
        let entry = match step {
            Step::Enter(entry) | Step::Leaf(entry) => entry,
            Step::Leave(dir) => {
                let parent = image.parent(dir).unwrap();
                assert_eq!(image.attr(parent).unwrap().file_type, FileType::Directory);
                continue;
            }
        };
        entries += 1;
        let attr = image.attr(entry.nid).unwrap();
        image.xattrs(entry.nid, &mut |_| ControlFlow::Continue(())).unwrap();
        match attr.file_type {
            FileType::Symlink => assert_eq!(image.read_link(entry.nid).unwrap().len() as u64, attr.size),
            FileType::Regular => {
                for position in 0..attr.size.div_ceil(image.summary().chunk_size.into()) {
                    let chunk = image.chunk(entry.nid, position as u32).unwrap();
                    let _ = image.chunk_info(chunk.blob, chunk.index);
                }
            }
            FileType::Directory => {
                image
                    .children(entry.nid, 0, &mut |child| {
                        let found = image.lookup(entry.nid, child.name).unwrap().unwrap();
                        assert_eq!((found.nid, found.next), (child.nid, child.next));
                        ControlFlow::Continue(())
                    })
                    .unwrap();
            }
            _ => {}
        }
    }
    entries
}
