//! `nydus-image convert SOURCE TARGET`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use builder::ErrorKind;
use builder::convert::{self, ConvertOptions, Converted};
use builder::oci::registry::RegistryOptions;
use builder::oci::source::ImageSource;
use builder::oci::target::Target;
use builder::oci::transport::Transport;
use builder::pipeline::{DataOptions, Placement};
use builder::progress::Observer;
use builder::restore::{self, LayerCodec, NydusSource, RestoreOptions};
use clap::{ArgAction, Args};
use serde_json::{Value, json};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use storage::oci::manifest::Platform;

use crate::interrupt::Interrupt;
use crate::progress;

/// Layers read and blobs uploaded at a time unless told otherwise: enough to hide a registry's
/// latency, few enough to keep the memory of decompressors small.
pub const DEFAULT_JOBS: usize = 4;

/// Convert an OCI image to a Nydus image, or a Nydus image to a plain OCI image.
///
/// What SOURCE is tells its manifest. A plain image has one layer with all that the Nydus image shows.
/// Images are named as by skopeo: oci:PATH[:TAG], oci-archive:PATH[:TAG],
/// docker://HOST/REPO[:TAG|@DIGEST], docker-archive:PATH (source only). Logins come from the
/// files of docker and podman, proxies from HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Image to convert
    source: Transport,
    /// Where the result goes
    target: Transport,
    /// Which image of an index, as OS/ARCH[/VARIANT] [default: this machine's]
    #[arg(long)]
    platform: Option<Platform>,
    /// Threads that hash and compress, 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Layers read, and blobs uploaded, at a time: at most 16
    #[arg(long, default_value_t = DEFAULT_JOBS)]
    jobs: usize,
    /// Compressor of chunks: none, lz4_block or zstd
    #[arg(long, default_value = "zstd")]
    compressor: Codec,
    /// Compressor of the layer of a plain image: gzip or zstd
    #[arg(long, default_value = "gzip", value_parser = layer_codec)]
    layer_compressor: LayerCodec,
    /// Digest of chunks: sha256 or blake3
    #[arg(long, default_value = "sha256")]
    digester: DigestAlgorithm,
    /// Bytes of a chunk, hexadecimal with 0x or decimal: a power of two, 4 KiB to 16 MiB
    #[arg(long, default_value_t = ChunkSize(convert::DEFAULT_CHUNK_SIZE))]
    chunk_size: ChunkSize,
    /// Bytes of a unit of small files that are compressed together, as --chunk-size and at most that, or 0
    /// for none [default: 0x40000, or the chunk size if that is less]
    #[arg(long)]
    batch_size: Option<ChunkSize>,
    /// Name the files that a start surely reads in the image, to be fetched ahead: on or off
    #[arg(long, default_value = "on", value_name = "WHETHER", action = ArgAction::Set, value_parser = on_or_off)]
    hints: bool,
    /// Speak http instead of https to registries; loopback addresses are spoken to so by default
    #[arg(long)]
    plain_http: bool,
    /// PEM file with a CA to trust beside the system's; may be given several times
    #[arg(long = "ca-file", value_name = "FILE")]
    ca_files: Vec<PathBuf>,
    /// Write the result as JSON to this file
    #[arg(short = 'J', long, value_name = "FILE")]
    output_json: Option<PathBuf>,
}

fn layer_codec(text: &str) -> std::result::Result<LayerCodec, String> {
    match text {
        "gzip" => Ok(LayerCodec::Gzip),
        "zstd" => Ok(LayerCodec::Zstd),
        _ => Err("want gzip or zstd".to_owned()),
    }
}

fn on_or_off(text: &str) -> std::result::Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("want on or off".to_owned()),
    }
}

/// A chunk size as typed; its range is checked by the builder.
#[derive(Clone, Copy, Debug)]
struct ChunkSize(u32);

impl std::str::FromStr for ChunkSize {
    type Err = std::num::ParseIntError;

    fn from_str(s: &str) -> std::result::Result<Self, Self::Err> {
        match s.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => s.parse(),
        }
        .map(Self)
    }
}

impl std::fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Runs the command.
pub fn run(args: &ConvertArgs) -> Result<ExitCode> {
    args.run()?;
    Ok(ExitCode::SUCCESS)
}

