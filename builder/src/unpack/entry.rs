//! Headers of a PAX archive: whatever a ustar header can not hold goes into a record before it.

use std::borrow::Cow;
use std::io::Write;

use rafs::bootstrap::Attr;
use tar::{EntryType, Header};

use super::OwnedXattr;
use crate::tree::shown;
use crate::{Error, ErrorKind, Result};

const BLOCK: usize = 512;
/// Longest name or link target of a ustar header, without splitting it.
const NAME_LEN: usize = 100;
/// Largest owner: seven octal digits.
const MAX_ID: u32 = 0o7_777_777;
/// Largest size and time: eleven octal digits.
const MAX_NUMBER: u64 = 0o77_777_777_777;
/// Name of the members that carry records; extractors that know none make a file of it.
const PAX_NAME: &[u8] = b"././@PaxHeader";

/// What an entry is.
pub(super) enum Kind<'a> {
    /// Regular file of so many bytes, which follow.
    Regular(u64),
    /// Another name of the file at this path, which came before.
    HardLink(Vec<u8>),
    Directory,
    Symlink(Cow<'a, [u8]>),
    /// Major and minor number.
    CharDevice((u32, u32)),
    BlockDevice((u32, u32)),
    Fifo,
}

/// One entry.
pub(super) struct Entry<'a> {
    /// Relative, without `./`.
    pub(super) path: &'a [u8],
    pub(super) kind: Kind<'a>,
    pub(super) attr: &'a Attr,
    pub(super) xattrs: &'a [OwnedXattr],
}

/// Writes an archive front to back.
pub(super) struct TarWriter<W> {
    out: W,
    records: Vec<u8>,
}

impl<W: Write> TarWriter<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, records: Vec::new() }
    }

    /// Writes the header of an entry, and before it what does not fit there.
    pub(super) fn header(&mut self, entry: &Entry<'_>) -> Result<()> {
        self.records.clear();
        let attr = entry.attr;
        let mut header = Header::new_ustar();
        let (kind, target, size): (EntryType, &[u8], u64) = match &entry.kind {
            Kind::Regular(size) => (EntryType::Regular, b"", *size),
            Kind::HardLink(target) => (EntryType::Link, target, 0),
            Kind::Directory => (EntryType::Directory, b"", 0),
            Kind::Symlink(target) => (EntryType::Symlink, target, 0),
            Kind::CharDevice(_) => (EntryType::Char, b"", 0),
            Kind::BlockDevice(_) => (EntryType::Block, b"", 0),
            Kind::Fifo => (EntryType::Fifo, b"", 0),
        };
        header.set_entry_type(kind);
        let path = match kind {
            EntryType::Directory => Cow::Owned([entry.path, b"/"].concat()),
            _ => Cow::Borrowed(entry.path),
        };
        if let Some(ustar) = header.as_ustar_mut() {
            name(&mut self.records, b"path", &path, &mut ustar.name);
            name(&mut self.records, b"linkpath", target, &mut ustar.linkname);
        }
        header.set_mode(attr.mode & 0o7777);
        let id = |records: &mut Vec<u8>, key, id: u32| {
            if id <= MAX_ID {
                return u64::from(id);
            }
            record(records, key, id.to_string().as_bytes());
            0
        };
        header.set_uid(id(&mut self.records, b"uid", attr.uid));
        header.set_gid(id(&mut self.records, b"gid", attr.gid));
        if size > MAX_NUMBER {
            record(&mut self.records, b"size", size.to_string().as_bytes());
        }
        header.set_size(if size > MAX_NUMBER { 0 } else { size });
        let whole = u64::try_from(attr.mtime).ok().filter(|&seconds| seconds <= MAX_NUMBER);
        header.set_mtime(whole.unwrap_or(0));
        if whole.is_none() || attr.mtime_nsec != 0 {
            record(&mut self.records, b"mtime", time(attr.mtime, attr.mtime_nsec).as_bytes());
        }
        if let Kind::CharDevice((major, minor)) | Kind::BlockDevice((major, minor)) = entry.kind {
            let fits = header.set_device_major(major).and_then(|()| header.set_device_minor(minor));
            fits.map_err(|e| Error::io("device numbers", e))?;
        }
        // Those of a hard link are its target's.
        if !matches!(kind, EntryType::Link) {
            for (key, value) in entry.xattrs {
                self.xattr(key, value)?;
            }
        }
        header.set_cksum();
        self.flush_records()?;
        self.write(header.as_bytes())
    }

    /// Writes file data.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.write(bytes)
    }

    /// Fills the last block of `len` bytes of data.
    pub(super) fn pad(&mut self, len: u64) -> Result<()> {
        // Below 512.
        let over = (len % BLOCK as u64) as usize;
        if over == 0 { Ok(()) } else { self.write(&[0; BLOCK][over..]) }
    }

    /// Writes the end mark.
    pub(super) fn finish(mut self) -> Result<()> {
        self.write(&[0; 2 * BLOCK])?;
        self.out.flush().map_err(|e| Error::io("write the archive", e))
    }

    fn xattr(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        // A record's key ends at its first equals sign.
        if key.iter().any(|&b| b == b'=' || b == 0) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "tar can not hold the extended attribute {}: its name has an equals sign",
                    shown(key)
                ),
            ));
        }
        record(&mut self.records, &[b"SCHILY.xattr.", key].concat(), value);
        Ok(())
    }

    fn flush_records(&mut self) -> Result<()> {
        if self.records.is_empty() {
            return Ok(());
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        if let Some(ustar) = header.as_ustar_mut() {
            ustar.name[..PAX_NAME.len()].copy_from_slice(PAX_NAME);
        }
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(self.records.len() as u64);
        header.set_cksum();
        let records = std::mem::take(&mut self.records);
        self.write(header.as_bytes())?;
        self.write(&records)?;
        self.pad(records.len() as u64)?;
        self.records = records;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| Error::io("write the archive", e))
    }
}

