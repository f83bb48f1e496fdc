//! Any bytes as a blob file: sections, and the bootstrap inside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rafs::Error;
use rafs::blob_file::BlobFile;
use storage::ids::ByteRange;

fuzz_target!(|data: &[u8]| {
    let mut read = |range: ByteRange| {
        data.get(range.start() as usize..range.end() as usize)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| Error::corrupt("beyond the file"))
    };
    let Ok(file) = BlobFile::read(data.len() as u64, &mut read) else { return };
    for section in file.sections() {
        let _ = file.decode(section.name, 1 << 20, &mut read);
    }
});
