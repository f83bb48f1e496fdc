//! Any bytes as a bootstrap, served as disks: every range of these has exactly its bytes, or an error.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rafs::bootstrap::{OpenOptions, from_bytes};
use rafs::disk::{Disks, Part, Piece};
use rafs::fs::{Rafs, RafsOptions};

fuzz_target!(|data: &[u8]| {
    let Ok(image) = from_bytes(data.to_vec(), &OpenOptions::default()) else { return };
    let contexts = image.blobs().iter().map(|_| None).collect();
    let Ok(rafs) = Rafs::new(Arc::from(image), contexts, RafsOptions::default()) else { return };
    let Ok(disks) = Disks::new(&Arc::new(rafs)) else { return };
    let parts: Vec<Part> = disks.parts().chain([Part::Flat]).collect();
    for word in data.chunks_exact(16).rev().take(64) {
        let (start, len) = word.split_at(8);
        let start = u64::from_le_bytes(start.try_into().expect("eight bytes"));
        let len = u64::from(u32::from_le_bytes(len[..4].try_into().expect("four bytes")));
        for part in &parts {
            let size = disks.size(*part);
            for start in [start, start % size.max(1)] {
                let range = start..start.saturating_add(len);
                let mut pieces = Vec::new();
                let Ok(()) = disks.read(*part, range.clone(), &mut pieces) else { continue };
                assert!(range.end <= size);
                assert_eq!(pieces.iter().map(Piece::len).sum::<u64>(), range.end - range.start);
                for piece in pieces {
                    match piece {
                        Piece::Metadata(range) => assert!(range.end <= disks.metadata().len() as u64),
                        Piece::Chunk(slice) => {
                            assert!(
                                u64::from(slice.offset) + u64::from(slice.len) <= slice.extent.len.into()
                            );
                        }
                        Piece::Zeros(_) => {}
                    }
                }
            }
        }
    }
});
