//! `nydus-image export --block`: an image as one disk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use builder::ErrorKind;
use builder::image::{DataOptions, ImageData};
use clap::Args;
use rafs::format::features::ImageFlags;
use storage::engine::EngineConfig;

use crate::cli::bootstrap_file;
use crate::data;
use crate::interrupt::Interrupt;
use crate::output::{self, Output};

/// Write an image as a disk that a kernel mounts
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Write a block device image, the only kind there is
    #[arg(long, required = true)]
    block: bool,

    /// Bootstrap of the image
    #[arg(short = 'B', long, value_name = "bootstrap", required_unless_present = "config", value_parser = bootstrap_file())]
    bootstrap: Option<PathBuf>,

    /// Directory with the blobs, named by their ids
    #[arg(
        short = 'D',
        long = "localfs-dir",
        alias = "blob-dir",
        value_name = "localfs-dir",
        required_unless_present = "config"
    )]
    localfs_dir: Option<PathBuf>,

    /// Blob entry, which says where bootstrap and blobs are
    #[arg(short = 'C', long, value_name = "config", conflicts_with = "localfs_dir")]
    config: Option<PathBuf>,

    /// Where to write the disk [default: BOOTSTRAP.disk in --localfs-dir]
    #[arg(short = 'O', long, value_name = "output")]
    output: Option<PathBuf>,

    /// Threads that decode and verify
    #[arg(long, value_name = "threads", default_value = "4")]
    threads: usize,

    /// Append a dm-verity hash tree and print what opens it
    #[arg(long)]
    verity: bool,
}

/// Runs the command.
pub fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::install()?;
    let entry = args.config.as_deref().map(data::BlobEntry::load).transpose()?;
    let stated = entry.as_ref().and_then(|entry| entry.bootstrap.as_deref());
    let bootstrap = args
        .bootstrap
        .as_deref()
        .or(stated)
        .context("the blob entry names no bootstrap: give --bootstrap")?;
    let place = match (&args.output, &args.localfs_dir) {
        (Some(path), _) => path.clone(),
        (None, Some(dir)) => default_place(bootstrap, dir)?,
        (None, None) => bail!("no place for the disk: give --output"),
    };
    let source = match (&entry, &args.localfs_dir) {
        (Some(entry), _) => entry.backend.source(&std::env::temp_dir())?,
        (None, Some(dir)) => data::directory(dir)?,
        (None, None) => bail!("no place to read blobs from: give --localfs-dir or --config"),
    };
    let mut file =
        File::open(bootstrap).with_context(|| format!("open bootstrap {}", bootstrap.display()))?;
    let opened = data::open_bootstrap(bootstrap)?;
    if opened.blob.is_some() {
        bail!(
            "{} is a blob, want a bootstrap: the disk begins with it; make one with merge",
            bootstrap.display()
        );
    }
    let engine = data::engine(EngineConfig { cpu_jobs: args.threads.max(1), ..EngineConfig::default() })?;
    // A tar that is a blob has no chunk digests, but its name is one.
    let tarfs = opened.bootstrap.summary().flags.contains(ImageFlags::TARFS_MODE);
    let options =
        DataOptions { allow_unverified: tarfs, cancel: interrupt.token().clone(), ..DataOptions::default() };
    let image = ImageData::open(engine, opened.bootstrap, &*source, options)?;

    let mut output = Output::at(&place)?;
    if matches!(output, Output::Stream(..)) {
        bail!("{} is a FIFO or device: a disk is written at any place, want a regular file", place.display());
    }
    let disk = match builder::export::export(&image, &mut file, &output.writer()?, args.verity) {
        Err(error) if error.kind() == ErrorKind::Cancelled => bail!("interrupted: no disk was written"),
        done => done.with_context(|| format!("export to {}", place.display()))?,
    };
    output.commit("")?;
    tracing::info!("{}: {} bytes in blocks of {}", place.display(), disk.size, disk.block_size);
    if let Some(verity) = disk.verity {
        output::print(&format!("{verity}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn default_place(bootstrap: &Path, dir: &Path) -> anyhow::Result<PathBuf> {
    let mut name = bootstrap.file_name().context("the bootstrap has no name: give --output")?.to_owned();
    name.push(".disk");
    Ok(dir.join(name))
}
