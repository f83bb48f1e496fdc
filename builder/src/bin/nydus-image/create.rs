//! `nydus-image create`: a directory or tar stream in, blob and bootstrap out.

mod cache;
mod refuse;

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
use builder::reference::{ReferenceKind, build_indexed, build_reference};
use builder::root::check_written;
use builder::sink::BlobSink;
use builder::source::stargz;
use builder::write_back::WriteBack;
use rafs::format::limits;
use storage::cipher::XtsKey;
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::ids::BlobId;

use crate::cli::{
    self, Compressor, ConversionType, CreateArgs, Digester, Feature, FsVersion, PrefetchPolicy, WhiteoutSpec,
};
use crate::merge::bootstrap;
use crate::output::{self, Output, StagedBootstrap, Summary};

/// Chunk size unless another is given.
const DEFAULT_CHUNK_SIZE: &str = "0x100000";
/// The same for the index of an eStargz layer: that of its writers.
const INDEX_CHUNK_SIZE: &str = "0x400000";
/// Bytes gathered before a write to the blob.
const WRITE_BUFFER: usize = 1 << 20;

/// Runs the command.
pub fn run(args: &CreateArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    refuse::conflicts(args)?;
    let options = options(args)?;
    let mut blob_output = match (&args.blob, args.blob_dir.as_ref().or(args.blob_cache_dir.as_ref())) {
        (Some(path), _) => Output::at(path)?,
        (None, Some(dir)) => Output::in_dir(dir)?,
        (None, None) if !makes_blob(args.conversion) => Output::at(Path::new("/dev/null"))?,
        (None, None) => bail!("no place for the blob: give --blob or --blob-dir"),
    };
    let file = WriteBack::new(blob_output.writer()?);
    let sink = BlobSink::new(blob_output.name(), BufWriter::with_capacity(WRITE_BUFFER, file));
    let offset = args.blob_offset.as_deref().map(|text| cli::number("--blob-offset", text)).transpose()?;
    let sink = sink.lying_at(offset.unwrap_or(0));
    let open = || -> anyhow::Result<(String, File)> {
        let name = args.source.display().to_string();
        let file = File::open(&args.source).with_context(|| format!("open source {name}"))?;
        Ok((name, file))
    };
    let (mut built, reference) = match (reference_kind(args.conversion), &options.blob_id) {
        (None, Some(id)) if args.conversion == ConversionType::EstargztocRef => {
            let (name, file) = open()?;
            let index = stargz::open(&name, file)?;
            (build_indexed(&name, index, id.clone(), layer_size(args)?, &options)?, None)
        }
        (None, _) => (build_layer_upon(source(args)?, &options, below(args, &options)?, sink)?, None),
        (Some(kind), _) => {
            let (name, file) = open()?;
            let built = build_reference(&name, file, kind, &options, sink)?;
            (built.layer, Some(built.source))
        }
    };
    let (bootstrap, root) = (&built.bootstrap, built.root);
    let (checked, staged) = std::thread::scope(|scope| {
        let check = scope.spawn(|| match args.disable_check {
            true => Ok(()),
            false => check_written(bootstrap, Some(root)),
        });
        // It goes to the disk meanwhile.
        let staged = (!options.inline_bootstrap)
            .then(|| StagedBootstrap::new(args.bootstrap.as_deref(), args.blob_dir.as_deref(), bootstrap));
        (check.join(), staged.transpose())
    });
    checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let staged = staged?;
    // A FIFO's reader waits for the end of file.
    built.blob.out = Box::new(std::io::sink());

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
    if let Some(dir) = &args.blob_cache_dir {
        // The blob itself is wanted nowhere: it goes with its temporary file.
        if built.has_data {
            cache::write(dir, &id, &built, blob_output.path(), reference.is_some().then_some(&args.source))?;
        }
    } else if stored {
        blob_output.commit(&file_id)?;
    } else {
        blob_output.discard()?;
    }
    if let (Some(path), Some(context)) = (&args.blob_meta, &built.blob.local_context) {
        output::write_private(path, context)?;
    }
    let bootstrap_path = match staged {
        Some(staged) => staged.commit()?.display().to_string(),
        None => String::new(),
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
    let open = |path: &Path| bootstrap(path, None);
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
        ConversionType::TargzRef => Some(ReferenceKind::Layer),
        ConversionType::EstargzRef => Some(ReferenceKind::Estargz),
        ConversionType::TarTarfs => Some(ReferenceKind::Tarfs),
        _ => None,
    }
}

/// False for types whose result is metadata and nothing else.
fn makes_blob(conversion: ConversionType) -> bool {
    !matches!(conversion, ConversionType::TarTarfs | ConversionType::EstargztocRef)
}

/// The compressor that the image states: references take what the original has.
fn compressor(conversion: ConversionType, chosen: Codec) -> Codec {
    match conversion {
        ConversionType::TargzRef | ConversionType::EstargzRef | ConversionType::EstargztocRef => Codec::Gzip,
        ConversionType::TarTarfs => Codec::None,
        _ => chosen,
    }
}

/// The length of the layer that an index belongs to, if it was given.
fn layer_size(args: &CreateArgs) -> anyhow::Result<Option<u64>> {
    let size = args.blob_data_size.as_deref().map(|text| cli::hexadecimal("--blob-data-size", text));
    Ok(size.transpose()?.filter(|&size| size != 0))
}

fn source(args: &CreateArgs) -> anyhow::Result<LayerSource<'_>> {
    match args.conversion {
        ConversionType::DirRafs => Ok(LayerSource::Directory(&args.source)),
        ConversionType::EstargzRafs => match tar_source(&args.source)? {
            LayerSource::Tar { name, input } => Ok(LayerSource::Estargz { name, input }),
            other => Ok(other),
        },
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
            chunk_size: chunk_size(args)?,
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
        keep_context: args.blob_cache_dir.is_some() || args.blob_meta.is_some(),
    })
}

/// The patterns on stdin, which is not read without a policy.
pub fn prefetch_patterns(policy: PrefetchPolicy) -> anyhow::Result<Patterns> {
    match policy {
        PrefetchPolicy::None => Ok(Patterns::default()),
        PrefetchPolicy::Fs | PrefetchPolicy::Blob => Ok(Patterns::read(std::io::stdin().lock())?),
    }
}

fn chunk_size(args: &CreateArgs) -> anyhow::Result<u32> {
    let text = match (&args.chunk_size, args.conversion) {
        (Some(text), _) => text,
        (None, ConversionType::EstargztocRef) => INDEX_CHUNK_SIZE,
        (None, _) => DEFAULT_CHUNK_SIZE,
    };
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
    let (text, chunk) = (&args.batch_size, chunk_size(args)?);
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
