//! `nydus-image optimize`: what a start reads, in a blob of its own.

use std::io::{BufWriter, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use builder::progress::Activity;
use builder::rewrite::optimize::{HotFiles, Optimization};
use builder::sink::BlobSink;
use clap::Args;

use crate::compact::summarise;
use crate::data::{self, BootstrapArgs, SourceArgs};
use crate::interrupt::{Interrupt, interruptible};
use crate::output::{self, Output};
use crate::progress;

/// Bytes gathered before a write to the blob.
const WRITE_BUFFER: usize = 1 << 20;
/// Largest list of files.
const MAX_LIST_SIZE: u64 = 64 << 20;

/// Put what a start of an image reads into a blob of its own
#[derive(Args, Debug)]
pub struct OptimizeArgs {
    #[command(flatten)]
    bootstrap: BootstrapArgs,

    /// Files that a start reads, as `nydusctl trace --optimize` prints them
    #[arg(short = 'p', long, value_name = "prefetch-files")]
    prefetch_files: PathBuf,

    #[command(flatten)]
    source: SourceArgs,

    /// Accepted; where the data is the other options say
    #[arg(short = 'C', long, value_name = "config")]
    config: Option<PathBuf>,

    /// Where to write the new bootstrap
    #[arg(short = 'O', long, value_name = "output-bootstrap", default_value = "optimized_bootstrap")]
    output_bootstrap: PathBuf,

    /// Directory for the new blob, named by its SHA-256 [default: --blob-dir]
    #[arg(long, value_name = "output-blob-dir")]
    output_blob_dir: Option<PathBuf>,

    /// Write a summary in JSON to this file
    #[arg(short = 'J', long, value_name = "output-json")]
    output_json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &OptimizeArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let interrupt = Interrupt::install()?;
    let dir = args.output_blob_dir.as_deref().or(args.source.blob_dir());
    let dir = dir.context("no place for the new blob: give --output-blob-dir")?;
    let files = read_list(&args.prefetch_files)?;
    let opened = data::open_bootstrap(args.bootstrap.path()?)?;
    let unchanged = |why| {
        let json = args.output_json.as_deref();
        let outputs: Vec<&Path> = json.into_iter().chain([&*args.output_bootstrap]).collect();
        output::nothing_to_do(why, &outputs);
        Ok(ExitCode::SUCCESS)
    };
    if files.is_empty() {
        return unchanged("no file is named");
    }
    let image = args.source.open(opened, interrupt.token())?;
    let Some(mut optimization) = interruptible(Optimization::plan(image, &files))? else {
        return unchanged("no file that is named has data in the image");
    };
    let observer = progress::observer();
    let meter = observer.begin(Activity::Write, &dir.display().to_string(), None);
    let mut output = Output::in_dir(dir)?;
    let buffered = BufWriter::with_capacity(WRITE_BUFFER, output.writer()?);
    let sink = BlobSink::new(output.name(), buffered);
    let blob = interruptible(optimization.write_blob(sink, &|bytes| meter.advance(bytes)))?;
    let count = optimization.chunk_count();
    let image = optimization.finish()?;
    // Nothing has its name before everything is known to be good.
    output.commit(&blob.id.to_string())?;
    meter.finish(&format!("{count} chunks"));
    output::write_file(&args.output_bootstrap, &image.bootstrap)?;
    tracing::info!("{count} chunks that a start reads are in blob {} ({} bytes)", blob.id, blob.size);
    summarise(&image, &args.output_bootstrap, started, args.output_json.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

fn read_list(path: &Path) -> anyhow::Result<HotFiles> {
    let failed = || format!("prefetch files {}", path.display());
    let mut text = Vec::new();
    let file = std::fs::File::open(path).with_context(failed)?;
    file.take(MAX_LIST_SIZE + 1).read_to_end(&mut text).with_context(failed)?;
    if text.len() as u64 > MAX_LIST_SIZE {
        bail!("{} is larger than {MAX_LIST_SIZE} bytes", path.display());
    }
    HotFiles::parse(&text).with_context(failed)
}
