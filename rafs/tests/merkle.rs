//! The image root digest: one value for one tree, and proofs of its entries.

mod support;

use rafs::ErrorKind;
use rafs::bootstrap::{Bootstrap, FileType, Nid, Step, Walk};
use rafs::format::inode::ExtendedInode;
use rafs::merkle::{Proof, image_root, prove};
use storage::digest::{DigestAlgorithm, TaggedDigest};
use support::{golden_bytes, open_bytes};

fn root(variant: &str) -> TaggedDigest {
    image_root(&*open_bytes(golden_bytes(&format!("{variant}/image.boot")))).unwrap()
}

#[test]
fn the_root_depends_on_digester_and_chunk_size_alone() {
    let one_mib = root("default");
    assert_eq!(one_mib.algorithm, DigestAlgorithm::Blake3);
    for same in ["lz4-1m", "none-1m", "batch", "prefetch"] {
        assert_eq!(root(same), one_mib, "{same}");
    }
    let four_kib = root("zstd-4k");
    for same in ["lz4-4k", "none-4k"] {
        assert_eq!(root(same), four_kib, "{same}");
    }
    // The same upper layers: as a layered build and as a merge, with other blob tables.
    assert_eq!(root("merged"), root("parent"));
    let all = [one_mib, four_kib, root("toc-sha256"), root("merged"), root("tar-rafs"), root("empty")];
    for (i, a) in all.iter().enumerate() {
        assert!(all[i + 1..].iter().all(|b| a != b));
    }
}

/// Computed by `tests/root_digest.py` from `src/tree.tar.gz` unpacked, not from a bootstrap.
#[test]
fn the_root_is_that_of_the_second_implementation() {
    let want = "sha256:054509254e1b09f005d5ed2041afa0fa82e039bccef3706a17d158cba71e64b7";
    assert_eq!(root("toc-sha256").to_string(), want);
}

fn paths(bootstrap: &dyn Bootstrap) -> Vec<Vec<u8>> {
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    let mut paths = Vec::new();
    while let Some(step) = walk.step().unwrap() {
        if matches!(step, Step::Enter(_) | Step::Leaf(_)) {
            paths.push(walk.path().to_vec());
        }
    }
    paths
}

