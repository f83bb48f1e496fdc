//! Any bytes as a bootstrap: an answer, and what is accepted can be walked to the end.
#![no_main]

use std::ops::ControlFlow;

use libfuzzer_sys::fuzz_target;
use rafs::bootstrap::{FileType, Nid, OpenOptions, Step, Walk, from_bytes};

fuzz_target!(|data: &[u8]| {
    let options = OpenOptions::default();
    let report = rafs::check::structure(data.to_vec(), &options);
    let Ok(image) = from_bytes(data.to_vec(), &options) else {
        assert!(report.map_or(true, |report| !report.is_clean()));
        return;
    };
    let mut walk = Walk::new(&*image, image.root());
    while let Some(step) = walk.step().expect("an accepted image can be walked") {
        let (Step::Enter(entry) | Step::Leaf(entry)) = step else { continue };
        let attr = image.attr(entry.nid).expect("every entry has an inode");
        image.xattrs(entry.nid, &mut |_| ControlFlow::Continue(())).expect("xattrs were checked");
        match attr.file_type {
            FileType::Symlink => drop(image.read_link(entry.nid).expect("targets were checked")),
            FileType::Regular => {
                for position in 0..attr.size.div_ceil(image.summary().chunk_size.into()) {
                    let chunk = image.chunk(entry.nid, position as u32).expect("indexes were checked");
                    let _ = image.chunk_info(chunk.blob, chunk.index);
                }
            }
            _ => {}
        }
    }
    let _ = rafs::merkle::image_root(&*image);
    for word in data.chunks_exact(8).take(64) {
        let nid = Nid(u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let _ = image.attr(nid);
        let _ = image.children(nid, nid.0, &mut |_| ControlFlow::Continue(()));
    }
});
