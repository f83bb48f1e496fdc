//! What was typed. What it means is decided by each command.

use std::ffi::OsString;
use std::path::PathBuf;

use builder::{Error, ErrorKind};
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::chunkdict::ChunkdictArgs;
use crate::compact::CompactArgs;
use crate::convert::ConvertArgs;
use crate::data::PlaceArgs;
use crate::export::ExportArgs;
use crate::optimize::OptimizeArgs;
use crate::stat::StatArgs;
use crate::unpack::UnpackArgs;
pub use crate::values::{
    Compressor, ConversionType, Digester, Feature, FsVersion, LogLevel, PrefetchPolicy, WhiteoutSpec,
    hexadecimal, number,
};

/// Builds, merges, checks, inspects and converts container images in the RAFS format.
#[derive(Debug, Parser)]
#[command(name = "nydus-image", disable_help_subcommand = false, args_override_self = false)]
pub struct Cli {
    /// Write the log to this file instead of stderr.
    #[arg(short = 'L', long, global = true, value_name = "log-file")]
    pub log_file: Option<PathBuf>,

    /// How much to log.
    #[arg(short = 'l', long, global = true, value_name = "log-level", default_value = "info")]
    pub log_level: LogLevel,

    /// Print version, commit and compiler.
    #[arg(short = 'V', long)]
    pub version: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The sub-commands of the contract.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build an image from a directory or a tar stream.
    Create(Box<CreateArgs>),
    /// Merge the bootstraps of layers, lowest first, into one.
    Merge(Box<MergeArgs>),
    /// Check a bootstrap, its blobs and its root digest; compare it with its source.
    Check(Box<CheckArgs>),
    /// Answer questions about a bootstrap.
    Inspect(InspectArgs),
    /// Convert an OCI image to a Nydus image, or back.
    Convert(Box<ConvertArgs>),
    /// Write man pages and shell completions, as they are installed below share/.
    #[command(hide = true)]
    Pages {
        /// Directory to write to.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Make chunk dictionaries.
    Chunkdict(ChunkdictArgs),
    /// Put what a start of an image reads into a blob of its own.
    Optimize(Box<OptimizeArgs>),
    /// Write an image as a disk that a kernel mounts.
    Export(Box<ExportArgs>),
    /// Tell where the bytes of images are, and what they have in common.
    Stat(StatArgs),
    /// Put what an image uses of sparse and small blobs into fewer new ones.
    Compact(Box<CompactArgs>),
    /// Write an image as a tar archive.
    Unpack(Box<UnpackArgs>),
}

/// The error for a part of the contract that a later build brings.
pub fn not_built(what: &str) -> anyhow::Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{what} is not built yet; a later build of nydus-image brings it"),
    )
    .into()
}

