//! `nydus-image check`: is the image whole, is it what it should be, is it what it was made
//! from.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use builder::ErrorKind;
use builder::chunks::BuiltContent;
use builder::compare::{CompareOptions, Side, compare};
use builder::create::{LayerSource, read_layers};
use builder::image::{self, ImageData, Opened};
use builder::load::LoadedChunks;
use builder::oci::read::read_tree;
use builder::oci::registry::RegistryOptions;
use builder::oci::source::ImageSource;
use builder::oci::transport::Transport;
use builder::overlay::WhiteoutSpec;
use builder::pipeline::{DataOptions, Placement};
use builder::tree::Tree;
use rafs::bootstrap::{Bootstrap, FileType, OpenOptions};
use storage::codec::Codec;
use storage::digest::TaggedDigest;
use storage::ids::ByteRange;

use crate::cli::CheckArgs;
use crate::create::tar_source;
use crate::interrupt::Interrupt;
use crate::output::{self, Summary};
use crate::progress;

/// Differences and faults described before the rest is only counted.
const SHOWN: usize = 20;

/// Runs the command.
pub fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let expected: Option<TaggedDigest> =
        args.expect_root.as_deref().map(str::parse).transpose().context("--expect-root")?;
    let path = args.bootstrap().context("no bootstrap given")?;
    let Some(opened) = structure(path)? else { return Ok(ExitCode::FAILURE) };
    let shared = Arc::clone(&opened.bootstrap);
    let bootstrap = &*shared;
    let mut ok = true;

    let mut report = describe(bootstrap)?;
    if args.verbose {
        tree(bootstrap, &mut report)?;
    }
    if let Some(image) = args.places.open_for_check(opened, args.config.as_deref())? {
        ok &= data(&image, &mut report)?;
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
            output::print(&(serde_json::to_string(&rafs::merkle::prove(bootstrap, &path)?)? + "\n"))?;
        }
        // What is not the image asked for proves nothing.
        Some(_) => {}
        None => output::print(&report)?,
    }
    let blobs: Vec<String> = bootstrap.blobs().iter().map(|b| b.id.to_string()).collect();
    Summary {
        bootstrap: &path.display().to_string(),
        blobs: &blobs,
        fs_version: bootstrap.summary().fs_version,
        compressor: bootstrap.summary().codec.name(),
        root: Some(&root.to_string()),
        seconds: started.elapsed().as_secs_f64(),
    }
    .write(args.output_json.as_deref())?;
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Names every broken rule of the bootstrap; opens it if there is none.
fn structure(path: &Path) -> anyhow::Result<Option<Opened>> {
    let inside = image::inside(path)?;
    let is_inside = inside.is_some();
    let bytes = inside.map_or_else(|| rafs::bootstrap::read(path), Ok)?;
    let options = OpenOptions { inlined_blob_id: image::stated_id(path).filter(|_| is_inside) };
    let report = rafs::check::structure(bytes.clone(), &options)
        .with_context(|| format!("check {}", path.display()))?;
    for fault in report.faults.iter().take(SHOWN) {
        eprintln!("{}: {fault}", path.display());
    }
    let more = report.suppressed + report.faults.len().saturating_sub(SHOWN) as u64;
    if more > 0 {
        eprintln!("{}: {more} further faults", path.display());
    }
    if !report.is_clean() {
        return Ok(None);
    }
    Ok(Some(match is_inside {
        true => image::open_inside(path, bytes)?,
        false => image::open_bare(rafs::bootstrap::from_bytes(bytes, &options)?),
    }))
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
fn data(image: &ImageData, report: &mut String) -> anyhow::Result<bool> {
    let bootstrap = image.rafs().bootstrap();
    let mut ok = true;
    for (number, blob) in (0u32..).zip(bootstrap.blobs()) {
        // Units were capped when the bootstrap was checked.
        let mut read = |range| image.read_stored(number, range).map_err(|e| read_fault(range, e));
        let found = rafs::check::data(image.rafs(), number, &mut read)?;
        for fault in found.faults.iter().take(SHOWN) {
            eprintln!("{fault}");
        }
        let damaged = found.faults.len() as u64 + found.suppressed;
        if damaged > SHOWN as u64 {
            eprintln!("blob {}: {} further faults", blob.id, damaged - SHOWN as u64);
        }
        ok &= damaged == 0;
        writeln!(
            report,
            "blob {}: {} chunks match their digests, {damaged} faults, {} not used by this image",
            blob.id, found.verified, found.unverified
        )?;
    }
    Ok(ok)
}

/// A blob that ends too early is a fault of its chunks; anything else ends the check.
fn read_fault(range: ByteRange, error: builder::Error) -> rafs::Error {
    match error.kind() {
        ErrorKind::Corrupt => rafs::Error::corrupt(format!("stored bytes are not there: {error}")),
        _ => rafs::Error::new(rafs::ErrorKind::Storage, format!("read bytes {range}: {error}")),
    }
    .with_source(error)
}

/// Compares with the source layers, entry by entry.
fn sources(bootstrap: &dyn Bootstrap, args: &CheckArgs, report: &mut String) -> anyhow::Result<bool> {
    let summary = bootstrap.summary();
    let records: Vec<_> = bootstrap.blobs().iter().map(|b| b.record).collect();
    let mut image_chunks = LoadedChunks::default();
    let image = image_chunks.load(bootstrap, &records)?;
    let directories = args.source.iter().any(|source| Path::new(source).is_dir());
    let (tree, content) = match image_source(args)? {
        Some(source) => read_image(&source, summary)?,
        None => read_files(&image, summary, args)?,
    };
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

/// The source as an image: a single one, named as `convert` names images.
fn image_source(args: &CheckArgs) -> anyhow::Result<Option<ImageSource>> {
    let [source] = &args.source[..] else { return Ok(None) };
    let named = source.to_str().filter(|s| Transport::is_named(s) && !Path::new(s).exists());
    let Some(named) = named else { return Ok(None) };
    let transport: Transport = named.parse().context("--source")?;
    let source = ImageSource::open(&transport, args.platform.as_ref(), &RegistryOptions::default())?;
    Ok(Some(source))
}

/// The merged tree of an image's layers.
fn read_image(
    source: &ImageSource,
    summary: &rafs::bootstrap::Summary,
) -> anyhow::Result<(Tree, BuiltContent)> {
    let interrupt = Interrupt::install()?;
    let observer = progress::observer();
    Ok(read_tree(source, summary, crate::convert::DEFAULT_JOBS, &*observer, interrupt.token())?)
}

/// The merged tree of directories and tar streams, lowest first.
fn read_files(
    image: &Tree,
    summary: &rafs::bootstrap::Summary,
    args: &CheckArgs,
) -> anyhow::Result<(Tree, BuiltContent)> {
    let mut layers = Vec::new();
    for source in &args.source {
        let path = Path::new(source);
        let meta = std::fs::metadata(path).with_context(|| format!("--source {}", path.display()))?;
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
        placement: Placement::Blob,
        batch_size: 0,
        cipher: None,
    };
    Ok(read_layers(layers, data, whiteouts)?)
}
