//! Names in the constants of programs and libraries, which load by name at run time.

use std::collections::HashSet;

use memchr::memchr_iter;

/// Names taken from one segment of a library at most.
const MAX_NAMES: usize = 4096;
/// Longest name looked at.
const MAX_LEN: usize = 128;

/// The strings between NULs that are dotted names, as `numpy.linalg`, each once, in order.
///
/// A name in a longer text, as in documentation, says nothing about what is imported. One
/// without a dot could be anything.
pub(super) fn dotted(constants: &[u8]) -> Vec<&str> {
    whole(constants, is_dotted).into_iter().filter_map(|name| std::str::from_utf8(name).ok()).collect()
}

/// The strings between NULs that are absolute paths of scripts, each once, in order.
pub(super) fn scripts(constants: &[u8]) -> Vec<&[u8]> {
    whole(constants, |text| text.starts_with(b"/") && text.ends_with(b".js"))
}

fn whole(constants: &[u8], is_wanted: impl Fn(&[u8]) -> bool) -> Vec<&[u8]> {
    let mut seen = HashSet::new();
    let mut from = 0;
    let ends = memchr_iter(0, constants).chain([constants.len()]);
    ends.map(|end| &constants[std::mem::replace(&mut from, end + 1)..end])
        .filter(|text| text.len() <= MAX_LEN && is_wanted(text) && seen.insert(*text))
        .take(MAX_NAMES)
        .collect()
}

fn is_dotted(text: &[u8]) -> bool {
    let is_part = |part: &[u8]| {
        part.first().is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
            && part.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
    };
    text.contains(&b'.') && text.split(|&b| b == b'.').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_strings_count() {
        let constants = b"\0a.b\0see `c.d`\0plain\0a.b\0.x\0y.\0e..f\0_g.h1.i\x001.5\0\xff.z\0a.b c\0end.of";
        assert_eq!(dotted(constants), ["a.b", "_g.h1.i", "end.of"]);
        assert_eq!(dotted(format!("{}.b\0", "a".repeat(MAX_LEN)).as_bytes()), Vec::<&str>::new());
    }

    #[test]
    fn scripts_are_absolute() {
        assert_eq!(scripts(b"\0/a/b.js\0c.js\0/d.mjs.map\0/a/b.js\0see /e.js\0"), [b"/a/b.js"]);
    }

    #[test]
    fn their_number_is_bounded() {
        let many: String = (0..2 * MAX_NAMES).map(|at| format!("a.b{at}\0")).collect();
        assert_eq!(dotted(many.as_bytes()).len(), MAX_NAMES);
    }
}
