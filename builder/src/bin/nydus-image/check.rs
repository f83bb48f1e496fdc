//! `nydus-image check`: is the image whole, is it what it should be, is it what it was made
//! from.

use std::fmt::Write as _;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context as _, bail};
use builder::compare::{CompareOptions, Side, compare};
use builder::create::{LayerSource, read_layers};
use builder::load::LoadedChunks;
use builder::overlay::WhiteoutSpec;
use builder::pipeline::DataOptions;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Blob, Bootstrap, FileType, OpenOptions};
use rafs::fs::{Rafs, RafsOptions};
use rayon::prelude::*;
use storage::codec::{Codec, decompress};
use storage::digest::TaggedDigest;
use storage::extent::{ChunkExtent, FetchUnit};
use storage::ids::{ByteRange, ChunkIndex};

use crate::cli::{self, CheckArgs};
use crate::create::tar_source;
use crate::output::Summary;

/// Differences and faults described before the rest is only counted.
const SHOWN: usize = 20;

/// Runs the command.
pub fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    if args.config.is_some() {
        return Err(cli::not_built("--config"));
    }
    let expected: Option<TaggedDigest> =
        args.expect_root.as_deref().map(str::parse).transpose().context("--expect-root")?;
    let path = args.bootstrap().context("no bootstrap given")?;
    let shared: Arc<dyn Bootstrap> = Arc::from(rafs::bootstrap::open(path, &OpenOptions::default())?);
    let bootstrap = &*shared;
    let mut ok = true;

    let mut report = describe(bootstrap)?;
    if args.verbose {
        tree(bootstrap, &mut report)?;
    }
    if args.blob_dir.is_some() || args.blob.is_some() {
        ok &= data(&shared, args, &mut report)?;
    }
    let root = rafs::merkle::image_root(bootstrap)?;
    writeln!(report, "image root digest: {root}")?;
    if let Some(expected) = expected.filter(|e| *e != root) {
        ok = false;
        eprintln!("{}: the image root digest is {root}, {expected} was expected", path.display());
    }
    if !args.source.is_empty() {
        ok &= sources(bootstrap, args, &mut report)?;
    }
    match &args.prove {
        Some(path) if ok => {
            let path = path.as_os_str().as_bytes();
            let path = path.split(|&b| b == b'/').filter(|c| !c.is_empty()).collect::<Vec<_>>().join(&b'/');
            println!("{}", serde_json::to_string(&rafs::merkle::prove(bootstrap, &path)?)?);
        }
        // What is not the image asked for proves nothing.
        Some(_) => {}
        None => print!("{report}"),
    }
    let blobs: Vec<String> = bootstrap.blobs().iter().map(|b| b.id.to_string()).collect();
    Summary {
        bootstrap: &path.display().to_string(),
        blobs: &blobs,
        compressor: bootstrap.summary().codec.name(),
        root: &root.to_string(),
        seconds: started.elapsed().as_secs_f64(),
    }
    .write(args.output_json.as_deref())?;
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(bootstrap: &dyn Bootstrap) -> anyhow::Result<String> {
    let mut out = String::new();
    let summary = bootstrap.summary();
    writeln!(
        out,
        "RAFS v{} metadata is valid: {} entries, {} blobs",
        summary.fs_version,
        summary.inode_count,
        bootstrap.blobs().len()
    )?;
    for (index, blob) in bootstrap.blobs().iter().enumerate() {
        writeln!(
            out,
            "{index:>4}: {}, compressed size {:#x}, uncompressed size {:#x}, chunk size {:#x}, chunks {}, features {:#x}",
            blob.id,
            blob.compressed_size,
            blob.decoded_size,
            summary.chunk_size,
            blob.chunk_count,
            blob.features.bits()
        )?;
    }
    Ok(out)
}

/// Prints every entry: type and permission bits, owner, size, path.
fn tree(bootstrap: &dyn Bootstrap, out: &mut String) -> anyhow::Result<()> {
    let mut stack = vec![(Vec::new(), bootstrap.root())];
    while let Some((path, nid)) = stack.pop() {
        let attr = bootstrap.attr(nid)?;
        let shown = if path.is_empty() { "/".into() } else { String::from_utf8_lossy(&path) };
        writeln!(
            out,
            "{:06o} {}:{} {:>12} nid {} links {} {shown}",
            attr.mode, attr.uid, attr.gid, attr.size, nid, attr.nlink
        )?;
        if attr.file_type == FileType::Directory {
            let first = stack.len();
            bootstrap.children(nid, 0, &mut |entry| {
                stack.push(([&path[..], b"/", entry.name].concat(), entry.nid));
                ControlFlow::Continue(())
            })?;
            // The stack is popped from its end: in order of names.
            stack[first..].reverse();
        }
    }
    Ok(())
}

