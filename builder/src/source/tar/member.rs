//! Members of a tar stream: headers with everything that extends them, and their data.
//!
//! The headers' layout is the tar crate's. Its iterator is not used: it reads extension headers
//! of any size into memory, splits pax values at newlines, and reads neither pax sparse files nor
//! global headers. Container runtimes cap an extension header at 1 MiB, and so does this reader.

use std::io::{self, BufReader, Read};

use tar::Header;

use super::fields;
use super::pax::Extensions;
use crate::pipeline::Extent;
use crate::tree::{Xattr, shown};
use crate::{Error, ErrorKind, Result};

pub(super) const BLOCK: usize = 512;
/// Bytes read ahead of the parser.
const INPUT_BUFFER: usize = 128 << 10;
/// Largest pax or long-name header, and all global headers together.
const MAX_EXTENSION: u64 = 1 << 20;
/// Bytes that may follow the end marker; writers pad to 10 KiB, some to a disk block.
const MAX_TRAILER: u64 = 64 << 20;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One member with all extensions applied. Its data is read with [`Members::data`].
#[derive(Debug)]
pub(super) struct Member {
    pub kind: Kind,
    pub path: Vec<u8>,
    /// Target of a symlink or hard link.
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub xattrs: Vec<Xattr>,
    /// Length of the file.
    pub size: u64,
    /// Where its stored data goes, if it is sparse.
    pub extents: Option<Vec<Extent>>,
}

/// Reads a tar stream member by member.
pub(super) struct Members<R: Read> {
    input: BufReader<R>,
    /// Bytes of the stream so far.
    position: u64,
    /// Data of the current member that is still to come, and the padding behind it.
    pub(super) left: u64,
    padding: u64,
    global: Extensions,
    global_size: u64,
}

impl<R: Read> Members<R> {
    pub fn new(input: R) -> Self {
        Self {
            input: BufReader::with_capacity(INPUT_BUFFER, input),
            position: 0,
            left: 0,
            padding: 0,
            global: Extensions::default(),
            global_size: 0,
        }
    }

    /// The next member, or `None` at the end marker, or where the stream ends between two members
    /// and `end_required` is not set. What was not read of the previous one's data is skipped.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Limit`: the header; the message names the entry as far as it is
    /// known. Otherwise what the input fails with.
    pub fn next(&mut self, end_required: bool) -> Result<Option<Member>> {
        let (mut long_path, mut long_link) = (None, None);
        let mut local: Option<Extensions> = None;
        loop {
            self.skip()?;
            let mut header = Header::new_old();
            let Some(()) = self.header(&mut header)? else {
                if local.is_some() || long_path.is_some() || long_link.is_some() {
                    return Err(Error::bad_source("the archive ends after an extension header"));
                }
                if end_required {
                    return Err(Error::bad_source(format!(
                        "the archive ends at byte {} without an end marker; it is cut short",
                        self.position
                    )));
                }
                return Ok(None);
            };
            if header.as_bytes().iter().all(|&b| b == 0) {
                return Ok(None);
            }
            check_sum(&header)?;
            match header.as_old().linkflag[0] {
                b'L' => long_path = Some(self.long_name(&header)?),
                b'K' => long_link = Some(self.long_name(&header)?),
                b'x' | b'X' => {
                    let mut extensions = self.global.clone();
                    let data = self.extension(&header)?;
                    extensions.apply(&data)?;
                    local = Some(extensions);
                }
                b'g' => {
                    let data = self.extension(&header)?;
                    self.global_size += data.len() as u64;
                    if self.global_size > MAX_EXTENSION {
                        return Err(Error::limit("global pax headers of more than 1 MiB"));
                    }
                    self.global.apply(&data)?;
                }
                // The label of a GNU volume is not an entry.
                b'V' => {}
                _ => {
                    let mut extensions = local.take().unwrap_or_else(|| self.global.clone());
                    let sparse_name = extensions.sparse.name.take();
                    // Long names win over pax paths, as in container runtimes.
                    extensions.path = sparse_name.or(long_path).or(extensions.path);
                    extensions.link = long_link.or(extensions.link);
                    return self.member(&header, extensions).map(Some);
                }
            }
        }
    }