/// Puts a name into its field; what is longer, or not plain ASCII, into a record as well.
fn name(records: &mut Vec<u8>, key: &[u8], value: &[u8], field: &mut [u8; NAME_LEN]) {
    let len = value.len().min(NAME_LEN);
    field[..len].copy_from_slice(&value[..len]);
    if value.len() > NAME_LEN || !value.is_ascii() {
        record(records, key, value);
    }
}

/// Appends `LENGTH KEY=VALUE\n`; the length counts its own digits.
///
/// (The tar crate's writer of records takes keys as text only, but names of xattrs are bytes.)
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    records.extend_from_slice(len.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// `[-]SECONDS[.NANOSECONDS]`; the nanoseconds count upwards from the seconds, which may be negative.
fn time(seconds: i64, nanos: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    let sign = if total < 0 { "-" } else { "" };
    let (seconds, nanos) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    match nanos {
        0 => format!("{sign}{seconds}"),
        _ => format!("{sign}{seconds}.{nanos:09}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_record_counts_itself() {
        for value in [0, 1, 85, 86, 87, 88, 984, 985, 986, 987, 9983] {
            let mut out = Vec::new();
            record(&mut out, b"path", &vec![b'x'; value]);
            let blank = out.iter().position(|&b| b == b' ').unwrap();
            let stated: usize = std::str::from_utf8(&out[..blank]).unwrap().parse().unwrap();
            assert_eq!(stated, out.len(), "value of {value} bytes");
        }
    }

    #[test]
    fn times_before_the_epoch_count_up_to_it() {
        for (seconds, nanos, want) in [
            (5, 0, "5"),
            (5, 30, "5.000000030"),
            (-1, 0, "-1"),
            (-2, 500_000_000, "-1.500000000"),
            (-1, 999_999_999, "-0.000000001"),
            (i64::MIN, 0, "-9223372036854775808"),
        ] {
            assert_eq!(time(seconds, nanos), want);
        }
    }
}