/// Compares every chunk with its digest.
fn data(bootstrap: &Arc<dyn Bootstrap>, args: &CheckArgs, report: &mut String) -> anyhow::Result<bool> {
    let mut files = Vec::new();
    for blob in bootstrap.blobs() {
        files.push(open_blob(blob, bootstrap.blobs().len(), args)?);
    }
    let mut contexts = Vec::new();
    for (blob, file) in bootstrap.blobs().iter().zip(&files) {
        let stored =
            read_range(file, stored_range(blob)?).with_context(|| format!("context of blob {}", blob.id))?;
        contexts.push(Some(BlobContext::from_stored(blob, &stored)?));
    }
    let rafs = Rafs::new(Arc::clone(bootstrap), contexts, RafsOptions { allow_unverified: true })?;
    let mut ok = true;
    for (number, (blob, file)) in (0u32..).zip(bootstrap.blobs().iter().zip(&files)) {
        let units = units(&rafs, number, blob)?;
        let chunks: usize = units.iter().map(|(_, members)| members.len()).sum();
        let faults = Mutex::new((Vec::new(), 0u64));
        units.par_iter().for_each(|(unit, members)| {
            for fault in unit_faults(file, unit, members) {
                // Only a panic poisons the lock, and that ends the program.
                if let Ok(mut faults) = faults.lock() {
                    faults.1 += 1;
                    faults.0.push(fault);
                    faults.0.sort_unstable();
                    faults.0.truncate(SHOWN);
                }
            }
        });
        let (shown, count) = faults.into_inner().unwrap_or_default();
        for (index, fault) in &shown {
            eprintln!("blob {}: chunk {index}: {fault}", blob.id);
        }
        if count > shown.len() as u64 {
            eprintln!("blob {}: {} further chunks are damaged", blob.id, count - shown.len() as u64);
        }
        ok &= count == 0;
        writeln!(report, "blob {}: {chunks} chunks read, {count} damaged", blob.id)?;
    }
    Ok(ok)
}

fn open_blob(blob: &Blob, count: usize, args: &CheckArgs) -> anyhow::Result<File> {
    let path = match (&args.blob, &args.blob_dir) {
        (Some(path), _) if count == 1 => path.clone(),
        (Some(_), _) => bail!("the image has {count} blobs: use --blob-dir instead of --blob"),
        (None, Some(dir)) => dir.join(blob.id.as_str()),
        (None, None) => bail!("no place to read blobs from"),
    };
    File::open(&path).with_context(|| format!("open blob {}", path.display()))
}

/// A fetch unit and the chunks in it that have digests.
type Unit = (FetchUnit, Vec<ChunkExtent>);

fn units(rafs: &Rafs, number: u32, blob: &Blob) -> anyhow::Result<Vec<Unit>> {
    let mut units: Vec<Unit> = Vec::new();
    for index in (0..blob.chunk_count).map(ChunkIndex) {
        let extent = rafs.chunk_extent(number, index)?;
        // Chunks that this image does not use have no digest here.
        if extent.digest.is_none() {
            continue;
        }
        match units.last_mut() {
            Some((unit, members)) if *unit == extent.unit => members.push(extent),
            _ => units.push((extent.unit, vec![extent])),
        }
    }
    Ok(units)
}

fn unit_faults(file: &File, unit: &FetchUnit, members: &[ChunkExtent]) -> Vec<(u32, String)> {
    let all = |fault: String| members.iter().map(|m| (m.index.0, fault.clone())).collect();
    let stored = match read_range(file, unit.compressed) {
        Ok(stored) => stored,
        Err(error) => return all(error.to_string()),
    };
    let mut decoded = vec![0; unit.decoded_len as usize];
    if let Err(error) = decompress(unit.codec, &stored, &mut decoded) {
        return all(error.to_string());
    }
    let mut faults = Vec::new();
    for member in members {
        let start = member.offset_in_unit as usize;
        let bytes = decoded.get(start..start + member.len as usize);
        let fault = match (bytes, member.digest) {
            (None, _) => Some("lies outside its unit".to_owned()),
            (Some(bytes), Some(expected)) if expected.algorithm.digest(bytes) != expected.digest => {
                Some("its digest differs".to_owned())
            }
            _ => None,
        };
        faults.extend(fault.map(|f| (member.index.0, f)));
    }
    faults
}

fn read_range(file: &File, range: ByteRange) -> anyhow::Result<Vec<u8>> {
    let size = file.metadata()?.len();
    if range.end() > size {
        bail!("bytes {range} are wanted of a file of {size}: it is truncated");
    }
    let mut bytes = vec![0; usize::try_from(range.len())?];
    file.read_exact_at(&mut bytes, range.start())?;
    Ok(bytes)
}

/// Compares with the source layers, entry by entry.
fn sources(bootstrap: &dyn Bootstrap, args: &CheckArgs, report: &mut String) -> anyhow::Result<bool> {
    let summary = bootstrap.summary();
    let records: Vec<_> = bootstrap.blobs().iter().map(|b| b.record).collect();
    let mut image_chunks = LoadedChunks::default();
    let image = image_chunks.load(bootstrap, &records)?;
    let mut layers = Vec::new();
    let mut directories = false;
    for source in &args.source {
        let path = Path::new(source);
        let meta = std::fs::metadata(path).with_context(|| format!("--source {}", path.display()))?;
        directories |= meta.is_dir();
        layers.push(if meta.is_dir() { LayerSource::Directory(path) } else { tar_source(path)? });
    }
    // A single layer may have been built with its markers kept.
    let mut marked = false;
    image.walk(|path, _| {
        let name = path.rsplit(|&b| b == b'/').next().unwrap_or_default();
        marked |= name.starts_with(b".wh.");
        Ok(())
    })?;
    let whiteouts = if marked && layers.len() == 1 { WhiteoutSpec::None } else { WhiteoutSpec::Oci };
    let data = DataOptions {
        codec: Codec::None,
        digester: summary.digester,
        chunk_size: summary.chunk_size,
        threads: 0,
    };
    let (tree, content) = read_layers(layers, data, whiteouts)?;
    let found = compare(
        Side { tree: &tree, chunks: &content },
        Side { tree: &image, chunks: &image_chunks },
        CompareOptions { chunk_size: summary.chunk_size, limit: SHOWN, ignore_root_mtime: directories },
    );
    for difference in &found.first {
        eprintln!("{difference}");
    }
    if found.count > found.first.len() as u64 {
        eprintln!("{} further differences", found.count - found.first.len() as u64);
    }
    writeln!(report, "source: {} entries compared, {} differences", found.entries, found.count)?;
    Ok(found.count == 0)
}
