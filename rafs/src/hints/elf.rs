//! Which shared libraries a program is linked with: the dynamic section of its ELF file, and
//! where the dynamic linker looks (ld.so(8)).

use std::io::{Read, Seek};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use object::Endianness;
use object::elf;
use object::read::elf::{Dyn as _, FileHeader, ProgramHeader as _};
use object::read::{ReadCache, ReadCacheOps, ReadRef};

use super::finder::{Finder, size_of_all};
use super::paths::{MAX_PATH, Place, base_name, join, parent};
use super::system;

/// Largest part of a file read at once: program headers and dynamic sections take less.
const MAX_READ: u64 = 1 << 20;
/// A library of this size or more that has less than a 64th of code is a table, as ICU's data of
/// 30 MB: a start reads a few pages of it, and these come when they are read.
const TABLE_SIZE: u64 = 1 << 20;
/// Libraries named by one file at most.
const MAX_NEEDED: usize = 1024;
/// Bytes of their names.
const MAX_NAMES_SIZE: usize = 64 << 10;
/// Where the linker looks without being told, of every distribution: the first that has a
/// library of the right kind wins. Debian's is built with the directories of its architecture
/// (wiki.debian.org/Multiarch).
const DEFAULT_DIRS: [&[u8]; 7] = [
    b"/usr/lib/x86_64-linux-gnu",
    b"/usr/lib/aarch64-linux-gnu",
    b"/lib",
    b"/usr/lib",
    b"/lib64",
    b"/usr/lib64",
    b"/usr/local/lib",
];
/// Files of `ld.so.conf` that are followed.
const MAX_CONF_FILES: usize = 64;
/// Directories of one search path.
pub(super) const MAX_DIRS: usize = 256;
/// Segments with constants of one file: linkers make one or two.
const MAX_CONSTANTS: usize = 8;

/// What the dynamic linker reads from an ELF file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Elf {
    /// Class and machine: libraries of another kind are passed over.
    pub kind: (u8, u16),
    pub interpreter: Option<Vec<u8>>,
    pub needed: Vec<Vec<u8>>,
    /// Bytes in executable segments.
    pub code_size: u64,
    /// Where the file has constants, as strings.
    pub constants: Vec<Range<u64>>,
    /// `DT_RUNPATH`, or without it `DT_RPATH`, split at colons.
    pub paths: Vec<Vec<u8>>,
}

impl Elf {
    /// About how many bytes it takes.
    pub fn size(&self) -> usize {
        let strings = size_of_all(&self.needed) + size_of_all(&self.paths);
        size_of::<Self>() + strings + self.interpreter.as_ref().map_or(0, Vec::len)
    }
}

/// A file of hostile content must not make us read it whole.
struct Bounded<'a, R: ReadCacheOps>(&'a ReadCache<R>);

impl<R: ReadCacheOps> Clone for Bounded<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: ReadCacheOps> Copy for Bounded<'_, R> {}

impl<'a, R: ReadCacheOps> ReadRef<'a> for Bounded<'a, R> {
    fn len(self) -> Result<u64, ()> {
        self.0.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size > MAX_READ { Err(()) } else { self.0.read_bytes_at(offset, size) }
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        self.0.read_bytes_at_until(range, delimiter)
    }
}

/// Reads an ELF file; `None` if it is none, or a damaged one.
pub(super) fn parse<R: Read + Seek>(file: R) -> Option<Elf> {
    let cache = ReadCache::new(file);
    let data = Bounded(&cache);
    let ident = data.read_bytes_at(0, 16).ok()?;
    if ident[..4] != elf::ELFMAG {
        return None;
    }
    match ident[4] {
        1 => parse_class::<elf::FileHeader32<Endianness>, _>(data, 1),
        2 => parse_class::<elf::FileHeader64<Endianness>, _>(data, 2),
        _ => None,
    }
}

