//! The same for RAFS v5.

use proptest::prelude::*;
use storage::digest::DigestAlgorithm;

use super::damaged::{damage, survive};
use super::*;

/// A golden v5 bootstrap to be damaged, with the places of things.
struct Forge {
    bytes: Vec<u8>,
    image: std::sync::Arc<dyn Bootstrap>,
}

impl Forge {
    fn new(variant: &str) -> Self {
        let bytes = golden_bytes(&format!("{variant}/image.boot"));
        Self { image: open_bytes(bytes.clone()), bytes }
    }

    fn get32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Makes the digest of the directory at byte `at` that of its children.
    fn rehash(&mut self, at: usize) {
        let first = u64::from(self.get32(at + 92));
        let slots = first..first + u64::from(self.get32(at + 96));
        let digests: Vec<u8> =
            slots.map(|slot| self.slot(slot)).flat_map(|at| self.bytes[at..at + 32].to_vec()).collect();
        self.put(at, &DigestAlgorithm::Blake3.digest(&digests).0);
    }

    fn flip(&mut self, at: usize) {
        self.bytes[at] ^= 1;
    }

    /// Byte of the record in `slot`.
    fn slot(&self, slot: u64) -> usize {
        self.get32(8192 + 4 * (slot as usize - 1)) as usize * 8
    }

    fn ino(&self, path: &str) -> u64 {
        let names = path.split('/');
        names.fold(self.image.root(), |dir, n| self.image.lookup(dir, n.as_bytes()).unwrap().unwrap().nid).0
    }

    /// Byte of the inode at `path`.
    fn inode(&self, path: &str) -> usize {
        self.slot(self.ino(path))
    }

    /// Byte of the first chunk record of a file with a short name and without xattrs.
    fn chunk(&self, path: &str) -> usize {
        let at = self.inode(path);
        let name = usize::from(u16::from_le_bytes([self.bytes[at + 100], self.bytes[at + 101]]));
        assert_eq!(self.bytes[at + 80], 0, "no xattrs");
        at + 128 + name.next_multiple_of(8)
    }
}

fn refused(why: &str, edit: impl FnOnce(&mut Forge)) {
    refused_of("v5-default", why, edit);
}

fn refused_of(variant: &str, why: &str, edit: impl FnOnce(&mut Forge)) {
    let mut forge = Forge::new(variant);
    edit(&mut forge);
    assert_refused(forge.bytes, why);
}

