//! Blobs in the partitions of a disk of this machine.
//!
//! A disk (a device, or an image file) has a GUID partition table with one partition per blob:
//!
//! ```text
//! type          | partition name    | partition GUID     | blob id
//! basic data    | first 32 of id    | any                | the one that starts so
//! any other     | first 32 of id    | last 32 of id      | name and GUID, one behind the other
//! ```
//!
//! Without a table (`disable_gpt`) the whole disk is the blob, whatever its id. The table is
//! read at the first read and is not trusted: both copies are bounded and compared with their
//! checksums, the second is used where the first is damaged, and a partition lies within the disk.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use futures_util::future::BoxFuture;
use gpt_disk_types::{BlockSize, GptHeader, GptPartitionEntry, GptPartitionEntryArray, GptPartitionType};

use super::localfs::{Opened, blocking};
use super::{Backend, BlobSource, ByteStream, ReadContext};
use crate::ids::{BlobId, ByteRange};
use crate::{Error, ErrorKind, Result};

/// Sector sizes that disks have.
const BLOCK_SIZES: [BlockSize; 2] = [BlockSize::BS_512, BlockSize::BS_4096];
/// A longer table is not read: room for 32768 partitions, 256 times the usual.
const MAX_TABLE_SIZE: u64 = 4 << 20;
/// Characters of an id that a partition name holds.
const NAME_LEN: usize = 32;

/// The `localdisk` backend.
#[derive(Clone, Debug)]
pub struct LocalDisk {
    path: PathBuf,
    disable_gpt: bool,
    opened: Arc<OnceLock<Arc<Disk>>>,
}

#[derive(Debug)]
struct Disk {
    file: Arc<File>,
    size: u64,
    partitions: Vec<Partition>,
}

/// A partition that may hold a blob.
#[derive(Debug, PartialEq, Eq)]
struct Partition {
    name: String,
    /// The second half of the id; `None` where the type is basic data.
    rest: Option<String>,
    /// Where it lies; `None` if that is not within the disk.
    place: Option<ByteRange>,
}

impl LocalDisk {
    /// The disk `path`, a block device or a regular file; with `disable_gpt` all of it is one
    /// blob. Does no I/O.
    pub fn new(path: impl Into<PathBuf>, disable_gpt: bool) -> Self {
        Self { path: path.into(), disable_gpt, opened: Arc::default() }
    }

    async fn disk(&self, context: &ReadContext) -> Result<Arc<Disk>> {
        if let Some(disk) = self.opened.get() {
            return Ok(disk.clone());
        }
        let (path, disable_gpt) = (self.path.clone(), self.disable_gpt);
        let disk = blocking(context, "open a disk", move || Disk::open(&path, disable_gpt)).await?;
        // Another reader may have been first; both read the same disk.
        Ok(self.opened.get_or_init(|| Arc::new(disk)).clone())
    }
}

impl BlobSource for LocalDisk {
    fn kind(&self) -> &'static str {
        "localdisk"
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(DiskBlob { disk: self.clone(), id: id.clone(), opened: OnceLock::new() }))
    }
}

/// One blob of a disk.
#[derive(Debug)]
struct DiskBlob {
    disk: LocalDisk,
    id: BlobId,
    opened: OnceLock<Arc<Opened>>,
}

impl DiskBlob {
    async fn opened(&self, context: &ReadContext) -> Result<Arc<Opened>> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened.clone());
        }
        let disk = self.disk.disk(context).await?;
        let path = self.disk.path.clone();
        let place = if self.disk.disable_gpt {
            ByteRange::new(0, disk.size)?
        } else {
            disk.find(&self.id).map_err(|e| e.context(path.display()))?
        };
        let opened = Opened { path, file: disk.file.clone(), base: place.start(), size: place.len() };
        Ok(self.opened.get_or_init(|| Arc::new(opened)).clone())
    }
}

impl Backend for DiskBlob {
    /// The partition's size, which may be larger than the blob's.
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        Box::pin(async { Ok(self.opened(context).await?.size) })
    }

    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        Box::pin(async move { self.opened(context).await?.stream(range, context) })
    }
}

impl Disk {
    fn open(path: &Path, disable_gpt: bool) -> Result<Self> {
        let failed = |e| Error::io(format!("open {}", path.display()), e);
        let mut file = crate::outside::open_device(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let why = format!("{}: neither a block device nor a regular file", path.display());
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        // A device's metadata tells no size.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let partitions = if disable_gpt {
            Vec::new()
        } else {
            read_partitions(&file, size).map_err(|e| e.context(path.display()))?
        };
        Ok(Self { file: Arc::new(file), size, partitions })
    }

