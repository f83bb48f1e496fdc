use gpt_disk_types::{
    GptPartitionAttributes, GptPartitionEntryArrayLayout, GptPartitionEntrySize, GptPartitionName, Guid, Lba,
    LbaLe, U32Le,
};

use super::*;
use crate::engine::fetch;

const BASIC_ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const OTHER_ID: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";

fn guid(hex: &str) -> Guid {
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-").parse().unwrap()
}

fn entry(kind: GptPartitionType, name: &str, guid: Guid, first: u64, last: u64) -> GptPartitionEntry {
    GptPartitionEntry {
        partition_type_guid: kind,
        unique_partition_guid: guid,
        starting_lba: LbaLe::from_u64(first),
        ending_lba: LbaLe::from_u64(last),
        attributes: GptPartitionAttributes::default(),
        name: name.parse::<GptPartitionName>().unwrap(),
    }
}

fn good_entries() -> Vec<GptPartitionEntry> {
    vec![
        entry(GptPartitionType::BASIC_DATA, &BASIC_ID[..32], guid(OTHER_ID.split_at(32).0), 100, 102),
        entry(GptPartitionType::CHROME_OS_ROOT_FS, &OTHER_ID[..32], guid(&OTHER_ID[32..]), 103, 103),
    ]
}

/// A disk of 200 sectors with both copies of a table; every sector's bytes are its number.
struct Image {
    bytes: Vec<u8>,
    block: usize,
}

impl Image {
    const SECTORS: usize = 200;

    fn new(block: BlockSize, entries: &[GptPartitionEntry]) -> Self {
        let size = block.to_usize().unwrap();
        let bytes = (0..Self::SECTORS).flat_map(|n| vec![n as u8; size]).collect();
        let mut image = Self { bytes, block: size };
        image.bytes[..size * 2].fill(0);
        for (my_lba, table_lba) in [(1, 2), (Self::SECTORS - 1, Self::SECTORS - 1 - 16384 / size)] {
            image.write_table(block, my_lba as u64, table_lba as u64, entries);
        }
        image
    }

    fn write_table(&mut self, block: BlockSize, my_lba: u64, table_lba: u64, entries: &[GptPartitionEntry]) {
        let layout = GptPartitionEntryArrayLayout {
            start_lba: Lba(table_lba),
            entry_size: GptPartitionEntrySize::new(128).unwrap(),
            num_entries: 128,
        };
        let at = table_lba as usize * self.block;
        let storage = &mut self.bytes[at..at + 16384];
        storage.fill(0);
        let mut table = GptPartitionEntryArray::new(layout, block, storage).unwrap();
        for (number, entry) in entries.iter().enumerate() {
            *table.get_partition_entry_mut(number as u32).unwrap() = *entry;
        }
        let crc = table.calculate_crc32();
        self.write_header(GptHeader {
            my_lba: LbaLe::from_u64(my_lba),
            partition_entry_lba: LbaLe::from_u64(table_lba),
            number_of_partition_entries: U32Le::from_u32(128),
            partition_entry_array_crc32: crc,
            ..GptHeader::default()
        });
    }

    /// Writes `header` where it says it is, with a right checksum.
    fn write_header(&mut self, mut header: GptHeader) {
        header.update_header_crc32();
        let at = header.my_lba.to_u64() as usize * self.block;
        self.bytes[at..at + size_of::<GptHeader>()].copy_from_slice(bytemuck::bytes_of(&header));
    }

    fn header(&self, lba: usize) -> GptHeader {
        let at = lba * self.block;
        bytemuck::pod_read_unaligned(&self.bytes[at..at + size_of::<GptHeader>()])
    }

    fn disk(&self) -> (tempfile::NamedTempFile, LocalDisk) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &self.bytes).unwrap();
        let disk = LocalDisk::new(file.path(), false);
        (file, disk)
    }
}

async fn read(disk: &LocalDisk, id: &str, start: u64, len: u64) -> Result<Vec<u8>> {
    let blob = disk.blob(&BlobId::new(id).unwrap()).unwrap();
    fetch(&*blob, ByteRange::new(start, len).unwrap(), &ReadContext::on_demand(None)).await
}

async fn failure(image: &Image, id: &str) -> Error {
    let (_file, disk) = image.disk();
    read(&disk, id, 0, 1).await.unwrap_err()
}

#[tokio::test]
async fn partitions_are_found_by_both_kinds_of_name() {
    for block in BLOCK_SIZES {
        let size = block.to_u64();
        let (_file, disk) = Image::new(block, &good_entries()).disk();
        let blob = disk.blob(&BlobId::new(BASIC_ID).unwrap()).unwrap();
        assert_eq!(blob.size(&ReadContext::on_demand(None)).await.unwrap(), 3 * size);
        assert_eq!(read(&disk, BASIC_ID, size - 1, 2).await.unwrap(), [100, 101]);
        assert_eq!(read(&disk, BASIC_ID, 3 * size - 1, 1).await.unwrap(), [102]);
        assert_eq!(read(&disk, OTHER_ID, 0, 2).await.unwrap(), [103, 103]);
    }
}