    /// Byte of the stream where the current member's data begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The stored data of the current member.
    pub fn data(&mut self) -> Data<'_, R> {
        Data { members: self }
    }

    /// Reads what follows the end marker, so that whoever writes the stream is not cut off.
    ///
    /// # Errors
    /// `Limit`: it goes on and on. Otherwise what the input fails with.
    pub fn drain(&mut self) -> Result<()> {
        let mut buffer = vec![0; INPUT_BUFFER];
        let mut total = 0;
        loop {
            match self.some(&mut buffer)? {
                0 => return Ok(()),
                got => total += got as u64,
            }
            if total > MAX_TRAILER {
                return Err(Error::limit(format!(
                    "more than {MAX_TRAILER} bytes follow the end marker of the archive"
                )));
            }
        }
    }

    fn member(&mut self, header: &Header, ext: Extensions) -> Result<Member> {
        let path = ext.path.clone().unwrap_or_else(|| header.path_bytes().into_owned());
        self.member_at(header, ext, path.clone())
            .map_err(|e| e.context(format_args!("entry {}", shown(&path))))
    }

    fn member_at(&mut self, header: &Header, ext: Extensions, path: Vec<u8>) -> Result<Member> {
        let old = header.as_old();
        let flag = old.linkflag[0];
        let kind = match flag {
            // Before POSIX a directory was a file whose name ends with a slash.
            0 if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "a tar entry of type {:?}, which no container runtime unpacks",
                        char::from(other)
                    ),
                ));
            }
        };
        let stored = match ext.size {
            Some(size) => size,
            None => unsigned(&old.size, "size")?,
        };
        // The size of anything but a file says nothing (it is that of a hard link's target, or
        // what `stat` said of a directory); no data follows.
        let stored = if kind == Kind::Regular { stored } else { 0 };
        self.left = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        if stored > i64::MAX as u64 {
            return Err(Error::bad_source(format!("an impossible size, {stored}")));
        }
        let (size, extents) = match kind {
            Kind::Regular if flag == b'S' => self.gnu_sparse(header)?,
            Kind::Regular => self.pax_sparse(&ext.sparse)?,
            _ => (0, None),
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => device(header)?,
            _ => (0, 0),
        };
        let mtime = match ext.mtime {
            Some(time) => time,
            None => (
                fields::number(&old.mtime).ok_or_else(|| Error::bad_source("its mtime is not a number"))?,
                0,
            ),
        };
        Ok(Member {
            kind,
            link: ext.link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
            path,
            // Beyond the permissions it repeats the type, in some archives.
            mode: (unsigned(&old.mode, "mode")? & 0o7777) as u32,
            uid: owner(ext.uid, &old.uid, "uid")?,
            gid: owner(ext.gid, &old.gid, "gid")?,
            mtime,
            device,
            xattrs: ext.xattrs,
            size,
            extents,
        })
    }

    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut name = self.extension(header)?;
        if let Some(end) = name.iter().position(|&b| b == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    /// The data of an extension header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>> {
        let size = unsigned(&header.as_old().size, "size")?;
        if size > MAX_EXTENSION {
            return Err(Error::limit(format!(
                "an extension header of {size} bytes at byte {}; at most {MAX_EXTENSION} are accepted",
                self.position - BLOCK as u64
            )));
        }
        let mut data = vec![0; size as usize];
        self.exact(&mut data, "an extension header")?;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        Ok(data)
    }

    /// Reads a header; `None` if the stream ends just here.
    fn header(&mut self, header: &mut Header) -> Result<Option<()>> {
        let bytes = header.as_mut_bytes();
        let mut filled = 0;
        while filled < BLOCK {
            match self.some(&mut bytes[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(self.cut_short("a header")),
                got => filled += got,
            }
        }
        Ok(Some(()))
    }

    pub(super) fn exact(&mut self, bytes: &mut [u8], what: &str) -> Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.some(&mut bytes[filled..])? {
                0 => return Err(self.cut_short(what)),
                got => filled += got,
            }
        }
        Ok(())
    }

    /// Skips what is left of the current member.
    fn skip(&mut self) -> Result<()> {
        let mut rest = self.left + self.padding;
        let mut buffer = [0; 4096];
        while rest > 0 {
            let len = rest.min(buffer.len() as u64) as usize;
            match self.some(&mut buffer[..len])? {
                0 => return Err(self.cut_short("an entry")),
                got => rest -= got as u64,
            }
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    fn some(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.input.read(buffer) {
                Ok(got) => {
                    self.position += got as u64;
                    return Ok(got);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_damage(&e) => {
                    return Err(Error::bad_source(format!(
                        "its compression is damaged at byte {} of the archive",
                        self.position
                    ))
                    .with_source(e));
                }
                Err(e) => return Err(Error::io(format!("read at byte {}", self.position), e)),
            }
        }
    }

    fn cut_short(&self, what: &str) -> Error {
        Error::bad_source(format!("the archive ends at byte {}, inside {what}", self.position))
    }
}

/// What decoders say of damaged input; errors of this crate that pass through are `Other`.
fn is_damage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof
    )
}