fn parse_class<'a, H, R>(data: R, class: u8) -> Option<Elf>
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'a>,
{
    let header = H::parse(data).ok()?;
    let endian = header.endian().ok()?;
    let segments = header.program_headers(endian, data).ok()?;
    let mut elf = Elf { kind: (class, header.e_machine(endian).0), ..Elf::default() };
    let (mut strings, mut names) = (None, Vec::new());
    let (mut rpath, mut runpath) = (None, None);
    let mut seen = Vec::new();
    for segment in segments {
        let kind = segment.p_type(endian);
        if kind == elf::PT_LOAD {
            let ((offset, size), flags) = (segment.file_range(endian), segment.p_flags(endian).0);
            if flags & elf::PF_X.0 != 0 {
                elf.code_size = elf.code_size.saturating_add(size);
            } else if flags & elf::PF_W.0 == 0 && offset > 0 && elf.constants.len() < MAX_CONSTANTS {
                // The first segment has the tables of the linker.
                elf.constants.push(offset..offset.saturating_add(size));
            }
        }
        // The first of each counts, as in the kernel; all that is read stays in memory.
        if matches!(kind, elf::PT_INTERP | elf::PT_DYNAMIC) {
            if seen.contains(&kind) {
                continue;
            }
            seen.push(kind);
        }
        if let Ok(Some(path)) = segment.interpreter(endian, data) {
            elf.interpreter = Some(path.to_vec());
        }
        for entry in segment.dynamic(endian, data).ok().flatten().unwrap_or_default() {
            let value: u64 = entry.val(endian);
            match entry.tag(endian) {
                elf::DT_NULL => break,
                elf::DT_STRTAB => strings = Some(value),
                elf::DT_NEEDED if names.len() < MAX_NEEDED => names.push(value),
                elf::DT_RPATH => rpath = Some(value),
                elf::DT_RUNPATH => runpath = Some(value),
                _ => {}
            }
        }
    }
    // The string table is named by its address in memory.
    let table = strings.and_then(|address| {
        segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD).find_map(|segment| {
            let (start, (offset, size)) = (segment.p_vaddr(endian).into(), segment.file_range(endian));
            let within = address.checked_sub(start).filter(|within| *within < size)?;
            Some((offset.checked_add(within)?, offset.checked_add(size)?))
        })
    });
    let text = |at: u64| {
        let (start, end) = table?;
        let start = start.checked_add(at).filter(|start| *start < end)?;
        // Of strings longer than a path only the beginning is read, so the end is not found.
        data.read_bytes_at_until(start..end.min(start.saturating_add(4096)), 0).ok().map(<[u8]>::to_vec)
    };
    // Entries may name one string again and again, and others inside it. To read one in vain takes long.
    let mut size = 0;
    let named = names.into_iter().map_while(text).filter(|name| !name.is_empty());
    elf.needed = named
        .take_while(|name| {
            size += name.len();
            size <= MAX_NAMES_SIZE
        })
        .collect();
    let paths = runpath.or(rpath).and_then(text).unwrap_or_default();
    elf.paths = split_paths(&paths);
    Some(elf)
}

/// The first [`MAX_DIRS`] directories of a list with colons.
pub(super) fn split_paths(list: &[u8]) -> Vec<Vec<u8>> {
    list.split(|&b| b == b':').filter(|dir| !dir.is_empty()).take(MAX_DIRS).map(<[u8]>::to_vec).collect()
}

/// Adds the interpreter of the ELF file at `path` and all libraries that it is linked with,
/// breadth first as the linker loads them. The file itself is added by the caller.
///
/// Answers the file and the libraries that were not known before.
pub(super) fn closure(finder: &mut Finder<'_>, path: &[u8], elf: Arc<Elf>) -> Vec<(Vec<u8>, Arc<Elf>)> {
    if elf.interpreter.is_none() && elf.needed.is_empty() {
        return vec![(path.to_vec(), elf)];
    }
    if let Some(interpreter) = &elf.interpreter {
        finder.add(interpreter);
        finder.add(b"/etc/ld.so.cache");
    }
    let dirs = linker_dirs(finder);
    let mut loaded = Vec::new();
    let mut queue = std::collections::VecDeque::from([(path.to_vec(), elf)]);
    while let Some((path, elf)) = queue.pop_front() {
        let origin = parent(&path);
        for name in &elf.needed {
            if !finder.spend(1) {
                return loaded;
            }
            let found = if name.contains(&b'/') {
                load(finder, name, elf.kind)
            } else {
                let mut own = elf.paths.iter().map(|dir| join(&expand(dir, &origin), name));
                own.find_map(|path| load(finder, &path, elf.kind))
                    .or_else(|| dirs.iter().find_map(|dir| load(finder, &join(dir, name), elf.kind)))
            };
            if let Some((path, Some(elf))) = found {
                queue.push_back((path, elf));
            }
        }
        loaded.push((path, elf));
    }
    loaded
}

