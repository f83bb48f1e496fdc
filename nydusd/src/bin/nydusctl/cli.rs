//! What was typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Talks to a running nydusd over its API socket.
#[derive(Debug, Parser)]
#[command(name = "nydusctl", version = nydusd::version::BLOCK)]
pub struct Cli {
    /// API socket of the daemon (its --apisock)
    #[arg(short = 'S', long, value_name = "PATH")]
    pub sock: PathBuf,

    /// Print the daemon's JSON as it is
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
    /// What starts of the image read: its files and their ranges, most wanted first
    Trace(Trace),
}

/// Forms of a trace.
#[derive(Args, Debug)]
pub struct Trace {
    /// Print the trace as the daemon keeps it
    #[arg(long, conflicts_with = "optimize")]
    pub json: bool,

    /// Print what `nydus-image optimize --prefetch-files` reads
    #[arg(long)]
    pub optimize: bool,
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

/// Repetition.
#[derive(Args, Debug)]
pub struct Repeat {
    /// Repeat every so many seconds and print what changed
    #[arg(short = 'I', long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: Option<u64>,
}
