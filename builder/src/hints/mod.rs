//! Static hints: the files that a start of an image surely reads, told from the image alone.
//!
//! They become the bootstrap's prefetch table and help where no trace of a real start is known
//! yet: the first start of a new image.
//!
//! ```text
//! configuration ─▶ command: env, sh -c, #!, tini … ─▶ ELF interpreter and libraries
//!                                 ├─▶ system: locale, time zone, accounts, OpenSSL's configuration
//!                                 ├─▶ python: modules imported at once, compiled or not
//!                                 └─▶ node: modules required by literal names
//! ```
//!
//! - Files are looked up in the merged tree, symbolic links followed, `PATH`, `ld.so.conf`,
//!   `sys.path` and `node_modules` searched as the programs do.
//! - File contents come from the spooled blobs, so nothing is unpacked and no layer read twice.
//! - The order is that of a start, the same for the same image. Whatever can not be read or
//!   resolved is left out: hints never fail a conversion.
//! - Everything is bounded: files, bytes, depth, and text looked into.
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
mod contents;
mod elf;
mod finder;
mod imports;
mod names;
mod node;
mod paths;
mod python;
mod system;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

pub use contents::Contents;

use crate::tree::{InodeId, Tree};
use command::Command;
use finder::Finder;

/// The files that a start of the image with this configuration reads, in order.
pub fn find(tree: &Tree, config: &Map<String, Value>, contents: &Contents<'_>) -> Vec<InodeId> {
    let Command { arguments, environment, directory } = Command::of(config);
    let mut finder = Finder::new(tree, contents, environment);
    command::follow(&mut finder, &arguments, &directory);
    finder.into_found()
}
