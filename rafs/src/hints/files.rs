//! The files of an image, as hints look at them.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::ControlFlow;

/// An inode, as its image numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Inode(pub u64);

/// What an inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes.
    Regular(u64),
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// Nothing that hints look into.
    Other,
}

/// An image's tree and the bytes of its files.
pub trait Files {
    /// The root directory.
    fn root(&self) -> Inode;

    /// What `inode` is.
    fn kind(&self, inode: Inode) -> Kind;

    /// The entry `name` of directory `dir`, if it has one.
    fn lookup(&self, dir: Inode, name: &[u8]) -> Option<Inode>;

    /// Visits the names in directory `dir` in byte order, beginning with the first that is not below
    /// `from`, until the visitor breaks.
    fn names(&self, dir: Inode, from: &[u8], visit: &mut dyn FnMut(&[u8]) -> ControlFlow<()>);

    /// Says that the beginning and the end of `inode` will be read: the tables of the dynamic linker lie there.
    fn will_read_ends(&self, _inode: Inode) {}

    /// Reads bytes of a regular file from `offset` on: at least one, unless `into` is empty or the file ends
    /// there.
    ///
    /// # Errors
    /// The bytes can not be had, or not now: the file is looked at as if it were not there.
    fn read_at(&self, inode: Inode, offset: u64, into: &mut [u8]) -> io::Result<usize>;
}

impl fmt::Debug for dyn Files + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Files")
    }
}

/// One file, read from front to back or here and there.
pub(super) struct FileReader<'a> {
    files: &'a dyn Files,
    inode: Inode,
    size: u64,
    at: u64,
    /// Set if bytes could not be had.
    failed: &'a Cell<bool>,
}

impl<'a> FileReader<'a> {
    pub fn new(files: &'a dyn Files, inode: Inode, size: u64, failed: &'a Cell<bool>) -> Self {
        Self { files, inode, size, at: 0, failed }
    }
}

impl Read for FileReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.size || into.is_empty() {
            return Ok(0);
        }
        let n = self.files.read_at(self.inode, self.at, into).inspect_err(|_| self.failed.set(true))?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for FileReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(delta) => self.size.checked_add_signed(delta),
            SeekFrom::Current(delta) => self.at.checked_add_signed(delta),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
