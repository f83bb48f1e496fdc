//! `nydus-image inspect`: questions about a bootstrap, one by `--request` or many at a prompt.
//!
//! A single request writes nothing to stderr unless it fails, and the JSON requests write
//! nothing but their JSON to stdout: clients parse both together.

use std::fmt::Write as _;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use rafs::bootstrap::{Attr, Bootstrap, FileType, Nid};
use serde_json::json;

use crate::cli::{self, InspectArgs};
use crate::{data, output};

const HELP: &str = "\
stats          number of inodes, as JSON
blobs          blob table, as JSON
prefetch       prefetch table, as JSON
ls             entries of the current directory
cd DIR         change the current directory
stat NAME      attributes of an entry
chunk OFFSET   chunks at a byte of a blob as stored
icheck INODE   paths of an inode
exit           leave
";

/// Runs the command.
pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let path = args.bootstrap().context("no bootstrap given")?;
    let bootstrap = data::open_bootstrap(path)?.bootstrap;
    let mut session = Session { path: vec![(Vec::new(), bootstrap.root())], bootstrap: &*bootstrap };
    match &args.request {
        Some(request) => session.single(request.trim()),
        None => session.prompt(),
    }
}

struct Session<'a> {
    bootstrap: &'a dyn Bootstrap,
    /// Names and inodes from the root to the current directory.
    path: Vec<(Vec<u8>, Nid)>,
}

/// What a request answers.
enum Answer {
    /// One JSON value.
    Json(String),
    /// Lines for people.
    Text(String),
    /// No such request.
    Unknown,
    /// The end.
    Exit,
}

