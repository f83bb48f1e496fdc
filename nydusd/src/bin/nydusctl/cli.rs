//! What was typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use nydusd::cli::WhatArgs;

/// Talks to a running nydusd over its API socket.
#[derive(Debug, Parser)]
#[command(name = "nydusctl", version = nydusd::version::BLOCK)]
pub struct Cli {
    /// API socket of the daemon (its --apisock)
    #[arg(short = 'S', long, value_name = "PATH")]
    pub sock: PathBuf,

    /// Longest wait for an answer of the daemon
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub timeout: u64,

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
    /// Fetch data of a mounted image ahead of its readers
    Prefetch(Prefetch),
    /// What readers waited for, longest wait first
    Why(Why),
    /// What starts of the image read: its files and their ranges, most wanted first
    Trace(Trace),
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
    Push,
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
    #[arg(long, value_name = "PATH")]
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

/// Repetition.
#[derive(Args, Debug)]
pub struct Repeat {
    /// Repeat every so many seconds and print what changed
    #[arg(short = 'I', long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: Option<u64>,
}
