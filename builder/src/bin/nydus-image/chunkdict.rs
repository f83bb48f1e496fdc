//! `nydus-image chunkdict generate`: what images have in common.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use builder::chunkdict::{DictionarySource, generate};
use clap::{Args, Subcommand};

use crate::cli::{PrefetchPolicy, bootstrap_file};
use crate::data;
use crate::output::{self, Summary};

/// Arguments of `chunkdict`
#[derive(Args, Debug)]
pub struct ChunkdictArgs {
    #[command(subcommand)]
    command: ChunkdictCommand,
}

/// What to do with dictionaries
#[derive(Debug, Subcommand)]
enum ChunkdictCommand {
    /// Make a dictionary of the chunks that two or more images have
    Generate(Box<GenerateArgs>),
}

/// Make a dictionary of the chunks that two or more images have
#[derive(Args, Debug)]
struct GenerateArgs {
    /// Bootstraps, each in a directory named IMAGE:TAG; those with the same name count as one image
    #[arg(value_name = "SOURCE", required = true, value_parser = bootstrap_file())]
    sources: Vec<PathBuf>,

    /// Where to write the dictionary, a bootstrap
    #[arg(short = 'B', long, value_name = "bootstrap", required_unless_present = "blob_dir")]
    bootstrap: Option<PathBuf>,

    /// Directory for the dictionary, named by its digest, without --bootstrap
    #[arg(short = 'D', long, value_name = "blob-dir")]
    blob_dir: Option<PathBuf>,

    /// sqlite:///PATH or sqlite://:memory:; accepted, the work is done in memory
    #[arg(long, value_name = "database")]
    database: Option<String>,

    /// Accepted; a dictionary has no files to prefetch, and stdin is not read
    #[arg(long, value_name = "prefetch-policy", default_value = "none")]
    prefetch_policy: PrefetchPolicy,

    /// Accepted; no data is read
    #[arg(short = 'C', long, value_name = "config")]
    config: Option<PathBuf>,

    /// Print the blobs of the dictionary: id, chunks, decoded bytes
    #[arg(short = 'v', long)]
    verbose: bool,

    /// Write a summary in JSON to this file
    #[arg(short = 'J', long, value_name = "output-json")]
    output_json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &ChunkdictArgs) -> anyhow::Result<ExitCode> {
    let ChunkdictCommand::Generate(args) = &args.command;
    let started = Instant::now();
    if let Some(text) = &args.database {
        let path = database(text)?;
        if let Some(path) = path {
            tracing::info!("the dictionary is made in memory: {path} is not written");
        }
    }
    let mut sources = Vec::new();
    for path in &args.sources {
        let bootstrap = data::open_bootstrap(path)?.bootstrap;
        sources.push(DictionarySource {
            name: path.display().to_string(),
            version: version(path),
            bootstrap,
        });
    }
    let dictionary = generate(&sources)?;
    let path =
        output::write_bootstrap(args.bootstrap.as_deref(), args.blob_dir.as_deref(), &dictionary.bootstrap)?;
    let blobs: Vec<String> = dictionary.blobs.iter().map(|blob| blob.id.clone()).collect();
    Summary {
        bootstrap: &path.display().to_string(),
        blobs: &blobs,
        fs_version: dictionary.fs_version,
        compressor: dictionary.codec.name(),
        root: None,
        seconds: started.elapsed().as_secs_f64(),
    }
    .write(args.output_json.as_deref())?;
    if args.verbose {
        let lines = dictionary.blobs.iter().map(|b| format!("{} {} {}\n", b.id, b.chunks, b.bytes));
        output::print(&lines.collect::<String>())?;
    }
    if dictionary.dropped > 0 {
        tracing::warn!(
            "{} shared chunks are left out: they are in more blobs than a dictionary can name",
            dictionary.dropped
        );
    }
    if blobs.is_empty() {
        tracing::warn!(
            "the images have no chunk in common that a dictionary can hold: it is empty, and images built with \
             it are as without"
        );
    } else {
        let chunks: u64 = dictionary.blobs.iter().map(|blob| blob.chunks).sum();
        let bytes: u64 = dictionary.blobs.iter().map(|blob| blob.bytes).sum();
        tracing::info!("{chunks} chunks with {bytes} bytes decoded, in {} blobs", blobs.len());
    }
    Ok(ExitCode::SUCCESS)
}

/// Image and tag, as the name of the directory says; a file in any other directory is by itself.
fn version(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let parent = absolute.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    parent.filter(|name| name.contains(':')).unwrap_or_else(|| absolute.display().to_string())
}

/// The file that a database address names; `None` for one in memory.
fn database(text: &str) -> anyhow::Result<Option<&str>> {
    match text.strip_prefix("sqlite://") {
        Some(":memory:") => Ok(None),
        Some(path) if path.starts_with('/') && path.len() > 1 => Ok(Some(path)),
        _ => bail!("--database {text}: want sqlite:///PATH or sqlite://:memory:"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_apart_by_their_directories() {
        assert_eq!(version(Path::new("/work/app:v1/nydus_bootstrap")), "app:v1");
        assert_eq!(version(Path::new("/work/app:v1/other")), "app:v1");
        assert_eq!(version(Path::new("/work/app/a.boot")), "/work/app/a.boot");
    }

    #[test]
    fn databases_have_an_address() {
        assert_eq!(database("sqlite://:memory:").unwrap(), None);
        assert_eq!(database("sqlite:///a/b.db").unwrap(), Some("/a/b.db"));
        for bad in ["", "sqlite://", "sqlite:///", "sqlite://a.db", "mysql://x"] {
            assert!(database(bad).is_err(), "{bad}");
        }
    }
}