/// Adds the library at `path` if it is one of the right kind: its real path, and what it is
/// linked with unless it was known before.
fn load(finder: &mut Finder<'_>, path: &[u8], kind: (u8, u16)) -> Option<(Vec<u8>, Option<Arc<Elf>>)> {
    let file = finder.regular(path)?;
    if finder.is_known(file.inode) {
        return Some((file.path, None));
    }
    let elf = finder.elf(file.inode).filter(|elf| elf.kind == kind)?;
    add_library(finder, &file, &elf);
    if base_name(path).starts_with(b"libcrypto.so") {
        system::openssl(finder);
    }
    Some((file.path, Some(elf)))
}

fn add_library(finder: &mut Finder<'_>, file: &Place, elf: &Elf) {
    // Libraries may need each other, and those that are not added, too.
    finder.note_library(file.inode);
    let size = finder.size(file.inode);
    if size < TABLE_SIZE || elf.code_size >= size / 64 {
        finder.add(&file.path);
    }
}

/// Adds a library that was opened, and all that it is linked with.
pub(super) fn opened(finder: &mut Finder<'_>, file: &Place) {
    if !finder.is_known(file.inode)
        && let Some(elf) = finder.elf(file.inode)
    {
        add_library(finder, file, &elf);
        closure(finder, &file.path, elf);
    }
}

/// A directory of `DT_RUNPATH` with `$ORIGIN` filled in.
fn expand(dir: &[u8], origin: &[u8]) -> Vec<u8> {
    let rest = dir.strip_prefix(b"$ORIGIN").or_else(|| dir.strip_prefix(b"${ORIGIN}"));
    rest.map_or_else(|| dir.to_vec(), |rest| [origin, rest].concat())
}

/// `LD_LIBRARY_PATH`, the directories of `/etc/ld.so.conf`, and the default ones.
pub(super) fn linker_dirs(finder: &mut Finder<'_>) -> Arc<[Vec<u8>]> {
    if let Some(dirs) = &finder.linker_dirs {
        return Arc::clone(dirs);
    }
    let mut dirs = finder.variable("LD_LIBRARY_PATH").map(split_paths).unwrap_or_default();
    let mut conf = vec![b"/etc/ld.so.conf".to_vec()];
    let mut at = 0;
    while let Some(path) = conf.get(at).cloned() {
        at += 1;
        let Some(text) = finder.text(&path, <[u8]>::to_vec) else { continue };
        for line in text.split(|&b| b == b'\n').take_while(|_| finder.spend(1)) {
            let line = line.split(|&b| b == b'#').next().unwrap_or_default().trim_ascii();
            if let Some(pattern) = line.strip_prefix(b"include ") {
                included(finder, pattern.trim_ascii(), &mut conf);
            } else if line.starts_with(b"/") && line.len() <= MAX_PATH && dirs.len() < MAX_DIRS {
                dirs.push(line.to_vec());
            }
        }
    }
    dirs.extend(DEFAULT_DIRS.map(<[u8]>::to_vec));
    Arc::clone(finder.linker_dirs.insert(dirs.into()))
}

/// Adds the files of `include DIR/*.conf` to `conf`, in order of names, as far as there is room.
fn included(finder: &Finder<'_>, pattern: &[u8], conf: &mut Vec<Vec<u8>>) {
    if conf.len() >= MAX_CONF_FILES {
        return;
    }
    if !pattern.contains(&b'*') {
        conf.push(pattern.to_vec());
        return;
    }
    let (dir, suffix) = (parent(pattern), pattern.rsplit(|&b| b == b'*').next().unwrap_or_default());
    finder.visit(&dir, b"", |name| {
        if name.ends_with(suffix) {
            conf.push(join(&dir, name));
        }
        if conf.len() < MAX_CONF_FILES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
}
