//! Lists of paths: read from text, found in an image.

use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use rafs::bootstrap::{Bootstrap, FileType, Nid};

/// Longest path (PATH_MAX).
pub const MAX_PATH: usize = 4096;

/// Paths of one list.
pub const MAX_PATHS: usize = 1 << 16;

/// Symbolic links that one path may lead through, as in the kernel.
const MAX_LINKS: usize = 40;

/// Components that one path may lead through, its links included.
const MAX_STEPS: usize = 4 * MAX_PATH;

/// Reads one absolute path a line; blank lines are skipped and blanks around a path cut off.
///
/// # Errors
/// The line that is relative or longer than [`MAX_PATH`] bytes; more than [`MAX_PATHS`]; I/O.
pub fn read(mut input: impl BufRead) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut paths = Vec::new();
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        let limit = MAX_PATH as u64 + 2;
        if input.by_ref().take(limit).read_until(b'\n', &mut line).context("read the list of files")? == 0 {
            break;
        }
        let path = line.trim_ascii();
        if path.is_empty() && line.len() < limit as usize {
            continue;
        }
        check(path).with_context(|| format!("line {number} of the list of files"))?;
        if paths.len() == MAX_PATHS {
            bail!("the list of files has more than {MAX_PATHS} paths; name directories instead");
        }
        paths.push(path.to_vec());
    }
    Ok(paths)
}

/// Reads the list in the file at `path`.
///
/// # Errors
/// As [`read`].
pub fn load(path: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let context = || format!("list of files {}", path.display());
    let file = storage::outside::open_or_wait(path).with_context(context)?;
    read(BufReader::new(file)).with_context(context)
}

/// Checks one path of a list.
///
/// # Errors
/// It is relative or too long.
pub fn check(path: &[u8]) -> anyhow::Result<()> {
    if path.len() > MAX_PATH {
        bail!("a path of more than {MAX_PATH} bytes");
    }
    if path.first() != Some(&b'/') {
        bail!("{:?} is not an absolute path in the image", String::from_utf8_lossy(path));
    }
    Ok(())
}

/// The inode at `path`, its links followed inside the image; `None` if there is none.
pub fn find(bootstrap: &dyn Bootstrap, path: &[u8]) -> Option<Nid> {
    let mut at = bootstrap.root();
    // The next component is the last.
    let mut rest: Vec<Vec<u8>> = components(path);
    let mut links = 0;
    for _ in 0..MAX_STEPS {
        let Some(name) = rest.pop() else { return Some(at) };
        if name == b".." {
            at = bootstrap.parent(at).ok()?;
            continue;
        }
        let entry = bootstrap.lookup(at, &name).ok()??;
        if entry.file_type != FileType::Symlink {
            at = entry.nid;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        let target = bootstrap.read_link(entry.nid).ok()?;
        if target.starts_with(b"/") {
            at = bootstrap.root();
        }
        rest.extend(components(&target));
    }
    None
}

/// The components of a path, the last first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}
