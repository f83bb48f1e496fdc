//! A blob record and its stored context: the first 256 bytes are the record.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rafs::blob_context::BlobContext;
use rafs::bootstrap::Blob;
use rafs::format::blob_table::BlobRecord;
use storage::ids::ChunkIndex;
use zerocopy::FromBytes;

fuzz_target!(|data: &[u8]| {
    let Ok((record, stored)) = BlobRecord::ref_from_prefix(data) else { return };
    let Ok(blob) = Blob::from_record(record, record.blob_index.get(), record.chunk_size.get(), None) else {
        return;
    };
    if record.ci_uncompressed_size.get() > 1 << 20 {
        return;
    }
    let contexts = [BlobContext::from_stored(&blob, stored), BlobContext::from_cache_file(&blob, stored)];
    for context in contexts.into_iter().flatten() {
        for index in 0..context.chunk_count() {
            let entry = context.entry(ChunkIndex(index)).expect("the number is in range");
            let (unit, offset) = context.unit(&entry).expect("entries were checked");
            assert!(unit.compressed.end() <= blob.data_size);
            assert!(offset + entry.uncompressed_size <= unit.decoded_len);
        }
        let file = context.to_cache_file();
        BlobContext::from_cache_file(&blob, &file).expect("what was written can be read");
    }
});