#[test]
fn forged_superblocks_and_tables() {
    refused("RAFS version", |f| f.put32(4, 0x400));
    refused("superblock of", |f| f.put32(8, 4096));
    for size in [0, 0x800, 0x1001, 0x200_0000] {
        refused("chunk size", |f| f.put32(12, size));
    }
    refused("unknown to this version", |f| f.bytes[17] |= 0x80);
    refused("tarfs", |f| f.bytes[17] |= 2);
    refused("encrypted", |f| f.bytes[19] |= 2);
    refused("stargz", |f| f.bytes[16] |= 0x40);
    refused("one compressor", |f| f.bytes[16] |= 1);
    refused("one digester", |f| f.bytes[16] |= 8);
    refused("inodes in", |f| f.put64(24, 418));
    refused("can not lie", |f| f.put32(56, 0));
    refused("can not lie", |f| f.put32(56, u32::MAX));
    for (name, at) in [("inode table", 32), ("prefetch table", 40), ("blob table", 48), ("extended blob", 72)]
    {
        refused(name, |f| f.put64(at, 8193));
        if at != 40 {
            refused(name, |f| f.put64(at, u64::MAX - 7));
            refused(name, |f| f.put64(at, 4096));
        }
    }
    refused("overlap", |f| f.put64(48, 8192));
    refused_of("v5-prefetch", "prefetch table", |f| f.put32(60, 418));
    refused("too few", |f| {
        // A second name, short, in place of the padding: the first one is 64 bytes long.
        let at = u64::from_le_bytes(f.bytes[48..56].try_into().unwrap()) as usize;
        f.put(at + 8 + 20, &[0]);
    });
    let blob = |f: &Forge| u64::from_le_bytes(f.bytes[48..56].try_into().unwrap()) as usize + 8;
    for name in [b"..", b"a/", b".x", b"\x01x"] {
        refused("blob id", |f| f.put(blob(f), name));
    }
    let row = |f: &Forge| u64::from_le_bytes(f.bytes[72..80].try_into().unwrap()) as usize;
    refused("do not fit each other", |f| f.put32(row(f), u32::MAX));
    refused("do not fit each other", |f| f.put64(row(f) + 8, u64::MAX));
    refused("do not fit each other", |f| f.put64(row(f) + 16, u64::MAX));
    refused("of 100 chunks", |f| f.put32(row(f), 100));
    refused("RAFS v5 (blob features", |f| f.put32(row(f) + 4, 0x4000_0104));
    let whole = golden_bytes("v5-default/image.boot");
    for len in [whole.len() - 8, whole.len() - 1, 8192, 100, 4] {
        let error = from_bytes(whole[..len].to_vec(), &OpenOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{len}");
    }
    // Bytes behind the last inode are nobody's.
    let mut longer = whole;
    longer.extend([7; 64]);
    assert!(from_bytes(longer, &OpenOptions::default()).is_ok());
}

#[test]
fn forged_inodes() {
    let file = "files/one_byte";
    refused("superblock", |f| f.put32(8192 + 4 * 9, 1000));
    refused("overlap", |f| {
        let root = f.get32(8192);
        f.put32(8192 + 4 * 9, root);
    });
    refused("inode 10 at 8192", |f| f.put32(8192 + 4 * 9, 8192 / 8));
    refused("root", |f| f.put64(f.slot(1) + 40, 2));
    refused("no earlier file", |f| f.put64(f.inode(file) + 40, 3));
    refused("no earlier file", |f| f.put64(f.inode(file) + 40, 400_000));
    refused("another parent", |f| f.put64(f.inode(file) + 32, 1));
    refused("no known type", |f| f.put32(f.inode(file) + 60, 0o644));
    refused("link count", |f| f.put32(f.inode(file) + 88, 0));
    refused("nanoseconds", |f| f.put32(f.inode(file) + 108, 1_000_000_000));
    refused("name of 0 bytes", |f| f.put(f.inode(file) + 100, &[0, 0]));
    refused("name of 256 bytes", |f| f.put(f.inode(file) + 100, &[0, 1]));
    refused("target", |f| f.put(f.inode(file) + 102, &[1]));
    refused("chunk records", |f| f.put64(f.inode(file) + 64, 1 << 40));
    refused("chunk records", |f| f.put32(f.inode(file) + 96, 0));
    refused("children from slot", |f| f.put32(f.inode("files") + 92, 1));
    refused("children from slot", |f| f.put32(f.inode("files") + 92, u32::MAX));
    refused("children from slot", |f| f.put32(f.inode("files") + 96, 5000));
    refused("no directory has it", |f| {
        let count = f.get32(f.inode("files") + 96);
        f.put32(f.inode("files") + 96, count - 1);
        f.rehash(f.inode("files"));
        f.rehash(f.slot(1));
    });
    refused("reached twice", |f| {
        // The same slots for two directories.
        let (first, count) = (f.get32(f.slot(1) + 92), f.get32(f.slot(1) + 96));
        let mut dirs = (first..first + count)
            .map(|slot| f.slot(slot.into()))
            .filter(|&at| f.get32(at + 60) & libc::S_IFMT == libc::S_IFDIR && f.get32(at + 96) > 0);
        let (a, b) = (dirs.next().unwrap(), dirs.next().unwrap());
        drop(dirs);
        let slots = [f.get32(a + 92), f.get32(a + 96)];
        f.put32(b + 92, slots[0]);
        f.put32(b + 96, slots[1]);
        f.bytes.copy_within(a..a + 32, b);
        f.rehash(f.slot(1));
    });
    let name = |f: &Forge| f.inode(file) + 128;
    for bad in [b"a/b_byte", b"one\0byte"] {
        refused("is no name", |f| f.put(name(f), bad));
    }
    refused("out of order", |f| f.put(name(f), b"\xff"));
    refused("its digest", |f| f.flip(f.inode(file)));
    refused("its digest", |f| f.flip(f.slot(1)));
}

#[test]
fn forged_chunk_records() {
    let file = "files/one_byte";
    refused("its digest", |f| f.flip(f.chunk(file)));
    refused("blob 7 of 1", |f| f.put32(f.chunk(file) + 32, 7));
    for flags in [2, 4, 8, 0x20] {
        refused("flags", |f| f.put32(f.chunk(file) + 36, flags));
    }
    refused("do not fit each other", |f| f.put32(f.chunk(file) + 40, u32::MAX));
    refused("bytes for", |f| f.put32(f.chunk(file) + 44, u32::MAX));
    refused("do not fit each other", |f| f.put64(f.chunk(file) + 48, u64::MAX));
    refused("do not fit each other", |f| f.put64(f.chunk(file) + 56, u64::MAX));
    refused("bytes for", |f| f.put64(f.chunk(file) + 64, u64::MAX));
    refused("number 4294967295", |f| f.put32(f.chunk(file) + 72, u32::MAX));
    refused("differ", |f| f.put32(f.chunk(file) + 72, 1));
    refused("overlaps", |f| f.put64(f.chunk(file) + 56, 0));
}

#[test]
fn forged_xattrs() {
    let refused = |why: &str, edit: fn(&mut Vec<u8>, usize)| {
        refused_of("v5", why, |f| {
            let mut walk = Walk::new(&*f.image, f.image.root());
            let mut found = None;
            while let Some(step) = walk.step().unwrap() {
                let Step::Leaf(entry) = step else { continue };
                let at = f.slot(entry.nid.0);
                if f.bytes[at + 80] & 4 != 0 && entry.file_type == FileType::Regular {
                    found = Some(at + 128 + entry.name.len().next_multiple_of(8));
                }
            }
            edit(&mut f.bytes, found.unwrap());
        });
    };
    refused("xattrs of", |b, at| b[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes()));
    refused("xattrs of", |b, at| b[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes()));
    refused("xattr:", |b, at| b[at + 8..at + 12].copy_from_slice(&u32::MAX.to_le_bytes()));
    refused("xattr:", |b, at| b[at + 12] = b'x');
    refused("xattr:", |b, at| {
        let nul = b[at + 12..].iter().position(|&x| x == 0).unwrap();
        b[at + 12 + nul] = b'n';
        b[at + 8..at + 12].copy_from_slice(&(nul as u32).to_le_bytes());
    });
}

const IMAGES: [&str; 5] = ["v5-default", "v5-merged", "v5-chunkdict", "v5-tar", "v5-prefetch"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_bootstraps_are_refused_or_work(
        image in prop::sample::select(&IMAGES[..]),
        damage in damage(),
    ) {
        survive(damage.of(&golden_bytes(&format!("{image}/image.boot"))));
    }

    /// Damage where fields are: superblock, tables, fixed parts of inodes.
    #[test]
    fn damaged_fields_are_refused_or_work(
        image in prop::sample::select(&IMAGES[..]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..88, any::<u8>()), 1..4),
    ) {
        let mut forge = Forge::new(image);
        let entries = u64::from(forge.get32(56));
        let mut places = vec![0, 0, 8192, 8192 + entries as usize * 4];
        places.extend((1..=entries).flat_map(|slot| [forge.slot(slot) + 32, forge.slot(slot) + 128]));
        for (place, offset, value) in edits {
            let at = (places[place.index(places.len())] + offset).min(forge.bytes.len() - 1);
            forge.bytes[at] = value;
        }
        survive(forge.bytes);
    }

    #[test]
    fn any_nid_and_cursor_gets_an_answer(nid in any::<u64>(), near in 0u64..500, cursor in any::<u64>()) {
        let image = open_bytes(golden_bytes("v5-default/image.boot"));
        let rafs = Rafs::new(image.clone(), Vec::new(), RafsOptions::default()).unwrap();
        for nid in [nid, near, image.root().0].map(Nid) {
            let known = image.attr(nid).is_ok();
            let _ = image.parent(nid);
            let _ = image.lookup(nid, b"files");
            let _ = image.read_link(nid);
            let _ = image.chunk(nid, cursor as u32);
            let _ = image.children(nid, cursor, &mut |_| ControlFlow::Continue(()));
            prop_assert_eq!(image.xattrs(nid, &mut |_| ControlFlow::Continue(())).is_ok(), known);
            let mut slices = Vec::new();
            let read = rafs.read(nid, cursor, cursor as u32 % (1 << 22), &mut slices);
            prop_assert_eq!(slices.iter().map(|s| s.len).sum::<u32>(), read.unwrap_or(0));
        }
    }
}
