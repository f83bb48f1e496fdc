//! `nydus-image create`: a directory or tar stream in, blob and bootstrap out.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use builder::create::{LayerOptions, LayerSource, Version, build_layer_upon};
use builder::layered::{Below, Common};
use builder::overlay;
use builder::pipeline::{DataOptions, Placement};
use builder::prefetch::Patterns;
use builder::reference::{ReferenceKind, build_reference};
use builder::root::check_written;
use builder::sink::BlobSink;
use rafs::bootstrap::OpenOptions;
use rafs::format::limits;
use storage::cipher::XtsKey;
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::BlobId;

use crate::cli::{
    self, Compressor, ConversionType, CreateArgs, Digester, Feature, FsVersion, PrefetchPolicy, WhiteoutSpec,
};
use crate::merge::stem;
use crate::output::{self, Output, Summary};

/// Bytes gathered before a write to the blob.
const WRITE_BUFFER: usize = 1 << 20;

/// Runs the command.
pub fn run(args: &CreateArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    refuse_unbuilt(args)?;
    let options = options(args)?;
    let mut blob_output = match (&args.blob, &args.blob_dir) {
        (Some(path), _) => Output::at(path)?,
        (None, Some(dir)) => Output::in_dir(dir)?,
        (None, None) if args.conversion == ConversionType::TarTarfs => Output::at(Path::new("/dev/null"))?,
        (None, None) => bail!("no place for the blob: give --blob or --blob-dir"),
    };
    let sink =
        BlobSink::new(blob_output.name(), BufWriter::with_capacity(WRITE_BUFFER, blob_output.writer()?));
    let (built, reference) = match reference_kind(args.conversion) {
        None => (build_layer_upon(source(args)?, &options, below(args, &options)?, sink)?, None),
        Some(kind) => {
            let name = args.source.display().to_string();
            let input = File::open(&args.source).with_context(|| format!("open source {name}"))?;
            let built = build_reference(&name, input, kind, &options, sink)?;
            (built.layer, Some(built.source))
        }
    };
    if !args.disable_check {
        check_written(&built.bootstrap, Some(built.root))?;
    }
    // A FIFO's reader waits for the end of file.
    drop(built.blob.out);

    let file_id = match &options.blob_id {
        Some(id) => id.to_string(),
        None => built.blob.id.to_string(),
    };
    // What an image names is the original layer, if it refers to one.
    let id = match reference {
        Some(source) if options.blob_id.is_none() => source.to_string(),
        _ => file_id.clone(),
    };
    let stored = built.blob.size > 0 && (built.has_data || options.inline_bootstrap);
    if stored {
        blob_output.commit(&file_id)?;
    } else {
        blob_output.discard()?;
    }
    let bootstrap_path = if options.inline_bootstrap {
        String::new()
    } else {
        output::write_bootstrap(args.bootstrap.as_deref(), args.blob_dir.as_deref(), &built.bootstrap)?
            .display()
            .to_string()
    };
    let blobs: Vec<String> =
        built.blobs.iter().map(|name| name.clone().unwrap_or_else(|| id.clone())).collect();
    let root = built.root.to_string();
    tracing::info!(
        "built {} entries, blob {} ({} bytes), root digest {root}",
        built.entry_count,
        blobs.first().map_or("none", String::as_str),
        built.blob.size,
    );
    Summary {
        bootstrap: &bootstrap_path,
        blobs: &blobs,
        fs_version: options.version.number(),
        compressor: compressor(args.conversion, options.data.codec).name(),
        root: Some(&root),
        seconds: started.elapsed().as_secs_f64(),
    }
    .write(args.output_json.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

/// The images that the layer is built upon.
fn below(args: &CreateArgs, options: &LayerOptions) -> anyhow::Result<Option<Below>> {
    let open = |path: &Path| {
        let id = BlobId::new(&stem(path)).ok();
        rafs::bootstrap::open(path, &OpenOptions { inlined_blob_id: id })
    };
    let dictionary = args.chunk_dict.as_deref().map(dictionary_path).transpose()?;
    let dictionary = dictionary.map(open).transpose().context("--chunk-dict")?;
    let parent = args.parent_bootstrap.as_deref().map(open).transpose().context("--parent-bootstrap")?;
    if dictionary.is_none() && parent.is_none() {
        return Ok(None);
    }
    let common = Common {
        fs_version: options.version.number(),
        chunk_size: options.data.chunk_size,
        digester: options.data.digester,
        explicit_ids: options.explicit_ids,
    };
    Ok(Some(Below::load(dictionary.as_deref(), parent.as_deref(), &common)?))
}

/// The file in `bootstrap=FILE`, or in `FILE`.
pub fn dictionary_path(text: &str) -> anyhow::Result<&Path> {
    match text.split_once('=') {
        None => Ok(Path::new(text)),
        Some(("bootstrap", path)) => Ok(Path::new(path)),
        Some((kind, _)) => bail!("--chunk-dict {kind}=…: only bootstrap=FILE is known"),
    }
}

/// What a reference type makes, `None` for the others.
fn reference_kind(conversion: ConversionType) -> Option<ReferenceKind> {
    match conversion {
        ConversionType::TargzRef | ConversionType::EstargzRef => Some(ReferenceKind::Layer),
        ConversionType::TarTarfs => Some(ReferenceKind::Tarfs),
        _ => None,
    }
}

/// The compressor that the image states: references take what the original has.
fn compressor(conversion: ConversionType, chosen: Codec) -> Codec {
    match reference_kind(conversion) {
        Some(ReferenceKind::Layer) => Codec::Gzip,
        Some(ReferenceKind::Tarfs) => Codec::None,
        None => chosen,
    }
}

fn source(args: &CreateArgs) -> anyhow::Result<LayerSource<'_>> {
    match args.conversion {
        ConversionType::DirRafs => Ok(LayerSource::Directory(&args.source)),
        // Opened once and read front to back: it may be a FIFO.
        _ => tar_source(&args.source),
    }
}

/// The tar stream at `path`.
pub fn tar_source(path: &Path) -> anyhow::Result<LayerSource<'static>> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("open source {name}"))?;
    Ok(LayerSource::Tar { name, input: Box::new(file) })
}

