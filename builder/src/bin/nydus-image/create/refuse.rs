//! What `create` refuses before it writes anything.

use std::path::Path;

use anyhow::{Context as _, bail};
use builder::reference::ReferenceKind;
use rafs::format::limits;

use super::reference_kind;
use crate::cli::{self, ConversionType, CreateArgs, Feature, FsVersion, PrefetchPolicy};

/// Refuses, before anything is written, what can not be combined, and by name what is not built.
pub fn conflicts(args: &CreateArgs) -> anyhow::Result<()> {
    use ConversionType as T;
    let name = args.conversion.name();
    let conflicts =
        matches!(args.conversion, T::TarTarfs | T::EstargztocRef | T::EstargzRafs | T::EstargzRef);
    if conflicts && args.blob_cache_dir.is_some() {
        bail!("conversion type `{name}` conflicts with `--blob-cache-dir`");
    }
    let batch = cli::number("--batch-size", &args.batch_size)?;
    if args.fs_version == FsVersion::V5 {
        refuse_in_v5(args, batch)?;
    }
    refuse_for_references(args)?;
    refuse_for_index(args)?;
    if args.blob_cache_dir.is_some() && args.conversion == T::TargzRef && !is_regular(&args.source)? {
        bail!("source {}: --blob-cache-dir reads a layer twice, want a regular file", args.source.display());
    }
    let offset = args.blob_offset.as_deref().map(|t| cli::number("--blob-offset", t)).transpose()?;
    if let Some(offset) = offset.filter(|&offset| offset != 0) {
        if offset > limits::MAX_BLOB_COMPRESSED {
            bail!("--blob-offset {offset}: at most 2^40 is possible");
        }
        let whole = [
            (reference_kind(args.conversion).is_some() || args.conversion == T::EstargztocRef, "a reference"),
            (args.blob_inline_meta, "--blob-inline-meta"),
            (args.blob_cache_dir.is_some(), "--blob-cache-dir"),
        ];
        if let Some((_, what)) = whole.iter().find(|(set, _)| *set) {
            bail!(
                "--blob-offset is for a blob that becomes a part of another file, which {what} does not make"
            );
        }
    }
    let unbuilt =
        [(args.external_blob.is_some(), "--external-blob"), (args.attributes.is_some(), "--attributes")];
    match unbuilt.iter().find(|(set, _)| *set) {
        Some((_, what)) => Err(cli::not_built(what)),
        None => exists(&args.source),
    }
}

/// Refuses what an index can not give, and what only an index takes.
fn refuse_for_index(args: &CreateArgs) -> anyhow::Result<()> {
    let name = args.conversion.name();
    if args.conversion != ConversionType::EstargztocRef {
        let theirs =
            [(args.blob_data_size.is_some(), "--blob-data-size"), (args.blob_meta.is_some(), "--blob-meta")];
        return match theirs.iter().find(|(set, _)| *set) {
            Some((_, flag)) => {
                bail!("conversion type `{name}` conflicts with `{flag}`: that is for estargztoc-ref")
            }
            None => Ok(()),
        };
    }
    if args.blob_id.is_none() {
        bail!("conversion type `{name}` needs `--blob-id`, the name of the layer that the index belongs to");
    }
    let conflicts = [
        (args.blob.is_some(), "--blob"),
        (args.blob_inline_meta, "--blob-inline-meta"),
        (!args.features.is_empty(), "--features"),
        (args.encrypt, "--encrypt"),
        (args.prefetch_policy == PrefetchPolicy::Blob, "--prefetch-policy blob"),
        (args.chunk_dict.is_some(), "--chunk-dict"),
        (args.parent_bootstrap.is_some(), "--parent-bootstrap"),
    ];
    match conflicts.iter().find(|(set, _)| *set) {
        Some((_, flag)) => bail!("conversion type `{name}` conflicts with `{flag}`"),
        None => Ok(()),
    }
}

fn is_regular(source: &Path) -> anyhow::Result<bool> {
    let metadata = std::fs::metadata(source).with_context(|| format!("source {}", source.display()))?;
    Ok(metadata.is_file())
}

/// Refuses what contradicts a type whose data stays in the original.
fn refuse_for_references(args: &CreateArgs) -> anyhow::Result<()> {
    let Some(kind) = reference_kind(args.conversion) else { return Ok(()) };
    let tarfs = kind == ReferenceKind::Tarfs;
    let conflicts = [
        (args.encrypt, "--encrypt"),
        (args.prefetch_policy == PrefetchPolicy::Blob, "--prefetch-policy blob"),
        (!tarfs && args.blob_id.is_some(), "--blob-id"),
        (tarfs && args.blob.is_some(), "--blob"),
        (args.chunk_dict.is_some(), "--chunk-dict"),
        (args.parent_bootstrap.is_some(), "--parent-bootstrap"),
        (tarfs && args.blob_inline_meta, "--blob-inline-meta"),
        (tarfs && !args.features.is_empty(), "--features"),
        (tarfs && args.aligned_chunk, "--aligned-chunk"),
    ];
    match conflicts.iter().find(|(set, _)| *set) {
        Some((_, flag)) => bail!("conversion type `{}` conflicts with `{flag}`", args.conversion.name()),
        None => Ok(()),
    }
}

/// Refuses what RAFS v5 can not hold.
fn refuse_in_v5(args: &CreateArgs, batch: u64) -> anyhow::Result<()> {
    use ConversionType as T;
    let built = matches!(args.conversion, T::DirRafs | T::TarRafs | T::TargzRafs | T::EstargzRafs);
    if !built {
        bail!("conversion type `{}` needs RAFS v6: use `--fs-version 6`", args.conversion.name());
    }
    let impossible = [
        (args.features.contains(&Feature::BlobToc), "--features blob-toc"),
        (batch != 0, "--batch-size"),
        (args.encrypt, "--encrypt"),
    ];
    match impossible.iter().find(|(set, _)| *set) {
        Some((_, what)) => bail!("`{what}` needs RAFS v6: use `--fs-version 6`"),
        None => Ok(()),
    }
}

/// Says so before anything is written.
fn exists(source: &Path) -> anyhow::Result<()> {
    std::fs::metadata(source).with_context(|| format!("source {}", source.display()))?;
    Ok(())
}
