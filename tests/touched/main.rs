//! `touched-chunks`: which chunks hold given pages of files, and how much of a blob they are.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;

use clap::Parser;
use rafs::blob_context::BlobContext;
use rafs::bootstrap::{Bootstrap, Nid, OpenOptions};
use rafs::fs::{Rafs, RafsOptions};
use serde_json::json;
use tests::{Context, Result};

/// Reads lines `FIRST LENGTH PATH`, bytes of a file of the image, from standard input, and prints
/// as JSON how many chunks they lie in and how many bytes those are in the blobs as stored.
#[derive(Debug, Parser)]
struct Cli {
    /// Bootstrap of the image
    #[arg(long)]
    bootstrap: PathBuf,
    /// Cache of a daemon that has served the image: small files may share what they are stored in, and it
    /// has what says so
    #[arg(long)]
    cache: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let bootstrap = rafs::bootstrap::open(&cli.bootstrap, &OpenOptions::default())?;
    let needed = Rafs::needs_context(&*bootstrap);
    let contexts = bootstrap.blobs().iter().zip(needed).map(|(blob, needed)| {
        let Some(cache) = cli.cache.as_ref().filter(|_| needed) else { return Ok(None) };
        let path = cache.join(format!("{}.blob.meta", blob.id));
        let file = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
        Ok(Some(BlobContext::from_cache_file(blob, &file)?))
    });
    let contexts = contexts.collect::<Result<Vec<_>>>()?;
    let rafs = Rafs::new(bootstrap.into(), contexts, RafsOptions::default())?;
    let mut units = HashMap::new();
    let mut slices = Vec::new();
    for line in std::io::stdin().lock().split(b'\n') {
        let line = line?;
        let mut parts = line.splitn(3, |byte| *byte == b' ');
        let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
        let (first, length) = number().zip(number()).context("want FIRST LENGTH PATH")?;
        let path = parts.next().context("want FIRST LENGTH PATH")?;
        let nid = find(&**rafs.bootstrap(), path)
            .with_context(|| format!("{} is not in the image", String::from_utf8_lossy(path)))?;
        slices.clear();
        rafs.read(nid, first, u32::try_from(length)?, &mut slices)?;
        for slice in &slices {
            let stored = slice.extent.unit.compressed;
            units.insert((slice.blob, stored.start()), stored.len());
        }
    }
    let bytes: u64 = units.values().sum();
    writeln!(std::io::stdout(), "{}", json!({ "chunks": units.len(), "bytes": bytes }))?;
    Ok(())
}

fn find(bootstrap: &dyn Bootstrap, path: &[u8]) -> Option<Nid> {
    let mut nid = bootstrap.root();
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        nid = bootstrap.lookup(nid, name).ok()??.nid;
    }
    Some(nid)
}