impl ConvertArgs {
    fn run(&self) -> Result<()> {
        let interrupt = Interrupt::install()?;
        let observer = progress::observer();
        let registry = RegistryOptions {
            plain_http: self.plain_http,
            ca_files: self.ca_files.clone(),
            cancel: interrupt.token().clone(),
        };
        let source = match ImageSource::open(&self.source, self.platform.as_ref(), &registry) {
            Err(error) if error.kind() == ErrorKind::Unsupported => match self.nydus_source(&registry)? {
                Some(nydus) => return self.restore(&nydus, &registry, &*observer),
                None => return Err(error.into()),
            },
            source => source?,
        };
        let target = Target::open(&self.target, &registry)?;
        let options = ConvertOptions {
            data: DataOptions {
                codec: self.compressor,
                digester: self.digester,
                chunk_size: self.chunk_size.0,
                threads: self.threads,
                placement: Placement::Blob,
                batch_size: self
                    .batch_size
                    .map_or(convert::default_batch_size(self.chunk_size.0), |size| size.0),
                cipher: None,
            },
            hints: self.hints,
            jobs: self.jobs.max(1),
            observer: &*observer,
            cancel: interrupt.token(),
        };
        let converted = match convert::convert(&source, target, &options) {
            Err(error) if error.kind() == ErrorKind::Cancelled => {
                bail!("interrupted: {} is as it was before", self.target)
            }
            done => done?,
        };
        drop(observer);
        self.write_report(&self.report(&converted))?;
        self.print(&converted);
        Ok(())
    }

    /// The source as a Nydus image, if it is one.
    fn nydus_source(&self, registry: &RegistryOptions) -> Result<Option<NydusSource>> {
        if !matches!(self.source, Transport::Layout { .. } | Transport::Registry(_)) {
            return Ok(None);
        }
        match NydusSource::open(&self.source.to_string(), self.platform.as_ref(), registry) {
            Ok(source) => Ok(Some(source)),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The other way: a plain image of a Nydus image.
    fn restore(
        &self,
        source: &NydusSource,
        registry: &RegistryOptions,
        observer: &dyn Observer,
    ) -> Result<()> {
        let target = Target::open(&self.target, registry)?;
        let options = RestoreOptions { codec: self.layer_compressor, observer, cancel: &registry.cancel };
        let done = match restore::restore(source, target, &options) {
            Err(error) if error.kind() == ErrorKind::Cancelled => {
                bail!("interrupted: {} is as it was before", self.target)
            }
            done => done?,
        };
        if done.sockets > 0 {
            tracing::warn!("left out, for a layer has none: {} sockets", done.sockets);
        }
        self.write_report(&json!({
            "version": crate::version::describe(),
            "source": self.source.to_string(),
            "target": self.target.to_string(),
            "manifest": format!("sha256:{}", done.manifest),
            "entries": done.entries,
            "layers": [{
                "digest": format!("sha256:{}", done.layer),
                "diff_id": format!("sha256:{}", done.diff_id),
                "size": done.size,
            }],
            "size": done.size,
        }))?;
        println!("{}", self.target);
        println!("manifest   sha256:{}", done.manifest);
        println!("entries    {}", done.entries);
        println!("size       {} bytes", done.size);
        Ok(())
    }

    fn write_report(&self, report: &Value) -> Result<()> {
        let Some(path) = &self.output_json else { return Ok(()) };
        let text = serde_json::to_string(report)?;
        std::fs::write(path, text).with_context(|| format!("--output-json {}", path.display()))
    }

    fn report(&self, done: &Converted) -> Value {
        let layers: Vec<Value> = done
            .layers
            .iter()
            .map(|layer| {
                json!({
                    "source": layer.source.map(|d| format!("sha256:{d}")),
                    "diff_id": format!("sha256:{}", layer.diff_id),
                    "blob": format!("sha256:{}", layer.blob),
                    "size": layer.size,
                    "chunks": layer.chunk_count,
                    "used": layer.used,
                })
            })
            .collect();
        json!({
            "version": crate::version::describe(),
            "source": self.source.to_string(),
            "target": self.target.to_string(),
            "manifest": format!("sha256:{}", done.manifest),
            "bootstrap": format!("sha256:{}", done.bootstrap),
            "bootstrap_size": done.bootstrap_size,
            "root": done.root.to_string(),
            "entries": done.entry_count,
            "blobs": done.blobs,
            "layers": layers,
            "source_size": done.source_size,
            "size": done.size,
            "fs_version": "6",
            "compressor": self.compressor.name(),
            "digester": self.digester.name(),
            "chunk_size": self.chunk_size.0,
        })
    }

    fn print(&self, done: &Converted) {
        println!("{}", self.target);
        println!("manifest   sha256:{}", done.manifest);
        println!("root       {}", done.root);
        println!("entries    {}", done.entry_count);
        match done.source_size {
            0 => println!("size       {} bytes", done.size),
            source => println!(
                "size       {} bytes, {:.1} % of the source's {source}",
                done.size,
                done.size as f64 * 100.0 / source as f64
            ),
        }
    }
}
