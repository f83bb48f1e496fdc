//! `nydus-image check`: is the image whole, is it what it should be, is it what it was made
//! from.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use builder::chunks::BuiltContent;
use builder::compare::{CompareOptions, Side, compare};
use builder::create::{LayerSource, read_layers};
use builder::image;
use builder::load::LoadedChunks;
use builder::oci::read::read_tree;
use builder::oci::registry::RegistryOptions;
use builder::oci::source::ImageSource;
use builder::oci::transport::Transport;
use builder::overlay::WhiteoutSpec;
use builder::pipeline::{DataOptions, Placement};
use builder::tree::Tree;
use rafs::blob_context::{BlobContext, stored_range};
use rafs::bootstrap::{Blob, Bootstrap, FileType, OpenOptions};
use rafs::format::features::BlobFeatures;
use rafs::format::limits::MAX_BOOTSTRAP_SIZE;
use rafs::fs::{Rafs, RafsOptions};
use storage::codec::Codec;
use storage::digest::TaggedDigest;
use storage::ids::{BlobId, ByteRange};

use crate::cli::{self, CheckArgs};
use crate::create::tar_source;
use crate::interrupt::Interrupt;
use crate::output::{self, Summary};
use crate::progress;

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
    let Some(shared) = structure(path)? else { return Ok(ExitCode::FAILURE) };
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
fn structure(path: &Path) -> anyhow::Result<Option<Arc<dyn Bootstrap>>> {
    let (bytes, options) = match image::inside(path)? {
        Some(bytes) => (bytes, OpenOptions { inlined_blob_id: image::blob_id(path) }),
        None => (read_bootstrap(path)?, OpenOptions::default()),
    };
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
    Ok(Some(Arc::from(rafs::bootstrap::from_bytes(bytes, &options)?)))
}

fn read_bootstrap(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(|| format!("open bootstrap {}", path.display()))?;
    file.take(MAX_BOOTSTRAP_SIZE + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("read bootstrap {}", path.display()))?;
    if bytes.len() as u64 > MAX_BOOTSTRAP_SIZE {
        bail!("{} is larger than {MAX_BOOTSTRAP_SIZE} bytes: not a bootstrap", path.display());
    }
    Ok(bytes)
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
        // That of an original layer may be in no blob, if every chunk has a record.
        let nowhere = blob.features.contains(BlobFeatures::SEPARATE) && blob.context_id.is_none();
        if !blob.has_context() || nowhere && !blob.needs_context() {
            contexts.push(None);
            continue;
        }
        let holder = blob.context_id.as_ref().map(|id| open_context(id, args)).transpose()?;
        let stored = read_range(holder.as_ref().unwrap_or(file), stored_range(blob)?)
            .with_context(|| format!("context of blob {}", blob.id))?;
        contexts.push(Some(BlobContext::from_stored(blob, &stored)?));
    }
    let rafs = Rafs::new(Arc::clone(bootstrap), contexts, RafsOptions { allow_unverified: true })?;
    let mut ok = true;
    for (number, (blob, file)) in (0u32..).zip(bootstrap.blobs().iter().zip(&files)) {
        let found = rafs::check::data(&rafs, number, &mut |range| read_range(file, range))?;
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

fn open_blob(blob: &Blob, count: usize, args: &CheckArgs) -> anyhow::Result<File> {
    let path = match (&args.blob, &args.blob_dir) {
        (Some(path), _) if count == 1 => path.clone(),
        (Some(_), _) => bail!("the image has {count} blobs: use --blob-dir instead of --blob"),
        (None, Some(dir)) => dir.join(blob.id.as_str()),
        (None, None) => bail!("no place to read blobs from"),
    };
    File::open(&path).with_context(|| format!("open blob {}", path.display()))
}

/// The blob `id`, which holds the context of one that is an original layer.
fn open_context(id: &BlobId, args: &CheckArgs) -> anyhow::Result<File> {
    let dir = match (&args.blob_dir, args.blob.as_deref().and_then(Path::parent)) {
        (Some(dir), _) => dir,
        (None, Some(beside)) => beside,
        (None, None) => bail!("no place to read the blob {id} from"),
    };
    let path = dir.join(id.as_str());
    File::open(&path).with_context(|| format!("open {}, which says where chunks lie", path.display()))
}

fn read_range(file: &File, range: ByteRange) -> rafs::Result<Vec<u8>> {
    let failed = |e| rafs::Error::io(format!("read bytes {range} of a blob"), e);
    let size = file.metadata().map_err(failed)?.len();
    if range.end() > size {
        return Err(rafs::Error::corrupt(format!("bytes {range} of a blob file of {size}: it is truncated")));
    }
    // Units and contexts were capped when the bootstrap was checked.
    let mut bytes = vec![0; range.len() as usize];
    file.read_exact_at(&mut bytes, range.start()).map_err(failed)?;
    Ok(bytes)
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