/// The stored data of one member.
pub(super) struct Data<'a, R: Read> {
    members: &'a mut Members<R>,
}

impl<R: Read> Read for Data<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.members.left;
        if left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let len = left.min(buffer.len() as u64) as usize;
        let got = self.members.some(&mut buffer[..len]).map_err(Error::into_io)?;
        if got == 0 {
            return Err(self.members.cut_short("the data of an entry").into_io());
        }
        self.members.left -= got as u64;
        Ok(got)
    }
}

/// Compares the checksum; some old writers summed signed bytes.
fn check_sum(header: &Header) -> Result<()> {
    let bytes = header.as_bytes();
    let counted = bytes[..148].iter().chain(&[b' '; 8]).chain(&bytes[156..]);
    let unsigned: i64 = counted.clone().map(|&b| i64::from(b)).sum();
    let signed: i64 = counted.map(|&b| i64::from(b.cast_signed())).sum();
    match fields::number(&header.as_old().cksum) {
        Some(sum) if sum == unsigned || sum == signed => Ok(()),
        _ => Err(Error::bad_source("a header with a wrong checksum; this is not a tar archive, or damaged")),
    }
}

pub(super) fn unsigned(field: &[u8], what: &str) -> Result<u64> {
    fields::number(field)
        .and_then(|n| u64::try_from(n).ok())
        .ok_or_else(|| Error::bad_source(format!("a header whose {what} is not a number")))
}

fn owner(pax: Option<u64>, field: &[u8], what: &str) -> Result<u32> {
    let id = match pax {
        Some(id) => id,
        None => unsigned(field, what)?,
    };
    // 2^32 - 1 means "unchanged" to chown.
    u32::try_from(id)
        .ok()
        .filter(|&id| id != u32::MAX)
        .ok_or_else(|| Error::limit(format!("its {what} is {id}, at most 4294967294 is possible")))
}

fn device(header: &Header) -> Result<(u32, u32)> {
    // Both formats have them in the same place; before POSIX there were none.
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(h), _) => (&h.dev_major, &h.dev_minor),
        (None, Some(h)) => (&h.dev_major, &h.dev_minor),
        (None, None) => return Err(Error::bad_source("a device in a header that has no device numbers")),
    };
    let (major, minor) = (unsigned(major, "major number")?, unsigned(minor, "minor number")?);
    match (u32::try_from(major), u32::try_from(minor)) {
        // Bits of the kernel's dev_t.
        (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => Ok((major, minor)),
        _ => Err(Error::limit(format!("device {major}:{minor}; at most 4095:1048575 is possible"))),
    }
}