    fn find(&self, id: &BlobId) -> Result<ByteRange> {
        let (name, rest) = id.as_str().split_at(id.as_str().len().min(NAME_LEN));
        let mut found = self
            .partitions
            .iter()
            .filter(|p| p.name == name && p.rest.as_deref().is_none_or(|given| given == rest));
        match (found.next(), found.next()) {
            (Some(Partition { place: Some(place), .. }), None) => Ok(*place),
            (Some(_), None) => {
                let why = format!("the partition of blob {id} does not lie within the disk");
                Err(Error::new(ErrorKind::Corrupt, why))
            }
            (None, _) => Err(Error::new(ErrorKind::NotFound, format!("no partition is named for blob {id}"))),
            (Some(_), Some(_)) => {
                let why = format!("more than one partition is named for blob {id}");
                Err(Error::new(ErrorKind::Corrupt, why))
            }
        }
    }
}

/// The partitions by the first copy of the table that is whole.
fn read_partitions(file: &File, size: u64) -> Result<Vec<Partition>> {
    let first = BLOCK_SIZES.map(|block| (block, block.to_u64()));
    let second = BLOCK_SIZES.map(|block| (block, (size / block.to_u64()).saturating_sub(1) * block.to_u64()));
    let mut damage = Vec::new();
    for (number, (block, at)) in first.into_iter().chain(second).enumerate() {
        match read_table(file, size, block, at) {
            Ok(Some(partitions)) => {
                if number >= first.len() {
                    tracing::warn!(
                        "the first partition table of a disk is damaged, the second is used: {}",
                        damage.join("; ")
                    );
                }
                return Ok(partitions);
            }
            Ok(None) => {}
            Err(e) if e.kind() == ErrorKind::Corrupt => damage.push(e.to_string()),
            Err(e) => return Err(e),
        }
    }
    Err(if damage.is_empty() {
        let why =
            "no GUID partition table; partition the disk, or set `disable_gpt` if all of it is one blob";
        Error::new(ErrorKind::Invalid, why)
    } else {
        let why = format!("no copy of the GUID partition table is whole: {}", damage.join("; "));
        Error::new(ErrorKind::Corrupt, why)
    })
}

/// The table whose header is at `at`; `None` if there is no header.
fn read_table(file: &File, size: u64, block: BlockSize, at: u64) -> Result<Option<Vec<Partition>>> {
    let corrupt =
        |why: &str| Error::new(ErrorKind::Corrupt, format!("partition table header at byte {at}: {why}"));
    let Some(header) = read_at(file, size, at, size_of::<GptHeader>() as u64)? else { return Ok(None) };
    let header: GptHeader = bytemuck::pod_read_unaligned(&header);
    if !header.is_signature_valid() {
        return Ok(None);
    }
    // A longer header is of a revision that does not exist.
    if header.header_size.to_u32() as usize != size_of::<GptHeader>() {
        return Err(corrupt("not 92 bytes"));
    }
    if header.calculate_header_crc32() != header.header_crc32 {
        return Err(corrupt("wrong checksum"));
    }
    if header.my_lba.to_u64().checked_mul(block.to_u64()) != Some(at) {
        return Err(corrupt("belongs elsewhere"));
    }
    let layout = header.get_partition_entry_array_layout().map_err(|_| corrupt("bad entry size"))?;
    let len = layout.num_bytes_rounded_to_block(block).filter(|len| *len <= MAX_TABLE_SIZE);
    let len = len.ok_or_else(|| corrupt("more partitions than 4 MiB of table hold"))?;
    let table = match layout.start_lba.to_u64().checked_mul(block.to_u64()) {
        Some(start) => read_at(file, size, start, len)?,
        None => None,
    };
    let mut table = table.ok_or_else(|| corrupt("its entries do not lie within the disk"))?;
    let table = GptPartitionEntryArray::new(layout, block, &mut table)
        .map_err(|e| corrupt("its entries do not lie within the disk").with_source(e))?;
    if table.calculate_crc32() != header.partition_entry_array_crc32 {
        return Err(corrupt("its entries have a wrong checksum"));
    }
    let entries = (0..layout.num_entries).filter_map(|index| table.get_partition_entry(index));
    Ok(Some(entries.filter(|e| e.is_used()).map(|e| Partition::new(e, size, block)).collect()))
}

impl Partition {
    fn new(entry: &GptPartitionEntry, disk_size: u64, block: BlockSize) -> Self {
        // Copied out: the record is packed.
        let (name, kind, guid) = (entry.name, entry.partition_type_guid, entry.unique_partition_guid);
        let place = entry.lba_range().and_then(|lbas| {
            let start = lbas.start().to_u64().checked_mul(block.to_u64())?;
            let place = ByteRange::new(start, lbas.num_bytes(block)?).ok()?;
            (place.end() <= disk_size).then_some(place)
        });
        let rest = (kind != GptPartitionType::BASIC_DATA).then(|| guid.to_string().replace('-', ""));
        Self { name: name.chars().collect(), rest, place }
    }
}

/// `len` bytes at `at`; `None` if the disk of `size` bytes ends before.
fn read_at(file: &File, size: u64, at: u64, len: u64) -> Result<Option<Vec<u8>>> {
    if at.checked_add(len).is_none_or(|end| end > size) {
        return Ok(None);
    }
    // At most MAX_TABLE_SIZE.
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, at).map_err(|e| Error::io(format!("read at {at}"), e))?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests;
