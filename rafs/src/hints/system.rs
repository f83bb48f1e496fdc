//! Files that the C library and OpenSSL open by name when a program starts: locale, time zone,
//! accounts, configuration.
//!
//! Nothing in a program tells that it reads them, but most do, and they are small.

use super::elf;
use super::finder::Finder;
use super::paths::join;

/// Larger files are left out: of an archive with all locales a start reads a few pages.
const MAX_SIZE: u64 = 4 << 20;
/// Where OpenSSL of the distributions, and one built by hand, has its configuration.
const OPENSSL: [&[u8]; 4] = [
    b"/usr/lib/ssl/openssl.cnf",
    b"/etc/ssl/openssl.cnf",
    b"/etc/pki/tls/openssl.cnf",
    b"/usr/local/ssl/openssl.cnf",
];

/// Adds what every program may read: the time zone (tzset(3)) and the accounts (nsswitch.conf(5)),
/// which the container's runtime reads as well.
pub(super) fn common(finder: &mut Finder<'_>) {
    let zone = finder.variable("TZ").map(|zone| zone.strip_prefix(b":").unwrap_or(zone));
    let zone = zone.map_or_else(|| b"/etc/localtime".to_vec(), |zone| join(b"/usr/share/zoneinfo", zone));
    add(finder, &zone);
    for file in [&b"/etc/nsswitch.conf"[..], b"/etc/passwd", b"/etc/group"] {
        add(finder, file);
    }
}

/// Adds the locale that the environment names, or else `default`: the files of its `categories`,
/// all of them if that is empty (locale(5), locale(7)).
pub(super) fn locale(finder: &mut Finder<'_>, default: Option<&str>, categories: &[&str]) {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(|name| finder.variable(name));
    // These two are built in.
    let set = set.filter(|name| !matches!(*name, b"C" | b"POSIX")).map(<[u8]>::to_vec);
    let Some(name) = set.or_else(|| default.map(|name| name.as_bytes().to_vec())) else { return };
    add(finder, b"/usr/lib/locale/locale-archive");
    let mut dirs = [name.clone(), normalized(&name)].map(|name| join(b"/usr/lib/locale", &name)).into_iter();
    if let Some(dir) = dirs.find(|dir| finder.is_dir(dir)) {
        let is_named =
            |file: &[u8]| categories.is_empty() || categories.iter().any(|name| name.as_bytes() == file);
        for file in finder.names(&dir, |file| file.starts_with(b"LC_") && is_named(file)) {
            add(finder, &join(&dir, &file));
        }
        if categories.is_empty() {
            add(finder, &join(&dir, b"LC_MESSAGES/SYS_LC_MESSAGES"));
        }
    }
    // Characters are converted by modules of the C library, which looks for them here.
    let dirs = elf::linker_dirs(finder);
    let mut caches = dirs.iter().map(|dir| join(dir, b"gconv/gconv-modules.cache"));
    if let Some(cache) = caches.find(|path| finder.regular(path).is_some()) {
        add(finder, &cache);
    }
}

/// Adds what OpenSSL reads when it is initialised (config(5ssl)).
pub(super) fn openssl(finder: &mut Finder<'_>) {
    let set = finder.variable("OPENSSL_CONF").map(<[u8]>::to_vec);
    let known = OPENSSL.map(<[u8]>::to_vec);
    if let Some(path) = set.into_iter().chain(known).find(|path| finder.regular(path).is_some()) {
        add(finder, &path);
    }
}

fn add(finder: &mut Finder<'_>, path: &[u8]) {
    if finder.regular(path).is_some_and(|place| finder.size(place.inode) <= MAX_SIZE) {
        finder.add(path);
    }
}

/// `C.UTF-8` as `C.utf8`: of the character set only letters, in lower case, and digits count.
fn normalized(locale: &[u8]) -> Vec<u8> {
    let Some(dot) = locale.iter().position(|&b| b == b'.') else { return locale.to_vec() };
    let (name, rest) = locale.split_at(dot + 1);
    let (set, modifier) = rest.split_at(rest.iter().position(|&b| b == b'@').unwrap_or(rest.len()));
    let set = set.iter().filter(|b| b.is_ascii_alphanumeric()).map(u8::to_ascii_lowercase);
    [name, &set.collect::<Vec<_>>(), modifier].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn character_sets_have_one_spelling() {
        for (name, expected) in [
            ("C.UTF-8", "C.utf8"),
            ("de_DE.ISO-8859-15@euro", "de_DE.iso885915@euro"),
            ("de_DE@euro", "de_DE@euro"),
            ("", ""),
        ] {
            assert_eq!(normalized(name.as_bytes()), expected.as_bytes(), "{name}");
        }
    }
}
