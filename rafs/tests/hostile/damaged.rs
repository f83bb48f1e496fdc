//! Damage of every kind: no bytes whatever make the reader panic or hang.

use proptest::prelude::*;

use super::*;

/// Whatever the bytes: an answer, and what is accepted can be used in full.
pub fn survive(bytes: Vec<u8>) -> bool {
    let report = rafs::check::structure(bytes.clone(), &OpenOptions::default());
    let Ok(image) = from_bytes(bytes, &OpenOptions::default()) else {
        assert!(report.is_err() || !report.unwrap().is_clean());
        return false;
    };
    visit_all(&*image);
    let _ = image_root(&*image);
    let _ = image.prefetch();
    assert!(report.is_ok());
    true
}

/// Edits anywhere in a file, and perhaps an end that comes too early.
#[derive(Debug)]
pub struct Damage {
    edits: Vec<(prop::sample::Index, u8, u64)>,
    cut: Option<prop::sample::Index>,
}

/// Some damage.
pub fn damage() -> impl Strategy<Value = Damage> {
    let edits = prop::collection::vec((any::<prop::sample::Index>(), 0u8..4, any::<u64>()), 1..6);
    let cut = prop::option::weighted(0.05, any::<prop::sample::Index>());
    (edits, cut).prop_map(|(edits, cut)| Damage { edits, cut })
}

impl Damage {
    /// The damaged form of `intact`.
    pub fn of(&self, intact: &[u8]) -> Vec<u8> {
        let mut bytes = intact.to_vec();
        for (at, kind, value) in &self.edits {
            let at = at.index(bytes.len() - 8);
            match kind {
                0 => bytes[at] ^= 1 << (value & 7),
                1 => bytes[at] = *value as u8,
                2 => bytes[at & !3..][..4].copy_from_slice(&(*value as u32).to_le_bytes()),
                _ => bytes[at & !7..][..8].copy_from_slice(&value.to_le_bytes()),
            }
        }
        if let Some(cut) = &self.cut {
            let len = cut.index(bytes.len());
            bytes.truncate(len);
        }
        bytes
    }
}

const IMAGES: [&str; 9] =
    ["default", "batch", "merged", "chunkdict", "tar-rafs", "prefetch", "zran", "encrypt", "tarfs"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_bootstraps_are_refused_or_work(
        image in prop::sample::select(&IMAGES[..]),
        damage in damage(),
    ) {
        survive(damage.of(&golden_bytes(&format!("{image}/image.boot"))));
    }

    /// Most of a golden file is names and padding; here the damage is where fields are.
    #[test]
    fn damaged_fields_are_refused_or_work(
        image in prop::sample::select(&IMAGES[..]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..64, any::<u8>()), 1..4),
    ) {
        let mut bytes = golden_bytes(&format!("{image}/image.boot"));
        let tree = open_bytes(bytes.clone());
        let meta = tree.summary().meta_blkaddr as usize * 4096;
        let mut places = vec![SB, SB + 64, EXT, SLOT, SLOT + 64];
        places.extend((0..tree.blobs().len() * 4).map(|i| BLOBS + i * 64));
        places.extend((0..8).map(|i| tree.summary().chunk_table.0 as usize + i * 80));
        let mut walk = Walk::new(&*tree, tree.root());
        while let Some(step) = walk.step().unwrap() {
            if let Step::Enter(entry) | Step::Leaf(entry) = step {
                let at = meta + entry.nid.0 as usize * 32;
                places.extend([at, at, at + 64]);
            }
        }
        for (place, offset, value) in edits {
            let at = (places[place.index(places.len())] + offset).min(bytes.len() - 1);
            bytes[at] = value;
        }
        survive(bytes);
    }

    #[test]
    fn any_nid_and_cursor_gets_an_answer(nid in any::<u64>(), near in 0u64..4000, cursor in any::<u64>()) {
        let image = open_bytes(golden_bytes("default/image.boot"));
        let contexts = Vec::new();
        let rafs = Rafs::new(image.clone(), contexts, RafsOptions::default()).unwrap();
        for nid in [nid, near, nid >> 24, image.root().0].map(Nid) {
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
            let _ = rafs.seek(nid, cursor, SeekKind::Data);
            let _ = rafs.getxattr(nid, b"user.x");
            let _ = rafs.listxattr(nid);
        }
    }
}
