//! `builder-floor`: how fast a build can be on this machine, for the bench to divide by.
//!
//! Prints milliseconds. What is not part of the floor is not in that time: reading files, finding out what
//! is to be done, and memory that is touched for the first time.

mod plan;
mod schedule;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use flate2::bufread::MultiGzDecoder;
use serde_json::Value;
use storage::codec::Codec;
use tests::{Context, Result};

/// Decoded bytes taken at once where they are only looked at.
const BLOCK: usize = 256 << 10;

#[derive(Debug, Parser)]
#[command(about)]
struct Cli {
    #[command(subcommand)]
    floor: Floor,
}

#[derive(Debug, Subcommand)]
enum Floor {
    /// Converting an image: its layers inflated, sources, tars, chunks and blobs hashed, new chunks
    /// compressed, on all cores
    Convert {
        /// OCI layout of one image with layers of gzip
        layout: PathBuf,
        #[arg(long, default_value_t = builder::convert::DEFAULT_CHUNK_SIZE)]
        chunk_size: u32,
        /// Bytes of a unit of small files [default: that of convert]
        #[arg(long)]
        batch_size: Option<u32>,
        #[arg(long, default_value = "zstd")]
        compressor: Codec,
    },
    /// Inflating a gzip file on one core
    Inflate { file: PathBuf },
}

fn main() -> Result<()> {
    let took = match Cli::parse().floor {
        Floor::Convert { layout, chunk_size, batch_size, compressor } => {
            let files = layers(&layout)?;
            let batch_size = batch_size.unwrap_or(builder::convert::default_batch_size(chunk_size));
            let plans = plan::of_layers(&files, plan::Units { chunk_size, batch_size })?;
            schedule::run(&files, &plans, compressor)?
        }
        Floor::Inflate { file } => inflate(&read(&file)?)?,
    };
    writeln!(std::io::stdout(), "{:.0}", took.as_secs_f64() * 1e3)?;
    Ok(())
}

fn inflate(stored: &[u8]) -> Result<Duration> {
    let mut block = vec![1; BLOCK];
    let start = Instant::now();
    let mut decoder = MultiGzDecoder::new(stored);
    while decoder.read(&mut block)? > 0 {}
    Ok(start.elapsed())
}

/// The layers of the only image of a layout, as they are stored.
fn layers(layout: &Path) -> Result<Vec<Vec<u8>>> {
    let index: Value = serde_json::from_slice(&read(&layout.join("index.json"))?)?;
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        read(&layout.join("blobs/sha256").join(digest.context("a descriptor without a SHA-256")?))
    };
    let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])?)?;
    manifest["layers"].as_array().context("a manifest without layers")?.iter().map(blob).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{}", path.display()))
}