/// Zero wrong bytes: what a partition does not hold is an error, not its neighbour's data.
#[tokio::test]
async fn a_partition_shorter_than_its_blob_is_an_error() {
    let (_file, disk) = Image::new(BlockSize::BS_512, &good_entries()).disk();
    for (start, len) in [(0, 3 * 512 + 1), (3 * 512, 1), (u64::MAX - 1, 1)] {
        let error = read(&disk, BASIC_ID, start, len).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
}

#[tokio::test]
async fn the_second_table_serves_where_the_first_is_damaged() {
    let good = || Image::new(BlockSize::BS_512, &good_entries());
    // In the header's signature, a checked field of it, the entries.
    for at in [512, 512 + 80, 2 * 512 + 60] {
        let mut image = good();
        image.bytes[at] ^= 1;
        let (_file, disk) = image.disk();
        assert_eq!(read(&disk, BASIC_ID, 0, 1).await.unwrap(), [100], "{at}");
        // Both damaged.
        let last = (Image::SECTORS - 1) * 512;
        image.bytes[last + 30] ^= 1;
        assert_eq!(failure(&image, BASIC_ID).await.kind(), ErrorKind::Corrupt, "{at}");
    }
}

#[tokio::test]
async fn hostile_tables_are_refused() {
    let break_both = |change: &dyn Fn(&mut GptHeader)| {
        let mut image = Image::new(BlockSize::BS_512, &good_entries());
        for lba in [1, Image::SECTORS - 1] {
            let mut header = image.header(lba);
            change(&mut header);
            image.write_header(header);
        }
        image
    };
    let changes: [&dyn Fn(&mut GptHeader); 7] = [
        &|h| h.number_of_partition_entries = U32Le::from_u32(u32::MAX),
        &|h| h.size_of_partition_entry = U32Le::from_u32(u32::MAX),
        &|h| h.size_of_partition_entry = U32Le::from_u32(0),
        &|h| h.size_of_partition_entry = U32Le::from_u32(1 << 31),
        &|h| h.partition_entry_lba = LbaLe::from_u64(u64::MAX),
        &|h| h.partition_entry_lba = LbaLe::from_u64(199),
        &|h| h.header_size = U32Le::from_u32(u32::MAX),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let error = failure(&break_both(change), BASIC_ID).await;
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{number}: {error}");
    }
}

#[tokio::test]
async fn partitions_that_can_not_be_are_refused_when_asked_for() {
    let basic = |name: &str, first, last| entry(GptPartitionType::BASIC_DATA, name, Guid::ZERO, first, last);
    let mut entries = good_entries();
    entries.push(basic("backwards", 5, 4));
    entries.push(basic("outside", 150, 200));
    entries.push(basic("overflow", 1, u64::MAX));
    entries.push(basic("twice", 110, 110));
    entries.push(basic("twice", 111, 111));
    entries.push(entry(GptPartitionType::UNUSED, "unused", Guid::ZERO, 120, 121));
    let image = Image::new(BlockSize::BS_512, &entries);
    for id in ["backwards", "outside", "overflow", "twice"] {
        assert_eq!(failure(&image, id).await.kind(), ErrorKind::Corrupt, "{id}");
    }
    // The second half of an id must fit too, where the partition states one.
    let other_half = format!("{}{}", &OTHER_ID[..32], "0".repeat(32));
    for id in ["unused", "absent", other_half.as_str()] {
        let error = failure(&image, id).await;
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains(id), "{error}");
    }
    let (_file, disk) = image.disk();
    assert_eq!(read(&disk, BASIC_ID, 0, 1).await.unwrap(), [100]);
}

#[tokio::test]
async fn without_a_table_the_disk_is_the_blob() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; 5000]).unwrap();
    let whole = LocalDisk::new(file.path(), true);
    assert_eq!(read(&whole, "any", 0, 5000).await.unwrap(), vec![7; 5000]);
    let error = read(&LocalDisk::new(file.path(), false), "any", 0, 1).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("disable_gpt"), "{error}");
    for len in [0, 1, 512, 700] {
        file.as_file().set_len(len).unwrap();
        assert!(read(&LocalDisk::new(file.path(), false), "any", 0, 1).await.is_err());
    }
    let error = read(&LocalDisk::new("/dev/null", true), "any", 0, 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let error = read(&LocalDisk::new("/nonexistent/disk", true), "any", 0, 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
