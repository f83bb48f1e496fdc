//! What was typed.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use nydusd::cli::WhatArgs;

/// Talks to running nydusd daemons over their API sockets, and looks after caches and machines.
#[derive(Debug, Parser)]
#[command(name = "nydusctl", version = nydusd::version::BLOCK)]
pub struct Cli {
    /// API socket of the daemon, its --apisock [default: that of the daemon that runs]
    #[arg(short = 'S', long, global = true, value_name = "PATH")]
    pub sock: Option<PathBuf>,

    /// Longest wait for an answer of the daemon
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub timeout: u64,

    /// Print JSON, the daemon's as it is
    #[arg(short = 'r', long, global = true)]
    pub raw: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Version, state and mounts of the daemon
    Info,
    /// Change the running daemon
    #[command(subcommand)]
    Set(Setting),
    /// Counters
    #[command(subcommand)]
    Metrics(Metrics),
    /// Fetch data of a mounted image ahead of its readers
    Prefetch(Prefetch),
    /// Mount an image, or a host directory, in the daemon
    Mount(Mount),
    /// Take a mount of the daemon away
    Umount(Umount),
    /// What the daemons have mounted, from where, and how much of it is local
    Mounts,
    /// Who reads what from where, refreshed; of all daemons unless --sock names one
    Top(Top),
    /// What lies in a cache directory, and taking it away
    Cache(Cache),
    /// Is this machine ready for nydusd? What is missing, and the remedy
    Check(Check),
    /// What readers waited for, longest wait first
    Why(Why),
    /// What starts of the image read: its files and their ranges, most wanted first
    Trace(Trace),
    /// Write man pages and shell completions, as they are installed below share/
    #[command(hide = true)]
    Pages {
        /// Directory to write to
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

/// What to mount where.
#[derive(Args, Debug)]
pub struct Mount {
    /// Bootstrap file, or host directory
    #[arg(short = 's', long, value_name = "PATH")]
    pub source: PathBuf,

    /// Configuration of the image: v1 JSON, or v2 TOML or JSON; needed for an image
    #[arg(short = 'c', long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Where it appears, seen from the daemon's own root
    #[arg(short = 'm', long, value_name = "PATH")]
    pub mountpoint: String,

    /// What the source is
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "rafs", value_parser = ["rafs", "passthrough_fs"])]
    pub kind: String,
}

impl Mount {
    /// An image does not go without its configuration.
    ///
    /// # Errors
    /// A usage error.
    pub fn check(&self) -> Result<(), clap::Error> {
        match (&self.config, self.kind.as_str()) {
            (None, "rafs") => Err(Cli::command().error(
                ErrorKind::MissingRequiredArgument,
                "an image needs --config, which says where its blobs are",
            )),
            _ => Ok(()),
        }
    }
}

/// What to unmount.
#[derive(Args, Debug)]
pub struct Umount {
    /// Where it appears, seen from the daemon's own root
    #[arg(short = 'm', long, value_name = "PATH")]
    pub mountpoint: String,
}

/// How to show who reads.
#[derive(Args, Debug)]
pub struct Top {
    /// Print once what was read since the mount, and end
    #[arg(long, conflicts_with = "interval")]
    pub once: bool,

    /// Seconds between two looks
    #[arg(
        short = 'I',
        long,
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub interval: u64,

    /// Rows for each mount
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    pub count: usize,
}

/// A cache directory.
#[derive(Args, Debug)]
pub struct Cache {
    /// The directory [default: /var/lib/nydus/cache for root, else $XDG_CACHE_HOME/nydus; `ls` also those of daemons
    /// that run]
    #[arg(long, global = true, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// What to do with it
    #[command(subcommand)]
    pub action: CacheAction,
}

/// What is done with a cache directory.
#[derive(Debug, Subcommand)]
pub enum CacheAction {
    /// What is there: how much of it, when it was used last, who uses it now
    Ls,
    /// Remove blobs or bootstraps by name, unless a daemon uses them
    #[command(after_help = "Exit codes: 0 all are gone; 1 something was kept; 2 wrong usage.")]
    Rm {
        /// Blob id or bootstrap digest; the beginning is enough if nothing else begins so
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// Remove what was not used for longest until the rest fits; never what a daemon uses
    #[command(after_help = "Exit codes: 0 the rest fits; 1 what is in use does not fit; 2 wrong usage.")]
    Prune {
        /// Bytes on disk that may stay: 10GiB, 500MB
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: u64,

        /// Say what would go, and remove nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// What to look at on this machine.
#[derive(Args, Debug)]
#[command(after_help = "Exit codes: 0 ready; 1 something that is needed is missing; 2 wrong usage.")]
pub struct Check {
    /// Cache directory to look at [default: that of nydusd]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let size = text.parse::<bytesize::ByteSize>();
    size.map(|size| size.as_u64()).map_err(|_| format!("{text:?}: want a number of bytes, as in 10GiB"))
}

/// How to show what readers waited for.
#[derive(Args, Debug)]
pub struct Why {
    /// Mountpoint or id of the image, if the daemon has several
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,

    /// Print everything as JSON
    #[arg(long, conflicts_with = "html")]
    pub json: bool,

    /// Write a page with a timeline to this file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// Rows of each table
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    pub count: usize,
}

/// Forms of a trace.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Trace {
    /// What to do with it, if not to show it
    #[command(subcommand)]
    pub action: Option<TraceAction>,

    /// Mountpoint or id of the image, if the daemon has several
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,

    /// Print the trace as the daemon keeps it
    #[arg(long, conflicts_with = "optimize")]
    pub json: bool,

    /// Print what `nydus-image optimize --prefetch-files` reads
    #[arg(long)]
    pub optimize: bool,
}

/// What is done with a trace.
#[derive(Debug, Subcommand)]
pub enum TraceAction {
    /// Push it to the image's repository, for other nodes to start with
    Push {
        /// Mountpoint or id of the image, if the daemon has several
        #[arg(long, value_name = "ID")]
        id: Option<String>,
    },
}

/// Settings.
#[derive(Debug, Subcommand)]
pub enum Setting {
    /// Least severe message that is logged: trace, debug, info, warn or error
    LogLevel {
        /// The level
        value: String,
    },
}

/// A prefetch.
#[derive(Args, Debug)]
#[command(after_help = "Exit codes: 0 started, or with --wait all is there; 1 otherwise; 2 wrong usage.")]
pub struct Prefetch {
    /// What to fetch.
    #[command(flatten)]
    pub what: WhatArgs,

    /// Mountpoint or id of the image, if the daemon has several
    #[arg(long, alias = "id", value_name = "PATH")]
    pub mountpoint: Option<String>,

    /// Wait for the end and show how far it is
    #[arg(long)]
    pub wait: bool,
}

/// Families of counters.
#[derive(Debug, Subcommand)]
pub enum Metrics {
    /// Requests to the source of blobs
    Backend(Repeat),
    /// The local cache
    Cache(Repeat),
    /// File system operations
    Fsstats(Repeat),
    /// Everything, as a scraper gets it
    Prometheus,
}

/// Of which mount, and how often.
#[derive(Args, Debug)]
pub struct Repeat {
    /// Mountpoint or id of the image, if the daemon has several
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,

    /// Repeat every so many seconds and print what changed
    #[arg(short = 'I', long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: Option<u64>,
}
