//! Entries of an index, read one by one from its JSON.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufReader, Read};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use chrono::DateTime;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use storage::digest::Digest;

use super::{Collector, sha256};
use crate::tree::Xattr;
use crate::{Error, ErrorKind, Result};

/// The only version there is.
const VERSION: u64 = 1;
/// Bytes of JSON of one entry, and of whatever stands between two of them: the largest xattrs that an
/// inode can have, every byte escaped.
const MAX_ENTRY: u64 = 2 << 20;
/// Bytes of JSON of one index: some 2 million entries.
pub(super) const MAX_INDEX: u64 = 1 << 30;
/// Bytes of JSON that are read ahead.
const INPUT_BUFFER: usize = 128 << 10;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Kind {
    #[serde(rename = "dir")]
    Directory,
    #[serde(rename = "reg")]
    Regular,
    #[serde(rename = "chunk")]
    Chunk,
    #[serde(rename = "symlink")]
    Symlink,
    #[serde(rename = "hardlink")]
    Hardlink,
    #[serde(rename = "char")]
    CharDevice,
    #[serde(rename = "block")]
    BlockDevice,
    #[serde(rename = "fifo")]
    Fifo,
}

/// One entry as it is written. What it does not say is 0 or empty.
#[derive(Debug, Deserialize)]
pub struct Entry {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: Kind,
    #[serde(default)]
    pub size: u64,
    #[serde(default)]
    modtime: String,
    #[serde(default, rename = "linkName")]
    pub link: String,
    #[serde(default)]
    pub mode: u32,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
    #[serde(default, rename = "devMajor")]
    pub major: u32,
    #[serde(default, rename = "devMinor")]
    pub minor: u32,
    #[serde(default)]
    pub xattrs: Option<BTreeMap<String, String>>,
    /// Where its member begins in the layer.
    #[serde(default)]
    pub offset: u64,
    /// Where in the decoded member.
    #[serde(default, rename = "innerOffset")]
    pub inner_offset: u64,
    #[serde(default, rename = "chunkOffset")]
    pub chunk_offset: u64,
    /// 0: to the end of the file.
    #[serde(default, rename = "chunkSize")]
    pub chunk_size: u64,
    #[serde(default, rename = "chunkDigest")]
    chunk_digest: String,
    /// Of the whole file.
    #[serde(default)]
    digest: String,
}

impl Entry {
    /// Seconds and nanoseconds; the epoch if there is no time.
    pub fn time(&self) -> Result<(i64, u32)> {
        if self.modtime.is_empty() {
            return Ok((0, 0));
        }
        let time = DateTime::parse_from_rfc3339(&self.modtime)
            .map_err(|e| Error::bad_source(format!("modtime {:?}", self.modtime)).with_source(e))?;
        // A leap second is told by more than 10^9 nanoseconds.
        Ok((time.timestamp(), time.timestamp_subsec_nanos().min(999_999_999)))
    }

    /// Extended attributes.
    pub fn attributes(&self) -> Result<Vec<Xattr>> {
        let decoded = self.xattrs.iter().flatten().map(|(name, value)| {
            let value = BASE64_STANDARD
                .decode(value)
                .map_err(|e| Error::bad_source(format!("xattr {name:?}: no base64")).with_source(e))?;
            Ok(Xattr { name: name.as_bytes().into(), value: value.into() })
        });
        decoded.collect()
    }

    /// What the chunk must hash to; the file's digest serves if the chunk is `whole`.
    pub fn digest(&self, whole: bool) -> Result<Digest> {
        match (&self.chunk_digest[..], &self.digest[..]) {
            ("", digest) if whole && !digest.is_empty() => sha256(digest),
            ("", _) => Err(Error::new(
                ErrorKind::Unsupported,
                "the index has no digest of a chunk, so its data could not be verified: use --type estargz-ref",
            )),
            (digest, _) => sha256(digest),
        }
    }
}

/// Hands every entry of the index `input` to `collector`.
///
/// # Errors
/// `Corrupt`: no JSON of that form; an entry that the collector refuses.
pub(crate) fn read(name: &str, input: impl Read, collector: &mut Collector) -> Result<()> {
    let since = Cell::new(0);
    let mut refused = None;
    let input = BufReader::with_capacity(INPUT_BUFFER, input);
    let document = Document { collector, since: &since, refused: &mut refused };
    let mut json = serde_json::Deserializer::from_reader(Metered { input, since: &since, total: 0 });
    let read = document.deserialize(&mut json).and_then(|()| json.end());
    match (read, refused) {
        (_, Some(error)) => Err(error.context(format_args!("index {name}"))),
        (Err(e), None) if e.is_io() => Err(Error::io(format!("read index {name}"), e.into())),
        (Err(e), None) => {
            Err(Error::bad_source(format!("{name} is no index of an eStargz layer")).with_source(e))
        }
        (Ok(()), None) => Ok(()),
    }
}

/// Ends where one entry goes on and on, for a string is held in memory as a whole, and where an index does.
struct Metered<'a, R> {
    input: R,
    /// Bytes since the last entry was complete.
    since: &'a Cell<u64>,
    /// Bytes of the index so far.
    total: u64,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.since.set(self.since.get() + len as u64);
        self.total += len as u64;
        let exceeded = match (self.since.get(), self.total) {
            (since, _) if since > MAX_ENTRY => Some(("an entry", MAX_ENTRY)),
            (_, total) if total > MAX_INDEX => Some(("an index", MAX_INDEX)),
            _ => None,
        };
        if let Some((what, most)) = exceeded {
            let what = format!("{what} of more than {most} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(len)
    }
}

struct Document<'a> {
    collector: &'a mut Collector,
    since: &'a Cell<u64>,
    /// What the collector said, which an error of the parser can not carry.
    refused: &'a mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> std::result::Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `entries`")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut listed = false;
        while let Some(key) = map.next_key::<String>()? {
            match &key[..] {
                "version" => {
                    let version: u64 = map.next_value()?;
                    if version != VERSION {
                        return Err(de::Error::custom(format!("version {version}: only {VERSION} is known")));
                    }
                }
                "entries" if listed => return Err(de::Error::duplicate_field("entries")),
                "entries" => {
                    listed = true;
                    map.next_value_seed(Entries(&mut self))?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        if listed { Ok(()) } else { Err(de::Error::missing_field("entries")) }
    }
}

struct Entries<'a, 'b>(&'a mut Document<'b>);

impl<'de> DeserializeSeed<'de> for Entries<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> std::result::Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        while let Some(entry) = list.next_element::<Entry>()? {
            self.0.since.set(0);
            self.0.collector.add(entry).map_err(|error| {
                *self.0.refused = Some(error);
                de::Error::custom("refused")
            })?;
        }
        Ok(())
    }
}