fn options(args: &CreateArgs) -> anyhow::Result<LayerOptions> {
    Ok(LayerOptions {
        version: match args.fs_version {
            FsVersion::V5 => Version::V5 { aligned: args.aligned_chunk },
            FsVersion::V6 => Version::V6,
        },
        data: DataOptions {
            codec: match args.compressor {
                Compressor::None => Codec::None,
                Compressor::Lz4Block => Codec::Lz4Block,
                Compressor::Zstd => Codec::Zstd,
            },
            digester: match args.digester {
                Digester::Blake3 => DigestAlgorithm::Blake3,
                Digester::Sha256 => DigestAlgorithm::Sha256,
            },
            chunk_size: chunk_size(&args.chunk_size)?,
            threads: args.threads,
            placement: Placement::Blob,
            batch_size: batch_size(args)?,
            cipher: if args.encrypt { Some(XtsKey::random()?) } else { None },
        },
        toc: args.features.contains(&Feature::BlobToc),
        inline_bootstrap: args.blob_inline_meta,
        blob_id: args.blob_id.as_deref().map(BlobId::new).transpose().context("--blob-id")?,
        whiteouts: match args.whiteout_spec {
            WhiteoutSpec::Oci => overlay::WhiteoutSpec::Oci,
            WhiteoutSpec::Overlayfs => overlay::WhiteoutSpec::Overlayfs,
            WhiteoutSpec::None => overlay::WhiteoutSpec::None,
        },
        prefetch: prefetch_patterns(args.prefetch_policy)?,
        prefetch_table: args.prefetch_policy == PrefetchPolicy::Fs,
        explicit_ids: !args.repeatable,
    })
}

/// The patterns on stdin, which is not read without a policy.
pub fn prefetch_patterns(policy: PrefetchPolicy) -> anyhow::Result<Patterns> {
    match policy {
        PrefetchPolicy::None => Ok(Patterns::default()),
        PrefetchPolicy::Fs | PrefetchPolicy::Blob => Ok(Patterns::read(std::io::stdin().lock())?),
    }
}

fn chunk_size(text: &str) -> anyhow::Result<u32> {
    let range = u64::from(limits::MIN_CHUNK_SIZE)..=u64::from(limits::MAX_CHUNK_SIZE);
    let size = cli::number("--chunk-size", text)?;
    match u32::try_from(size) {
        Ok(small) if size.is_power_of_two() && range.contains(&size) => Ok(small),
        _ => {
            bail!("--chunk-size {text}: want a power of two from {:#x} to {:#x}", range.start(), range.end())
        }
    }
}

fn batch_size(args: &CreateArgs) -> anyhow::Result<u32> {
    let (text, chunk) = (&args.batch_size, chunk_size(&args.chunk_size)?);
    let size = cli::number("--batch-size", text)?;
    let small = u32::try_from(size).ok().filter(|&small| {
        small == 0 || small.is_power_of_two() && (limits::MIN_CHUNK_SIZE..=chunk).contains(&small)
    });
    small.with_context(|| {
        format!(
            "--batch-size {text}: want 0 or a power of two from {:#x} to the chunk size",
            limits::MIN_CHUNK_SIZE
        )
    })
}

/// Refuses by name what the contract has and this build has not.
fn refuse_unbuilt(args: &CreateArgs) -> anyhow::Result<()> {
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
    if args.conversion == T::EstargztocRef {
        return Err(cli::not_built(&format!("--type {name}")));
    }
    refuse_for_references(args)?;
    let offset = args.blob_offset.as_deref().map(|t| cli::number("--blob-offset", t)).transpose()?;
    let length = args.blob_data_size.as_deref().map(|t| cli::number("--blob-data-size", t)).transpose()?;
    let unbuilt = [
        (args.external_blob.is_some(), "--external-blob"),
        (args.blob_cache_dir.is_some(), "--blob-cache-dir"),
        (args.attributes.is_some(), "--attributes"),
        (args.blob_meta.is_some(), "--blob-meta"),
        (offset.unwrap_or(0) != 0, "--blob-offset"),
        (length.unwrap_or(0) != 0, "--blob-data-size"),
    ];
    match unbuilt.iter().find(|(set, _)| *set) {
        Some((_, what)) => Err(cli::not_built(what)),
        None => exists(&args.source),
    }
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