impl Session<'_> {
    fn single(&mut self, request: &str) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout().lock();
        match self.answer(request)? {
            Answer::Json(json) => out.write_all(json.as_bytes())?,
            Answer::Text(text) => write!(out, "{text}null")?,
            Answer::Exit => {}
            Answer::Unknown => {
                out.write_all(HELP.as_bytes())?;
                return Ok(ExitCode::FAILURE);
            }
        }
        out.flush()?;
        Ok(ExitCode::SUCCESS)
    }

    fn prompt(&mut self) -> anyhow::Result<ExitCode> {
        let interactive = std::io::stdin().is_terminal();
        let mut line = String::new();
        loop {
            if interactive {
                output::print("Inspecting RAFS:> ")?;
            }
            line.clear();
            if std::io::stdin().lock().read_line(&mut line)? == 0 {
                return Ok(ExitCode::SUCCESS);
            }
            match self.answer(line.trim()) {
                Ok(Answer::Json(text)) => output::print(&(text + "\n"))?,
                Ok(Answer::Text(text)) => output::print(&text)?,
                Ok(Answer::Unknown) => output::print(HELP)?,
                Ok(Answer::Exit) => return Ok(ExitCode::SUCCESS),
                Err(error) => output::print(&format!("{error}\n"))?,
            }
        }
    }

    fn answer(&mut self, request: &str) -> anyhow::Result<Answer> {
        let (word, argument) = match request.split_once(char::is_whitespace) {
            Some((word, rest)) => (word, rest.trim()),
            None => (request, ""),
        };
        Ok(match (word, argument) {
            ("stats", "") => {
                Answer::Json(json!({ "inodes_count": self.bootstrap.summary().inode_count }).to_string())
            }
            ("blobs", "") => Answer::Json(self.blobs()),
            ("prefetch", "") => Answer::Json(self.prefetch()?),
            ("ls", "") => Answer::Text(self.list()?),
            ("cd", dir) if !dir.is_empty() => Answer::Text(self.change(dir)?),
            ("stat", name) if !name.is_empty() => Answer::Text(self.stat(name)?),
            ("chunk", offset) if !offset.is_empty() => {
                Answer::Text(self.chunks(cli::number("chunk", offset)?)?)
            }
            ("icheck", inode) if !inode.is_empty() => {
                Answer::Text(self.names(Nid(cli::number("icheck", inode)?))?)
            }
            ("exit" | "quit" | "q", "") => Answer::Exit,
            _ => Answer::Unknown,
        })
    }

    fn here(&self) -> Nid {
        self.path.last().map_or(self.bootstrap.root(), |&(_, nid)| nid)
    }

    fn blobs(&self) -> String {
        let list: Vec<_> = self
            .bootstrap
            .blobs()
            .iter()
            .map(|blob| {
                json!({
                    "blob_id": blob.id.as_str(),
                    "readahead_offset": 0,
                    "readahead_size": 0,
                    "decompressed_size": blob.decoded_size,
                    "compressed_size": blob.compressed_size,
                })
            })
            .collect();
        json!(list).to_string()
    }

    fn prefetch(&self) -> anyhow::Result<String> {
        let mut list = Vec::new();
        for nid in self.bootstrap.prefetch() {
            list.push(json!({ "inode": nid.0, "path": self.paths_of(nid)? }));
        }
        Ok(json!(list).to_string())
    }

    fn list(&self) -> anyhow::Result<String> {
        let mut names = Vec::new();
        self.bootstrap.children(self.here(), 0, &mut |entry| {
            names.push((entry.name, entry.nid));
            ControlFlow::Continue(())
        })?;
        let mut out = String::new();
        for (name, nid) in names {
            let attr = self.bootstrap.attr(nid)?;
            writeln!(out, "{} {:>8} {:>12}  {}", mode(&attr), nid, attr.size, shown(name))?;
        }
        Ok(out)
    }

    fn change(&mut self, dir: &str) -> anyhow::Result<String> {
        if dir.starts_with('/') {
            self.path.truncate(1);
        }
        for part in dir.split('/') {
            match part {
                "" | "." => {}
                ".." if self.path.len() > 1 => {
                    self.path.pop();
                }
                ".." => {}
                name => {
                    let entry = self.entry(name)?;
                    if self.bootstrap.attr(entry)?.file_type != FileType::Directory {
                        return Err(anyhow!("{name:?} is not a directory"));
                    }
                    self.path.push((name.as_bytes().to_vec(), entry));
                }
            }
        }
        Ok(String::new())
    }

    fn entry(&self, name: &str) -> anyhow::Result<Nid> {
        let found = self.bootstrap.lookup(self.here(), name.as_bytes())?;
        found.map(|e| e.nid).with_context(|| format!("no entry {name:?} in the current directory"))
    }

    fn stat(&self, name: &str) -> anyhow::Result<String> {
        let nid = if name == "/" { self.bootstrap.root() } else { self.entry(name)? };
        let attr = self.bootstrap.attr(nid)?;
        let mut out = String::new();
        writeln!(out, "inode   {nid}")?;
        writeln!(out, "type    {:?}", attr.file_type)?;
        writeln!(out, "mode    {:o}", attr.mode)?;
        writeln!(out, "owner   {}:{}", attr.uid, attr.gid)?;
        writeln!(out, "size    {}", attr.size)?;
        writeln!(out, "links   {}", attr.nlink)?;
        writeln!(out, "mtime   {}.{:09}", attr.mtime, attr.mtime_nsec)?;
        if attr.rdev != 0 {
            writeln!(out, "rdev    {:#x}", attr.rdev)?;
        }
        if attr.file_type == FileType::Symlink {
            writeln!(out, "target  {}", shown(&self.bootstrap.read_link(nid)?))?;
        }
        let mut xattrs = Vec::new();
        self.bootstrap.xattrs(nid, &mut |x| {
            xattrs.push(([x.prefix, x.suffix].concat(), x.value.len()));
            ControlFlow::Continue(())
        })?;
        for (name, len) in xattrs {
            writeln!(out, "xattr   {} ({len} bytes)", shown(&name))?;
        }
        if attr.file_type == FileType::Regular {
            let chunk_size = u64::from(self.bootstrap.summary().chunk_size);
            for position in 0..u32::try_from(attr.size.div_ceil(chunk_size))? {
                let chunk = self.bootstrap.chunk(nid, position)?;
                write!(
                    out,
                    "chunk   {position}: blob {} chunk {} at {:#x}",
                    chunk.blob, chunk.index, chunk.decoded_offset
                )?;
                match self.bootstrap.chunk_info(chunk.blob, chunk.index) {
                    // Only the blob's context knows the unit of several chunks that it is in.
                    Some(info) if info.compressed_size.get() == 0 => {
                        writeln!(out, ", stored with others, {}", storage::digest::Digest(info.digest))?;
                    }
                    Some(info) => writeln!(
                        out,
                        ", stored {} bytes at {:#x}, {}",
                        info.compressed_size,
                        info.compressed_offset,
                        storage::digest::Digest(info.digest)
                    )?,
                    None => writeln!(out)?,
                }
            }
        }
        Ok(out)
    }

    /// Chunks stored at a byte of a blob, and who uses them.
    fn chunks(&self, offset: u64) -> anyhow::Result<String> {
        let mut out = String::new();
        let chunk_size = u64::from(self.bootstrap.summary().chunk_size);
        self.walk(&mut |path, attr| {
            if attr.file_type != FileType::Regular {
                return Ok(());
            }
            for position in 0..u32::try_from(attr.size.div_ceil(chunk_size))? {
                let chunk = self.bootstrap.chunk(attr.nid, position)?;
                let Some(info) = self.bootstrap.chunk_info(chunk.blob, chunk.index) else { continue };
                let start = info.compressed_offset.get();
                if (start..start.saturating_add(u64::from(info.compressed_size.get()))).contains(&offset) {
                    writeln!(
                        out,
                        "blob {} chunk {} ({} bytes at {start:#x}): chunk {position} of {}",
                        chunk.blob,
                        chunk.index,
                        info.compressed_size,
                        shown(path)
                    )?;
                }
            }
            Ok(())
        })?;
        Ok(out)
    }

    fn names(&self, nid: Nid) -> anyhow::Result<String> {
        Ok(self.paths_of(nid)?.iter().fold(String::new(), |out, path| out + path + "\n"))
    }

    fn paths_of(&self, nid: Nid) -> anyhow::Result<Vec<String>> {
        let mut out = Vec::new();
        self.walk(&mut |path, attr| {
            if attr.nid == nid {
                out.push(shown(path));
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Visits every entry with its absolute path.
    fn walk(&self, visit: &mut dyn FnMut(&[u8], &Attr) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let root = self.bootstrap.root();
        visit(b"/", &self.bootstrap.attr(root)?)?;
        let mut stack = vec![(Vec::new(), root)];
        while let Some((path, dir)) = stack.pop() {
            let mut entries = Vec::new();
            self.bootstrap.children(dir, 0, &mut |entry| {
                entries.push((entry.name, entry.nid));
                ControlFlow::Continue(())
            })?;
            for (name, nid) in entries {
                let below = [&path[..], b"/", name].concat();
                let attr = self.bootstrap.attr(nid)?;
                visit(&below, &attr)?;
                if attr.file_type == FileType::Directory {
                    stack.push((below, nid));
                }
            }
        }
        Ok(())
    }
}

/// `drwxr-xr-x` without the special bits' letters: those are in `stat`.
fn mode(attr: &Attr) -> String {
    let kind = match attr.file_type {
        FileType::Regular => '-',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::CharDevice => 'c',
        FileType::BlockDevice => 'b',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
    };
    let bits = "rwxrwxrwx".chars().enumerate();
    let bits = bits.map(|(n, c)| if attr.mode >> (8 - n) & 1 == 1 { c } else { '-' });
    std::iter::once(kind).chain(bits).collect()
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
