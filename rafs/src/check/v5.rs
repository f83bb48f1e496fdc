//! What the door lets pass in RAFS v5 because no reader depends on it.

use super::{Counts, tree};
use crate::bootstrap::{Bootstrap, Faults, FileType, Nid, V5};
use crate::format::features::ImageFlags;
use crate::format::v5::{FLAG_HARDLINK, FLAG_SYMLINK, FLAG_XATTR};
use crate::{Error, Result};

/// Totals, flags, reserved fields, names of the prefetch table, link counts.
pub fn check(bootstrap: &V5, faults: &mut Faults) -> Result<Counts> {
    let summary = bootstrap.summary();
    faults.require(!summary.has_xattrs || summary.flags.contains(ImageFlags::HAS_XATTR), || {
        "inodes have xattrs, but the superblock flag is clear".into()
    })?;
    let mut inodes = 0;
    for slot in 1..=bootstrap.slots() {
        let record = bootstrap.record(slot)?;
        inodes += u64::from(record.ino() == u64::from(slot));
        let unknown = record.raw.i_flags.get() & !(FLAG_SYMLINK | FLAG_HARDLINK | FLAG_XATTR);
        let special =
            !matches!(record.file_type, FileType::Regular | FileType::Directory | FileType::Symlink);
        let why = if unknown != 0 {
            format!("unknown flags {unknown:#x}")
        } else if record.raw.reserved != [0; 8] || record.raw.i_projid.get() != 0 {
            "reserved fields are not 0".into()
        } else if special && record.raw.i_size.get() != 0 {
            format!("{} bytes in a {:?}", record.raw.i_size, record.file_type)
        } else {
            continue;
        };
        faults.report(Error::corrupt(format!("inode {slot} at {}: {why}", record.offset)))?;
    }
    let stated = summary.v5.map_or(0, |tables| tables.inodes);
    faults.require(inodes == stated, || format!("superblock: {stated} inodes, the image has {inodes}"))?;
    let listed = bootstrap.prefetch_table();
    for (place, ino) in listed.iter().enumerate().take_while(|(_, ino)| ino.get() != 0) {
        faults.require(bootstrap.attr(Nid(ino.get().into())).is_ok(), || {
            format!("prefetch table, entry {place}: {ino} is not an inode")
        })?;
    }
    tree(bootstrap, faults, &mut |_| {})
}
