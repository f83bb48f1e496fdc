//! `nydus-image merge`: bootstraps of layers in, the bootstrap of the image out.

use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use builder::image;
use builder::merge::{MergeSource, OwnBlob, merge};
use rafs::bootstrap::{Blob, Bootstrap, OpenOptions};
use rafs::format::features::BlobFeatures;
use storage::digest::Digest;
use storage::ids::BlobId;

use crate::cli::MergeArgs;
use crate::create::{dictionary_path, prefetch_patterns};
use crate::output::{self, Summary};

/// Runs the command.
pub fn run(args: &MergeArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let owns = own_blobs(args)?;
    let mut sources = Vec::new();
    if let Some(parent) = &args.parent_bootstrap {
        sources.push(source(parent, OwnBlob::default())?);
    }
    for (path, own) in args.sources.iter().zip(owns) {
        sources.push(source(path, own)?);
    }
    let dictionary = args.chunk_dict.as_deref().map(dictionary_path).transpose()?;
    let dictionary = dictionary.map(|path| bootstrap(path, None)).transpose().context("--chunk-dict")?;
    let merged = merge(&sources, dictionary.as_deref(), &prefetch_patterns(args.prefetch_policy)?)?;
    let path =
        output::write_bootstrap(args.bootstrap.as_deref(), args.blob_dir.as_deref(), &merged.bootstrap)?;
    let root = merged.root.map(|root| root.to_string());
    tracing::info!(
        "merged {} entries of {} blobs, root digest {}",
        merged.entry_count,
        merged.blobs.len(),
        root.as_deref().unwrap_or("none, for the layers' digesters differ")
    );
    Summary {
        bootstrap: &path.display().to_string(),
        blobs: &merged.blobs,
        fs_version: merged.fs_version,
        compressor: merged.codec.name(),
        root: root.as_deref(),
        seconds: started.elapsed().as_secs_f64(),
    }
    .write(args.output_json.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

fn source(path: &Path, own: OwnBlob) -> anyhow::Result<MergeSource> {
    let digest = own.digest.map(|digest| BlobId::new(&digest.to_string())).transpose()?;
    let mut opened = bootstrap(path, digest.clone().or_else(|| own.original_id.clone()))?;
    // The original id of a blob with no data of its own is that of the layer it refers to.
    if digest.is_none() && own.original_id.is_some() && opened.blobs().iter().any(is_reference) {
        opened = bootstrap(path, None)?;
    }
    Ok(MergeSource { name: path.display().to_string(), bootstrap: opened, own })
}

/// True for a blob whose data is in an original layer, if the bootstrap at hand lies beside what says where.
fn is_reference(blob: &Blob) -> bool {
    blob.features.contains(BlobFeatures::SEPARATE | BlobFeatures::INLINED_FS_META)
}

/// The bootstrap at `path`, or inside the blob there, which the image made of it calls `told`.
pub fn bootstrap(path: &Path, told: Option<BlobId>) -> anyhow::Result<Arc<dyn Bootstrap>> {
    if let Some(bytes) = image::inside(path)? {
        return Ok(image::open_named(path, bytes, told)?.bootstrap);
    }
    // Whether the file's name is a good id matters only if the bootstrap was inlined.
    let inlined_blob_id = told.or_else(|| BlobId::new(&stem(path)).ok());
    Ok(rafs::bootstrap::open(path, &OpenOptions { inlined_blob_id })?.into())
}

/// The file's name up to its first dot.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_owned()
}

fn own_blobs(args: &MergeArgs) -> anyhow::Result<Vec<OwnBlob>> {
    let count = args.sources.len();
    let digests = list::<HexDigest>("--blob-digests", &args.blob_digests, count)?;
    let originals = list::<Id>("--original-blob-ids", &args.original_blob_ids, count)?;
    let sizes = list::<u64>("--blob-sizes", &args.blob_sizes, count)?;
    let toc_digests = list::<HexDigest>("--blob-toc-digests", &args.blob_toc_digests, count)?;
    let toc_sizes = list::<u32>("--blob-toc-sizes", &args.blob_toc_sizes, count)?;
    let mut owns = vec![OwnBlob::default(); count];
    for (n, own) in owns.iter_mut().enumerate() {
        own.digest = digests.get(n).map(|d| d.0);
        own.original_id = originals.get(n).map(|id| id.0.clone());
        own.size = sizes.get(n).copied();
        own.toc_digest = toc_digests.get(n).map(|d| d.0);
        own.toc_size = toc_sizes.get(n).copied();
    }
    Ok(owns)
}

/// The values of a comma-separated flag: none, or one for each source.
fn list<T>(flag: &str, values: &[String], count: usize) -> anyhow::Result<Vec<T>>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    if values.is_empty() {
        return Ok(Vec::new());
    }
    if values.len() != count {
        bail!("{flag} has {} values for {count} sources: want one for each", values.len());
    }
    values.iter().map(|v| v.trim().parse().map_err(|e| anyhow!("{e}")).context(flag.to_owned())).collect()
}

struct HexDigest(Digest);

impl FromStr for HexDigest {
    type Err = storage::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Digest::from_hex(text.strip_prefix("sha256:").unwrap_or(text)).map(Self)
    }
}

struct Id(BlobId);

impl FromStr for Id {
    type Err = storage::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        BlobId::new(text).map(Self)
    }
}
