//! Where an index comes from: a file of its own, or the end of its layer.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use flate2::bufread::{GzDecoder, MultiGzDecoder};
use tar::Header;

use super::entry::MAX_INDEX;
use crate::{Error, Result};

/// Bytes of the footer: an empty gzip member whose extra field says where the index begins.
const FOOTER: u64 = 51;
/// The same as older writers made it, without name and length of a sub-field.
const OLD_FOOTER: u64 = 47;
/// What stands in the extra field behind 16 hexadecimal digits.
const MARK: &[u8] = b"STARGZ";
/// The sub-field's name and length.
const SUBFIELD: [u8; 4] = [b'S', b'G', 22, 0];
/// Name of the index in its tar.
const NAME: &[u8] = b"stargz.index.json";
/// An index, not read yet.
pub struct Index {
    /// Its JSON.
    pub json: Box<dyn Read>,
    /// Where the members of its chunks end, if the layer is at hand.
    pub data_end: Option<u64>,
    /// Length of the layer, if that is at hand.
    pub layer_size: Option<u64>,
}

/// Opens `file`: an index as JSON, read front to back, or the whole layer, of which only the end
/// is read.
///
/// # Errors
/// `Corrupt`: gzip data without a footer of eStargz. `Invalid`: gzip data in a FIFO. `Io`.
pub fn open(name: &str, mut file: File) -> Result<Index> {
    let failed = |e: io::Error| Error::io(format!("read {name}"), e);
    let mut head = Vec::new();
    file.by_ref().take(2).read_to_end(&mut head).map_err(failed)?;
    if head != [0x1f, 0x8b] {
        return Ok(Index {
            json: Box::new(io::Cursor::new(head).chain(file)),
            data_end: None,
            layer_size: None,
        });
    }
    let damaged = |why: &str| {
        Error::bad_source(format!("{name} is gzip data {why}: want an eStargz layer, or its index as JSON"))
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::invalid(format!(
            "{name} is a layer, of which only the end is read, but no regular file: give the file, or the index as JSON"
        )));
    }
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let longest = size.checked_sub(FOOTER).ok_or_else(|| damaged("too short for a footer"))?;
    file.seek(SeekFrom::Start(longest)).map_err(failed)?;
    let mut end = [0; FOOTER as usize];
    file.read_exact(&mut end).map_err(failed)?;
    let (start, footer_at) = [FOOTER, OLD_FOOTER]
        .into_iter()
        .find_map(|len| Some((index_start(&end[(FOOTER - len) as usize..])?, size - len)))
        .filter(|&(start, footer_at)| start < footer_at)
        .ok_or_else(|| {
            damaged("without the footer of an eStargz layer (--type targz-ref takes any gzip layer)")
        })?;
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let mut tar = MultiGzDecoder::new(BufReader::new(file.take(footer_at - start)));
    let mut header = Header::new_old();
    tar.read_exact(header.as_mut_bytes()).map_err(|e| damaged("whose index is damaged").with_source(e))?;
    let len = header.entry_size().ok().filter(|_| header.path_bytes()[..] == *NAME);
    let len = len.ok_or_else(|| damaged("whose footer leads to no index"))?;
    if len > MAX_INDEX {
        return Err(Error::limit(format!(
            "{name}: an index of {len} bytes, at most {MAX_INDEX} are accepted"
        )));
    }
    Ok(Index { json: Box::new(tar.take(len)), data_end: Some(start), layer_size: Some(size) })
}

/// Where the footer says that the index begins.
fn index_start(footer: &[u8]) -> Option<u64> {
    let decoder = GzDecoder::new(footer);
    let extra = decoder.header()?.extra()?;
    let text = extra.strip_prefix(&SUBFIELD).unwrap_or(extra).strip_suffix(MARK)?;
    u64::from_str_radix(std::str::from_utf8(text).ok().filter(|text| text.len() == 16)?, 16).ok()
}