/// Arguments of `create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Directory, file or FIFO to build from.
    #[arg(value_name = "SOURCE")]
    pub source: PathBuf,

    /// What SOURCE is and what to make of it.
    #[arg(
        short = 't',
        long = "type",
        alias = "source-type",
        value_name = "type",
        default_value = "dir-rafs"
    )]
    pub conversion: ConversionType,

    /// Where to write the bootstrap.
    #[arg(
        short = 'B',
        long,
        value_name = "bootstrap",
        required_unless_present_any = ["blob_dir", "blob_inline_meta"],
        conflicts_with = "blob_inline_meta"
    )]
    pub bootstrap: Option<PathBuf>,

    /// Directory for the blob, stored under its id; and for the bootstrap without --bootstrap.
    #[arg(short = 'D', long, value_name = "blob-dir")]
    pub blob_dir: Option<PathBuf>,

    /// Where to write the blob: a file or a FIFO.
    #[arg(short = 'b', long, value_name = "blob")]
    pub blob: Option<PathBuf>,

    /// Output for chunks of external backends (not built yet).
    #[arg(long, value_name = "external-blob")]
    pub external_blob: Option<PathBuf>,

    /// Append the bootstrap to the blob.
    #[arg(long, alias = "inline-bootstrap", conflicts_with_all = ["blob_id"])]
    pub blob_inline_meta: bool,

    /// Name of the blob, instead of its digest.
    #[arg(long, value_name = "blob-id")]
    pub blob_id: Option<String>,

    /// Length in hexadecimal of the layer that an index of estargztoc-ref belongs to.
    #[arg(long, value_name = "blob-data-size")]
    pub blob_data_size: Option<String>,

    /// Byte of a larger file at which the caller puts the blob: offsets are counted from that file's beginning.
    #[arg(long, value_name = "blob-offset", hide = true)]
    pub blob_offset: Option<String>,

    /// Where to write the context of estargztoc-ref, in the form of the daemon's local copy.
    #[arg(long, value_name = "blob-meta", hide = true)]
    pub blob_meta: Option<PathBuf>,

    /// Bytes of a chunk, a power of two from 0x1000 to 0x1000000 [default: 0x100000; 0x400000 for
    /// estargztoc-ref].
    #[arg(long, value_name = "chunk-size")]
    pub chunk_size: Option<String>,

    /// Compress files smaller than half of this together: 0, or a power of two up to the chunk size.
    #[arg(long, value_name = "batch-size", default_value = "0")]
    pub batch_size: String,

    /// Compression of chunks.
    #[arg(long, value_name = "compressor", default_value = "zstd")]
    pub compressor: Compressor,

    /// Digest of chunks.
    #[arg(long, value_name = "digester", default_value = "blake3")]
    pub digester: Digester,

    /// Accepted; dictionaries and parents are read from their bootstraps alone.
    #[arg(short = 'C', long, value_name = "config")]
    pub config: Option<PathBuf>,

    /// Version of the format.
    #[arg(short = 'v', long, value_name = "fs-version", default_value = "6")]
    pub fs_version: FsVersion,

    /// Optional features.
    #[arg(long, value_name = "features", value_delimiter = ',')]
    pub features: Vec<Feature>,

    /// Image whose chunks are not stored again, as bootstrap=FILE or FILE.
    #[arg(long, value_name = "chunk-dict")]
    pub chunk_dict: Option<String>,

    /// Build as upper layer of this bootstrap.
    #[arg(long, value_name = "parent-bootstrap")]
    pub parent_bootstrap: Option<PathBuf>,

    /// Align decoded offsets to 4 KiB: always so in version 6.
    #[arg(long)]
    pub aligned_chunk: bool,

    /// Store no owners; output is reproducible anyway.
    #[arg(long)]
    pub repeatable: bool,

    /// Skip the check of the new bootstrap.
    #[arg(long, hide = true)]
    pub disable_check: bool,

    /// What marks removed entries.
    #[arg(long, value_name = "whiteout-spec", default_value = "oci")]
    pub whiteout_spec: WhiteoutSpec,

    /// What to prefetch; patterns come on stdin.
    #[arg(long, value_name = "prefetch-policy", default_value = "none")]
    pub prefetch_policy: PrefetchPolicy,

    /// Write a summary in JSON to this file.
    #[arg(short = 'J', long, value_name = "output-json")]
    pub output_json: Option<PathBuf>,

    /// Encrypt blob data and context; the key lies in the bootstrap.
    #[arg(short = 'E', long)]
    pub encrypt: bool,

    /// Instead of the blob, write what the cache of a daemon holds when it has fetched all of it.
    #[arg(
        long,
        value_name = "blob-cache-dir",
        conflicts_with_all = ["blob", "blob_dir", "blob_inline_meta", "compressor"]
    )]
    pub blob_cache_dir: Option<PathBuf>,

    /// Attributes file of model artifacts (not built yet).
    #[arg(long, value_name = "attributes")]
    pub attributes: Option<PathBuf>,

    /// Worker threads; 0 means one per core. The output does not depend on it.
    #[arg(long, value_name = "threads", default_value = "0")]
    pub threads: usize,
}

