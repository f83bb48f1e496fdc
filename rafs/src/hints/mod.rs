//! Static hints: the files that a start of an image surely reads, told from the image alone.
//!
//! A builder has the whole image and its configuration: what [`find`] answers becomes the bootstrap's
//! prefetch table, and helps where no trace of a real start is known yet. Who serves an image without
//! such a table sees which files a program opens first: a [`Follower`] tells what comes next.
//!
//! ```text
//! configuration ─▶ command: env, sh -c, #!, tini … ─▶ ELF interpreter and libraries
//!                                 ├─▶ system: locale, time zone, accounts, OpenSSL's configuration
//!                                 ├─▶ python: modules imported at once, compiled or not
//!                                 └─▶ node: modules required by literal names
//! ```
//!
//! - Files are looked up in the image's tree, symbolic links followed, `PATH`, `ld.so.conf`,
//!   `sys.path` and `node_modules` searched as the programs do.
//! - The order is that of a start, the same for the same image. Whatever can not be read or
//!   resolved is left out: hints never fail.
//! - Everything is bounded: files, bytes, depth, text looked into, names looked up, and memory.
//!
//! What they are worth: two images on Debian 12, in decoded bytes; python imports numpy, pandas and
//! flask, node some ten packages. A file is in vain if a start reads nothing of it.
//!
//! | image | a start reads | of that hinted | hinted | files in vain |
//! |---|---|---|---|---|
//! | python | 54.1 MB of 677 files | 99.5 %, all but 17 files | 96.8 MB of 671 files | 0.3 MB, 11 |
//! | node | 47.8 MB of 231 files | 98.7 %, all but 1 file | 67.6 MB of 257 files | 0.3 MB, 27 |
//!
//! The rest of what is hinted and not read, 43 and 20 MB, are parts of large libraries that a start
//! does not reach (openblas; a third of libnode). Missed are modules whose names are computed or
//! compressed (dateutil, which pandas imports from extensions of Cython 3.3), and the pages that
//! are read of ICU's table. In vain are fallbacks (`except ImportError`) and modules that are
//! required in functions.

mod command;
mod elf;
mod files;
mod finder;
mod imports;
mod names;
mod node;
mod paths;
mod python;
mod scout;
mod system;
#[cfg(test)]
mod tests;

use std::thread;
use std::time::Duration;

pub use command::Command;
pub use files::{Files, Inode, Kind};

use finder::{Finder, Limits, Memory};
pub use finder::{MAX_BYTES, MAX_FILES};
use scout::Exchange;

/// A builder has the image to itself. A program with a thousand modules takes some 3 MB of memory.
const WHOLE: Limits = Limits { steps: 1 << 26, text: 256 << 20, memory: 24 << 20, time: None };
/// Who serves it serves others beside.
const SERVED: Limits =
    Limits { steps: 1 << 21, text: 64 << 20, memory: 8 << 20, time: Some(Duration::from_secs(1)) };
/// Steps of all looks of a [`Follower`].
const ALL_STEPS: u64 = 1 << 25;

/// The files that a start of `command` reads, in order; found by two threads where there are processors for them.
pub fn find(files: &(dyn Files + Sync), command: &Command) -> Vec<Inode> {
    if thread::available_parallelism().is_ok_and(|processors| processors.get() == 1) {
        return look(files, command, None);
    }
    let exchange = Exchange::new();
    thread::scope(|scope| {
        // Without a scout it takes longer.
        let scout = thread::Builder::new().name("scout".into());
        let _ = scout.spawn_scoped(scope, || look(files, command, Some((&exchange, true))));
        let found = look(files, command, Some((&exchange, false)));
        exchange.end();
        found
    })
}

/// `exchange` is with the other of two looks; true for the scout.
fn look(files: &dyn Files, command: &Command, exchange: Option<(&Exchange, bool)>) -> Vec<Inode> {
    let mut memory = Memory::new(WHOLE);
    let mut finder = Finder::new(files, &mut memory, command.environment.clone());
    if let Some((exchange, is_scout)) = exchange {
        finder = finder.sharing(exchange, is_scout);
    }
    command::follow(&mut finder, &command.arguments, &command.directory);
    finder.into_found()
}

/// What follows from the files that a running program was seen to open, where nobody told what it would be.
///
/// An image is looked at again and again: as more files are opened, and as more bytes of those looked into can
/// be read. What they say is parsed once.
#[derive(Debug)]
pub struct Follower {
    /// Paths of opened files, in order.
    opened: Vec<Vec<u8>>,
    memory: Memory,
    steps: u64,
}

impl Default for Follower {
    fn default() -> Self {
        Self { opened: Vec::new(), memory: Memory::new(SERVED), steps: ALL_STEPS }
    }
}

impl Follower {
    /// Notes that the program opened the file at the absolute path `path`.
    pub fn opened(&mut self, path: Vec<u8>) {
        self.opened.push(path);
    }

    /// The files that the program reads, as far as it can be told now: opened ones first, each with what it
    /// leads to. What leads nowhere is forgotten. Takes a second at most, mostly milliseconds.
    pub fn find(&mut self, files: &dyn Files) -> Vec<Inode> {
        let mut finder = Finder::new(files, &mut self.memory, Vec::new());
        let mut waiting = Vec::new();
        self.opened.retain(|path| {
            let lead = follow(&mut finder, path);
            if lead == Lead::Waiting {
                waiting.push(path.clone());
            }
            lead != Lead::Nowhere
        });
        // The kernel opens a script before its interpreter.
        for path in waiting {
            follow(&mut finder, &path);
        }
        self.steps = self.steps.saturating_sub(finder.spent());
        finder.into_found()
    }

    /// True when the image has cost as much as it may: nothing more is to be expected.
    pub fn is_exhausted(&self) -> bool {
        self.steps == 0
    }
}

/// Where an opened file leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lead {
    Nowhere,
    Somewhere,
    /// To what the program that runs it reads, which is not known yet.
    Waiting,
}

/// Adds the file at `path` and what it leads to.
fn follow(finder: &mut Finder<'_>, path: &[u8]) -> Lead {
    let Some(place) = finder.regular(path) else {
        // Without the time to look it is looked at again.
        return if finder.is_over() { Lead::Somewhere } else { Lead::Nowhere };
    };
    if finder.is_added(place.inode) {
        return Lead::Somewhere;
    }
    // Without a head it is looked at again.
    let Some(head) = finder.head(place.inode) else { return Lead::Somewhere };
    let is_elf = head.starts_with(&object::elf::ELFMAG);
    let elf = if is_elf { finder.elf(place.inode) } else { None };
    if head.starts_with(b"#!") || elf.is_some_and(|elf| elf.interpreter.is_some()) {
        command::follow(finder, &[place.path], b"/");
        return Lead::Somewhere;
    }
    let ends = |endings: &[&[u8]]| endings.iter().any(|end| place.path.ends_with(end));
    let is_known = if is_elf {
        elf::opened(finder, &place);
        true
    } else if ends(&[b".py", b".pyc"]) {
        python::opened(finder, &place.path)
    } else if ends(&[b".js", b".cjs", b".mjs"]) {
        node::opened(finder, &place.path)
    } else {
        return Lead::Nowhere;
    };
    if is_known { Lead::Somewhere } else { Lead::Waiting }
}
