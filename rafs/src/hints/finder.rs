//! The files found so far, and the means to look at more of them.

use std::any::{Any, TypeId};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::elf::{self, Elf};
use super::files::{FileReader, Files, Inode, Kind};
use super::node::Node;
use super::paths::{self, Place};
use super::python::Python;
use super::scout::{Exchange, Key};

/// Files named at most. A hint is no promise: what is behind it comes when it is read.
pub const MAX_FILES: usize = 4096;
/// Bytes of files named at most.
pub const MAX_BYTES: u64 = 1 << 30;
/// Steps that looking into an ELF file costs at least.
const STEPS_AN_ELF: usize = 100;
/// What an entry of [`Memory`] takes beside what was parsed.
const ENTRY_SIZE: usize = 128;
/// Bytes that tell a program from a script (BINPRM_BUF_SIZE of the kernel).
const MAX_HEAD: u64 = 256;
/// Largest text that is looked into.
const MAX_TEXT: u64 = 4 << 20;
/// What one image may cost, whatever it says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Names looked up or passed in one look: a tenth of a microsecond to a microsecond each.
    pub steps: u64,
    /// Bytes of text looked into in all.
    pub text: u64,
    /// Bytes that what was parsed takes in memory. What is beyond is parsed again, and counts again.
    pub memory: usize,
    /// How long one look may take. A step of a hostile image may take longer than it says.
    pub time: Option<Duration>,
}

/// What was made of a text.
pub(super) trait Parsed: Any + Send + Sync {
    /// About how many bytes it takes.
    fn size(&self) -> usize;
}

impl Parsed for Vec<u8> {
    fn size(&self) -> usize {
        self.len()
    }
}

impl Parsed for Option<Arc<Elf>> {
    fn size(&self) -> usize {
        self.as_ref().map_or(0, |elf| elf.size())
    }
}

/// What strings take.
pub(super) fn size_of_all<T: AsRef<[u8]>>(strings: &[T]) -> usize {
    strings.iter().map(|string| size_of::<T>() + string.as_ref().len()).sum()
}

/// What files were found to say, kept from one look at an image to the next.
#[derive(Debug)]
pub(super) struct Memory {
    limits: Limits,
    parsed: HashMap<Key, Arc<dyn Any + Send + Sync>>,
    /// Bytes of text looked into.
    text: u64,
    /// Bytes of what is kept.
    kept: usize,
}

/// Collects files in the order in which a start reads them.
pub(super) struct Finder<'a> {
    files: &'a dyn Files,
    memory: &'a mut Memory,
    environment: Vec<Vec<u8>>,
    found: Vec<Inode>,
    known: HashSet<Inode>,
    /// Libraries looked into, added or not.
    libraries: HashSet<Inode>,
    bytes: u64,
    /// Steps left.
    steps: Cell<u64>,
    /// When there are none left, whatever was done.
    end: Option<Instant>,
    exchange: Option<&'a Exchange>,
    /// Takes lists backwards, and ends with the one that it scouts for.
    is_scout: bool,
    /// Where the dynamic linker looks, once known.
    pub linker_dirs: Option<Arc<[Vec<u8>]>>,
    /// The interpreter of Python that was started last, with all that it has imported.
    pub python: Option<Box<Python>>,
    /// The modules of Node.js so far.
    pub node: Option<Box<Node>>,
}

impl<'a> Finder<'a> {
    /// Nothing found yet. `environment` holds `NAME=VALUE`.
    pub fn new(files: &'a dyn Files, memory: &'a mut Memory, environment: Vec<Vec<u8>>) -> Self {
        Self {
            files,
            steps: Cell::new(memory.limits.steps),
            end: memory.limits.time.and_then(|time| Instant::now().checked_add(time)),
            exchange: None,
            is_scout: false,
            memory,
            environment,
            found: Vec::new(),
            known: HashSet::new(),
            libraries: HashSet::new(),
            bytes: 0,
            linker_dirs: None,
            python: None,
            node: None,
        }
    }

    /// The same, which shares what it parses with another.
    pub fn sharing(self, exchange: &'a Exchange, is_scout: bool) -> Self {
        Self { exchange: Some(exchange), is_scout, ..self }
    }

    /// True if nobody asks for what is found, only for what is parsed.
    pub fn is_scout(&self) -> bool {
        self.is_scout
    }