#[test]
fn every_entry_can_be_proved() {
    let bootstrap = open_bytes(golden_bytes("default/image.boot"));
    let root = image_root(&*bootstrap).unwrap();
    for path in paths(&*bootstrap).iter().step_by(7) {
        let json = serde_json::to_string(&prove(&*bootstrap, path).unwrap()).unwrap();
        let proof: Proof = serde_json::from_str(&json).unwrap();
        proof.verify(&root).unwrap();
    }
    assert_eq!(prove(&*bootstrap, b"no/such").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_changed_proof_is_refused() {
    let bootstrap = open_bytes(golden_bytes("default/image.boot"));
    let root = image_root(&*bootstrap).unwrap();
    let proof = serde_json::to_value(prove(&*bootstrap, b"files/one_byte").unwrap()).unwrap();
    let change = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = proof.clone();
        edit(&mut changed);
        assert_ne!(changed, proof);
        serde_json::from_value::<Proof>(changed).unwrap().verify(&root).unwrap_err()
    };
    change(&|p| p["target"]["attributes"]["uid"] = 7.into());
    change(&|p| p["target"]["data"]["size"] = 2.into());
    change(&|p| p["path"] = "files/exact_4k".into());
    change(&|p| p["chunk_size"] = 4096.into());
    change(&|p| p["directories"][1]["children"][0]["name"] = "x".into());
    change(&|p| p["directories"][0]["attributes"]["mtime"] = 1.into());
    let other = TaggedDigest { digest: DigestAlgorithm::Blake3.digest(b""), ..root };
    let intact: Proof = serde_json::from_value(proof.clone()).unwrap();
    assert_eq!(intact.verify(&other).unwrap_err().kind(), ErrorKind::Mismatch);
}

/// Metadata of an inode, its names and its data all show in the root.
#[test]
fn any_change_changes_the_root() {
    let bytes = golden_bytes("default/image.boot");
    let bootstrap = open_bytes(bytes.clone());
    let before = image_root(&*bootstrap).unwrap();
    let find = |path: &[u8]| {
        path.split(|&b| b == b'/')
            .fold(bootstrap.root(), |dir, name| bootstrap.lookup(dir, name).unwrap().unwrap().nid)
    };
    let meta = bootstrap.summary().meta_blkaddr as usize * 4096;
    let nid = find(b"files/one_byte");
    let at = meta + nid.0 as usize * 32;
    let inode = &bytes[at..at + size_of::<ExtendedInode>()];
    assert_eq!(inode[0], 9, "an extended chunk-based inode");
    // Mode, uid, gid, mtime, nanoseconds; chunk digests; a name.
    for (offset, mask) in [(4, 1), (24, 1), (28, 1), (32, 1), (40, 1)] {
        let mut changed = bytes.clone();
        changed[at + offset] ^= mask;
        assert_ne!(image_root(&*open_bytes(changed)).unwrap(), before, "inode byte {offset}");
    }
    let mut linked = bytes.clone();
    // A link count is shown but not covered, so it must be the number of names.
    linked[at + 44] ^= 2;
    assert_eq!(image_root(&*open_bytes(linked)).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut directory = bytes.clone();
    directory[meta + find(b"files").0 as usize * 32 + 44] += 1;
    assert_eq!(image_root(&*open_bytes(directory)).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut chunk = bytes.clone();
    chunk[bootstrap.summary().chunk_table.0 as usize] ^= 1;
    assert_ne!(image_root(&*open_bytes(chunk)).unwrap(), before);
    let mut renamed = bytes.clone();
    let name = bytes.windows(8).position(|w| w == b"one_byte").unwrap();
    renamed[name + 7] = b'f';
    assert_ne!(image_root(&*open_bytes(renamed)).unwrap(), before);
}

/// Link groups of other inodes than files show as well: one inode under two names, or two equal
/// inodes. The builder makes only the latter.
#[test]
fn hard_linked_symlinks_are_told_from_equal_ones() {
    let bytes = golden_bytes("default/image.boot");
    let bootstrap = open_bytes(bytes.clone());
    let mut walk = Walk::new(&*bootstrap, bootstrap.root());
    let mut symlinks = Vec::new();
    while let Some(step) = walk.step().unwrap() {
        if let Step::Leaf(entry) = step
            && entry.file_type == FileType::Symlink
        {
            symlinks.push(entry.nid);
        }
    }
    let meta = bootstrap.summary().meta_blkaddr as usize * 4096;
    let at = |nid: Nid| meta + nid.0 as usize * 32;
    let dirent = |nid: Nid| {
        let found = bytes.windows(11).position(|w| w[..8] == nid.0.to_le_bytes() && w[10] == 7);
        found.expect("every symlink has an entry")
    };
    let (first, second) = (symlinks[0], symlinks[1]);
    let mut linked = bytes.clone();
    let entry = dirent(second);
    linked[entry..entry + 8].copy_from_slice(&first.0.to_le_bytes());
    assert_eq!(image_root(&*open_bytes(linked.clone())).unwrap_err().kind(), ErrorKind::Corrupt);
    linked[at(first) + 44] = 2;
    let linked = open_bytes(linked);
    let root = image_root(&*linked).unwrap();
    // The same tree with the second inode a copy of the first.
    let size = bootstrap.attr(first).unwrap().size;
    let target = bootstrap.read_link(first).unwrap();
    let mut equal = bytes.clone();
    let body = at(second) + size_of::<ExtendedInode>();
    assert!(size <= bootstrap.attr(second).unwrap().size && equal[at(second)] == 5);
    for field in [4..6, 8..16, 24..44] {
        let from = at(first) + field.start..at(first) + field.end;
        equal.copy_within(from, at(second) + field.start);
    }
    equal[body..body + target.len()].copy_from_slice(&target);
    let equal = open_bytes(equal);
    assert_eq!(equal.read_link(first).unwrap(), equal.read_link(second).unwrap());
    assert_ne!(image_root(&*equal).unwrap(), root);
    let mut walk = Walk::new(&*linked, linked.root());
    while let Some(step) = walk.step().unwrap() {
        if let Step::Leaf(entry) = step
            && entry.nid == first
        {
            prove(&*linked, walk.path()).unwrap().verify(&root).unwrap();
        }
    }
}
