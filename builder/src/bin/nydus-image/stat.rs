//! `nydus-image stat`: where the bytes of images are, and what they share.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use builder::stat::{Known, Stat};
use clap::Args;
use serde_json::json;

use crate::cli::{Digester, bootstrap_file};
use crate::{data, output};

/// Tell where the bytes of images are, and what they have in common
#[derive(Args, Debug)]
pub struct StatArgs {
    /// Bootstrap of the base image
    #[arg(short = 'B', long, value_name = "bootstrap", required_unless_present = "blob_dir", value_parser = bootstrap_file())]
    bootstrap: Option<PathBuf>,

    /// Directory with bootstraps of base images, alone or inside their blobs
    #[arg(short = 'D', long, value_name = "blob-dir", conflicts_with = "bootstrap")]
    blob_dir: Option<PathBuf>,

    /// Bootstrap of an image to compare with the base
    #[arg(short = 'T', long, value_name = "target", value_parser = bootstrap_file())]
    target: Option<PathBuf>,

    /// Accepted; no data is read
    #[arg(short = 'C', long, value_name = "config")]
    config: Option<PathBuf>,

    /// Accepted; images say themselves what their digests are
    #[arg(long, value_name = "digester", default_value = "blake3")]
    digester: Digester,

    /// Write the numbers in JSON to this file
    #[arg(short = 'J', long, value_name = "output-json")]
    output_json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &StatArgs) -> anyhow::Result<ExitCode> {
    let mut known = Known::default();
    let mut base = Stat::new();
    match (&args.bootstrap, &args.blob_dir) {
        (Some(path), _) => base.add(&*data::open_bootstrap(path)?.bootstrap, &mut known)?,
        (None, Some(dir)) => add_directory(dir, &mut base, &mut known)?,
        (None, None) => bail!("no base image: give --bootstrap or --blob-dir"),
    }
    let mut target = Stat::new();
    if let Some(path) = &args.target {
        target.add(&*data::open_bootstrap(path)?.bootstrap, &mut known)?;
    }
    let mut report = String::new();
    describe("base", &base, &mut report)?;
    if args.target.is_some() {
        describe("target", &target, &mut report)?;
    }
    output::print(&report)?;
    if let Some(path) = &args.output_json {
        let document = json!({
            "dedup_enabled": args.blob_dir.is_some(),
            "target_enabled": args.target.is_some(),
            "base_image": base,
            "target_image": target,
        });
        output::write_file(path, document.to_string().as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds every bootstrap in `dir`, in order of names. Other files (blobs, caches) are passed over.
fn add_directory(dir: &Path, base: &mut Stat, known: &mut Known) -> anyhow::Result<()> {
    let failed = || format!("read directory {}", dir.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        if entry.file_type().with_context(failed)?.is_file() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    let mut count = 0;
    for path in paths {
        match data::open_bootstrap(&path) {
            Ok(opened) => {
                base.add(&*opened.bootstrap, known).with_context(|| path.display().to_string())?;
                count += 1;
            }
            Err(error) => tracing::debug!("{}: passed over: {error:#}", path.display()),
        }
    }
    if count == 0 {
        bail!("{}: no bootstrap in it", dir.display());
    }
    Ok(())
}

fn describe(name: &str, stat: &Stat, out: &mut String) -> anyhow::Result<()> {
    writeln!(out, "{name}: {} directories, {} files, {} symlinks", stat.dirs, stat.files, stat.symlinks)?;
    let rows = [
        ("all", stat.chunks, stat.comp_size, stat.uncomp_size),
        ("own", stat.own_chunks, stat.own_comp_size, stat.own_uncomp_size),
        ("dedup", stat.dedup_chunks, stat.dedup_comp_size, stat.dedup_uncomp_size),
        ("ref", stat.ref_chunks, stat.ref_comp_size, stat.ref_uncomp_size),
    ];
    writeln!(out, "  {:<6}{:>12}{:>16}{:>16}", "", "chunks", "stored", "decoded")?;
    for (kind, chunks, stored, decoded) in rows {
        writeln!(out, "  {kind:<6}{chunks:>12}{stored:>16}{decoded:>16}")?;
    }
    writeln!(out, "  padding {} bytes", stat.padding_size)?;
    Ok(())
}
