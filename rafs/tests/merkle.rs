//! The image root digest: one value for one tree, and proofs of its entries.

mod support;

use rafs::ErrorKind;
use rafs::bootstrap::{Bootstrap, Step, Walk};
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
    // Mode, uid, gid, mtime, nanoseconds; chunk digests; a name; link counts do not matter.
    for (offset, mask) in [(4, 1), (24, 1), (28, 1), (32, 1), (40, 1)] {
        let mut changed = bytes.clone();
        changed[at + offset] ^= mask;
        assert_ne!(image_root(&*open_bytes(changed)).unwrap(), before, "inode byte {offset}");
    }
    let mut linked = bytes.clone();
    linked[at + 44] ^= 2;
    assert_eq!(image_root(&*open_bytes(linked)).unwrap(), before);
    let mut chunk = bytes.clone();
    chunk[bootstrap.summary().chunk_table.0 as usize] ^= 1;
    assert_ne!(image_root(&*open_bytes(chunk)).unwrap(), before);
    let mut renamed = bytes.clone();
    let name = bytes.windows(8).position(|w| w == b"one_byte").unwrap();
    renamed[name + 7] = b'f';
    assert_ne!(image_root(&*open_bytes(renamed)).unwrap(), before);
}