    /// The items of a list that may take long each, in the order in which they are looked at.
    pub fn each<'b, T>(&self, list: &'b [T]) -> impl Iterator<Item = &'b T> + use<'b, T> {
        let (len, is_scout) = (list.len(), self.is_scout);
        (0..len).map(move |n| &list[if is_scout { len - 1 - n } else { n }])
    }

    /// What was found, in order.
    pub fn into_found(self) -> Vec<Inode> {
        self.found
    }

    /// Value of an environment variable that is set and not empty.
    pub fn variable(&self, name: &str) -> Option<&[u8]> {
        let entries = self.environment.iter();
        let mut values = entries.filter_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
        values.next().filter(|value| !value.is_empty())
    }

    /// Steps taken.
    pub fn spent(&self) -> u64 {
        self.memory.limits.steps - self.steps.get()
    }

    /// Takes `steps` from those that are left; false if there are none. To be asked for whatever an image may have
    /// many of.
    pub fn spend(&self, steps: usize) -> bool {
        let is_late = self.end.is_some_and(|end| Instant::now() >= end)
            || (self.is_scout && self.exchange.is_some_and(Exchange::is_over));
        // Who is late has spent all: what takes that long is not to be looked at again and again.
        let left = self.steps.get().checked_sub(steps as u64).filter(|_| !is_late);
        self.steps.set(left.unwrap_or(0));
        left.is_some()
    }

    /// True if no steps are left: what was not found may be there.
    pub fn is_over(&self) -> bool {
        self.steps.get() == 0
    }

    /// Where `path` leads, whatever is there.
    pub fn resolve(&self, path: &[u8]) -> Option<Place> {
        paths::resolve(self.files, path, |steps| self.spend(steps))
    }

    /// The regular file that `path` leads to.
    pub fn regular(&self, path: &[u8]) -> Option<Place> {
        self.resolve(path).filter(|place| matches!(self.files.kind(place.inode), Kind::Regular(_)))
    }

    /// True if `path` leads to a directory.
    pub fn is_dir(&self, path: &[u8]) -> bool {
        self.resolve(path).is_some_and(|place| self.files.kind(place.inode) == Kind::Directory)
    }

    /// The first [`MAX_FILES`] names in the directory at `path` that are `wanted`, in order; none if it is no
    /// directory.
    pub fn names(&self, path: &[u8], wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        self.visit(path, b"", |name| {
            if wanted(name) {
                names.push(name.to_vec());
            }
            if names.len() < MAX_FILES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        names
    }

    /// True if a name in the directory at `path` begins with `stem`.
    pub fn has_prefix(&self, path: &[u8], stem: &[u8]) -> bool {
        let mut found = false;
        self.visit(path, stem, |name| {
            found = name.starts_with(stem);
            ControlFlow::Break(())
        });
        found
    }

    /// The first library in `dir` whose name begins with `stem` and a dash or dot.
    pub fn libraries(&self, dir: &[u8], stem: &[u8]) -> Option<Vec<u8>> {
        let mut found = None;
        self.visit(dir, stem, |name| {
            let Some(rest) = name.strip_prefix(stem) else { return ControlFlow::Break(()) };
            if name.ends_with(b".so") && rest.first().is_some_and(|byte| b"-.".contains(byte)) {
                found = Some(name.to_vec());
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        found
    }

    /// Visits the names in the directory at `path` from `from` on.
    pub fn visit(&self, path: &[u8], from: &[u8], mut visit: impl FnMut(&[u8]) -> ControlFlow<()>) {
        let place = self.resolve(path).filter(|place| self.files.kind(place.inode) == Kind::Directory);
        if let Some(place) = place {
            self.files.names(place.inode, from, &mut |name| match self.spend(1) {
                true => visit(name),
                false => ControlFlow::Break(()),
            });
        }
    }

    /// True if the file was added.
    pub fn is_added(&self, inode: Inode) -> bool {
        self.known.contains(&inode)
    }

    /// True if a library was added or [noted](Self::note_library): it is not looked into again.
    pub fn is_known(&self, inode: Inode) -> bool {
        self.is_added(inode) || self.libraries.contains(&inode)
    }

    /// Notes a library that is looked into, for which there may be no room.
    pub fn note_library(&mut self, inode: Inode) {
        self.libraries.insert(inode);
    }

    /// Adds the regular file that `path` leads to. `None` if there is none, or no room.
    pub fn add(&mut self, path: &[u8]) -> Option<Place> {
        let place = self.regular(path)?;
        let size = self.size(place.inode);
        if self.known.contains(&place.inode) {
            return Some(place);
        }
        if self.found.len() >= MAX_FILES || self.bytes.saturating_add(size) > MAX_BYTES {
            return None;
        }
        self.known.insert(place.inode);
        // An empty file has nothing to fetch.
        if size > 0 {
            self.found.push(place.inode);
            self.bytes += size;
        }
        Some(place)
    }

    /// Bytes of a regular file.
    pub fn size(&self, inode: Inode) -> u64 {
        match self.files.kind(inode) {
            Kind::Regular(size) => size,
            _ => 0,
        }
    }

    /// The first bytes of a regular file: as many as tell a program from a script. `None` if they can not be
    /// read.
    pub fn head(&self, inode: Inode) -> Option<Vec<u8>> {
        self.read(inode, 0..MAX_HEAD)
    }

    /// What a file says to the dynamic linker; `None` if it is no ELF file, or a damaged one.
    pub fn elf(&mut self, inode: Inode) -> Option<Arc<Elf>> {
        if let Some(known) = self.memory.recall::<Option<Arc<Elf>>>(inode, 0) {
            return (*known).clone();
        }
        if !self.spend(STEPS_AN_ELF) {
            return None;
        }
        let elf = self.parsed(inode, 0, |finder| {
            finder.files.will_read_ends(inode);
            let failed = Cell::new(false);
            let reader = FileReader::new(finder.files, inode, finder.size(inode), &failed);
            let elf = elf::parse(reader).map(Arc::new);
            if failed.get() { None } else { Some(elf) }
        })?;
        self.spend(elf.as_ref().as_ref().map_or(0, |elf| elf.needed.len()));
        (*elf).clone()
    }

    /// What `parse` makes of the whole text file at `path`; `None` if there is none, or it is too large to be
    /// looked into. It is parsed once for each type that it can be made into.
    pub fn text<T: Parsed>(&mut self, path: &[u8], parse: impl FnOnce(&[u8]) -> T) -> Option<Arc<T>> {
        let inode = self.regular(path)?.inode;
        let size = self.size(inode);
        if size > MAX_TEXT { None } else { self.part(inode, 0..size, parse) }
    }

    /// The same, for a file that is only looked into up to a size.
    pub fn small_text<T: Parsed>(
        &mut self,
        path: &[u8],
        most: u64,
        parse: impl FnOnce(&[u8]) -> T,
    ) -> Option<Arc<T>> {
        let place = self.regular(path)?;
        if self.size(place.inode) > most { None } else { self.text(&place.path, parse) }
    }

    /// The same for bytes of a file, cut to the size of text that is looked into.
    pub fn part<T: Parsed>(
        &mut self,
        inode: Inode,
        range: Range<u64>,
        parse: impl FnOnce(&[u8]) -> T,
    ) -> Option<Arc<T>> {
        if let Some(known) = self.memory.recall(inode, range.start) {
            return Some(known);
        }
        let len = range.end.min(self.size(inode)).saturating_sub(range.start).min(MAX_TEXT);
        if self.memory.text + len > self.memory.limits.text {
            return None;
        }
        // What can not be read took its time, too.
        self.memory.text += len;
        let read = |finder: &Self| Some(parse(&finder.read(inode, range.start..range.start + len)?));
        self.parsed(inode, range.start, read)
    }

    /// What `parse` makes of a file from byte `at` on, or somebody else made of it; kept if there is room.
    fn parsed<T: Parsed>(
        &mut self,
        inode: Inode,
        at: u64,
        parse: impl FnOnce(&Self) -> Option<T>,
    ) -> Option<Arc<T>> {
        let key = (inode, at, TypeId::of::<T>());
        if let Some(known) = self.exchange.and_then(|exchange| exchange.find(&key)) {
            self.memory.keep(key, &known);
            return Some(known);
        }
        let parsed = Arc::new(parse(self)?);
        if self.memory.keep(key, &parsed)
            && let Some(exchange) = self.exchange
        {
            exchange.leave(key, &parsed);
        }
        Some(parsed)
    }

    /// Bytes of a file, cut at its end. They are asked for at once.
    fn read(&self, inode: Inode, range: Range<u64>) -> Option<Vec<u8>> {
        let len = range.end.min(self.size(inode)).saturating_sub(range.start);
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        let mut done = 0;
        while done < bytes.len() {
            match self.files.read_at(inode, range.start + done as u64, &mut bytes[done..]) {
                Ok(0) | Err(_) => return None,
                Ok(n) => done += n,
            }
        }
        Some(bytes)
    }
}

impl Memory {
    /// Nothing known yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, parsed: HashMap::new(), text: 0, kept: 0 }
    }

    fn recall<T: Parsed>(&self, inode: Inode, at: u64) -> Option<Arc<T>> {
        let known = self.parsed.get(&(inode, at, TypeId::of::<T>()))?;
        Arc::clone(known).downcast().ok()
    }

    /// False if there is no room.
    fn keep<T: Parsed>(&mut self, key: Key, parsed: &Arc<T>) -> bool {
        let size = ENTRY_SIZE + parsed.size();
        if self.kept + size > self.limits.memory {
            return false;
        }
        self.kept += size;
        let any: Arc<dyn Any + Send + Sync> = parsed.clone();
        self.parsed.insert(key, any);
        true
    }
}
