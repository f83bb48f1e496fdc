//! Pax records that matter here, and how they add up over headers.

use super::fields;
use crate::tree::{Xattr, shown, split_xattr};
use crate::{Error, Result};

/// Values of pax records that matter here; for a local header, over the global ones.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) sparse: PaxSparse,
}

/// The three ways in which pax headers describe a sparse file.
#[derive(Clone, Debug, Default)]
pub(super) struct PaxSparse {
    /// The real name; that of the header and of the path record is made up.
    pub(super) name: Option<Vec<u8>>,
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths in turns, of versions 0.0 and 0.1.
    pub(super) map: Option<Vec<u64>>,
}

impl Extensions {
    /// Applies the records of one header. An empty value withdraws an earlier one.
    pub(super) fn apply(&mut self, data: &[u8]) -> Result<()> {
        for (key, value) in fields::pax_records(data)? {
            let bad = || {
                Error::bad_source(format!(
                    "pax record {}: malformed value {}",
                    shown(key),
                    shown(&value[..value.len().min(64)])
                ))
            };
            let text = || (!value.is_empty()).then(|| value.to_vec());
            let count = || match value {
                [] => Ok(None),
                _ => fields::decimal(value).map(Some).ok_or_else(bad),
            };
            match key {
                b"path" => self.path = text(),
                b"linkpath" => self.link = text(),
                b"size" => self.size = count()?,
                b"uid" => self.uid = count()?,
                b"gid" => self.gid = count()?,
                b"mtime" if value.is_empty() => self.mtime = None,
                b"mtime" => self.mtime = Some(fields::time(value).ok_or_else(bad)?),
                b"GNU.sparse.name" => self.sparse.name = text(),
                b"GNU.sparse.major" => self.sparse.major = count()?,
                b"GNU.sparse.minor" => self.sparse.minor = count()?,
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = count()?,
                b"GNU.sparse.map" => {
                    let numbers = value.split(|&b| b == b',').filter(|_| !value.is_empty());
                    let map = numbers.map(fields::decimal).collect::<Option<Vec<u64>>>().ok_or_else(bad)?;
                    self.sparse.map = Some(map);
                }
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    let number = fields::decimal(value).ok_or_else(bad)?;
                    self.sparse.map.get_or_insert_default().push(number);
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.set_xattr(Xattr { name: name.into(), value: value.into() }, true)?;
                    } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                        self.set_xattr(fields::libarchive_xattr(name, value).ok_or_else(bad)?, false)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Attributes of one entry. The kernel lists at most 64 KiB of names, which are seldom shorter
    /// than 16 bytes; looking for duplicates stays cheap.
    const MAX_XATTRS: usize = 4096;

    /// Adds an attribute. `replace` says whether it wins over one of that name; libarchive writes
    /// both forms and the plain one is exact.
    fn set_xattr(&mut self, xattr: Xattr, replace: bool) -> Result<()> {
        // What the format has no place for can not be set by a runtime on Linux either
        // (`com.apple.…` in layers made on a Mac).
        if split_xattr(&xattr.name).is_none() {
            tracing::debug!(name = %shown(&xattr.name), "xattr dropped: not a namespace of Linux");
            return Ok(());
        }
        let count = self.xattrs.len();
        match self.xattrs.iter_mut().find(|x| x.name == xattr.name) {
            Some(there) if replace => *there = xattr,
            Some(_) => {}
            None if count == Self::MAX_XATTRS => {
                return Err(Error::limit(format!("more than {} xattrs of one entry", Self::MAX_XATTRS)));
            }
            None => self.xattrs.push(xattr),
        }
        Ok(())
    }
}
