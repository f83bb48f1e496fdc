//! Extended attributes: checked against what EROFS can store, sorted, shared.

use std::collections::HashSet;
use std::sync::Arc;

use crate::{Error, Result};

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Xattr {
    /// Full name, prefix included.
    pub name: Box<[u8]>,
    /// Value, at most 65535 bytes.
    pub value: Box<[u8]>,
}

/// Extended attributes sorted by full name. Empty ones take no allocation, equal ones
/// may be shared between inodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Xattrs(Option<Arc<[Xattr]>>);

impl Xattrs {
    /// Checks and sorts `list`; of two attributes with one name the last one stays.
    ///
    /// # Errors
    /// `Limit`: a name without a prefix that EROFS knows (`user.`, `trusted.`, `security.`,
    /// the two POSIX ACLs), a name over 255 bytes, a value or an area over 65535 bytes or
    /// 4-byte units.
    pub fn new(mut list: Vec<Xattr>) -> Result<Self> {
        if list.is_empty() {
            return Ok(Self::default());
        }
        // A stable sort keeps the order of duplicates; the last one is kept.
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list.reverse();
        list.dedup_by(|later, kept| later.name == kept.name);
        list.reverse();
        let mut area = size_of::<rafs::format::xattr::XattrHeader>();
        for x in &list {
            let shown = String::from_utf8_lossy(&x.name);
            let (_, suffix) = split_xattr(&x.name).ok_or_else(|| {
                Error::limit(format!(
                    "xattr {shown:?}: only user., trusted., security. and POSIX ACL attributes can be stored"
                ))
            })?;
            if x.name.len() > 255 || x.value.len() > 65535 {
                return Err(Error::limit(format!(
                    "xattr {shown:?}: a name is at most 255 bytes and a value 65535, these are {} and {}",
                    x.name.len(),
                    x.value.len()
                )));
            }
            area += rafs::format::xattr::entry_size(suffix.len(), x.value.len());
        }
        if rafs::format::xattr::icount(area) > usize::from(u16::MAX) {
            return Err(Error::limit(format!(
                "the xattrs of one inode take {area} bytes, 262148 can be stored"
            )));
        }
        Ok(Self(Some(list.into())))
    }

    /// The attributes in order of names.
    pub fn iter(&self) -> std::slice::Iter<'_, Xattr> {
        self.0.as_deref().unwrap_or_default().iter()
    }

    /// True without attributes.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The value of attribute `name`.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        let list = self.0.as_deref()?;
        let at = list.binary_search_by(|x| (*x.name).cmp(name)).ok()?;
        Some(&list[at].value)
    }

    /// The same attributes without `name`.
    #[must_use]
    pub fn without(&self, name: &[u8]) -> Self {
        if self.get(name).is_none() {
            return self.clone();
        }
        let rest: Vec<_> = self.iter().filter(|x| *x.name != *name).cloned().collect();
        Self((!rest.is_empty()).then(|| rest.into()))
    }

    /// Bytes of the xattr area behind the inode, 0 without attributes.
    pub fn area_size(&self) -> usize {
        if self.is_empty() {
            return 0;
        }
        size_of::<rafs::format::xattr::XattrHeader>()
            + self
                .iter()
                .map(|x| {
                    let suffix = split_xattr(&x.name).map_or(0, |(_, suffix)| suffix.len());
                    rafs::format::xattr::entry_size(suffix, x.value.len())
                })
                .sum::<usize>()
    }
}

/// Keeps one copy of equal attribute sets: on a labelled host every file has the same one.
#[derive(Debug, Default)]
pub struct XattrPool(HashSet<Xattrs>);

impl XattrPool {
    /// Sets remembered; rare ones beyond that are simply not shared.
    const MAX: usize = 4096;

    /// `xattrs`, or an equal set seen before.
    pub fn intern(&mut self, xattrs: Xattrs) -> Xattrs {
        if xattrs.is_empty() {
            return xattrs;
        }
        if let Some(known) = self.0.get(&xattrs) {
            return known.clone();
        }
        if self.0.len() < Self::MAX {
            self.0.insert(xattrs.clone());
        }
        xattrs
    }
}

/// Splits a full xattr name into the index EROFS has for its prefix and the rest.
pub fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    rafs::format::xattr::PREFIXES.iter().find_map(|&(index, prefix)| {
        let rest = name.strip_prefix(prefix)?;
        let whole = !prefix.ends_with(b".");
        (whole == rest.is_empty()).then_some((index, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattrs_are_sorted_checked_and_the_last_duplicate_wins() {
        let x = |n: &str, v: &str| Xattr { name: n.as_bytes().into(), value: v.as_bytes().into() };
        let set =
            Xattrs::new(vec![x("user.b", "1"), x("security.capability", "c"), x("user.b", "2")]).unwrap();
        assert_eq!(set.get(b"user.b"), Some(&b"2"[..]));
        assert_eq!(
            set.iter().map(|x| &*x.name).collect::<Vec<_>>(),
            [&b"security.capability"[..], b"user.b"]
        );
        assert!(set.without(b"user.b").without(b"security.capability").is_empty());
        for bad in ["system.other", "lustre.x", "system.posix_acl_accessx", "user"] {
            assert!(Xattrs::new(vec![x(bad, "")]).is_err(), "{bad}");
        }
        assert!(Xattrs::new(vec![x("system.posix_acl_access", "")]).is_ok());
        assert_eq!(Xattrs::default().area_size(), 0);
    }
}