/// Arguments of `merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Bootstraps of the layers, lowest first, each in a file named by its layer's digest.
    #[arg(value_name = "SOURCE", required = true)]
    pub sources: Vec<PathBuf>,

    /// Where to write the merged bootstrap.
    #[arg(short = 'B', long, value_name = "bootstrap", required_unless_present = "blob_dir")]
    pub bootstrap: Option<PathBuf>,

    /// Directory for the merged bootstrap, named by its digest, without --bootstrap.
    #[arg(short = 'D', long, value_name = "blob-dir")]
    pub blob_dir: Option<PathBuf>,

    /// Merge onto this bootstrap.
    #[arg(long, value_name = "parent-bootstrap")]
    pub parent_bootstrap: Option<PathBuf>,

    /// Image whose chunks are not stored again, as bootstrap=FILE or FILE.
    #[arg(long, value_name = "chunk-dict")]
    pub chunk_dict: Option<String>,

    /// What to prefetch; patterns come on stdin.
    #[arg(long, value_name = "prefetch-policy", default_value = "none")]
    pub prefetch_policy: PrefetchPolicy,

    /// Write a summary in JSON to this file.
    #[arg(short = 'J', long, value_name = "output-json")]
    pub output_json: Option<PathBuf>,

    /// Accepted; dictionaries are read from their bootstraps alone.
    #[arg(short = 'C', long, value_name = "config")]
    pub config: Option<PathBuf>,

    /// Blob id of each source.
    #[arg(long, value_name = "blob-digests", value_delimiter = ',')]
    pub blob_digests: Vec<String>,

    /// Original blob id of each source, instead of its file name.
    #[arg(long, value_name = "original-blob-ids", value_delimiter = ',')]
    pub original_blob_ids: Vec<String>,

    /// Blob length of each source.
    #[arg(long, value_name = "blob-sizes", value_delimiter = ',')]
    pub blob_sizes: Vec<String>,

    /// Digest of the table of content of each source's blob.
    #[arg(long, value_name = "blob-toc-digests", value_delimiter = ',')]
    pub blob_toc_digests: Vec<String>,

    /// Length of the table of content of each source's blob.
    #[arg(long, value_name = "blob-toc-sizes", value_delimiter = ',')]
    pub blob_toc_sizes: Vec<String>,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Bootstrap to check.
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap_flag", value_parser = bootstrap_file())]
    pub bootstrap: Option<PathBuf>,

    /// Bootstrap to check.
    #[arg(short = 'B', long = "bootstrap", value_name = "bootstrap", conflicts_with = "bootstrap")]
    pub bootstrap_flag: Option<PathBuf>,

    /// Every chunk is compared with its digest if this says where they are.
    #[command(flatten)]
    pub places: PlaceArgs,

    /// Configuration of the daemon, whose backend has the blobs: every chunk is compared with its digest.
    #[arg(short = 'C', long, value_name = "config", conflicts_with_all = ["blob", "blob_dir", "backend_type"])]
    pub config: Option<PathBuf>,

    /// Print the tree.
    #[arg(short = 'v', long)]
    pub verbose: bool,

    /// Write a summary in JSON to this file.
    #[arg(short = 'J', long, value_name = "output-json")]
    pub output_json: Option<PathBuf>,

    /// The image root digest must be this, written ALGORITHM:HEX.
    #[arg(long, value_name = "expect-root")]
    pub expect_root: Option<String>,

    /// Prove one file or directory against the image root digest.
    #[arg(long, value_name = "prove")]
    pub prove: Option<PathBuf>,

    /// Compare with what the image was made from: a directory, layer tars (lowest first, given
    /// once each), or an OCI image as `convert` takes it.
    #[arg(long, value_name = "source")]
    pub source: Vec<OsString>,

    /// Which image of an index --source means, as OS/ARCH[/VARIANT] [default: this machine's].
    #[arg(long, value_name = "platform", requires = "source")]
    pub platform: Option<storage::oci::manifest::Platform>,
}

impl CheckArgs {
    /// The bootstrap, however it was given.
    pub fn bootstrap(&self) -> Option<&PathBuf> {
        self.bootstrap.as_ref().or(self.bootstrap_flag.as_ref())
    }
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Bootstrap to ask.
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap_flag", value_parser = bootstrap_file())]
    pub bootstrap: Option<PathBuf>,

