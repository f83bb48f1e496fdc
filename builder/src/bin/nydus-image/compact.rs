//! `nydus-image compact`: an image over fewer and fuller blobs.

use std::collections::HashSet;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use builder::progress::Activity;
use builder::rewrite::Rewritten;
use builder::rewrite::compact::{CompactOptions, Compaction};
use builder::sink::BlobSink;
use clap::Args;
use storage::ids::BlobId;

use crate::cli;
use crate::create::dictionary_path;
use crate::data::{self, BackendArgs, BootstrapArgs};
use crate::interrupt::{Interrupt, interruptible};
use crate::output::{self, Output, Summary};
use crate::progress;

/// Bytes gathered before a write to a blob.
const WRITE_BUFFER: usize = 1 << 20;
/// Why there may be nothing to do.
const ALL_STAY: &str = "no blob that may change is sparse, and no two are small enough to join";

/// Put what an image uses of sparse and small blobs into fewer new ones
#[derive(Args, Debug)]
pub struct CompactArgs {
    #[command(flatten)]
    bootstrap: BootstrapArgs,

    /// Directory for the new blobs, named by their SHA-256; blobs of the image are looked for here first
    #[arg(short = 'D', long, value_name = "blob-dir")]
    blob_dir: PathBuf,

    #[command(flatten)]
    backend: BackendArgs,

    /// Rewrite blobs of which the image uses less than this percentage; 0: none for that
    #[arg(long, value_name = "min-used-ratio", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..100))]
    min_used_ratio: u8,

    /// Join blobs of which the image uses less than this many bytes
    #[arg(long, value_name = "compact-blob-size", default_value = "10485760")]
    compact_blob_size: String,

    /// Bytes that joined blobs may come to
    #[arg(long, value_name = "max-compact-size", default_value = "104857600")]
    max_compact_size: String,

    /// Leave images of fewer blobs as they are
    #[arg(long, value_name = "layers-to-compact", default_value_t = 0)]
    layers_to_compact: usize,

    /// Image whose blobs stay as they are, as bootstrap=FILE or FILE
    #[arg(long, value_name = "chunk-dict")]
    chunk_dict: Option<String>,

    /// Where to write the new bootstrap [default: BOOTSTRAP.compact]
    #[arg(short = 'O', long, value_name = "output-bootstrap")]
    output_bootstrap: Option<PathBuf>,

    /// Write a summary in JSON to this file
    #[arg(short = 'J', long, value_name = "output-json")]
    output_json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &CompactArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let interrupt = Interrupt::install()?;
    let path = args.bootstrap.path()?;
    let options = options(args)?;
    let opened = data::open_bootstrap(path)?;
    let to = args.output_bootstrap.clone().unwrap_or_else(|| beside(path));
    let unchanged = |why: &str| {
        let outputs: Vec<&Path> = args.output_json.as_deref().into_iter().chain([&*to]).collect();
        output::nothing_to_do(why, &outputs);
        Ok(ExitCode::SUCCESS)
    };
    let count = opened.bootstrap.blobs().len();
    if count < args.layers_to_compact {
        return unchanged(&format!("{count} blobs, and --layers-to-compact {}", args.layers_to_compact));
    }
    if !options.may_change(&*opened.bootstrap) {
        return unchanged(ALL_STAY);
    }
    let image = data::open_beside(opened, &args.blob_dir, &args.backend, interrupt.token())?;
    let Some(mut compaction) = interruptible(Compaction::plan(image, &options))? else {
        return unchanged(ALL_STAY);
    };
    let observer = progress::observer();
    let meter = observer.begin(Activity::Write, &args.blob_dir.display().to_string(), None);
    let mut blobs = Vec::new();
    for _ in 0..compaction.blob_count() {
        let mut output = Output::in_dir(&args.blob_dir)?;
        let buffered = BufWriter::with_capacity(WRITE_BUFFER, output.writer()?);
        let sink = BlobSink::new(output.name(), buffered);
        let blob = interruptible(compaction.write_blob(sink, &|bytes| meter.advance(bytes)))?;
        blobs.push((output, blob.id.to_string(), blob.size));
    }
    let image = compaction.finish()?;
    let (count, size) = (blobs.len(), blobs.iter().map(|(_, _, size)| size).sum::<u64>());
    // Nothing has its name before everything is known to be good.
    for (output, id, _) in blobs {
        output.commit(&id)?;
    }
    meter.finish(&format!("{count} new blobs"));
    output::write_file(&to, &image.bootstrap)?;
    tracing::info!("the image has {} blobs, {count} of them new with {size} bytes", image.blobs.len());
    summarise(&image, &to, started, args.output_json.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

fn options(args: &CompactArgs) -> anyhow::Result<CompactOptions> {
    let dictionary = args.chunk_dict.as_deref().map(dictionary_blobs).transpose().context("--chunk-dict")?;
    Ok(CompactOptions {
        min_used_ratio: args.min_used_ratio,
        small: cli::number("--compact-blob-size", &args.compact_blob_size)?,
        max: cli::number("--max-compact-size", &args.max_compact_size)?,
        dictionary: dictionary.unwrap_or_default(),
    })
}

fn dictionary_blobs(text: &str) -> anyhow::Result<HashSet<BlobId>> {
    let opened = data::open_bootstrap(dictionary_path(text)?)?;
    Ok(opened.bootstrap.blobs().iter().map(|blob| blob.id.clone()).collect())
}

fn beside(bootstrap: &Path) -> PathBuf {
    let mut path = bootstrap.as_os_str().to_owned();
    path.push(".compact");
    path.into()
}

/// Writes the summary that `-J` asks for.
pub fn summarise(image: &Rewritten, to: &Path, started: Instant, json: Option<&Path>) -> anyhow::Result<()> {
    Summary {
        bootstrap: &to.display().to_string(),
        blobs: &image.blobs,
        fs_version: image.fs_version,
        compressor: image.codec.name(),
        root: image.root.map(|root| root.to_string()).as_deref(),
        seconds: started.elapsed().as_secs_f64(),
    }
    .write(json)
}