    /// Bootstrap to ask.
    #[arg(short = 'B', long = "bootstrap", value_name = "bootstrap", conflicts_with = "bootstrap")]
    pub bootstrap_flag: Option<PathBuf>,

    /// Accepted; requests are answered from the bootstrap alone.
    #[arg(short = 'D', long, value_name = "blob-dir")]
    pub blob_dir: Option<PathBuf>,

    /// Accepted; requests are answered from the bootstrap alone.
    #[arg(short = 'C', long, value_name = "config")]
    pub config: Option<PathBuf>,

    /// One request instead of a prompt: stats, blobs, prefetch, ls, cd, stat, chunk, icheck.
    #[arg(short = 'R', long, value_name = "request", allow_hyphen_values = true)]
    pub request: Option<String>,
}

impl InspectArgs {
    /// The bootstrap, however it was given.
    pub fn bootstrap(&self) -> Option<&PathBuf> {
        self.bootstrap.as_ref().or(self.bootstrap_flag.as_ref())
    }
}

/// A path, but not the name of an image: whoever converted one gives that first.
pub fn bootstrap_file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| {
        let text = path.to_string_lossy();
        match text.starts_with("oci:") || text.starts_with("docker://") {
            true => {
                Err("an image, want the file of its bootstrap: `image/image.boot` in its last layer, or \
                         `DIGEST.boot` in the cache of a daemon that served it")
            }
            false => Ok(path),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn error_of(arguments: &[&str]) -> String {
        let mut line = vec!["nydus-image"];
        line.extend(arguments);
        Cli::try_parse_from(line).unwrap_err().to_string()
    }

    #[test]
    fn the_name_of_an_image_is_no_bootstrap() {
        for command in ["check", "inspect"] {
            assert!(error_of(&[command, "oci:layout:latest"]).contains("image/image.boot"));
            assert!(Cli::try_parse_from(["nydus-image", command, "image.boot"]).is_ok());
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn conflicts_name_the_earlier_argument_first() {
        let cache = "--blob-cache-dir=c";
        for (flag, shown) in [
            ("--blob-dir=d", "'--blob-dir <blob-dir>'"),
            ("--blob=b", "'--blob <blob>'"),
            ("--blob-inline-meta", "'--blob-inline-meta'"),
            ("--compressor=none", "'--compressor <compressor>'"),
        ] {
            let want = format!("argument {shown} cannot be used with '--blob-cache-dir <blob-cache-dir>'");
            let mut arguments = vec!["create", flag, cache, "src"];
            if !["--blob-dir=d", "--blob-inline-meta"].contains(&flag) {
                arguments.insert(1, "--bootstrap=x");
            }
            assert!(error_of(&arguments).contains(&want), "{}", error_of(&arguments));
        }
    }

    #[test]
    fn clients_find_what_they_look_for_in_the_help() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("create").unwrap().render_help().to_string();
        for word in ["--type", "tar-rafs", "--batch-size", "--encrypt"] {
            assert!(help.contains(word), "{word}");
        }
    }

    #[test]
    fn aliases_and_glued_requests_parse() {
        let cli = Cli::try_parse_from([
            "nydus-image",
            "create",
            "--log-level",
            "warn",
            "--source-type",
            "directory",
            "--inline-bootstrap",
            "src",
        ])
        .unwrap();
        assert_eq!(cli.log_level, LogLevel::Warn);
        let Some(Command::Create(args)) = cli.command else { panic!() };
        assert_eq!(args.conversion, ConversionType::DirRafs);
        assert!(args.blob_inline_meta);
        let cli = Cli::try_parse_from(["nydus-image", "inspect", "-R blobs", "file"]).unwrap();
        let Some(Command::Inspect(args)) = cli.command else { panic!() };
        assert_eq!(args.request.as_deref().map(str::trim), Some("blobs"));
        assert!(error_of(&["create", "src"]).contains("--bootstrap"));
    }
}
